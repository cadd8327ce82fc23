// Single values of a quantized weight (cpu/weight_format.h) in fp32, four neighbours of K at a time: for the embedding
// and for dequantize_weight. Rounded as on the CPU: code times scale is exact or rounded once, and so is the sum.
#pragma once

#include "cpu/panel_gemm_args.h"
#include "cuda/codes.cuh"

namespace alula {

struct QuantizedRows {
  const uint8_t* weight;
  WeightKind kind;
  int64_t panel_bytes;
  int group_size, group_bytes, header_bytes;  // groups: of 4-bit codes
};

inline QuantizedRows quantized_rows(WeightFormat f, const void* weight, int64_t k) {
  const bool has_groups = has_4bit_codes(f.kind);
  return {static_cast<const uint8_t*>(weight),
          f.kind,
          panel_bytes(f, k),
          has_groups ? f.group_size : 4,
          has_groups ? static_cast<int>(group_bytes(f)) : 0,
          static_cast<int>(header_bytes(f.kind))};
}

// k 4 * step .. 4 * step + 3 of row `row`.
__device__ __forceinline__ void dequantize_step(float (&v)[4], const QuantizedRows& q, int64_t row, int step) {
  const uint8_t* panel = q.weight + row / kPanelRows * q.panel_bytes;
  const int lane = static_cast<int>(row % kPanelRows);
  if (q.kind == WeightKind::kInt8) {
    const float scale = reinterpret_cast<const float*>(panel)[lane];
    const auto* words = reinterpret_cast<const uint32_t*>(panel + q.header_bytes + step * kStepBytes8);
    const Quad<float> quad = quad_of_bytes<float>(words[lane]);
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = quad.values[i] * scale;
    return;
  }
  const int k = 4 * step;
  const uint8_t* group = panel + static_cast<int64_t>(k / q.group_size) * q.group_bytes;
  const auto* words = reinterpret_cast<const uint32_t*>(group + q.header_bytes + k % q.group_size / 4 * kStepBytes4);
  const auto* scales = reinterpret_cast<const f16*>(group);
  const float scale = to_float(scales[lane]);
  const bool has_least = q.kind == WeightKind::kInt4Asymmetric;
  Quad<float> low, high;
  if (q.kind == WeightKind::kNf4) {
    quads_of_nf4<float>(low, high, words[lane % 16]);
  } else {
    quads_of_nibbles<float>(low, high, words[lane % 16], has_least ? 0.0f : 8.0f, 0);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = (lane < 16 ? low : high).values[i] * scale;
  if (has_least) {
    const float least = to_float(scales[kPanelRows + lane]);
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] += least;
  }
}

}  // namespace alula
