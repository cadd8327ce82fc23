// scaled_masked_softmax on CUDA: y = softmax(scale * x + mask) over rows of any length, fp32 inside.
//
//   rows of up to 32 * 4 packs    a warp a row, the row in registers: one read, one write
//   up to 256 * 4 packs           a block of 256 threads a row, the row in registers
//   longer                        a block of 512 threads a row, two passes: maximum and sum together, then the result
// A pack is 16 bytes of scores. Packs begin at multiples of their size counted from the start of the tensor, so that a
// row of any length is read and written by 16 bytes but for its ends; where the tensors themselves begin off 16 bytes,
// element by element.
//
// As on the CPU, v is the score itself and c = scale where that keeps the order of the scores (no additive mask,
// scale > 0), so that differences of large scores are exact; otherwise v = scale * score + mask and c is 1. A 16-bit
// result takes exponentials by 2^x (relative error 2^-22), an fp32 result by expf.
//
// Not measured yet: no GPU was at hand.
#include "ops/scaled_masked_softmax.h"

#include <type_traits>

#include "core/dispatch.h"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace alula {
namespace {

constexpr int kMaxLeading = 8;  // dimensions before S, once those that lie together in the mask are one
constexpr int kPacksHeld = 4;   // of a row, in the registers of a thread
constexpr int kWarpsOfRows = 4;
constexpr int kRowThreads = 256;
constexpr int kLongRowThreads = 512;
constexpr float kLog2E = 1.44269504088896341f;

struct Params {
  const void* scores;
  void* out;
  int64_t rows, tokens;
  int keys;
  float scale;
  bool is_causal;
  bool scales_last;  // v is the score, c the scale
  bool is_aligned;   // both tensors begin at 16 bytes
  MaskKind mask_kind;
  const void* mask;
  int num_leading;
  int64_t leading_sizes[kMaxLeading];
  int64_t mask_strides[kMaxLeading];
  int64_t mask_key_stride;
};

// Where a row lies, what of it is visible, and how many elements before it its first pack begins.
struct Row {
  int64_t first;       // element of the tensor
  int64_t mask_first;  // element of the mask
  int visible;         // keys before the causal limit
  int shift;
};

template <int N>
__device__ __forceinline__ Row row_at(const Params& p, int64_t row) {
  Row r;
  r.first = row * p.keys;
  r.shift = static_cast<int>(r.first % N);
  r.visible = p.keys;
  if (p.is_causal) {
    const int64_t limit = row % p.tokens + p.keys - p.tokens + 1;
    r.visible = limit < 0 ? 0 : limit < p.keys ? static_cast<int>(limit) : p.keys;
  }
  r.mask_first = 0;
  for (int d = p.num_leading - 1; d >= 0; d--) {
    r.mask_first += row % p.leading_sizes[d] * p.mask_strides[d];
    row /= p.leading_sizes[d];
  }
  return r;
}

__device__ __forceinline__ float masked(float v, uint8_t is_visible) { return is_visible ? v : -INFINITY; }
template <typename M>
__device__ __forceinline__ float masked(float v, M added) {
  return v + to_float(added);
}

// Calls with_mask(first element of the mask for the row), typed.
template <typename WithMask>
__device__ __forceinline__ void with_mask_of(const Params& p, const Row& row, const WithMask& with_mask) {
  switch (p.mask_kind) {
    case MaskKind::kNone:
      return;
    case MaskKind::kBool:
      return with_mask(static_cast<const uint8_t*>(p.mask) + row.mask_first);
    case MaskKind::kFloat32:
      return with_mask(static_cast<const float*>(p.mask) + row.mask_first);
    case MaskKind::kBFloat16:
      return with_mask(static_cast<const bf16*>(p.mask) + row.mask_first);
    case MaskKind::kFloat16:
      return with_mask(static_cast<const f16*>(p.mask) + row.mask_first);
  }
}

// Some packs of a row, `stride` packs apart, first as they lie in memory: what is whole is under way together. Then as
// v, which is -inf where there is nothing to see.
template <typename T, int kPacks>
struct RowPacks {
  static constexpr int N = kPackSize<T>;
  Words<T, N> raw[kPacks];
  float v[kPacks][N];

  static __device__ __forceinline__ bool is_whole(const Params& p, const Row& row, int column) {
    return p.is_aligned && column >= 0 && column + N <= row.visible;
  }

  template <bool kHasMask>
  __device__ __forceinline__ void load(const Params& p, const Row& row, int index, int stride) {
    const T* scores = static_cast<const T*>(p.scores) + row.first;
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      const int column = (index + i * stride) * N - row.shift;
      raw[i] = {};
      if (is_whole(p, row, column)) raw[i] = *reinterpret_cast<const Words<T, N>*>(scores + column);
    }
    const float scale = p.scales_last ? 1.0f : p.scale;
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      const int column = (index + i * stride) * N - row.shift;
      if (is_whole(p, row, column)) {
        widen(v[i], raw[i]);
        if (kHasMask || !p.scales_last) {
#pragma unroll
          for (int j = 0; j < N; j++) v[i][j] *= scale;
        }
      } else {
#pragma unroll
        for (int j = 0; j < N; j++) {
          const bool is_there = column + j >= 0 && column + j < row.visible;
          v[i][j] = is_there ? to_float(scores[column + j]) * scale : -INFINITY;
        }
      }
    }
    if constexpr (kHasMask) {
      with_mask_of(p, row, [&](auto* mask) {
#pragma unroll
        for (int i = 0; i < kPacks; i++) add_mask(p, row, mask, (index + i * stride) * N - row.shift, v[i]);
      });
    }
  }

  template <typename M>
  static __device__ __forceinline__ void add_mask(const Params& p, const Row& row, const M* mask, int column,
                                                  float (&v)[N]) {
    constexpr int kBytes = N * static_cast<int>(sizeof(M));
    const bool is_even = p.mask_key_stride == 1 && reinterpret_cast<uintptr_t>(mask + column) % kBytes == 0;
    if (is_even && is_whole(p, row, column)) {
      const Pack<M, N> pack = *reinterpret_cast<const Pack<M, N>*>(mask + column);
#pragma unroll
      for (int j = 0; j < N; j++) v[j] = masked(v[j], pack.values[j]);
    } else {
#pragma unroll
      for (int j = 0; j < N; j++) {
        if (column + j < 0 || column + j >= row.visible) continue;
        v[j] = masked(v[j], mask[(column + j) * p.mask_key_stride]);
      }
    }
  }
};

template <typename Out, int N>
__device__ __forceinline__ void store_values(const Params& p, const Row& row, int index, const float (&y)[N]) {
  Out* out = static_cast<Out*>(p.out) + row.first;
  const int column = index * N - row.shift;
  if (p.is_aligned && column >= 0 && column + N <= p.keys) {
    store_pack(out + column, y);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (column + i >= 0 && column + i < p.keys) out[column + i] = from_float<Out>(y[i]);
  }
}

// exp((v - maximum) * c), `factor` being c in the base of the exponential.
template <typename Out>
__device__ __forceinline__ float exponential(float v, float maximum, float factor) {
  if constexpr (std::is_same_v<Out, float>) {
    return expf((v - maximum) * factor);
  } else {
    return exp2_approximate((v - maximum) * factor);
  }
}

template <typename Out>
__device__ __forceinline__ float exponential_factor(const Params& p) {
  return (p.scales_last ? p.scale : 1.0f) * (std::is_same_v<Out, float> ? 1.0f : kLog2E);
}

// What is subtracted: 0 in place of -inf, so that a row with nothing to see has exponentials 0.
__device__ __forceinline__ float base_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// A sum of 0 is a row with nothing to see; NaN spoils its row.
__device__ __forceinline__ float inverse_of(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

// kThreads threads own a row and hold it: kPacksHeld packs each.
template <typename T, typename Out, int kThreads, bool kHasMask>
__global__ void __launch_bounds__(kThreads == kWarpSize ? kWarpSize * kWarpsOfRows : kThreads)
    softmax_held_kernel(Params p) {
  constexpr int N = kPackSize<T>;
  const int thread = static_cast<int>(threadIdx.x) % kThreads;
  const int64_t rows_per_block = static_cast<int>(blockDim.x) / kThreads;
  const int64_t number = blockIdx.x * rows_per_block + static_cast<int>(threadIdx.x) / kThreads;
  if (number >= p.rows) return;
  const Row row = row_at<N>(p, number);
  const auto reduce = [](auto op, float x) {
    using Op = decltype(op);
    if constexpr (kThreads == kWarpSize) {
      return reduce_lanes<Op>(x);
    } else {
      return reduce_block<Op>(x, dynamic_shared<float>());
    }
  };

  RowPacks<T, kPacksHeld> packs;
  packs.template load<kHasMask>(p, row, thread, kThreads);
  auto& v = packs.v;
  float maximum = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPacksHeld; i++) {
#pragma unroll
    for (int j = 0; j < N; j++) maximum = fmaxf(maximum, v[i][j]);
  }
  const float base = base_of(reduce(Max{}, maximum)), factor = exponential_factor<Out>(p);

  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacksHeld; i++) {
#pragma unroll
    for (int j = 0; j < N; j++) {
      v[i][j] = exponential<Out>(v[i][j], base, factor);
      sum += v[i][j];
    }
  }
  const float inverse = inverse_of(reduce(Sum{}, sum));
#pragma unroll
  for (int i = 0; i < kPacksHeld; i++) {
#pragma unroll
    for (int j = 0; j < N; j++) v[i][j] *= inverse;
    store_values<Out>(p, row, i * kThreads + thread, v[i]);
  }
}

// A block owns a row and reads it twice.
template <typename T, typename Out, bool kHasMask>
__global__ void __launch_bounds__(kLongRowThreads) softmax_long_kernel(Params p) {
  constexpr int N = kPackSize<T>;
  const Shared<float> scratch = dynamic_shared<float>();
  const Row row = row_at<N>(p, blockIdx.x);
  const int packs = (p.keys + row.shift + N - 1) / N;
  const float factor = exponential_factor<Out>(p);

  // Each thread's own maximum and, relative to it, sum (Milakov and Gimelshein 2018).
  float maximum = -INFINITY, sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < packs; i += kLongRowThreads) {
    RowPacks<T, 1> pack;
    pack.template load<kHasMask>(p, row, i, 0);
    const auto& v = pack.v[0];
    float larger = maximum;
#pragma unroll
    for (int j = 0; j < N; j++) larger = fmaxf(larger, v[j]);
    const float base = base_of(larger);
    if (maximum != -INFINITY) sum *= exponential<Out>(maximum, base, factor);  // else 0, or NaN that stays
#pragma unroll
    for (int j = 0; j < N; j++) sum += exponential<Out>(v[j], base, factor);
    maximum = larger;
  }
  const float base = base_of(reduce_block<Max>(maximum, scratch));
  if (maximum != -INFINITY) sum *= exponential<Out>(maximum, base, factor);
  const float inverse = inverse_of(reduce_block<Sum>(sum, scratch));

  for (int i = static_cast<int>(threadIdx.x); i < packs; i += kLongRowThreads) {
    RowPacks<T, 1> pack;
    pack.template load<kHasMask>(p, row, i, 0);
    auto& v = pack.v[0];
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = exponential<Out>(v[j], base, factor) * inverse;
    store_values<Out>(p, row, i, v);
  }
}

// Dimensions that lie in the mask as one are made one.
void set_mask(Params& p, const ScaledMaskedSoftmaxArgs& args) {
  p.mask_kind = args.mask_kind;
  p.mask = args.mask;
  p.mask_key_stride = args.mask_key_stride;
  p.num_leading = 0;
  if (args.mask_kind == MaskKind::kNone) return;
  for (int d = 0; d < args.num_leading; d++) {
    const int64_t size = args.leading_sizes[d], stride = args.mask_strides[d];
    if (size == 1) continue;
    const int last = p.num_leading - 1;
    if (last >= 0 && p.mask_strides[last] == size * stride) {
      p.leading_sizes[last] *= size;
      p.mask_strides[last] = stride;
      continue;
    }
    ALULA_CHECK(p.num_leading < kMaxLeading, "mask has more than ", kMaxLeading,
                " dimensions with strides of their own; give a contiguous mask");
    p.leading_sizes[p.num_leading] = size;
    p.mask_strides[p.num_leading++] = stride;
  }
}

template <typename T, typename Out, bool kHasMask>
void softmax_as(const Params& p, const CudaStream& stream) {
  const int packs = (p.keys + kPackSize<T> - 1) / kPackSize<T> + 1;  // a shifted row has one more
  if (packs <= kWarpSize * kPacksHeld) {
    launch("softmax_held_kernel (a warp a row)", softmax_held_kernel<T, Out, kWarpSize, kHasMask>,
           {.blocks = {(p.rows + kWarpsOfRows - 1) / kWarpsOfRows}, .threads = kWarpSize * kWarpsOfRows}, stream, p);
  } else if (packs <= kRowThreads * kPacksHeld) {
    launch("softmax_held_kernel (a block a row)", softmax_held_kernel<T, Out, kRowThreads, kHasMask>,
           {.blocks = {p.rows}, .threads = kRowThreads, .shared_bytes = kRowThreads / kWarpSize * 4}, stream, p);
  } else {
    launch("softmax_long_kernel", softmax_long_kernel<T, Out, kHasMask>,
           {.blocks = {p.rows}, .threads = kLongRowThreads, .shared_bytes = kLongRowThreads / kWarpSize * 4}, stream,
           p);
  }
}

}  // namespace

void scaled_masked_softmax_cuda(const ScaledMaskedSoftmaxArgs& args, int64_t rows, const CudaStream& stream) {
  ALULA_CHECK(args.num_keys < (int64_t{1} << 30), "scores has rows of ", args.num_keys, "; accepted: up to 2^30 - 1");
  Params p = {};
  p.scores = args.scores;
  p.out = args.out;
  p.rows = rows;
  p.tokens = args.num_tokens;
  p.keys = static_cast<int>(args.num_keys);
  p.scale = args.scale;
  p.is_causal = args.is_causal;
  const bool adds_mask = args.mask_kind != MaskKind::kNone && args.mask_kind != MaskKind::kBool;
  p.scales_last = !adds_mask && args.scale > 0;
  p.is_aligned = is_aligned_16(args.scores) && is_aligned_16(args.out);
  set_mask(p, args);
  dispatch_dtype(args.dtype, [&](auto in) {
    dispatch_dtype(args.out_dtype, [&](auto out) {
      using T = typename decltype(in)::Type;
      using Out = typename decltype(out)::Type;
      p.mask_kind == MaskKind::kNone ? softmax_as<T, Out, false>(p, stream) : softmax_as<T, Out, true>(p, stream);
    });
  });
}

}  // namespace alula
