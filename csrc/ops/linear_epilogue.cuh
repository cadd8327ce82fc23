// What follows the product of linear on CUDA: bias, activation and residual, two neighbouring features at a time.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/vec.cuh"
#include "ops/linear.h"

namespace alula {

template <typename T>
struct LinearEpilogue {
  const T* bias;      // [N], may be null
  const T* residual;  // [M, N], may be null
  T* out;             // [M, N], aligned to a pair
  int n;
  Activation activation;

  __device__ __forceinline__ float one(int64_t at, int feature, float y) const {
    if (bias != nullptr) y += to_float(bias[feature]);
    y = activate(activation, y);
    if (residual != nullptr) y += to_float(residual[at]);
    return y;
  }

  __device__ __forceinline__ void operator()(int64_t row, int feature, float y0, float y1) const {
    const int64_t at = row * n + feature;
    const float y[2] = {one(at, feature, y0), feature + 1 < n ? one(at + 1, feature + 1, y1) : 0.0f};
    if (n % 2 == 0) {
      store_pack(out + at, y);
    } else {
      out[at] = from_float<T>(y[0]);
      if (feature + 1 < n) out[at + 1] = from_float<T>(y[1]);
    }
  }
};

template <typename T>
LinearEpilogue<T> epilogue_of(const LinearArgs& args) {
  return {static_cast<const T*>(args.gemm.bias), static_cast<const T*>(args.residual), static_cast<T*>(args.out),
          static_cast<int>(args.gemm.n), static_cast<Activation>(args.activation)};
}

}  // namespace alula
