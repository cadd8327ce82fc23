// tile: C[rows][32] += A[rows][K] B[K][32], the register-tiled heart of linear and qkv_projection.
//
// Operands
//   A  rows of 32-bit units, kRowStride apart: fp32 values or, for bf16 weights on a CPU that multiplies pairs
//   (AVX512_BF16), pairs
//      of bf16. Each unit is broadcast from where it lies; the stride is a constant, so twelve rows need one pointer.
//   B  a panel of a packed weight, 32 columns per k; for bf16 pairs (k, k+1) per column.
//   C  fp32 [rows][32], added to: a product over a long K runs in blocks, each summed from zero. One chain through all
//   of K
//      collects more rounding (4 x 1024 outputs of K 8192 in fp32: largest error 1.1e-3, by blocks 1.2e-4, as MKL's).
//
// Every element of a call's product is a single chain of multiply-adds over ascending k, whatever the number of rows: a
// row's result is bit for bit the same alone and in a batch.
#pragma once

#include "cpu/vec.h"

namespace alula::ALULA_ISA {

constexpr int kPanel = 32;  // columns of a panel: the layout of packed weights, the same for every instruction set

#if defined(__AVX512F__)
constexpr int kRows = 12;     // 12 x 2 accumulators and 2 of B, of 32 registers; A is a broadcast operand of the FMA
constexpr int kTileVecs = 2;  // 32 columns at once
#elif defined(__AVX2__)
constexpr int kRows = 6;      // 6 x 2 accumulators, 2 of B, 1 of A, of 16 registers
constexpr int kTileVecs = 2;  // 16 columns at once
#else
constexpr int kRows = 4;
constexpr int kTileVecs = 2;  // 8 columns at once
#endif
constexpr int kTileColumns = kTileVecs * Vec::kWidth;
static_assert(kPanel % kTileColumns == 0, "a panel is a whole number of tiles");

// How a product with weights of type W goes: a step of B takes kStep values of k and kUnits units of A.
template <typename W>
struct Operand {
  using Value = float;  // what A is made of
  static constexpr int kStep = 1;
  static constexpr int kUnits = 1;
};
template <>
struct Operand<bf16> {
  static constexpr int kStep = 2;
#if defined(__AVX512BF16__)
  using Value = bf16;
  static constexpr int kUnits = 1;
#else
  using Value = float;
  static constexpr int kUnits = 2;
#endif
};

// A panel's block of K is kept in the first-level cache (32 KiB) while rows pass over it.
constexpr int64_t kBlockBytes = 24 * 1024;
template <typename W>
constexpr int64_t kBlockSteps = kBlockBytes / (kPanel * static_cast<int64_t>(sizeof(W)) * Operand<W>::kStep);
// Units from a row of A to the next: a block's, and one more line, so that the rows of a tile fall into different cache
// sets.
template <typename W>
constexpr int64_t kRowStride = kBlockSteps<W> * Operand<W>::kUnits + 16;

// One step: acc[i][v] += A[i] B[v]. `b` points at this step's columns, from the tile's first.
template <int kTileRows, typename W>
ALULA_INLINE void multiply_step(const float* a, const W* b, Vec (&acc)[kTileRows][kTileVecs]) {
  Vec column[kTileVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kTileVecs; v++) column[v] = load(b + v * Vec::kWidth);
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++) {
    const Vec x = broadcast(a[i * kRowStride<W>]);
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; v++) acc[i][v] = fma(x, column[v], acc[i][v]);
  }
}

#if defined(__AVX512BF16__)
template <int kTileRows>
ALULA_INLINE void multiply_step(const float* a, const bf16* b, Vec (&acc)[kTileRows][kTileVecs]) {
  __m512bh column[kTileVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kTileVecs; v++) column[v] = (__m512bh)_mm512_loadu_si512(b + v * 2 * Vec::kWidth);
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++) {
    const auto pair = (__m512bh)_mm512_set1_ps(a[i * kRowStride<bf16>]);
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

template <int kTileRows>
ALULA_INLINE void multiply_step(const float* a, const bf16* b, Vec (&acc)[kTileRows][kTileVecs]) {
  Vec even[kTileVecs], odd[kTileVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kTileVecs; v++) widen_pairs(b + v * 2 * Vec::kWidth, even[v], odd[v]);
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++) {
    const Vec x = broadcast(a[i * kRowStride<bf16>]), y = broadcast(a[i * kRowStride<bf16> + 1]);
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; v++) acc[i][v] = fma(y, odd[v], fma(x, even[v], acc[i][v]));
  }
}
#endif

// How a tile takes B. kCached: it is there already. kFirst: from memory, other rows will read it from the first-level
// cache. kOnce: from memory, and nobody reads it again, so it passes by the second- and third-level caches, which keep
// the keys and values, the activations, and what Python needs for its part of a step (GPT-2 124M, bf16: that part of a
// step takes 0.2 ms instead of 0.4).
enum class Stream { kCached, kFirst, kOnce };

constexpr int kPrefetchAhead = 4096;  // bytes

// What a tile that takes B once fetches into the second-level cache as well, bytes ahead. Without it, beyond the caches
// (AMD EPYC, Zen 4, two cores), 8 and 12 rows had 0.65 to 0.9 of the speed in fp32 and bf16: they work too long on a
// step to have enough of B on its way. One row had 0.93 to 0.98 in fp32, 0.9 to 0.97 in bf16, whole steps of decoding
// 0.84 (GPT-2 124M, bf16) to 0.95. Many rows: 8 KiB ahead are slower, 32 and 64 KiB as good; few rows: 2 to 6 KiB as
// good, 16 slower. No replacement for it, with 8 rows: the first-level hint further ahead, or without passing by.
constexpr int kFewTileRows = 4;
constexpr int far_ahead(int rows) { return rows <= kFewTileRows ? kPrefetchAhead : 16 * 1024; }

// What a tile fetches while it multiplies; any addresses will do. a: the next tile's block of A, as large as this
// one's. b: some of the block of B that comes next, b_step bytes with every step.
struct TileFetch {
  const float* a;
  const void* b;
  int64_t b_step;
};

// `steps` (at most kBlockSteps) steps of a tile of exactly kTileRows rows. Rows of A are fetched because twelve of a
// few lines each are too short for the hardware to see a pattern in (504 rows, 5120 -> 1024, two threads, fp32: 87 ->
// 94 % of the FMA peak).
template <int kTileRows, typename W, Stream kStream>
void tile(const float* a, const W* b, int64_t steps, float* c, TileFetch fetch) {
  constexpr int kPair = Operand<W>::kStep;  // elements of B per column and step
  constexpr int kPasses = kPanel / kTileColumns;
  constexpr int64_t kFetchStep = kTileRows * kRowStride<W> * int64_t{sizeof(float)} / (kBlockSteps<W> * kPasses);
  const char* next_a = reinterpret_cast<const char*>(fetch.a);
  const char* next_b = static_cast<const char*>(fetch.b);
  for (int first = 0; first < kPanel; first += kTileColumns) {
    Vec acc[kTileRows][kTileVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVecs; v++) acc[i][v] = zero();
    }
    const float* pa = a;
    const W* pb = b + first * kPair;
    for (int64_t s = 0; s < steps; s++) {
      if constexpr (kStream != Stream::kCached) {
        for (size_t line = 0; line < sizeof(W) * kPanel * kPair; line += 64) {
          const char* at = reinterpret_cast<const char*>(pb) + line;
          prefetch<kStream == Stream::kOnce>(at + kPrefetchAhead);
          if constexpr (kStream == Stream::kOnce) prefetch_to_second_level(at + far_ahead(kTileRows));
        }
      }
      if constexpr (kStream != Stream::kOnce) {
        for (int64_t line = 0; line < kFetchStep; line += 64) prefetch(next_a + line);
        prefetch_to_second_level(next_b);
        next_a += kFetchStep;
        next_b += fetch.b_step;
      }
      multiply_step<kTileRows>(pa, pb, acc);
      pa += Operand<W>::kUnits;
      pb += kPanel * kPair;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVecs; v++) {
        float* sum = c + i * kPanel + first + v * Vec::kWidth;
        store(sum, load(sum) + acc[i][v]);
      }
    }
  }
}

template <typename W>
using TileFunction = void (*)(const float*, const W*, int64_t, float*, TileFetch);

// The tile for 1 <= rows <= kRows.
template <typename W, Stream kStream = Stream::kCached>
ALULA_INLINE TileFunction<W> tile_for(int rows) {
  static_assert(kRows <= 12, "extend the table");
  static constexpr TileFunction<W> kTable[] = {
      nullptr,
      tile<1, W, kStream>,
      tile<2, W, kStream>,
      tile<3, W, kStream>,
      tile<4, W, kStream>,
#if defined(__AVX2__)
      tile<5, W, kStream>,
      tile<6, W, kStream>,
#endif
#if defined(__AVX512F__)
      tile<7, W, kStream>,
      tile<8, W, kStream>,
      tile<9, W, kStream>,
      tile<10, W, kStream>,
      tile<11, W, kStream>,
      tile<12, W, kStream>,
#endif
  };
  return kTable[rows];
}

}  // namespace alula::ALULA_ISA
