// quantize_columns: one group of a weight's columns to 4-bit codes, column after column, each one's rounding error made
// up for by the columns that follow (Frantar et al. 2022, GPTQ, algorithm 1).
//
//   scale (and least value) of a row: those quantize_group chooses for the group's values, before anything is moved
//   for column i:  code = nearest(w[i]);  error[i] = (w[i] - value(code)) / factor[i][i]
//                  w[j] -= error[i] * factor[i][j]  for the columns j > i of the group
//
// The caller does the same for the columns beyond the group, with one matrix product. `factor` is the group's block of
// the upper triangular U with U^T U = H^-1, H the second moment of the inputs. A panel of 32 rows is one thread's; rows
// are independent, and lie side by side in registers. Done once, at load; portable code.
#include <torch/headeronly/util/Half.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "core/refuse_grad.h"
#include "core/tensor.h"
#include "cpu/panel_gemm_args.h"
#include "cpu/panel_gemm_parallel.h"
#include "cpu/parallel.h"
#include "ops/nearest_levels.h"
#include "ops/quantize_group.h"
#include "ops/quantize_weight.h"

namespace alula {
namespace {

constexpr int64_t kChunks = kPanelRows / kLanes;

struct Columns {
  const float* weight;  // [n, count]
  const float* factor;  // [count, count], upper triangular
  int64_t n, count;
  WeightFormat format;
  uint8_t* packed;  // [ceil(n/32)][group_bytes]
  float* errors;    // [n, count]
};

// Of 32 rows: chunk c has rows 4 c to 4 c + 3.
struct PanelRows {
  Lanes values[kMostGroup][kChunks];
  Lanes scale[kChunks], least[kChunks], inverse[kChunks];
  QuantizedGroup groups[kPanelRows];
};

float half_value(uint16_t bits) {
  return static_cast<float>(torch::headeronly::Half(bits, torch::headeronly::Half::from_bits()));
}

// Values and scales. The first row with a value that the format has no room for, or -1.
int64_t take_rows(const Columns& args, int64_t first, int64_t rows, PanelRows& panel) {
  panel = PanelRows();
  for (int64_t r = 0; r < rows; r++) {
    const float* w = args.weight + (first + r) * args.count;
    bool is_finite = true;
    for (int64_t i = 0; i < args.count; i++) {
      is_finite = is_finite && std::isfinite(w[i]);
      panel.values[i][r / kLanes][r % kLanes] = w[i];
    }
    QuantizedGroup& group = panel.groups[r];
    if (!is_finite || !quantize_group(args.format.kind, w, args.count, args.format.group_size, group)) return first + r;
    const float scale = half_value(group.scale);
    panel.scale[r / kLanes][r % kLanes] = scale;
    panel.least[r / kLanes][r % kLanes] = half_value(group.least);
    panel.inverse[r / kLanes][r % kLanes] = scale == 0.0f ? 0.0f : 1.0f / scale;
  }
  return -1;
}

// Codes of all columns, and the errors that they leave.
template <WeightKind kKind>
void choose_codes(const Columns& args, int64_t first, int64_t rows, PanelRows& panel) {
  for (int64_t i = 0; i < args.count; i++) {
    const float* factor = args.factor + i * args.count;
    Lanes errors[kChunks];
    for (int64_t c = 0; c < kChunks; c++) {
      const Lanes w = panel.values[i][c];
      const Levels levels = nearest_levels<kKind>((w - panel.least[c]) * panel.inverse[c]);
      errors[c] = (w - (levels.values * panel.scale[c] + panel.least[c])) / factor[i];
      for (int64_t r = c * kLanes; r < (c + 1) * kLanes && r < rows; r++) {
        panel.groups[r].codes[i] = static_cast<uint8_t>(levels.codes[r % kLanes]);
        args.errors[(first + r) * args.count + i] = errors[c][r % kLanes];
      }
    }
    for (int64_t j = i + 1; j < args.count; j++) {
      for (int64_t c = 0; c < kChunks; c++) panel.values[j][c] -= errors[c] * factor[j];
    }
  }
}

int64_t quantize_panel(const Columns& args, int64_t index, PanelRows& panel) {
  const int64_t first = index * kPanelRows, rows = args.n - first < kPanelRows ? args.n - first : kPanelRows;
  const int64_t bad_row = take_rows(args, first, rows, panel);
  if (bad_row >= 0) return bad_row;
  switch (args.format.kind) {
    case WeightKind::kInt4:
      choose_codes<WeightKind::kInt4>(args, first, rows, panel);
      break;
    case WeightKind::kInt4Asymmetric:
      choose_codes<WeightKind::kInt4Asymmetric>(args, first, rows, panel);
      break;
    default:
      choose_codes<WeightKind::kNf4>(args, first, rows, panel);
  }
  uint8_t* bytes = args.packed + index * group_bytes(args.format);
  std::memset(bytes, 0, static_cast<size_t>(group_bytes(args.format)));
  for (int64_t r = 0; r < rows; r++) store_group(args.format, panel.groups[r], r, bytes);
  return -1;
}

}  // namespace

std::tuple<Tensor, Tensor> quantize_columns(const Tensor& weight, const Tensor& factor, int64_t format_code) {
  check_cpu(weight, "weight");
  check_cpu(factor, "factor");
  const WeightFormat f = checked_format(format_code);
  ALULA_CHECK(has_4bit_codes(f.kind), "format is ", kind_name(f.kind), "; accepted: int4, int4_asymmetric, nf4");
  check_shape(weight, "weight", {-1, -1}, "[out_features, columns]");
  check_dtype(weight, "weight", ScalarType::Float, "quantize_columns");
  check_dtype(factor, "factor", ScalarType::Float, "quantize_columns");
  const int64_t n = weight.size(0), count = weight.size(1);
  ALULA_CHECK(count >= 1 && count <= f.group_size, "weight has ", count, " columns; a group has 1 to ", f.group_size);
  check_shape(factor, "factor", {count, count}, "[columns, columns]");
  const Tensor w = as_contiguous(weight), u = as_contiguous(factor);
  const auto* diagonal = static_cast<const float*>(u.const_data_ptr());
  for (int64_t i = 0; i < count; i++) {
    const float d = diagonal[i * (count + 1)];
    ALULA_CHECK(std::isfinite(d) && d > 0.0f, "factor[", i, "][", i, "] is ", d, "; it must be positive and finite");
  }
  Tensor packed = new_tensor({num_panels(n), group_bytes(f)}, ScalarType::Byte);
  Tensor errors = new_tensor({n, count}, ScalarType::Float);
  const Columns args = {static_cast<const float*>(w.const_data_ptr()),
                        diagonal,
                        n,
                        count,
                        f,
                        static_cast<uint8_t*>(packed.mutable_data_ptr()),
                        static_cast<float*>(errors.mutable_data_ptr())};
  std::atomic<int64_t> bad_row{-1};
  parallel_ranges(num_panels(n), 1, [&](int64_t first, int64_t last) {
    std::vector<PanelRows> panel(1);
    for (int64_t index = first; index < last; index++) {
      const int64_t bad = quantize_panel(args, index, panel[0]);
      if (bad >= 0) bad_row = bad;
    }
  });
  ALULA_CHECK(bad_row < 0, "row ", bad_row.load(), " of the columns holds NaN, an infinity, or values too large for ",
              kind_name(f.kind), ", whose scales are fp16; it cannot be quantized");
  return {packed, errors};
}

STABLE_TORCH_LIBRARY_IMPL(alula, CPU, m) { m.impl("quantize_columns", ALULA_BOX(quantize_columns)); }

}  // namespace alula
