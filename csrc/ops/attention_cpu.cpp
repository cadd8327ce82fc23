// attention on the CPU: dense rows over the merged cache, by the tile code of cpu/attention_tile.h.
//
// A thread owns one tile of query rows, or (decode) one key tile of it. It gathers the rows' queries, walks the key
// tiles in order, divides and writes. Everything a tile needs lies in the thread's scratch: Q, sums, maxima, one packed
// key tile.
#include "ops/attention.h"

#include "core/dispatch.h"
#include "cpu/attention_rows.h"

namespace alula::ALULA_ISA {
namespace {

constexpr int kMaxRows = 192 / kRows * kRows;

// --- where things lie --------------------------------------------------------------------------------------------

constexpr int64_t round_to_line(int64_t floats) { return (floats + 15) / 16 * 16; }

// Room for `rows` rows and for the registers that reach beyond them.
constexpr int64_t vector_size(int rows) { return round_to_line(padded_rows(rows) + 16); }

// Maxima, denominators, sums of `rows` rows: floats.
int64_t partial_size(int64_t head_dim, int rows) {
  return 2 * vector_size(rows) + round_to_line(padded_rows(rows) * sum_stride(head_dim));
}

void set_state(QueryTile& query, float* memory) {
  query.maxima = memory;
  query.denominators = memory + vector_size(query.rows);
  query.sums = memory + 2 * vector_size(query.rows);
}

// Scratch memory of a thread, in floats: queries, limits, state, packed keys and values.
constexpr int64_t kLimitsAt = (kMaxRows + kRows) * kQueryStride;
constexpr int64_t kStateAt = kLimitsAt + vector_size(kMaxRows);
int64_t packed_at(int64_t head_dim) { return kStateAt + partial_size(head_dim, kMaxRows); }

struct Workspace {
  float* q;
  int32_t* limits;
  float* state;
  float* packed;
};

Workspace workspace_at(const AttentionArgs& args, void* scratch) {
  auto* memory = static_cast<float*>(scratch);
  return {memory, reinterpret_cast<int32_t*>(memory + kLimitsAt), memory + kStateAt, memory + packed_at(args.head_dim)};
}

// Row `row` of the tile is head `head` of token `token`.
struct RowPlace {
  int64_t token, head;
  int32_t limit;
};

RowPlace place_of(const AttentionArgs& args, const AttentionTile& tile, int row) {
  const int64_t group = args.num_heads / args.num_kv_heads;
  const int64_t number = tile.first_row + row;
  return {tile.tokens[number / group], tile.kv_head * group + number % group, tile.limits[number / group]};
}

// --- mask --------------------------------------------------------------------------------------------------------

struct MaskContext {
  const AttentionArgs* args;
  const AttentionTile* tile;
};

template <typename T>
void add_mask_row(const T* mask, int64_t stride, int count, float* scores) {
  int j = 0;
  if (stride == 1) {
    for (; j + Vec::kWidth <= count; j += Vec::kWidth) store(scores + j, load(scores + j) + load(mask + j));
  }
  for (; j < count; j++) scores[j] += to_float(mask[j * stride]);
}

void add_mask(const void* context, int row, int64_t first, int count, float* scores) {
  const auto& [args, tile] = *static_cast<const MaskContext*>(context);
  const RowPlace place = place_of(*args, *tile, row);
  const int64_t* strides = args->mask_strides;
  const int64_t at = tile->batch * strides[0] + place.head * strides[1] + place.token * strides[2] + first * strides[3];
  switch (args->mask_kind) {
    case MaskKind::kNone:
      return;
    case MaskKind::kBool: {
      const auto* mask = static_cast<const uint8_t*>(args->mask) + at;
      for (int j = 0; j < count; j++) scores[j] = mask[j * strides[3]] ? scores[j] : -INFINITY;
      return;
    }
    case MaskKind::kFloat32:
      return add_mask_row(static_cast<const float*>(args->mask) + at, strides[3], count, scores);
    case MaskKind::kBFloat16:
      return add_mask_row(static_cast<const bf16*>(args->mask) + at, strides[3], count, scores);
    case MaskKind::kFloat16:
      return add_mask_row(static_cast<const f16*>(args->mask) + at, strides[3], count, scores);
  }
}

// --- a tile ------------------------------------------------------------------------------------------------------

// Queries and limits of the tile, and where its state goes; nothing seen yet.
template <typename W>
QueryTile open_tile(const AttentionArgs& args, const AttentionTile& tile, const MaskContext& mask, const Workspace& w,
                    float* state) {
  QueryTile query;
  query.rows = tile.num_rows;
  query.block_rows = block_rows_for(tile.num_rows);
  query.head_dim = args.head_dim;
  query.scale = args.scale;
  query.mask = {args.mask_kind == MaskKind::kNone ? nullptr : add_mask, &mask};
  query.q = w.q;
  query.limits = w.limits;
  for (int row = 0; row < tile.num_rows; row++) {
    const RowPlace place = place_of(args, tile, row);
    w.limits[row] = place.limit;
    const int64_t at = (tile.batch * args.tokens + place.token) * args.num_heads + place.head;
    pack_query_row(static_cast<const W*>(args.q) + at * args.head_dim, args.head_dim, w.q + row * kQueryStride);
  }
  for (int row = tile.num_rows; row < padded_rows(tile.num_rows); row++) {
    w.limits[row] = 0;
    std::memset(w.q + row * kQueryStride, 0, kQueryStride * sizeof(float));
  }
  set_state(query, state);
  clear(query);
  return query;
}

// Key 0 of a tile's row of the cache.
template <typename W>
const W* keys_of(const AttentionArgs& args, const AttentionTile& tile) {
  return static_cast<const W*>(args.kv_cache) + tile.batch * args.kv_strides[0] + tile.kv_head * args.kv_strides[1];
}

// What is read after a key tile of `source`: the next one, or the first one of the tile `after`, which may be null.
template <typename W>
Ahead ahead_of(const AttentionArgs& args, const KeyValues<W>& source, const KeyTile& next, const AttentionTile* after) {
  const W* from = source.data;
  int64_t count = 0;
  if (next.count > 0) {
    from += next.first * source.stride;
    count = next.count;
  } else if (after) {
    from = keys_of<W>(args, *after);
    count = after->limit < kKeysAtOnce ? after->limit : kKeysAtOnce;
  }
  if (source.stride != 2 * source.head_dim) count = 0;  // slots do not follow one another, as they do in a cache
  const auto* at = reinterpret_cast<const char*>(from);
  return {at, count > 0 ? at + count * source.stride * static_cast<int64_t>(sizeof(W)) - 1 : at};
}

// `after`: the tile that this thread takes up next, may be null.
template <typename W>
void attend_key_tile(const AttentionArgs& args, const AttentionTile& tile, const AttentionTile* after,
                     const QueryTile& query, int64_t index, float* packed) {
  const KeyValues<W> source = merged(keys_of<W>(args, tile), args.kv_strides[2], args.head_dim);
  const auto key_tile = [&](int64_t i) {
    const int64_t first = i * kKeysAtOnce, left = tile.limit - first;
    return KeyTile{first, static_cast<int>(left < 0 ? 0 : left < kKeysAtOnce ? left : kKeysAtOnce), 0.0f};
  };
  const KeyTile keys = key_tile(index), next = key_tile(index + 1);
  if (tile.num_rows <= kFewRows) {
    attend_few(query, source, keys, ahead_of(args, source, next, after));
  } else {
    attend(query, source, keys, &next, packed);
  }
}

// out = head_mask sums / denominators; a row that has seen nothing is zeros.
template <typename W>
void write_tile(const AttentionArgs& args, const AttentionTile& tile, const QueryTile& query) {
  const int64_t d = args.head_dim;
  for (int row = 0; row < query.rows; row++) {
    const RowPlace place = place_of(args, tile, row);
    const float denominator = query.denominators[row];
    float factor = denominator == 0 ? 0.0f : 1.0f / denominator;
    if (args.head_mask) factor *= args.head_mask[place.head];
    const float* sums = query.sums + row * sum_stride(d);
    W* out = static_cast<W*>(args.out) + (tile.batch * args.tokens + place.token) * args.out_stride + place.head * d;
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

void attend_all(const AttentionArgs& args, const AttentionTile& tile, const AttentionTile* after, void* scratch) {
  const Workspace w = workspace_at(args, scratch);
  const MaskContext mask = {&args, &tile};
  dispatch_dtype(args.dtype, [&](auto tag) {
    using W = typename decltype(tag)::Type;
    const QueryTile query = open_tile<W>(args, tile, mask, w, w.state);
    const int64_t count = (tile.limit + kKeysAtOnce - 1) / kKeysAtOnce;
    for (int64_t index = 0; index < count; index++) attend_key_tile<W>(args, tile, after, query, index, w.packed);
    write_tile<W>(args, tile, query);
  });
}

void attend_one(const AttentionArgs& args, const AttentionTile& tile, int64_t index, void* partial, void* scratch) {
  const Workspace w = workspace_at(args, scratch);
  const MaskContext mask = {&args, &tile};
  dispatch_dtype(args.dtype, [&](auto tag) {
    using W = typename decltype(tag)::Type;
    const QueryTile query = open_tile<W>(args, tile, mask, w, static_cast<float*>(partial));
    attend_key_tile<W>(args, tile, nullptr, query, index, w.packed);
  });
}

void combine(const AttentionArgs& args, const AttentionTile& tile, const void* partials, int64_t count, void* scratch) {
  QueryTile query = {};
  query.rows = tile.num_rows;
  query.head_dim = args.head_dim;
  set_state(query, workspace_at(args, scratch).state);
  clear(query);
  QueryTile part = query;
  auto* memory = static_cast<float*>(const_cast<void*>(partials));
  for (int64_t index = 0; index < count; index++) {
    set_state(part, memory + index * partial_size(args.head_dim, tile.num_rows));
    merge_rows(query, part);
  }
  dispatch_dtype(args.dtype, [&](auto tag) { write_tile<typename decltype(tag)::Type>(args, tile, query); });
}

int64_t scratch_bytes(const AttentionArgs& args) {
  const int64_t floats = packed_at(args.head_dim) + round_to_line(packed_tile_size(args.head_dim));
  return floats * static_cast<int64_t>(sizeof(float));
}

int64_t partial_bytes(const AttentionArgs& args, int rows) {
  return partial_size(args.head_dim, rows) * static_cast<int64_t>(sizeof(float));
}

}  // namespace

const AttentionKernels kAttention = {kRows,         kMaxRows,   kKeysAtOnce, scratch_bytes,
                                     partial_bytes, attend_all, attend_one,  combine};

}  // namespace alula::ALULA_ISA
