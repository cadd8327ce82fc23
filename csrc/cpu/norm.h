// Layer norm of one row, fp32 inside: mean, then variance about it (two passes, so a large mean costs no digits).
#pragma once

#include "cpu/vec.h"

namespace alula::ALULA_ISA {

struct Moments {
  float mean;
  float inverse_deviation;  // 1 / sqrt(variance + eps)
};

// Of the n values f(i) .. f(i + lanes - 1), given as `Vec f(i, lanes)`; lanes beyond the count must come back as zero.
// Each is asked for once, in order.
constexpr int kNormChains = 4;  // independent sums hide the adder's latency
template <typename F>
ALULA_INLINE float mean_of(int64_t n, F f) {
  constexpr int kWidth = Vec::kWidth;
  Vec sum[kNormChains] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kNormChains * kWidth <= n; i += kNormChains * kWidth) {
    for (int c = 0; c < kNormChains; c++) sum[c] = sum[c] + f(i + c * kWidth, kWidth);
  }
  for (; i < n; i += kWidth) sum[0] = sum[0] + f(i, static_cast<int>(n - i < kWidth ? n - i : kWidth));
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<float>(n);
}

// Of the same values about their mean.
template <typename F>
ALULA_INLINE Moments moments_about(float mean, int64_t n, float eps, F f) {
  constexpr int kWidth = Vec::kWidth;
  const Vec center = broadcast(mean);
  Vec sum[kNormChains] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kNormChains * kWidth <= n; i += kNormChains * kWidth) {
    for (int c = 0; c < kNormChains; c++) {
      const Vec d = f(i + c * kWidth, kWidth) - center;
      sum[c] = fma(d, d, sum[c]);
    }
  }
  for (; i + kWidth <= n; i += kWidth) {
    const Vec d = f(i, kWidth) - center;
    sum[0] = fma(d, d, sum[0]);
  }
  float variance = reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if (i < n) {  // the lanes beyond the row are not part of it
    alignas(64) float rest[kWidth];
    store(rest, f(i, static_cast<int>(n - i)) - center);
    for (int64_t j = 0; j < n - i; j++) variance += rest[j] * rest[j];
  }
  variance /= static_cast<float>(n);
  return {mean, 1.0f / std::sqrt(variance + eps)};
}

template <typename F>
ALULA_INLINE Moments moments_of(int64_t n, float eps, F f) {
  return moments_about(mean_of(n, f), n, eps, f);
}

// (x - mean) * inverse_deviation * weight + bias
ALULA_INLINE Vec normalize(Vec x, Moments m, Vec weight, Vec bias) {
  return fma((x - broadcast(m.mean)) * broadcast(m.inverse_deviation), weight, bias);
}

}  // namespace alula::ALULA_ISA
