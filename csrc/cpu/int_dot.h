// Ints: one register of int32 sums, and the dot product of 8-bit weight codes (unsigned) with 8-bit activations
// (signed) that adds into them. A step takes 4 k; a register of sums has a column of the panel in each lane.
//
//   AVX512_VNNI   one instruction; activations are stored as 4 bytes a step
//   others        codes are split into even and odd k and widened to 16 bits, two multiply-adds of pairs; activations
//                 are stored widened, (k0, k2, k1, k3). The 8-bit multiply-add would be one instruction less and
//                 saturates: 2 x 255 x 127 is beyond int16.
// All sums are exact, so every instruction set and every order gives the same integer.
#pragma once

#include "cpu/vec.h"

namespace alula::ALULA_ISA {

#if defined(__AVX512VNNI__)
using Activation8 = int8_t;
#else
using Activation8 = int16_t;
#endif

#if defined(__AVX512F__)

struct Ints {
  __m512i v;
};
ALULA_INLINE Ints broadcast_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
ALULA_INLINE Vec to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
ALULA_INLINE int32_t read_int32(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

using Bytes = __m512i;  // Vec::kWidth columns x 4 k
ALULA_INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
ALULA_INLINE void store_bytes(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a); }
ALULA_INLINE Bytes low_nibbles(Bytes a) { return _mm512_and_si512(a, _mm512_set1_epi8(0x0f)); }
ALULA_INLINE Bytes high_nibbles(Bytes a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }
ALULA_INLINE Bytes look_up(const uint8_t (&table)[16], Bytes nibbles) {
  const __m512i everywhere = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return _mm512_shuffle_epi8(everywhere, nibbles);
}
// Byte j of each column as a float.
ALULA_INLINE Vec byte_as_float(Bytes a, int j) {
  return {_mm512_cvtepi32_ps(
      _mm512_and_si512(_mm512_srli_epi32(a, static_cast<unsigned>(8 * j)), _mm512_set1_epi32(0xff)))};
}

// table[byte j of each column].
ALULA_INLINE Vec byte_in_table(const float (&table)[16], Bytes a, int j) {
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(a, static_cast<unsigned>(8 * j)), _mm512_loadu_ps(table))};
}

#if defined(__AVX512VNNI__)
struct Codes {
  Bytes all;
};
ALULA_INLINE Codes codes_of(Bytes a) { return {a}; }
ALULA_INLINE Ints dot(Ints sum, Codes w, const int8_t* a) {
  return {_mm512_dpbusd_epi32(sum.v, w.all, _mm512_set1_epi32(read_int32(a)))};
}
#else
struct Codes {
  Bytes even, odd;
};
ALULA_INLINE Codes codes_of(Bytes a) { return {_mm512_and_si512(a, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(a, 8)}; }
ALULA_INLINE Ints dot(Ints sum, Codes w, const int16_t* a) {
  const __m512i even = _mm512_madd_epi16(w.even, _mm512_set1_epi32(read_int32(a)));
  const __m512i odd = _mm512_madd_epi16(w.odd, _mm512_set1_epi32(read_int32(a + 2)));
  return {_mm512_add_epi32(sum.v, _mm512_add_epi32(even, odd))};
}
#endif

#elif defined(__AVX2__)

struct Ints {
  __m256i v;
};
ALULA_INLINE Ints broadcast_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
ALULA_INLINE Vec to_float(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
ALULA_INLINE int32_t read_int32(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

using Bytes = __m256i;
ALULA_INLINE Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
ALULA_INLINE void store_bytes(uint8_t* p, Bytes a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
ALULA_INLINE Bytes low_nibbles(Bytes a) { return _mm256_and_si256(a, _mm256_set1_epi8(0x0f)); }
ALULA_INLINE Bytes high_nibbles(Bytes a) { return low_nibbles(_mm256_srli_epi16(a, 4)); }
ALULA_INLINE Bytes look_up(const uint8_t (&table)[16], Bytes nibbles) {
  const __m256i everywhere = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return _mm256_shuffle_epi8(everywhere, nibbles);
}
ALULA_INLINE Vec byte_as_float(Bytes a, int j) {
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(a, 8 * j), _mm256_set1_epi32(0xff)))};
}
ALULA_INLINE Vec byte_in_table(const float (&table)[16], Bytes a, int j) {
  const __m256i index = _mm256_srli_epi32(a, 8 * j);  // the permutes read three bits, the blend the sign
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
  return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)))};
}

struct Codes {
  Bytes even, odd;
};
ALULA_INLINE Codes codes_of(Bytes a) { return {_mm256_and_si256(a, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(a, 8)}; }
ALULA_INLINE Ints dot(Ints sum, Codes w, const int16_t* a) {
  const __m256i even = _mm256_madd_epi16(w.even, _mm256_set1_epi32(read_int32(a)));
  const __m256i odd = _mm256_madd_epi16(w.odd, _mm256_set1_epi32(read_int32(a + 2)));
  return {_mm256_add_epi32(sum.v, _mm256_add_epi32(even, odd))};
}

#else

struct Ints {
  IntLanes v;
};
ALULA_INLINE Ints broadcast_int(int32_t x) { return {IntLanes{x, x, x, x}}; }
ALULA_INLINE Vec to_float(Ints a) { return {__builtin_convertvector(a.v, Lanes)}; }

typedef uint32_t Bytes __attribute__((vector_size(16)));
ALULA_INLINE Bytes load_bytes(const uint8_t* p) {
  Bytes a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
ALULA_INLINE void store_bytes(uint8_t* p, Bytes a) { std::memcpy(p, &a, sizeof(a)); }
ALULA_INLINE Bytes low_nibbles(Bytes a) { return a & 0x0f0f0f0fu; }
ALULA_INLINE Bytes high_nibbles(Bytes a) { return (a >> 4) & 0x0f0f0f0fu; }
ALULA_INLINE Bytes look_up(const uint8_t (&table)[16], Bytes nibbles) {
  uint8_t bytes[sizeof(Bytes)];
  std::memcpy(bytes, &nibbles, sizeof(bytes));
  for (uint8_t& byte : bytes) byte = table[byte];
  return load_bytes(bytes);
}
ALULA_INLINE Vec byte_as_float(Bytes a, int j) {
  return {__builtin_convertvector((IntLanes)((a >> (8 * j)) & 0xffu), Lanes)};
}
ALULA_INLINE Vec byte_in_table(const float (&table)[16], Bytes a, int j) {
  Vec value;
  for (int i = 0; i < Vec::kWidth; i++) value.v[i] = table[(a[i] >> (8 * j)) & 0xffu];
  return value;
}

struct Codes {
  IntLanes k[4];
};
ALULA_INLINE Codes codes_of(Bytes a) {
  return {{(IntLanes)(a & 0xffu), (IntLanes)((a >> 8) & 0xffu), (IntLanes)((a >> 16) & 0xffu), (IntLanes)(a >> 24)}};
}
ALULA_INLINE Ints dot(Ints sum, Codes w, const int16_t* a) {
  return {sum.v + w.k[0] * a[0] + w.k[2] * a[1] + w.k[1] * a[2] + w.k[3] * a[3]};
}

#endif

}  // namespace alula::ALULA_ISA
