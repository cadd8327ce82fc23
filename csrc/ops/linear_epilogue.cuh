// What follows the product of linear on CUDA: bias, activation and residual, of some neighbouring features at a time.
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

  // Features [feature, + N) of a row; of two, the second may be one too many.
  template <int N>
  __device__ __forceinline__ void operator()(int64_t row, int feature, float (&y)[N]) const {
    const int64_t at = row * n + feature;
    const int count = N == 2 && feature + 1 == n ? 1 : N;
    if (bias != nullptr) add<N>(y, bias + feature, count);
    activate_all(activation, y);
    if (residual != nullptr) add<N>(y, residual + at, count);
    if (N > 2 || n % 2 == 0) {
      store_pack(out + at, y);
    } else {
      for (int i = 0; i < count; i++) out[at + i] = from_float<T>(y[i]);
    }
  }

  template <int N>
  static __device__ __forceinline__ void add(float (&y)[N], const T* from, int count) {
    float x[N] = {};
    if constexpr (N > 2) {
      load_pack(x, from);
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) x[i] = i < count ? to_float(from[i]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < N; i++) y[i] += x[i];
  }

  // Whether it may be called with packs of 16 bytes.
  bool takes_packs() const {
    return n % kPackSize<T> == 0 && is_aligned_16(bias) && is_aligned_16(residual) && is_aligned_16(out);
  }
};

template <typename T>
LinearEpilogue<T> epilogue_of(const LinearArgs& args) {
  return {static_cast<const T*>(args.gemm.bias), static_cast<const T*>(args.residual), static_cast<T*>(args.out),
          static_cast<int>(args.gemm.n), static_cast<Activation>(args.activation)};
}

}  // namespace alula
