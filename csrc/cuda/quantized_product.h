// The product with a quantized weight on CUDA, as <op>.cpp prepares it. Plain data: seen by the torch side and by the
// launchers of cuda/quantized_few_rows.cuh and cuda/quantized_many_rows.cuh.
//
// The bytes are those of cpu/weight_format.h, unchanged: a step of 4 k of a panel is what the lanes of a warp hold of a
// tensor-core operand (cuda/codes.cuh). Activations stay as they are (weight-only), whatever the format's
// full_activations says, which is about the CPU.
#pragma once

#include "cpu/panel_gemm_args.h"
#include "cuda/device.h"
#include "cuda/weight_layout.h"

namespace alula {

struct QuantizedPlan {
  bool is_few;               // rows: one kernel, layer norm included; else rows are normed before
  bool is_large = false;     // many rows: the large tiles
  int splits = 1;            // few rows: blocks that share out the K of a panel
  int64_t num_counters = 0;  // zeros, which the kernel leaves zero
  int64_t workspace_floats = 0;
};

struct QuantizedWork {
  float* workspace;    // [panel][split][16][32], null with one split
  uint32_t* counters;  // [panel]
};

constexpr int64_t kFewRowsSpan8 = 64, kFewRowsSpan4 = 128;  // of K, that a warp reads at once
constexpr int64_t kManyRowsTile = 128;                      // rows of X and rows of W of a large tile

inline QuantizedPlan quantized_plan(const PanelGemmArgs& gemm, int num_multiprocessors) {
  QuantizedPlan plan = {.is_few = gemm.m <= kMaxFewRows};
  const int64_t panels = num_panels(gemm.n);
  if (!plan.is_few) {
    // Large tiles read least; where they would leave multiprocessors idle, smaller ones share out the work.
    const int64_t tiles = (gemm.m + kManyRowsTile - 1) / kManyRowsTile * ((gemm.n + kManyRowsTile - 1) / kManyRowsTile);
    plan.is_large = tiles >= num_multiprocessors && gemm.dtype != DType::kFloat32;
    return plan;
  }
  // Two blocks a multiprocessor, and for each of a block's 8 warps something to read.
  const int64_t span = has_4bit_codes(gemm.format.kind) ? kFewRowsSpan4 : kFewRowsSpan8;
  const int64_t most = gemm.k / (8 * span), room = panels == 0 ? 1 : 2 * num_multiprocessors / panels;
  const int64_t splits = room < most ? room : most;
  plan.splits = static_cast<int>(splits < 1 ? 1 : splits > 32 ? 32 : splits);
  if (plan.splits > 1) {
    plan.num_counters = panels;
    plan.workspace_floats = panels * plan.splits * kMaxFewRows * kPanelRows;
  }
  return plan;
}

}  // namespace alula
