// layer_norm on the CPU: a row at a time, in passes (mean, variance, result) of which only the first reads from memory.
// Weight and bias are widened to fp32 once for all rows of a thread. Of 16 bits, the first pass over a row runs
// together with the last one over the row before, so that memory reads and writes all the while.
//
// Two threads of an AMD EPYC (Zen 4, AVX-512), GB/s, together and, in turn with that, one after the other, where a copy
// moves 57: bf16 44 and 33 (rows of 2048), 42 and 36 (768); fp32 43 and 51, 57 and 63: memory alone keeps that busy.
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

// A row of z. It is widened and added anew wherever it is used: two more rows in fp32 would not leave the first-level
// cache room for weight and bias.
template <typename T, bool kHasResidual>
struct Row {
  const T* x;
  const T* residual;

  template <typename... Lanes>  // one int for a part of a register, nothing for a whole one
  ALULA_INLINE Vec operator()(int64_t i, Lanes... lanes) const {
    const Vec z = load(x + i, lanes...);
    if constexpr (kHasResidual) return z + load(residual + i, lanes...);
    return z;
  }
};

// Writes a row, one vector at a time, while another row may be read.
template <typename T, bool kHasResidual, bool kPastCaches>
class RowWriter {
 public:
  RowWriter(const float* weight, const float* bias, int64_t n) : weight_(weight), bias_(bias), n_(n) {}

  // From z, when the row before it is finished.
  void begin(Row<T, kHasResidual> z, Moments moments, T* y) {
    z_ = z;
    moments_ = moments;
    y_ = y;
    head_ = 0;
    if constexpr (kPastCaches) {  // up to the first cache line
      const auto misaligned = static_cast<int64_t>(reinterpret_cast<size_t>(y) % 64 / sizeof(T));
      if (misaligned != 0) head_ = 64 / static_cast<int64_t>(sizeof(T)) - misaligned;
      if (head_ > n_) head_ = n_;
    }
    whole_ = head_ + (n_ - head_) / kWidth * kWidth;
  }

  // The vector that is i elements from the first cache line, if there is one.
  ALULA_INLINE void write(int64_t i) const {
    const int64_t j = head_ + i;
    if (j < whole_) {
      store_or_stream<kPastCaches>(y_ + j, normalize(z_(j), moments_, load(weight_ + j), load(bias_ + j)));
    }
  }

  // What is left when i = 0, kWidth .. below n are written.
  void finish() const {
    for (int64_t j = 0; j < head_; j += kWidth) part(j, static_cast<int>(head_ - j < kWidth ? head_ - j : kWidth));
    if (whole_ < n_ && y_) part(whole_, static_cast<int>(n_ - whole_));
  }

 private:
  ALULA_INLINE void part(int64_t j, int lanes) const {
    store(y_ + j, normalize(z_(j, lanes), moments_, load(weight_ + j, lanes), load(bias_ + j, lanes)), lanes);
  }

  const float *weight_, *bias_;
  int64_t n_;
  Row<T, kHasResidual> z_ = {};
  T* y_ = nullptr;
  Moments moments_ = {};
  int64_t head_ = 0, whole_ = 0;
};

template <typename T, bool kHasResidual, bool kPastCaches>
void normalize_as(const LayerNormArgs& args, int64_t first, int64_t last, float* scratch) {
  const int64_t n = args.width;
  float* weight = scratch;
  float* bias = scratch + scratch_floats(args) / 2;
  widen(static_cast<const T*>(args.weight), n, weight);
  if (args.bias) {
    widen(static_cast<const T*>(args.bias), n, bias);
  } else {
    for (int64_t i = 0; i < n; i++) bias[i] = 0.0f;
  }
  constexpr bool kTogether = sizeof(T) == 2;
  RowWriter<T, kHasResidual, kPastCaches> writer(weight, bias, n);
  for (int64_t r = first; r < last; r++) {
    Row<T, kHasResidual> z = {static_cast<const T*>(args.x) + r * n, nullptr};
    if constexpr (kHasResidual) z.residual = static_cast<const T*>(args.residual) + r * n;
    const auto write_and_fetch_next = [&](int64_t i) {
      writer.write(i);
      prefetch(z.x + n + i);
      if constexpr (kHasResidual) prefetch(z.residual + n + i);
    };
    const float mean = mean_of(n, [&](int64_t i, int lanes) {
      if constexpr (kTogether) write_and_fetch_next(i);
      return lanes == kWidth ? z(i) : z(i, lanes);
    });
    if constexpr (kTogether) writer.finish();
    const Moments moments =
        moments_about(mean, n, args.eps, [z](int64_t i, int lanes) { return lanes == kWidth ? z(i) : z(i, lanes); });
    writer.begin(z, moments, static_cast<T*>(args.out) + r * n);
    if constexpr (!kTogether) {
      for (int64_t i = 0; i < n; i += kWidth) write_and_fetch_next(i);
      writer.finish();
    }
  }
  if constexpr (kTogether) {
    for (int64_t i = 0; i < n; i += kWidth) writer.write(i);
    writer.finish();
  }
  if (kPastCaches) stream_fence();
}

void normalize_rows(const LayerNormArgs& args, int64_t first, int64_t last, float* scratch) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (args.residual) {
      args.writes_past_caches ? normalize_as<T, true, true>(args, first, last, scratch)
                              : normalize_as<T, true, false>(args, first, last, scratch);
    } else {
      args.writes_past_caches ? normalize_as<T, false, true>(args, first, last, scratch)
                              : normalize_as<T, false, false>(args, first, last, scratch);
    }
  });
}

}  // namespace

const LayerNormKernels kLayerNorm = {normalize_rows};

}  // namespace alula::ALULA_ISA
