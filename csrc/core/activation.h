// The activations, by the code that alula.ops's ACTIVATIONS gives them. What each one means stands in
// python/alula/activations.py, in the same order; csrc/cpu/activation.h and csrc/cuda/activation.cuh compute them.
#pragma once

namespace alula {

enum class Activation : int {
  kNone,
  kGeluTanh,
  kGelu,
  kRelu,
  kSilu,
  kTanh,
  kGelu10,
  kHardswish,
  kLaplace,
  kLeakyRelu,
  kMish,
  kQuickGelu,
  kRelu2,
  kRelu6,
  kSigmoid,
  kSqrtSoftplus,  // the last
};

constexpr int kNumActivations = static_cast<int>(Activation::kSqrtSoftplus) + 1;

}  // namespace alula
