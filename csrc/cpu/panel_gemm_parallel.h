// How a packed-weight product is spread over threads. The torch side of linear and qkv_projection.
#pragma once

#include <algorithm>

#include "core/activation.h"
#include "core/scratch.h"
#include "core/tensor.h"
#include "core/trace.h"
#include "cpu/panel_gemm_args.h"
#include "cpu/parallel.h"
#include "cuda/weight_layout.h"

namespace alula {

// Up to this many values of X every thread packs all of X for itself: cheaper than meeting at a barrier (about 3 us).
constexpr int64_t kPackAloneValues = 16 * 1024;

inline const char* kind_name(WeightKind kind) {
  constexpr const char* kNames[] = {"dense", "int8", "int4", "int4_asymmetric", "nf4"};
  return kNames[static_cast<int>(kind)];
}

// Memory for rows of X that one thread has packed; `run_panel_gemm` keeps it there.
struct PackedX;

// Most that is packed at once: of kMaxRowsAtOnce rows.
inline size_t packed_bytes(const PanelGemmArgs& args, const PanelGemmKernels& kernels) {
  return static_cast<size_t>(std::min(args.m, kMaxRowsAtOnce) * kernels.packed_row_bytes(args));
}

// In a team every member packs all of X for itself; it is for few rows.
inline bool packs_alone(const PanelGemmArgs& args) {
  return args.m * args.k <= kPackAloneValues || current_member() != nullptr;
}

// multiply(packed, first_panel, last_panel, first_block, last_block) on every thread's share. `op` is for the trace.
//
// Rows come in equal shares of at most kMaxRowsAtOnce, so that none is a small rest that reads all weights again; each
// is packed and multiplied before the next, and stays in the caches meanwhile. 4096 rows, 3072 -> 768, with a residual
// (AMD EPYC, Zen 4, two cores), against packing all of X first: fp32 82 -> 87 % of the FMA peak, bf16 87 -> 92 % of the
// bf16-dot peak.
template <typename Multiply>
void run_panel_gemm(const char* op, const PanelGemmArgs& args, const PanelGemmKernels& kernels,
                    const Multiply& multiply) {
  if (args.m == 0 || args.n == 0) return;
  const int64_t all_blocks = (args.m + kernels.rows_per_block - 1) / kernels.rows_per_block;
  const int64_t most_blocks = kMaxRowsAtOnce / kernels.rows_per_block;
  const int64_t shares = (all_blocks + most_blocks - 1) / most_blocks;
  const int64_t panels = num_panels(args.n);
  const int64_t block_bytes = kernels.rows_per_block * kernels.packed_row_bytes(args);
  const size_t bytes = packed_bytes(args, kernels);

  // Threads split the panels; where there are fewer panels than threads, they split the rows too.
  const int64_t threads = num_threads();
  const int64_t across = panels < threads ? panels : threads;
  const int64_t down = std::min(all_blocks / shares, threads / across);
  const bool alone = packs_alone(args);
  ALULA_TRACE(op, args.dtype, size_class(args.m), " rows, ", args.k, " -> ", args.n,
              args.norm_weight ? ", layer norm" : "", ", ", kind_name(args.format.kind),
              args.format.group_size ? " groups of " + std::to_string(args.format.group_size) : "",
              args.format.kind == WeightKind::kDense ? " weight"
              : args.format.full_activations         ? " weight, full activations"
                                                     : " weight, int8 activations",
              ": panels over ", across, ", row blocks over ", down, " threads, x packed by ",
              alone ? "each for itself" : "all together");

  for (int64_t share = 0; share < shares; share++) {
    const Range blocks = share_of(all_blocks, share, shares);
    const auto run = [&](int64_t part, const void* packed) {
      const Range columns = share_of(panels, part % across, across);
      const Range rows = share_of(blocks.end - blocks.begin, part / across, down);
      multiply(static_cast<const char*>(packed) + rows.begin * block_bytes, columns.begin, columns.end,
               blocks.begin + rows.begin, blocks.begin + rows.end);
    };
    if (alone) {
      parallel_parts(across * down, [&](int64_t part) {
        void* packed = thread_scratch<PackedX>().reserve(bytes);
        kernels.pack_rows(args, blocks.begin, blocks.end, packed);
        run(part, packed);
      });
      continue;
    }
    char* packed = static_cast<char*>(thread_scratch<PackedX>().reserve(bytes));
    parallel_ranges(blocks.end - blocks.begin, 1, [&](int64_t begin, int64_t end) {
      kernels.pack_rows(args, blocks.begin + begin, blocks.begin + end, packed + begin * block_bytes);
    });
    parallel_parts(across * down, [&](int64_t part) { run(part, packed); });
  }
}

inline void check_activation(int64_t code) {
  ALULA_CHECK(code >= 0 && code < kNumActivations, "activation code ", code, " is unknown; accepted: 0 to ",
              kNumActivations - 1, " (alula.ops.ACTIVATIONS)");
}

// Checks a dense packed weight against N and K and returns its dtype.
inline DType check_packed_weight(const Tensor& weight, int64_t out_features, int64_t in_features, Place place = {}) {
  check_place(weight, "weight", place);
  ALULA_CHECK(weight.scalar_type() != ScalarType::Byte,
              "weight holds the bytes of a quantized weight, but format is 0 ",
              "(dense); give the format it was packed with (alula.ops.PackedWeight.code)");
  const DType dtype = value_dtype(weight, "weight");
  ALULA_CHECK(out_features >= 0, "out_features is ", out_features, "; it must not be negative");
  const bool paired = dtype == DType::kBFloat16;
  const bool fits = place.is_cuda() ? weight.dim() == 2 && weight.is_contiguous() && weight.size(0) == out_features &&
                                          weight.size(1) == row_stride(dtype, in_features)
                                    : weight.dim() == (paired ? 4 : 3) && weight.is_contiguous() &&
                                          weight.size(0) == num_panels(out_features) && weight.size(2) == kPanelRows &&
                                          weight.size(1) == (paired ? (in_features + 1) / 2 : in_features) &&
                                          (!paired || weight.size(3) == 2);
  ALULA_CHECK(
      fits, "weight of shape ", shape_of(weight), " is not what alula::pack_weight makes of [", out_features, ", ",
      in_features,
      "] (out_features, in_features); pack the plain weight with alula.ops.pack, and give an input of its in_features");
  return dtype;
}

// The format that PackedWeight.code stands for, see WeightFormat.
inline WeightFormat checked_format(int64_t code) {
  const int64_t kind = code & 15, group = code >> 8;
  const bool known = code >= 0 && kind <= 4 && (code & 0xe0) == 0;
  ALULA_CHECK(known, "format code ", code, " is unknown; accepted: alula.ops.PackedWeight.code of a packed weight");
  const auto k = static_cast<WeightKind>(kind);
  const bool fits = !has_4bit_codes(k)      ? group == 0
                    : k == WeightKind::kNf4 ? group == 64
                                            : group == 32 || group == 64 || group == 128;
  ALULA_CHECK(fits, "group_size ", group, " does not go with format ", kind_name(k),
              "; accepted: 0 for dense and int8, 32, 64 or 128 for int4 and int4_asymmetric, 64 for nf4");
  return {k, (code & 16) != 0, static_cast<int>(group)};
}

// The bytes are the same on every device.
inline void check_quantized_weight(const Tensor& weight, WeightFormat format, int64_t out_features, int64_t in_features,
                                   Place place) {
  check_place(weight, "weight", place);
  check_dtype(weight, "weight", ScalarType::Byte, "a quantized weight");
  ALULA_CHECK(out_features >= 0, "out_features is ", out_features, "; it must not be negative");
  const int64_t bytes = panel_bytes(format, in_features);
  const bool fits = weight.dim() == 2 && weight.is_contiguous() && weight.size(0) == num_panels(out_features) &&
                    weight.size(1) == bytes;
  ALULA_CHECK(fits, "weight of shape ", shape_of(weight), " is not what alula::quantize_weight makes of [",
              out_features, ", ", in_features, "] (out_features, in_features) as ", kind_name(format.kind),
              ", group_size ", format.group_size, ": [", num_panels(out_features), ", ", bytes,
              "]; the tensor is truncated, or goes with another format or another input");
  ALULA_CHECK(!place.is_cuda() || reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0,
              "weight does not begin at a multiple of 16 bytes, as CUDA kernels read it; clone() it");
}

// A weight of either kind, for activations of the dtype of `like`: a dense weight must have it too.
struct CheckedWeight {
  DType dtype;
  WeightFormat format;
};
inline CheckedWeight checked_weight(const Tensor& weight, int64_t format_code, int64_t out_features,
                                    int64_t in_features, const Tensor& like, const char* like_name) {
  const Place place = place_of(like, like_name);
  if (format_code == 0) [[likely]] {
    const DType dtype = check_packed_weight(weight, out_features, in_features, place);
    check_dtype(like, like_name, weight.scalar_type(), "the weight");
    return {dtype, {}};
  }
  const WeightFormat format = checked_format(format_code);
  check_quantized_weight(weight, format, out_features, in_features, place);
  return {value_dtype(like, like_name), format};
}

// What asks for the activations' dtype, in an error.
inline const char* dtype_owner(int64_t format_code) { return format_code == 0 ? "the weight" : "x"; }

}  // namespace alula
