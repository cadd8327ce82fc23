// Packed-weight product with a fused leading layer norm and any epilogue: the body of linear and qkv_projection.
//
// A thread owns a range of panels (32 columns of the output each) and a range of row blocks, kMaxRowsAtOnce rows at
// most. Per panel:
//   zero the sums C [rows][32] (on the stack, in the second-level cache)
//   for each block of K that keeps the panel's part in the first-level cache (kBlockBytes of tile.h)
//     for each block of rows: tile (tile.h)
//   hand C to the epilogue, all of K summed
// So a weight comes from memory once per call, in address order, and partial sums never leave the cache.
// The first tile of each block asks for the weights kPrefetchAhead bytes early: one row runs at memory speed, many rows
// wait little.
#pragma once

#include "core/dispatch.h"
#include "cpu/norm.h"
#include "cpu/panel_gemm_args.h"
#include "cpu/quantized_gemm.h"
#include "cpu/tile.h"

namespace alula::ALULA_ISA {

// A packed row of X: its blocks of K, each kRowStride units, one block of K after the other for all rows of a row
// block: [row block][block of K][rows][kRowStride].
template <typename W>
constexpr int64_t num_blocks_of_k(int64_t k) {
  const int64_t steps = (k + Operand<W>::kStep - 1) / Operand<W>::kStep;
  return (steps + kBlockSteps<W> - 1) / kBlockSteps<W>;
}
template <typename W>
constexpr int64_t packed_row_size(int64_t k) {
  return num_blocks_of_k<W>(k) * kRowStride<W>;
}

// Row `index` of X, normed if asked, to `a`, a row of a packed block of `rows` rows. Values beyond K, up to whole
// steps, are zero. X has the dtype W and is packed to meet a weight of dtype As.
template <typename W, typename As>
inline void pack_x_row(const PanelGemmArgs& args, int64_t index, float* a, int rows) {
  constexpr int64_t kBlock = kBlockSteps<As> * Operand<As>::kStep;  // values
  const W* x = static_cast<const W*>(args.x) + index * args.k;
  const W* weight = static_cast<const W*>(args.norm_weight);
  const W* bias = static_cast<const W*>(args.norm_bias);
  Moments moments{};
  if (weight) moments = moments_of(args.k, args.norm_eps, [x](int64_t i, int n) { return load(x + i, n); });

  for (int64_t begin = 0; begin < args.k; begin += kBlock) {
    auto* out = reinterpret_cast<typename Operand<As>::Value*>(a);
    const int64_t count = args.k - begin < kBlock ? args.k - begin : kBlock;
    for (int64_t i = 0; i < count; i += Vec::kWidth) {  // whole registers: the line after a block has room for the last
      const int n = static_cast<int>(count - i < Vec::kWidth ? count - i : Vec::kWidth);
      Vec value = load(x + begin + i, n);
      if (weight) {
        value = normalize(value, moments, load(weight + begin + i, n), bias ? load(bias + begin + i, n) : zero());
        if (n < Vec::kWidth) value = first(value, n);
      }
      if constexpr (Operand<As>::kStep == 2 && Operand<As>::kUnits == 2) value = round_to_bf16(value);
      store(out + i, value);
    }
    a += rows * kRowStride<As>;
  }
}

template <typename W, typename As = W>
void pack_rows_of(const PanelGemmArgs& args, int64_t first, int64_t last, void* packed) {
  const int64_t row_size = packed_row_size<As>(args.k);
  for (int64_t block = first; block < last; block++) {
    const int64_t begin = block * kRows;
    const int rows = static_cast<int>(args.m - begin < kRows ? args.m - begin : kRows);
    float* a = static_cast<float*>(packed) + (begin - first * kRows) * row_size;
    for (int row = 0; row < rows; row++) pack_x_row<W, As>(args, begin + row, a + row * kRowStride<As>, rows);
  }
}

// Block `block` of K of the row block that begins at row `row` of `count` packed ones.
template <typename W>
ALULA_INLINE const float* block_of_a(const void* packed, int64_t row, int64_t count, int64_t k, int64_t block) {
  const int64_t rows = count - row < kRows ? count - row : kRows;
  return static_cast<const float*>(packed) + row * packed_row_size<W>(k) + block * rows * kRowStride<W>;
}

// Panels [first_panel, last_panel) for the rows of blocks [first_block, last_block), at most kMaxRowsAtOnce of them, as
// pack_rows leaves them at `packed`. epilogue(row, panel, rows, c): rows of X from `row` on, their sums in c
// [rows][32].
template <typename W, typename Epilogue>
void multiply_panels(const PanelGemmArgs& args, const void* packed, int64_t first_panel, int64_t last_panel,
                     int64_t first_block, int64_t last_block, const Epilogue& epilogue) {
  constexpr int kPair = Operand<W>::kStep;
  const int64_t steps = (args.k + kPair - 1) / kPair;
  const int64_t first_row = first_block * kRows;
  const int64_t last_row = last_block * kRows < args.m ? last_block * kRows : args.m;
  const int64_t count = last_row - first_row;
  const int64_t tiles = last_block - first_block;
  const int64_t fetch_step = (kPair * kPanel * static_cast<int64_t>(sizeof(W)) + tiles - 1) / tiles;
  alignas(64) float c[kMaxRowsAtOnce * kPanel];

  for (int64_t panel = first_panel; panel < last_panel; panel++) {
    const W* b = static_cast<const W*>(args.weight) + panel * steps * kPair * kPanel;
    std::memset(c, 0, static_cast<size_t>(count) * kPanel * sizeof(float));
    for (int64_t step = 0; step < steps; step += kBlockSteps<W>) {
      const int64_t block = steps - step < kBlockSteps<W> ? steps - step : kBlockSteps<W>;
      const char* next_b = reinterpret_cast<const char*>(b + (step + block) * kPair * kPanel);
      for (int64_t row = 0; row < count; row += kRows) {
        const int rows = static_cast<int>(count - row < kRows ? count - row : kRows);
        const float* a = block_of_a<W>(packed, row, count, args.k, step / kBlockSteps<W>);
        const bool is_last = row + kRows >= count;
        const TileFetch fetch = {
            block_of_a<W>(packed, is_last ? 0 : row + kRows, count, args.k, step / kBlockSteps<W> + is_last),
            next_b + row / kRows * block * fetch_step, fetch_step};
        // The first rows bring the panel's block from memory, the others find it in the cache.
        const auto multiply = row != 0         ? tile_for<W>(rows)
                              : count <= kRows ? tile_for<W, Stream::kOnce>(rows)
                                               : tile_for<W, Stream::kFirst>(rows);
        multiply(a, b + step * kPair * kPanel, block, c + row * kPanel, fetch);
      }
    }
    epilogue(first_row, panel, count, c);
  }
}

inline int64_t packed_row_bytes(const PanelGemmArgs& args) {
  if (args.format.kind != WeightKind::kDense) return quantized_row_bytes(args);
  return dispatch_dtype(args.dtype, [&](auto tag) {
    return packed_row_size<typename decltype(tag)::Type>(args.k) * static_cast<int64_t>(sizeof(float));
  });
}

inline void pack_rows(const PanelGemmArgs& args, int64_t first, int64_t last, void* packed) {
  if (args.format.kind != WeightKind::kDense) return pack_quantized_rows(args, first, last, packed);
  dispatch_dtype(args.dtype, [&](auto tag) { pack_rows_of<typename decltype(tag)::Type>(args, first, last, packed); });
}

// multiply_panels for a weight of either kind.
template <typename W, typename Epilogue>
void multiply_weight(const PanelGemmArgs& args, const void* packed, int64_t first_panel, int64_t last_panel,
                     int64_t first_block, int64_t last_block, const Epilogue& epilogue) {
  if (args.format.kind == WeightKind::kDense) {
    return multiply_panels<W>(args, packed, first_panel, last_panel, first_block, last_block, epilogue);
  }
  const auto write = [](const void* context, int64_t row, int64_t panel, int64_t rows, const float* c) {
    (*static_cast<const Epilogue*>(context))(row, panel, rows, c);
  };
  multiply_quantized_panels(args, packed, first_panel, last_panel, first_block, last_block, {write, &epilogue});
}

constexpr PanelGemmKernels kPanelGemm = {kRows, packed_row_bytes, pack_rows};

}  // namespace alula::ALULA_ISA
