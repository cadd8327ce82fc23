// linear on CUDA: y = activation(layer_norm(x) W^T + bias) + residual.
//
//   up to 16 rows   one kernel: cuda/few_rows.cuh with the epilogue below
//   more            layer_norm_cuda where there is a norm, the library's product, then the epilogue as a kernel over
//                   it, in place (ops/linear.cpp)
//
// Not measured yet: no GPU was at hand.
#include "ops/linear.h"

#include "core/dispatch.h"
#include "cuda/activation.cuh"
#include "cuda/few_rows.cuh"

namespace alula {
namespace {

template <typename T>
struct LinearEpilogue {
  const T* bias;      // [N], may be null
  const T* residual;  // [M, N], may be null
  T* out;             // [M, N]
  int n;
  Activation activation;

  __device__ __forceinline__ void one(int64_t row, int feature, float y) const {
    if (bias != nullptr) y += to_float(bias[feature]);
    y = activate(activation, y);
    const int64_t at = row * n + feature;
    if (residual != nullptr) y += to_float(residual[at]);
    out[at] = from_float<T>(y);
  }

  __device__ __forceinline__ void operator()(int64_t row, int feature, float y0, float y1) const {
    one(row, feature, y0);
    if (feature + 1 < n) one(row, feature + 1, y1);
  }
};

template <typename T>
LinearEpilogue<T> epilogue_of(const LinearArgs& args) {
  return {static_cast<const T*>(args.gemm.bias), static_cast<const T*>(args.residual), static_cast<T*>(args.out),
          static_cast<int>(args.gemm.n), static_cast<Activation>(args.activation)};
}

}  // namespace

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
