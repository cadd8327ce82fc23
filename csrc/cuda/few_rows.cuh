// The product of up to 16 rows of X [M, K] with W^T, W [N, K] row-major (cuda/weight_layout.h): bound by reading W
// once.
//
// A block owns 8 features, that is 8 rows of W; its 8 warps share out K and add up through shared memory at the end.
// Lane 4 g + t reads 16 bytes of row g at a time, four lanes side by side. The sums of all 16 rows of X come from the
// tensor cores: a sum over K may run in any order, so the 8 neighbours of K that a lane has read are said to be those
// that the fragments of two products (m16n8k16) want of it, and nothing is moved between lanes. X is read in the same
// order from the caches; where a layer norm goes before, normed, from shared memory (cuda/few_rows_x.cuh).
//
// fp32 has no tensor-core product that keeps its digits: each lane multiplies its 4 neighbours of K with every row of
// X.
//
// The epilogue is called by the block's first threads with two neighbouring features of one row, in fp32; of a
// library's product, with packs of 16 bytes where everything lies even.
#pragma once

#include <type_traits>

#include "cuda/few_rows_x.cuh"
#include "cuda/launch.h"

namespace alula {

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

// Shared memory: each warp's X where it is normed, the sums in its place at the end, then the moments.
template <typename T, int kRows, bool kNorm>
struct FewRowsMemory {
  using Staged = StagedRows<T, FewRows::kUnroll * (sizeof(T) == 2 ? 32 : 16), kRows>;
  static constexpr int kMomentsOffset =
      kNorm && Staged::kBytes > FewRows::kSumsBytes ? Staged::kBytes : FewRows::kSumsBytes;
  static constexpr int kBytes = kMomentsOffset + kMaxFewRows * 2 * 4;
  static_assert(kBytes <= 99 * 1024, "every GPU since sm_80 can give a block this much");
};

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

  // Lanes without a row of their own read the last one: the warp stays together for the product, and a row of X has a
  // part in no sums but its own.
  using Staged = typename FewRowsMemory<T, kRows, kNorm>::Staged;
  const Staged staged;
  const T* rows[kRows / 8];
  int staged_rows[kRows / 8];
#pragma unroll
  for (int half = 0; half < kRows / 8; half++) {
    const int row = g + 8 * half < p.m ? g + 8 * half : p.m - 1;
    rows[half] = static_cast<const T*>(p.x) + static_cast<int64_t>(row) * p.k;
    staged_rows[half] = staged.row_at(p, g + 8 * half);
  }

  for (int first = warp * kSpan; first < p.k; first += kStride) {
    uint32_t w[kUnroll][4];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
#pragma unroll
      for (int i = 0; i < 4; i++) w[u][i] = next[u][i];
    }
    if (first + kStride < p.k) fetch(first + kStride);
    if constexpr (kNorm) staged.template stage<kIsEven>(p, first, moments, [](int quad) { return 4 * quad; });
    // Two steps of X are under way together; all four would take too many registers.
    constexpr int kTogether = 2;
#pragma unroll
    for (int u0 = 0; u0 < kUnroll; u0 += kTogether) {
      Words<T, 8> raw[kTogether][kRows / 8];
#pragma unroll
      for (int u = 0; u < kTogether; u++) {
        const int column = (u0 + u) * kStep + t * 8;
#pragma unroll
        for (int half = 0; half < kRows / 8; half++) {
          if constexpr (kNorm) {
            raw[u][half] = shared_cast<Words<T, 8>>(staged.values + staged_rows[half] + column)[0];
          } else {
            raw[u][half] = load_raw<kIsEven, 8>(rows[half], first + column, p);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kTogether; u++) {
        uint32_t x[2][4] = {};  // of rows g and g + 8
#pragma unroll
        for (int half = 0; half < kRows / 8; half++) {
#pragma unroll
          for (int i = 0; i < 4; i++) x[half][i] = raw[u][half].words[i];
        }
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const uint32_t a[4] = {x[0][i], x[1][i], x[0][i + 1], x[1][i + 1]};
          const uint32_t b[2] = {w[u0 + u][i], w[u0 + u][i + 1]};
          multiply_add(c, a, b, T{});
        }
      }
    }
    if constexpr (kNorm) __syncwarp();  // the next step takes its place
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

  using Staged = typename FewRowsMemory<float, kRows, kNorm>::Staged;
  const Staged staged;
  for (int first = warp * kSpan; first < p.k; first += FewRows::kWarps * kSpan) {
    uint32_t w[kUnroll][4];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) load_weight(w[u], own_weight, first + u * kStep + t * 4, stride);
    if constexpr (kNorm) staged.template stage<kIsEven>(p, first, moments, [](int quad) { return 4 * quad; });
#pragma unroll
    for (int m = 0; m < kRows; m++) {
      if (m >= p.m) break;
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        const int column = u * kStep + t * 4;
        float x[4];
        if constexpr (kNorm) {
          widen(x, Words<float, 4>(shared_cast<Words<float, 4>>(staged.values + m * Staged::kStride + column)[0]));
        } else {
          load_x<kIsEven, false>(x, p, m, first + column, 0.0f, 1.0f, TypeTag<float>{});
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sums[m] += x[i] * float_of_bits(w[u][i]);
      }
    }
    if constexpr (kNorm) __syncwarp();  // the next step takes its place
  }
#pragma unroll
  for (int m = 0; m < kRows; m++) sums[m] = reduce_lanes<Sum, 4>(sums[m]);
}

template <typename T, int kRows, bool kNorm, bool kIsEven, typename Epilogue>
__global__ void __launch_bounds__(FewRows::kThreads, 1) few_rows_kernel(FewRowsParams p, Epilogue epilogue) {
  constexpr int kFeatures = FewRows::kFeatures;
  const Shared<float> sums = dynamic_shared<float>();  // [warp][16 rows][8 features]
  const Shared<float> moments = dynamic_shared<float>(FewRowsMemory<T, kRows, kNorm>::kMomentsOffset);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const Shared<float> own = sums + warp * kMaxFewRows * kFeatures;

  if constexpr (std::is_same_v<T, float>) {
    float c[kRows] = {};
    sum_in_fp32<kRows, kNorm, kIsEven>(p, moments, c);
    if (kNorm) __syncthreads();  // nobody reads X any more
#pragma unroll
    for (int m = 0; m < kRows; m++) {
      if (m % 4 == t) own[m * kFeatures + g] = c[m];
    }
  } else {
    float c[4] = {};
    sum_on_tensor_cores<T, kRows, kNorm, kIsEven>(p, moments, c);
    if (kNorm) __syncthreads();  // nobody reads X any more
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
  const auto launch_kernel = [&](auto* kernel, int shared_bytes) {
    launch(name, kernel,
           {.blocks = {(p.n + FewRows::kFeatures - 1) / FewRows::kFeatures},
            .threads = FewRows::kThreads,
            .shared_bytes = shared_bytes,
            .starts_before_previous = true},
           stream, p, epilogue);
  };
  const auto launch_as = [&](auto rows, auto is_even) {
    constexpr int kRows = decltype(rows)::value;
    constexpr bool kIsEven = decltype(is_even)::value;
    if (p.norm_weight != nullptr) {
      launch_kernel(few_rows_kernel<T, kRows, true, kIsEven, Epilogue>, FewRowsMemory<T, kRows, true>::kBytes);
    } else {
      launch_kernel(few_rows_kernel<T, kRows, false, kIsEven, Epilogue>, FewRowsMemory<T, kRows, false>::kBytes);
    }
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
