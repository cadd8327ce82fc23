// linear on CUDA: y = activation(layer_norm(x) W^T + bias) + residual.
//
//   up to 16 rows   one kernel: cuda/few_rows.cuh with the epilogue of ops/linear_epilogue.cuh
//   more            layer_norm_cuda where there is a norm, the library's product, then the epilogue as a kernel over
//                   it, in place (ops/linear.cpp)
//
// Quantized weights: ops/linear_quantized_cuda.cu.
//
// Not measured yet: no GPU was at hand.
#include "ops/linear.h"

#include "core/dispatch.h"
#include "cuda/few_rows.cuh"
#include "ops/linear_epilogue.cuh"

namespace alula {

void linear_few_rows_cuda(const LinearArgs& args, const CudaStream& stream) {
  dispatch_dtype(args.gemm.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch_few_rows<T>("linear: few_rows_kernel", few_rows_params<T>(args.gemm), epilogue_of<T>(args), stream);
  });
}

void linear_epilogue_cuda(const LinearArgs& args, const CudaStream& stream) {
  dispatch_dtype(args.gemm.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch_epilogue<T>("linear: epilogue_kernel", args.out, args.gemm.m, args.gemm.n, epilogue_of<T>(args), stream);
  });
}

}  // namespace alula
