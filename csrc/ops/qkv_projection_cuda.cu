// qkv_projection on CUDA: the product's features are turned and written where they belong, straight from fp32 sums.
//
//   up to 16 rows   one kernel: layer norm, product, bias, split, rotary, key and value into the cache
//                   (cuda/few_rows.cuh with ops/qkv_projection_epilogue.cuh)
//   more            layer_norm_cuda, the library's product, then the epilogue as a kernel (ops/qkv_projection.cpp)
//
// Quantized weights: ops/qkv_projection_quantized_cuda.cu.
//
// Not measured yet: no GPU was at hand.
#include "ops/qkv_projection.h"

#include "core/dispatch.h"
#include "cuda/few_rows.cuh"
#include "ops/qkv_projection_epilogue.cuh"

namespace alula {

void qkv_projection_few_rows_cuda(const QkvProjectionArgs& args, const QkvPlaces& places, const CudaStream& stream) {
  dispatch_dtype(args.gemm.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch_few_rows<T>("qkv_projection: few_rows_kernel", few_rows_params<T>(args.gemm), QkvEpilogue<T>{args, places},
                       stream);
  });
}

void qkv_projection_epilogue_cuda(const QkvProjectionArgs& args, const void* product, const QkvPlaces& places,
                                  const CudaStream& stream) {
  dispatch_dtype(args.gemm.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch_epilogue<T>("qkv_projection: epilogue_kernel", product, args.gemm.m, args.gemm.n,
                       QkvEpilogue<T>{args, places}, stream);
  });
}

}  // namespace alula
