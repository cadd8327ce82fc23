// linear: y = activation(layer_norm(x) W^T + bias) + residual, W packed (cpu/panel_gemm_args.h).
#pragma once

#include "cpu/isa.h"
#include "cpu/panel_gemm_args.h"
#include "cuda/device.h"
#include "cuda/quantized_product.h"

namespace alula {

struct LinearArgs {
  PanelGemmArgs gemm;
  int activation;        // core/activation.h
  const void* residual;  // [M, N], may be null
  void* out;             // [M, N]
};

struct LinearKernels {
  PanelGemmKernels gemm;
  // Panels and row blocks as in cpu/panel_gemm.h.
  void (*multiply)(const LinearArgs& args, const void* packed, int64_t first_panel, int64_t last_panel,
                   int64_t first_block, int64_t last_block);
};

ALULA_DECLARE_KERNELS(LinearKernels, kLinear)

// On CUDA, a dense W as in cuda/weight_layout.h. Up to kMaxFewRows rows:
void linear_few_rows_cuda(const LinearArgs& args, const CudaStream& stream);
// What follows the product, which is in `out`:
void linear_epilogue_cuda(const LinearArgs& args, const CudaStream& stream);
// Quantized weights (their bytes as on the CPU). Rows beyond kMaxFewRows come normed, without norm_weight.
void linear_quantized_cuda(const LinearArgs& args, const QuantizedPlan& plan, const QuantizedWork& work,
                           const CudaStream& stream);

}  // namespace alula
