// The product of up to 16 rows of X [M, K] with a quantized W^T (cpu/weight_format.h): bound by reading W once.
//
// A block owns a panel, 32 features, or a share of its K where there are fewer panels than multiprocessors; its 8 warps
// share out K and add up through shared memory at the end. A warp reads 512 bytes in one go, 16 a lane: 16 k of 8-bit
// codes, 32 of 4-bit ones, and has four such loads under way while it unpacks the four before (cuda/codes.cuh). Of
// 4-bit codes a lane reads what it and its neighbour 4 lanes on want of two steps; they exchange halves.
//
// Scales of groups multiply the sums of a group, those of rows the sums of all K; the middles of the asymmetric
// format's groups multiply the sums of x, which come from a product with ones. Which block of a split comes last does
// not matter for the bits: it adds up all of them in the order of K.
//
// X comes by way of shared memory (cuda/few_rows_x.cuh): the lanes share out the values of a span, layer norm
// included, and leave them as operands. Codes take so few bytes that instructions for each of them
// would count.
//
// The epilogue is called with two neighbouring features of one row, in fp32.
//
// Up to 8 rows of 16-bit types are held to 128 registers a thread, so that a multiprocessor has two blocks.
//
// Not measured yet: no GPU was at hand.
#pragma once

#include <bit>

#include "cuda/codes.cuh"
#include "cuda/few_rows.cuh"
#include "cuda/quantized_product.h"

namespace alula {

// 4-bit codes become -8 .. 7. The asymmetric format's least value is moved by as much, to the middle of its group: sums
// of codes and sums of x then cancel little.
constexpr float kCodesCountFrom = 8.0f;

struct QuantizedParams {
  FewRowsParams x;        // without a dense weight
  const uint8_t* weight;  // [ceil(N/32)][panel_bytes]
  int64_t panel_bytes;
  int steps;                                   // of 4 k in a panel, padding included
  int group_shift, group_bytes, header_bytes;  // groups of 1 << group_shift
  bool has_least;
  int splits;
  QuantizedWork work;
};

template <typename T>
QuantizedParams quantized_params(const PanelGemmArgs& gemm, const QuantizedPlan& plan, const QuantizedWork& work) {
  const WeightFormat f = gemm.format;
  const bool is_8bit = !has_4bit_codes(f.kind);
  const int64_t steps = is_8bit ? (gemm.k + 3) / 4 : (gemm.k + f.group_size - 1) / f.group_size * (f.group_size / 4);
  return {
      .x = few_rows_params<T>(gemm),
      .weight = static_cast<const uint8_t*>(gemm.weight),
      .panel_bytes = panel_bytes(f, gemm.k),
      .steps = static_cast<int>(steps),
      .group_shift = is_8bit ? 7 : std::countr_zero(static_cast<unsigned>(f.group_size)),
      .group_bytes = is_8bit ? 0 : static_cast<int>(group_bytes(f)),
      .header_bytes = static_cast<int>(header_bytes(f.kind)),
      .has_least = f.kind == WeightKind::kInt4Asymmetric,
      .splits = plan.splits,
      .work = work,
  };
}

// Where the step of codes with `k` begins in a panel, header included.
__device__ __forceinline__ int place_in_groups(const QuantizedParams& p, int k) {
  return (k >> p.group_shift) * p.group_bytes + p.header_bytes +
         (k & ((1 << p.group_shift) - 1)) / 4 * static_cast<int>(kStepBytes4);
}

template <Codes kCodesOfWeight>
struct QuantizedFewRows {
  static constexpr Codes kCodes = kCodesOfWeight;
  static constexpr bool kHasGroups = kCodes != Codes::kInt8;
  static constexpr int kLoads = 4;                     // of 16 bytes, a lane, at a time
  static constexpr int kBlock = kHasGroups ? 32 : 16;  // of K, that 32 lanes read with one load
  static constexpr int kSpan = kLoads * kBlock;
  static constexpr int kFeatures = kPanelRows;
  static constexpr int kQuads = kSpan / 4;
  static constexpr Order kOrder = kCodes == Codes::kNf4 ? Order::kPlain : Order::kSpread;
  static constexpr int kSumsBytes = FewRows::kWarps * kMaxFewRows * kFeatures * 4;
  static_assert(kSpan == (kHasGroups ? kFewRowsSpan4 : kFewRowsSpan8), "the plan counts the same spans");
  static_assert(kMaxFewRows * kFeatures / 2 == FewRows::kThreads, "each pair of sums has a thread in the epilogue");
};

// Shared memory: each warp's X, the sums in its place at the end, then the moments.
template <typename T, typename C, int kTiles>
struct QuantizedMemory {
  using Staged = StagedRows<T, C::kSpan, 8 * kTiles>;
  static constexpr int kMomentsOffset = Staged::kBytes > C::kSumsBytes ? Staged::kBytes : C::kSumsBytes;
  static constexpr int kIsLastOffset = kMomentsOffset + kMaxFewRows * 2 * 4;
  static constexpr int kBytes = kIsLastOffset + 4;
  static_assert(kBytes <= 99 * 1024, "every GPU since sm_80 can give a block this much");
};

// Where four neighbours of K lie in a row. A lane wants those of steps 2 i and 2 i + 1 of 16 k together: side by side
// where that makes 16 bytes.
template <typename T>
__device__ __forceinline__ int place_of_quad(int quad) {
  return 4 * (sizeof(T) == 2 ? quad / 8 * 8 + quad % 4 * 2 + quad / 4 % 2 : quad);
}

// What a lane reads of a span: codes, and of the block numbered t the scales of the features it holds.
template <typename C>
struct SpanWords {
  uint32_t codes[C::kLoads][4];
  uint32_t scales[2], least[2];  // pairs of fp16; groups only
};

// Where it reads in a span. Spans are whole groups: each lies as the one before it.
template <typename C>
struct SpanPlaces {
  int step;     // from span to span
  int codes;    // of the lane's 16 bytes in a block
  int scales;   // of the group of block t
  int first_k;  // of the lane's codes in a block, where it has a part of them only

  __device__ __forceinline__ SpanPlaces(const QuantizedParams& p, int g, int t) {
    if constexpr (C::kHasGroups) {
      step = (C::kSpan >> p.group_shift) * p.group_bytes;
      codes = (t + g % 2 * 4) * static_cast<int>(kStepBytes4) + g / 2 * 16;
      scales = (t * C::kBlock >> p.group_shift) * p.group_bytes;
      first_k = 0;
    } else {
      step = C::kSpan / 4 * static_cast<int>(kStepBytes8);
      codes = p.header_bytes + t * static_cast<int>(kStepBytes8) + g * 16;
      scales = 0;
      first_k = 4 * t;
    }
  }
};

template <typename C>
__device__ __forceinline__ void load_span(SpanWords<C>& words, const QuantizedParams& p, const uint8_t* panel, int span,
                                          int g, int t) {
  const SpanPlaces<C> places(p, g, t);
  const uint8_t* from = panel + span * places.step;
  const int left = 4 * p.steps - span * C::kSpan;  // of K, padding included
#pragma unroll
  for (int u = 0; u < C::kLoads; u++) {
    const int k = u * C::kBlock;
    const int block = C::kHasGroups ? place_in_groups(p, k) : k / 4 * static_cast<int>(kStepBytes8);
    if (places.first_k + k < left) {
      load_once(words.codes[u], from + places.codes + block);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) words.codes[u][i] = 0;
    }
  }
  if constexpr (C::kHasGroups) {
    const bool is_there = t * C::kBlock < left;
    const uint8_t* group = from + places.scales;
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
      const int at = row_of<C::kCodes>(tile, g) * 2;
      words.scales[tile] = is_there ? *reinterpret_cast<const uint32_t*>(group + at) : 0;
      words.least[tile] = C::kCodes == Codes::kInt4 && is_there && p.has_least
                              ? *reinterpret_cast<const uint32_t*>(group + kHalfScalesBytes + at)
                              : 0;
    }
  }
}

__device__ __forceinline__ float low_half(uint32_t pair) { return to_float(f16{static_cast<uint16_t>(pair)}); }
__device__ __forceinline__ float high_half(uint32_t pair) { return to_float(f16{static_cast<uint16_t>(pair >> 16)}); }

// sums += a group's sums times its scales, + the asymmetric groups' middles times the sums of x.
__device__ __forceinline__ void add_scaled(float (&sums)[4], const float (&part)[4], uint32_t scales, uint32_t least,
                                           const float (&x_sums)[4], bool has_least) {
  const float scale[2] = {low_half(scales), high_half(scales)};
#pragma unroll
  for (int i = 0; i < 4; i++) sums[i] += scale[i / 2] * part[i];
  if (has_least) {
    const float middle[2] = {low_half(least) + kCodesCountFrom * scale[0],
                             high_half(least) + kCodesCountFrom * scale[1]};
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] += middle[i / 2] * x_sums[i % 2];
  }
}

// Of one row: the operands of steps `step` and `step` + 1 (an even number), k 4 t .. 4 t + 3 of each.
template <typename T>
__device__ __forceinline__ void load_quads(Quad<T> (&x)[2], Shared<T> row, int step, int t) {
  if constexpr (sizeof(T) == 2) {
    const Words<T, 8> both = shared_cast<Words<T, 8>>(row + place_of_quad<T>(4 * step + t))[0];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i / 2].pairs[i % 2] = both.words[i];
  } else {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Words<T, 4> one = shared_cast<Words<T, 4>>(row + place_of_quad<T>(4 * (step + half) + t))[0];
#pragma unroll
      for (int i = 0; i < 4; i++) x[half].values[i] = float_of_bits(one.words[i]);
    }
  }
}

// What this warp's spans add to the panel's sums. kTiles: of 8 rows of X.
template <typename T, typename C, int kTiles>
__device__ __forceinline__ void sum_panel(const QuantizedParams& p, const uint8_t* panel, int first, int last,
                                          Shared<float> moments, float (&sums)[2][kTiles][4]) {
  constexpr bool kIsExact = C::kCodes != Codes::kNf4;
  const int warp = static_cast<int>(threadIdx.x / kWarpSize);
  const int g = static_cast<int>(threadIdx.x % kWarpSize / 4), t = static_cast<int>(threadIdx.x % 4);
  [[maybe_unused]] const uint32_t offset = nibble_offset<T>(kCodesCountFrom);

  SpanWords<C> next;
  load_span(next, p, panel, first + warp, g, t);  // under way while the rows' moments are found
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (p.x.norm_weight != nullptr) {
    const Shared<float> scratch = dynamic_shared<float>();
    p.x.is_aligned ? find_moments<true, T>(p.x, moments, scratch) : find_moments<false, T>(p.x, moments, scratch);
  }
  const typename QuantizedMemory<T, C, kTiles>::Staged staged;
  int own_rows[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; n++) own_rows[n] = staged.row_at(p.x, 8 * n + g);

  for (int span = first + warp; span < last; span += FewRows::kWarps) {
    SpanWords<C> words = next;
    if (span + FewRows::kWarps < last) load_span(next, p, panel, span + FewRows::kWarps, g, t);
    staged.template stage<false, sizeof(T) == 2 && C::kOrder == Order::kSpread>(p.x, span * C::kSpan, moments,
                                                                                place_of_quad<T>);
#pragma unroll
    for (int u = 0; u < C::kLoads; u += C::kHasGroups ? 1 : 2) {
      Quad<T> x[kTiles][2];
#pragma unroll
      for (int n = 0; n < kTiles; n++) load_quads(x[n], staged.values + own_rows[n], u * (C::kBlock / 16), t);
      if constexpr (C::kHasGroups) {
        // This lane has rows 4 (g / 2) .. + 3 of step t + 4 (g % 2); it wants rows 2 g and 2 g + 1 of steps t and
        // t + 4.
        const bool is_odd = g % 2 == 1;
        uint32_t (&mine)[4] = words.codes[u];
        uint32_t other[2];
#pragma unroll
        for (int i = 0; i < 2; i++) other[i] = __shfl_xor_sync(kWholeWarp, is_odd ? mine[i] : mine[2 + i], 4);
        const uint32_t steps[2][2] = {{is_odd ? other[0] : mine[0], is_odd ? other[1] : mine[1]},
                                      {is_odd ? mine[2] : other[0], is_odd ? mine[3] : other[1]}};
        float part[2][kTiles][4] = {}, x_sums[kTiles][4] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const PanelStep<T> w = step_of_nibbles<T, C::kCodes, C::kOrder>(steps[half], kCodesCountFrom, offset);
#pragma unroll
          for (int n = 0; n < kTiles; n++) {
#pragma unroll
            for (int tile = 0; tile < 2; tile++) multiply_step<T, kIsExact>(part[tile][n], w.rows[tile], x[n][half]);
            if (C::kCodes == Codes::kInt4 && p.has_least) {
              const Quad<T> ones[2] = {quad_of_ones<T>(), quad_of_ones<T>()};
              multiply_step<T, true>(x_sums[n], ones, x[n][half]);
            }
          }
        }
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
          const uint32_t scales = __shfl_sync(kWholeWarp, words.scales[tile], g * 4 + u);
          const uint32_t least = __shfl_sync(kWholeWarp, words.least[tile], g * 4 + u);
#pragma unroll
          for (int n = 0; n < kTiles; n++) {
            add_scaled(sums[tile][n], part[tile][n], scales, least, x_sums[n],
                       C::kCodes == Codes::kInt4 && p.has_least);
          }
        }
      } else {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const PanelStep<T> w = step_of_bytes<T, C::kOrder>(words.codes[u + half]);
#pragma unroll
          for (int n = 0; n < kTiles; n++) {
#pragma unroll
            for (int tile = 0; tile < 2; tile++) multiply_step<T, kIsExact>(sums[tile][n], w.rows[tile], x[n][half]);
          }
        }
      }
    }
    __syncwarp();  // the next span takes its place
  }
}

template <typename T, typename C, int kTiles, typename Epilogue>
__global__ void __launch_bounds__(FewRows::kThreads, sizeof(T) == 2 && kTiles == 1 ? 2 : 1)
    quantized_few_rows_kernel(QuantizedParams p, Epilogue epilogue) {
  constexpr int kFeatures = C::kFeatures;
  const Shared<float> all_sums = dynamic_shared<float>();  // [warp][16 rows][32 features]
  using Memory = QuantizedMemory<T, C, kTiles>;
  const Shared<float> moments = dynamic_shared<float>(Memory::kMomentsOffset);
  const int thread = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.x / kWarpSize);
  const int g = static_cast<int>(threadIdx.x % kWarpSize / 4), t = static_cast<int>(threadIdx.x % 4);
  // Without a sign: its extension to 64 bits would be one register too many.
  const unsigned splits = p.splits;  // at most 32, of at most 2^25 spans
  const unsigned panel_index = blockIdx.x / splits, split = blockIdx.x - panel_index * splits;
  const uint8_t* panel = p.weight + panel_index * p.panel_bytes;

  const int spans = (p.x.k + C::kSpan - 1) / C::kSpan;
  const int first = static_cast<int>(spans * split / splits), last = static_cast<int>(spans * (split + 1) / splits);
  float sums[2][kTiles][4] = {};
  sum_panel<T, C, kTiles>(p, panel, first, last, moments, sums);

  __syncthreads();  // nobody reads X any more
#pragma unroll
  for (int tile = 0; tile < 2; tile++) {
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = 8 * n + 2 * t + i % 2, feature = row_of<C::kCodes>(tile, g) + i / 2;
        all_sums[(warp * kMaxFewRows + row) * kFeatures + feature] = sums[tile][n][i];
      }
    }
  }
  __syncthreads();

  // From here on a thread owns two neighbouring features of a row.
  const int row = thread / (kFeatures / 2), own = thread % (kFeatures / 2) * 2;
  const int feature = static_cast<int>(panel_index) * kFeatures + own;
  const bool is_there = row < p.x.m && feature < p.x.n;
  float pair[2] = {0.0f, 0.0f};
  if (is_there) {
    for (int other = 0; other < FewRows::kWarps; other++) {
#pragma unroll
      for (int i = 0; i < 2; i++) pair[i] += all_sums[(other * kMaxFewRows + row) * kFeatures + own + i];
    }
    if constexpr (!C::kHasGroups) {
#pragma unroll
      for (int i = 0; i < 2; i++) pair[i] *= reinterpret_cast<const float*>(panel)[own + i];
    }
  }
  if (p.splits > 1) {
    const auto partial = [&](unsigned which) {
      const int64_t index = static_cast<int64_t>(panel_index) * splits + which;
      return p.work.workspace + (index * kMaxFewRows + row) * kFeatures + own;
    };
    if (is_there) store_pack(partial(split), pair);
    __threadfence();  // what this thread wrote is there before the block is counted
    __syncthreads();
    const Shared<int> is_last = dynamic_shared<int>(Memory::kIsLastOffset);
    if (thread == 0) {
      is_last[0] = atomicInc(p.work.counters + panel_index, splits - 1) == splits - 1;  // wraps to 0
    }
    __syncthreads();
    if (is_last[0] == 0) return;
    __threadfence();
    pair[0] = pair[1] = 0.0f;
    for (unsigned i = 0; i < splits && is_there; i++) {
      const float* from = partial(i);
      pair[0] += from[0];
      pair[1] += from[1];
    }
  }
  if (is_there) epilogue(row, feature, pair);
}

template <typename T, Codes kCodes, typename Epilogue>
void launch_quantized_few_rows(const char* name, const QuantizedParams& p, const Epilogue& epilogue,
                               const CudaStream& stream) {
  using C = QuantizedFewRows<kCodes>;
  const auto launch_as = [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    launch(name, quantized_few_rows_kernel<T, C, kTiles, Epilogue>,
           {.blocks = {num_panels(p.x.n) * p.splits},
            .threads = FewRows::kThreads,
            .shared_bytes = QuantizedMemory<T, C, kTiles>::kBytes,
            .starts_before_previous = true},
           stream, p, epilogue);
  };
  p.x.m <= 8 ? launch_as(std::integral_constant<int, 1>{}) : launch_as(std::integral_constant<int, 2>{});
}

}  // namespace alula
