// qkv_projection on CUDA with a quantized weight: product, bias, split, rotary, key and value into the cache, and the
// MLP's columns, in one kernel; with the layer norm where rows are few (cuda/quantized_few_rows.cuh), after
// layer_norm_cuda where they are many (cuda/quantized_many_rows.cuh).
//
// Not measured yet: no GPU was at hand.
#include "core/dispatch.h"
#include "cuda/quantized_many_rows.cuh"
#include "ops/qkv_projection_epilogue.cuh"

namespace alula {

void qkv_projection_quantized_cuda(const QkvProjectionArgs& args, const QkvPlaces& places, const QuantizedPlan& plan,
                                   const QuantizedWork& work, const CudaStream& stream) {
  dispatch_dtype(args.gemm.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch_quantized<T>(
        plan.is_few ? "qkv_projection: quantized_few_rows_kernel" : "qkv_projection: quantized_many_rows_kernel",
        args.gemm, plan, work, QkvEpilogue<T>{args, places}, stream);
  });
}

}  // namespace alula
