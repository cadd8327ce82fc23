// The activations, by the code that alula.ops's ACTIVATIONS gives them, in fp32.
#pragma once

#include "cuda/hardware.cuh"

namespace alula {

enum class Activation : int { kNone = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3, kSilu = 4, kTanh = 5 };

// 1 / (1 + exp(-x)): exp overflows to inf where the result is 0.
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kGeluTanh: {
      // x/2 (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): no cancellation for negative x. Far on
      // that side x sigmoid would be -inf * 0.
      const float twice = x * (1.59576912160573f + 0.0713548162726f * x * x);
      return twice < -104.0f ? -0.0f : x * sigmoid(twice);
    }
    case Activation::kGelu:
      return x < -14.5f ? -0.0f : 0.5f * x * erfcf(-0.70710678118654752f * x);
    case Activation::kRelu:
      return x < 0.0f ? 0.0f : x;  // NaN stays
    case Activation::kSilu:
      return x < -104.0f ? -0.0f : x * sigmoid(x);
    case Activation::kTanh:
      return tanhf(x);
  }
  return x;
}

}  // namespace alula
