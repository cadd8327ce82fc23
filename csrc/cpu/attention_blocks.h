// Block-sparse attention: a tile of query rows meets several packed key blocks at once.
//
//   scores = Q K^T over all keys of the blocks   [rows][blocks * N], each with its key's bias
//   p = exp(scores - their max)                  one softmax over all of them
//   sums = alpha sums + beta p V                 p V stays in registers over all blocks
//
// A query block of a sparse pattern has a short list of key blocks (five of 64 in BigBird's evaluation pattern).
// Meeting them one by one, as attention_tile.h does with its key tiles, would write the sums to memory and scale them
// with each block; here a list of up to kKeysOfChunk(D) keys costs that once. What is multiplied, how it is packed and
// how results are merged is attention_tile.h's.
//
// The bias of a key is log(count) of its block, or -inf where it is not visible (such keys are packed as zeros, so
// whatever lies there has no influence). Blocks in which rows differ in what they see (causal, global tokens) are
// marked, and the scores of their invisible pairs are replaced by -inf.
//
// Figures (AMD EPYC, Zen 4, 2 cores; torch 2.13): 4096 tokens, 12 heads, D 64, N 64, five blocks a row: fp32 30.0 ms,
// 183 GFLOP/s, 79 % of the FMA peak; bf16 17 ms, 320 GFLOP/s, 68 % of the bf16-dot peak. No faster: blocks that all lie
// in the first-level cache (so what streams from the second is no limit), fetching the lines that a tile's results go
// to, tiles by descending cost in place of head by head.
#pragma once

#include "cpu/attention_tile.h"

namespace alula::ALULA_ISA {

constexpr int kMostKeysOfChunk = 512;
constexpr int kMostBlocksOfChunk = kMostKeysOfChunk / 16;
constexpr int kChunkStride = kMostKeysOfChunk + 16;  // of score rows, as kScoreStride

// Keys of a chunk: their packed form stays in the second-level cache. A multiple of every block size.
constexpr int keys_of_chunk(int64_t head_dim) { return head_dim <= 64 ? 512 : head_dim <= 128 ? 256 : 128; }

struct BlockChunk {
  int num_blocks, block_size;
  const float* k[kMostBlocksOfChunk];  // pack_keys
  const float* v[kMostBlocksOfChunk];  // pack_values, panels block_size * kPanel / kStep apart
  const float* bias;                   // [num_blocks * block_size]
  bool is_marked[kMostBlocksOfChunk];
  // Replaces the scores of pairs of row `row` and block `block` that do not see each other, in marked blocks.
  void (*hide)(const void* context, int row, int block, float* scores);
  const void* context;
};

// The heights that rows are cut into: even, at most kRows, their sum the rows rounded up to even.
struct RowCuts {
  int num_tiles, num_pairs;
  explicit constexpr RowCuts(int rows) : num_tiles((rows + kRows - 1) / kRows), num_pairs((rows + 1) / 2) {}
  constexpr int begin(int tile) const { return num_pairs * tile / num_tiles * 2; }
};

template <typename W, int kTileRows>
void attend_chunk(const QueryTile& query, int row, const BlockChunk& chunk) {
  constexpr int kStep = Units<W>::kStep;
  const int n = chunk.block_size, keys = chunk.num_blocks * n;
  const int64_t units = query.head_dim / kStep;
  const float* q = query.q + row * kQueryStride;

  alignas(64) float scores[kTileRows * kChunkStride];
  const Vec scale = broadcast(query.scale);
  for (int block = 0; block < chunk.num_blocks; block++) {
    const float* k = chunk.k[block];
    for (int key = 0; key < n; key += kTileColumns) {
      const float* bias = chunk.bias + block * n + key;
      float* to = scores + block * n + key;
      const auto put = [&](int i, int v, Vec sum) {
        store(to + i * kChunkStride + v * Vec::kWidth, fma(sum, scale, load(bias + v * Vec::kWidth)));
      };
      const float* panel = k + key / kPanel * units * kPanel + key % kPanel;
      if (n - key > Vec::kWidth) {
        multiply_rows<W, kTileRows, kTileVecs, kQueryStride>(q, panel, units, nullptr, put);
      } else {
        multiply_rows<W, kTileRows, 1, kQueryStride>(q, panel, units, nullptr, put);
      }
    }
    if (chunk.is_marked[block]) {
      for (int i = 0; i < kTileRows && row + i < query.rows; i++) {
        chunk.hide(chunk.context, row + i, block, scores + i * kChunkStride + block * n);
      }
    }
  }

  alignas(64) float maxima[16], denominators[16], alpha[16], beta[16];
  for (int i = 0; i < kTileRows; i++) {
    softmax_row<kStep == 2>(scores + i * kChunkStride, keys, keys, maxima + i, denominators + i);
  }
  for (int i = kTileRows; i < 16; i++) maxima[i] = denominators[i] = 0;
  merge_weights(kTileRows, query.maxima + row, query.denominators + row, maxima, denominators, alpha, beta);

  const int64_t stride = sum_stride(query.head_dim);
  const int64_t steps = n / kStep, panel_size = steps * kPanel;
  float* sums = query.sums + row * stride;
  for (int64_t column = 0; column < query.head_dim; column += kTileColumns) {
    const auto multiply = [&](auto& acc) {
      clear(acc);
      for (int block = 0; block < chunk.num_blocks; block++) {
        const float* v = chunk.v[block] + column / kPanel * panel_size + column % kPanel;
        accumulate_rows<W, kChunkStride>(scores + block * steps, v, steps, acc, nullptr);
      }
      for_each_sum(acc, [&](int i, int vec, Vec sum) {
        float* to = sums + i * stride + column + vec * Vec::kWidth;
        store(to, fma(sum, broadcast(beta[i]), load(to) * broadcast(alpha[i])));
      });
    };
    if (query.head_dim - column > Vec::kWidth) {
      Vec acc[kTileRows][kTileVecs];
      multiply(acc);
    } else {
      Vec acc[kTileRows][1];
      multiply(acc);
    }
  }
}

template <typename W>
using ChunkFunction = void (*)(const QueryTile&, int, const BlockChunk&);

template <typename W>
ALULA_INLINE ChunkFunction<W> chunk_for(int tile_rows) {
  static_assert(kRows <= 12 && kRows % 2 == 0, "extend the table");
  static constexpr ChunkFunction<W> kTable[] = {
      nullptr,
      attend_chunk<W, 2>,
      attend_chunk<W, 4>,
#if defined(__AVX2__)
      attend_chunk<W, 6>,
#endif
#if defined(__AVX512F__)
      attend_chunk<W, 8>,
      attend_chunk<W, 10>,
      attend_chunk<W, 12>,
#endif
  };
  return kTable[tile_rows / 2];
}

// Rows of memory that are needed next, fetched into the second-level cache a share at a time: products wait for no
// memory, packing does.
class FetchList {
 public:
  void add(const void* rows, int64_t num_rows, int64_t row_bytes, int64_t stride_bytes) {
    if (num_ranges_ == kMostRanges || num_rows <= 0) return;
    const int64_t lines = (row_bytes + 63) / 64;
    ranges_[num_ranges_++] = {static_cast<const char*>(rows), stride_bytes, lines, num_rows};
    total_ += num_rows * lines;
  }

  // Part `part` of `parts`, in order; whole rows.
  void fetch(int part, int parts) {
    for (const int64_t until = total_ * (part + 1) / parts; done_ < until && range_ < num_ranges_;) {
      Range& range = ranges_[range_];
      for (int64_t line = 0; line < range.lines; line++) prefetch_to_second_level(range.at + line * 64);
      range.at += range.stride;
      done_ += range.lines;
      if (--range.num_rows == 0) range_++;
    }
  }

 private:
  struct Range {
    const char* at;
    ptrdiff_t stride;
    int64_t lines, num_rows;
  };
  static constexpr int kMostRanges = 24;
  Range ranges_[kMostRanges];
  int num_ranges_ = 0, range_ = 0;
  int64_t total_ = 0, done_ = 0;  // lines
};

// A query tile meets a chunk.
template <typename W>
void attend(const QueryTile& query, const BlockChunk& chunk, FetchList& next) {
  const RowCuts cuts(query.rows);
  for (int tile = 0; tile < cuts.num_tiles; tile++) {
    const int row = cuts.begin(tile);
    next.fetch(tile, cuts.num_tiles);
    chunk_for<W>(cuts.begin(tile + 1) - row)(query, row, chunk);
  }
}

}  // namespace alula::ALULA_ISA
