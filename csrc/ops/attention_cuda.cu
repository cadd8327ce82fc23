// attention on CUDA: softmax(scale q k^T + mask) v over the merged cache, prefill and decode by one kernel.
//
// Rows are numbered (token, head of the group) for each batch row and key/value head, as on the CPU, so that all query
// heads of a key/value head share its tiles. A block of 4 warps owns 16, 32 (D > 128) or 64 rows and walks its keys in
// tiles of kKeys slots; key and value of a slot lie together and come by cp.async, the next tile under way while one is
// used. Warps share out the block's rows (16 each) and, where there are fewer rows than that, the keys of each tile;
// what they hold is merged in shared memory at the end.
//
// Few rows and many slots (decoding): the keys are also split over blocks. Each leaves its sums in a workspace; the
// last to come, by a counter, merges them in the order of the keys and writes the result, in the same launch. How many
// keys there are is read on the device: one captured graph serves every length.
//
// Slots that no row of a block sees are read as zeros, whatever they hold.
//
// Not measured yet: no GPU was at hand. The dispatcher's dense attention has therefore not been compared either.
#include "ops/attention.h"

#include <algorithm>

#include "core/dispatch.h"
#include "cuda/attention_tile.cuh"
#include "cuda/launch.h"

namespace alula {
namespace {

using namespace tiles;

struct Params {
  AttentionArgs args;
  AttentionCudaArgs cuda;
  int64_t num_rows;   // T * (H / G)
  int num_row_tiles;  // of each batch row and key/value head
  bool scales_last;   // a score is the plain product, and scale is applied in the exponent
};

// Where a row comes from and goes to.
struct RowPlace {
  int64_t token, head;
};

__device__ __forceinline__ RowPlace place_of(const Params& p, int64_t number, int64_t kv_head) {
  const int64_t group = p.args.num_heads / p.args.num_kv_heads;
  return {number / group, kv_head * group + number % group};
}

// How many slots a row sees; 0 for padding and beyond the last row.
__device__ __forceinline__ int limit_of(const Params& p, int64_t batch, int64_t number, int64_t kv_head) {
  if (number >= p.num_rows) return 0;
  const int position = p.args.positions[batch * p.args.tokens + place_of(p, number, kv_head).token];
  const int64_t length = p.args.lengths[batch];
  int64_t limit = length < p.cuda.num_slots ? length : p.cuda.num_slots;
  if (position < 0) return 0;
  if (p.args.causal && position + 1 < limit) limit = position + 1;
  return static_cast<int>(limit < 0 ? 0 : limit);
}

template <typename C>
__device__ __forceinline__ void load_queries(const Params& p, int64_t batch, int64_t kv_head, int64_t first_row,
                                             Shared<typename C::Element> q) {
  using T = typename C::Element;
  constexpr int kPacks = C::kD / C::kPack;
  const int head_dim = static_cast<int>(p.args.head_dim);
  for (int i = static_cast<int>(threadIdx.x); i < C::kRows * kPacks; i += kThreads) {
    const int row = i / kPacks, column = i % kPacks * C::kPack;
    const bool is_there = first_row + row < p.num_rows && column < head_dim;
    const RowPlace place = place_of(p, is_there ? first_row + row : 0, kv_head);
    const int64_t at = ((batch * p.args.tokens + place.token) * p.args.num_heads + place.head) * head_dim;
    copy_pack<T, C::kPack>(q + row * C::kStride + column,
                           static_cast<const T*>(p.args.q) + at + (is_there ? column : 0), is_there,
                           p.cuda.is_query_even);
  }
}

// Keys and values of slots [first, first + kKeys) below `limit`, zeros beyond and in the columns after D.
template <typename C>
__device__ __forceinline__ void load_keys(const Params& p, const typename C::Element* kv, int first, int limit,
                                          Shared<typename C::Element> stage) {
  using T = typename C::Element;
  constexpr int kPacks = C::kD / C::kPack;
  const int head_dim = static_cast<int>(p.args.head_dim);
  for (int i = static_cast<int>(threadIdx.x); i < C::kKeys * 2 * kPacks; i += kThreads) {
    const int slot = i / (2 * kPacks), half = i / kPacks % 2, column = i % kPacks * C::kPack;
    const bool is_there = first + slot < limit && column < head_dim;
    const T* from = is_there ? kv + (first + slot) * p.args.kv_strides[2] + half * head_dim + column : kv;
    copy_pack<T, C::kPack>(stage + half * C::kKeyTileSize + slot * C::kStride + column, from, is_there,
                           p.cuda.is_cache_even);
  }
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

// Where the sums of a split lie in the workspace: [tile of a row][split][row][kD + 2], maximum and denominator last.
template <typename C>
__device__ __forceinline__ float* partial_of(const Params& p, int64_t tile, int64_t split, int row) {
  const int64_t index = (tile * p.cuda.num_splits + split) * C::kRows + row;
  return p.cuda.workspace + index * (C::kD + 2);
}

template <typename C>
__device__ __forceinline__ void write_row(const Params& p, int64_t batch, int64_t kv_head, int64_t number, int column,
                                          float sum, float denominator) {
  using T = typename C::Element;
  const RowPlace place = place_of(p, number, kv_head);
  float y = denominator == 0.0f ? 0.0f : sum / denominator;
  if (p.args.head_mask != nullptr) y *= p.args.head_mask[place.head];
  T* out = static_cast<T*>(p.args.out) + (batch * p.args.tokens + place.token) * p.args.out_stride;
  out[place.head * p.args.head_dim + column] = from_float<T>(y);
}

template <typename C>
__global__ void __launch_bounds__(kThreads, 1) attention_kernel(Params p) {
  using T = typename C::Element;
  const Shared<T> q = dynamic_shared<T>();
  const Shared<T> stages = dynamic_shared<T>(C::kQueryBytes);
  const Shared<float> sums = dynamic_shared<float>(C::kQueryBytes);  // after the loop, in the place of the stages
  const Shared<int> limits = dynamic_shared<int>(C::kLimitsOffset);
  const Shared<float> states = dynamic_shared<float>(C::kStatesOffset);
  const Shared<float> scratch = dynamic_shared<float>(C::kScratchOffset);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int row_warp = warp % C::kRowWarps, key_warp = warp / C::kRowWarps;
  const int64_t batch = blockIdx.z, kv_head = blockIdx.y;
  const int splits = p.cuda.num_splits, split = static_cast<int>(blockIdx.x) % splits;
  // The last tiles see most keys, so they go first.
  const int row_tile = p.num_row_tiles - 1 - static_cast<int>(blockIdx.x) / splits;
  const int64_t first_row = static_cast<int64_t>(row_tile) * C::kRows;
  const float factor = (p.scales_last ? p.args.scale : 1.0f) * kLog2E;
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
  const int g = lane / 4;
  int own_limits[2];
  RowPlace places[2];
#pragma unroll
  for (int row = 0; row < 2; row++) {
    const int index = row_warp * kWarpRows + g + 8 * row;
    own_limits[row] = limits[index];
    const bool is_there = first_row + index < p.num_rows;
    places[row] = place_of(p, is_there ? first_row + index : 0, kv_head);
  }
  const auto visible = [&](int row, int slot, float score) {
    if (!p.scales_last) score *= p.args.scale;
    if (slot >= own_limits[row]) return -INFINITY;
    return p.args.mask_kind == MaskKind::kNone ? score : masked_score(p, places[row], batch, slot, score);
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
    attend_tile<C>(state, q + row_warp * kWarpRows * C::kStride, stages + stage * stage_size, tile * C::kKeys, key_warp,
                   factor, visible);
    __syncthreads();  // nobody reads it any more
  }
  copy_async_wait<0>();
  __syncthreads();

  // --- the warps' parts become the block's ---
  leave_state<C>(state, row_warp, key_warp, sums, states);
  __syncthreads();
  const int head_dim = static_cast<int>(p.args.head_dim);
  const int64_t left = p.num_rows - first_row;
  const int rows = left < C::kRows ? static_cast<int>(left) : C::kRows;
  const int64_t tile_index = (batch * gridDim.y + kv_head) * p.num_row_tiles + row_tile;
  // A warp a row, so that a row's state is found once for many columns.
  for (int row = warp; row < rows; row += kWarps) {
    const RowState whole = row_of_block<C>(states, row, factor);
    float* partial = splits > 1 ? partial_of<C>(p, tile_index, split, row) : nullptr;
    for (int column = lane; column < head_dim; column += kWarpSize) {
      const float sum = sum_of_block<C>(sums, states, row, column, whole, factor);
      if (splits > 1) {
        partial[column] = sum;
      } else {
        write_row<C>(p, batch, kv_head, first_row + row, column, sum, whole.denominator);
      }
    }
    if (splits > 1 && lane == 0) {
      partial[C::kD] = whole.maximum;
      partial[C::kD + 1] = whole.denominator;
    }
  }
  if (splits == 1) return;

  // --- the last block of a tile merges the splits ---
  __threadfence();  // what this thread wrote is there before the block is counted
  __syncthreads();
  const Shared<int> is_last = shared_cast<int>(scratch);
  if (thread == 0) {
    const unsigned before = atomicInc(p.cuda.counters + tile_index, static_cast<unsigned>(splits) - 1);  // wraps to 0
    is_last[0] = before == static_cast<unsigned>(splits) - 1;
  }
  __syncthreads();
  if (is_last[0] == 0) return;
  __threadfence();
  for (int row = warp; row < rows; row += kWarps) {
    const RowState whole = merged(
        splits, factor, [&](int i) { return partial_of<C>(p, tile_index, i, row)[C::kD]; },
        [&](int i) { return partial_of<C>(p, tile_index, i, row)[C::kD + 1]; });
    for (int column = lane; column < head_dim; column += kWarpSize) {
      float sum = 0.0f;
      for (int i = 0; i < splits; i++) {
        const float* partial = partial_of<C>(p, tile_index, i, row);
        sum += partial[column] * probability(partial[C::kD], subtrahend(whole.maximum), factor);
      }
      write_row<C>(p, batch, kv_head, first_row + row, column, sum, whole.denominator);
    }
  }
}

// --- choice ----------------------------------------------------------------------------------------------------------

int head_dim_bucket(int64_t head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

// Warps that share out rows: as few as hold all of them, so that the others share out the keys. Heads of 256 leave room
// for two in shared memory.
int row_warps_for(int64_t head_dim, int64_t num_rows) {
  if (head_dim_bucket(head_dim) == 256) return 2;
  return num_rows <= kWarpRows ? 1 : 4;
}

template <typename T, int kD, int kRowWarps>
void attention_as(const Params& p, const CudaStream& stream) {
  using C = Tile<T, kD, kRowWarps>;
  launch("attention_kernel", attention_kernel<C>,
         {.blocks = {static_cast<int64_t>(p.num_row_tiles) * p.cuda.num_splits, p.args.num_kv_heads, p.args.batch},
          .threads = kThreads,
          .shared_bytes = C::kSharedBytes,
          .starts_before_previous = true},
         stream, p);
}

template <typename T, int kD>
void attention_of_width(const Params& p, int row_warps, const CudaStream& stream) {
  if constexpr (kD == 256) {
    attention_as<T, kD, 2>(p, stream);
  } else {
    row_warps == 1 ? attention_as<T, kD, 1>(p, stream) : attention_as<T, kD, 4>(p, stream);
  }
}

}  // namespace

AttentionCudaPlan attention_cuda_plan(const AttentionArgs& args, int64_t num_slots, const CudaDevice& device) {
  AttentionCudaPlan plan;
  const int64_t rows = args.tokens * (args.num_heads / args.num_kv_heads);
  plan.row_warps = row_warps_for(args.head_dim, rows);
  plan.num_row_tiles = (rows + plan.row_warps * kWarpRows - 1) / (plan.row_warps * kWarpRows);
  const int64_t tiles = plan.num_row_tiles * args.num_kv_heads * args.batch;
  // Two blocks a multiprocessor, and at least two tiles of keys for each block when the cache is full.
  const int64_t room = tiles == 0 ? 1 : 2 * device.num_multiprocessors / tiles;
  const int64_t most = num_slots / (2 * 64);
  plan.num_splits = static_cast<int>(std::clamp<int64_t>(std::min(room, most), 1, 128));
  plan.num_counters = tiles;
  plan.workspace_floats = plan.num_splits == 1 ? 0
                                               : tiles * plan.num_splits * plan.row_warps * kWarpRows *
                                                     (head_dim_bucket(args.head_dim) + 2);
  return plan;
}

void attention_cuda(const AttentionArgs& args, const AttentionCudaArgs& cuda, const AttentionCudaPlan& plan,
                    const CudaStream& stream) {
  ALULA_CHECK(cuda.num_slots < (1 << 24), "kv_cache has ", cuda.num_slots, " slots; accepted: below 2^24");
  Params p = {args, cuda, args.tokens * (args.num_heads / args.num_kv_heads), static_cast<int>(plan.num_row_tiles),
              false};
  p.cuda.num_splits = plan.num_splits;
  const bool adds_mask = args.mask_kind != MaskKind::kNone && args.mask_kind != MaskKind::kBool;
  p.scales_last = !adds_mask && args.scale > 0;
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    switch (head_dim_bucket(args.head_dim)) {
      case 64:
        return attention_of_width<T, 64>(p, plan.row_warps, stream);
      case 128:
        return attention_of_width<T, 128>(p, plan.row_warps, stream);
      default:
        return attention_of_width<T, 256>(p, plan.row_warps, stream);
    }
  });
}

}  // namespace alula
