// Attention of one to three query rows: the products of attention_tile.h on keys and values where they lie in the
// cache.
//
// The tile code writes transposed keys and a copy of the values, which pays when many rows use them; a row of multi-
// head decoding would wait for that most of the time. Here keys are transposed in registers and values are read row by
// row, each once, in address order.
//
// Per key tile and row
//   for groups of Vec::kWidth keys: squares of K transposed in registers, one chain of multiply-adds over d per key
//   softmax as in attention_tile.h
//   sums = alpha sums + beta p V, V row by row into registers
//
// Every operation and its order are those of the tile code, so a row has the same bits from either, and which of the
// two is used is a question of speed alone: a step of decoding gives the bits of the prefill of the same token.
//
// While a key tile's keys are read, every load fetches two lines of the tile that comes next, in address order, keys
// and values together. A step of GPT-2 124M spends, of what it spends on attention when the keys are fetched along with
// keys and the values along with values, 0.73 to 0.80 (fp32) and 0.90 (bf16, medians of steps that took turns; AMD
// EPYC, Zen 4, two cores; a cache in large pages, without which the two are alike); a step at 1000 tokens takes 1.15
// times one at 128 in fp32, 1.19 before (the bytes alone: 1.13). A core that reads in order, and does nothing else,
// has 1.4 to 1.9 times the rate of this: computing and fetching nearly add up. Slower: fetching lines with loads in
// bursts between the squares, every other line, by 128 bytes; keys and values of a block loaded in order before it is
// computed (bf16); asking 32 slots ahead. No faster: half of the transposition's last shuffles replaced by masked
// loads; values unpacked by two shuffles in place of widening; fetching into the first-level cache just before use. No
// different from memory, and with bits of its own: one register of sums per key, transposed at the end.
#pragma once

#include "cpu/attention_tile.h"

namespace alula::ALULA_ISA {

constexpr int kFewRows = 3;  // above, the tile code is faster

// Memory that this thread reads next, fetched line by line.
struct Ahead {
  const char* at;
  const char* last;  // its last byte; at: nothing to fetch

  template <int kLines>
  ALULA_INLINE void fetch() {
    for (int line = 0; line < kLines; line++) {
      prefetch(at);
      at = at + 64 < last ? at + 64 : last;  // no branch
    }
  }
  ALULA_INLINE void fetch_rest() const {
    for (const char* line = at; line < last; line += 64) prefetch(line);
  }
};

// Lines to fetch with a register of keys, so that a key tile's keys fetch as many keys and values.
template <typename W>
constexpr int kLinesAhead = Vec::kWidth * Units<W>::kStep * static_cast<int>(sizeof(W)) >= 64 ? 2 : 1;

// scores = q K^T * scale + bias for kGroups groups of Vec::kWidth keys from `slot` on; of the last group `keys` are
// there, the others repeat the last. Two groups at once are two chains, which hide each other's latency.
template <typename W, int kGroups>
ALULA_INLINE void dot_keys(const float* q, const KeyValues<W>& source, int64_t slot, int keys, Ahead& ahead, Vec scale,
                           Vec bias, float* scores) {
  const int64_t units = source.head_dim / Units<W>::kStep;
  Vec sums[kGroups];
  for (int g = 0; g < kGroups; g++) sums[g] = zero();
  for (int64_t unit = 0; unit < units; unit += Vec::kWidth) {
    const int lanes = static_cast<int>(units - unit < Vec::kWidth ? units - unit : Vec::kWidth);
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; g++) {
      const W* key = source.data + (slot + g * Vec::kWidth) * source.stride + unit * Units<W>::kStep;
      const int present = g == kGroups - 1 ? keys : Vec::kWidth;
      Vec rows[Vec::kWidth];
      if (present == Vec::kWidth && lanes == Vec::kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < Vec::kWidth; i++) {
          rows[i] = load_units(key + i * source.stride);
          ahead.fetch<kLinesAhead<W>>();
        }
        transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < Vec::kWidth; i++) sums[g] = multiply_units<W>(broadcast(q[unit + i]), rows[i], sums[g]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < Vec::kWidth; i++) {
          rows[i] = load_units(key + (i < present ? i : present - 1) * source.stride, lanes);
        }
        transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < Vec::kWidth; i++) {
          if (i < lanes) sums[g] = multiply_units<W>(broadcast(q[unit + i]), rows[i], sums[g]);
        }
      }
    }
  }
  for (int g = 0; g < kGroups; g++) store(scores + g * Vec::kWidth, fma(sums[g], scale, bias));
}

// sums [kVecs registers] = alpha sums + beta sum_j p[j] values[j]. p: units, as softmax_row leaves them.
template <typename W, int kVecs, bool kWhole>
ALULA_INLINE void add_values(const float* p, int keys, const W* values, ptrdiff_t stride, Ahead& ahead, int lanes,
                             float alpha, float beta, float* sums) {
  constexpr int kStep = Units<W>::kStep;
  Vec acc[kVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; v++) acc[v] = zero();
  int j = 0;
  for (; j + kStep <= keys; j += kStep) {
    const Vec x = broadcast(p[j / kStep]);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) {
      const W* value = values + j * stride + v * Vec::kWidth;
      acc[v] = multiply_units<W>(x, load_value_units<kWhole>(value, stride, true, lanes), acc[v]);
      if constexpr (kStep == 2) ahead.fetch<1>();  // what keys left; 5 % faster even where they left nothing
    }
  }
  if (j < keys) {
    const Vec x = broadcast(p[j / kStep]);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) {
      const W* value = values + j * stride + v * Vec::kWidth;
      acc[v] = multiply_units<W>(x, load_value_units<kWhole>(value, stride, false, lanes), acc[v]);
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
ALULA_INLINE int64_t add_column_groups(const float* p, int keys, const W* values, ptrdiff_t stride, Ahead& ahead,
                                       int64_t head_dim, int64_t column, float alpha, float beta, float* sums) {
  for (; column + kVecs * Vec::kWidth <= head_dim; column += kVecs * Vec::kWidth) {
    add_values<W, kVecs, true>(p, keys, values + column, stride, ahead, Vec::kWidth, alpha, beta, sums + column);
  }
  return column;
}

// Few rows meet a key tile: attend of attention_tile.h for query.rows <= kFewRows.
template <typename W>
void attend_few(const QueryTile& query, const KeyValues<W>& source, const KeyTile& tile, Ahead ahead) {
  constexpr int kGroup = Vec::kWidth;
  const int64_t d = query.head_dim;
  const Vec scale = broadcast(query.scale), bias = broadcast(tile.bias);
  alignas(64) float scores[kScoreStride];
  alignas(64) float maxima[16] = {}, denominators[16] = {}, alpha[16], beta[16];
  for (int row = 0; row < query.rows; row++) {
    const int64_t left = query.limits[row] - tile.first;
    if (left <= 0) continue;
    const int visible = static_cast<int>(left < tile.count ? left : tile.count);
    const float* q = query.q + row * kQueryStride;
    for (int key = 0; key < visible; key += 2 * kGroup) {
      const int64_t slot = tile.first + key;
      const int keys = visible - key < 2 * kGroup ? visible - key : 2 * kGroup;
      if (keys > kGroup) {
        dot_keys<W, 2>(q, source, slot, keys - kGroup, ahead, scale, bias, scores + key);
      } else {
        dot_keys<W, 1>(q, source, slot, keys, ahead, scale, bias, scores + key);
      }
    }
    if (query.mask.add) query.mask.add(query.mask.context, row, tile.first, visible, scores);
    softmax_row<Units<W>::kStep == 2>(scores, visible, visible, maxima, denominators);
    merge_weights(1, query.maxima + row, query.denominators + row, maxima, denominators, alpha, beta);

    const W* values = source.values + tile.first * source.value_stride;
    const ptrdiff_t stride = source.value_stride;
    float* sums = query.sums + row * sum_stride(d);
    int64_t column = add_column_groups<W, 8>(scores, visible, values, stride, ahead, d, 0, *alpha, *beta, sums);
    column = add_column_groups<W, 4>(scores, visible, values, stride, ahead, d, column, *alpha, *beta, sums);
    column = add_column_groups<W, 1>(scores, visible, values, stride, ahead, d, column, *alpha, *beta, sums);
    if (column < d) {
      const int lanes = static_cast<int>(d - column);
      add_values<W, 1, false>(scores, visible, values + column, stride, ahead, lanes, *alpha, *beta, sums + column);
    }
  }
  ahead.fetch_rest();
}

}  // namespace alula::ALULA_ISA
