// dequantize_weight on CUDA: a thread owns four neighbours of K of a row, a warp the 32 rows of a panel, so that it
// reads whole cache lines. quantize_weight has no kernel: weights are quantized on the CPU, whose bytes are the format.
//
// Not measured yet: no GPU was at hand.
#include "ops/quantize_weight.h"

#include "core/dispatch.h"
#include "cpu/panel_gemm_args.h"
#include "cuda/dequantize.cuh"
#include "cuda/launch.h"

namespace alula {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(QuantizedRows q, int64_t n, int64_t k, T* out) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int64_t steps = (k + 3) / 4;
  const int64_t row = index / (steps * kPanelRows) * kPanelRows + index % kPanelRows;
  const auto step = static_cast<int>(index / kPanelRows % steps);
  if (row >= n) return;
  float v[4];
  dequantize_step(v, q, row, step);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (4 * step + i < k) out[row * k + 4 * step + i] = from_float<T>(v[i]);
  }
}

}  // namespace

void dequantize_weight_cuda(const DequantizeArgs& args, const CudaStream& stream) {
  const int64_t count = num_panels(args.n) * kPanelRows * ((args.k + 3) / 4);
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch("dequantize_kernel", dequantize_kernel<T>,
           {.blocks = {(count + kThreads - 1) / kThreads}, .threads = kThreads}, stream,
           quantized_rows(args.format, args.packed, args.k), args.n, args.k, static_cast<T*>(args.out));
  });
}

}  // namespace alula
