// What the ops ask of torch's tensors, and the checks that many of them share. Used by <op>.cpp files only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/types.h"
#include "cpu/large.h"

namespace alula {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); i++) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline std::string name_of(ScalarType type) { return torch::headeronly::toString(type); }

// The dtype of a tensor of values: float32, bfloat16 or float16.
inline DType value_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(name, " has dtype ", name_of(t.scalar_type()), "; accepted: float32, bfloat16, float16");
  }
}

inline MaskKind mask_kind_of(const Tensor& mask) {
  switch (mask.scalar_type()) {
    case ScalarType::Bool:
      return MaskKind::kBool;
    case ScalarType::Float:
      return MaskKind::kFloat32;
    case ScalarType::BFloat16:
      return MaskKind::kBFloat16;
    case ScalarType::Half:
      return MaskKind::kFloat16;
    default:
      fail("mask has dtype ", name_of(mask.scalar_type()),
           "; accepted: bool (true = visible), or float32, bfloat16, float16 (added to the scores)");
  }
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType expected, const char* like) {
  ALULA_CHECK(t.scalar_type() == expected, name, " has dtype ", name_of(t.scalar_type()), "; ", like, " asks for ",
              name_of(expected));
}

inline void check_cpu(const Tensor& t, const char* name) {
  ALULA_CHECK(t.is_cpu(), name,
              " is on another device; this op has CPU tensors, so all of its tensors must be on the CPU");
}

// Of shape `expected`, where -1 stands for any size.
inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> expected,
                        const char* meaning) {
  bool fits = t.dim() == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (const int64_t size : expected) {
    fits = fits && (size == -1 || t.size(i) == size);
    i++;
  }
  if (fits) [[likely]]
    return;
  std::string text;
  for (const int64_t size : expected) text += (text.empty() ? "" : ", ") + (size == -1 ? "any" : std::to_string(size));
  fail(name, " has shape ", shape_of(t), "; expected ", meaning, " = [", text, "]");
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline OptionalTensor as_contiguous(const OptionalTensor& t) { return t ? OptionalTensor(as_contiguous(*t)) : t; }

inline const void* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// A vector that goes with the features of `like`: [size], same dtype, on the CPU, contiguous on return.
inline OptionalTensor feature_vector(const OptionalTensor& t, const char* name, int64_t size, const Tensor& like,
                                     const char* like_name) {
  if (!t) return t;
  check_cpu(*t, name);
  check_shape(*t, name, {size}, "[features]");
  check_dtype(*t, name, like.scalar_type(), like_name);
  return as_contiguous(t);
}

// For a result that may be larger than the caches (cpu/large.h).
inline Tensor new_large_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor t = torch::stable::empty(sizes, dtype);
  const int64_t bytes = t.numel() * t.element_size();
  if (is_beyond_caches(bytes)) ask_for_large_pages(t.mutable_data_ptr(), bytes);
  return t;
}

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype);
}

}  // namespace alula
