// scaled_masked_softmax on the CPU: a row at a time, three passes of which only the first reads from memory.
//
//   1. m = max over the visible keys of v(j)     reads the scores
//   2. e(j) = exp((v(j) - m) * c), sum += e(j)   scores from L1 or L2, e to a row of scratch; fetches the next row
//   3. y(j) = e(j) / sum                         scratch from L1 or L2, y past the caches where it is large
//
// v is the score itself and c = scale where that keeps the order of the scores (no additive mask, scale > 0): the
// difference of two scores near each other is exact, however large they are. Otherwise v = scale * score + mask and
// c is 1. A 16-bit result is made by 2^x with c / ln 2 in place of c: relative error 1e-5 where y = e^-87, less above.
//
// -inf is a key that is not visible. A NaN or +inf among a row's v makes the whole row NaN, as torch.softmax does; what
// a bool mask or the causal limit hides has no influence, whatever it is. A row with nothing visible is zeros. Two
// scores whose difference overflows fp32 count as infinitely far apart.
#include "ops/scaled_masked_softmax.h"

#include <type_traits>

#include "core/dispatch.h"
#include "cpu/vec_math.h"

namespace alula::ALULA_ISA {
namespace {

constexpr int kWidth = Vec::kWidth;
constexpr float kInfinity = __builtin_inff();

struct NoMask {};

// v of the keys j .. j + lanes - 1; -inf in lanes that are not visible.
template <typename T, typename Mask, bool kScaled>
struct Row {
  const T* scores;
  const Mask* mask;
  Vec scale;

  template <typename... Lanes>  // one int for a part of a register, nothing for a whole one
  ALULA_INLINE Vec operator()(int64_t j, Lanes... lanes) const {
    const Vec hidden = broadcast(-kInfinity);
    Vec v = load(scores + j, lanes...);
    if constexpr (std::is_same_v<Mask, NoMask> || std::is_same_v<Mask, bool>) {
      if constexpr (kScaled) v = v * scale;
    } else {
      v = fma(v, scale, load(mask + j, lanes...));
    }
    if constexpr (std::is_same_v<Mask, bool>) return select_true(mask + j, lanes..., v, hidden);
    if constexpr (sizeof...(lanes) > 0) v = select_first(lanes..., v, hidden);
    return v;
  }
};

// Writes the n exponentials and returns their sum: 0 where nothing is visible, NaN where the row has no meaning.
template <typename T, typename Mask, bool kScaled, bool kExact>
float exponentials(const void* scores, const void* mask, float scale, int64_t n, const char* next, float* e) {
  const Row<T, Mask, kScaled> row = {static_cast<const T*>(scores), static_cast<const Mask*>(mask), broadcast(scale)};
  const int rest = static_cast<int>(n % kWidth);
  const int64_t whole = n - rest;

  constexpr int kChains = 4;  // independent maxima hide the latency
  Vec most[kChains];
  for (int c = 0; c < kChains; c++) most[c] = broadcast(-kInfinity);
  int64_t j = 0;
  for (; j + kChains * kWidth <= n; j += kChains * kWidth) {
    for (int c = 0; c < kChains; c++) most[c] = max(most[c], row(j + c * kWidth));
  }
  for (; j < whole; j += kWidth) most[0] = max(most[0], row(j));
  if (rest > 0) most[0] = max(most[0], row(j, rest));
  const float m = reduce_max(max(max(most[0], most[1]), max(most[2], most[3])));

  if (!(m > -kInfinity)) {  // nothing visible, unless the maximum has lost a NaN: then -1 + NaN remains
    Vec trace = zero();
    for (j = 0; j < whole; j += kWidth) trace = trace + max(broadcast(-1.0f), row(j));
    if (rest > 0) trace = trace + max(broadcast(-1.0f), row(j, rest));
    for (int64_t i = 0; i < n; i++) e[i] = 0.0f;
    const float sum = reduce_add(trace);
    return sum == sum ? 0.0f : sum;
  }

  constexpr bool kInScores = !kScaled && (std::is_same_v<Mask, NoMask> || std::is_same_v<Mask, bool>);
  const float c = kInScores ? scale : 1.0f;
  const Vec top = broadcast(m), factor = broadcast(kExact ? c : c * 1.44269504088896341f);
  const auto exponential = [&](Vec v) {
    if constexpr (!kExact) return exp2((v - top) * factor);
    if constexpr (kInScores) return exp_of_negative((v - top) * factor);
    return exp_of_negative(v - top);
  };
  Vec sum[2] = {zero(), zero()};
  for (j = 0; j + 2 * kWidth <= n; j += 2 * kWidth) {
    prefetch(next + j * sizeof(T));
    if constexpr (kWidth * sizeof(T) > 32) prefetch(next + (j + kWidth) * sizeof(T));
    const Vec a = exponential(row(j)), b = exponential(row(j + kWidth));
    store(e + j, a);
    store(e + j + kWidth, b);
    sum[0] = sum[0] + a;
    sum[1] = sum[1] + b;
  }
  for (; j < whole; j += kWidth) {
    const Vec a = exponential(row(j));
    store(e + j, a);
    sum[0] = sum[0] + a;
  }
  if (rest > 0) {
    const Vec a = exponential(row(j, rest));
    store(e + j, a, rest);
    sum[1] = sum[1] + a;
  }
  return reduce_add(sum[0] + sum[1]);
}

// y = e * factor
template <typename T, bool kPastCaches>
void write_row(const float* e, float factor, int64_t n, void* out) {
  const Vec f = broadcast(factor);
  T* y = static_cast<T*>(out);
  int64_t j = 0;
  if constexpr (kPastCaches) {  // up to the next cache line
    const auto misaligned = static_cast<int64_t>(reinterpret_cast<size_t>(y) % 64 / sizeof(T));
    const int64_t head = misaligned == 0 ? 0 : 64 / static_cast<int64_t>(sizeof(T)) - misaligned;
    const int64_t end = head < n ? head : n;
    for (; j + kWidth <= end; j += kWidth) store(y + j, load(e + j) * f);
    if (j < end) store(y + j, load(e + j, static_cast<int>(end - j)) * f, static_cast<int>(end - j));
    j = end;
  }
  for (; j + kWidth <= n; j += kWidth) store_or_stream<kPastCaches>(y + j, load(e + j) * f);
  if (j < n) store(y + j, load(e + j, static_cast<int>(n - j)) * f, static_cast<int>(n - j));
}

using Exponentials = float (*)(const void*, const void*, float, int64_t, const char*, float*);

template <typename T, bool kExact>
Exponentials choose_exponentials(MaskKind kind, bool is_scaled) {
  switch (kind) {
    case MaskKind::kNone:
      return is_scaled ? exponentials<T, NoMask, true, kExact> : exponentials<T, NoMask, false, kExact>;
    case MaskKind::kBool:
      return is_scaled ? exponentials<T, bool, true, kExact> : exponentials<T, bool, false, kExact>;
    case MaskKind::kFloat32:
      return exponentials<T, float, true, kExact>;
    case MaskKind::kBFloat16:
      return exponentials<T, bf16, true, kExact>;
    case MaskKind::kFloat16:
      return exponentials<T, f16, true, kExact>;
  }
  return nullptr;
}

constexpr int64_t kMaskBytes[] = {0, sizeof(bool), sizeof(float), sizeof(bf16), sizeof(f16)};  // by MaskKind

// Where the mask of row r begins, and from there, side by side, the mask of its first n keys.
const void* mask_row(const ScaledMaskedSoftmaxArgs& args, int64_t r, int64_t n, void* gathered) {
  if (args.mask_kind == MaskKind::kNone) return nullptr;
  int64_t offset = 0;
  for (int d = args.num_leading - 1; d >= 0; d--) {
    offset += r % args.leading_sizes[d] * args.mask_strides[d];
    r /= args.leading_sizes[d];
  }
  const int64_t bytes = kMaskBytes[static_cast<int>(args.mask_kind)];
  const char* first = static_cast<const char*>(args.mask) + offset * bytes;
  if (args.mask_key_stride == 1) return first;
  const auto gather = [&](auto* to) {
    const auto* from = reinterpret_cast<decltype(to)>(const_cast<char*>(first));
    for (int64_t j = 0; j < n; j++) to[j] = from[j * args.mask_key_stride];
    return to;
  };
  if (bytes == 1) return gather(static_cast<uint8_t*>(gathered));
  if (bytes == 2) return gather(static_cast<uint16_t*>(gathered));
  return gather(static_cast<uint32_t*>(gathered));
}

void softmax(const ScaledMaskedSoftmaxArgs& args, int64_t first, int64_t last, float* scratch) {
  const int64_t keys = args.num_keys;
  float* e = scratch;
  float* gathered_mask = scratch + scratch_floats(args) / 2;
  const int64_t bytes = args.dtype == DType::kFloat32 ? 4 : 2, out_bytes = args.out_dtype == DType::kFloat32 ? 4 : 2;
  const Exponentials exponentials_of = dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const bool is_scaled = !(args.scale > 0.0f);
    return args.out_dtype == DType::kFloat32 ? choose_exponentials<T, true>(args.mask_kind, is_scaled)
                                             : choose_exponentials<T, false>(args.mask_kind, is_scaled);
  });
  const auto write = dispatch_dtype(args.out_dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    return args.writes_past_caches ? write_row<T, true> : write_row<T, false>;
  });
  for (int64_t r = first; r < last; r++) {
    int64_t n = keys;
    if (args.is_causal) {
      n = r % args.num_tokens + 1 + (keys - args.num_tokens);
      n = n < 0 ? 0 : n < keys ? n : keys;
    }
    const char* row = static_cast<const char*>(args.scores) + r * keys * bytes;
    const float sum = exponentials_of(row, mask_row(args, r, n, gathered_mask), args.scale, n, row + keys * bytes, e);
    for (int64_t j = n; j < keys; j++) e[j] = 0.0f;
    write(e, sum == 0.0f ? 0.0f : 1.0f / sum, keys, static_cast<char*>(args.out) + r * keys * out_bytes);
  }
  if (args.writes_past_caches) stream_fence();
}

}  // namespace

const ScaledMaskedSoftmaxKernels kScaledMaskedSoftmax = {softmax};

}  // namespace alula::ALULA_ISA
