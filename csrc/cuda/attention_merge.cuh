// How parts of attention's rows, over different keys, become one: sums relative to a maximum each, merged relative to
// the largest. The parts lie in shared memory (those of warps) or in a workspace (those of blocks, the last of which
// merges).
#pragma once

#include "cuda/attention_tile.cuh"
#include "cuda/vec.cuh"

namespace alula::tiles {

// Merges `count` parts of `rows` rows. Their maxima and denominators are in `states` [count][kRows][2]; of part i, four
// columns of a row are sums_of(i, row, column). Calls done(row, column, sums, maximum, denominator), a thread for every
// four columns. All threads come here, with a barrier behind them since `states` was written; `states` is used up.
template <typename C, typename SumsOf, typename Done>
__device__ __forceinline__ void merge_rows(int count, int rows, int head_dim, ScoreUnits units, Shared<float> states,
                                           const SumsOf& sums_of, const Done& done) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < rows) {
    const auto state = [&](int part, int which) { return states + 2 * (part * C::kRows + thread) + which; };
    const RowState whole = merged(
        count, units, [&](int i) -> float { return *state(i, 0); }, [&](int i) -> float { return *state(i, 1); });
    for (int i = 0; i < count; i++) {
      const float weight = weight_of(*state(i, 0), whole.maximum, units);
      *state(i, 0) = weight;  // in the place of the part's maximum
    }
    *state(count, 0) = whole.maximum;
    *state(count, 1) = whole.denominator;
  }
  __syncthreads();
  constexpr int kQuads = C::kD / 4, kAtOnce = 4;  // items of a thread that are under way together
  static_assert(C::kRows * kQuads % (kAtOnce * kThreads) == 0 || C::kRows * kQuads / kThreads < kAtOnce,
                "a thread's items come in whole steps");
  constexpr int kItems = C::kRows * kQuads / kThreads < kAtOnce ? C::kRows * kQuads / kThreads : kAtOnce;
#pragma unroll 1
  for (int first = thread; first < rows * kQuads; first += kItems * kThreads) {
    float sums[kItems][4] = {};
#pragma unroll 4
    for (int part = 0; part < count; part++) {
#pragma unroll
      for (int n = 0; n < kItems; n++) {
        const int row = (first + n * kThreads) / kQuads, column = (first + n * kThreads) % kQuads * 4;
        if (row >= rows || column >= head_dim) continue;
        const float weight = states[2 * (part * C::kRows + row)];
        const Pack<float, 4> values = sums_of(part, row, column);
#pragma unroll
        for (int c = 0; c < 4; c++) sums[n][c] += values.values[c] * weight;
      }
    }
#pragma unroll
    for (int n = 0; n < kItems; n++) {
      const int row = (first + n * kThreads) / kQuads, column = (first + n * kThreads) % kQuads * 4;
      if (row >= rows || column >= head_dim) continue;
      const Shared<float> whole = states + 2 * (count * C::kRows + row);
      done(row, column, sums[n], whole[0], whole[1]);
    }
  }
}

// Whether this block is the last of `count` that come to `counter`. What its threads wrote before is there for the
// last, and what the others wrote is there for this block's threads after.
__device__ __forceinline__ bool is_last_of(uint32_t* counter, int count, Shared<int> flag) {
  __threadfence();  // what this thread wrote is there before the block is counted
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto last = static_cast<unsigned>(count) - 1;
    flag[0] = atomicInc(counter, last) == last;  // wraps to 0
  }
  __syncthreads();
  if (flag[0] == 0) return false;
  __threadfence();
  return true;
}

}  // namespace alula::tiles
