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
#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/online_softmax.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace alula {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpRows = 16;
constexpr float kLog2E = 1.44269504088896341f;

struct Params {
  AttentionArgs args;
  AttentionCudaArgs cuda;
  int64_t num_rows;   // T * (H / G)
  int num_row_tiles;  // of each batch row and key/value head
  bool scales_last;   // a score is the plain product, and scale is applied in the exponent
};

// Everything about a tile that the compiler knows. kD: head size rounded up; kRowWarps: warps that share out the rows.
template <typename T, int kHeadDim, int kRowWarpsOfBlock>
struct Tile {
  using Element = T;
  static constexpr int kD = kHeadDim;
  static constexpr int kRowWarps = kRowWarpsOfBlock;
  static constexpr int kKeyWarps = kWarps / kRowWarps;
  static constexpr int kRows = kRowWarps * kWarpRows;
  static constexpr bool kIsLarge = kD > 128 || (sizeof(T) == 4 && kD > 64 && kRowWarps == 4);
  static constexpr int kKeys = (sizeof(T) == 2 ? 64 : 32) / (kIsLarge ? 2 : 1);
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  static constexpr int kPack = 16 / static_cast<int>(sizeof(T));
  // 16 bytes of padding a row: neighbouring rows begin in other banks.
  static constexpr int kStride = kD + kPack;
  static constexpr int kKeyTileSize = kKeys * kStride;  // elements of a tile of keys; as many of values follow
  static constexpr int kStages = 2;
  static constexpr int kQueryBytes = kRows * kStride * static_cast<int>(sizeof(T));
  static constexpr int kStageBytes = 2 * kKeyTileSize * static_cast<int>(sizeof(T));
  // At the end the stages' memory holds the warps' sums instead: [key warp][row][kD].
  static constexpr int kSumsBytes = kKeyWarps * kRows * kD * 4;
  static constexpr int kLimitsOffset = kQueryBytes + std::max(kStages * kStageBytes, kSumsBytes);
  static constexpr int kStatesOffset = kLimitsOffset + kRows * 4;
  static constexpr int kScratchOffset = kStatesOffset + kKeyWarps * kRows * 2 * 4;
  static constexpr int kSharedBytes = kScratchOffset + kWarps * 4;
  static_assert(kWarpKeys % WarpProduct<T>::kDepth == 0 && kWarpKeys % 8 == 0, "a warp's keys are whole steps");
  static_assert(kD % 16 == 0, "head sizes are rounded up to whole steps");
  static_assert(kSharedBytes <= 99 * 1024, "every GPU since sm_80 can give a block this much");
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

// 16 bytes from global to shared memory; element by element where the source does not lie even.
template <typename T, int N>
__device__ __forceinline__ void copy_pack(Shared<T> to, const T* from, bool is_there, bool is_even) {
  if (is_even) {
    copy_async_16(to, from, is_there);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; i++) to[i] = is_there ? from[i] : T{};
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

// A warp's rows: lane 4 g + t holds of rows g and g + 8 (index 0 and 1) the columns 8 n + 2 t and the next of tile n.
template <typename C>
struct WarpState {
  RowState rows[2];
  float sums[C::kD / 8][4];
};

// One tile of keys, those of this warp: scores, softmax so far, sums.
template <typename C>
__device__ __forceinline__ void attend_tile(const Params& p, WarpState<C>& state, Shared<typename C::Element> q,
                                            Shared<typename C::Element> stage, int first, const int (&limits)[2],
                                            const RowPlace (&places)[2], int64_t batch, int key_warp, float factor) {
  using T = typename C::Element;
  using Product = WarpProduct<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, t = lane % 4;
  const int own_first = key_warp * C::kWarpKeys;
  const Shared<T> keys = stage + own_first * C::kStride;
  const Shared<T> values = keys + C::kKeyTileSize;

  // Scores of 8 keys a tile; where a warp has just 8, the second tile of the loaded pair is not used.
  constexpr int kTiles = C::kWarpKeys / 8;
  float scores[kTiles][4] = {};
#pragma unroll
  for (int d = 0; d < C::kD; d += Product::kDepth) {
    typename Product::Left a;
    Product::load_left(a, q + d, C::kStride, lane);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      typename Product::Right b[2];
      Product::load_right_rows(b, keys + n * 8 * C::kStride + d, C::kStride, lane);
      Product::multiply(scores[n], a, b[0]);
      if (n + 1 < kTiles) Product::multiply(scores[n + 1 < kTiles ? n + 1 : n], a, b[1]);
    }
  }

  // What a row does not see becomes -inf; the largest of each row over the lanes that hold it.
  float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int key = first + own_first + n * 8 + 2 * t + i % 2, row = i / 2;
      float v = scores[n][i];
      if (!p.scales_last) v *= p.args.scale;
      if (key >= limits[row]) {
        v = -INFINITY;
      } else if (p.args.mask_kind != MaskKind::kNone) {
        v = masked_score(p, places[row], batch, key, v);
      }
      scores[n][i] = v;
      largest[row] = fmaxf(largest[row], v);
    }
  }
  float correction[2];
#pragma unroll
  for (int row = 0; row < 2; row++) {
    correction[row] = raise_maximum(state.rows[row], reduce_lanes<Max, 4>(largest[row]), factor);
  }
#pragma unroll
  for (int n = 0; n < C::kD / 8; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) state.sums[n][i] *= correction[i / 2];
  }

  // Probabilities; a lane's share of the denominators is added up over lanes at the very end.
  const float subtracted[2] = {subtrahend(state.rows[0].maximum), subtrahend(state.rows[1].maximum)};
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      scores[n][i] = probability(scores[n][i], subtracted[i / 2], factor);
      state.rows[i / 2].denominator += scores[n][i];
    }
  }
#pragma unroll
  for (int step = 0; step < C::kWarpKeys / Product::kDepth; step++) {
    const typename Product::Left a = Product::left_of(&scores[step * Product::kDepth / 8]);
#pragma unroll
    for (int n = 0; n < C::kD / 8; n += 2) {
      typename Product::Right b[2];
      Product::load_right_columns(b, values + step * Product::kDepth * C::kStride + n * 8, C::kStride, lane);
      Product::multiply(state.sums[n], a, b[0]);
      Product::multiply(state.sums[n + 1], a, b[1]);
    }
  }
}

// The warps' states into shared memory: sums [key warp][row][kD], maxima and denominators [key warp][row][2].
template <typename C>
__device__ __forceinline__ void leave_state(WarpState<C>& state, int row_warp, int key_warp, Shared<float> sums,
                                            Shared<float> states) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int row = 0; row < 2; row++) {
    const int index = key_warp * C::kRows + row_warp * kWarpRows + g + 8 * row;
    const float denominator = reduce_lanes<Sum, 4>(state.rows[row].denominator);
    if (t == 0) {
      states[2 * index] = state.rows[row].maximum;
      states[2 * index + 1] = denominator;
    }
#pragma unroll
    for (int n = 0; n < C::kD / 8; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) sums[index * C::kD + n * 8 + 2 * t + i] = state.sums[n][2 * row + i];
    }
  }
}

// Of `count` parts of a row: the common maximum and, relative to it, the denominator. Part i is at `maximum_of(i)` and
// `denominator_of(i)`.
template <typename MaximumOf, typename DenominatorOf>
__device__ __forceinline__ RowState merged(int count, float factor, const MaximumOf& maximum_of,
                                           const DenominatorOf& denominator_of) {
  RowState row;
  for (int i = 0; i < count; i++) row.maximum = fmaxf(row.maximum, maximum_of(i));
  for (int i = 0; i < count; i++) {
    row.denominator += denominator_of(i) * probability(maximum_of(i), subtrahend(row.maximum), factor);
  }
  return row;
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
  for (int tile = first_tile; tile < last_tile; tile++) {
    const int stage = (tile - first_tile) % C::kStages;
    const int stage_size = 2 * C::kKeyTileSize;
    if (tile + 1 < last_tile) {
      load_keys<C>(p, kv, (tile + 1) * C::kKeys, limit, stages + (1 - stage) * stage_size);
    }
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();  // this tile is there for all
    attend_tile<C>(p, state, q + row_warp * kWarpRows * C::kStride, stages + stage * stage_size, tile * C::kKeys,
                   own_limits, places, batch, key_warp, factor);
    __syncthreads();  // nobody reads it any more
  }
  copy_async_wait<0>();
  __syncthreads();

  // --- the warps' parts become the block's ---
  leave_state<C>(state, row_warp, key_warp, sums, states);
  __syncthreads();
  const int head_dim = static_cast<int>(p.args.head_dim);
  const auto row_of_block = [&](int row) {
    return merged(
        C::kKeyWarps, factor, [&](int i) -> float { return states[2 * (i * C::kRows + row)]; },
        [&](int i) -> float { return states[2 * (i * C::kRows + row) + 1]; });
  };
  const auto sum_of_block = [&](int row, int column, const RowState& whole) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < C::kKeyWarps; i++) {
      const float maximum = states[2 * (i * C::kRows + row)];
      const float part = sums[(i * C::kRows + row) * C::kD + column];
      sum += part * probability(maximum, subtrahend(whole.maximum), factor);
    }
    return sum;
  };
  const int64_t left = p.num_rows - first_row;
  const int rows = left < C::kRows ? static_cast<int>(left) : C::kRows;
  const int64_t tile_index = (batch * gridDim.y + kv_head) * p.num_row_tiles + row_tile;
  // A warp a row, so that a row's state is found once for many columns.
  for (int row = warp; row < rows; row += kWarps) {
    const RowState whole = row_of_block(row);
    float* partial = splits > 1 ? partial_of<C>(p, tile_index, split, row) : nullptr;
    for (int column = lane; column < head_dim; column += kWarpSize) {
      const float sum = sum_of_block(row, column, whole);
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
