// The product with a quantized weight: the counterpart of panel_gemm.h for linear and qkv_projection. Not templated
// over the dtype of the epilogue, so that its tiles are compiled once per instruction set: quantized_gemm_cpu.cpp.
#pragma once

#include <cstdint>

#include "cpu/panel_gemm_args.h"

namespace alula::ALULA_ISA {

// write(context, row, panel, rows, c): as the epilogue of multiply_panels.
struct PanelEpilogue {
  void (*write)(const void* context, int64_t row, int64_t panel, int64_t rows, const float* c);
  const void* context;
};

// Bytes of a row of X as pack_quantized_rows leaves it.
int64_t quantized_row_bytes(const PanelGemmArgs& args);
void pack_quantized_rows(const PanelGemmArgs& args, int64_t first, int64_t last, void* packed);
// Ranges as in multiply_panels.
void multiply_quantized_panels(const PanelGemmArgs& args, const void* packed, int64_t first_panel, int64_t last_panel,
                               int64_t first_block, int64_t last_block, PanelEpilogue epilogue);

// Values [begin, begin + count) of row `row` of a weight of k columns, as fp32.
void dequantize_row(WeightFormat format, const void* weight, int64_t row, int64_t k, int64_t begin, int64_t count,
                    float* out);

}  // namespace alula::ALULA_ISA
