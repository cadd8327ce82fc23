// scaled_masked_softmax on the CPU: a row at a time, three passes of which only the first reads from memory.
//
//   1. m = max over the visible keys of v(j)     reads the scores
//   2. e(j) = exp((v(j) - m) * c), sum += e(j)   scores from L1 or L2, e to a row of scratch; fetches the next row
//   3. y(j) = e(j) / sum                         scratch from L1 or L2, y past the caches where it is large
//
// v is the score itself and c = scale where that keeps the order of the scores (no additive mask, scale > 0): the
// difference of two scores near each other is exact, however large they are. Otherwise v = scale * score + mask and
// c is 1. A 16-bit result is made by 2^x with c / ln 2 in place of c: relative error 1.3e-5 where y = e^-87, less
// above.
//
// One core of an AMD EPYC (Zen 4, AVX-512), rows of 2048 that L2 holds, ns per 16 scores of bf16, which a copy beyond
// the caches with two cores at work takes 2.3 to 3.3 for: 2.9, with a bf16 mask 3.0 (3.5 with v made anew in pass 2).
// It was 4.9 with exp, 4.0 with 2^x, 3.1 since even and odd neighbours are widened and narrowed apart, 2.9 since its
// polynomial is of degree 4. A cubic would take 2.7 (relative error 8.6e-5); integer instructions in place of vreduceps
// and vscalefps 3.3 to 3.4. The passes take 0.4, 1.9 and 0.5; the second one's instructions keep all four pipes busy
// for 1.5. Finding the next row's maximum beside it: 3.3.
//
// The next row is fetched into L2. Into L1, of which this row, its mask and e take most, reads 5 to 20 % slower.
//
// -inf is a key that is not visible. A NaN or +inf among a row's v makes the whole row NaN, as torch.softmax does; what
// a bool mask or the causal limit hides has no influence, whatever it is. A row with nothing visible is zeros. Two
// scores whose difference overflows fp32 count as infinitely far apart.
//
// Tried, and slower for 16 bits: writing a row in parts while the next row's exponentials are made.
#include "ops/scaled_masked_softmax.h"

#include <cmath>
#include <cstring>
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

  // The same of 2 * kWidth neighbours, even ones and odd ones; bf16, with a bool or bf16 mask or none.
  ALULA_INLINE TwoVecs pairs(int64_t j) const {
    TwoVecs v = load_pairs(scores + j);
    if constexpr (std::is_same_v<Mask, bf16>) {
      const TwoVecs add = load_pairs(mask + j);
      return {fma(v.a, scale, add.a), fma(v.b, scale, add.b)};
    }
    if constexpr (kScaled) v = {v.a * scale, v.b * scale};
    if constexpr (std::is_same_v<Mask, bool>) return select_true_pairs(mask + j, v, broadcast(-kInfinity));
    return v;
  }
};

// Of a row of n, how many are taken as pairs where pairs are taken.
ALULA_INLINE int64_t paired_part(int64_t n) { return n / (2 * kWidth) * (2 * kWidth); }

// Writes the n exponentials and returns their sum: 0 where nothing is visible, NaN where the row has no meaning.
// kPaired: those of 2 * kWidth neighbours lie as the even ones, then the odd ones.
template <typename T, typename Mask, bool kScaled, bool kExact, bool kPaired>
float exponentials(const void* scores, const void* mask, float scale, int64_t n, const char* next,
                   const void* next_mask, float* e) {
  const Row<T, Mask, kScaled> row = {static_cast<const T*>(scores), static_cast<const Mask*>(mask), broadcast(scale)};
  const auto two = [&](int64_t j) -> TwoVecs {
    if constexpr (kPaired) return row.pairs(j);
    return {row(j), row(j + kWidth)};
  };
  const int rest = static_cast<int>(n % kWidth);
  const int64_t whole = n - rest, twos = paired_part(n);
  // An additive mask makes v dear: it waits where its exponential will lie.
  constexpr bool kKept = !std::is_same_v<Mask, NoMask> && !std::is_same_v<Mask, bool>;
  const auto found = [&](int64_t j, Vec v) {
    if constexpr (kKept) store(e + j, v);
    return v;
  };
  const auto again = [&](int64_t j) {
    if constexpr (kKept) return load(e + j);
    return row(j);
  };

  Vec most[4];  // independent maxima hide the latency
  for (Vec& each : most) each = broadcast(-kInfinity);
  int64_t j = 0;
  for (; j + 4 * kWidth <= n; j += 4 * kWidth) {
    const TwoVecs v = two(j), w = two(j + 2 * kWidth);
    most[0] = max(most[0], found(j, v.a));
    most[1] = max(most[1], found(j + kWidth, v.b));
    most[2] = max(most[2], found(j + 2 * kWidth, w.a));
    most[3] = max(most[3], found(j + 3 * kWidth, w.b));
  }
  for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
    const TwoVecs v = two(j);
    most[0] = max(most[0], found(j, v.a));
    most[1] = max(most[1], found(j + kWidth, v.b));
  }
  for (; j < whole; j += kWidth) most[0] = max(most[0], found(j, row(j)));
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

  const auto sum_of = [&](auto exponential) {
    Vec sum[2] = {zero(), zero()};
    int64_t i = 0;
    // 2 * kWidth keys of the next row from key i on
    const auto fetch_next = [&](int64_t i) {
      prefetch_to_second_level(next + i * sizeof(T));
      if constexpr (kWidth * sizeof(T) > 32) prefetch_to_second_level(next + (i + kWidth) * sizeof(T));
      if constexpr (!std::is_same_v<Mask, NoMask>) {
        const Mask* mask = static_cast<const Mask*>(next_mask) + i;
        prefetch_to_second_level(mask);
        if constexpr (kWidth * sizeof(Mask) > 32) prefetch_to_second_level(mask + kWidth);
      }
    };
    for (; i < twos; i += 2 * kWidth) {
      fetch_next(i);
      const TwoVecs v = kKept ? TwoVecs{load(e + i), load(e + i + kWidth)} : two(i);
      const Vec a = exponential(v.a), b = exponential(v.b);
      store(e + i, a);
      store(e + i + kWidth, b);
      sum[0] = sum[0] + a;
      sum[1] = sum[1] + b;
    }
    if (i < n) fetch_next(i);
    for (; i < whole; i += kWidth) {
      const Vec a = exponential(again(i));
      store(e + i, a);
      sum[0] = sum[0] + a;
    }
    if (rest > 0) {
      const Vec a = exponential(row(i, rest));
      store(e + i, a, rest);
      sum[1] = sum[1] + a;
    }
    return reduce_add(sum[0] + sum[1]);
  };
  constexpr bool kInScores = !kScaled && (std::is_same_v<Mask, NoMask> || std::is_same_v<Mask, bool>);
  const float c = kInScores ? scale : 1.0f;
  const Vec top = broadcast(m);
  if constexpr (kExact) {
    const Vec factor = broadcast(c);
    return sum_of([&](Vec v) { return exp_of_negative(kInScores ? (v - top) * factor : v - top); });
  }
  const float to_base_2 = c * 1.44269504088896341f;
  const Vec factor = broadcast(to_base_2), offset = broadcast(m * to_base_2);
  if (std::fabs(m * to_base_2) < 0x1p14f) {  // its rounding, at most 2^-11, is common to the row: the sum takes it out
    return sum_of([&](Vec v) { return exp2_to_16_bits(fma(v, factor, zero() - offset)); });
  }
  return sum_of([&](Vec v) { return exp2_to_16_bits((v - top) * factor); });
}

// y = e * factor
template <typename T, bool kPastCaches>
void write_row(const float* e, float factor, int64_t, int64_t n, void* out) {
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
  const int rest = static_cast<int>((n - j) & (kWidth - 1));
  if (rest > 0) store(y + j, load(e + j, rest) * f, rest);
}

// The same where the first `paired` exponentials lie as pairs. A row that goes past the caches begins at a cache line.
template <bool kPastCaches>
void write_paired_row(const float* e, float factor, int64_t paired, int64_t n, void* out) {
  const Vec f = broadcast(factor);
  bf16* y = static_cast<bf16*>(out);
  for (int64_t j = 0; j < paired; j += 2 * kWidth) {
    const TwoVecs result = {load(e + j) * f, load(e + j + kWidth) * f};
    kPastCaches ? stream_pairs(y + j, result) : store_pairs(y + j, result);
  }
  write_row<bf16, kPastCaches>(e + paired, factor, 0, n - paired, y + paired);
}

using Exponentials = float (*)(const void*, const void*, float, int64_t, const char*, const void*, float*);

// What the causal limit hides is written as zeros, without exponentials, from the end of a line of keys on.
constexpr int64_t kLineKeys = 64;  // whole lines of any type, and whole pairs

void write_zeros(char* out, int64_t bytes, bool past_caches) {
  constexpr int64_t kStep = kWidth * static_cast<int64_t>(sizeof(float));
  int64_t i = 0;
  if (past_caches && reinterpret_cast<size_t>(out) % 64 == 0) {
    for (; i + kStep <= bytes; i += kStep) stream(reinterpret_cast<float*>(out + i), zero());
  }
  std::memset(out + i, 0, static_cast<size_t>(bytes - i));
}

using WriteRow = void (*)(const float*, float, int64_t, int64_t, void*);

// Pairs serve bf16 to bf16; the entries of a wider mask would have to be parted too. Rows are then whole
// cache lines, so that they can be streamed. Nothing here asks how many rows there are: a row alone has the same bits.
bool takes_pairs(const ScaledMaskedSoftmaxArgs& args) {
  return args.dtype == DType::kBFloat16 && args.out_dtype == DType::kBFloat16 && args.mask_kind != MaskKind::kFloat32 &&
         args.mask_kind != MaskKind::kFloat16 && args.num_keys * static_cast<int64_t>(sizeof(bf16)) % 64 == 0;
}

Exponentials choose_paired_exponentials(MaskKind kind, bool is_scaled) {
  if (kind == MaskKind::kBFloat16) return exponentials<bf16, bf16, true, false, true>;
  if (kind == MaskKind::kBool) {
    return is_scaled ? exponentials<bf16, bool, true, false, true> : exponentials<bf16, bool, false, false, true>;
  }
  return is_scaled ? exponentials<bf16, NoMask, true, false, true> : exponentials<bf16, NoMask, false, false, true>;
}

template <typename T, bool kExact>
Exponentials choose_exponentials(MaskKind kind, bool is_scaled) {
  switch (kind) {
    case MaskKind::kNone:
      return is_scaled ? exponentials<T, NoMask, true, kExact, false> : exponentials<T, NoMask, false, kExact, false>;
    case MaskKind::kBool:
      return is_scaled ? exponentials<T, bool, true, kExact, false> : exponentials<T, bool, false, kExact, false>;
    case MaskKind::kFloat32:
      return exponentials<T, float, true, kExact, false>;
    case MaskKind::kBFloat16:
      return exponentials<T, bf16, true, kExact, false>;
    case MaskKind::kFloat16:
      return exponentials<T, f16, true, kExact, false>;
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
  const bool is_scaled = !(args.scale > 0.0f), is_paired = takes_pairs(args);
  const Exponentials exponentials_of = dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (is_paired) return choose_paired_exponentials(args.mask_kind, is_scaled);
    return args.out_dtype == DType::kFloat32 ? choose_exponentials<T, true>(args.mask_kind, is_scaled)
                                             : choose_exponentials<T, false>(args.mask_kind, is_scaled);
  });
  const WriteRow write = dispatch_dtype(args.out_dtype, [&](auto tag) -> WriteRow {
    using T = typename decltype(tag)::Type;
    if (is_paired) return args.writes_past_caches ? write_paired_row<true> : write_paired_row<false>;
    return args.writes_past_caches ? write_row<T, true> : write_row<T, false>;
  });
  for (int64_t r = first; r < last; r++) {
    int64_t n = keys;
    if (args.is_causal) {
      n = r % args.num_tokens + 1 + (keys - args.num_tokens);
      n = n < 0 ? 0 : n < keys ? n : keys;
    }
    const char* row = static_cast<const char*>(args.scores) + r * keys * bytes;
    const void* mask = mask_row(args, r, n, gathered_mask);
    const void* next_mask = args.mask_key_stride == 1 && r + 1 < last ? mask_row(args, r + 1, n, nullptr) : mask;
    int64_t end = (n + kLineKeys - 1) / kLineKeys * kLineKeys;
    if (end > keys) end = keys;
    char* out = static_cast<char*>(args.out) + r * keys * out_bytes;
    // Before the exponentials, so that they go to memory meanwhile.
    write_zeros(out + end * out_bytes, (keys - end) * out_bytes, args.writes_past_caches);
    const float sum = exponentials_of(row, mask, args.scale, n, row + keys * bytes, next_mask, e);
    for (int64_t j = n; j < end; j++) e[j] = 0.0f;
    write(e, sum == 0.0f ? 0.0f : 1.0f / sum, paired_part(n), end, out);
    if (sum != sum && end < keys) {  // the whole row is NaN
      if (args.writes_past_caches) stream_fence();
      std::memset(out + end * out_bytes, 0xff, static_cast<size_t>((keys - end) * out_bytes));
    }
  }
  if (args.writes_past_caches) stream_fence();
}

}  // namespace

const ScaledMaskedSoftmaxKernels kScaledMaskedSoftmax = {softmax};

}  // namespace alula::ALULA_ISA
