// The activations, by the code that alula.ops's ACTIVATIONS gives them.
#pragma once

#include "cpu/vec_math.h"

namespace alula::ALULA_ISA {

enum class Activation : int { kNone = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3, kSilu = 4, kTanh = 5 };

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
  }
}

// The same for an activation known at run time, over `count` values in place.
inline void activate(int activation, float* values, int64_t count) {
  const auto each = [&](auto f) {
    for (int64_t i = 0; i < count; i += Vec::kWidth) {
      const int lanes = static_cast<int>(count - i < Vec::kWidth ? count - i : Vec::kWidth);
      store(values + i, f(load(values + i, lanes)), lanes);
    }
  };
  switch (static_cast<Activation>(activation)) {
    case Activation::kNone:
      return;
    case Activation::kGeluTanh:
      return each(activate<Activation::kGeluTanh>);
    case Activation::kGelu:
      return each(activate<Activation::kGelu>);
    case Activation::kRelu:
      return each(activate<Activation::kRelu>);
    case Activation::kSilu:
      return each(activate<Activation::kSilu>);
    case Activation::kTanh:
      return each(activate<Activation::kTanh>);
  }
}

}  // namespace alula::ALULA_ISA
