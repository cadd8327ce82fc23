// The product with a quantized weight (weight_format.h), in one of two ways:
//
//   8-bit activations  Each row of X, normed if asked, is rounded per block of K (a weight's group; 256 for int8) to
//                      integers -127..127 of its largest magnitude / 127, then multiplied in integers
//                      (quantized_tile.h). A block that holds NaN or infinity gets the scale NaN, so its row is NaN.
//   full activations   The panel is widened to fp32, a block of K at a time, and multiplied as a dense one (tile.h).
//
// Who owns what is as in panel_gemm.h: a thread has a range of panels and of row blocks; per panel the sums C
// [rows][32] stay in the cache. 4-bit codes are unpacked in registers where one row block reads them, and to bytes in
// the first-level cache where several do.
#include "cpu/quantized_gemm.h"

#include "cpu/panel_gemm.h"
#include "cpu/quantized_tile.h"

namespace alula::ALULA_ISA {
namespace {

constexpr int64_t kFullBlock = kBlockSteps<float>;  // of K widened at once: 24 KiB
static_assert(kFullBlock % 64 == 0, "a block begins with a group, or in the middle of one of 128");
// Below this a magnitude counts as zero: its inverse would not be a number.
constexpr float kTiny = 0x1p-100f;

ALULA_INLINE int64_t num_activation_blocks(int64_t k) { return (k + kActivationBlock - 1) / kActivationBlock; }
ALULA_INLINE int64_t group_of(WeightFormat f) { return f.group_size ? f.group_size : kActivationBlock; }

// --- activations -----------------------------------------------------------------------------------------------------

ALULA_INLINE void store_quantized(int8_t* out, const float* values, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = static_cast<int8_t>(static_cast<int32_t>(values[i]));
}
// Widened, (k0, k2, k1, k3) in each step.
ALULA_INLINE void store_quantized(int16_t* out, const float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += 4) {
    out[i] = static_cast<int16_t>(static_cast<int32_t>(values[i]));
    out[i + 1] = static_cast<int16_t>(static_cast<int32_t>(values[i + 2]));
    out[i + 2] = static_cast<int16_t>(static_cast<int32_t>(values[i + 1]));
    out[i + 3] = static_cast<int16_t>(static_cast<int32_t>(values[i + 3]));
  }
}

// `group` values (a multiple of 32) to integers: out, scale and sum. `unit` is the value of a weight's code of 1.
ALULA_INLINE void quantize_group(float* values, int64_t group, float unit, Activation8* out, float* scale,
                                 int32_t* sum) {
  Vec largest = zero(), poison = zero();
  for (int64_t i = 0; i < group; i += Vec::kWidth) {
    const Vec x = load(values + i);
    largest = max(abs(x), largest);
    poison = fma(x, zero(), poison);  // NaN from NaN and infinity
  }
  const float magnitude = reduce_max(largest);
  const float bad = reduce_add(poison);
  const bool is_number = bad == 0.0f;
  const Vec inverse = broadcast(is_number && magnitude > kTiny ? 127.0f / magnitude : 0.0f);
  Vec total = zero();
  if (!is_number) {
    for (int64_t i = 0; i < group; i++) values[i] = 0.0f;
  }
  for (int64_t i = 0; i < group; i += Vec::kWidth) {
    const Vec q = round(load(values + i) * inverse);
    total = total + q;  // exact: below 2^24
    store(values + i, q);
  }
  store_quantized(out, values, group);
  *scale = is_number ? (magnitude > kTiny ? magnitude / 127.0f * unit : 0.0f) : NAN;
  *sum = static_cast<int32_t>(reduce_add(total));
}

template <typename W>
void quantize_x_row(const PanelGemmArgs& args, int64_t index, uint8_t* a, int rows) {
  const W* x = static_cast<const W*>(args.x) + index * args.k;
  const W* weight = static_cast<const W*>(args.norm_weight);
  const W* bias = static_cast<const W*>(args.norm_bias);
  Moments moments{};
  if (weight) moments = moments_of(args.k, args.norm_eps, [x](int64_t i, int n) { return load(x + i, n); });
  const int64_t group = group_of(args.format);
  const float unit = args.format.kind == WeightKind::kNf4 ? 1.0f / 127.0f : 1.0f;

  for (int64_t begin = 0; begin < args.k; begin += kActivationBlock) {
    alignas(64) float values[kActivationBlock];
    auto& out = *reinterpret_cast<ActivationBlock*>(a);
    for (int64_t i = 0; i < kActivationBlock; i += Vec::kWidth) {
      const int64_t left = args.k - begin - i;
      const int n = static_cast<int>(left < 0 ? 0 : left < Vec::kWidth ? left : Vec::kWidth);
      Vec value = n == Vec::kWidth ? load(x + begin + i) : load(x + begin + i, n);
      if (weight) {
        const W* w = weight + begin + i;
        const W* b = bias ? bias + begin + i : nullptr;
        if (n == Vec::kWidth) {
          value = normalize(value, moments, load(w), b ? load(b) : zero());
        } else {
          value = first(normalize(value, moments, load(w, n), b ? load(b, n) : zero()), n);
        }
      }
      store(values + i, value);
    }
    for (int64_t i = 0, g = 0; i < kActivationBlock; i += group, g++) {
      quantize_group(values + i, group, unit, out.k + i, &out.scale[g], &out.sum[g]);
    }
    a += rows * kActivationStride;
  }
}

template <typename W>
void quantize_rows_of(const PanelGemmArgs& args, int64_t first, int64_t last, void* packed) {
  const int64_t row_bytes = quantized_row_bytes(args);
  for (int64_t block = first; block < last; block++) {
    const int64_t begin = block * kRows;
    const int rows = static_cast<int>(args.m - begin < kRows ? args.m - begin : kRows);
    uint8_t* a = static_cast<uint8_t*>(packed) + (begin - first * kRows) * row_bytes;
    for (int row = 0; row < rows; row++) quantize_x_row<W>(args, begin + row, a + row * kActivationStride, rows);
  }
}

// --- panels ----------------------------------------------------------------------------------------------------------

// Block `block` of 256 k of a panel, as it lies in memory.
ALULA_INLINE PanelBlock block_of(WeightFormat f, const uint8_t* panel, int64_t k, int64_t block) {
  const int64_t rest =
      k - block * kActivationBlock < kActivationBlock ? k - block * kActivationBlock : kActivationBlock;
  if (f.kind == WeightKind::kInt8) {
    const uint8_t* codes = panel + header_bytes(f.kind) + block * (kActivationBlock / 4) * kStepBytes8;
    return {codes, 0, panel, 0, nullptr, 128, 1, static_cast<int>((rest + 3) / 4)};
  }
  const int64_t stride = group_bytes(f);
  const uint8_t* first = panel + block * (kActivationBlock / f.group_size) * stride;
  const bool has_least = f.kind == WeightKind::kInt4Asymmetric;
  const int32_t zero = f.kind == WeightKind::kInt4 ? 8 : f.kind == WeightKind::kNf4 ? 128 : 0;
  const int groups = static_cast<int>((rest + f.group_size - 1) / f.group_size);
  return {first + header_bytes(f.kind),
          stride,
          first,
          stride,
          has_least ? first + kHalfScalesBytes : nullptr,
          zero,
          groups,
          f.group_size / 4};
}

// 4-bit codes to bytes, as int8 has them, group after group.
template <typename Source>
ALULA_INLINE void unpack_codes(const PanelBlock& b, uint8_t* out) {
  for (int group = 0; group < b.groups; group++) {
    const uint8_t* codes = b.codes + group * b.codes_stride;
    prefetch(b.scales + group * b.scales_stride + kPrefetchAhead);
    for (int s = 0; s < b.steps; s++) {
      prefetch(codes + kPrefetchAhead);
      for (int v = 0; v < kPanel / Vec::kWidth; v++) {
        store_bytes(out + v * int64_t{sizeof(Bytes)}, Source::load(codes, v));
      }
      codes += Source::kStep;
      out += kStepBytes8;
    }
  }
}

// Steps [0, steps) of one group to fp32 [4 * steps][32].
template <typename Source, typename ToFloat>
ALULA_INLINE void widen(const uint8_t* codes, int64_t steps, float* out, const ToFloat& to_float) {
  for (int64_t s = 0; s < steps; s++) {
    for (int64_t line = 0; line < Source::kStep; line += 64) prefetch(codes + kPrefetchAhead + line);
#pragma GCC unroll 8
    for (int v = 0; v < kPanel / Vec::kWidth; v++) {
      const Bytes bytes = Source::load(codes, v);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) store(out + j * kPanel + v * Vec::kWidth, to_float(bytes, j, v));
    }
    codes += Source::kStep;
    out += 4 * kPanel;
  }
}

// k [begin, begin + count) of a panel to fp32 [count rounded up to 4][32]; begin is a multiple of 64.
void widen_panel(WeightFormat f, const uint8_t* panel, int64_t begin, int64_t count, float* out) {
  constexpr int kVecs = kPanel / Vec::kWidth;
  Vec scale[kVecs], least[kVecs];
  if (f.kind == WeightKind::kInt8) {
    for (int v = 0; v < kVecs; v++) scale[v] = load(reinterpret_cast<const float*>(panel) + v * Vec::kWidth);
    const Vec zero_code = broadcast(128.0f);
    widen<BytesRowScale>(panel + header_bytes(f.kind) + begin / 4 * kStepBytes8, (count + 3) / 4, out,
                         [&](Bytes bytes, int j, int v) { return (byte_as_float(bytes, j) - zero_code) * scale[v]; });
    return;
  }
  for (int64_t k = begin; k < begin + count;) {
    const int64_t in_group = k % f.group_size;
    const int64_t left = begin + count - k;
    const int64_t run = f.group_size - in_group < left ? f.group_size - in_group : left;
    const uint8_t* group = panel + k / f.group_size * group_bytes(f);
    const uint8_t* codes = group + header_bytes(f.kind) + in_group / 4 * kStepBytes4;
    const auto* scales = reinterpret_cast<const f16*>(group);
    for (int v = 0; v < kVecs; v++) scale[v] = load(scales + v * Vec::kWidth);
    float* to = out + (k - begin) * kPanel;
    const int64_t steps = (run + 3) / 4;
    if (f.kind == WeightKind::kInt4) {
      const Vec zero_code = broadcast(8.0f);
      widen<Nibbles>(codes, steps, to,
                     [&](Bytes bytes, int j, int v) { return (byte_as_float(bytes, j) - zero_code) * scale[v]; });
    } else if (f.kind == WeightKind::kInt4Asymmetric) {
      for (int v = 0; v < kVecs; v++) least[v] = load(scales + kPanel + v * Vec::kWidth);
      widen<Nibbles>(codes, steps, to,
                     [&](Bytes bytes, int j, int v) { return fma(byte_as_float(bytes, j), scale[v], least[v]); });
    } else {
      widen<Nibbles>(codes, steps, to,
                     [&](Bytes bytes, int j, int v) { return byte_in_table(kNf4, bytes, j) * scale[v]; });
    }
    k += run;
  }
}

// The rows of blocks [first_block, last_block).
ALULA_INLINE int64_t rows_in(const PanelGemmArgs& args, int64_t first_block, int64_t last_block) {
  const int64_t end = last_block * kRows;
  return (end < args.m ? end : args.m) - first_block * kRows;
}

void multiply_quantized_activations(const PanelGemmArgs& args, const uint8_t* packed, int64_t first_panel,
                                    int64_t last_panel, int64_t first_block, int64_t last_block,
                                    PanelEpilogue epilogue) {
  const WeightFormat f = args.format;
  const int64_t bytes = panel_bytes(f, args.k), row_bytes = quantized_row_bytes(args);
  const int64_t blocks = num_activation_blocks(args.k), count = rows_in(args, first_block, last_block);
  const bool several = count > kRows;  // row blocks that read a block of the panel
  const bool unpack = has_4bit_codes(f.kind) && several;
  alignas(64) float c[kMaxRowsAtOnce * kPanel];
  alignas(64) uint8_t unpacked[kActivationBlock * kPanel];

  for (int64_t panel = first_panel; panel < last_panel; panel++) {
    const uint8_t* weight = static_cast<const uint8_t*>(args.weight) + panel * bytes;
    std::memset(c, 0, static_cast<size_t>(count) * kPanel * sizeof(float));
    for (int64_t block = 0; block < blocks; block++) {
      PanelBlock b = block_of(f, weight, args.k, block);
      if (unpack) {
        if (f.kind == WeightKind::kNf4) {
          unpack_codes<TableNibbles>(b, unpacked);
        } else {
          unpack_codes<Nibbles>(b, unpacked);
        }
        b.codes = unpacked;
        b.codes_stride = b.steps * kStepBytes8;
      }
      for (int64_t row = 0; row < count; row += kRows) {
        const int rows = static_cast<int>(count - row < kRows ? count - row : kRows);
        const uint8_t* a = packed + row * row_bytes + block * rows * kActivationStride;
        QuantizedTile tile;
        if (f.kind == WeightKind::kInt8) {
          tile = !several   ? quantized_tile_for<BytesRowScale, Stream::kOnce>(rows)
                 : row == 0 ? quantized_tile_for<BytesRowScale, Stream::kFirst>(rows)
                            : quantized_tile_for<BytesRowScale, Stream::kCached>(rows);
        } else if (unpack) {
          tile = quantized_tile_for<BytesGroupScale, Stream::kCached>(rows);
        } else if (f.kind == WeightKind::kNf4) {
          tile = quantized_tile_for<TableNibbles, Stream::kOnce>(rows);
        } else {
          tile = quantized_tile_for<Nibbles, Stream::kOnce>(rows);
        }
        tile(a, b, c + row * kPanel);
      }
    }
    epilogue.write(epilogue.context, first_block * kRows, panel, count, c);
  }
}

void multiply_full_activations(const PanelGemmArgs& args, const float* packed, int64_t first_panel, int64_t last_panel,
                               int64_t first_block, int64_t last_block, PanelEpilogue epilogue) {
  const int64_t bytes = panel_bytes(args.format, args.k);
  const int64_t row_count = rows_in(args, first_block, last_block);
  alignas(64) float c[kMaxRowsAtOnce * kPanel];
  alignas(64) float widened[kFullBlock * kPanel];
  for (int64_t panel = first_panel; panel < last_panel; panel++) {
    const uint8_t* weight = static_cast<const uint8_t*>(args.weight) + panel * bytes;
    std::memset(c, 0, static_cast<size_t>(row_count) * kPanel * sizeof(float));
    for (int64_t k = 0; k < args.k; k += kFullBlock) {
      const int64_t count = args.k - k < kFullBlock ? args.k - k : kFullBlock;
      widen_panel(args.format, weight, k, count, widened);
      for (int64_t row = 0; row < row_count; row += kRows) {
        const int rows = static_cast<int>(row_count - row < kRows ? row_count - row : kRows);
        const float* a = block_of_a<float>(packed, row, row_count, args.k, k / kFullBlock);
        const bool is_last = row + rows >= row_count;
        const float* next_a =
            block_of_a<float>(packed, is_last ? 0 : row + rows, row_count, args.k, k / kFullBlock + is_last);
        tile_for<float>(rows)(a, widened, count, c + row * kPanel, {next_a, next_a, 0});
      }
    }
    epilogue.write(epilogue.context, first_block * kRows, panel, row_count, c);
  }
}

}  // namespace

int64_t quantized_row_bytes(const PanelGemmArgs& args) {
  if (args.format.full_activations) return packed_row_size<float>(args.k) * static_cast<int64_t>(sizeof(float));
  return num_activation_blocks(args.k) * kActivationStride;
}

void pack_quantized_rows(const PanelGemmArgs& args, int64_t first, int64_t last, void* packed) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using W = typename decltype(tag)::Type;
    if (args.format.full_activations) {
      pack_rows_of<W, float>(args, first, last, packed);
    } else {
      quantize_rows_of<W>(args, first, last, packed);
    }
  });
}

void multiply_quantized_panels(const PanelGemmArgs& args, const void* packed, int64_t first_panel, int64_t last_panel,
                               int64_t first_block, int64_t last_block, PanelEpilogue epilogue) {
  if (args.format.full_activations) {
    return multiply_full_activations(args, static_cast<const float*>(packed), first_panel, last_panel, first_block,
                                     last_block, epilogue);
  }
  multiply_quantized_activations(args, static_cast<const uint8_t*>(packed), first_panel, last_panel, first_block,
                                 last_block, epilogue);
}

void dequantize_row(WeightFormat f, const void* weight, int64_t row, int64_t k, int64_t begin, int64_t count,
                    float* out) {
  const uint8_t* panel = static_cast<const uint8_t*>(weight) + row / kPanel * panel_bytes(f, k);
  const int64_t lane = row % kPanel;
  if (f.kind == WeightKind::kInt8) {
    const float scale = reinterpret_cast<const float*>(panel)[lane];
    const uint8_t* codes = panel + header_bytes(f.kind) + lane * 4;
    for (int64_t i = 0; i < count; i++) {
      const int64_t at = begin + i;
      out[i] = static_cast<float>(codes[at / 4 * kStepBytes8 + at % 4] - 128) * scale;
    }
    return;
  }
  const int shift = lane < 16 ? 0 : 4;
  for (int64_t i = 0; i < count; i++) {
    const int64_t at = begin + i, in_group = at % f.group_size;
    const uint8_t* group = panel + at / f.group_size * group_bytes(f);
    const auto* scales = reinterpret_cast<const f16*>(group);
    const uint8_t byte = group[header_bytes(f.kind) + in_group / 4 * kStepBytes4 + lane % 16 * 4 + at % 4];
    const int code = byte >> shift & 15;
    const float scale = to_float(scales[lane]);
    if (f.kind == WeightKind::kInt4Asymmetric) {
      out[i] = static_cast<float>(code) * scale + to_float(scales[kPanel + lane]);
    } else {
      out[i] = (f.kind == WeightKind::kNf4 ? kNf4[code] : static_cast<float>(code - 8)) * scale;
    }
  }
}

}  // namespace alula::ALULA_ISA
