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

// The same two where the values come as `TwoVecs f(i)`, 2 * kWidth of them in any order, and n has no rest.
template <typename F, typename Add>
ALULA_INLINE float sum_over_pairs(int64_t n, F f, Add add) {
  constexpr int kPair = 2 * Vec::kWidth;
  Vec sum[kNormChains] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 2 * kPair <= n; i += 2 * kPair) {
    const TwoVecs first = f(i), second = f(i + kPair);
    sum[0] = add(sum[0], first.a);
    sum[1] = add(sum[1], first.b);
    sum[2] = add(sum[2], second.a);
    sum[3] = add(sum[3], second.b);
  }
  if (i < n) {
    const TwoVecs last = f(i);
    sum[0] = add(sum[0], last.a);
    sum[1] = add(sum[1], last.b);
  }
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}
template <typename F>
ALULA_INLINE float mean_of_pairs(int64_t n, F f) {
  return sum_over_pairs(n, f, [](Vec sum, Vec z) { return sum + z; }) / static_cast<float>(n);
}
template <typename F>
ALULA_INLINE Moments moments_about_pairs(float mean, int64_t n, float eps, F f) {
  const Vec center = broadcast(mean);
  const float sum = sum_over_pairs(n, f, [center](Vec sum, Vec z) { return fma(z - center, z - center, sum); });
  return {mean, 1.0f / std::sqrt(sum / static_cast<float>(n) + eps)};
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
