// qkv_projection on the CPU: the epilogue of cpu/panel_gemm.h that knows where each column of the product lives.
//
// D is a multiple of 8 and a panel has 32 columns, so a run of gcd(D, 32) columns lies in one head of one of q, k, v.
#include "ops/qkv_projection.h"

#include "cpu/activation.h"
#include "cpu/panel_gemm.h"
#include "cpu/rotate.h"

namespace alula::ALULA_ISA {
namespace {

// Where `column` of row `row` goes; null for the key and value of padding.
template <typename W>
W* destination(const QkvProjectionArgs& args, int64_t row, int64_t column) {
  const int64_t d = args.head_dim;
  if (column < args.num_heads * d) return static_cast<W*>(args.q) + row * args.num_heads * d + column;
  const int32_t position = args.positions[row];
  if (position < 0) return nullptr;
  const int64_t head = (column - args.num_heads * d) / d;  // of the G key heads, then the G value heads
  const bool is_value = head >= args.num_kv_heads;
  const int64_t group = is_value ? head - args.num_kv_heads : head;
  return static_cast<W*>(args.kv_cache) + row / args.tokens * args.kv_strides[0] + group * args.kv_strides[1] +
         position * args.kv_strides[2] + (is_value ? d : 0) + column % d;
}

// Turns the q and k values among `count` values of one head, whose first is value `d` of that head.
ALULA_INLINE void rotate_run(const QkvProjectionArgs& args, int64_t row, int64_t d, float* values, int64_t count) {
  if (d >= args.rotary_dim) return;
  const float* cosine = args.rotary_table + args.rotary_positions[row] * args.rotary_dim + d / 2;
  const int64_t turned = args.rotary_dim - d < count ? args.rotary_dim - d : count;
  rotate_interleaved(values, cosine, cosine + args.rotary_dim / 2, turned);
}

template <typename W>
ALULA_INLINE void write_run(W* out, const float* values, int64_t count) {
  for (int64_t j = 0; j < count; j += Vec::kWidth) {
    const int lanes = static_cast<int>(count - j < Vec::kWidth ? count - j : Vec::kWidth);
    if (lanes == Vec::kWidth) {
      store(out + j, load(values + j));
    } else {
      store(out + j, load(values + j, lanes), lanes);
    }
  }
}

template <typename W>
void write_rows(const QkvProjectionArgs& args, int64_t row, int64_t panel, int64_t rows, const float* c) {
  const W* bias = static_cast<const W*>(args.gemm.bias);
  const int64_t d = args.head_dim;
  const int64_t lowest_bit = d & -d;
  const int64_t run = lowest_bit < kPanel ? lowest_bit : kPanel;
  const int64_t turned_columns = args.rotary_table ? (args.num_heads + args.num_kv_heads) * d : 0;  // q and k
  const int64_t qkv_columns = (args.num_heads + 2 * args.num_kv_heads) * d;
  const int64_t left = args.gemm.n - panel * kPanel;
  const int64_t columns = left < kPanel ? left : kPanel;
  for (int64_t i = 0; i < rows; i++) {
    alignas(64) float values[kPanel];
    for_each_column(bias, args.gemm.n, panel, c + i * kPanel,
                    [&](int64_t column, int, Vec value) { store(values + column - panel * kPanel, value); });
    int64_t first = 0;
    for (; first < columns && panel * kPanel + first < qkv_columns; first += run) {
      const int64_t column = panel * kPanel + first;
      W* out = destination<W>(args, row + i, column);
      if (out == nullptr) continue;
      if (column < turned_columns) rotate_run(args, row + i, column % d, values + first, run);
      write_run(out, values + first, run);
    }
    if (first < columns) {
      const int64_t column = panel * kPanel + first - qkv_columns;
      activate(args.mlp_activation, values + first, columns - first);
      write_run(static_cast<W*>(args.mlp) + (row + i) * args.mlp_stride + column, values + first, columns - first);
    }
  }
}

void multiply(const QkvProjectionArgs& args, const void* packed, int64_t first_panel, int64_t last_panel,
              int64_t first_block, int64_t last_block) {
  dispatch_dtype(args.gemm.dtype, [&](auto tag) {
    using W = typename decltype(tag)::Type;
    multiply_weight<W>(
        args.gemm, packed, first_panel, last_panel, first_block, last_block,
        [&](int64_t row, int64_t panel, int64_t rows, const float* c) { write_rows<W>(args, row, panel, rows, c); });
  });
}

}  // namespace

const QkvProjectionKernels kQkvProjection = {kPanelGemm, multiply};

}  // namespace alula::ALULA_ISA
