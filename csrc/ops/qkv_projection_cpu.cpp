// qkv_projection on the CPU: the epilogue of cpu/panel_gemm.h that knows where each column of the product lives.
//
// D is a multiple of 8 and a panel has 32 columns, so a run of gcd(D, 32) columns lies in one head of one of q, k, v.
#include "ops/qkv_projection.h"

#include "cpu/activated_rows.h"
#include "cpu/panel_gemm.h"
#include "cpu/rotate.h"

namespace alula::ALULA_ISA {
namespace {

// A run of columns of one head, for some rows of the product.
struct Run {
  int64_t row, rows;      // of X: the first, how many
  int64_t column, count;  // of the product
  const float* sums;      // [rows][kPanel], from `column` on
  int64_t turned_to;      // the head's values below this one are turned; 0: none
};

// Turns the q and k values among a run's of row `row`, the first of which is value `d` of the head.
ALULA_INLINE void rotate_run(const QkvProjectionArgs& args, int64_t row, int64_t d, float* values, int64_t count) {
  const float* cosine = args.rotary_table + args.rotary_positions[row] * args.rotary_dim + d / 2;
  const int64_t turned = args.rotary_dim - d < count ? args.rotary_dim - d : count;
  rotate_interleaved(values, cosine, cosine + args.rotary_dim / 2, turned);
}

// Bias, rotation and the write to `to(i)` of row i of the run; null where there is nowhere to write.
template <typename W, typename To>
ALULA_INLINE void write_run(const QkvProjectionArgs& args, const Run& run, const To& to) {
  const W* bias = args.gemm.bias ? static_cast<const W*>(args.gemm.bias) + run.column : nullptr;
  const int64_t in_head = run.column % args.head_dim;
  const bool turns = in_head < run.turned_to;
  for (int64_t i = 0; i < run.rows; i++) {
    W* out = to(i);
    if (out == nullptr) continue;
    const float* values = run.sums + i * kPanel;
    alignas(64) float turned[kPanel];
    if (turns) {
      for_each_column(bias, run.count, values, [&](int64_t j, int, Vec value) { store(turned + j, value); });
      rotate_run(args, run.row + i, in_head, turned, run.count);
      values = turned;
    }
    for_each_column<W>(turns ? nullptr : bias, run.count, values,
                       [&](int64_t j, int lanes, Vec value) { write_values<W>(out + j, nullptr, lanes, value); });
  }
}

template <typename W>
void write_queries(const QkvProjectionArgs& args, const Run& run) {
  const int64_t stride = args.num_heads * args.head_dim;
  W* out = static_cast<W*>(args.q) + run.row * stride + run.column;
  write_run<W>(args, run, [=](int64_t i) { return out + i * stride; });
}

// Keys and values to the slots of their tokens; those of padding nowhere.
template <typename W>
void write_keys_or_values(const QkvProjectionArgs& args, Run run) {
  const int64_t d = args.head_dim, end = run.row + run.rows;
  const int64_t head = run.column / d - args.num_heads;  // of the G key heads, then the G value heads
  const bool is_value = head >= args.num_kv_heads;
  const int64_t group = is_value ? head - args.num_kv_heads : head;
  W* const heads = static_cast<W*>(args.kv_cache) + group * args.kv_strides[1] + (is_value ? d : 0) + run.column % d;
  const int64_t slot_stride = args.kv_strides[2];
  while (run.row < end) {  // the rows of one of the batch at a time
    const int64_t batch = run.row / args.tokens, batch_end = (batch + 1) * args.tokens;
    W* const slots = heads + batch * args.kv_strides[0];
    const int32_t* positions = args.positions + run.row;
    run.rows = (batch_end < end ? batch_end : end) - run.row;
    write_run<W>(args, run, [=](int64_t i) { return positions[i] < 0 ? nullptr : slots + positions[i] * slot_stride; });
    run.row += run.rows;
    run.sums += run.rows * kPanel;
  }
}

template <typename W>
void write_rows(const QkvProjectionArgs& args, int64_t row, int64_t panel, int64_t rows, const float* c) {
  const int64_t d = args.head_dim;
  const int64_t lowest_bit = d & -d;
  const int64_t count = lowest_bit < kPanel ? lowest_bit : kPanel;
  const int64_t q_end = args.num_heads * d, k_end = q_end + args.num_kv_heads * d;
  const int64_t qkv_end = k_end + args.num_kv_heads * d;
  const int64_t begin = panel * kPanel, end = begin + kPanel < args.gemm.n ? begin + kPanel : args.gemm.n;
  const int64_t rotary_dim = args.rotary_table ? args.rotary_dim : 0;
  int64_t column = begin;
  for (; column < end && column < qkv_end; column += count) {
    const Run run = {row, rows, column, count, c + column - begin, column < k_end ? rotary_dim : 0};
    column < q_end ? write_queries<W>(args, run) : write_keys_or_values<W>(args, run);
  }
  if (column == end) return;
  const auto* bias = static_cast<const W*>(args.gemm.bias);
  activated_writer<W>(args.mlp_activation)({.rows = rows,
                                            .columns = end - column,
                                            .sums = c + column - begin,
                                            .bias = bias ? bias + column : nullptr,
                                            .activation = args.mlp_activation,
                                            .residual = nullptr,
                                            .out = static_cast<W*>(args.mlp) + row * args.mlp_stride + column - qkv_end,
                                            .stride = args.mlp_stride});
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
