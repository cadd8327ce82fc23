// quantize_weight, dequantize_weight: a plain weight [N, K] to and from a quantized panel order (cpu/weight_format.h).
#pragma once

#include "core/types.h"
#include "cpu/weight_format.h"
#include "cuda/device.h"

namespace alula {

struct DequantizeArgs {
  WeightFormat format;
  const void* packed;  // [ceil(N/32)][panel_bytes]
  int64_t n, k;
  DType dtype;  // of out
  void* out;    // [N, K]
};

void dequantize_weight_cuda(const DequantizeArgs& args, const CudaStream& stream);

}  // namespace alula
