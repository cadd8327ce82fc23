// How the weight of a product is stored: dense, or quantized. Plain data, seen by the torch side and by every
// instruction set.
//
// A quantized weight is one tensor of bytes [ceil(N/32)][panel_bytes]. A panel has 32 output rows r; four neighbours of
// K lie together ("step", what one 32-bit lane of an integer dot product takes), scales lie in front of what they
// scale, so that a panel is read in address order, once, in whole cache lines:
//
//   int8             float scale[32], then per step of 4 k: uint8 code[32][4]
//                      w = scale[r] * (code - 128), code 1..255
//   int4             per group of g k: half scale[32], then per step of 4 k: 64 bytes
//                      w = scale[r] * (code - 8), code 0..15
//   int4_asymmetric  per group of g k: half scale[32], half least[32], then as int4
//                      w = scale[r] * code + least[r]
//   nf4              per group of 64 k: half scale[32] (the largest magnitude), then as int4
//                      w = scale[r] * kNf4[code]
//
// The 64 bytes of a step of 4-bit codes: byte 4 * (r % 16) + k % 4 has row r % 16 in its low half, row 16 + r % 16 in
// its high half, so that a mask and a shift give two registers in the order of int8's codes.
// K is padded to whole steps (int8) or whole groups, N to whole panels; padding means zero (asymmetric: any value, it
// meets activations that are zero).
#pragma once

#include <cstdint>

namespace alula {

enum class WeightKind : int { kDense = 0, kInt8 = 1, kInt4 = 2, kInt4Asymmetric = 3, kNf4 = 4 };

// What Python hands over as one integer: kind + 16 * full_activations + 256 * group_size.
struct WeightFormat {
  WeightKind kind = WeightKind::kDense;
  bool full_activations = false;  // multiply x as it is, else rounded to 8 bits per row and block of K
  int group_size = 0;             // of K, per scale; 0: a scale for the whole row
};

#define ALULA_PLAIN constexpr __attribute__((always_inline))  // no copy is shared between instruction sets

ALULA_PLAIN bool has_4bit_codes(WeightKind kind) { return kind >= WeightKind::kInt4; }

constexpr int64_t kStepBytes8 = 128;  // 32 rows x 4 k of 8-bit codes
constexpr int64_t kStepBytes4 = 64;   // the same of 4-bit codes
constexpr int64_t kHalfScalesBytes = 64;

// What stands in front of the codes: of a panel (int8) or of a group.
ALULA_PLAIN int64_t header_bytes(WeightKind kind) {
  return kind == WeightKind::kInt4Asymmetric ? 2 * kHalfScalesBytes : has_4bit_codes(kind) ? kHalfScalesBytes : 128;
}

ALULA_PLAIN int64_t group_bytes(WeightFormat f) { return header_bytes(f.kind) + f.group_size / 4 * kStepBytes4; }

ALULA_PLAIN int64_t panel_bytes(WeightFormat f, int64_t k) {
  if (!has_4bit_codes(f.kind)) return header_bytes(f.kind) + (k + 3) / 4 * kStepBytes8;
  return (k + f.group_size - 1) / f.group_size * group_bytes(f);
}

// The 16 values of nf4: quantiles of a normal distribution (Dettmers et al. 2023, QLoRA, appendix E).
constexpr float kNf4[16] = {-1.0f,
                            -0.6961928009986877f,
                            -0.5250730514526367f,
                            -0.39491748809814453f,
                            -0.28444138169288635f,
                            -0.18477343022823334f,
                            -0.09105003625154495f,
                            0.0f,
                            0.07958029955625534f,
                            0.16093020141124725f,
                            0.24611230194568634f,
                            0.33791524171829224f,
                            0.44070982933044434f,
                            0.5626170039176941f,
                            0.7229568362236023f,
                            1.0f};

// The same in steps of 1/127, plus 128: what meets 8-bit activations.
constexpr uint8_t kNf4Codes[16] = {1, 40, 61, 78, 92, 105, 116, 128, 138, 148, 159, 171, 184, 199, 220, 255};

}  // namespace alula
