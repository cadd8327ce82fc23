// Checks of the merged key/value cache and of what goes with it, shared by qkv_projection and attention.
#pragma once

#include "core/tensor.h"

namespace alula {

constexpr int64_t kMaxHeadDim = 256;

inline void check_heads(int64_t num_heads, int64_t num_kv_heads, int64_t head_dim) {
  ALULA_CHECK(num_heads > 0 && num_kv_heads > 0 && num_heads % num_kv_heads == 0, "num_heads ", num_heads,
              " and num_kv_heads ", num_kv_heads, " do not fit: num_kv_heads must divide num_heads");
  ALULA_CHECK(head_dim > 0 && head_dim % 8 == 0 && head_dim <= kMaxHeadDim, "head_dim is ", head_dim,
              "; accepted: multiples of 8 up to ", kMaxHeadDim);
}

// [B, G, S, 2 * D], last dimension contiguous.
inline void check_kv_cache(const Tensor& kv_cache, int64_t batch, int64_t num_kv_heads, int64_t head_dim) {
  check_cpu(kv_cache, "kv_cache");
  check_shape(kv_cache, "kv_cache", {batch, num_kv_heads, -1, 2 * head_dim}, "[B, G, S, 2 * D]");
  ALULA_CHECK(kv_cache.stride(3) == 1, "kv_cache has stride ", kv_cache.stride(3),
              " in its last dimension; it must be contiguous there");
}

// int32 [B, T], contiguous on return.
inline Tensor checked_positions(const Tensor& positions, int64_t batch, int64_t tokens) {
  check_cpu(positions, "positions");
  check_shape(positions, "positions", {batch, tokens}, "[B, T]");
  check_dtype(positions, "positions", ScalarType::Int, "an index");
  return as_contiguous(positions);
}

}  // namespace alula
