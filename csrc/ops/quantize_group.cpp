// Scales of least squared error. From each of a few ranges (all the values span, or a little less, so that an outlier
// is clipped) codes and scale are improved in turn: codes are the nearest ones for the scale, the scale is the one of
// least squares for the codes. The range that everything fits in is the first of them, so no group gets worse than it
// is with that. Scales are rounded to fp16 before codes are chosen for them.
#include "ops/quantize_group.h"

#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "ops/nearest_levels.h"

namespace alula {
namespace {

constexpr float kMaxHalf = 65504.0f;
constexpr float kRanges[] = {1.0f, 0.9f};
constexpr int kRefinements = 5;  // of one range, at most

struct Scales {
  float scale, least;  // as stored, in fp32
  uint16_t scale_bits, least_bits;

  Scales(float s, float l) {
    const torch::headeronly::Half half_scale(s), half_least(l);
    scale_bits = half_scale.x;
    least_bits = half_least.x;
    scale = static_cast<float>(half_scale);
    least = static_cast<float>(half_least);
  }
  bool fit() const { return std::fabs(scale) <= kMaxHalf && std::fabs(least) <= kMaxHalf; }
};

// A group's values, padded to whole Lanes.
struct Group {
  Lanes values[kMostGroup / kLanes];
  int64_t count;

  Group(const float* w, int64_t n) : values{}, count(n) {
    for (int64_t i = 0; i < n; i++) values[i / kLanes][i % kLanes] = w[i];
  }
};

// Sums over a group: v is its values (above its least one, so that a common offset costs no digits), q their levels.
struct Sums {
  float q, qq, v, qv, error;
};

template <WeightKind kKind>
Sums sums_of(const Group& group, const Scales& s, float base) {
  const float inverse = s.scale == 0.0f ? 0.0f : 1.0f / s.scale;
  Lanes sum_q = {}, sum_qq = {}, sum_v = {}, sum_qv = {}, error = {};
  const auto add = [&](Lanes w, Lanes kept) {  // kept: 1, or 0 for padding
    const Lanes level = nearest_levels<kKind>((w - s.least) * inverse).values;
    const Lanes q = level * kept, v = (w - base) * kept, off = (level * s.scale + s.least - w) * kept;
    sum_q += q;
    sum_qq += q * q;
    sum_v += v;
    sum_qv += q * v;
    error += off * off;
  };
  const int64_t whole = group.count / kLanes;
  for (int64_t i = 0; i < whole; i++) add(group.values[i], all(1.0f));
  if (whole * kLanes < group.count) {
    Lanes kept = {};
    for (int64_t i = whole * kLanes; i < group.count; i++) kept[i % kLanes] = 1.0f;
    add(group.values[whole], kept);
  }
  Sums total = {};
  for (int i = 0; i < kLanes; i++) {
    total.q += sum_q[i];
    total.qq += sum_qq[i];
    total.v += sum_v[i];
    total.qv += sum_qv[i];
    total.error += error[i];
  }
  return total;
}

// The scale (and least value) of least squared error for the levels that were summed.
template <WeightKind kKind>
Scales least_squares(const Sums& sum, int64_t count, float base) {
  if constexpr (kKind == WeightKind::kInt4Asymmetric) {
    const double n = static_cast<double>(count);
    const double spread = sum.qq - static_cast<double>(sum.q) * sum.q / n;
    const double scale = spread > 0 ? (sum.qv - static_cast<double>(sum.q) * sum.v / n) / spread : 0.0;
    return {static_cast<float>(scale), static_cast<float>(base + (sum.v - scale * sum.q) / n)};
  }
  return {sum.qq > 0.0f ? sum.qv / sum.qq : 0.0f, 0.0f};
}

template <WeightKind kKind>
bool quantize_as(const float* w, int64_t count, int64_t group_size, QuantizedGroup& result) {
  float low = w[0], high = w[0];
  for (int64_t i = 1; i < count; i++) {
    low = w[i] < low ? w[i] : low;
    high = w[i] > high ? w[i] : high;
  }
  const Group group(w, count);
  constexpr bool kAsymmetric = kKind == WeightKind::kInt4Asymmetric;
  const float base = kAsymmetric ? low : 0.0f, middle = low + (high - low) * 0.5f;
  const float end = -low >= high ? low : high;  // of larger magnitude
  const auto within = [&](float below, float above) -> Scales {
    if constexpr (kAsymmetric) {
      const float from = middle + (low - middle) * below, to = middle + (high - middle) * above;
      return {(to - from) / 15.0f, from};
    }
    // int4: that end gets code 0, which is -8: all 16 codes serve.
    return {end * below / (kKind == WeightKind::kInt4 ? -8.0f : end < 0.0f ? -1.0f : 1.0f), 0.0f};
  };

  Scales best = within(1.0f, 1.0f);
  if (kAsymmetric) best = {(high - low) / 15.0f, low};
  if (!best.fit()) return false;
  float least_error = sums_of<kKind>(group, best, base).error;
  const auto improve_from = [&](Scales scales) {
    float error_before = __builtin_inff();
    for (int i = 0; i <= kRefinements; i++) {
      const Sums sums = sums_of<kKind>(group, scales, base);
      if (sums.error < least_error) {
        least_error = sums.error;
        best = scales;
      }
      if (!(sums.error < error_before)) return;
      error_before = sums.error;
      scales = least_squares<kKind>(sums, count, base);
      if (!scales.fit() || scales.scale == 0.0f) return;
    }
  };
  for (const float below : kRanges) {
    if (!kAsymmetric) improve_from(within(below, below));
    if (kAsymmetric) {
      for (const float above : kRanges) improve_from(within(below, above));
    }
  }

  const float inverse = best.scale == 0.0f ? 0.0f : 1.0f / best.scale;
  for (int64_t i = 0; i < group_size; i += kLanes) {
    Lanes x = (group.values[i / kLanes] - best.least) * inverse;
    for (int64_t j = i; j < i + kLanes; j++) {
      if (j >= count) x[j - i] = 0.0f;
    }
    const Codes codes = nearest_levels<kKind>(x).codes;
    for (int64_t j = i; j < i + kLanes; j++) result.codes[j] = static_cast<uint8_t>(codes[j - i]);
  }
  result.scale = best.scale_bits;
  result.least = best.least_bits;
  return true;
}

}  // namespace

bool quantize_group(WeightKind kind, const float* w, int64_t count, int64_t group_size, QuantizedGroup& result) {
  switch (kind) {
    case WeightKind::kInt4:
      return quantize_as<WeightKind::kInt4>(w, count, group_size, result);
    case WeightKind::kInt4Asymmetric:
      return quantize_as<WeightKind::kInt4Asymmetric>(w, count, group_size, result);
    default:
      return quantize_as<WeightKind::kNf4>(w, count, group_size, result);
  }
}

}  // namespace alula
