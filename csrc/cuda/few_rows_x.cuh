// The rows of X of a product of few rows, as the warps of cuda/few_rows.cuh and cuda/quantized_few_rows.cuh take them:
// what is asked of the product, the layer norm's moments, and values from memory, normed on the way, straight or by way
// of shared memory.
#pragma once

#include <type_traits>

#include "core/dispatch.h"
#include "cpu/panel_gemm_args.h"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "cuda/weight_layout.h"

namespace alula {

struct FewRowsParams {
  const void* x;            // [M, K]
  const void* weight;       // [N, stride]
  const void* norm_weight;  // [K], null: no layer norm
  const void* norm_bias;    // [K], may be null
  float norm_eps;
  int m, n, k;
  int64_t stride;
  bool is_aligned;  // rows of X and the norm's vectors can be read 16 bytes at a time
};

template <typename T>
FewRowsParams few_rows_params(const PanelGemmArgs& gemm) {
  return {gemm.x,
          gemm.weight,
          gemm.norm_weight,
          gemm.norm_bias,
          gemm.norm_eps,
          static_cast<int>(gemm.m),
          static_cast<int>(gemm.n),
          static_cast<int>(gemm.k),
          row_stride(gemm.dtype, gemm.k),
          gemm.k % kPackSize<T> == 0 && is_aligned_16(gemm.x) && is_aligned_16(gemm.norm_weight) &&
              is_aligned_16(gemm.norm_bias)};
}

struct FewRows {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kFeatures = 8;  // of a block
  static constexpr int kUnroll = 4;    // 16-byte loads of W under way per lane
  static constexpr int kSumsBytes = kWarps * kMaxFewRows * kFeatures * 4;
  static_assert(kMaxFewRows * kFeatures / 2 <= kThreads, "each pair of sums has a thread in the epilogue");
};

// N values of a vector of K from `column` on, as they lie there; zeros beyond its end. kIsEven: `is_aligned` is known
// to hold, and there is no branch between two of these loads, so that several are under way together.
template <bool kIsEven, int N, typename T>
__device__ __forceinline__ Words<T, N> load_raw(const T* from, int column, const FewRowsParams& p) {
  using Element = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  Words<T, N> raw = {};
  if (kIsEven || p.is_aligned) {
    if (column < p.k) raw = *reinterpret_cast<const Words<T, N>*>(from + column);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (column + i >= p.k) continue;
      const uint32_t bits = reinterpret_cast<const Element*>(from)[column + i];
      raw.words[i * static_cast<int>(sizeof(T)) / 4] |= bits << i * static_cast<int>(sizeof(T)) * 8 % 32;
    }
  }
  return raw;
}

template <bool kIsEven, int N, typename T>
__device__ __forceinline__ void load_guarded(float (&v)[N], const T* from, int column, const FewRowsParams& p) {
  widen(v, load_raw<kIsEven, N>(from, column, p));
}

// Mean and 1 / deviation of each row of X into `moments` [M][2]. One row is shared out over all warps: with no warp
// idle the first product comes sooner. Of several rows each warp takes one, and adds up in the same order (as if it
// were kWarps warps), so that a row's bits do not depend on how many there are. `scratch`: a float per warp.
template <bool kIsEven, typename T>
__device__ __forceinline__ void find_moments(const FewRowsParams& p, Shared<float> moments, Shared<float> scratch) {
  constexpr int N = kPackSize<T>, kWarps = FewRows::kWarps, kStep = FewRows::kThreads * N;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const auto width = static_cast<float>(p.k);
  const auto add = [&](float& sum, const T* x, int column) {
    float v[N];
    load_guarded<kIsEven>(v, x, column, p);
#pragma unroll
    for (int i = 0; i < N; i++) sum += v[i];
  };
  const auto add_squares = [&](float& sum, const T* x, int column, float mean) {
    float v[N];
    load_guarded<kIsEven>(v, x, column, p);
#pragma unroll
    for (int i = 0; i < N; i++) sum += column + i < p.k ? (v[i] - mean) * (v[i] - mean) : 0.0f;
  };
  if (p.m == 1) {
    const T* x = static_cast<const T*>(p.x);
    float sum = 0.0f, squares = 0.0f;
#pragma unroll 4
    for (int column = thread * N; column < p.k; column += kStep) add(sum, x, column);
    const float mean = reduce_block<Sum>(sum, scratch) / width;
#pragma unroll 4
    for (int column = thread * N; column < p.k; column += kStep) add_squares(squares, x, column, mean);
    const float variance = reduce_block<Sum>(squares, scratch) / width;
    if (thread == 0) {
      moments[0] = mean;
      moments[1] = rsqrtf(variance + p.norm_eps);
    }
  } else {
    const auto total = [](float (&sums)[kWarps]) {
#pragma unroll
      for (int w = 0; w < kWarps; w++) sums[w] = reduce_lanes<Sum>(sums[w]);
#pragma unroll
      for (int distance = kWarps / 2; distance > 0; distance /= 2) {
#pragma unroll
        for (int w = 0; w < distance; w++) sums[w] += sums[w + distance];
      }
      return sums[0];
    };
#pragma unroll 1
    for (int row = warp; row < p.m; row += kWarps) {
      const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(row) * p.k;
      float sums[kWarps] = {}, squares[kWarps] = {};
#pragma unroll 1
      for (int first = lane * N; first < p.k; first += kStep) {
#pragma unroll
        for (int w = 0; w < kWarps; w++) add(sums[w], x, first + w * kWarpSize * N);
      }
      const float mean = total(sums) / width;
#pragma unroll 1
      for (int first = lane * N; first < p.k; first += kStep) {
#pragma unroll
        for (int w = 0; w < kWarps; w++) add_squares(squares[w], x, first + w * kWarpSize * N, mean);
      }
      const float variance = total(squares) / width;
      if (lane == 0) {
        moments[2 * row] = mean;
        moments[2 * row + 1] = rsqrtf(variance + p.norm_eps);
      }
    }
  }
  __syncthreads();
}

// N values of row `row` of X from `column` on, normed; zeros beyond its end.
template <bool kIsEven, bool kNorm, int N, typename T>
__device__ __forceinline__ void load_x(float (&v)[N], const FewRowsParams& p, int row, int column, float mean,
                                       float inverse, TypeTag<T>) {
  load_guarded<kIsEven>(v, static_cast<const T*>(p.x) + static_cast<int64_t>(row) * p.k, column, p);
  if constexpr (kNorm) {
    float w[N], b[N] = {};
    load_guarded<kIsEven>(w, static_cast<const T*>(p.norm_weight), column, p);
    if (p.norm_bias != nullptr) load_guarded<kIsEven>(b, static_cast<const T*>(p.norm_bias), column, p);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = (v[i] - mean) * inverse * w[i] + b[i];  // beyond the end w and b are 0
  }
}

// A warp's own part of shared memory: its rows of X, kSpan neighbours of K of each, normed. Lanes that hold a row each
// would read and norm the same values eight times over where there is one row; so they share them out first.
template <typename T, int kSpan, int kRows>
struct StagedRows {
  // 64 bytes of padding a row: those lanes that read at once, of two rows, meet all banks.
  static constexpr int kStride = kSpan + 64 / static_cast<int>(sizeof(T));
  static constexpr int kQuads = kSpan / 4;
  static constexpr int kWarpValues = kRows * kStride;
  static constexpr int kBytes = FewRows::kWarps * kWarpValues * static_cast<int>(sizeof(T));

  Shared<T> values;  // [kRows][kStride]

  __device__ __forceinline__ StagedRows() : values(dynamic_shared<T>() + threadIdx.x / kWarpSize * kWarpValues) {}

  // k [first, first + kSpan) of all rows; zeros beyond K. place_of(quad): where four neighbours lie in a row;
  // kIsSpread: in the order 0, 2, 1, 3.
  template <bool kIsEven, bool kIsSpread = false, typename PlaceOf>
  __device__ __forceinline__ void stage(const FewRowsParams& p, int first, Shared<float> moments,
                                        const PlaceOf& place_of) const {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x % kWarpSize); i < p.m * kQuads; i += kWarpSize) {
      const int row = i / kQuads, quad = i % kQuads, column = first + 4 * quad;
      float v[4];
      if (p.norm_weight != nullptr) {
        load_x<kIsEven, true>(v, p, row, column, moments[2 * row], moments[2 * row + 1], TypeTag<T>{});
      } else {
        load_x<kIsEven, false>(v, p, row, column, 0.0f, 1.0f, TypeTag<T>{});
      }
      Pack<T, 4> pack;
#pragma unroll
      for (int j = 0; j < 4; j++) pack.values[j] = from_float<T>(v[kIsSpread ? j / 2 + j % 2 * 2 : j]);
      shared_cast<Pack<T, 4>>(values + row * kStride + place_of(quad))[0] = pack;
    }
    __syncwarp();
  }

  // Where the values of row `row` begin; of the last one for lanes without a row of their own: the warp stays together
  // for the product, and a row of X has a part in no sums but its own.
  __device__ __forceinline__ int row_at(const FewRowsParams& p, int row) const {
    return (row < p.m ? row : p.m - 1) * kStride;
  }
};

}  // namespace alula
