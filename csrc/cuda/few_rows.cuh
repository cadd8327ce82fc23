// The product of up to 16 rows of X [M, K] with W^T, W [N, K] row-major (cuda/weight_layout.h): bound by reading W
// once.
//
// A block owns 8 features, that is 8 rows of W; its 8 warps share out K and add up through shared memory at the end.
// Lane 4 g + t reads 16 bytes of row g at a time, four lanes side by side. The sums of all 16 rows of X come from the
// tensor cores: a sum over K may run in any order, so the 8 neighbours of K that a lane has read are said to be those
// that the fragments of two products (m16n8k16) want of it, and nothing is moved between lanes. X is read in the same
// order from the second-level cache, normed on the way where a layer norm goes before.
//
// fp32 has no tensor-core product that keeps its digits: each lane multiplies its 4 neighbours of K with every row of
// X.
//
// The epilogue is called by the block's first threads with two neighbouring features of one row, in fp32; of a
// library's product, with packs of 16 bytes where everything lies even.
#pragma once

#include <type_traits>

#include "core/dispatch.h"
#include "cpu/panel_gemm_args.h"
#include "cuda/launch.h"
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
  static constexpr int kSharedBytes = kSumsBytes + kMaxFewRows * 2 * 4;
  static_assert(kMaxFewRows * kFeatures / 2 <= kThreads, "each pair of sums has a thread in the epilogue");
};

// Row `feature` of W; the last one in place of those beyond it, whose sums nobody reads.
template <typename T>
__device__ __forceinline__ const T* weight_row(const FewRowsParams& p, int feature) {
  const int there = feature < p.n ? feature : p.n - 1;
  return static_cast<const T*>(p.weight) + there * p.stride;
}

// 16 bytes of a row of W from `column` on; zeros beyond its end.
template <typename T>
__device__ __forceinline__ void load_weight(uint32_t (&w)[4], const T* row, int column, int stride) {
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = 0;
  if (column < stride) load_once(w, row + column);
}

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

// What this warp's share of K adds to the block's 16 x 8 sums, for 16-bit T: c as multiply_add has it.
// kRows: 8 or 16 rows of X at most.
template <typename T, int kRows, bool kNorm, bool kIsEven>
__device__ __forceinline__ void sum_on_tensor_cores(const FewRowsParams& p, Shared<float> moments, float (&c)[4]) {
  constexpr int kUnroll = FewRows::kUnroll, kStep = 32, kSpan = kUnroll * kStep;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int feature = static_cast<int>(blockIdx.x) * FewRows::kFeatures + g;
  constexpr int kStride = FewRows::kWarps * kSpan;

  const T* own_weight = weight_row<T>(p, feature);
  const auto stride = static_cast<int>(p.stride);
  uint32_t next[kUnroll][4];
  const auto fetch = [&](int first) {
#pragma unroll
    for (int u = 0; u < kUnroll; u++) load_weight(next[u], own_weight, first + u * kStep + t * 8, stride);
  };
  fetch(warp * kSpan);  // under way while the rows' moments are found
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (kNorm) find_moments<kIsEven, T>(p, moments, dynamic_shared<float>());
  float mean[kRows / 8], inverse[kRows / 8];
#pragma unroll
  for (int half = 0; half < kRows / 8; half++) {
    const bool is_there = kNorm && g + 8 * half < p.m;
    mean[half] = is_there ? static_cast<float>(moments[2 * (g + 8 * half)]) : 0.0f;
    inverse[half] = is_there ? static_cast<float>(moments[2 * (g + 8 * half) + 1]) : 0.0f;
  }

  // Lanes without a row of their own read the last one: the warp stays together for the product, and a row of X has a
  // part in no sums but its own. Without a bias the weight is read in its place, and not used.
  const T* rows[kRows / 8];
#pragma unroll
  for (int half = 0; half < kRows / 8; half++) {
    const int row = g + 8 * half < p.m ? g + 8 * half : p.m - 1;
    rows[half] = static_cast<const T*>(p.x) + static_cast<int64_t>(row) * p.k;
  }
  [[maybe_unused]] const T* norm_bias = static_cast<const T*>(p.norm_bias != nullptr ? p.norm_bias : p.norm_weight);

  for (int first = warp * kSpan; first < p.k; first += kStride) {
    uint32_t w[kUnroll][4];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
#pragma unroll
      for (int i = 0; i < 4; i++) w[u][i] = next[u][i];
    }
    if (first + kStride < p.k) fetch(first + kStride);
    // Two steps of X and of the norm are under way together; all four would take too many registers.
    constexpr int kTogether = 2;
#pragma unroll
    for (int u0 = 0; u0 < kUnroll; u0 += kTogether) {
      Words<T, 8> raw[kTogether][kRows / 8];
      [[maybe_unused]] Words<T, 8> raw_weight[kTogether], raw_bias[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; u++) {
        const int column = first + (u0 + u) * kStep + t * 8;
#pragma unroll
        for (int half = 0; half < kRows / 8; half++) raw[u][half] = load_raw<kIsEven, 8>(rows[half], column, p);
        if constexpr (kNorm) {
          raw_weight[u] = load_raw<kIsEven, 8>(static_cast<const T*>(p.norm_weight), column, p);
          raw_bias[u] = load_raw<kIsEven, 8>(norm_bias, column, p);
        }
      }
#pragma unroll
      for (int u = 0; u < kTogether; u++) {
        uint32_t x[2][4] = {};  // of rows g and g + 8
#pragma unroll
        for (int half = 0; half < kRows / 8; half++) {
          if constexpr (kNorm) {
            float v[8], w[8], b[8];
            widen(v, raw[u][half]);
            widen(w, raw_weight[u]);
            widen(b, raw_bias[u]);
#pragma unroll
            for (int i = 0; i < 8; i++)
              v[i] = (v[i] - mean[half]) * inverse[half] * w[i] + (p.norm_bias != nullptr ? b[i] : 0.0f);
#pragma unroll
            for (int i = 0; i < 4; i++) x[half][i] = pair_of<T>(v[2 * i], v[2 * i + 1]);
          } else {
#pragma unroll
            for (int i = 0; i < 4; i++) x[half][i] = raw[u][half].words[i];
          }
        }
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const uint32_t a[4] = {x[0][i], x[1][i], x[0][i + 1], x[1][i + 1]};
          const uint32_t b[2] = {w[u0 + u][i], w[u0 + u][i + 1]};
          multiply_add(c, a, b, T{});
        }
      }
    }
  }
}

// The same for fp32, on the plain units: sums[m] of row m and feature g, over the four lanes of g.
template <int kRows, bool kNorm, bool kIsEven>
__device__ __forceinline__ void sum_in_fp32(const FewRowsParams& p, Shared<float> moments, float (&sums)[kRows]) {
  constexpr int kUnroll = FewRows::kUnroll, kStep = 16, kSpan = kUnroll * kStep;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int feature = static_cast<int>(blockIdx.x) * FewRows::kFeatures + g;
  const float* own_weight = weight_row<float>(p, feature);
  const auto stride = static_cast<int>(p.stride);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (kNorm) find_moments<kIsEven, float>(p, moments, dynamic_shared<float>());

  for (int first = warp * kSpan; first < p.k; first += FewRows::kWarps * kSpan) {
    uint32_t w[kUnroll][4];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) load_weight(w[u], own_weight, first + u * kStep + t * 4, stride);
#pragma unroll
    for (int m = 0; m < kRows; m++) {
      if (m >= p.m) break;
      const float mean = kNorm ? static_cast<float>(moments[2 * m]) : 0.0f;
      const float inverse = kNorm ? static_cast<float>(moments[2 * m + 1]) : 0.0f;
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        float x[4];
        load_x<kIsEven, kNorm>(x, p, m, first + u * kStep + t * 4, mean, inverse, TypeTag<float>{});
#pragma unroll
        for (int i = 0; i < 4; i++) sums[m] += x[i] * float_of_bits(w[u][i]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRows; m++) sums[m] = reduce_lanes<Sum, 4>(sums[m]);
}

template <typename T, int kRows, bool kNorm, bool kIsEven, typename Epilogue>
__global__ void __launch_bounds__(FewRows::kThreads, 1) few_rows_kernel(FewRowsParams p, Epilogue epilogue) {
  constexpr int kFeatures = FewRows::kFeatures;
  const Shared<float> sums = dynamic_shared<float>();  // [warp][16 rows][8 features]
  const Shared<float> moments = dynamic_shared<float>(FewRows::kSumsBytes);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const Shared<float> own = sums + warp * kMaxFewRows * kFeatures;

  if constexpr (std::is_same_v<T, float>) {
    float c[kRows] = {};
    sum_in_fp32<kRows, kNorm, kIsEven>(p, moments, c);
#pragma unroll
    for (int m = 0; m < kRows; m++) {
      if (m % 4 == t) own[m * kFeatures + g] = c[m];
    }
  } else {
    float c[4] = {};
    sum_on_tensor_cores<T, kRows, kNorm, kIsEven>(p, moments, c);
#pragma unroll
    for (int i = 0; i < 2 * (kRows / 8); i++) own[(g + i / 2 * 8) * kFeatures + 2 * t + i % 2] = c[i];
  }
  __syncthreads();

  const int row = static_cast<int>(threadIdx.x) / (kFeatures / 2);
  const int feature = static_cast<int>(blockIdx.x) * kFeatures + static_cast<int>(threadIdx.x) % (kFeatures / 2) * 2;
  if (row >= p.m || feature >= p.n) return;
  float pair[2] = {0.0f, 0.0f};
  for (int other = 0; other < FewRows::kWarps; other++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      pair[i] += sums[(other * kMaxFewRows + row) * kFeatures + feature % kFeatures + i];
    }
  }
  epilogue(row, feature, pair);
}

// The epilogue alone, of a product [M, N] that a library made: kPack neighbouring features a thread.
template <typename T, int kPack, typename Epilogue>
__global__ void __launch_bounds__(256) epilogue_kernel(const T* product, int64_t num_packs, int n, Epilogue epilogue) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x);
  if (index >= num_packs) return;
  const auto packs = static_cast<unsigned>((n + kPack - 1) / kPack);
  // A division of 64 bits takes longer than all the rest.
  const int64_t row = num_packs <= 0xffffffff ? static_cast<unsigned>(index) / packs : index / packs;
  const int feature = static_cast<int>(index - row * packs) * kPack;
  const T* from = product + row * n + feature;
  float values[kPack] = {};
  if (kPack > 2 || n % 2 == 0) {
    load_pack(values, from);
  } else {
    values[0] = to_float(from[0]);
    if (feature + 1 < n) values[1] = to_float(from[1]);
  }
  epilogue(row, feature, values);
}

template <typename T, typename Epilogue>
void launch_few_rows(const char* name, const FewRowsParams& p, const Epilogue& epilogue, const CudaStream& stream) {
  const LaunchOptions options = {.blocks = {(p.n + FewRows::kFeatures - 1) / FewRows::kFeatures},
                                 .threads = FewRows::kThreads,
                                 .shared_bytes = FewRows::kSharedBytes,
                                 .starts_before_previous = true};
  const auto launch_as = [&](auto rows, auto is_even) {
    constexpr int kRows = decltype(rows)::value;
    constexpr bool kIsEven = decltype(is_even)::value;
    launch(name,
           p.norm_weight != nullptr ? few_rows_kernel<T, kRows, true, kIsEven, Epilogue>
                                    : few_rows_kernel<T, kRows, false, kIsEven, Epilogue>,
           options, stream, p, epilogue);
  };
  const auto with_rows = [&](auto rows) { launch_as(rows, std::true_type{}); };
  if (!p.is_aligned) return launch_as(std::integral_constant<int, 16>{}, std::false_type{});
  if constexpr (std::is_same_v<T, float>) {
    if (p.m == 1) return with_rows(std::integral_constant<int, 1>{});
    if (p.m <= 4) return with_rows(std::integral_constant<int, 4>{});
  } else {
    if (p.m <= 8) return with_rows(std::integral_constant<int, 8>{});
  }
  with_rows(std::integral_constant<int, 16>{});
}

template <typename T, typename Epilogue>
void launch_epilogue(const char* name, const void* product, int64_t m, int64_t n, const Epilogue& epilogue,
                     const CudaStream& stream) {
  const auto launch_as = [&](auto pack) {
    constexpr int kPack = decltype(pack)::value;
    const int64_t packs = m * ((n + kPack - 1) / kPack);
    launch(name, epilogue_kernel<T, kPack, Epilogue>, {.blocks = {(packs + 255) / 256}, .threads = 256}, stream,
           static_cast<const T*>(product), packs, static_cast<int>(n), epilogue);
  };
  if (epilogue.takes_packs() && is_aligned_16(product)) return launch_as(std::integral_constant<int, kPackSize<T>>{});
  launch_as(std::integral_constant<int, 2>{});
}

}  // namespace alula
