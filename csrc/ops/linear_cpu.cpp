// linear on the CPU: the epilogue of cpu/panel_gemm.h that adds bias, applies the activation and adds the residual.
#include "ops/linear.h"

#include "cpu/activated_rows.h"
#include "cpu/panel_gemm.h"

namespace alula::ALULA_ISA {
namespace {

template <typename W>
void multiply_as(const LinearArgs& args, const void* packed, int64_t first_panel, int64_t last_panel,
                 int64_t first_block, int64_t last_block) {
  const auto writer = activated_writer<W>(args.activation);
  const int64_t n = args.gemm.n;
  const auto* bias = static_cast<const W*>(args.gemm.bias);
  const auto* residual = static_cast<const W*>(args.residual);
  multiply_weight<W>(args.gemm, packed, first_panel, last_panel, first_block, last_block,
                     [&](int64_t row, int64_t panel, int64_t rows, const float* c) {
                       const int64_t column = panel * kPanel, at = row * n + column;
                       writer({.rows = rows,
                               .columns = n - column < kPanel ? n - column : kPanel,
                               .sums = c,
                               .bias = bias ? bias + column : nullptr,
                               .activation = args.activation,
                               .residual = residual ? residual + at : nullptr,
                               .out = static_cast<W*>(args.out) + at,
                               .stride = n});
                     });
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
