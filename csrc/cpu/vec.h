// Vec: one register of fp32 lanes, and loads and stores that convert from and to bf16 and f16.
//
// One of three bodies is compiled, by the flags of the object library: 16 lanes (AVX-512), 8 (AVX2 with FMA and F16C)
// or 4 (the compiler's portable vectors). Each function is one instruction or one idea. Kernels are written against
// this interface only. Everything sits in the namespace of the instruction set, so that no inline function compiled
// with wide instructions can become the copy that the linker keeps for everybody.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "core/types.h"

#ifndef ALULA_ISA
#error "compile with -DALULA_ISA=<level of cpu/isa.h>"
#endif

#define ALULA_INLINE inline __attribute__((always_inline))

namespace alula::ALULA_ISA {

// --- scalars ---------------------------------------------------------------------------------------------------

ALULA_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

ALULA_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

ALULA_INLINE float to_float(float x) { return x; }
ALULA_INLINE float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, nan
  if (magnitude < 0x0400u) {  // zero and denormals: exact as a multiple of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return float_of(sign | ((magnitude << 13) + (112u << 23)));
#endif
}

// Round to nearest even; a NaN stays a NaN (its payload may be cut off, so one bit of it is set).
inline bf16 to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((u >> 16) | 0x0040u)};
  return bf16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

inline f16 to_f16(float x) {
#if defined(__F16C__)
  return f16{static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t u = bits_of(x);
  const auto sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu))};
  if (magnitude >= 0x477ff000u) return f16{static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more round to inf
  if (magnitude < 0x38800000u) {  // below 2^-14: let the adder round to a multiple of 2^-24
    const float shifted = float_of(magnitude) + 0.5f;
    return f16{static_cast<uint16_t>(sign | (bits_of(shifted) - bits_of(0.5f)))};
  }
  const uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
  return f16{static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
#endif
}

template <typename T>
T from_float(float x);
template <>
ALULA_INLINE float from_float<float>(float x) {
  return x;
}
template <>
ALULA_INLINE bf16 from_float<bf16>(float x) {
  return to_bf16(x);
}
template <>
ALULA_INLINE f16 from_float<f16>(float x) {
  return to_f16(x);
}

// --- 16 lanes ----------------------------------------------------------------------------------------------------
#if defined(__AVX512F__)

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

// --- 8 lanes -----------------------------------------------------------------------------------------------------
#elif defined(__AVX2__)

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

// --- 4 lanes, any CPU --------------------------------------------------------------------------------------------
#else

typedef float Lanes __attribute__((vector_size(16)));
typedef int32_t IntLanes __attribute__((vector_size(16)));

struct Vec {
  static constexpr int kWidth = 4;
  Lanes v;
};
struct TwoVecs {
  Vec a, b;
};

ALULA_INLINE Vec zero() { return {Lanes{0, 0, 0, 0}}; }
ALULA_INLINE Vec broadcast(float x) { return {Lanes{x, x, x, x}}; }

template <typename T>
ALULA_INLINE Vec load(const T* p) {
  return {Lanes{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
template <>
ALULA_INLINE Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
// The first n lanes, 0 <= n <= 4; the others are zero. Reads nothing beyond p[n-1].
template <typename T>
ALULA_INLINE Vec load(const T* p, int n) {
  Vec a = zero();
  for (int i = 0; i < n; i++) a.v[i] = to_float(p[i]);
  return a;
}

template <typename T>
ALULA_INLINE void store(T* p, Vec a) {
  for (int i = 0; i < Vec::kWidth; i++) p[i] = from_float<T>(a.v[i]);
}
template <>
ALULA_INLINE void store(float* p, Vec a) {
  std::memcpy(p, &a.v, sizeof(a.v));
}
template <typename T>
ALULA_INLINE void store(T* p, Vec a, int n) {
  for (int i = 0; i < n; i++) p[i] = from_float<T>(a.v[i]);
}
template <typename T>
ALULA_INLINE void stream(T* p, Vec a) {  // no portable way past the caches
  store(p, a);
}
ALULA_INLINE void stream_fence() {}

// 8 neighbours as those with even and those with odd index.
ALULA_INLINE TwoVecs load_pairs(const bf16* p) {
  return {{Lanes{to_float(p[0]), to_float(p[2]), to_float(p[4]), to_float(p[6])}},
          {Lanes{to_float(p[1]), to_float(p[3]), to_float(p[5]), to_float(p[7])}}};
}
ALULA_INLINE void store_pairs(bf16* p, TwoVecs x) {
  for (int i = 0; i < Vec::kWidth; i++) {
    p[2 * i] = to_bf16(x.a.v[i]);
    p[2 * i + 1] = to_bf16(x.b.v[i]);
  }
}
ALULA_INLINE void stream_pairs(bf16* p, TwoVecs x) { store_pairs(p, x); }

ALULA_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
ALULA_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
ALULA_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
ALULA_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
ALULA_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }   // a * b + c, rounded twice without FMA
ALULA_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }  // c - a * b
ALULA_INLINE Vec select(IntLanes condition, Lanes x, Lanes y) {
  return {(Lanes)((condition & (IntLanes)x) | (~condition & (IntLanes)y))};
}
// max and min return b where a lane of either is NaN, as the x86 instruction does.
ALULA_INLINE Vec max(Vec a, Vec b) { return select(a.v > b.v, a.v, b.v); }
ALULA_INLINE Vec min(Vec a, Vec b) { return select(a.v < b.v, a.v, b.v); }
ALULA_INLINE Vec abs(Vec a) {
  const IntLanes magnitude = {0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff};
  return {(Lanes)((IntLanes)a.v & magnitude)};
}
// For |a| < 2^22: the sum has no bits left for a fraction.
ALULA_INLINE Vec round(Vec a) { return {(a.v + 0x1.8p23f) - 0x1.8p23f}; }
ALULA_INLINE Vec copysign(Vec magnitude, Vec sign) {
  const IntLanes bits = {0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff};
  return {(Lanes)(((IntLanes)magnitude.v & bits) | ((IntLanes)sign.v & ~bits))};
}
// a < b ? x : y, lane by lane (false where NaN).
ALULA_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) { return select(a.v < b.v, x.v, y.v); }
// condition[i] ? x : y
ALULA_INLINE Vec select_true(const bool* condition, Vec x, Vec y) {
  const IntLanes lanes = {condition[0], condition[1], condition[2], condition[3]};
  return select(lanes != 0, x.v, y.v);
}
// The same where condition has n entries: y in the lanes beyond them.
ALULA_INLINE Vec select_true(const bool* condition, int n, Vec x, Vec y) {
  for (int i = 0; i < n; i++) {
    if (condition[i]) y.v[i] = x.v[i];
  }
  return y;
}
// The same of 8 entries, those with even and those with odd index.
ALULA_INLINE TwoVecs select_true_pairs(const bool* condition, TwoVecs x, Vec y) {
  const IntLanes even = {condition[0], condition[2], condition[4], condition[6]};
  const IntLanes odd = {condition[1], condition[3], condition[5], condition[7]};
  return {select(even != 0, x.a.v, y.v), select(odd != 0, x.b.v, y.v)};
}
// x in the first n lanes, y in the others.
ALULA_INLINE Vec select_first(int n, Vec x, Vec y) { return select(IntLanes{0, 1, 2, 3} < n, x.v, y.v); }
// a - floor(a), exact, for |a| < 2^22.
ALULA_INLINE Vec above_floor(Vec a) {
  const Vec d = a - round(a);
  return select(d.v < 0.0f, d.v + 1.0f, d.v);
}
// a * 2^n for integral -252 <= n <= 254, in two factors so that each is a normal number and the result may be denormal.
constexpr bool kScaleTakesAnyPower = false;
ALULA_INLINE Vec scale_by_power_of_two(Vec a, Vec n) {
  const IntLanes whole = __builtin_convertvector(n.v, IntLanes);
  const IntLanes first = whole >> 1;
  return {a.v * (Lanes)((first + 127) << 23) * (Lanes)((whole - first + 127) << 23)};
}
ALULA_INLINE float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
ALULA_INLINE float reduce_max(Vec a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2];
  const float y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}

#endif

// The first n lanes of a, zeros after them.
ALULA_INLINE Vec first(Vec a, int n) {
  alignas(64) float lanes[Vec::kWidth];
  store(lanes, a);
  return load(lanes, n);
}

// What storing as bf16 and loading again gives.
ALULA_INLINE Vec round_to_bf16(Vec a) {
  bf16 lanes[Vec::kWidth];
  store(lanes, a);
  return load(lanes);
}

ALULA_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

template <bool kPastCaches, typename T>
ALULA_INLINE void store_or_stream(T* p, Vec a) {
  if constexpr (kPastCaches) {
    stream(p, a);
  } else {
    store(p, a);
  }
}

}  // namespace alula::ALULA_ISA
