// What block-sparse attention on CUDA does before it multiplies: which tile and which chunk of a list a block of
// threads has, and the slots that the chunk's key blocks are, one after another. ops/block_sparse_attention_cuda.cu
// says the rest.
#pragma once

#include "cuda/attention_tile.cuh"
#include "ops/block_sparse_attention.h"

namespace alula::tiles {

// In the column of a slot: seen by pairs with a global token in them only.
constexpr int kTokensOnly = 1 << 30;

struct BlockSparseParams {
  BlockSparseAttentionArgs args;
  BlockSparseAttentionCudaArgs cuda;
  int block_shift;  // N = 1 << block_shift
  int block_tiles;  // tiles of a query block
  // A score is the plain product times `sign` (1, 0, -1) plus its slot's bias; it stands for 2^(score unit), unit > 0.
  float sign, unit;
};

// --- who does what -----------------------------------------------------------------------------------------------

struct Item {
  int batch, head;
  int grid, end;           // where the blocks of the batch row begin, where its tokens end
  int first_column, rows;  // of the tile
  int first_entry, count;  // of the chunk
  int chunk, num_chunks;   // of the list
  int64_t partial, step;   // number of the list's first partial, distance to the next
};

__device__ __forceinline__ int clamped(int x, int least, int most) { return x < least ? least : x > most ? most : x; }

// The item of this block of threads; false where the schedule names what does not exist.
template <typename C>
__device__ __forceinline__ bool find_item(const BlockSparseParams& p, Item& item) {
  const BlockSparseAttentionArgs& args = p.args;
  const BlockSparseAttentionCudaArgs& cuda = p.cuda;
  const int batch = static_cast<int>(cuda.batch), heads = static_cast<int>(args.num_heads);
  const int repeats = (cuda.plan_heads == 1 ? heads : 1) * (cuda.plan_batches == 1 ? batch : 1);
  int64_t rest = blockIdx.x;
  const int tile = static_cast<int>(rest % p.block_tiles);
  rest /= p.block_tiles;
  const int repeat = static_cast<int>(rest % repeats);
  const int64_t number = rest / repeats;
  const int32_t* row = cuda.schedule + number * kScheduleColumns;
  const int list = row[0], block = row[1];
  item.head = cuda.plan_heads == 1 ? repeat % heads : list % static_cast<int>(cuda.plan_heads);
  item.batch =
      cuda.plan_batches == 1 ? repeat / (cuda.plan_heads == 1 ? heads : 1) : list / static_cast<int>(cuda.plan_heads);
  item.first_entry = row[2], item.count = row[3], item.chunk = row[4], item.num_chunks = row[5];
  const bool is_there = list >= 0 && list < cuda.plan_batches * cuda.plan_heads && block >= 0 &&
                        block < cuda.num_blocks && item.count >= 0 && item.first_entry >= 0 &&
                        item.first_entry + static_cast<int64_t>(item.count) <= cuda.num_entries && item.chunk >= 0 &&
                        item.chunk < item.num_chunks && item.chunk <= number &&
                        (item.num_chunks == 1 || number - item.chunk + item.num_chunks <= cuda.num_partials);
  if (!is_there) return false;
  const int tokens = static_cast<int>(args.tokens), size = 1 << p.block_shift;
  item.grid = cuda.first == nullptr ? 0 : clamped(cuda.first[item.batch], 0, tokens);
  item.end = cuda.lengths == nullptr ? tokens : item.grid + clamped(cuda.lengths[item.batch], 0, tokens - item.grid);
  item.first_column = item.grid + (block << p.block_shift) + tile * C::kRows;
  item.rows = size < C::kRows ? size : C::kRows;
  item.step = static_cast<int64_t>(repeats) * p.block_tiles;
  item.partial = (number - item.chunk) * item.step + static_cast<int64_t>(repeat) * p.block_tiles + tile;
  return true;
}

__device__ __forceinline__ bool is_token(const BlockSparseParams& p, const Item& item, int column) {
  return column < item.end && (p.args.visible == nullptr || p.args.visible[item.batch * p.args.tokens + column] != 0);
}

__device__ __forceinline__ bool is_global(const BlockSparseParams& p, const Item& item, int column) {
  if (p.args.global_tokens == nullptr || column < 0) return false;
  return p.args.global_tokens[item.batch * p.args.global_stride + column - item.grid] != 0;
}

// --- tiles of slots ----------------------------------------------------------------------------------------------

struct TileFacts {
  bool is_seen = false;    // by a row of the block of threads
  bool is_marked = false;  // some rows see some of its slots only
  bool is_plain = false;   // every row sees every slot of it, once
  int first_column = -1;   // of the tile, where it is a part of one key block, and all of it are tokens

  // Nothing about single slots is asked for.
  __device__ __forceinline__ bool needs_slots() const { return !is_plain || first_column < 0; }
};

// Facts of the tile that begins with slot `first`. The same for all threads: each looks the entries up for itself.
template <typename C>
__device__ __forceinline__ TileFacts facts_of(const BlockSparseParams& p, const Item& item, int first,
                                              int last_column) {
  const int size = 1 << p.block_shift, run = size < C::kKeys ? size : C::kKeys;
  TileFacts facts;
  facts.is_plain = p.args.visible == nullptr && p.sign == 1.0f;
  for (int slot = first; slot < first + C::kKeys; slot += run) {
    const int index = slot >> p.block_shift;
    if (index >= item.count) {
      facts.is_plain = false;
      break;
    }
    const int32_t* entry = p.args.entries + 2 * static_cast<int64_t>(item.first_entry + index);
    const int block = entry[0];
    const bool exists = block >= 0 && block < p.cuda.num_blocks;
    const int begin = item.grid + (exists ? block << p.block_shift : 0) + (slot & (size - 1));
    if (!exists || (begin < item.end && (!p.args.causal || begin <= last_column))) facts.is_seen = true;
    if (entry[1] == 0 || (p.args.causal && begin + run - 1 > item.first_column)) facts.is_marked = true;
    const bool are_tokens = exists && begin + run <= item.end && p.args.visible == nullptr;
    if (run == C::kKeys && are_tokens && entry[1] > 0) facts.first_column = begin;
    if (!are_tokens || entry[1] != 1) facts.is_plain = false;
  }
  facts.is_plain &= !facts.is_marked;
  return facts;
}

// The next tile from slot `first` on that somebody sees; `past` where there is none.
template <typename C>
__device__ __forceinline__ int next_tile(const BlockSparseParams& p, const Item& item, int first, int past,
                                         int last_column, TileFacts& facts) {
  for (; first < past; first += C::kKeys) {
    facts = facts_of<C>(p, item, first, last_column);
    if (facts.is_seen) return first;
  }
  return past;
}

// Column (negative: nobody sees it) and bias of the tile's slots. An entry that does not exist makes NaN.
template <typename C>
__device__ __forceinline__ void describe_slots(const BlockSparseParams& p, const Item& item, int first,
                                               Shared<int> columns, Shared<float> biases) {
  const int thread = static_cast<int>(threadIdx.x), index = (first + thread) >> p.block_shift;
  if (thread >= C::kKeys) return;
  int column = -1;
  float bias = -INFINITY;
  if (index < item.count) {
    const int32_t* entry = p.args.entries + 2 * static_cast<int64_t>(item.first_entry + index);
    const int block = entry[0], count = entry[1];
    const int at = (first + thread) & ((1 << p.block_shift) - 1);
    if (block < 0 || block >= p.cuda.num_blocks || count < 0) {
      bias = NAN;
    } else if (count == 0 && p.args.global_tokens == nullptr) {
      // Nobody sees it: there are no global tokens.
    } else if (const int key = item.grid + (block << p.block_shift) + at; is_token(p, item, key)) {
      column = count == 0 ? key | kTokensOnly : key;
      bias = count > 1 ? log2f(static_cast<float>(count)) / p.unit : 0.0f;
    }
  }
  columns[thread] = column;
  biases[thread] = bias;
}

// Keys and values of the described slots; zeros where nobody sees them, and in the columns after D. The slots of a tile
// with a first column follow each other, and their columns are not looked up.
template <typename C>
__device__ __forceinline__ void load_slots(const BlockSparseParams& p, const typename C::Element* k,
                                           const typename C::Element* v, const TileFacts& facts, Shared<int> columns,
                                           Shared<typename C::Element> stage) {
  using T = typename C::Element;
  constexpr int kPacks = C::kD / C::kPack;
  const int head_dim = static_cast<int>(p.args.head_dim);
  const auto to = [&](int slot, int pack) {
    return stage + pack / kPacks * C::kKeyTileSize + slot * C::kStride + pack % kPacks * C::kPack;
  };
  const auto from = [&](int64_t column, int pack) -> const T* {
    const int64_t stride = pack < kPacks ? p.args.k_strides[2] : p.args.v_strides[2];
    return (pack < kPacks ? k : v) + pack % kPacks * C::kPack + column * stride;
  };
  const bool is_even = p.cuda.are_keys_even;
  if (facts.first_column >= 0) {
    copy_packs<C, C::kKeys, 2 * kPacks>(
        is_even, to, [&](int slot, int pack) { return from(facts.first_column + slot, pack); },
        [&](int, int pack) { return pack % kPacks * C::kPack < head_dim; });
  } else {
    copy_packs<C, C::kKeys, 2 * kPacks>(
        is_even, to, [&](int slot, int pack) { return from(columns[slot] & ~kTokensOnly, pack); },
        [&](int slot, int pack) { return columns[slot] >= 0 && pack % kPacks * C::kPack < head_dim; });
  }
}

template <typename C>
__device__ __forceinline__ void load_rows(const BlockSparseParams& p, const Item& item, Shared<int> rows,
                                          Shared<typename C::Element> q) {
  using T = typename C::Element;
  const int head_dim = static_cast<int>(p.args.head_dim);
  copy_packs<C, C::kRows, C::kD / C::kPack>(
      p.cuda.is_query_even, [&](int row, int pack) { return q + row * C::kStride + pack * C::kPack; },
      [&](int row, int pack) {
        const int64_t token = item.batch * p.args.tokens + rows[row];
        return static_cast<const T*>(p.args.q) + (token * p.args.num_heads + item.head) * head_dim + pack * C::kPack;
      },
      [&](int row, int pack) { return rows[row] >= 0 && pack * C::kPack < head_dim; });
}

}  // namespace alula::tiles
