// scaled_masked_softmax: y = softmax(scale * x + mask) over the last dimension, causal limit, fp32 inside.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/isa.h"
#include "cuda/device.h"

namespace alula {

struct ScaledMaskedSoftmaxArgs {
  DType dtype;         // of the scores
  DType out_dtype;     // of the result
  const void* scores;  // [rows, S]; row r is query r % T
  void* out;           // [rows, S]
  int64_t num_tokens;  // T
  int64_t num_keys;    // S
  float scale;
  bool is_causal;           // query t sees key j if j <= t + (S - T)
  bool writes_past_caches;  // the result is larger than the caches: do not evict others for it

  // Row r of the mask begins at mask + the sum over dimensions d of index_d * mask_strides[d], where index is r taken
  // apart by leading_sizes. Strides are in elements, 0 where the mask is broadcast.
  MaskKind mask_kind;
  const void* mask;              // null for kNone; bool: true = visible; otherwise added
  int num_leading;               // dimensions before S
  const int64_t* leading_sizes;  // [num_leading]
  const int64_t* mask_strides;   // [num_leading]
  int64_t mask_key_stride;       // along S
};

struct ScaledMaskedSoftmaxKernels {
  // Rows [first, last). `scratch` is this thread's own: scratch_floats(args) floats, aligned to 64 bytes.
  void (*softmax)(const ScaledMaskedSoftmaxArgs& args, int64_t first, int64_t last, float* scratch);
};

// One row of fp32 exponentials and one row of a mask whose keys do not lie side by side, each with room to align.
inline int64_t scratch_floats(const ScaledMaskedSoftmaxArgs& args) { return 2 * ((args.num_keys + 15) / 16 * 16); }

ALULA_DECLARE_KERNELS(ScaledMaskedSoftmaxKernels, kScaledMaskedSoftmax)

void scaled_masked_softmax_cuda(const ScaledMaskedSoftmaxArgs& args, int64_t rows, const CudaStream& stream);

}  // namespace alula
