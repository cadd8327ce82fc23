// The product that linear and qkv_projection share: plain data, seen by the torch side and by every instruction set.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/weight_format.h"

namespace alula {

// X [M, K] times W^T, W [N, K] packed in panels of 32 rows, K-major (tile.h):
//   fp32, f16   [ceil(N/32)][K][32]
//   bf16        [ceil(N/32)][ceil(K/2)][32][2]
// Panels are padded with zero rows, pairs with a zero. Quantized: cpu/weight_format.h, for X of any dtype.
struct PanelGemmArgs {
  DType dtype;              // of every tensor here; of all but the weight where that is quantized
  const void* x;            // [M, K], rows contiguous
  const void* weight;       // packed
  const void* bias;         // [N], may be null
  const void* norm_weight;  // [K], null: no layer norm before the product
  const void* norm_bias;    // [K], may be null
  float norm_eps;
  int64_t m, n, k;
  WeightFormat format = {};  // dense
};

constexpr int64_t kPanelRows = 32;       // rows of W in a panel
constexpr int64_t kMaxRowsAtOnce = 768;  // rows of X of one pass over the weight: bounds what is packed, and sums

inline int64_t num_panels(int64_t n) { return (n + kPanelRows - 1) / kPanelRows; }

// What a thread does. Rows are counted in blocks of rows_per_block, which depends on the instruction set.
struct PanelGemmKernels {
  int rows_per_block;
  // Bytes of a row of X packed; block b starts at b * rows_per_block times that.
  int64_t (*packed_row_bytes)(const PanelGemmArgs& args);
  // Layer norm, conversion and packing of blocks [first, last) of X, from the start of `packed` on.
  void (*pack_rows)(const PanelGemmArgs& args, int64_t first, int64_t last, void* packed);
};

}  // namespace alula
