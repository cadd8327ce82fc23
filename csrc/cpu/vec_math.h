// exp, tanh, erfc, softplus and the activations built on them. NaN stays NaN, infinities go to their limits.
//
// Largest errors against fp64, in units in the last place, over every 1021st fp32 number and 2 million points around 0
// (AVX2 and AVX-512 agree but for exp2; generic has no FMA):
//              exp    exp2   tanh   sigmoid   silu   gelu_tanh   gelu
//   FMA        0.95   2.7    1.3    2.3       2.8    32          12      |x| <= 5
//   generic    1.2    3.0    1.3    2.3       3.2    41          19      |x| <= 5
// exp and exp2 keep this everywhere. What grows with |x| in the last two is the rounded argument of an exp, where the
// result is near 0: 200 ulp of 1e-20 at x = -9.7, 70 ulp of 1e-38 at x = -13. silu has 52 ulp where its sigmoid is
// denormal (x < -87).
#pragma once

#include "cpu/vec.h"

namespace alula::ALULA_ISA {

// exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln(2) / 2. ln 2 is subtracted in two parts, the first so short
// that its product is exact (Cody and Waite), so r keeps its last bits without FMA too; exp(r) by a minimax polynomial
// whose coefficients were refined in fp32 arithmetic. For x from -104, where the result is 0, to 89, where it is inf;
// and NaN.
ALULA_INLINE Vec exp_in_range(Vec x) {
  const Vec n = round(x * broadcast(1.44269504088896341f));
  Vec r = fnma(n, broadcast(0.693359375f), x);
  r = fnma(n, broadcast(-2.12194440e-4f), r);
  Vec p = broadcast(0x1.6ae6e0p-10f);
  p = fma(p, r, broadcast(0x1.1267d8p-7f));
  p = fma(p, r, broadcast(0x1.555824p-5f));
  p = fma(p, r, broadcast(0x1.55544ep-3f));
  p = fma(p, r, broadcast(0x1.fffffcp-2f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return scale_by_power_of_two(p, n);
}

// Operand order matters: min and max hand back their second operand where one is NaN.
ALULA_INLINE Vec exp(Vec x) { return exp_in_range(max(broadcast(-104.0f), min(broadcast(89.0f), x))); }

// For x <= 0, or NaN.
ALULA_INLINE Vec exp_of_negative(Vec x) { return exp_in_range(max(broadcast(-104.0f), x)); }

// 2^floor(x) times a polynomial in the fraction, which has the coefficients from the highest power to the first and
// ends in 1.
template <typename... Floats>
ALULA_INLINE Vec exp2_by(Vec x, float highest, Floats... coefficients) {
  if constexpr (!kScaleTakesAnyPower) x = max(broadcast(-151.0f), min(broadcast(129.0f), x));
  const Vec r = above_floor(x);
  Vec p = broadcast(highest);
  ((p = fma(p, r, broadcast(coefficients))), ...);
  p = fma(p, r, broadcast(1.0f));
  return scale_by_power_of_two(p, kScaleTakesAnyPower ? x : x - r);  // which drops the fraction by itself
}

// 2^x, relative error 1.8e-7 for every x, the infinities included; where x is a rounded product y / ln 2 the result is
// exp(y) within |y| * 1.2e-7 more. AVX-512 takes 8 instructions for it.
ALULA_INLINE Vec exp2(Vec x) {
  return exp2_by(x, 0x1.e97502p-10f, 0x1.277852p-7f, 0x1.c91ce4p-5f, 0x1.ebdb5cp-3f, 0x1.62e4bap-1f);
}

// The same for a result that will be rounded to bf16 or fp16: relative error 2.9e-6, a 168th of what rounding to fp16
// may add.
ALULA_INLINE Vec exp2_to_16_bits(Vec x) {
  return exp2_by(x, 0x1.b7f734p-7f, 0x1.abf868p-5f, 0x1.ee2452p-3f, 0x1.62d6c6p-1f);
}

// 1 / (1 + exp(-x)), for negative x as exp(x) / (1 + exp(x)): exp(-x) would overflow where the result is not yet 0.
ALULA_INLINE Vec sigmoid(Vec x) {
  const Vec e = exp_of_negative(zero() - abs(x));
  const Vec one = broadcast(1.0f);
  return select_less(x, zero(), e, one) / (one + e);
}

// Near 0 an odd polynomial (the quotient would lose all digits there), elsewhere 1 - 2 / (exp(2|x|) + 1) with x's sign.
ALULA_INLINE Vec tanh(Vec x) {
  const Vec a = abs(x);
  const Vec one = broadcast(1.0f);
  const Vec large = one - broadcast(2.0f) / (exp(a + a) + one);
  const Vec s = x * x;
  Vec p = broadcast(-5.70498872745e-3f);
  p = fma(p, s, broadcast(2.06390887954e-2f));
  p = fma(p, s, broadcast(-5.37397155531e-2f));
  p = fma(p, s, broadcast(1.33314422036e-1f));
  p = fma(p, s, broadcast(-3.33332819422e-1f));
  const Vec small = fma(p * s, x, x);
  return select_less(a, broadcast(0.625f), small, copysign(large, x));
}

// erfc(|x| / sqrt 2): the Chebyshev fit of Press et al., Numerical Recipes, section 6.2, with the square taken of x
// itself, which costs no rounding before exp. Relative error: the fit's 1.2e-7, and x^2 / 2 * 6e-8 from the argument of
// exp.
ALULA_INLINE Vec erfc_of_abs(Vec x) {
  const Vec t = broadcast(1.0f) / fma(broadcast(0.35355339059327376f), abs(x), broadcast(1.0f));
  Vec p = broadcast(0.17087277f);
  p = fma(p, t, broadcast(-0.82215223f));
  p = fma(p, t, broadcast(1.48851587f));
  p = fma(p, t, broadcast(-1.13520398f));
  p = fma(p, t, broadcast(0.27886807f));
  p = fma(p, t, broadcast(-0.18628806f));
  p = fma(p, t, broadcast(0.09678418f));
  p = fma(p, t, broadcast(0.37409196f));
  p = fma(p, t, broadcast(1.00002368f));
  p = fma(p, t, broadcast(-1.26551223f));
  return t * exp_of_negative(fnma(x * broadcast(0.5f), x, p));
}

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3): one exponential, to base 2, and no
// cancellation for negative x. The factors are 2 sqrt(2/pi) / ln 2, of x^3 times 0.044715.
ALULA_INLINE Vec gelu_tanh(Vec x) {
  const Vec cubic = fma(broadcast(-0.102943240154f) * x, x, broadcast(-2.30220819814f));
  return x / (broadcast(1.0f) + exp2(cubic * x));
}

// x Phi(x), Phi(x) = erfc(-x / sqrt 2) / 2, taken from the side where it does not cancel.
ALULA_INLINE Vec gelu(Vec x) {
  const Vec tail = broadcast(0.5f) * erfc_of_abs(x);
  return x * select_less(x, zero(), tail, broadcast(1.0f) - tail);
}

// max(x, 0), NaN kept.
ALULA_INLINE Vec relu(Vec x) { return max(zero(), x); }

ALULA_INLINE Vec silu(Vec x) { return x * sigmoid(x); }

// x clamped to 0..6, NaN kept.
ALULA_INLINE Vec relu6(Vec x) { return min(broadcast(6.0f), relu(x)); }

// Phi((x - 0.707107) / 0.282095), a normal distribution's share below x, from the side where it does not cancel.
ALULA_INLINE Vec laplace(Vec x) {
  const Vec z = (x - broadcast(0.707107f)) * broadcast(3.54490508516635f);
  const Vec tail = broadcast(0.5f) * erfc_of_abs(z);
  return select_less(z, zero(), tail, broadcast(1.0f) - tail);
}

// x tanh(log(1 + e^x)) = x n / (n + 2), n = e^x (e^x + 2); for positive x with e^-2x in front and behind.
ALULA_INLINE Vec mish(Vec x) {
  const Vec e = exp_of_negative(zero() - abs(x));
  const Vec square = e * e;
  const Vec twice = e + e;
  const Vec n = twice + select_less(x, zero(), square, broadcast(1.0f));
  return x * (n / (n + select_less(x, zero(), broadcast(2.0f), square + square)));
}

// sqrt(log(1 + e^x)). With g = e^(-|x| / 2) that is g sqrt(q) for negative x and sqrt(x + g^2 q) else, where
// q = log(1 + g^2) / g^2 = 2 / (2 + g^2) atanh(s) / s, s = g^2 / (2 + g^2) <= 1/3; atanh(s) / s by a minimax polynomial
// in s^2 (relative error 4e-9). So nothing cancels, and nothing underflows before the result does.
ALULA_INLINE Vec sqrt_softplus(Vec x) {
  const Vec g = exp_of_negative(broadcast(-0.5f) * abs(x));
  const Vec square = g * g;
  const Vec half_q = broadcast(1.0f) / (broadcast(2.0f) + square);
  const Vec s = square * half_q;
  const Vec z = s * s;
  Vec p = broadcast(0x1.208bd0p-3f);
  p = fma(p, z, broadcast(0x1.1e510ap-3f));
  p = fma(p, z, broadcast(0x1.99dae6p-3f));
  p = fma(p, z, broadcast(0x1.5554e0p-2f));
  p = fma(p, z, broadcast(1.0f));
  const Vec q = (half_q + half_q) * p;
  const Vec root = sqrt(select_less(x, zero(), q, fma(square, q, x)));
  return select_less(x, zero(), g * root, root);
}

}  // namespace alula::ALULA_ISA
