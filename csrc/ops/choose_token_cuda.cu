// choose_token on CUDA: the largest score of every row and all that follows from it, in one launch.
//
// A block looks through a share of a row and leaves its largest score, with its place, as one whole number; the last
// block to come, by a counter, takes the largest of each row and moves the rows on, a thread a row. Which block is last
// does not matter for the result.
//
// Not measured yet: no GPU was at hand.
#include "ops/choose_token.h"

#include <algorithm>

#include "core/dispatch.h"
#include "cuda/launch.h"
#include "cuda/vec.cuh"

namespace alula {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int64_t kLeastShare = 8 * kThreads;  // scores of a block

struct Params {
  ChooseTokenArgs args;
  ScoreKey* workspace;
  uint32_t* counter;
  int splits;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) choose_token_kernel(Params p) {
  const ChooseTokenArgs& args = p.args;
  const Shared<ScoreKey> keys = dynamic_shared<ScoreKey>();
  const Shared<int> is_last = dynamic_shared<int>(kWarps * 8);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t row = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
  const T* scores = static_cast<const T*>(args.scores) + row * args.row_stride;
  const int64_t first = args.vocab_size * split / p.splits, last = args.vocab_size * (split + 1) / p.splits;
  ScoreKey largest = 0;
#pragma unroll 4
  for (int64_t i = first + thread; i < last; i += kThreads) {
    const ScoreKey key = score_key(bits_of_float(to_float(scores[i])), i);
    largest = key > largest ? key : largest;
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const ScoreKey other = __shfl_xor_sync(kWholeWarp, largest, distance);
    largest = other > largest ? other : largest;
  }
  if (lane == 0) keys[warp] = largest;
  __syncthreads();
  if (thread == 0) {
    for (int i = 1; i < kWarps; i++) {
      const ScoreKey other = keys[i];
      largest = other > largest ? other : largest;
    }
    p.workspace[blockIdx.x] = largest;
    __threadfence();  // it is there before the block is counted
    const unsigned most = gridDim.x - 1;
    is_last[0] = atomicInc(p.counter, most) == most;  // wraps to 0
  }
  __syncthreads();
  if (is_last[0] == 0) return;
  __threadfence();
  const int64_t step = args.step[0];
  for (int64_t i = thread; i < args.rows; i += kThreads) {
    ScoreKey key = p.workspace[i * p.splits];
    for (int j = 1; j < p.splits; j++) {
      const ScoreKey other = p.workspace[i * p.splits + j];
      key = other > key ? other : key;
    }
    choose_row(args, i, key, step);
  }
  __syncthreads();  // all have read the step
  if (thread == 0) args.step[0] = step + 1;
}

}  // namespace

ChooseTokenPlan choose_token_plan(const ChooseTokenArgs& args, const CudaDevice& device) {
  // A block a multiprocessor, and for each thread something to read.
  const int64_t room = device.num_multiprocessors / std::max<int64_t>(args.rows, 1);
  const int64_t splits = std::clamp<int64_t>(std::min(room, args.vocab_size / kLeastShare), 1, 64);
  return {static_cast<int>(splits), args.rows * splits};
}

void choose_token_cuda(const ChooseTokenArgs& args, const ChooseTokenPlan& plan, ScoreKey* workspace, uint32_t* counter,
                       const CudaStream& stream) {
  const Params p = {args, workspace, counter, plan.splits};
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch("choose_token_kernel", choose_token_kernel<T>,
           {.blocks = {plan.num_keys},
            .threads = kThreads,
            .shared_bytes = kWarps * 8 + 4,
            .starts_before_previous = true},
           stream, p);
  });
}

}  // namespace alula
