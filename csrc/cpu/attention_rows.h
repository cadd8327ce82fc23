// Attention of one to three query rows: dot products with keys where they lie in the cache, no packing.
//
// The tile code (attention_tile.h) transposes K and copies V, which pays when many rows use them; a row of multi-head
// decoding would wait for that most of the time. Here a thread reads each key and value once, in address order, and
// runs at the speed of the memory they come from.
//
// Per key tile
//   for each group of Vec::kWidth keys: one register of sums per key, lane by lane over D; transposed and added up at the end
//   softmax as in attention_tile.h
//   sums = alpha sums + beta p V, V row by row into registers
//
// A row's bits depend on its own query, keys and key tiles only; they differ from the tile code's, which sums over D in one
// chain. Which of the two a row takes must therefore not depend on its batch mates.
#pragma once

#include "cpu/attention_tile.h"

namespace alula::ALULA_ISA {

constexpr int kFewRows = 3;  // above, the tile code is faster

// Lane i of the result is the sum of the lanes of rows[i].
ALULA_INLINE Vec sum_lanes(Vec (&rows)[Vec::kWidth]) {
  transpose(rows);
#pragma GCC unroll 4
  for (int half = Vec::kWidth / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) rows[i] = rows[i] + rows[i + half];
  }
  return rows[0];
}

// q . k for Vec::kWidth keys, of which the first `keys` are there; the others repeat the last.
template <typename W>
ALULA_INLINE Vec dot_keys(const float* q, const KeyValues<W>& source, int64_t slot, int keys) {
  constexpr int kGroup = Vec::kWidth < 8 ? Vec::kWidth : 8;  // sums at once: enough to hide the latency, few enough to address
  const int64_t units = source.head_dim / Units<W>::kStep;
  Vec sums[Vec::kWidth];
#pragma GCC unroll 2
  for (int first = 0; first < Vec::kWidth; first += kGroup) {
    const W* key[kGroup];
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; i++) {
      key[i] = source.data + (slot + (first + i < keys ? first + i : keys - 1)) * source.stride;
      sums[first + i] = zero();
    }
    int64_t unit = 0;
    for (; unit + Vec::kWidth <= units; unit += Vec::kWidth) {
      const Vec x = load(q + unit);
#pragma GCC unroll 8
      for (int i = 0; i < kGroup; i++) {
        sums[first + i] = multiply_units<W>(load_units(key[i] + unit * Units<W>::kStep), x, sums[first + i]);
      }
    }
    if (unit < units) {
      const int lanes = static_cast<int>(units - unit);
      const Vec x = load(q + unit, lanes);
#pragma GCC unroll 8
      for (int i = 0; i < kGroup; i++) {
        sums[first + i] = multiply_units<W>(load_units(key[i] + unit * Units<W>::kStep, lanes), x, sums[first + i]);
      }
    }
  }
  return sum_lanes(sums);
}

// sums [kVecs registers] = alpha sums + beta sum_j p[j] values[j]
template <typename W, int kVecs, bool kWhole>
ALULA_INLINE void add_values(const float* p, int keys, const W* values, ptrdiff_t stride, int lanes, float alpha, float beta,
                             float* sums) {
  Vec acc[kVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; v++) acc[v] = zero();
  for (int j = 0; j < keys; j++) {
    const Vec x = broadcast(p[j]);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) {
      const W* from = values + j * stride + v * Vec::kWidth;
      acc[v] = fma(x, kWhole ? load(from) : load(from, lanes), acc[v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; v++) {
    float* to = sums + v * Vec::kWidth;
    store(to, fma(acc[v], broadcast(beta), load(to) * broadcast(alpha)));
  }
}

// The columns from `column` on that fill groups of kVecs registers; hands back where the rest begins.
template <typename W, int kVecs>
ALULA_INLINE int64_t add_column_groups(const float* p, int keys, const W* values, ptrdiff_t stride, int64_t head_dim,
                                       int64_t column, float alpha, float beta, float* sums) {
  for (; column + kVecs * Vec::kWidth <= head_dim; column += kVecs * Vec::kWidth) {
    add_values<W, kVecs, true>(p, keys, values + column, stride, Vec::kWidth, alpha, beta, sums + column);
  }
  return column;
}

// Few rows meet a key tile: attend of attention_tile.h for query.rows <= kFewRows.
template <typename W>
void attend_few(const QueryTile& query, const KeyValues<W>& source, const KeyTile& tile) {
  const int64_t d = query.head_dim;
  alignas(64) float scores[kScoreStride];
  alignas(64) float maxima[16] = {}, denominators[16] = {}, alpha[16], beta[16];
  for (int row = 0; row < query.rows; row++) {
    const int64_t left = query.limits[row] - tile.first;
    if (left <= 0) continue;
    const int visible = static_cast<int>(left < tile.count ? left : tile.count);
    const float* q = query.q + row * kQueryStride;
    const Vec scale = broadcast(query.scale), bias = broadcast(tile.bias);
    for (int key = 0; key < visible; key += Vec::kWidth) {
      store(scores + key, fma(dot_keys(q, source, tile.first + key, visible - key), scale, bias));
    }
    if (query.mask.add) query.mask.add(query.mask.context, row, tile.first, visible, scores);
    softmax_row<false>(scores, visible, visible, maxima, denominators);
    merge_weights(1, query.maxima + row, query.denominators + row, maxima, denominators, alpha, beta);

    const W* values = source.data + tile.first * source.stride + d;
    float* sums = query.sums + row * sum_stride(d);
    int64_t column = add_column_groups<W, 8>(scores, visible, values, source.stride, d, 0, *alpha, *beta, sums);
    column = add_column_groups<W, 4>(scores, visible, values, source.stride, d, column, *alpha, *beta, sums);
    column = add_column_groups<W, 1>(scores, visible, values, source.stride, d, column, *alpha, *beta, sums);
    if (column < d) {
      add_values<W, 1, false>(scores, visible, values + column, source.stride, static_cast<int>(d - column), *alpha, *beta,
                              sums + column);
    }
  }
}

}  // namespace alula::ALULA_ISA
