// The tile code of attention: a tile of query rows walks tiles of keys, and softmax is taken as it goes.
//
//   out[i] = sum_j p_ij v_j / sum_j p_ij,   p_ij = exp(scale q_i.k_j + bias - max)
//
// A query tile is any list of query rows that read the same key/value head: all query heads of a group for some tokens,
// so that a key is read once for all of them. A key tile is up to kKeysAtOnce consecutive cache slots and a number that
// is added to its scores (log(n) counts its keys n times). Who calls decides which key tiles a query tile walks, and in
// which order; a row sees of a tile the keys below its limit.
//
// Per key tile
//   K is transposed into panels of 32 keys [D][32], V is copied into panels of 32 columns [keys][32]
//   for each block of kRows rows (in registers and first-level cache until the last line)
//     scores = Q K^T                  [rows][keys]
//     p = exp(scores - their max)     in place
//     sums = alpha sums + beta p V    alpha and beta bring the old and the new maximum together
// Memory: the tile's Q, sums and one packed key tile, all in the second-level cache; nothing grows with S. While the
// first block multiplies, the lines of the key tile that comes next are fetched.
//
// The first operand of a product is broadcast from rows where they lie (tile.h does the same), so p needs no packing.
//
// Every score is one chain of multiply-adds over ascending d, every sum one over ascending key; the key tiles of a row
// are merged in order, one after another. So a row's bits depend on its own query, keys and list of key tiles only;
// merging partial results (merge_rows) of single key tiles in order gives the same bits as walking them.
//
// Figures (AMD EPYC, Zen 4, one core of two, other work beside it; time of the thread; torch 2.13): prefill of 512
// tokens, causal
//   12 heads, D 64, multi-query    fp32 4.8 ms, 79 % of the FMA peak     bf16 2.9 ms, 64 % of the bf16-dot peak
//   12 heads, D 64, multi-head     fp32 5.4 ms, 70 %                     bf16 3.2 ms, 57 %
//   16 heads, D 128, multi-query   fp32 11.9 ms, 84 %                    bf16 6.7 ms, 73 %
// Of the block code, in bf16 at D 64, 65 % is products, 17 % exponentials, 7 % sums going to memory and back (perf).
// One decoding step, cache in memory, 1024 tokens, 12 heads, D 64, multi-query: fp32 72 us, bf16 44 us (without the
// fetching ahead 109 and 70). Slower: asking for the next keys while packing (fp32 112, bf16 59); exponentials to base
// e (prefill 5.2 and 3.0 ms).
#pragma once

#include "cpu/attention_pack.h"
#include "cpu/vec_math.h"

namespace alula::ALULA_ISA {

constexpr int kQueryStride = 256 + 16;  // of Q rows: the largest D; the odd line keeps rows in different cache sets
constexpr int kScoreStride = kKeysAtOnce + 16;  // of score rows; 16 more so that a full store may start at the last key
// The maximum of a row that has seen nothing: finite, so that differences are never inf - inf.
constexpr float kLowest = -3.402823466e38f;
static_assert(kScoreStride - kKeysAtOnce >= Vec::kWidth, "a full store that starts at the last key stays in its row");

// Adds the mask of keys first .. first + count - 1 to the scores of a row of the tile.
struct ScoreMask {
  void (*add)(const void* context, int row, int64_t first, int count, float* scores);  // null: no mask
  const void* context;
};

// Rows come in blocks of block_rows; the arrays have room for whole blocks. Rows beyond `rows` have limit 0.
struct QueryTile {
  int rows, block_rows;
  int64_t head_dim;
  float scale;
  ScoreMask mask;
  const float* q;         // units, [rows][kQueryStride]
  const int32_t* limits;  // [rows]: row i sees slots below limits[i]
  float* maxima;          // [rows], of the scores so far
  float* denominators;    // [rows], sums of p so far
  float* sums;            // [rows][sum_stride(D)], sums of p v so far
};

constexpr int64_t sum_stride(int64_t head_dim) { return (head_dim + kPanel - 1) / kPanel * kPanel; }

// Blocks of equal size that are even, so that half as many kernels do; the odd row is a dummy.
constexpr int block_rows_for(int rows) {
  const int blocks = (rows + kRows - 1) / kRows;
  const int even = ((rows + blocks - 1) / blocks + 1) / 2 * 2;
  return blocks == 0 ? 2 : even;
}
constexpr int padded_rows(int rows) {
  const int block = block_rows_for(rows);
  return (rows + block - 1) / block * block;
}

// --- softmax -----------------------------------------------------------------------------------------------------

// `visible` scores of a row become p, as float or (kPairs) as bf16 side by side; zeros follow up to `keys`. Hands back
// their max and sum. NaN scores do not touch the maximum and stay NaN, so they reach the sum.
template <bool kPairs>
ALULA_INLINE void softmax_row(float* scores, int visible, int keys, float* max_out, float* sum_out) {
  store(scores + visible, broadcast(-INFINITY));
  Vec highest = broadcast(kLowest);
  for (int j = 0; j < visible; j += Vec::kWidth) highest = max(load(scores + j), highest);
  const float row_max = reduce_max(highest);
  highest = broadcast(row_max);
  const Vec log2_e = broadcast(1.44269504088896341f);
  Vec sum = zero();
  int j = 0;
  for (; j < visible; j += Vec::kWidth) {
    const Vec p = exp2((load(scores + j) - highest) * log2_e);
    sum = sum + p;
    if constexpr (kPairs) {
      store(reinterpret_cast<bf16*>(scores) + j, p);
    } else {
      store(scores + j, p);
    }
  }
  for (; j < keys; j += Vec::kWidth) {
    if constexpr (kPairs) {
      store(reinterpret_cast<bf16*>(scores) + j, zero());
    } else {
      store(scores + j, zero());
    }
  }
  *max_out = row_max;
  *sum_out = reduce_add(sum);
}

// Joins maxima and denominators of two halves of `count` rows into those of the first; alpha and beta are what the sums
// of the first and the second are to be multiplied with. Whole registers are read and written.
ALULA_INLINE void merge_weights(int count, float* maxima, float* denominators, const float* new_maxima,
                                const float* new_denominators, float* alpha, float* beta) {
  for (int i = 0; i < count; i += Vec::kWidth) {
    const Vec old_max = load(maxima + i), new_max = load(new_maxima + i);
    const Vec both = max(old_max, new_max);
    const Vec a = exp_of_negative(old_max - both), b = exp_of_negative(new_max - both);
    store(alpha + i, a);
    store(beta + i, b);
    const int lanes = count - i < Vec::kWidth ? count - i : Vec::kWidth;
    store(denominators + i, fma(load(new_denominators + i), b, load(denominators + i) * a), lanes);
    store(maxima + i, both, lanes);
  }
}

// --- one key tile for one block of rows --------------------------------------------------------------------------

struct PackedKeyTile {
  KeyTile tile;
  const float* k;  // pack_keys
  const float* v;  // pack_values
};

// A walk through memory that is needed next, a few lines with every step of a product: a product of few rows waits for
// no memory, so it is the time to fetch the next key tile.
struct FetchAhead {
  const char* at;
  ptrdiff_t step;  // 0: nothing to fetch, at is any address
};

// Bytes to fetch with a step so that one block's products fetch as much cache as they multiply.
template <typename W>
constexpr int kFetchBytes = kTileColumns * Units<W>::kStep * static_cast<int>(sizeof(W));

// acc[row][vec] += a[row][0 .. steps) b[0 .. steps)[kVecs registers], a with kStride units from row to row. fetch:
// null, or what each step fetches.
template <typename W, int kStride, int kTileRows, int kVecs>
ALULA_INLINE void accumulate_rows(const float* a, const float* b, int64_t steps, Vec (&acc)[kTileRows][kVecs],
                                  FetchAhead* fetch) {
  for (int64_t s = 0; s < steps; s++) {
    if (fetch != nullptr) {  // known where this is inlined
      for (int byte = 0; byte < kFetchBytes<W>; byte += 64) prefetch(fetch->at + byte);
      fetch->at += fetch->step;
    }
    Vec column[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) column[v] = load(b + v * Vec::kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++) {
      const Vec x = broadcast(a[i * kStride]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; v++) acc[i][v] = multiply_units<W>(x, column[v], acc[i][v]);
    }
    a++;
    b += kPanel;
  }
}

template <int kTileRows, int kVecs>
ALULA_INLINE void clear(Vec (&acc)[kTileRows][kVecs]) {
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) acc[i][v] = zero();
  }
}

// done(row, vec, sum) for every register of a tile.
template <int kTileRows, int kVecs, typename Done>
ALULA_INLINE void for_each_sum(const Vec (&acc)[kTileRows][kVecs], const Done& done) {
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; v++) done(i, v, acc[i][v]);
  }
}

// done(row, vec, sum) gets a[row][0 .. steps) b[0 .. steps)[kVecs registers].
template <typename W, int kTileRows, int kVecs, int kStride, typename Done>
ALULA_INLINE void multiply_rows(const float* a, const float* b, int64_t steps, FetchAhead* fetch, const Done& done) {
  Vec acc[kTileRows][kVecs];
  clear(acc);
  accumulate_rows<W, kStride>(a, b, steps, acc, fetch);
  for_each_sum(acc, done);
}

template <typename W, int kTileRows>
void attend_block(const QueryTile& query, int row, const PackedKeyTile& keys, FetchAhead fetch) {
  constexpr bool kPairs = Units<W>::kStep == 2;
  const int64_t units = query.head_dim / Units<W>::kStep;
  int visible[kTileRows], most = 0;
  for (int i = 0; i < kTileRows; i++) {
    const int64_t n = query.limits[row + i] - keys.tile.first;
    visible[i] = static_cast<int>(n < 0 ? 0 : n < keys.tile.count ? n : keys.tile.count);
    most = visible[i] > most ? visible[i] : most;
  }
  if (most == 0) return;

  alignas(64) float scores[kTileRows * kScoreStride];
  const Vec scale = broadcast(query.scale), bias = broadcast(keys.tile.bias);
  for (int key = 0; key < most; key += kTileColumns) {
    const float* k = keys.k + key / kPanel * units * kPanel + key % kPanel;
    multiply_rows<W, kTileRows, kTileVecs, kQueryStride>(
        query.q + row * kQueryStride, k, units, &fetch, [&](int i, int v, Vec sum) {
          store(scores + i * kScoreStride + key + v * Vec::kWidth, fma(sum, scale, bias));
        });
  }

  alignas(64) float maxima[16], denominators[16], alpha[16], beta[16];
  for (int i = 0; i < kTileRows; i++) {
    float* s = scores + i * kScoreStride;
    // Rows that fill up the block see nothing, and are none that the mask knows.
    if (query.mask.add && visible[i] > 0) query.mask.add(query.mask.context, row + i, keys.tile.first, visible[i], s);
    softmax_row<kPairs>(s, visible[i], most, maxima + i, denominators + i);
  }
  for (int i = kTileRows; i < 16; i++) maxima[i] = denominators[i] = 0;
  merge_weights(kTileRows, query.maxima + row, query.denominators + row, maxima, denominators, alpha, beta);

  const int64_t stride = sum_stride(query.head_dim);
  float* sums = query.sums + row * stride;
  const int64_t steps = (most + Units<W>::kStep - 1) / Units<W>::kStep;
  for (int64_t column = 0; column < query.head_dim; column += kTileColumns) {
    const float* v = keys.v + column / kPanel * kValuePanelSize + column % kPanel;
    const auto add = [&](int i, int vec, Vec sum) {
      float* to = sums + i * stride + column + vec * Vec::kWidth;
      store(to, fma(sum, broadcast(beta[i]), load(to) * broadcast(alpha[i])));
    };
    if (query.head_dim - column > Vec::kWidth) {
      multiply_rows<W, kTileRows, kTileVecs, kScoreStride>(scores, v, steps, &fetch, add);
    } else {
      multiply_rows<W, kTileRows, 1, kScoreStride>(scores, v, steps, &fetch, add);
    }
  }
}

template <typename W>
using BlockFunction = void (*)(const QueryTile&, int, const PackedKeyTile&, FetchAhead);

template <typename W>
ALULA_INLINE BlockFunction<W> block_for(int block_rows) {
  static_assert(kRows <= 12 && kRows % 2 == 0, "extend the table");
  static constexpr BlockFunction<W> kTable[] = {
      nullptr,
      attend_block<W, 2>,
      attend_block<W, 4>,
#if defined(__AVX2__)
      attend_block<W, 6>,
#endif
#if defined(__AVX512F__)
      attend_block<W, 8>,
      attend_block<W, 10>,
      attend_block<W, 12>,
#endif
  };
  return kTable[block_rows / 2];
}

// --- a query tile ------------------------------------------------------------------------------------------------

constexpr int64_t packed_tile_size(int64_t head_dim) {  // floats of pack_keys and pack_values together
  return kKeysAtOnce * head_dim + sum_stride(head_dim) / kPanel * kValuePanelSize;
}

// A query tile meets a key tile. packed: packed_tile_size floats of working memory; next: the key tile that this thread
// will probably want after this one, or null.
template <typename W>
void attend(const QueryTile& query, const KeyValues<W>& source, const KeyTile& tile, const KeyTile* next,
            float* packed) {
  int64_t most = 0;
  for (int i = 0; i < query.rows; i++) most = query.limits[i] > most ? query.limits[i] : most;
  if (most <= tile.first) return;
  PackedKeyTile keys = {tile, packed, packed + kKeysAtOnce * source.head_dim};
  if (most - tile.first < tile.count) keys.tile.count = static_cast<int>(most - tile.first);
  pack_keys(source, keys.tile, packed);
  pack_values(source, keys.tile, packed + kKeysAtOnce * source.head_dim);
  const BlockFunction<W> block = block_for<W>(query.block_rows);
  // Only from where slots follow one another, as they do in a cache; the first block's products do it.
  FetchAhead fetch = {reinterpret_cast<const char*>(query.q), 0};
  if (next != nullptr && next->count > 0 && source.stride == 2 * source.head_dim) {
    fetch.at = reinterpret_cast<const char*>(source.data + next->first * source.stride);
    fetch.step = (kFetchBytes<W> * next->count + kKeysAtOnce - 1) / kKeysAtOnce;
  }
  for (int row = 0; row < query.rows; row += query.block_rows) {
    block(query, row, keys, fetch);
    fetch.step = 0;
  }
}

// What a tile is before its first key.
inline void clear(const QueryTile& query) {
  const int rows = padded_rows(query.rows);
  for (int i = 0; i < rows; i++) {
    query.maxima[i] = kLowest;
    query.denominators[i] = 0;
  }
  std::memset(query.sums, 0, static_cast<size_t>(rows * sum_stride(query.head_dim)) * sizeof(float));
}

// Adds what `part` (the same rows) has seen to what `query` has seen.
inline void merge_rows(const QueryTile& query, const QueryTile& part) {
  const int64_t stride = sum_stride(query.head_dim);
  for (int row = 0; row < query.rows; row += 16) {
    const int count = query.rows - row < 16 ? query.rows - row : 16;
    alignas(64) float maxima[16] = {}, denominators[16] = {}, alpha[16], beta[16];
    for (int i = 0; i < count; i++) {
      maxima[i] = part.maxima[row + i];
      denominators[i] = part.denominators[row + i];
    }
    merge_weights(count, query.maxima + row, query.denominators + row, maxima, denominators, alpha, beta);
    for (int i = 0; i < count; i++) {
      float* sums = query.sums + (row + i) * stride;
      const float* more = part.sums + (row + i) * stride;
      for (int64_t column = 0; column < stride; column += Vec::kWidth) {
        store(sums + column, fma(load(more + column), broadcast(beta[i]), load(sums + column) * broadcast(alpha[i])));
      }
    }
  }
}

}  // namespace alula::ALULA_ISA
