// Checks of the merged key/value cache, of positions and of rotary tables, shared by the ops of attention.
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
inline void check_kv_cache(const Tensor& kv_cache, int64_t batch, int64_t num_kv_heads, int64_t head_dim,
                           Place place = {}) {
  check_place(kv_cache, "kv_cache", place);
  check_shape(kv_cache, "kv_cache", {batch, num_kv_heads, -1, 2 * head_dim}, "[B, G, S, 2 * D]");
  ALULA_CHECK(kv_cache.stride(3) == 1, "kv_cache has stride ", kv_cache.stride(3),
              " in its last dimension; it must be contiguous there");
}

// Of a tensor that is written to: expanded, its entries would share memory.
inline void check_own_memory(const Tensor& t, const char* name) {
  for (int64_t i = 0; i < t.dim(); i++) {
    ALULA_CHECK(t.size(i) <= 1 || t.stride(i) != 0, name, " is expanded: its dimension ", i,
                " has stride 0, so that its entries share memory; it is written to, give it memory of its own");
  }
}

// Of a tensor [B, T, width] that a kernel writes as B * T rows, one step apart.
inline void check_token_rows(const Tensor& t, const char* name) {
  const bool has_even_rows =
      t.stride(2) == 1 && (t.size(0) == 1 || t.size(1) == 0 || t.stride(0) == t.size(1) * t.stride(1));
  ALULA_CHECK(has_even_rows, name,
              " has strides that do not make one sequence of token rows; give a contiguous tensor or "
              "a range of the last dimension of one");
}

// int32 [B, T], contiguous on return.
inline Tensor checked_positions(const Tensor& positions, int64_t batch, int64_t tokens, Place place = {}) {
  check_place(positions, "positions", place);
  check_shape(positions, "positions", {batch, tokens}, "[B, T]");
  check_dtype(positions, "positions", ScalarType::Int, "an index");
  return as_contiguous(positions);
}

// fp32 [P, rotary_dim]: cosines, then sines; contiguous on return.
inline Tensor checked_rotary_table(const Tensor& table, int64_t head_dim, Place place = {}) {
  check_place(table, "rotary_table", place);
  check_dtype(table, "rotary_table", ScalarType::Float, "a table of angles");
  ALULA_CHECK(table.dim() == 2 && table.size(1) > 0 && table.size(1) % 2 == 0 && table.size(1) <= head_dim,
              "rotary_table has shape ", shape_of(table),
              "; expected [positions, rotary_dim] with an even rotary_dim of at most head_dim ", head_dim);
  return as_contiguous(table);
}

inline void check_rotary_positions(const Tensor& positions, const Tensor& table) {
  const auto* data = static_cast<const int32_t*>(positions.const_data_ptr());
  for (int64_t i = 0; i < positions.numel(); i++) {
    ALULA_CHECK(data[i] >= 0 && data[i] < table.size(0), "rotary positions hold ", data[i], "; accepted: 0 to ",
                table.size(0) - 1, ", the rows of rotary_table");
  }
}

}  // namespace alula
