// tile: C[rows][32] += A[rows][K] B[K][32], the register-tiled heart of linear, qkv_projection and attention.
//
// Operands
//   A  packed by rows: for each k the kRows (or fewer, in the last block) values of that k side by side, so that one
//      pointer walks forward and each value is broadcast from memory.
//   B  32 columns per k. ldb elements from one k to the next: 32 for a packed weight, 2 * D for a value cache.
//   C  fp32 [rows][ldc], added to: a product over a long K runs in blocks, each summed from zero. One chain through all of K
//      collects more rounding (4 x 1024 outputs of K 8192 in fp32: largest error 1.1e-3, by blocks 1.2e-4, as MKL's).
// For bf16 weights two k make one step: B holds pairs (k, k+1) for each of the 32 columns, A pairs as well where the
// CPU multiplies pairs (AVX512_BF16), else fp32.
//
// Every element of a call's product is a single chain of multiply-adds over ascending k, whatever the number of rows: a row's
// result is bit for bit the same alone and in a batch.
#pragma once

#include "cpu/vec.h"

namespace alula::ALULA_ISA {

constexpr int kPanel = 32;  // columns of a panel: the layout of packed weights, the same for every instruction set

#if defined(__AVX512F__)
constexpr int kRows = 12;      // 12 x 2 accumulators, 2 of B, of 32 registers; A is a broadcast operand of the FMA
constexpr int kTileVecs = 2;   // 32 columns at once
#elif defined(__AVX2__)
constexpr int kRows = 6;       // 6 x 2 accumulators, 2 of B, 1 of A, of 16 registers
constexpr int kTileVecs = 2;   // 16 columns at once
#else
constexpr int kRows = 4;
constexpr int kTileVecs = 2;   // 8 columns at once
#endif
constexpr int kTileColumns = kTileVecs * Vec::kWidth;
static_assert(kPanel % kTileColumns == 0, "a panel is a whole number of tiles");

// What A is made of for a B of type W, and how many k one step takes.
struct PairOfBf16 {
  uint32_t bits;  // k in the low half, k + 1 in the high half
};
template <typename W>
struct Operand {
  using A = float;
  static constexpr int kStep = 1;       // k per step of B
  static constexpr int kValues = 1;     // values of A per row and step
};
template <>
struct Operand<bf16> {
  static constexpr int kStep = 2;
#if defined(__AVX512BF16__)
  using A = PairOfBf16;
  static constexpr int kValues = 1;
#else
  using A = float;
  static constexpr int kValues = 2;
#endif
};

// One step: acc[i][v] += A[i] * B[v] for the rows of the tile. `b` points at this step's columns, already at the tile's first.
template <int kTileRows>
ALULA_INLINE void multiply_step(const float* a, const float* b, Vec (&acc)[kTileRows][kTileVecs]) {
  Vec column[kTileVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kTileVecs; v++) column[v] = load(b + v * Vec::kWidth);
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++) {
    const Vec x = broadcast(a[i]);
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; v++) acc[i][v] = fma(x, column[v], acc[i][v]);
  }
}

template <int kTileRows>
ALULA_INLINE void multiply_step(const float* a, const f16* b, Vec (&acc)[kTileRows][kTileVecs]) {
  Vec column[kTileVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kTileVecs; v++) column[v] = load(b + v * Vec::kWidth);
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++) {
    const Vec x = broadcast(a[i]);
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; v++) acc[i][v] = fma(x, column[v], acc[i][v]);
  }
}

#if defined(__AVX512BF16__)
template <int kTileRows>
ALULA_INLINE void multiply_step(const PairOfBf16* a, const bf16* b, Vec (&acc)[kTileRows][kTileVecs]) {
  __m512bh column[kTileVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kTileVecs; v++) column[v] = (__m512bh)_mm512_loadu_si512(b + v * 2 * Vec::kWidth);
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++) {
    const auto pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i].bits));
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; v++) acc[i][v].v = _mm512_dpbf16_ps(acc[i][v].v, pair, column[v]);
  }
}
#else
// The even element of each pair is the low half, so a shift makes it fp32, and a mask does so for the odd one.
ALULA_INLINE void widen_pairs(const bf16* b, Vec& even, Vec& odd) {
#if defined(__AVX512F__)
  const __m512i pairs = _mm512_loadu_si512(b);
  even = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
  odd = {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
#else
  for (int i = 0; i < Vec::kWidth; i++) {
    even.v[i] = to_float(b[2 * i]);
    odd.v[i] = to_float(b[2 * i + 1]);
  }
#endif
}

// A holds the even values of the rows, then the odd ones.
template <int kTileRows>
ALULA_INLINE void multiply_step(const float* a, const bf16* b, Vec (&acc)[kTileRows][kTileVecs]) {
  Vec even[kTileVecs], odd[kTileVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kTileVecs; v++) widen_pairs(b + v * 2 * Vec::kWidth, even[v], odd[v]);
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++) {
    const Vec x = broadcast(a[i]), y = broadcast(a[kTileRows + i]);
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; v++) acc[i][v] = fma(y, odd[v], fma(x, even[v], acc[i][v]));
  }
}
#endif

// `steps` steps of a tile of exactly kTileRows rows. kAhead > 0 asks for the line that many bytes ahead in B: for weights that
// stream from memory and are used by few rows.
template <int kTileRows, typename W, int kAhead>
void tile(const typename Operand<W>::A* a, const W* b, ptrdiff_t ldb, int64_t steps, float* c, ptrdiff_t ldc) {
  constexpr int kPair = Operand<W>::kStep;  // elements of B per column and step
  for (int first = 0; first < kPanel; first += kTileColumns) {
    Vec acc[kTileRows][kTileVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVecs; v++) acc[i][v] = zero();
    }
    const typename Operand<W>::A* pa = a;
    const W* pb = b + first * kPair;
    for (int64_t s = 0; s < steps; s++) {
      if constexpr (kAhead > 0) {
        for (size_t line = 0; line < sizeof(W) * kPanel * kPair; line += 64) {
          prefetch(reinterpret_cast<const char*>(pb) + kAhead + line);
        }
      }
      multiply_step<kTileRows>(pa, pb, acc);
      pa += kTileRows * Operand<W>::kValues;
      pb += ldb * kPair;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVecs; v++) {
        float* sum = c + i * ldc + first + v * Vec::kWidth;
        store(sum, load(sum) + acc[i][v]);
      }
    }
  }
}

template <typename W, int kAhead>
using TileFunction = void (*)(const typename Operand<W>::A*, const W*, ptrdiff_t, int64_t, float*, ptrdiff_t);

// The tile for 1 <= rows <= kRows.
template <typename W, int kAhead = 0>
ALULA_INLINE TileFunction<W, kAhead> tile_for(int rows) {
  static_assert(kRows <= 12, "extend the table");
  static constexpr TileFunction<W, kAhead> kTable[] = {
      nullptr,
      tile<1, W, kAhead>,
      tile<2, W, kAhead>,
      tile<3, W, kAhead>,
      tile<4, W, kAhead>,
#if defined(__AVX2__)
      tile<5, W, kAhead>,
      tile<6, W, kAhead>,
#endif
#if defined(__AVX512F__)
      tile<7, W, kAhead>,
      tile<8, W, kAhead>,
      tile<9, W, kAhead>,
      tile<10, W, kAhead>,
      tile<11, W, kAhead>,
      tile<12, W, kAhead>,
#endif
  };
  return kTable[rows];
}

// Writes row `row` of a block of `rows` rows into A: the K fp32 values of `x`, rounded to bf16 for a bf16 product.
// Elements beyond K, up to a whole number of steps, are zero.
template <typename W>
inline void pack_row(const float* x, int64_t k, typename Operand<W>::A* a, int row, int rows) {
  if constexpr (Operand<W>::kStep == 1) {
    for (int64_t i = 0; i < k; i++) a[i * rows + row] = x[i];
  } else {
    for (int64_t i = 0; i < k; i += 2) {
      const bf16 even = to_bf16(x[i]);
      const bf16 odd = i + 1 < k ? to_bf16(x[i + 1]) : bf16{0};
#if defined(__AVX512BF16__)
      a[i / 2 * rows + row] = PairOfBf16{static_cast<uint32_t>(even.bits) | static_cast<uint32_t>(odd.bits) << 16};
#else
      a[i * rows + row] = to_float(even);
      a[(i + 1) * rows + row] = to_float(odd);
#endif
    }
  }
}

// How many values of A a row of K takes.
template <typename W>
constexpr int64_t packed_row_size(int64_t k) {
  return (k + Operand<W>::kStep - 1) / Operand<W>::kStep * Operand<W>::kValues;
}

}  // namespace alula::ALULA_ISA
