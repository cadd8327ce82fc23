// The product of many rows of X [M, K] with a quantized W^T (cpu/weight_format.h) on tensor cores, epilogue included.
//
// A warp owns a panel (32 features) and 64 rows of X. Rows of X and codes come to shared memory by cp.async, a block of
// K at a time, further blocks under way while one is used; codes stay as they are there and are unpacked in registers
// on their way into the tensor cores (cuda/codes.cuh), once for 64 rows. Two cuts:
//
//   large   8 warps, 128 rows x 4 panels: each byte from memory meets most others; 16-bit types only
//   small   4 warps, 64 rows x 1 panel, the warps share out K: for products that would leave multiprocessors idle
//
// Scales of groups multiply the sums of a group (at the end of each, sums of their own become part of the whole), those
// of rows the sums of all K; the middles of asymmetric groups multiply sums of x, which come from a product with ones.
// At the end the sums lie in shared memory, warps' shares of K are added up, and the epilogue gets neighbouring
// features from neighbouring threads.
//
// 16-byte chunks of codes lie in another order in shared memory, so that lanes that read at once meet different banks:
// chunk c of step s of 8-bit codes at c ^ 2 (s % 4), chunk c of pair p of steps of 4-bit codes at c ^ 2 (p % 2).
//
// Not measured yet: no GPU was at hand.
#pragma once

#include <algorithm>

#include "cuda/quantized_few_rows.cuh"

namespace alula {

template <typename Type, Codes kCodesOfWeight, bool kIsLarge>
struct QuantizedManyRows {
  using T = Type;
  static constexpr Codes kCodes = kCodesOfWeight;
  static constexpr bool kHasGroups = kCodes != Codes::kInt8;
  static constexpr int kPanels = kIsLarge ? 4 : 1;
  static constexpr int kRowWarps = kIsLarge ? 2 : 1;
  static constexpr int kDepthWarps = kIsLarge ? 1 : 4;  // that share out a block of K
  static constexpr int kWarps = kPanels * kRowWarps * kDepthWarps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kTiles = 8;  // of 8 rows of X, a warp
  static constexpr int kRows = kRowWarps * kTiles * 8;
  static constexpr int kFeatures = kPanels * static_cast<int>(kPanelRows);
  static constexpr int kBlocks = kIsLarge ? 2 : 4;  // of 32 k: a stage
  static constexpr int kDepth = 32 * kBlocks;
  static constexpr int kStages = sizeof(T) == 2 ? 3 : 2;
  static constexpr int kPack = 16 / static_cast<int>(sizeof(T));
  // 16 elements of padding a row: eight rows, a quarter of 32 or 64 bytes each, meet all banks.
  static constexpr int kStride = kDepth + 16;
  static constexpr int kXBytes = kRows * kStride * static_cast<int>(sizeof(T));
  static constexpr int kHeaderBytes = 128;  // room for the scales and least values of a block of 32 k of a panel
  static constexpr int kHeadersBytes = kHasGroups ? kBlocks * kHeaderBytes : 0;
  static constexpr int kCodesBytes = kDepth * (kHasGroups ? 16 : 32);
  static constexpr int kPanelBytes = kHeadersBytes + kCodesBytes;
  static constexpr int kStageBytes = kXBytes + kPanels * kPanelBytes;
  // At the end the stages' memory holds the sums instead: [depth warp][row][features + 4].
  static constexpr int kSumsStride = kFeatures + 4;
  static constexpr int kSumsBytes = kDepthWarps * kRows * kSumsStride * 4;
  static constexpr int kSharedBytes = std::max(kStages * kStageBytes, kSumsBytes);
  static_assert(kBlocks % kDepthWarps == 0, "warps that share out K have whole blocks of 32");
  static_assert(kSharedBytes <= 99 * 1024, "every GPU since sm_80 can give a block this much");
};

// 16 bytes of X to shared memory; element by element where rows do not lie even.
template <typename T, int N>
__device__ __forceinline__ void copy_x_pack(Shared<T> to, const T* from, int count, bool is_even) {
  if (is_even) {
    copy_async_16(to, from, count > 0);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; i++) to[i] = i < count ? from[i] : T{};
}

// Rows [first_row, + kRows) of X and the block's panels, k [first_k, + kDepth); zeros beyond their ends.
template <typename C>
__device__ __forceinline__ void load_stage(const QuantizedParams& p, Shared<unsigned char> stage, int64_t first_row,
                                           int first_panel, int first_k) {
  using T = typename C::T;
  constexpr int kPacks = C::kDepth / C::kPack;
  const int thread = static_cast<int>(threadIdx.x);
  const Shared<T> x = shared_cast<T>(stage);
  for (int i = thread; i < C::kRows * kPacks; i += C::kThreads) {
    const int row = i / kPacks, column = i % kPacks * C::kPack;
    const int64_t left = first_row + row < p.x.m ? p.x.k - first_k - column : 0;
    const int count = static_cast<int>(left < 0 ? 0 : left);
    const T* from = static_cast<const T*>(p.x.x) + (count > 0 ? (first_row + row) * p.x.k + first_k + column : 0);
    copy_x_pack<T, C::kPack>(x + row * C::kStride + column, from, count, p.x.is_aligned);
  }
  const int panels = (p.x.n + static_cast<int>(kPanelRows) - 1) / static_cast<int>(kPanelRows);
  constexpr int kChunks = C::kCodesBytes / 16;
  for (int i = thread; i < C::kPanels * kChunks; i += C::kThreads) {
    const int panel = i / kChunks, chunk = i % kChunks;
    const uint8_t* from = p.weight + (first_panel + panel) * p.panel_bytes;
    const Shared<unsigned char> codes = stage + C::kXBytes + panel * C::kPanelBytes + C::kHeadersBytes;
    bool is_there = first_panel + panel < panels;
    int place;
    if constexpr (C::kHasGroups) {
      const int step = first_k / 4 + chunk / 4, k = 4 * step;
      is_there = is_there && step < p.steps;
      from += place_in_groups(p, k) + chunk % 4 * 16;
      place = chunk / 8 * 8 + (chunk % 8 ^ chunk / 8 % 2 * 2);
    } else {
      const int step = first_k / 4 + chunk / 8;
      is_there = is_there && step < p.steps;
      from += p.header_bytes + static_cast<int64_t>(step) * kStepBytes8 + chunk % 8 * 16;
      place = chunk / 8 * 8 + (chunk % 8 ^ chunk / 8 % 4 * 2);
    }
    copy_async_16(codes + place * 16, is_there ? from : p.weight, is_there);
  }
  if constexpr (C::kHasGroups) {
    constexpr int kHeaderChunks = C::kHeaderBytes / 16;
    for (int i = thread; i < C::kPanels * C::kBlocks * kHeaderChunks; i += C::kThreads) {
      const int panel = i / (C::kBlocks * kHeaderChunks), block = i / kHeaderChunks % C::kBlocks;
      const int chunk = i % kHeaderChunks, k = first_k + 32 * block;
      const bool is_there = first_panel + panel < panels && k < 4 * p.steps && chunk * 16 < p.header_bytes;
      const uint8_t* from =
          p.weight + (first_panel + panel) * p.panel_bytes + (k >> p.group_shift) * p.group_bytes + chunk * 16;
      const Shared<unsigned char> headers = stage + C::kXBytes + panel * C::kPanelBytes;
      copy_async_16(headers + (block * kHeaderChunks + chunk) * 16, is_there ? from : p.weight, is_there);
    }
  }
}

// Four neighbours of K of a row of X.
template <typename T>
__device__ __forceinline__ Quad<T> read_quad(Shared<T> from) {
  if constexpr (std::is_same_v<T, float>) {
    const Pack<float, 4> pack = shared_cast<Pack<float, 4>>(from)[0];
    return {{pack.values[0], pack.values[1], pack.values[2], pack.values[3]}};
  } else {
    const Pack<uint32_t, 2> pack = shared_cast<Pack<uint32_t, 2>>(from)[0];
    return {{pack.values[0], pack.values[1]}};
  }
}

// Step `step` (of 16 k) of a panel in shared memory.
template <typename C>
__device__ __forceinline__ PanelStep<typename C::T> read_step(Shared<unsigned char> codes, int step, int g, int t,
                                                              uint32_t offset) {
  using T = typename C::T;
  if constexpr (C::kHasGroups) {
    const int pair = 2 * step + t / 2, chunk = t % 2 * 4 + g / 2;
    const int at = (pair * 8 + (chunk ^ pair % 2 * 2)) * 16 + g % 2 * 8;
    const Pack<uint32_t, 2> pack = shared_cast<Pack<uint32_t, 2>>(codes + at)[0];
    const uint32_t words[2] = {pack.values[0], pack.values[1]};
    return step_of_nibbles<T, C::kCodes>(words, kCodesCountFrom, offset);
  } else {
    const Pack<uint32_t, 4> pack = shared_cast<Pack<uint32_t, 4>>(codes + ((4 * step + t) * 8 + (g ^ t * 2)) * 16)[0];
    const uint32_t words[4] = {pack.values[0], pack.values[1], pack.values[2], pack.values[3]};
    return step_of_bytes<T>(words);
  }
}

template <typename C>
struct WarpSums {
  float whole[2][C::kTiles][4];
  // Of the group under way.
  float part[2][C::kHasGroups ? C::kTiles : 1][4];
  float x_sums[C::kHasGroups ? C::kTiles : 1][4];
};

template <typename C>
__device__ __forceinline__ void begin_group(WarpSums<C>& sums) {
#pragma unroll
  for (int n = 0; n < C::kTiles; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) sums.part[0][n][i] = sums.part[1][n][i] = sums.x_sums[n][i] = 0.0f;
  }
}

// Block `block` (of 32 k, the first being `k`) of a stage, for one warp.
template <typename C>
__device__ __forceinline__ void multiply_block(const QuantizedParams& p, WarpSums<C>& sums, Shared<typename C::T> x,
                                               Shared<unsigned char> panel, int block, int k, uint32_t offset) {
  using T = typename C::T;
  constexpr bool kIsExact = C::kCodes != Codes::kNf4;
  const int g = static_cast<int>(threadIdx.x % kWarpSize / 4), t = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const PanelStep<T> w = read_step<C>(panel + C::kHeadersBytes, 2 * block + half, g, t, offset);
#pragma unroll
    for (int n = 0; n < C::kTiles; n++) {
      const Quad<T> values = read_quad<T>(x + (8 * n + g) * C::kStride + 32 * block + 16 * half + 4 * t);
#pragma unroll
      for (int tile = 0; tile < 2; tile++) {
        if constexpr (C::kHasGroups) {
          multiply_step<T, kIsExact>(sums.part[tile][n], w.rows[tile], values);
        } else {
          multiply_step<T, kIsExact>(sums.whole[tile][n], w.rows[tile], values);
        }
      }
      if constexpr (C::kCodes == Codes::kInt4) {
        if (p.has_least) {
          const Quad<T> ones[2] = {quad_of_ones<T>(), quad_of_ones<T>()};
          multiply_step<T, true>(sums.x_sums[n], ones, values);
        }
      }
    }
  }
  if constexpr (C::kHasGroups) {
    // A warp that has not all blocks of K ends its part of a group with each.
    if (C::kDepthWarps == 1 && ((k + 32) & ((1 << p.group_shift) - 1)) != 0) return;
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
      const Shared<unsigned char> header = panel + block * C::kHeaderBytes + row_of<C::kCodes>(tile, g) * 2;
      const uint32_t scales = shared_cast<uint32_t>(header)[0];
      const bool has_least = C::kCodes == Codes::kInt4 && p.has_least;
      const uint32_t least = has_least ? shared_cast<uint32_t>(header + kHalfScalesBytes)[0] : 0u;
#pragma unroll
      for (int n = 0; n < C::kTiles; n++) {
        add_scaled(sums.whole[tile][n], sums.part[tile][n], scales, least, sums.x_sums[n], has_least);
      }
    }
    begin_group(sums);
  }
}

template <typename C, typename Epilogue>
__global__ void __launch_bounds__(C::kThreads, 1) quantized_many_rows_kernel(QuantizedParams p, Epilogue epilogue) {
  using T = typename C::T;
  const int thread = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.x / kWarpSize);
  const int g = static_cast<int>(threadIdx.x % kWarpSize / 4), t = static_cast<int>(threadIdx.x % 4);
  const int depth_warp = warp % C::kDepthWarps, panel = warp / C::kDepthWarps % C::kPanels;
  const int row_warp = warp / C::kDepthWarps / C::kPanels;
  const auto row_blocks = static_cast<int>((p.x.m + C::kRows - 1) / C::kRows);
  // Blocks with the same weights run at the same time.
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) % row_blocks * C::kRows;
  const int first_panel = static_cast<int>(blockIdx.x) / row_blocks * C::kPanels;
  [[maybe_unused]] const uint32_t offset = nibble_offset<T>(kCodesCountFrom);

  const auto stage_at = [](int index) { return dynamic_shared<unsigned char>(index % C::kStages * C::kStageBytes); };
  const int num_stages = (4 * p.steps + C::kDepth - 1) / C::kDepth;  // whole groups
  wait_for_previous_kernel();
  let_next_kernel_start();
#pragma unroll
  for (int i = 0; i < C::kStages - 1; i++) {
    if (i < num_stages) load_stage<C>(p, stage_at(i), first_row, first_panel, i * C::kDepth);
    copy_async_commit();
  }

  WarpSums<C> sums;
#pragma unroll
  for (int n = 0; n < C::kTiles; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) sums.whole[0][n][i] = sums.whole[1][n][i] = 0.0f;
  }
  if constexpr (C::kHasGroups) begin_group(sums);

  for (int i = 0; i < num_stages; i++) {
    copy_async_wait<C::kStages - 2>();
    __syncthreads();  // this stage is there for all, and nobody reads the one before any more
    const int next = i + C::kStages - 1;
    if (next < num_stages) load_stage<C>(p, stage_at(next), first_row, first_panel, next * C::kDepth);
    copy_async_commit();
    const Shared<unsigned char> stage = stage_at(i);
    const Shared<T> x = shared_cast<T>(stage) + row_warp * C::kTiles * 8 * C::kStride;
    const Shared<unsigned char> codes = stage + C::kXBytes + panel * C::kPanelBytes;
#pragma unroll 1
    for (int block = 0; block < C::kBlocks / C::kDepthWarps; block++) {
      const int own = depth_warp + block * C::kDepthWarps;
      multiply_block<C>(p, sums, x, codes, own, i * C::kDepth + 32 * own, offset);
    }
  }
  copy_async_wait<0>();
  __syncthreads();

  // --- the sums in shared memory, then the epilogue: a thread has two neighbouring features of a row at a time ---
  const Shared<float> all_sums = dynamic_shared<float>();
#pragma unroll
  for (int tile = 0; tile < 2; tile++) {
#pragma unroll
    for (int n = 0; n < C::kTiles; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = (row_warp * C::kTiles + n) * 8 + 2 * t + i % 2;
        const int feature = panel * static_cast<int>(kPanelRows) + row_of<C::kCodes>(tile, g) + i / 2;
        all_sums[(depth_warp * C::kRows + row) * C::kSumsStride + feature] = sums.whole[tile][n][i];
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < C::kRows * C::kFeatures / 2; i += C::kThreads) {
    const int row = i / (C::kFeatures / 2), own = i % (C::kFeatures / 2) * 2;
    const int feature = first_panel * static_cast<int>(kPanelRows) + own;
    if (first_row + row >= p.x.m || feature >= p.x.n) continue;
    float pair[2] = {0.0f, 0.0f};
#pragma unroll
    for (int other = 0; other < C::kDepthWarps; other++) {
#pragma unroll
      for (int j = 0; j < 2; j++) pair[j] += all_sums[(other * C::kRows + row) * C::kSumsStride + own + j];
    }
    if constexpr (!C::kHasGroups) {
      const int64_t at = feature / kPanelRows * p.panel_bytes + own % kPanelRows * 4;
      const auto* scales = reinterpret_cast<const float*>(p.weight + at);
      pair[0] *= scales[0], pair[1] *= scales[1];
    }
    epilogue(first_row + row, feature, pair);
  }
}

template <typename T, Codes kCodes, bool kIsLarge, typename Epilogue>
void launch_quantized_many_rows(const char* name, const QuantizedParams& p, const Epilogue& epilogue,
                                const CudaStream& stream) {
  using C = QuantizedManyRows<T, kCodes, kIsLarge>;
  const int64_t row_blocks = (p.x.m + C::kRows - 1) / C::kRows;
  const int64_t feature_blocks = (p.x.n + C::kFeatures - 1) / C::kFeatures;
  launch(name, quantized_many_rows_kernel<C, Epilogue>,
         {.blocks = {row_blocks * feature_blocks},
          .threads = C::kThreads,
          .shared_bytes = C::kSharedBytes,
          .starts_before_previous = true},
         stream, p, epilogue);
}

// y = epilogue(x W^T), with the layer norm before it where rows are few. `name`: of the op.
template <typename T, Codes kCodes, typename Epilogue>
void launch_quantized(const char* name, const PanelGemmArgs& gemm, const QuantizedPlan& plan, const QuantizedWork& work,
                      const Epilogue& epilogue, const CudaStream& stream) {
  const QuantizedParams p = quantized_params<T>(gemm, plan, work);
  ALULA_CHECK(p.panel_bytes < (int64_t{1} << 31), "weight has ", gemm.k,
              " columns; accepted: 32 rows below 2^31 bytes");
  if (plan.is_few) {
    launch_quantized_few_rows<T, kCodes>(name, p, epilogue, stream);
  } else if (plan.is_large) {
    if constexpr (sizeof(T) == 2) launch_quantized_many_rows<T, kCodes, true>(name, p, epilogue, stream);
  } else {
    launch_quantized_many_rows<T, kCodes, false>(name, p, epilogue, stream);
  }
}

template <typename T, typename Epilogue>
void launch_quantized(const char* name, const PanelGemmArgs& gemm, const QuantizedPlan& plan, const QuantizedWork& work,
                      const Epilogue& epilogue, const CudaStream& stream) {
  switch (gemm.format.kind) {
    case WeightKind::kDense:
      return;
    case WeightKind::kInt8:
      return launch_quantized<T, Codes::kInt8>(name, gemm, plan, work, epilogue, stream);
    case WeightKind::kInt4:
    case WeightKind::kInt4Asymmetric:
      return launch_quantized<T, Codes::kInt4>(name, gemm, plan, work, epilogue, stream);
    case WeightKind::kNf4:
      return launch_quantized<T, Codes::kNf4>(name, gemm, plan, work, epilogue, stream);
  }
}

}  // namespace alula
