// How a packed-weight product is spread over threads. The torch side of linear and qkv_projection.
#pragma once

#include "core/scratch.h"
#include "core/tensor.h"
#include "core/trace.h"
#include "cpu/panel_gemm_args.h"
#include "cpu/parallel.h"

namespace alula {

// Up to this many values of X every thread packs all of X for itself: cheaper than meeting at a barrier (about 3 us).
constexpr int64_t kPackAloneValues = 16 * 1024;

// multiply(packed, first_panel, last_panel, first_block, last_block) on every thread's share. `op` is for the trace.
template <typename Multiply>
void run_panel_gemm(const char* op, const PanelGemmArgs& args, const PanelGemmKernels& kernels,
                    const Multiply& multiply) {
  struct PackedX;
  if (args.m == 0 || args.n == 0) return;
  const int64_t blocks = (args.m + kernels.rows_per_block - 1) / kernels.rows_per_block;
  const int64_t panels = num_panels(args.n);
  const auto bytes = static_cast<size_t>(args.m * kernels.packed_row_bytes(args.dtype, args.k));

  // Threads split the panels; where there are fewer panels than threads, they split the rows too.
  const int64_t threads = num_threads();
  const int64_t across = panels < threads ? panels : threads;
  const int64_t down = blocks < threads / across ? blocks : threads / across;
  const auto run = [&](int64_t part, const void* packed) {
    const Range columns = share_of(panels, part % across, across);
    const Range rows = share_of(blocks, part / across, down);
    multiply(packed, columns.begin, columns.end, rows.begin, rows.end);
  };

  const bool packs_alone = args.m * args.k <= kPackAloneValues;
  ALULA_TRACE(op, args.dtype, size_class(args.m), " rows, ", args.k, " -> ", args.n,
              args.norm_weight ? ", layer norm" : "", ": panels over ", across, ", row blocks over ", down,
              " threads, x packed by ", packs_alone ? "each for itself" : "all together");
  if (packs_alone) {
    parallel_parts(across * down, [&](int64_t part) {
      void* packed = thread_scratch<PackedX>().reserve(bytes);
      kernels.pack_rows(args, 0, blocks, packed);
      run(part, packed);
    });
    return;
  }
  void* packed = thread_scratch<PackedX>().reserve(bytes);
  parallel_ranges(blocks, 1, [&](int64_t begin, int64_t end) { kernels.pack_rows(args, begin, end, packed); });
  parallel_parts(across * down, [&](int64_t part) { run(part, packed); });
}

inline void check_activation(int64_t code) {
  ALULA_CHECK(code >= 0 && code <= 5, "activation code ", code,
              " is unknown; accepted: 0 to 5 (alula.ops.ACTIVATIONS)");
}

// Checks a packed weight against N and K and returns its dtype.
inline DType check_packed_weight(const Tensor& weight, int64_t out_features, int64_t in_features) {
  check_cpu(weight, "weight");
  const DType dtype = value_dtype(weight, "weight");
  ALULA_CHECK(out_features >= 0, "out_features is ", out_features, "; it must not be negative");
  const bool paired = dtype == DType::kBFloat16;
  const bool fits = weight.dim() == (paired ? 4 : 3) && weight.is_contiguous() &&
                    weight.size(0) == num_panels(out_features) && weight.size(2) == kPanelRows &&
                    weight.size(1) == (paired ? (in_features + 1) / 2 : in_features) &&
                    (!paired || weight.size(3) == 2);
  ALULA_CHECK(
      fits, "weight of shape ", shape_of(weight), " is not what alula::pack_weight makes of [", out_features, ", ",
      in_features,
      "] (out_features, in_features); pack the plain weight with alula.ops.pack, and give an input of its in_features");
  return dtype;
}

}  // namespace alula
