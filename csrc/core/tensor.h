// What the ops ask of torch's tensors, and the checks that many of them share. Used by <op>.cpp files only.
#pragma once

#include <torch/csrc/stable/device.h>
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

// Where an op runs: that of its first tensor.
struct Place {
  int32_t gpu = -1;  // -1: the CPU
  bool is_cuda() const { return gpu >= 0; }
};

inline Place place_of(const Tensor& t, const char* name) {
  if (t.is_cpu()) [[likely]]
    return {};
  ALULA_CHECK(t.is_cuda(), name, " is on a device that alula has no kernels for; accepted: cpu, cuda");
  return {t.get_device_index()};
}

inline void check_place(const Tensor& t, const char* name, Place place) {
  if (!place.is_cuda()) [[likely]] {
    ALULA_CHECK(t.is_cpu(), name,
                " is on another device; this op has CPU tensors, so all of its tensors must be on the CPU");
    return;
  }
  ALULA_CHECK(t.is_cuda() && t.get_device_index() == place.gpu, name,
              " is on another device; this op has tensors on cuda:", place.gpu,
              ", so all of its tensors must be there");
}

inline void check_cpu(const Tensor& t, const char* name) { check_place(t, name, {}); }

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

// What `make` gives, a call of torch that needs memory for a tensor of these sizes. Torch's stable interface says of a
// failure only that there was one: then this throws, and says how much was asked for. alula/memory.py asks again, and
// so finds out what torch's own error is.
template <typename Make>
Tensor with_memory(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, Place place, const Make& make) {
  try {
    return make();
  } catch (const std::exception& error) {
    const int64_t size = dtype == ScalarType::Double || dtype == ScalarType::Long     ? 8
                         : dtype == ScalarType::Float || dtype == ScalarType::Int     ? 4
                         : dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ? 2
                                                                                      : 1;
    int64_t bytes = size;
    for (const int64_t n : sizes) {
      if (__builtin_mul_overflow(bytes, n, &bytes)) throw;
    }
    fail("there is no memory for ", bytes, " bytes on ", place.is_cuda() ? "cuda:" + std::to_string(place.gpu) : "cpu",
         ", or torch cannot use it: it says why on standard error");
  }
}

inline Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, Place place) {
  return with_memory(sizes, dtype, place, [&] {
    if (!place.is_cuda()) [[likely]]
      return torch::stable::empty(sizes, dtype);
    const torch::stable::Device device(torch::headeronly::DeviceType::CUDA,
                                       static_cast<torch::stable::accelerator::DeviceIndex>(place.gpu));
    return torch::stable::empty(sizes, dtype, std::nullopt, device);
  });
}

inline Tensor as_contiguous(const Tensor& t) {
  if (t.is_contiguous()) [[likely]]
    return t;
  const Place place = {t.is_cuda() ? t.get_device_index() : -1};
  return with_memory(t.sizes(), t.scalar_type(), place, [&] { return torch::stable::contiguous(t); });
}

inline OptionalTensor as_contiguous(const OptionalTensor& t) { return t ? OptionalTensor(as_contiguous(*t)) : t; }

inline const void* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// A vector that goes with the features of `like`: [size], same dtype, same device, contiguous on return.
inline OptionalTensor feature_vector(const OptionalTensor& t, const char* name, int64_t size, const Tensor& like,
                                     const char* like_name) {
  if (!t) return t;
  check_place(*t, name, place_of(like, like_name));
  check_shape(*t, name, {size}, "[features]");
  check_dtype(*t, name, like.scalar_type(), like_name);
  return as_contiguous(t);
}

// For a result that may be larger than the caches (cpu/large.h).
inline Tensor new_large_tensor(const std::vector<int64_t>& sizes, ScalarType dtype, Place place = {}) {
  Tensor t = new_tensor(sizes, dtype, place);
  if (place.is_cuda()) return t;
  const int64_t bytes = t.numel() * t.element_size();
  if (is_beyond_caches(bytes)) ask_for_large_pages(t.mutable_data_ptr(), bytes);
  return t;
}

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return new_tensor(torch::headeronly::IntHeaderOnlyArrayRef(sizes), dtype, Place());
}

}  // namespace alula
