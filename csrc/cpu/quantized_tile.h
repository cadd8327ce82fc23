// quantized_tile: C[rows][32] += A[rows][block of K] B[block of K][32] for 8-bit activations and a quantized panel.
//
// Operands
//   A  rows of 8-bit integers, kActivationStride bytes apart (ActivationBlock): one block of 256 k of a row of X, with
//   a
//      scale and the sum of its integers for each group of K.
//   B  the same block of a panel (weight_format.h), its codes as they lie in memory, or unpacked to bytes.
//   C  fp32 [rows][32].
//
// For each group: sums of integers, exact, from -zero * sum(a) so that codes count from their zero; then
//   C = fma(float(sum), weight scale * activation scale, C)      (and with a least value: + least * scale * sum(a))
// Each element of C is one chain of such steps over ascending groups, whatever the number of rows, and integers know no
// order: a row's result is bit for bit the same alone and in a batch, and from packed and unpacked codes.
#pragma once

#include "cpu/int_dot.h"
#include "cpu/tile.h"
#include "cpu/weight_format.h"

namespace alula::ALULA_ISA {

constexpr int64_t kActivationBlock = 256;  // of K; int8 weights: what shares an activation's scale
constexpr int64_t kMaxGroups = kActivationBlock / 32;

struct ActivationBlock {
  Activation8 k[kActivationBlock];
  float scale[kMaxGroups];
  int32_t sum[kMaxGroups];
};
constexpr int64_t kActivationStride = sizeof(ActivationBlock);
static_assert(kActivationStride % 64 == 0, "rows begin on cache lines");

// A block of a panel as a tile sees it.
struct PanelBlock {
  const uint8_t* codes;   // of the first group
  int64_t codes_stride;   // bytes from a group to the next
  const uint8_t* scales;  // [32] of the first group
  int64_t scales_stride;
  const uint8_t* least;  // as scales; null: codes count from `zero`
  int32_t zero;
  int groups;
  int steps;  // of 4 k in a group
};

// Where codes and scales come from. vec: columns [vec * Vec::kWidth, ...) of step `codes`.
struct BytesRowScale {  // int8 in place
  using Scale = float;
  static constexpr int64_t kStep = kStepBytes8;
  static ALULA_INLINE Bytes load(const uint8_t* codes, int vec) {
    return load_bytes(codes + vec * int64_t{sizeof(Bytes)});
  }
};
struct BytesGroupScale {  // 4-bit codes, unpacked before
  using Scale = f16;
  static constexpr int64_t kStep = kStepBytes8;
  static ALULA_INLINE Bytes load(const uint8_t* codes, int vec) {
    return load_bytes(codes + vec * int64_t{sizeof(Bytes)});
  }
};
struct Nibbles {  // int4 in place
  using Scale = f16;
  static constexpr int64_t kStep = kStepBytes4;
  static ALULA_INLINE Bytes load(const uint8_t* codes, int vec) {
    constexpr int kHalf = 16 / Vec::kWidth;
    const Bytes both = load_bytes(codes + vec % kHalf * int64_t{sizeof(Bytes)});
    return vec < kHalf ? low_nibbles(both) : high_nibbles(both);
  }
};
struct TableNibbles {  // nf4 in place
  using Scale = f16;
  static constexpr int64_t kStep = kStepBytes4;
  static ALULA_INLINE Bytes load(const uint8_t* codes, int vec) {
    return look_up(kNf4Codes, Nibbles::load(codes, vec));
  }
};

// kStream: as of tile.h. Few rows that take B once leave its fetching to the hardware.
template <int kTileRows, typename Source, Stream kStream>
void quantized_tile(const uint8_t* a, const PanelBlock& b, float* c) {
  using Scale = typename Source::Scale;
  constexpr bool kFetchesFar = kStream == Stream::kOnce && kTileRows > kFewTileRows;
  const auto row_of = [a](int i) { return reinterpret_cast<const ActivationBlock*>(a + i * kActivationStride); };
#pragma GCC unroll 1
  for (int first = 0; first < kPanel / Vec::kWidth; first += kTileVecs) {
#pragma GCC unroll 1
    for (int group = 0; group < b.groups; group++) {
      Ints acc[kTileRows][kTileVecs];
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; i++) {
        const Ints start = broadcast_int(-b.zero * row_of(i)->sum[group]);
#pragma GCC unroll 8
        for (int v = 0; v < kTileVecs; v++) acc[i][v] = start;
      }
      const uint8_t* codes = b.codes + group * b.codes_stride;
      const uint8_t* k = a + group * b.steps * int64_t{4 * sizeof(Activation8)};
      if constexpr (kStream == Stream::kFirst) prefetch(b.scales + group * b.scales_stride + kPrefetchAhead);
#pragma GCC unroll 4
      for (int s = 0; s < b.steps; s++) {
        if constexpr (kStream == Stream::kFirst || kFetchesFar) {
          if (kTileVecs * Vec::kWidth == kPanel || first == 0) {
#pragma GCC unroll 2
            for (int64_t line = 0; line < Source::kStep; line += 64) {
              prefetch<kFetchesFar>(codes + kPrefetchAhead + line);
              if constexpr (kFetchesFar) prefetch_to_second_level(codes + far_ahead(kTileRows) + line);
            }
          }
        }
        Codes column[kTileVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kTileVecs; v++) column[v] = codes_of(Source::load(codes, first + v));
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; i++) {
          const auto* x = reinterpret_cast<const Activation8*>(k + i * kActivationStride);
#pragma GCC unroll 8
          for (int v = 0; v < kTileVecs; v++) acc[i][v] = dot(acc[i][v], column[v], x);
        }
        codes += Source::kStep;
        k += 4 * sizeof(Activation8);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kTileVecs; v++) {
        const int64_t column = (first + v) * Vec::kWidth;
        const Vec scale = load(reinterpret_cast<const Scale*>(b.scales + group * b.scales_stride) + column);
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; i++) {
          float* sum = c + i * kPanel + column;
          store(sum, fma(to_float(acc[i][v]), scale * broadcast(row_of(i)->scale[group]), load(sum)));
        }
        if (b.least) {
          const Vec least = load(reinterpret_cast<const Scale*>(b.least + group * b.scales_stride) + column);
#pragma GCC unroll 16
          for (int i = 0; i < kTileRows; i++) {
            float* sum = c + i * kPanel + column;
            const float of_row = row_of(i)->scale[group] * static_cast<float>(row_of(i)->sum[group]);
            store(sum, fma(least, broadcast(of_row), load(sum)));
          }
        }
      }
    }
  }
}

using QuantizedTile = void (*)(const uint8_t*, const PanelBlock&, float*);

// The tile for 1 <= rows <= kRows.
template <typename Source, Stream kStream>
ALULA_INLINE QuantizedTile quantized_tile_for(int rows) {
  static_assert(kRows <= 12, "extend the table");
  static constexpr QuantizedTile kTable[] = {
      nullptr,
      quantized_tile<1, Source, kStream>,
      quantized_tile<2, Source, kStream>,
      quantized_tile<3, Source, kStream>,
      quantized_tile<4, Source, kStream>,
#if defined(__AVX2__)
      quantized_tile<5, Source, kStream>,
      quantized_tile<6, Source, kStream>,
#endif
#if defined(__AVX512F__)
      quantized_tile<7, Source, kStream>,
      quantized_tile<8, Source, kStream>,
      quantized_tile<9, Source, kStream>,
      quantized_tile<10, Source, kStream>,
      quantized_tile<11, Source, kStream>,
      quantized_tile<12, Source, kStream>,
#endif
  };
  return kTable[rows];
}

}  // namespace alula::ALULA_ISA
