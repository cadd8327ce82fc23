// Vec as 8 lanes of AVX2 with FMA and F16C. Included by vec.h only.
#pragma once

namespace alula::ALULA_ISA {

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;
};
struct TwoVecs {
  Vec a, b;
};

ALULA_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

ALULA_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
ALULA_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }

ALULA_INLINE Vec widen_bf16(__m128i half) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
ALULA_INLINE __m128i load_16bit(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
ALULA_INLINE __m128i load_16bit(const void* p, int n) {
  alignas(16) uint16_t lanes[8] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * 2);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(lanes));
}
ALULA_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
ALULA_INLINE Vec load(const bf16* p) { return widen_bf16(load_16bit(p)); }
ALULA_INLINE Vec load(const f16* p) { return {_mm256_cvtph_ps(load_16bit(p))}; }
// The first n lanes, 0 <= n <= 8; the others are zero. Reads nothing beyond p[n-1].
ALULA_INLINE Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
ALULA_INLINE Vec load(const bf16* p, int n) { return widen_bf16(load_16bit(p, n)); }
ALULA_INLINE Vec load(const f16* p, int n) { return {_mm256_cvtph_ps(load_16bit(p, n))}; }

// The upper half of each 32-bit lane is the bf16, rounded to nearest even; NaN stays NaN.
ALULA_INLINE __m256i rounded_bf16_bits(Vec a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_or_si256(u, _mm256_set1_epi32(0x00400000)), nan);
}
ALULA_INLINE __m128i narrow_to_bf16(Vec a) {
  const __m256i high = _mm256_srli_epi32(rounded_bf16_bits(a), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
ALULA_INLINE __m128i narrow_to_f16(Vec a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }
ALULA_INLINE void store_16bit(void* p, __m128i half, int n) {
  alignas(16) uint16_t lanes[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), half);
  std::memcpy(p, lanes, static_cast<size_t>(n) * 2);
}
ALULA_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
ALULA_INLINE void store(bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_to_bf16(a)); }
ALULA_INLINE void store(f16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_to_f16(a)); }
ALULA_INLINE void store(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a.v); }
ALULA_INLINE void store(bf16* p, Vec a, int n) { store_16bit(p, narrow_to_bf16(a), n); }
ALULA_INLINE void store(f16* p, Vec a, int n) { store_16bit(p, narrow_to_f16(a), n); }
// Past the caches. p is aligned to 32 bytes (fp32) or 16 bytes (16-bit types); end a run of them with stream_fence.
ALULA_INLINE void stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }
ALULA_INLINE void stream(bf16* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_to_bf16(a)); }
ALULA_INLINE void stream(f16* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_to_f16(a)); }
ALULA_INLINE void stream_fence() { _mm_sfence(); }

// 16 neighbours as those with even and those with odd index: half the instructions of widening and narrowing them in
// order.
ALULA_INLINE TwoVecs load_pairs(const bf16* p) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i odd = _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))}, {_mm256_castsi256_ps(odd)}};
}
ALULA_INLINE __m256i narrow_pairs(TwoVecs x) {
  return _mm256_blend_epi16(_mm256_srli_epi32(rounded_bf16_bits(x.a), 16), rounded_bf16_bits(x.b), 0xaa);
}
ALULA_INLINE void store_pairs(bf16* p, TwoVecs x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_pairs(x));
}
// p is aligned to 32 bytes.
ALULA_INLINE void stream_pairs(bf16* p, TwoVecs x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_pairs(x));
}

ALULA_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
ALULA_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
ALULA_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
ALULA_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
ALULA_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c
ALULA_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
// max and min return b where a lane of either is NaN, as the instruction does.
ALULA_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
ALULA_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
ALULA_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
ALULA_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
ALULA_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
ALULA_INLINE Vec copysign(Vec magnitude, Vec sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, magnitude.v), _mm256_and_ps(bit, sign.v))};
}
// a < b ? x : y, lane by lane (false where NaN).
ALULA_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
// condition[i] ? x : y
ALULA_INLINE Vec select_true(const bool* condition, Vec x, Vec y) {
  int64_t bytes;
  std::memcpy(&bytes, condition, 8);
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
  return {_mm256_blendv_ps(y.v, x.v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(lanes, _mm256_setzero_si256())))};
}
// The same where condition has n entries: y in the lanes beyond them.
ALULA_INLINE Vec select_true(const bool* condition, int n, Vec x, Vec y) {
  bool entries[8] = {};
  std::memcpy(entries, condition, static_cast<size_t>(n));
  return select_true(entries, x, y);
}
// The same of 16 entries, those with even and those with odd index.
ALULA_INLINE TwoVecs select_true_pairs(const bool* condition, TwoVecs x, Vec y) {
  const __m256i pairs = _mm256_cvtepu16_epi32(load_16bit(condition));
  const __m256i odd = _mm256_cmpgt_epi32(pairs, _mm256_set1_epi32(0xff));
  const __m256i even = _mm256_cmpgt_epi32(_mm256_and_si256(pairs, _mm256_set1_epi32(0xff)), _mm256_setzero_si256());
  return {{_mm256_blendv_ps(y.v, x.a.v, _mm256_castsi256_ps(even))},
          {_mm256_blendv_ps(y.v, x.b.v, _mm256_castsi256_ps(odd))}};
}
// x in the first n lanes, y in the others.
ALULA_INLINE Vec select_first(int n, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_castsi256_ps(first_lanes(n)))};
}
// a - floor(a), exact, for finite a.
ALULA_INLINE Vec above_floor(Vec a) { return {_mm256_sub_ps(a.v, _mm256_floor_ps(a.v))}; }
// a * 2^n for integral -252 <= n <= 254, in two factors so that each is a normal number and the result may be denormal.
constexpr bool kScaleTakesAnyPower = false;
ALULA_INLINE Vec scale_by_power_of_two(Vec a, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i first = _mm256_srai_epi32(whole, 1);
  const __m256i second = _mm256_sub_epi32(whole, first);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 f = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, bias), 23));
  const __m256 s = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(second, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, f), s)};
}
ALULA_INLINE float reduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
ALULA_INLINE float reduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

}  // namespace alula::ALULA_ISA
