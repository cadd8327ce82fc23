// layer_norm: y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias over the last dimension, z = x + residual, fp32
// inside.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/isa.h"
#include "cuda/device.h"

namespace alula {

struct LayerNormArgs {
  DType dtype;           // of every tensor
  const void* x;         // [rows, E]
  const void* residual;  // [rows, E], may be null
  const void* weight;    // [E]
  const void* bias;      // [E], may be null
  void* out;             // [rows, E]
  int64_t width;         // E
  float eps;
  bool writes_past_caches;  // the result is larger than the caches: do not evict others for it
};

struct LayerNormKernels {
  // Rows [first, last). `scratch` is this thread's own: scratch_floats(args) floats, aligned to 64 bytes.
  void (*normalize)(const LayerNormArgs& args, int64_t first, int64_t last, float* scratch);
};

// The weight and the bias in fp32.
inline int64_t scratch_floats(const LayerNormArgs& args) { return 2 * ((args.width + 15) / 16 * 16); }

ALULA_DECLARE_KERNELS(LayerNormKernels, kLayerNorm)

void layer_norm_cuda(const LayerNormArgs& args, int64_t rows, const CudaStream& stream);

}  // namespace alula
