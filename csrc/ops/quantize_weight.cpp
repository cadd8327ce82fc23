// quantize_weight, dequantize_weight: a plain weight [N, K] to and from a quantized panel order (cpu/weight_format.h).
//
// Done once, at load or when a folder is written; portable code, so that the bytes do not depend on the instruction
// set, on threads, or on the device: a weight on CUDA is quantized on the CPU and its bytes go back. Scales are rounded
// to their storage type first and codes are chosen for the rounded scale.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/cuda.h"
#include "core/refuse_grad.h"
#include "core/tensor.h"
#include "cpu/panel_gemm_args.h"
#include "cpu/panel_gemm_parallel.h"
#include "cpu/parallel.h"
#include "cpu/weight_memory.h"
#include "ops/quantize_group.h"
#include "ops/quantize_weight.h"

namespace alula {
namespace {

// Any strides of the plain side, so that a transposed (Conv1D) checkpoint tensor is read from its view.
struct PlainWeight {
  const void* data;
  DType dtype;
  int64_t n, k, row_stride, column_stride;

  float at(int64_t row, int64_t column) const {
    const int64_t i = row * row_stride + column * column_stride;
    switch (dtype) {
      case DType::kBFloat16:
        return static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(data)[i]);
      case DType::kFloat16:
        return static_cast<float>(static_cast<const torch::headeronly::Half*>(data)[i]);
      case DType::kFloat32:
        break;
    }
    return static_cast<const float*>(data)[i];
  }
};

float half_value(uint16_t bits) {
  return static_cast<float>(torch::headeronly::Half(bits, torch::headeronly::Half::from_bits()));
}

// To the nearest integer, ties to even, of x clamped to [low, high]; far below 2^22.
float nearest_within(float x, float low, float high) {
  const float y = x < low ? low : x > high ? high : x;
  return (y + 0x1.8p23f) - 0x1.8p23f;
}

// Row `row` of the weight into its lane of `panel`. False where it holds a value that the format has no room for.
bool quantize_row(WeightFormat f, const PlainWeight& weight, int64_t row, uint8_t* panel, std::vector<float>& values) {
  const int64_t k = weight.k, lane = row % kPanelRows;
  bool fits = true;
  for (int64_t i = 0; i < k; i++) {
    values[static_cast<size_t>(i)] = weight.at(row, i);
    fits = fits && std::isfinite(values[static_cast<size_t>(i)]);
  }
  if (!fits) return false;
  if (f.kind == WeightKind::kInt8) {
    float magnitude = 0.0f;
    for (const float x : values) magnitude = std::fabs(x) > magnitude ? std::fabs(x) : magnitude;
    const float scale = magnitude / 127.0f;
    reinterpret_cast<float*>(panel)[lane] = scale;
    uint8_t* codes = panel + header_bytes(f.kind) + lane * 4;
    for (int64_t i = 0; i < (k + 3) / 4 * 4; i++) {
      const float x = i < k && scale > 0.0f ? values[static_cast<size_t>(i)] / scale : 0.0f;
      codes[i / 4 * kStepBytes8 + i % 4] = static_cast<uint8_t>(nearest_within(x, -127.0f, 127.0f) + 128.0f);
    }
    return true;
  }
  for (int64_t begin = 0; begin < k; begin += f.group_size) {
    QuantizedGroup quantized;
    uint8_t* group = panel + begin / f.group_size * group_bytes(f);
    const int64_t count = k - begin < f.group_size ? k - begin : f.group_size;
    if (!quantize_group(f.kind, values.data() + begin, count, f.group_size, quantized)) return false;
    store_group(f, quantized, lane, group);
  }
  return true;
}

// Value [row][k] of a quantized weight: csrc/cpu/weight_format.h read literally.
float dequantized(WeightFormat f, const uint8_t* panel, int64_t lane, int64_t k) {
  if (f.kind == WeightKind::kInt8) {
    const uint8_t code = panel[header_bytes(f.kind) + k / 4 * kStepBytes8 + lane * 4 + k % 4];
    return reinterpret_cast<const float*>(panel)[lane] * static_cast<float>(code - 128);
  }
  const uint8_t* group = panel + k / f.group_size * group_bytes(f);
  const auto* scales = reinterpret_cast<const uint16_t*>(group);
  const uint8_t byte = group[header_bytes(f.kind) + k % f.group_size / 4 * kStepBytes4 + lane % 16 * 4 + k % 4];
  const int code = lane < 16 ? byte & 15 : byte >> 4;
  const float scale = half_value(scales[lane]);
  switch (f.kind) {
    case WeightKind::kInt4:
      return scale * static_cast<float>(code - 8);
    case WeightKind::kInt4Asymmetric:
      return scale * static_cast<float>(code) + half_value(scales[kPanelRows + lane]);
    default:
      return scale * kNf4[code];
  }
}

// The panels to a contiguous [N, K] of T.
template <typename T>
void dequantize_panels(WeightFormat f, const uint8_t* packed, int64_t n, int64_t k, T* weight) {
  const int64_t bytes = panel_bytes(f, k);
  parallel_ranges(num_panels(n), 1, [&](int64_t first, int64_t last) {
    const int64_t end = last * kPanelRows < n ? last * kPanelRows : n;
    for (int64_t row = first * kPanelRows; row < end; row++) {
      const uint8_t* panel = packed + row / kPanelRows * bytes;
      for (int64_t i = 0; i < k; i++) weight[row * k + i] = T(dequantized(f, panel, row % kPanelRows, i));
    }
  });
}

}  // namespace

void store_group(WeightFormat f, const QuantizedGroup& quantized, int64_t lane, uint8_t* group) {
  auto* scales = reinterpret_cast<uint16_t*>(group);
  scales[lane] = quantized.scale;
  if (f.kind == WeightKind::kInt4Asymmetric) scales[kPanelRows + lane] = quantized.least;
  uint8_t* steps = group + header_bytes(f.kind);
  for (int64_t i = 0; i < f.group_size; i++) {
    uint8_t& byte = steps[i / 4 * kStepBytes4 + lane % 16 * 4 + i % 4];
    byte = lane < 16 ? static_cast<uint8_t>((byte & 0xf0) | quantized.codes[i])
                     : static_cast<uint8_t>((byte & 0x0f) | quantized.codes[i] << 4);
  }
}

Tensor quantize_weight(const Tensor& weight, int64_t format_code) {
  const Place place = place_of(weight, "weight");
  if (place.is_cuda()) {
    Tensor here = new_tensor(weight.sizes(), weight.scalar_type(), Place{});
    torch::stable::copy_(here, weight);
    const Tensor packed = quantize_weight(here, format_code);
    Tensor there = new_tensor(packed.sizes(), ScalarType::Byte, place);
    torch::stable::copy_(there, packed);
    return there;
  }
  ALULA_CHECK(weight.dim() == 2, "weight has shape ", shape_of(weight), "; expected [out_features, in_features]");
  const WeightFormat f = checked_format(format_code);
  ALULA_CHECK(f.kind != WeightKind::kDense, "format is 0 (dense); alula::pack_weight packs dense weights");
  const PlainWeight plain = {weight.const_data_ptr(), value_dtype(weight, "weight"),
                             weight.size(0),          weight.size(1),
                             weight.stride(0),        weight.stride(1)};
  const int64_t bytes = panel_bytes(f, plain.k);
  Tensor packed = new_weight_tensor({num_panels(plain.n), bytes}, ScalarType::Byte);
  auto* panels = static_cast<uint8_t*>(packed.mutable_data_ptr());
  std::atomic<int64_t> bad_row{-1};
  parallel_ranges(num_panels(plain.n), 1, [&](int64_t first, int64_t last) {
    std::vector<float> values(static_cast<size_t>(plain.k));
    for (int64_t panel = first; panel < last; panel++) {
      uint8_t* out = panels + panel * bytes;
      std::memset(out, 0, static_cast<size_t>(bytes));
      for (int64_t row = panel * kPanelRows; row < plain.n && row < (panel + 1) * kPanelRows; row++) {
        if (!quantize_row(f, plain, row, out, values)) bad_row = row;
      }
    }
  });
  ALULA_CHECK(bad_row < 0, "row ", bad_row.load(), " of the weight holds NaN, an infinity, or values too large for ",
              kind_name(f.kind), ", whose scales are ", f.kind == WeightKind::kInt8 ? "fp32" : "fp16",
              "; it cannot be quantized");
  return packed;
}

Tensor dequantize_weight(const Tensor& packed, int64_t out_features, int64_t in_features, int64_t format_code,
                         ScalarType dtype) {
  const WeightFormat f = checked_format(format_code);
  ALULA_CHECK(f.kind != WeightKind::kDense, "format is 0 (dense); alula::unpack_weight unpacks dense weights");
  const Place place = place_of(packed, "packed");
  check_quantized_weight(packed, f, out_features, in_features, place);
  const bool known = dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  ALULA_CHECK(known, "dtype is ", name_of(dtype), "; accepted: float32, bfloat16, float16");
  Tensor weight = new_tensor({out_features, in_features}, dtype, place);
  if (place.is_cuda()) {
    const CudaScope scope(packed);
    [[maybe_unused]] const DequantizeArgs args = {
        f, packed.const_data_ptr(), out_features, in_features, value_dtype(weight, "weight"), weight.mutable_data_ptr(),
    };
    ALULA_CUDA_CALL(dequantize_weight_cuda(args, scope.stream()));
    return weight;
  }
  const auto* panels = static_cast<const uint8_t*>(packed.const_data_ptr());
  void* out = weight.mutable_data_ptr();
  if (dtype == ScalarType::BFloat16) {
    dequantize_panels(f, panels, out_features, in_features, static_cast<torch::headeronly::BFloat16*>(out));
  } else if (dtype == ScalarType::Half) {
    dequantize_panels(f, panels, out_features, in_features, static_cast<torch::headeronly::Half*>(out));
  } else {
    dequantize_panels(f, panels, out_features, in_features, static_cast<float*>(out));
  }
  return weight;
}

STABLE_TORCH_LIBRARY_IMPL(alula, CPU, m) {
  m.impl("quantize_weight", ALULA_BOX(quantize_weight));
  m.impl("dequantize_weight", ALULA_BOX(dequantize_weight));
}

STABLE_TORCH_LIBRARY_IMPL(alula, CUDA, m) {
  m.impl("quantize_weight", ALULA_BOX(quantize_weight));
  m.impl("dequantize_weight", ALULA_BOX(dequantize_weight));
}

}  // namespace alula
