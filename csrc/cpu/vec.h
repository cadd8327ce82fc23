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

}  // namespace alula::ALULA_ISA

#if defined(__AVX512F__)
#include "cpu/vec_avx512.h"
#elif defined(__AVX2__)
#include "cpu/vec_avx2.h"
#else
#include "cpu/vec_generic.h"
#endif

namespace alula::ALULA_ISA {

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

// kOnce: used once, and kept out of the larger caches.
template <bool kOnce = false>
ALULA_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p, 0, kOnce ? 0 : 3);
}
ALULA_INLINE void prefetch_to_second_level(const void* p) { __builtin_prefetch(p, 0, 2); }

template <bool kPastCaches, typename T>
ALULA_INLINE void store_or_stream(T* p, Vec a) {
  if constexpr (kPastCaches) {
    stream(p, a);
  } else {
    store(p, a);
  }
}

}  // namespace alula::ALULA_ISA
