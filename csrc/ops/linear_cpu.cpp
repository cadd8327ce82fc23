// linear on the CPU: the epilogue of cpu/panel_gemm.h that adds bias, applies the activation and adds the residual.
#include "ops/linear.h"

#include "cpu/activation.h"
#include "cpu/panel_gemm.h"

namespace alula::ALULA_ISA {
namespace {

// The first activations of the table, which models use, have a writer each: from sums to the result in registers.
constexpr int kNumFused = static_cast<int>(Activation::kTanh) + 1;

// A row of the result and of the residual, which may be null.
template <typename W>
struct Row {
  W* out;
  const W* residual;

  Row(const LinearArgs& args, int64_t row)
      : out(static_cast<W*>(args.out) + row * args.gemm.n),
        residual(args.residual ? static_cast<const W*>(args.residual) + row * args.gemm.n : nullptr) {}

  ALULA_INLINE void write(int64_t column, int lanes, Vec value) const {
    if (lanes == Vec::kWidth) {
      if (residual) value = value + load(residual + column);
      store(out + column, value);
    } else {
      if (residual) value = value + load(residual + column, lanes);
      store(out + column, value, lanes);
    }
  }
};

template <typename W, Activation kActivation>
void write_rows(const LinearArgs& args, int64_t row, int64_t panel, int64_t rows, const float* c) {
  const int64_t n = args.gemm.n;
  const W* bias = static_cast<const W*>(args.gemm.bias);
  for (int64_t i = 0; i < rows; i++) {
    const Row<W> to(args, row + i);
    for_each_column(bias, n, panel, c + i * kPanel, [&](int64_t column, int lanes, Vec value) {
      to.write(column, lanes, activate<kActivation>(value));
    });
  }
}

// The same for any other, through memory: its arithmetic is compiled once (cpu/activation_cpu.cpp), not for each dtype.
template <typename W>
void write_rows_of_any(const LinearArgs& args, int64_t row, int64_t panel, int64_t rows, const float* c) {
  const int64_t n = args.gemm.n, first = panel * kPanel;
  const W* bias = static_cast<const W*>(args.gemm.bias);
  alignas(64) float values[kPanel];
  for (int64_t i = 0; i < rows; i++) {
    for_each_column(bias, n, panel, c + i * kPanel,
                    [&](int64_t column, int, Vec value) { store(values + column - first, value); });
    activate(args.activation, values, n - first < kPanel ? n - first : kPanel);
    const Row<W> to(args, row + i);
    for_each_column<W>(nullptr, n, panel, values,
                       [&](int64_t column, int lanes, Vec value) { to.write(column, lanes, value); });
  }
}

template <typename W>
void multiply_as(const LinearArgs& args, const void* packed, int64_t first_panel, int64_t last_panel,
                 int64_t first_block, int64_t last_block) {
  using Writer = void (*)(const LinearArgs&, int64_t, int64_t, int64_t, const float*);
  static constexpr Writer kFused[kNumFused] = {
      write_rows<W, Activation::kNone>, write_rows<W, Activation::kGeluTanh>, write_rows<W, Activation::kGelu>,
      write_rows<W, Activation::kRelu>, write_rows<W, Activation::kSilu>,     write_rows<W, Activation::kTanh>,
  };
  const Writer writer = args.activation < kNumFused ? kFused[args.activation] : write_rows_of_any<W>;
  multiply_weight<W>(
      args.gemm, packed, first_panel, last_panel, first_block, last_block,
      [&](int64_t row, int64_t panel, int64_t rows, const float* c) { writer(args, row, panel, rows, c); });
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
