// The activations on the CPU: of a register where it is known at compile time, any one over values in memory.
#pragma once

#include "core/activation.h"
#include "cpu/vec_math.h"

namespace alula::ALULA_ISA {

template <Activation kActivation>
ALULA_INLINE Vec activate(Vec x) {
  switch (kActivation) {
    case Activation::kNone:
      return x;
    case Activation::kGeluTanh:
      return gelu_tanh(x);
    case Activation::kGelu:
      return gelu(x);
    case Activation::kRelu:
      return relu(x);
    case Activation::kSilu:
      return silu(x);
    case Activation::kTanh:
      return tanh(x);
    case Activation::kGelu10:
      return min(broadcast(10.0f), gelu(x));  // gelu is above -10 anyway
    case Activation::kHardswish:
      return x * (relu6(x + broadcast(3.0f)) * broadcast(1.0f / 6.0f));
    case Activation::kLaplace:
      return laplace(x);
    case Activation::kLeakyRelu:
      return select_less(x, zero(), x * broadcast(0.01f), x);
    case Activation::kMish:
      return mish(x);
    case Activation::kQuickGelu:
      return x * sigmoid(broadcast(1.702f) * x);
    case Activation::kRelu2:
      return relu(x) * relu(x);
    case Activation::kRelu6:
      return relu6(x);
    case Activation::kSigmoid:
      return sigmoid(x);
    case Activation::kSqrtSoftplus:
      return sqrt_softplus(x);
  }
}

// The same, with the same bits, for one known at run time, over `count` values in place: activation_cpu.cpp.
void activate(int activation, float* values, int64_t count);

}  // namespace alula::ALULA_ISA
