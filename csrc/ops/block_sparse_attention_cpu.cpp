// block_sparse_attention on the CPU: tiles of query blocks over lists of key blocks, by cpu/attention_blocks.h.
//
// A thread owns tiles of one head, or one chunk of a tile. It gathers the queries of the tile's tokens, walks the list
// in chunks, divides and writes. Packed key blocks are kept in slots: neighbouring query blocks have most of their
// window and all global blocks in common, so that most blocks are packed once for a run of tiles. The slot that was
// used longest ago is taken for a new block; there are enough of them for a chunk. Memory of a thread: Q and sums of
// one tile, and about half a MiB of packed blocks.
#include "ops/block_sparse_attention.h"

#include "core/dispatch.h"
#include "cpu/attention_blocks.h"

namespace alula::ALULA_ISA {
namespace {

constexpr int kMaxRows = 192;
constexpr int64_t kSlotFloats = 128 * 1024;  // of all slots together, where a chunk does not need more
constexpr int kMaxSlots = 64;

constexpr int64_t round_to_line(int64_t floats) { return (floats + 15) / 16 * 16; }

struct Slot {
  int32_t block;    // -1: empty
  int32_t visible;  // keys of it that are
  uint32_t last_use;
};

// --- where things lie --------------------------------------------------------------------------------------------

constexpr int64_t kVectorSize = kMaxRows + 16;  // room for whole registers

int64_t partial_size(const BlockSparseAttentionArgs& args) {  // maxima, denominators, sums: floats
  return 2 * kVectorSize + kMaxRows * sum_stride(args.head_dim);
}

template <typename W>
int64_t slot_size(const BlockSparseAttentionArgs& args, int64_t* values_at) {
  const int64_t panels = (args.block_size + kPanel - 1) / kPanel;
  *values_at = panels * kPanel * args.head_dim / Units<W>::kStep;
  return *values_at + sum_stride(args.head_dim) * args.block_size / Units<W>::kStep;
}

struct Workspace {
  float* q;        // [kMaxRows][kQueryStride]
  int32_t* token;  // [kMaxRows + 16]: of each row
  float* state;    // partial_size
  float* bias;     // [kMostKeysOfChunk + 16]
  float* gather;   // [N][2 D]: a block of which not all keys are visible
  float* packed;   // [num_slots][slot_size]
  Slot* slots;     // [num_slots]
  int64_t slot_size, values_at;
  int num_slots;
  int64_t size;  // floats
};

template <typename W>
Workspace workspace_at(const BlockSparseAttentionArgs& args, void* scratch) {
  Workspace w;
  w.slot_size = slot_size<W>(args, &w.values_at);
  const int64_t chunk_blocks = keys_of_chunk(args.head_dim) / args.block_size;
  const int64_t wanted = kSlotFloats / w.slot_size;
  w.num_slots = static_cast<int>(wanted < chunk_blocks ? chunk_blocks : wanted > kMaxSlots ? kMaxSlots : wanted);
  float* at = static_cast<float*>(scratch);
  const auto take = [&](int64_t floats) {
    float* taken = at;
    at += round_to_line(floats);
    return taken;
  };
  w.q = take(kMaxRows * kQueryStride);
  w.token = reinterpret_cast<int32_t*>(take(kVectorSize));
  w.state = take(partial_size(args));
  w.bias = take(kMostKeysOfChunk + 16);
  w.gather = take(args.block_size * 2 * args.head_dim);
  w.packed = take(w.num_slots * w.slot_size);
  w.slots = reinterpret_cast<Slot*>(take(kMaxSlots * sizeof(Slot) / sizeof(float)));
  w.size = at - static_cast<float*>(scratch);
  return w;
}

void set_state(QueryTile& query, float* memory) {
  query.maxima = memory;
  query.denominators = memory + kVectorSize;
  query.sums = memory + 2 * kVectorSize;
}

// --- tokens ------------------------------------------------------------------------------------------------------

struct Columns {
  int64_t begin, end;
};

// The columns of a block that may hold tokens.
Columns columns_of(const BlockSparseAttentionArgs& args, int64_t batch, int64_t block) {
  const int64_t begin = args.grid[batch] + block * args.block_size, end = begin + args.block_size;
  const int64_t last = args.ends[batch];
  return {begin < last ? begin : last, end < last ? end : last};
}

bool is_visible(const BlockSparseAttentionArgs& args, int64_t batch, int64_t column) {
  return args.visible == nullptr || args.visible[batch * args.tokens + column];
}

bool is_global(const BlockSparseAttentionArgs& args, int64_t batch, int64_t column) {
  return args.global_tokens[batch * args.global_stride + column - args.grid[batch]];
}

// --- a query tile ------------------------------------------------------------------------------------------------

// Queries of the tile's tokens, and where its state goes; nothing seen yet.
template <typename W>
QueryTile open_tile(const BlockSparseAttentionArgs& args, const BlockTile& tile, const Workspace& w, float* state) {
  QueryTile query = {};
  query.head_dim = args.head_dim;
  query.scale = args.scale;
  query.q = w.q;
  for (int i = 0; i < tile.num_query_blocks; i++) {
    const Columns columns = columns_of(args, tile.batch, tile.query_blocks[i]);
    for (int64_t column = columns.begin; column < columns.end; column++) {
      if (!is_visible(args, tile.batch, column)) continue;
      const int64_t at = (tile.batch * args.tokens + column) * args.num_heads + tile.head;
      pack_query_row(static_cast<const W*>(args.q) + at * args.head_dim, args.head_dim,
                     w.q + query.rows * kQueryStride);
      w.token[query.rows++] = static_cast<int32_t>(column);
    }
  }
  const int padded = (query.rows + 1) / 2 * 2;
  if (padded > query.rows) std::memset(w.q + query.rows * kQueryStride, 0, kQueryStride * sizeof(float));
  set_state(query, state);
  for (int row = 0; row < padded; row++) {
    query.maxima[row] = kLowest;
    query.denominators[row] = 0;
  }
  std::memset(query.sums, 0, static_cast<size_t>(padded * sum_stride(args.head_dim)) * sizeof(float));
  return query;
}

// out = head_mask sums / denominators; a row that has seen nothing is zeros.
template <typename W>
void write_tile(const BlockSparseAttentionArgs& args, const BlockTile& tile, const QueryTile& query,
                const int32_t* token) {
  const int64_t d = args.head_dim;
  for (int row = 0; row < query.rows; row++) {
    const float denominator = query.denominators[row];
    float factor = denominator == 0 ? 0.0f : 1.0f / denominator;
    if (args.head_mask) factor *= args.head_mask[tile.head];
    const float* sums = query.sums + row * sum_stride(d);
    W* out = static_cast<W*>(args.out) + ((tile.batch * args.tokens + token[row]) * args.num_heads + tile.head) * d;
    for (int64_t column = 0; column < d; column += Vec::kWidth) {
      const Vec value = load(sums + column) * broadcast(factor);
      if (d - column >= Vec::kWidth) {
        store(out + column, value);
      } else {
        store(out + column, value, static_cast<int>(d - column));
      }
    }
  }
}

// --- key blocks --------------------------------------------------------------------------------------------------

void forget(const Workspace& w) {
  for (int i = 0; i < w.num_slots; i++) w.slots[i] = {-1, 0, 0};
}

// Where the keys and values of the tile's head lie.
template <typename W>
KeyValues<W> source_of(const BlockSparseAttentionArgs& args, const BlockTile& tile) {
  const int64_t kv_head = tile.head / (args.num_heads / args.num_kv_heads);
  return {static_cast<const W*>(args.k) + tile.batch * args.k_strides[0] + kv_head * args.k_strides[1],
          args.k_strides[2], args.head_dim,
          static_cast<const W*>(args.v) + tile.batch * args.v_strides[0] + kv_head * args.v_strides[1],
          args.v_strides[2]};
}

int count_visible(const BlockSparseAttentionArgs& args, int64_t batch, Columns columns) {
  if (args.visible == nullptr) return static_cast<int>(columns.end - columns.begin);
  int count = 0;
  for (int64_t column = columns.begin; column < columns.end; column++) count += is_visible(args, batch, column);
  return count;
}

template <typename W>
void pack_block(const BlockSparseAttentionArgs& args, const BlockTile& tile, int64_t block, const Workspace& w,
                Slot& slot, float* packed) {
  const int64_t d = args.head_dim, n = args.block_size;
  KeyValues<W> source = source_of<W>(args, tile);
  KeyTile keys = {args.grid[tile.batch] + block * n, static_cast<int>(n), 0.0f};
  const Columns columns = columns_of(args, tile.batch, block);
  const int visible = count_visible(args, tile.batch, columns);
  slot.visible = visible;
  if (visible == 0) return;
  if (visible < n) {
    W* rows = reinterpret_cast<W*>(w.gather);
    for (int64_t i = 0; i < n; i++) {
      const int64_t column = keys.first + i;
      W* to = rows + i * 2 * d;
      if (column < columns.end && is_visible(args, tile.batch, column)) {
        std::memcpy(to, source.data + column * source.stride, static_cast<size_t>(d) * sizeof(W));
        std::memcpy(to + d, source.values + column * source.value_stride, static_cast<size_t>(d) * sizeof(W));
      } else {
        std::memset(to, 0, static_cast<size_t>(2 * d) * sizeof(W));
      }
    }
    source = merged<W>(rows, 2 * d, d);
    keys.first = 0;
  }
  pack_keys(source, keys, packed);
  pack_values(source, keys, packed + w.values_at, n * kPanel / Units<W>::kStep);
}

// The slot that holds the block, packed now if it was in none.
template <typename W>
int slot_of(const BlockSparseAttentionArgs& args, const BlockTile& tile, int32_t block, uint32_t now,
            const Workspace& w) {
  int oldest = 0;
  for (int i = 0; i < w.num_slots; i++) {
    if (w.slots[i].block == block) {
      w.slots[i].last_use = now;
      return i;
    }
    if (w.slots[i].last_use < w.slots[oldest].last_use) oldest = i;
  }
  Slot& slot = w.slots[oldest];
  pack_block<W>(args, tile, block, w, slot, w.packed + oldest * w.slot_size);
  slot.block = block;
  slot.last_use = now;
  return oldest;
}

struct HideContext {
  const BlockSparseAttentionArgs* args;
  const BlockTile* tile;
  const int32_t* token;                     // of each row
  int32_t block[kMostBlocksOfChunk];        // key blocks of the chunk
  bool is_tokens_only[kMostBlocksOfChunk];  // listed with count 0
};

void hide(const void* context, int row, int index, float* scores) {
  const auto& c = *static_cast<const HideContext*>(context);
  const auto& args = *c.args;
  const int64_t batch = c.tile->batch, query = c.token[row];
  const Columns columns = columns_of(args, batch, c.block[index]);
  const int64_t past = !args.causal || query >= columns.end ? columns.end
                       : query < columns.begin              ? columns.begin
                                                            : query + 1;
  for (int64_t key = past; key < columns.end; key++) scores[key - columns.begin] = -INFINITY;
  if (!c.is_tokens_only[index] || is_global(args, batch, query)) return;
  for (int64_t key = columns.begin; key < past; key++) {
    if (!is_global(args, batch, key)) scores[key - columns.begin] = -INFINITY;
  }
}

// --- a tile meets a chunk ----------------------------------------------------------------------------------------

struct Share {
  int64_t begin, end;
};

// The entries of a list that chunk `index` has: equal shares.
Share chunk_of(int64_t num_entries, int64_t index, int64_t num_chunks) {
  if (num_chunks == 0) return {0, 0};
  return {num_entries * index / num_chunks, num_entries * (index + 1) / num_chunks};
}

int64_t num_chunks(const BlockSparseAttentionArgs& args, int64_t num_entries) {
  const int64_t most = keys_of_chunk(args.head_dim) / args.block_size;
  return (num_entries + most - 1) / most;
}

// What follows a chunk: a chunk of the same tile or of another; tile is null after the last.
struct Next {
  const BlockTile* tile;
  Share share;
};

// The memory that the next chunk will read: its blocks that are in no slot, and the queries of a new tile.
template <typename W>
FetchList what_to_fetch(const BlockSparseAttentionArgs& args, const BlockTile& now, const Next& next,
                        const Workspace& w) {
  FetchList list;
  const int64_t d = args.head_dim, row_bytes = d * static_cast<int64_t>(sizeof(W));
  if (next.tile == nullptr) return list;
  const BlockTile& tile = *next.tile;
  const KeyValues<W> source = source_of<W>(args, tile);
  for (int64_t i = next.share.begin; i < next.share.end; i++) {
    const int32_t block = args.entries[2 * (tile.first_entry + i)];
    bool is_packed = false;
    for (int slot = 0; slot < w.num_slots; slot++) is_packed = is_packed || w.slots[slot].block == block;
    if (is_packed) continue;
    const Columns columns = columns_of(args, tile.batch, block);
    const int64_t rows = columns.end - columns.begin;
    list.add(source.data + columns.begin * source.stride, rows, row_bytes, source.stride * sizeof(W));
    list.add(source.values + columns.begin * source.value_stride, rows, row_bytes, source.value_stride * sizeof(W));
  }
  for (int i = 0; &tile != &now && i < tile.num_query_blocks; i++) {
    const Columns columns = columns_of(args, tile.batch, tile.query_blocks[i]);
    const int64_t at = (tile.batch * args.tokens + columns.begin) * args.num_heads + tile.head;
    list.add(static_cast<const W*>(args.q) + at * d, columns.end - columns.begin, row_bytes,
             args.num_heads * row_bytes);
  }
  return list;
}

// now: counts up with every chunk, so that no slot of this chunk is taken for another block of it.
template <typename W>
void attend_entries(const BlockSparseAttentionArgs& args, const BlockTile& tile, const QueryTile& query, Share share,
                    const Next& next, uint32_t now, const Workspace& w) {
  const int64_t n = args.block_size;
  const int64_t first_token = w.token[0];
  int64_t last_token = 0;
  for (int row = 0; row < query.rows; row++) last_token = w.token[row] > last_token ? w.token[row] : last_token;
  BlockChunk chunk;
  HideContext context;
  context.args = &args;
  context.tile = &tile;
  context.token = w.token;
  chunk.block_size = static_cast<int>(n);
  chunk.bias = w.bias;
  chunk.hide = hide;
  chunk.context = &context;
  int count = 0;
  for (int64_t i = share.begin; i < share.end; i++) {
    const int32_t* entry = args.entries + 2 * (tile.first_entry + i);
    const Columns columns = columns_of(args, tile.batch, entry[0]);
    if (args.causal && columns.begin > last_token) continue;
    const int index = slot_of<W>(args, tile, entry[0], now, w);
    const Slot& slot = w.slots[index];
    if (slot.visible == 0) continue;
    chunk.k[count] = w.packed + index * w.slot_size;
    chunk.v[count] = chunk.k[count] + w.values_at;
    context.block[count] = entry[0];
    context.is_tokens_only[count] = entry[1] == 0;
    chunk.is_marked[count] = entry[1] == 0 || (args.causal && columns.end > first_token + 1);
    const float bias = entry[1] > 1 ? std::log(static_cast<float>(entry[1])) : 0.0f;
    float* to = w.bias + count * n;
    for (int64_t key = 0; key < n; key += Vec::kWidth) store(to + key, broadcast(bias));
    for (int64_t key = 0; slot.visible < n && key < n; key++) {
      const int64_t column = columns.begin + key;
      if (column >= columns.end || !is_visible(args, tile.batch, column)) to[key] = -INFINITY;
    }
    count++;
  }
  chunk.num_blocks = count;
  if (count == 0) return;
  FetchList list = what_to_fetch<W>(args, tile, next, w);
  attend<W>(query, chunk, list);
}

void attend_tiles(const BlockSparseAttentionArgs& args, const BlockTile* tiles, int64_t num_tiles, void* scratch) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using W = typename decltype(tag)::Type;
    const Workspace w = workspace_at<W>(args, scratch);
    forget(w);
    uint32_t now = 0;
    for (int64_t t = 0; t < num_tiles; t++) {
      const BlockTile& tile = tiles[t];
      const QueryTile query = open_tile<W>(args, tile, w, w.state);
      const int64_t chunks = num_chunks(args, tile.num_entries);
      for (int64_t chunk = 0; chunk < chunks && query.rows > 0; chunk++) {
        Next next = {nullptr, {0, 0}};
        if (chunk + 1 < chunks) {
          next = {&tile, chunk_of(tile.num_entries, chunk + 1, chunks)};
        } else if (t + 1 < num_tiles) {
          next = {&tiles[t + 1], chunk_of(tiles[t + 1].num_entries, 0, num_chunks(args, tiles[t + 1].num_entries))};
        }
        attend_entries<W>(args, tile, query, chunk_of(tile.num_entries, chunk, chunks), next, ++now, w);
      }
      write_tile<W>(args, tile, query, w.token);
    }
  });
}

void attend_one(const BlockSparseAttentionArgs& args, const BlockTile& tile, int64_t chunk, void* partial,
                void* scratch) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using W = typename decltype(tag)::Type;
    const Workspace w = workspace_at<W>(args, scratch);
    forget(w);
    const QueryTile query = open_tile<W>(args, tile, w, static_cast<float*>(partial));
    if (query.rows == 0) return;
    const int64_t chunks = num_chunks(args, tile.num_entries);
    attend_entries<W>(args, tile, query, chunk_of(tile.num_entries, chunk, chunks), {nullptr, {0, 0}}, 1, w);
  });
}

int64_t partial_bytes(const BlockSparseAttentionArgs& args) {
  return partial_size(args) * static_cast<int64_t>(sizeof(float));
}

void combine(const BlockSparseAttentionArgs& args, const BlockTile& tile, const void* partials, void* scratch) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using W = typename decltype(tag)::Type;
    const Workspace w = workspace_at<W>(args, scratch);
    const QueryTile query = open_tile<W>(args, tile, w, w.state);
    QueryTile part = query;
    auto* memory = static_cast<float*>(const_cast<void*>(partials));
    const int64_t chunks = num_chunks(args, tile.num_entries);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      set_state(part, memory + chunk * partial_size(args));
      merge_rows(query, part);
    }
    write_tile<W>(args, tile, query, w.token);
  });
}

int64_t scratch_bytes(const BlockSparseAttentionArgs& args) {
  return dispatch_dtype(args.dtype, [&](auto tag) {
    return workspace_at<typename decltype(tag)::Type>(args, nullptr).size * static_cast<int64_t>(sizeof(float));
  });
}

}  // namespace

const BlockSparseAttentionKernels kBlockSparseAttention = {kMaxRows,     scratch_bytes, partial_bytes, num_chunks,
                                                           attend_tiles, attend_one,    combine};

}  // namespace alula::ALULA_ISA
