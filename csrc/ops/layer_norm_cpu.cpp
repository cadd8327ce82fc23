// layer_norm on the CPU: a row at a time, in passes (mean, variance, result) of which only the first reads from memory.
// Weight and bias are widened to fp32 once for all rows of a thread. Of 16 bits, the first pass over a row runs
// together with the last one over the row before, so that memory reads and writes all the while; even and odd
// neighbours of bf16 are widened and narrowed apart, which takes half the instructions. The next row is fetched into
// L2: weight, bias and two rows fill L1.
//
// Two threads of an AMD EPYC (Zen 4, AVX-512), share of a copy's bandwidth measured in turn (37 to 39 GB/s), bf16 and
// fp32: rows of 2048 110 and 101 % (87 and 88 fetched into L1), of 768 98 and 105 %; with a residual 98 and 89 % (67
// and 76 fetched into L1), of 768 91 and 96 %. Keeping z in fp32 between the passes: 4 to 10 % slower.
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

// A row of z. It is widened and added anew wherever it is used.
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
      prefetch_to_second_level(z.x + n + i);
      if constexpr (kHasResidual) prefetch_to_second_level(z.residual + n + i);
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

// Rows of bf16 in whole pairs of registers, and whole cache lines where they go past the caches.
template <bool kHasResidual, bool kPastCaches>
void normalize_pairs(const LayerNormArgs& args, int64_t first, int64_t last, float* scratch) {
  constexpr int kPair = 2 * kWidth;
  const int64_t n = args.width;
  float* weight = scratch;
  float* bias = scratch + scratch_floats(args) / 2;
  const auto widen_pairs = [n](const void* from, float* to) {
    for (int64_t i = 0; i < n; i += kPair) {
      const TwoVecs x = from ? load_pairs(static_cast<const bf16*>(from) + i) : TwoVecs{zero(), zero()};
      store(to + i, x.a);
      store(to + i + kWidth, x.b);
    }
  };
  widen_pairs(args.weight, weight);
  widen_pairs(args.bias, bias);
  const bf16* x = static_cast<const bf16*>(args.x) + first * n;
  const bf16* residual = static_cast<const bf16*>(args.residual) + (kHasResidual ? first * n : 0);
  bf16* y = static_cast<bf16*>(args.out) + (first - 1) * n;
  const auto z = [&](int64_t i) -> TwoVecs {
    const TwoVecs v = load_pairs(x + i);
    if constexpr (kHasResidual) {
      const TwoVecs add = load_pairs(residual + i);
      return {v.a + add.a, v.b + add.b};
    }
    return v;
  };
  Moments moments = {};
  const auto write = [&](int64_t i, TwoVecs v) {
    const TwoVecs result = {normalize(v.a, moments, load(weight + i), load(bias + i)),
                            normalize(v.b, moments, load(weight + i + kWidth), load(bias + i + kWidth))};
    kPastCaches ? stream_pairs(y + i, result) : store_pairs(y + i, result);
  };
  const auto z_while_writing = [&](int64_t i) {
    write(i, z(i - n));
    prefetch_to_second_level(x + n + i);
    if constexpr (kHasResidual) prefetch_to_second_level(residual + n + i);
    return z(i);
  };
  for (int64_t r = first; r < last; r++) {
    const float mean = r > first ? mean_of_pairs(n, z_while_writing) : mean_of_pairs(n, z);
    moments = moments_about_pairs(mean, n, args.eps, z);
    x += n;
    residual += kHasResidual ? n : 0;
    y += n;
  }
  for (int64_t i = 0; i < n; i += kPair) write(i, z(i - n));
  if (kPastCaches) stream_fence();
}

bool takes_pairs(const LayerNormArgs& args) {
  return args.dtype == DType::kBFloat16 && args.width * static_cast<int64_t>(sizeof(bf16)) % 64 == 0;
}

void normalize_rows(const LayerNormArgs& args, int64_t first, int64_t last, float* scratch) {
  if (takes_pairs(args)) {
    if (args.residual) {
      args.writes_past_caches ? normalize_pairs<true, true>(args, first, last, scratch)
                              : normalize_pairs<true, false>(args, first, last, scratch);
    } else {
      args.writes_past_caches ? normalize_pairs<false, true>(args, first, last, scratch)
                              : normalize_pairs<false, false>(args, first, last, scratch);
    }
    return;
  }
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
