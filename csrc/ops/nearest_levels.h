// The nearest codes of the 4-bit formats, four values at a time. Portable: the same codes on every machine, in vector
// instructions where there are.
#pragma once

#include "cpu/weight_format.h"

namespace alula {

constexpr int kLanes = 4;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef int Codes __attribute__((vector_size(kLanes * sizeof(int))));

inline Lanes all(float x) { return Lanes{} + x; }

// To the nearest integer, ties to even, of x clamped to [low, high]; far below 2^22.
inline Lanes nearest_within(Lanes x, float low, float high) {
  const Lanes y = x < low ? all(low) : x > high ? all(high) : x;
  return (y + 0x1.8p23f) - 0x1.8p23f;
}

// The codes nearest to x, and what they stand for before scale and least value.
struct Levels {
  Lanes values;
  Codes codes;
};

template <WeightKind kKind>
inline Levels nearest_levels(Lanes x) {
  if constexpr (kKind == WeightKind::kNf4) {
    Codes codes = {};
    for (int i = 0; i < 15; i++) codes -= x > (kNf4[i] + kNf4[i + 1]) * 0.5f;  // true is -1
    Lanes values = {};
    for (int i = 0; i < kLanes; i++) values[i] = kNf4[codes[i]];
    return {values, codes};
  }
  constexpr float kLeast = kKind == WeightKind::kInt4 ? -8.0f : 0.0f;
  const Lanes values = nearest_within(x, kLeast, kLeast + 15.0f);
  return {values, __builtin_convertvector(values - kLeast, Codes)};
}

}  // namespace alula
