// The 16-bit storage formats, as plain data. Arithmetic on them lives in cpu/vec.h.
#pragma once

#include <cstdint>

namespace alula {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

// What a tensor's elements are, for code that is chosen at run time (see core/dispatch.h).
enum class DType : int { kFloat32, kBFloat16, kFloat16 };

// What a mask holds: true for visible, or what is added to the scores.
enum class MaskKind : int { kNone, kBool, kFloat32, kBFloat16, kFloat16 };

}  // namespace alula
