// The activations, by the code that alula.ops's ACTIVATIONS gives them, in fp32.
#pragma once

#include "core/activation.h"
#include "cuda/hardware.cuh"

namespace alula {

// 1 / (1 + exp(-x)): exp overflows to inf where the result is 0.
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// x times a share that is 0 long before x is -inf, where the product is NaN: as on the CPU, and in PyTorch.
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * erfcf(-0.70710678118654752f * x); }
__device__ __forceinline__ float x_sigmoid(float x, float y) { return x * sigmoid(y); }

// max(x, 0), NaN kept.
__device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; }
__device__ __forceinline__ float relu6(float x) { return x > 6.0f ? 6.0f : relu(x); }

// Those that few models use: out of line, once for all epilogues of a file, so that they cost the others no code.
__device__ inline __attribute__((noinline)) float activate_rarely(Activation activation, float x) {
  switch (activation) {
    case Activation::kGelu10:
      return x > 10.0f ? 10.0f : gelu(x);  // gelu is above -10 anyway
    case Activation::kHardswish:
      return x * (relu6(x + 3.0f) * (1.0f / 6.0f));
    case Activation::kLaplace:
      return 0.5f * erfcf((0.707107f - x) * 2.5066264243838f);  // 1 / (sqrt(2) 0.282095)
    case Activation::kLeakyRelu:
      return x < 0.0f ? 0.01f * x : x;
    case Activation::kMish: {  // as in cpu/vec_math.h
      const float e = expf(-fabsf(x)), n = e + e + (x < 0.0f ? e * e : 1.0f);
      return x * (n / (n + (x < 0.0f ? 2.0f : 2.0f * e * e)));
    }
    case Activation::kQuickGelu:
      return x_sigmoid(x, 1.702f * x);
    case Activation::kRelu2:
      return relu(x) * relu(x);
    case Activation::kRelu6:
      return relu6(x);
    case Activation::kSigmoid:
      return sigmoid(x);
    case Activation::kSqrtSoftplus:  // log(1 + e^x) is e^x to the last bit long before that is denormal
      return x < -20.0f ? expf(0.5f * x) : sqrtf((x > 0.0f ? x : 0.0f) + log1pf(expf(-fabsf(x))));
    default:
      return x;
  }
}

__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kGeluTanh:
      // x/2 (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): no cancellation for negative x.
      return x_sigmoid(x, x * (1.59576912160573f + 0.0713548162726f * x * x));
    case Activation::kGelu:
      return gelu(x);
    case Activation::kRelu:
      return relu(x);
    case Activation::kSilu:
      return x_sigmoid(x, x);
    case Activation::kTanh:
      return tanhf(x);
    default:
      return activate_rarely(activation, x);
  }
}

// Each of several values, the question which activation it is asked once.
template <int N>
__device__ __forceinline__ void activate_all(Activation activation, float (&x)[N]) {
  const auto all = [&](auto known) {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = activate(known(), x[i]);
  };
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kGeluTanh:
      return all([] { return Activation::kGeluTanh; });
    case Activation::kGelu:
      return all([] { return Activation::kGelu; });
    case Activation::kRelu:
      return all([] { return Activation::kRelu; });
    case Activation::kSilu:
      return all([] { return Activation::kSilu; });
    case Activation::kTanh:
      return all([] { return Activation::kTanh; });
    default:
#pragma unroll
      for (int i = 0; i < N; i++) x[i] = activate_rarely(activation, x[i]);
  }
}

}  // namespace alula
