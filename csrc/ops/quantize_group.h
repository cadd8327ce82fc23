// A group of a row's values to 4-bit codes that share a scale (cpu/weight_format.h).
#pragma once

#include <cstdint>

#include "cpu/weight_format.h"

namespace alula {

constexpr int64_t kMostGroup = 128;

struct QuantizedGroup {
  uint8_t codes[kMostGroup];
  uint16_t scale = 0, least = 0;  // fp16; least only of kInt4Asymmetric
};

// Of the first `count` of `group_size` values; the others are padding. Codes are the nearest to each value for the
// stored scale. False: the values are too large for fp16 scales.
bool quantize_group(WeightKind kind, const float* w, int64_t count, int64_t group_size, QuantizedGroup& result);

}  // namespace alula
