// Vec as 4 lanes of the compiler's own vectors, on any CPU. Included by vec.h only.
#pragma once

namespace alula::ALULA_ISA {

typedef float Lanes __attribute__((vector_size(16)));
typedef int32_t IntLanes __attribute__((vector_size(16)));

struct Vec {
  static constexpr int kWidth = 4;
  Lanes v;
};
struct TwoVecs {
  Vec a, b;
};

ALULA_INLINE Vec zero() { return {Lanes{0, 0, 0, 0}}; }
ALULA_INLINE Vec broadcast(float x) { return {Lanes{x, x, x, x}}; }

template <typename T>
ALULA_INLINE Vec load(const T* p) {
  return {Lanes{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
template <>
ALULA_INLINE Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
// The first n lanes, 0 <= n <= 4; the others are zero. Reads nothing beyond p[n-1].
template <typename T>
ALULA_INLINE Vec load(const T* p, int n) {
  Vec a = zero();
  for (int i = 0; i < n; i++) a.v[i] = to_float(p[i]);
  return a;
}

template <typename T>
ALULA_INLINE void store(T* p, Vec a) {
  for (int i = 0; i < Vec::kWidth; i++) p[i] = from_float<T>(a.v[i]);
}
template <>
ALULA_INLINE void store(float* p, Vec a) {
  std::memcpy(p, &a.v, sizeof(a.v));
}
template <typename T>
ALULA_INLINE void store(T* p, Vec a, int n) {
  for (int i = 0; i < n; i++) p[i] = from_float<T>(a.v[i]);
}
template <typename T>
ALULA_INLINE void stream(T* p, Vec a) {  // no portable way past the caches
  store(p, a);
}
ALULA_INLINE void stream_fence() {}

// 8 neighbours as those with even and those with odd index.
ALULA_INLINE TwoVecs load_pairs(const bf16* p) {
  return {{Lanes{to_float(p[0]), to_float(p[2]), to_float(p[4]), to_float(p[6])}},
          {Lanes{to_float(p[1]), to_float(p[3]), to_float(p[5]), to_float(p[7])}}};
}
ALULA_INLINE void store_pairs(bf16* p, TwoVecs x) {
  for (int i = 0; i < Vec::kWidth; i++) {
    p[2 * i] = to_bf16(x.a.v[i]);
    p[2 * i + 1] = to_bf16(x.b.v[i]);
  }
}
ALULA_INLINE void stream_pairs(bf16* p, TwoVecs x) { store_pairs(p, x); }

ALULA_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
ALULA_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
ALULA_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
ALULA_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
ALULA_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }   // a * b + c, rounded twice without FMA
ALULA_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }  // c - a * b
ALULA_INLINE Vec select(IntLanes condition, Lanes x, Lanes y) {
  return {(Lanes)((condition & (IntLanes)x) | (~condition & (IntLanes)y))};
}
// max and min return b where a lane of either is NaN, as the x86 instruction does.
ALULA_INLINE Vec max(Vec a, Vec b) { return select(a.v > b.v, a.v, b.v); }
ALULA_INLINE Vec min(Vec a, Vec b) { return select(a.v < b.v, a.v, b.v); }
ALULA_INLINE Vec abs(Vec a) {
  const IntLanes magnitude = {0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff};
  return {(Lanes)((IntLanes)a.v & magnitude)};
}
ALULA_INLINE Vec sqrt(Vec a) {
  return {Lanes{std::sqrt(a.v[0]), std::sqrt(a.v[1]), std::sqrt(a.v[2]), std::sqrt(a.v[3])}};
}
// For |a| < 2^22: the sum has no bits left for a fraction.
ALULA_INLINE Vec round(Vec a) { return {(a.v + 0x1.8p23f) - 0x1.8p23f}; }
ALULA_INLINE Vec copysign(Vec magnitude, Vec sign) {
  const IntLanes bits = {0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff};
  return {(Lanes)(((IntLanes)magnitude.v & bits) | ((IntLanes)sign.v & ~bits))};
}
// a < b ? x : y, lane by lane (false where NaN).
ALULA_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) { return select(a.v < b.v, x.v, y.v); }
// condition[i] ? x : y
ALULA_INLINE Vec select_true(const bool* condition, Vec x, Vec y) {
  const IntLanes lanes = {condition[0], condition[1], condition[2], condition[3]};
  return select(lanes != 0, x.v, y.v);
}
// The same where condition has n entries: y in the lanes beyond them.
ALULA_INLINE Vec select_true(const bool* condition, int n, Vec x, Vec y) {
  for (int i = 0; i < n; i++) {
    if (condition[i]) y.v[i] = x.v[i];
  }
  return y;
}
// The same of 8 entries, those with even and those with odd index.
ALULA_INLINE TwoVecs select_true_pairs(const bool* condition, TwoVecs x, Vec y) {
  const IntLanes even = {condition[0], condition[2], condition[4], condition[6]};
  const IntLanes odd = {condition[1], condition[3], condition[5], condition[7]};
  return {select(even != 0, x.a.v, y.v), select(odd != 0, x.b.v, y.v)};
}
// x in the first n lanes, y in the others.
ALULA_INLINE Vec select_first(int n, Vec x, Vec y) { return select(IntLanes{0, 1, 2, 3} < n, x.v, y.v); }
// a - floor(a), exact, for |a| < 2^22.
ALULA_INLINE Vec above_floor(Vec a) {
  const Vec d = a - round(a);
  return select(d.v < 0.0f, d.v + 1.0f, d.v);
}
// a * 2^n for integral -252 <= n <= 254, in two factors so that each is a normal number and the result may be denormal.
constexpr bool kScaleTakesAnyPower = false;
ALULA_INLINE Vec scale_by_power_of_two(Vec a, Vec n) {
  const IntLanes whole = __builtin_convertvector(n.v, IntLanes);
  const IntLanes first = whole >> 1;
  return {a.v * (Lanes)((first + 127) << 23) * (Lanes)((whole - first + 127) << 23)};
}
ALULA_INLINE float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
ALULA_INLINE float reduce_max(Vec a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2];
  const float y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}

}  // namespace alula::ALULA_ISA
