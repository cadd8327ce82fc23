// Vec as 16 lanes of AVX-512. Included by vec.h only.
#pragma once

namespace alula::ALULA_ISA {

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;
};
struct TwoVecs {
  Vec a, b;
};

ALULA_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

ALULA_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
ALULA_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }

ALULA_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
ALULA_INLINE Vec load(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
ALULA_INLINE Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// The first n lanes, 0 <= n <= 16; the others are zero. Reads nothing beyond p[n-1].
ALULA_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
ALULA_INLINE Vec load(const bf16* p, int n) {
  const __m256i half = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
ALULA_INLINE Vec load(const f16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))}; }

// The upper half of each 32-bit lane is the bf16, rounded to nearest even; NaN stays NaN.
ALULA_INLINE __m512i rounded_bf16_bits(Vec a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x00400000));
}
ALULA_INLINE __m256i narrow_to_bf16(Vec a) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bf16_bits(a), 16));
#endif
}
ALULA_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
ALULA_INLINE void store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_to_bf16(a)); }
ALULA_INLINE void store(f16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
ALULA_INLINE void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
ALULA_INLINE void store(bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_to_bf16(a)); }
ALULA_INLINE void store(f16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
// Past the caches. p is aligned to 64 bytes (fp32) or 32 bytes (16-bit types); end a run of them with stream_fence.
ALULA_INLINE void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
ALULA_INLINE void stream(bf16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_to_bf16(a)); }
ALULA_INLINE void stream(f16* p, Vec a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
ALULA_INLINE void stream_fence() { _mm_sfence(); }

// 32 neighbours as those with even and those with odd index: half the instructions of widening and narrowing them in
// order.
ALULA_INLINE TwoVecs load_pairs(const bf16* p) {
  const __m512i pairs = _mm512_loadu_si512(p);
  const __m512i odd = _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))}, {_mm512_castsi512_ps(odd)}};
}
ALULA_INLINE __m512i narrow_pairs(TwoVecs x) {
#if defined(__AVX512BF16__)
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(x.b.v, x.a.v));
#else
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(rounded_bf16_bits(x.a), 16), rounded_bf16_bits(x.b));
#endif
}
ALULA_INLINE void store_pairs(bf16* p, TwoVecs x) { _mm512_storeu_si512(p, narrow_pairs(x)); }
// p is aligned to 64 bytes.
ALULA_INLINE void stream_pairs(bf16* p, TwoVecs x) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow_pairs(x));
}

ALULA_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
ALULA_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
ALULA_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
ALULA_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
ALULA_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c
ALULA_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
// max and min return b where a lane of either is NaN, as the instruction does.
ALULA_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
ALULA_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
ALULA_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
ALULA_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
ALULA_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
ALULA_INLINE Vec copysign(Vec magnitude, Vec sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, magnitude.v), _mm512_and_ps(bit, sign.v))};
}
// a < b ? x : y, lane by lane (false where NaN).
ALULA_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
// condition[i] ? x : y
ALULA_INLINE Vec select_true(const bool* condition, Vec x, Vec y) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(condition));
  return {_mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), y.v, x.v)};
}
// The same where condition has n entries: y in the lanes beyond them.
ALULA_INLINE Vec select_true(const bool* condition, int n, Vec x, Vec y) {
  const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes(n), condition);
  return {_mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), y.v, x.v)};
}
// The same of 32 entries, those with even and those with odd index.
ALULA_INLINE TwoVecs select_true_pairs(const bool* condition, TwoVecs x, Vec y) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(condition));
  const __mmask16 even = _mm256_test_epi16_mask(bytes, _mm256_set1_epi16(0x00ff));
  const __mmask16 odd = _mm256_test_epi16_mask(bytes, _mm256_set1_epi16(static_cast<short>(0xff00)));
  return {{_mm512_mask_blend_ps(even, y.v, x.a.v)}, {_mm512_mask_blend_ps(odd, y.v, x.b.v)}};
}
// x in the first n lanes, y in the others.
ALULA_INLINE Vec select_first(int n, Vec x, Vec y) { return {_mm512_mask_blend_ps(first_lanes(n), y.v, x.v)}; }
// a - floor(a), exact; 0 for an infinity.
ALULA_INLINE Vec above_floor(Vec a) { return {_mm512_reduce_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
// a * 2^floor(n); exact wherever the result is a number, through denormals to zero and to infinity.
constexpr bool kScaleTakesAnyPower = true;
ALULA_INLINE Vec scale_by_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
ALULA_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
ALULA_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

}  // namespace alula::ALULA_ISA
