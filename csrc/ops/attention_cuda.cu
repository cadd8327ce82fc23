// attention on CUDA: softmax(scale q k^T + mask) v over the merged cache, prefill and decode by one kernel.
//
// Rows are numbered (token, head of the group) for each batch row and key/value head, as on the CPU, so that all query
// heads of a key/value head share its tiles. A block of 4 warps owns 16, 32 (D > 128), 64 or 128 rows and walks its
// keys in tiles of kKeys slots; key and value of a slot lie together and come by cp.async, the next tile under way
// while one is used. Warps share out the block's rows (16 or 32 each) and, where there are fewer rows than that, the
// keys of each tile; what they hold is merged in shared memory at the end.
//
// Few rows and many slots (decoding): the keys are also split over blocks. Each leaves its sums in a workspace; the
// last to come, by a counter, merges them in the order of the keys and writes the result, in the same launch. One block
// would be long about very many: above kMergedAtOnce splits they are merged by groups of kGroup first, each by the last
// block of its group. How many keys there are is read on the device: one captured graph serves every length.
//
// Slots that no row of a block sees are read as zeros, whatever they hold.
//
// Not measured yet: no GPU was at hand. The dispatcher's dense attention has therefore not been compared either.
#include "ops/attention.h"

#include <algorithm>
#include <climits>

#include "core/dispatch.h"
#include "cuda/attention_merge.cuh"
#include "cuda/attention_tile.cuh"
#include "cuda/launch.h"
#include "cuda/vec.cuh"

namespace alula {
namespace {

using namespace tiles;

constexpr int kMergedAtOnce = 32, kGroup = 16;  // splits; at most kGroup * kMergedAtOnce

// Groups of splits that are merged before all are; 0: none.
int num_groups(int splits) { return splits <= kMergedAtOnce ? 0 : (splits + kGroup - 1) / kGroup; }

struct Params {
  AttentionArgs args;
  AttentionCudaArgs cuda;
  int num_rows;       // T * (H / G)
  int group;          // H / G
  int num_row_tiles;  // of each batch row and key/value head
  int num_groups;     // of splits
  bool scales_last;   // a score is the plain product, and scale is applied in the exponent
  bool is_out_even;   // can be written four elements at a time
};

// Where a row comes from and goes to.
struct RowPlace {
  int token, head;
};

__device__ __forceinline__ RowPlace place_of(const Params& p, int number, int kv_head) {
  const int token = static_cast<int>(static_cast<unsigned>(number) / static_cast<unsigned>(p.group));
  return {token, kv_head * p.group + number - token * p.group};
}

// How many slots a row sees; 0 for padding and beyond the last row.
__device__ __forceinline__ int limit_of(const Params& p, int64_t batch, int number, int kv_head) {
  if (number >= p.num_rows) return 0;
  const int position = p.args.positions[batch * p.args.tokens + place_of(p, number, kv_head).token];
  const int64_t length = p.args.lengths[batch];
  int64_t limit = length < p.cuda.num_slots ? length : p.cuda.num_slots;
  if (position < 0) return 0;
  if (p.args.causal && position + 1 < limit) limit = position + 1;
  return static_cast<int>(limit < 0 ? 0 : limit);
}

template <typename C>
__device__ __forceinline__ void load_queries(const Params& p, int64_t batch, int kv_head, int first_row,
                                             Shared<typename C::Element> q) {
  using T = typename C::Element;
  const int head_dim = static_cast<int>(p.args.head_dim);
  copy_packs<C, C::kRows, C::kD / C::kPack>(
      p.cuda.is_query_even, [&](int row, int pack) { return q + row * C::kStride + pack * C::kPack; },
      [&](int row, int pack) {
        const RowPlace place = place_of(p, first_row + row, kv_head);
        const int64_t at = (batch * p.args.tokens + place.token) * p.args.num_heads + place.head;
        return static_cast<const T*>(p.args.q) + at * head_dim + pack * C::kPack;
      },
      [&](int row, int pack) { return first_row + row < p.num_rows && pack * C::kPack < head_dim; });
}

// Keys and values of slots [first, first + kKeys) below `limit`, zeros beyond and in the columns after D.
template <typename C>
__device__ __forceinline__ void load_keys(const Params& p, const typename C::Element* kv, int first, int limit,
                                          Shared<typename C::Element> stage) {
  constexpr int kPacks = C::kD / C::kPack;
  const int head_dim = static_cast<int>(p.args.head_dim), left = limit - first;
  const typename C::Element* tile = kv + first * p.args.kv_strides[2];
  copy_packs<C, C::kKeys, 2 * kPacks>(
      p.cuda.is_cache_even,
      [&](int slot, int pack) {
        return stage + pack / kPacks * C::kKeyTileSize + slot * C::kStride + pack % kPacks * C::kPack;
      },
      [&](int slot, int pack) {
        return tile + slot * p.args.kv_strides[2] + (pack / kPacks * head_dim + pack % kPacks * C::kPack);
      },
      [&](int slot, int pack) { return slot < left && pack % kPacks * C::kPack < head_dim; });
}

__device__ __forceinline__ float masked_score(const Params& p, const RowPlace& place, int64_t batch, int key, float v) {
  const AttentionArgs& args = p.args;
  if (key >= p.cuda.mask_keys) return -INFINITY;
  const int64_t at = batch * args.mask_strides[0] + place.head * args.mask_strides[1] +
                     place.token * args.mask_strides[2] + key * args.mask_strides[3];
  switch (args.mask_kind) {
    case MaskKind::kNone:
      return v;
    case MaskKind::kBool:
      return static_cast<const uint8_t*>(args.mask)[at] ? v : -INFINITY;
    case MaskKind::kFloat32:
      return v + static_cast<const float*>(args.mask)[at];
    case MaskKind::kBFloat16:
      return v + to_float(static_cast<const bf16*>(args.mask)[at]);
    case MaskKind::kFloat16:
      return v + to_float(static_cast<const f16*>(args.mask)[at]);
  }
  return v;
}

// What split `split` of a tile leaves in the workspace: sums [kRows][kD], then maxima and denominators [kRows][2].
template <typename C>
__device__ __forceinline__ float* partial_of(const Params& p, int64_t tile, int split) {
  return p.cuda.workspace + (tile * p.cuda.num_splits + split) * (C::kRows * (C::kD + 2));
}

// Four columns of a row: where it goes.
template <typename C>
__device__ __forceinline__ void write_row(const Params& p, int64_t batch, int kv_head, int number, int column,
                                          const float (&sums)[4], float denominator) {
  using T = typename C::Element;
  const RowPlace place = place_of(p, number, kv_head);
  const float head_factor = p.args.head_mask == nullptr ? 1.0f : p.args.head_mask[place.head];
  const float factor = denominator == 0.0f ? 0.0f : head_factor / denominator;
  float y[4];
#pragma unroll
  for (int c = 0; c < 4; c++) y[c] = sums[c] * factor;
  T* out = static_cast<T*>(p.args.out) + (batch * p.args.tokens + place.token) * p.args.out_stride +
           place.head * p.args.head_dim + column;
  if (p.is_out_even) return store_pack<4>(out, y);
#pragma unroll
  for (int c = 0; c < 4; c++) out[c] = from_float<T>(y[c]);
}

// Merges `count` partials of the workspace, `step` splits apart, the first being that of split `first`.
template <typename C, typename Done>
__device__ __forceinline__ void merge_partials(const Params& p, int64_t tile, int first, int step, int count, int rows,
                                               ScoreUnits units, Shared<float> states, const Done& done) {
  const auto part_at = [&](int i) { return partial_of<C>(p, tile, first + i * step); };
  for (int i = static_cast<int>(threadIdx.x); i < count * C::kRows; i += kThreads) {
    const int part = i / C::kRows, row = i % C::kRows;
    if (row >= rows) continue;
    const auto state = reinterpret_cast<const Pack<float, 2>*>(part_at(part) + C::kRows * C::kD)[row];
    states[2 * i] = state.values[0];
    states[2 * i + 1] = state.values[1];
  }
  __syncthreads();
  merge_rows<C>(
      count, rows, static_cast<int>(p.args.head_dim), units, states,
      [&](int i, int row, int column) {
        return *reinterpret_cast<const Pack<float, 4>*>(part_at(i) + row * C::kD + column);
      },
      done);
}

// kHasMask: there is a mask, or a scale that does not keep the order of the scores. Without, no score needs a branch.
template <typename C, bool kHasMask>
__global__ void __launch_bounds__(kThreads, 1) attention_kernel(Params p) {
  using T = typename C::Element;
  const Shared<T> q = dynamic_shared<T>();
  const Shared<T> stages = dynamic_shared<T>(C::kQueryBytes);
  const Shared<float> sums = dynamic_shared<float>();  // after the loop, in the place of queries and keys
  const Shared<int> limits = dynamic_shared<int>(C::kLimitsOffset);
  const Shared<float> states = dynamic_shared<float>(C::kStatesOffset);
  const Shared<float> scratch = dynamic_shared<float>(C::kScratchOffset);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int row_warp = warp % C::kRowWarps, key_warp = warp / C::kRowWarps;
  const int64_t batch = blockIdx.z;
  const int kv_head = static_cast<int>(blockIdx.y);
  const int splits = p.cuda.num_splits, split = static_cast<int>(blockIdx.x) % splits;
  // The last tiles see most keys, so they go first.
  const int row_tile = p.num_row_tiles - 1 - static_cast<int>(blockIdx.x) / splits;
  const int first_row = row_tile * C::kRows;
  const ScoreUnits units = kHasMask ? ScoreUnits{1.0f, (p.scales_last ? p.args.scale : 1.0f) * kLog2E}
                                    : ScoreUnits{p.args.scale * kLog2E, 1.0f};
  wait_for_previous_kernel();
  let_next_kernel_start();  // it fetches its weights meanwhile

  // --- rows: how far they see ---
  int longest = 0;
  if (thread < C::kRows) {
    longest = limit_of(p, batch, first_row + thread, kv_head);
    limits[thread] = longest;
  }
  // Whole numbers up to 2^24 in fp32: num_slots is checked.
  const int limit = static_cast<int>(reduce_block<Max>(static_cast<float>(longest), scratch));
  const int tiles = (limit + C::kKeys - 1) / C::kKeys;
  const int share = (tiles + splits - 1) / splits;
  const int first_tile = split * share;
  const int last_tile = first_tile + share < tiles ? first_tile + share : tiles;

  // --- keys, tile by tile ---
  WarpState<C> state = {};
  const T* kv = static_cast<const T*>(p.args.kv_cache) + batch * p.args.kv_strides[0] + kv_head * p.args.kv_strides[1];
  load_queries<C>(p, batch, kv_head, first_row, q);
  if (first_tile < last_tile) load_keys<C>(p, kv, first_tile * C::kKeys, limit, stages);
  copy_async_commit();
  const int g = lane / 4, own_rows = row_warp * C::kRowTiles * kWarpRows;
  int own_limits[2 * C::kRowTiles], least_limit = INT_MAX;
  [[maybe_unused]] RowPlace places[2 * C::kRowTiles];
#pragma unroll
  for (int row = 0; row < 2 * C::kRowTiles; row++) {
    const int index = own_rows + g + 8 * row;
    // Rows beyond the last may see what they like: nobody reads them, and no tile is masked on their account.
    own_limits[row] = first_row + index < p.num_rows ? limits[index] : INT_MAX;
    least_limit = own_limits[row] < least_limit ? own_limits[row] : least_limit;
    if constexpr (kHasMask) places[row] = place_of(p, first_row + index < p.num_rows ? first_row + index : 0, kv_head);
  }
  const auto seen = [&](int row, int slot, float score) {
    if constexpr (kHasMask) {
      if (!p.scales_last) score *= p.args.scale;
      if (slot >= own_limits[row]) return -INFINITY;
      return p.args.mask_kind == MaskKind::kNone ? score : masked_score(p, places[row], batch, slot, score);
    } else {
      return slot >= own_limits[row] ? -INFINITY : score;
    }
  };
  for (int tile = first_tile; tile < last_tile; tile++) {
    const int stage = (tile - first_tile) % C::kStages;
    const int stage_size = 2 * C::kKeyTileSize;
    if (tile + 1 < last_tile) {
      load_keys<C>(p, kv, (tile + 1) * C::kKeys, limit, stages + (1 - stage) * stage_size);
    }
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();  // this tile is there for all
    const int end = tile * C::kKeys + (key_warp + 1) * C::kWarpKeys;
    const bool sees_all = !kHasMask && __all_sync(kWholeWarp, end <= least_limit);
    attend_tile<C>(state, q + own_rows * C::kStride, stages + stage * stage_size, tile * C::kKeys, key_warp, units,
                   sees_all, seen);
    __syncthreads();  // nobody reads it any more
  }
  copy_async_wait<0>();
  __syncthreads();

  // --- the warps' parts become the block's ---
  leave_state<C>(state, row_warp, key_warp, sums, states);
  __syncthreads();
  const int head_dim = static_cast<int>(p.args.head_dim), left = p.num_rows - first_row;
  const int rows = left < C::kRows ? left : C::kRows;
  const int64_t tile_index = (batch * gridDim.y + kv_head) * p.num_row_tiles + row_tile;
  const auto write = [&](int row, int column, const float (&y)[4], float, float denominator) {
    write_row<C>(p, batch, kv_head, first_row + row, column, y, denominator);
  };
  const auto leave_in = [&](float* partial) {
    return [partial](int row, int column, const float (&y)[4], float maximum, float denominator) {
      store_pack<4>(partial + row * C::kD + column, y);
      if (column == 0) {
        const float pair[2] = {maximum, denominator};
        store_pack<2>(partial + C::kRows * C::kD + 2 * row, pair);
      }
    };
  };
  const auto sums_of = [&](int part, int row, int column) -> Pack<float, 4> {
    return shared_cast<Pack<float, 4>>(sums + (part * C::kRows + row) * C::kD + column)[0];
  };
  if (splits == 1) return merge_rows<C>(C::kKeyWarps, rows, head_dim, units, states, sums_of, write);
  merge_rows<C>(C::kKeyWarps, rows, head_dim, units, states, sums_of, leave_in(partial_of<C>(p, tile_index, split)));

  // --- the last block of a group of splits merges those, the last block of a tile all ---
  const Shared<int> is_last = shared_cast<int>(scratch);
  uint32_t* const counters = p.cuda.counters + tile_index * (1 + p.num_groups);
  if (p.num_groups == 0) {
    if (is_last_of(counters, splits, is_last)) merge_partials<C>(p, tile_index, 0, 1, splits, rows, units, sums, write);
    return;
  }
  const int group = split / kGroup, first = group * kGroup;
  const int count = splits - first < kGroup ? splits - first : kGroup;
  if (!is_last_of(counters + 1 + group, count, is_last)) return;
  merge_partials<C>(p, tile_index, first, 1, count, rows, units, sums, leave_in(partial_of<C>(p, tile_index, first)));
  if (!is_last_of(counters, p.num_groups, is_last)) return;
  merge_partials<C>(p, tile_index, 0, kGroup, p.num_groups, rows, units, sums, write);
}

// --- choice ----------------------------------------------------------------------------------------------------------

int head_dim_bucket(int64_t head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

// Whether a score is the plain product, with scale applied in the exponent: where that keeps the order of scores.
bool scales_last(const AttentionArgs& args) {
  const bool adds_mask = args.mask_kind != MaskKind::kNone && args.mask_kind != MaskKind::kBool;
  return !adds_mask && args.scale > 0;
}

bool has_mask(const AttentionArgs& args) { return args.mask_kind != MaskKind::kNone || !scales_last(args); }

// Rows of a block: 16, so that the warps share out the keys of few rows; else 64 or, for 16-bit types without a mask,
// 128 where there are enough of those to fill the GPU. Heads of 256 leave room for 32 in shared memory.
int rows_for(const AttentionArgs& args, const CudaDevice& device) {
  const int64_t rows = args.tokens * (args.num_heads / args.num_kv_heads);
  if (head_dim_bucket(args.head_dim) == 256) return 32;
  if (rows <= 16) return 16;
  const bool can_be_tall = args.dtype != DType::kFloat32 && !has_mask(args);
  return can_be_tall && rows / 128 * args.num_kv_heads * args.batch >= 2 * device.num_multiprocessors ? 128 : 64;
}

template <typename T, int kD, int kRows>
void attention_as(Params p, const CudaStream& stream) {
  using C = Tile<T, kD, std::min(kRows / kWarpRows, kWarps), std::max(1, kRows / kWarpRows / kWarps)>;
  static_assert((kMergedAtOnce + 1) * C::kRows * 2 * 4 <= C::kLimitsOffset,
                "the states of all parts of a merge fit where the sums were");
  p.is_out_even = reinterpret_cast<uintptr_t>(p.args.out) % (4 * sizeof(T)) == 0 && p.args.out_stride % 4 == 0;
  auto* kernel = attention_kernel<C, false>;
  if constexpr (C::kRowTiles == 1) {
    if (has_mask(p.args)) kernel = attention_kernel<C, true>;
  }
  launch("attention_kernel", kernel,
         {.blocks = {static_cast<int64_t>(p.num_row_tiles) * p.cuda.num_splits, p.args.num_kv_heads, p.args.batch},
          .threads = kThreads,
          .shared_bytes = C::kSharedBytes,
          .starts_before_previous = true},
         stream, p);
}

template <typename T, int kD>
void attention_of_width(const Params& p, int rows, const CudaStream& stream) {
  if constexpr (kD == 256) {
    attention_as<T, kD, 32>(p, stream);
  } else {
    if (rows == 16) return attention_as<T, kD, 16>(p, stream);
    if constexpr (sizeof(T) == 2) {
      if (rows == 128) return attention_as<T, kD, 128>(p, stream);
    }
    attention_as<T, kD, 64>(p, stream);
  }
}

}  // namespace

AttentionCudaPlan attention_cuda_plan(const AttentionArgs& args, int64_t num_slots, const CudaDevice& device) {
  AttentionCudaPlan plan;
  const int64_t rows = args.tokens * (args.num_heads / args.num_kv_heads);
  plan.rows = rows_for(args, device);
  plan.num_row_tiles = (rows + plan.rows - 1) / plan.rows;
  const int64_t tiles = plan.num_row_tiles * args.num_kv_heads * args.batch;
  // Two blocks a multiprocessor, and at least two tiles of keys for each block when the cache is full.
  const int64_t room = tiles == 0 ? 1 : 2 * device.num_multiprocessors / tiles;
  const int64_t most = num_slots / (2 * 64);
  plan.num_splits = static_cast<int>(std::clamp<int64_t>(std::min(room, most), 1, kGroup * kMergedAtOnce));
  plan.num_counters = tiles * (1 + num_groups(plan.num_splits));
  plan.workspace_floats =
      plan.num_splits == 1 ? 0 : tiles * plan.num_splits * plan.rows * (head_dim_bucket(args.head_dim) + 2);
  return plan;
}

void attention_cuda(const AttentionArgs& args, const AttentionCudaArgs& cuda, const AttentionCudaPlan& plan,
                    const CudaStream& stream) {
  ALULA_CHECK(cuda.num_slots < (1 << 24), "kv_cache has ", cuda.num_slots, " slots; accepted: below 2^24");
  const int64_t group = args.num_heads / args.num_kv_heads;
  ALULA_CHECK(args.tokens * group < (int64_t{1} << 30), "q has ", args.tokens, " tokens and ", group,
              " heads for each of kv_cache; accepted: a product below 2^30");
  Params p = {args,
              cuda,
              static_cast<int>(args.tokens * group),
              static_cast<int>(group),
              static_cast<int>(plan.num_row_tiles),
              num_groups(plan.num_splits),
              false,
              false};
  p.cuda.num_splits = plan.num_splits;
  p.scales_last = scales_last(args);
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    switch (head_dim_bucket(args.head_dim)) {
      case 64:
        return attention_of_width<T, 64>(p, plan.rows, stream);
      case 128:
        return attention_of_width<T, 128>(p, plan.rows, stream);
      default:
        return attention_of_width<T, 256>(p, plan.rows, stream);
    }
  });
}

}  // namespace alula
