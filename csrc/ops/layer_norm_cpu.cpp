// layer_norm on the CPU: a row at a time, three passes (mean, variance, result) of which only the first reads from
// memory.
//
// 16-bit rows and rows with a residual are widened and added once, into a row of fp32 scratch; so are weight and bias,
// once for all rows of a thread.
//
// One core of an AMD EPYC (Zen 4, AVX-512), rows of 1024 beyond the caches, GB/s where memcpy moves 25: fp32 28, bf16
// 20, fp16 22; with a residual 23, 24 and 26. With two threads `alula bench ops` sets them against a copy in the same
// run. Fetching the next row of the residual ahead, as that of x is, gained nothing.
#include "ops/layer_norm.h"

#include <type_traits>

#include "core/dispatch.h"
#include "cpu/norm.h"

namespace alula::ALULA_ISA {
namespace {

constexpr int kWidth = Vec::kWidth;

template <typename T>
void widen(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

// z of n elements in fp32: x itself where it is that already.
template <typename T>
const float* sum_row(const T* x, const T* residual, int64_t n, float* scratch) {
  if (residual == nullptr) {
    if constexpr (std::is_same_v<T, float>) return x;
    widen(x, n, scratch);
    return scratch;
  }
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(scratch + i, load(x + i) + load(residual + i));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store(scratch + i, load(x + i, rest) + load(residual + i, rest), rest);
  }
  return scratch;
}

// Fetches `next` as it goes.
template <typename T, bool kPastCaches>
void write_row(const float* z, Moments moments, const float* weight, const float* bias, int64_t n, const T* next,
               T* y) {
  const auto result = [&](int64_t i) { return normalize(load(z + i), moments, load(weight + i), load(bias + i)); };
  const auto partial = [&](int64_t i, int lanes) {
    store(y + i, normalize(load(z + i, lanes), moments, load(weight + i, lanes), load(bias + i, lanes)), lanes);
  };
  int64_t i = 0;
  if constexpr (kPastCaches) {  // up to the next cache line
    const auto misaligned = static_cast<int64_t>(reinterpret_cast<size_t>(y) % 64 / sizeof(T));
    const int64_t head = misaligned == 0 ? 0 : 64 / static_cast<int64_t>(sizeof(T)) - misaligned;
    const int64_t end = head < n ? head : n;
    for (; i + kWidth <= end; i += kWidth) store(y + i, result(i));
    if (i < end) partial(i, static_cast<int>(end - i));
    i = end;
  }
  for (; i + kWidth <= n; i += kWidth) {
    prefetch(next + i);
    store_or_stream<kPastCaches>(y + i, result(i));
  }
  if (i < n) partial(i, static_cast<int>(n - i));
}

template <typename T, bool kPastCaches>
void normalize_as(const LayerNormArgs& args, int64_t first, int64_t last, float* scratch) {
  const int64_t n = args.width;
  float* row = scratch;
  float* weight = scratch + scratch_floats(args) / 3;
  float* bias = scratch + scratch_floats(args) / 3 * 2;
  widen(static_cast<const T*>(args.weight), n, weight);
  if (args.bias) {
    widen(static_cast<const T*>(args.bias), n, bias);
  } else {
    for (int64_t i = 0; i < n; i++) bias[i] = 0.0f;
  }
  for (int64_t r = first; r < last; r++) {
    const T* x = static_cast<const T*>(args.x) + r * n;
    const T* residual = args.residual ? static_cast<const T*>(args.residual) + r * n : nullptr;
    const float* z = sum_row(x, residual, n, row);
    const Moments moments = moments_of(
        n, args.eps, [&](int64_t i, int lanes) { return lanes == kWidth ? load(z + i) : load(z + i, lanes); });
    write_row<T, kPastCaches>(z, moments, weight, bias, n, x + n, static_cast<T*>(args.out) + r * n);
  }
  if (kPastCaches) stream_fence();
}

void normalize_rows(const LayerNormArgs& args, int64_t first, int64_t last, float* scratch) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    args.writes_past_caches ? normalize_as<T, true>(args, first, last, scratch)
                            : normalize_as<T, false>(args, first, last, scratch);
  });
}

}  // namespace

const LayerNormKernels kLayerNorm = {normalize_rows};

}  // namespace alula::ALULA_ISA
