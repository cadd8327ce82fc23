// layer_norm on CUDA: y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias, z = x + residual; a block owns a row.
//
// Rows whose packs (16 bytes) lie even are held in registers, up to 8 packs a thread: one read of x and residual, mean
// and variance one after the other (no difference of large sums), one write. Other rows, and those too long, are read
// three times, element by element.
//
// Not measured yet: no GPU was at hand.
#include "ops/layer_norm.h"

#include "core/dispatch.h"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace alula {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kLoopThreads = 256;

struct Params {
  const void* x;
  const void* residual;  // may be null
  const void* weight;
  const void* bias;  // may be null
  void* out;
  int width;
  float eps;
};

template <typename T, int kPacks>
__global__ void __launch_bounds__(kMaxThreads) layer_norm_held_kernel(Params p) {
  constexpr int N = kPackSize<T>;
  const Shared<float> scratch = dynamic_shared<float>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.width;
  const int threads = static_cast<int>(blockDim.x);
  const auto width = static_cast<float>(p.width);

  float z[kPacks][N];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; i++) {
    const int column = (i * threads + static_cast<int>(threadIdx.x)) * N;
#pragma unroll
    for (int j = 0; j < N; j++) z[i][j] = 0.0f;
    if (column >= p.width) continue;
    load_pack(z[i], static_cast<const T*>(p.x) + first + column);
    if (p.residual != nullptr) {
      float r[N];
      load_pack(r, static_cast<const T*>(p.residual) + first + column);
#pragma unroll
      for (int j = 0; j < N; j++) z[i][j] += r[j];
    }
#pragma unroll
    for (int j = 0; j < N; j++) sum += z[i][j];
  }
  const float mean = reduce_block<Sum>(sum, scratch) / width;

  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; i++) {
    if ((i * threads + static_cast<int>(threadIdx.x)) * N >= p.width) continue;
#pragma unroll
    for (int j = 0; j < N; j++) squares += (z[i][j] - mean) * (z[i][j] - mean);
  }
  const float inverse = rsqrtf(reduce_block<Sum>(squares, scratch) / width + p.eps);

#pragma unroll
  for (int i = 0; i < kPacks; i++) {
    const int column = (i * threads + static_cast<int>(threadIdx.x)) * N;
    if (column >= p.width) continue;
    float w[N], b[N] = {};
    load_pack(w, static_cast<const T*>(p.weight) + column);
    if (p.bias != nullptr) load_pack(b, static_cast<const T*>(p.bias) + column);
#pragma unroll
    for (int j = 0; j < N; j++) z[i][j] = (z[i][j] - mean) * inverse * w[j] + b[j];
    store_pack(static_cast<T*>(p.out) + first + column, z[i]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kLoopThreads) layer_norm_loop_kernel(Params p) {
  const Shared<float> scratch = dynamic_shared<float>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.width;
  const auto width = static_cast<float>(p.width);
  const auto at = [&](int column) {
    const float x = to_float(static_cast<const T*>(p.x)[first + column]);
    return p.residual == nullptr ? x : x + to_float(static_cast<const T*>(p.residual)[first + column]);
  };
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < p.width; i += kLoopThreads) sum += at(i);
  const float mean = reduce_block<Sum>(sum, scratch) / width;
  float squares = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < p.width; i += kLoopThreads) {
    squares += (at(i) - mean) * (at(i) - mean);
  }
  const float inverse = rsqrtf(reduce_block<Sum>(squares, scratch) / width + p.eps);
  for (int i = static_cast<int>(threadIdx.x); i < p.width; i += kLoopThreads) {
    const float bias = p.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(p.bias)[i]);
    const float y = (at(i) - mean) * inverse * to_float(static_cast<const T*>(p.weight)[i]) + bias;
    static_cast<T*>(p.out)[first + i] = from_float<T>(y);
  }
}

template <typename T>
void layer_norm_as(const Params& p, int64_t rows, const CudaStream& stream) {
  const int packs = p.width / kPackSize<T>;
  const bool is_aligned = is_aligned_16(p.x) && is_aligned_16(p.residual) && is_aligned_16(p.weight) &&
                          is_aligned_16(p.bias) && is_aligned_16(p.out);
  const auto held = [&](auto kernel, int packs_held) {
    const int threads = ((packs + packs_held - 1) / packs_held + kWarpSize - 1) / kWarpSize * kWarpSize;
    launch("layer_norm_held_kernel", kernel,
           {.blocks = {rows}, .threads = threads, .shared_bytes = threads / kWarpSize * 4}, stream, p);
  };
  if (p.width % kPackSize<T> != 0 || !is_aligned || packs > 8 * kMaxThreads) {
    return launch("layer_norm_loop_kernel", layer_norm_loop_kernel<T>,
                  {.blocks = {rows}, .threads = kLoopThreads, .shared_bytes = kLoopThreads / kWarpSize * 4}, stream, p);
  }
  if (packs <= kMaxThreads / 2) return held(layer_norm_held_kernel<T, 1>, 1);
  if (packs <= kMaxThreads) return held(layer_norm_held_kernel<T, 2>, 2);
  if (packs <= 4 * kMaxThreads) return held(layer_norm_held_kernel<T, 4>, 4);
  held(layer_norm_held_kernel<T, 8>, 8);
}

}  // namespace

void layer_norm_cuda(const LayerNormArgs& args, int64_t rows, const CudaStream& stream) {
  ALULA_CHECK(args.width < (int64_t{1} << 30), "x has rows of ", args.width, "; accepted: up to 2^30 - 1");
  const Params p = {args.x, args.residual, args.weight, args.bias, args.out, static_cast<int>(args.width), args.eps};
  dispatch_dtype(args.dtype, [&](auto tag) { layer_norm_as<typename decltype(tag)::Type>(p, rows, stream); });
}

}  // namespace alula
