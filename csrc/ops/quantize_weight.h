// quantize_weight, dequantize_weight: a plain weight [N, K] to and from a quantized panel order (cpu/weight_format.h).
#pragma once

#include "core/types.h"
#include "cpu/weight_format.h"
#include "cuda/device.h"
#include "ops/quantize_group.h"

namespace alula {

struct DequantizeArgs {
  WeightFormat format;
  const void* packed;  // [ceil(N/32)][panel_bytes]
  int64_t n, k;
  DType dtype;  // of out
  void* out;    // [N, K]
};

// Writes one row's group: its scales and codes into lane `lane` (row % 32) of the panel's group, zeroed before its
// first row.
void store_group(WeightFormat format, const QuantizedGroup& quantized, int64_t lane, uint8_t* group);

void dequantize_weight_cuda(const DequantizeArgs& args, const CudaStream& stream);

}  // namespace alula
