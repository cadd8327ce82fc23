// Rotary position embedding of one head in fp32 (Su et al. 2021): each pair (x, y) turns by its angle,
//   x' = x cos - y sin,  y' = y cos + x sin.
// A table row holds, for one position, the cosines of the rotary_dim / 2 angles and then their sines.
#pragma once

#include "cpu/vec.h"

namespace alula::ALULA_ISA {

// Pairs (x[0], x[1]), (x[2], x[3]), ... as GPT-J and CodeGen have them; n values, n even.
ALULA_INLINE void rotate_interleaved(float* x, const float* cosine, const float* sine, int64_t n) {
  for (int64_t i = 0; i < n / 2; i++) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cosine[i] - b * sine[i];
    x[2 * i + 1] = b * cosine[i] + a * sine[i];
  }
}

// Pairs (x[i], x[i + n / 2]) as GPT-NeoX and Llama have them.
ALULA_INLINE void rotate_halves(float* x, const float* cosine, const float* sine, int64_t n) {
  for (int64_t i = 0; i < n / 2; i++) {
    const float a = x[i], b = x[i + n / 2];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + n / 2] = b * cosine[i] + a * sine[i];
  }
}

}  // namespace alula::ALULA_ISA
