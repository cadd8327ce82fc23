// ALULA_BOX: TORCH_BOX of an op without a backward. Where gradients are enabled and one of its tensors requires one,
// the op throws: torch would only warn, in a backward that leaves the gradient out.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>
#include <optional>
#include <vector>

#include "core/tensor.h"

namespace alula {

// The stable interface does not say whether a tensor requires grad. Its alias tells: autograd has a node for the alias,
// which then is no leaf, iff the source requires grad. 1 us a tensor, and only where gradients are enabled.
inline bool requires_grad(const Tensor& t) {
  std::array<StableIValue, 1> stack = {torch::stable::detail::from(t)};
  TORCH_ERROR_CODE_CHECK(aoti_torch_call_dispatcher("aten::alias", "", stack.data()));
  TORCH_ERROR_CODE_CHECK(aoti_torch_call_dispatcher("aten::is_leaf", "", stack.data()));
  return !torch::stable::detail::to<bool>(stack[0]);
}

template <typename T>
void refuse_grad(const T&) {}

inline void refuse_grad(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Half) return;
  ALULA_CHECK(
      !requires_grad(t),
      "alula has no backward yet: an input requires grad. Call under torch.no_grad() or torch.inference_mode(), "
      "or detach() the input");
}

inline void refuse_grad(const OptionalTensor& t) {
  if (t) refuse_grad(*t);
}

inline void refuse_grad(const std::vector<Tensor>& list) {
  for (const Tensor& t : list) refuse_grad(t);
}

template <auto kOp>
struct WithoutGrad;

template <typename Result, typename... Parameters, Result (*kOp)(Parameters...)>
struct WithoutGrad<kOp> {
  static Result call(Parameters... parameters) {
    if (aoti_torch_grad_mode_is_enabled()) [[unlikely]]
      (refuse_grad(parameters), ...);
    return kOp(static_cast<Parameters&&>(parameters)...);
  }
};

}  // namespace alula

#define ALULA_BOX(op) TORCH_BOX(&::alula::WithoutGrad<op>::call)
