// linear on the CPU: the epilogue of cpu/panel_gemm.h that adds bias, applies the activation and adds the residual.
#include "ops/linear.h"

#include "cpu/activation.h"
#include "cpu/panel_gemm.h"

namespace alula::ALULA_ISA {
namespace {

template <typename W, Activation kActivation>
void write_rows(const LinearArgs& args, int64_t row, int64_t panel, int64_t rows, const float* c) {
  const int64_t n = args.gemm.n;
  const W* bias = static_cast<const W*>(args.gemm.bias);
  for (int64_t i = 0; i < rows; i++) {
    W* out = static_cast<W*>(args.out) + (row + i) * n;
    const W* residual = args.residual ? static_cast<const W*>(args.residual) + (row + i) * n : nullptr;
    for_each_column(bias, n, panel, c + i * kPanel, [&](int64_t column, int lanes, Vec value) {
      value = activate<kActivation>(value);
      if (lanes == Vec::kWidth) {
        if (residual) value = value + load(residual + column);
        store(out + column, value);
      } else {
        if (residual) value = value + load(residual + column, lanes);
        store(out + column, value, lanes);
      }
    });
  }
}

template <typename W>
void multiply_as(const LinearArgs& args, const void* packed, int64_t first_panel, int64_t last_panel,
                 int64_t first_block, int64_t last_block) {
  using Writer = void (*)(const LinearArgs&, int64_t, int64_t, int64_t, const float*);
  static constexpr Writer kWriters[] = {
      write_rows<W, Activation::kNone>, write_rows<W, Activation::kGeluTanh>, write_rows<W, Activation::kGelu>,
      write_rows<W, Activation::kRelu>, write_rows<W, Activation::kSilu>,     write_rows<W, Activation::kTanh>,
  };
  const Writer write = kWriters[args.activation];
  multiply_weight<W>(
      args.gemm, packed, first_panel, last_panel, first_block, last_block,
      [&](int64_t row, int64_t panel, int64_t rows, const float* c) { write(args, row, panel, rows, c); });
}

void multiply(const LinearArgs& args, const void* packed, int64_t first_panel, int64_t last_panel, int64_t first_block,
              int64_t last_block) {
  dispatch_dtype(args.gemm.dtype, [&](auto tag) {
    multiply_as<typename decltype(tag)::Type>(args, packed, first_panel, last_panel, first_block, last_block);
  });
}

}  // namespace

const LinearKernels kLinear = {kPanelGemm, multiply};

}  // namespace alula::ALULA_ISA
