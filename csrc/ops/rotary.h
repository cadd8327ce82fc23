// rotary: turns the first rotary_dim values of every head of q and k by the angles of their token's position.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/isa.h"
#include "cuda/device.h"
#include "cuda/id_faults.h"

namespace alula {

struct RotaryArgs {
  DType dtype;
  int64_t tokens;      // T
  int64_t num_heads;   // of this tensor: H for q, G for k
  int64_t head_dim;    // D
  int64_t rotary_dim;  // even, at most D
  bool is_interleaved;
  const void* x;         // [B, T, heads, D], any strides but a contiguous last dimension
  int64_t x_strides[3];  // of B, T, heads, in elements
  void* out;             // the same shape; may be x itself
  int64_t out_strides[3];
  const int32_t* positions;  // [B, T], each in [0, P)
  const float* table;        // [P, rotary_dim]: cosines, then sines
};

struct RotaryKernels {
  void (*rotate)(const RotaryArgs& args, int64_t first_token, int64_t last_token);  // of B * T
};

ALULA_DECLARE_KERNELS(RotaryKernels, kRotary)

// Both tensors, of num_tokens = B * T tokens each, in one launch; num_positions is P. Wrong positions are noted in
// `faults`, which may be null.
void rotary_cuda(const RotaryArgs& q, const RotaryArgs& k, int64_t num_tokens, int64_t num_positions, IdFaults* faults,
                 const CudaStream& stream);

}  // namespace alula
