// linear on CUDA with a quantized weight: y = activation(layer_norm(x) W^T + bias) + residual, one kernel for few rows
// (cuda/quantized_few_rows.cuh), layer_norm_cuda where there is a norm and one for many (cuda/quantized_many_rows.cuh).
//
// Not measured yet: no GPU was at hand.
#include "core/dispatch.h"
#include "cuda/quantized_many_rows.cuh"
#include "ops/linear_epilogue.cuh"

namespace alula {

void linear_quantized_cuda(const LinearArgs& args, const QuantizedPlan& plan, const QuantizedWork& work,
                           const CudaStream& stream) {
  dispatch_dtype(args.gemm.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch_quantized<T>(plan.is_few ? "linear: quantized_few_rows_kernel" : "linear: quantized_many_rows_kernel",
                        args.gemm, plan, work, epilogue_of<T>(args), stream);
  });
}

}  // namespace alula
