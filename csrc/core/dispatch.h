// From a value known at run time to a constant known to the compiler.
#pragma once

#include "core/types.h"

namespace alula {

template <typename T>
struct TypeTag {
  using Type = T;
};

// Calls f(TypeTag<float | bf16 | f16>{}). Inlined always, so that no copy of it is shared between instruction sets.
template <typename F>
inline __attribute__((always_inline)) auto dispatch_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(TypeTag<bf16>{});
    case DType::kFloat16:
      return f(TypeTag<f16>{});
    case DType::kFloat32:
      break;
  }
  return f(TypeTag<float>{});
}

}  // namespace alula
