// block_sparse_attention on CUDA: query tiles that walk the plan's lists of key blocks, by cuda/attention_tile.cuh.
//
// A block of threads owns up to 64 query rows of one query block and head (N < 64: N rows; heads of more than 128: 32)
// and one chunk of the block's list. The chunk's key blocks, one after another, are a row of slots, met in tiles of
// kKeys slots: with N = 64 a tile is one key block, with N = 16 it is four of them. What a slot is (its column, the
// bias of its count, whether anybody sees it) is written to shared memory two tiles ahead, its key and value come by
// cp.async one tile ahead. Nothing is gathered or copied in global memory. Tiles that nobody sees are passed over; of
// those that lie within one key block and that every row sees whole and once, nothing is looked up slot by slot.
//
// A schedule, made with the plan (alula/block_schedule.py), says what each block of threads does: long lists, those of
// global blocks, go first, and are cut into chunks where one of them would last longer than all the rest. A chunk
// leaves its sums in a workspace; the last of a list to come, by a counter, merges them in order, in the same launch.
// How a list is cut depends on the plan alone: bits depend neither on the batch nor on the GPU.
//
// Every column has its writer: padding gets zeros, and where a batch row begins late, tile rows beyond its last block
// stand for the columns before its first.
//
// Not measured yet: no GPU was at hand.
#include "ops/block_sparse_attention.h"

#include <cmath>

#include "core/dispatch.h"
#include "cuda/attention_tile.cuh"
#include "cuda/block_sparse_slots.cuh"
#include "cuda/launch.h"
#include "cuda/vec.cuh"

namespace alula {
namespace {

using namespace tiles;
using Params = BlockSparseParams;

// 64 rows of narrow heads are two warps of 32 rows, all others four warps of 16.
template <typename T, int kHeadDim, int kRowsOfBlock>
constexpr int kRowTilesOf = sizeof(T) == 2 && kHeadDim == 64 && kRowsOfBlock == 64 ? 2 : 1;

template <typename T, int kHeadDim, int kRowsOfBlock, int kTilesOfWarp = kRowTilesOf<T, kHeadDim, kRowsOfBlock>>
struct Config : Tile<T, kHeadDim, kRowsOfBlock / kWarpRows / kTilesOfWarp, kTilesOfWarp, kWarps / kTilesOfWarp> {
  using Base = Tile<T, kHeadDim, kRowsOfBlock / kWarpRows / kTilesOfWarp, kTilesOfWarp, kWarps / kTilesOfWarp>;
  static constexpr int kOwnRows = kTilesOfWarp * kWarpRows;  // of a warp
  static constexpr int kSlotStages = 3;
  static constexpr int kColumnsOffset = Base::kSharedBytes;
  static constexpr int kBiasesOffset = kColumnsOffset + kSlotStages * Base::kKeys * 4;
  static constexpr int kSharedBytes = kBiasesOffset + kSlotStages * Base::kKeys * 4;
  static constexpr int kPartialSize = Base::kRows * (Base::kD + 2);  // floats that a chunk leaves
  static_assert(Base::kKeys <= Base::kBlockThreads, "a thread describes a slot");
  static_assert(kSharedBytes <= 99 * 1024, "every GPU since sm_80 can give a block this much");
};

// --- results -----------------------------------------------------------------------------------------------------

// Maxima are exponents of 2.
constexpr ScoreUnits kUnits = {1.0f, 1.0f};

// Where row `row` of the tile goes; null where it stands for no column.
template <typename T>
__device__ __forceinline__ T* output_of(const Params& p, const Item& item, int row) {
  if (row >= item.rows) return nullptr;
  int column = item.first_column + row;
  if (column >= p.args.tokens) column -= static_cast<int>(p.cuda.num_blocks) << p.block_shift;
  if (column < 0) return nullptr;
  const int64_t token = item.batch * p.args.tokens + column;
  return static_cast<T*>(p.args.out) + (token * p.args.num_heads + item.head) * p.args.head_dim;
}

__device__ __forceinline__ float row_factor(const Params& p, const Item& item, float denominator) {
  if (denominator == 0.0f) return 0.0f;
  return (p.args.head_mask == nullptr ? 1.0f : p.args.head_mask[item.head]) / denominator;
}

// Merges `count` parts of every row, four columns a thread, and calls done(row, column, values, whole). Part i has
// maximum state_of(i, row, 0) and denominator state_of(i, row, 1).
template <typename C, typename StateOf, typename SumsOf, typename Done>
__device__ __forceinline__ void merge_rows(const Params& p, int count, const StateOf& state_of, const SumsOf& sums_of,
                                           const Done& done) {
  for (int i = static_cast<int>(threadIdx.x); i < C::kRows * (C::kD / 4); i += C::kBlockThreads) {
    const int row = i / (C::kD / 4), column = i % (C::kD / 4) * 4;
    if (column >= p.args.head_dim) continue;
    const RowState whole = merged(
        count, kUnits, [&](int part) -> float { return state_of(part, row, 0); },
        [&](int part) -> float { return state_of(part, row, 1); });
    float values[4] = {};
    for (int part = 0; part < count; part++) {
      const float weight = weight_of(state_of(part, row, 0), whole.maximum, kUnits);
#pragma unroll
      for (int c = 0; c < 4; c++) values[c] += sums_of(part, row, column + c) * weight;
    }
    done(row, column, values, whole);
  }
}

template <typename C>
__device__ __forceinline__ void write_row(const Params& p, const Item& item, Shared<int> rows, int row, int column,
                                          const float (&values)[4], const RowState& whole) {
  using T = typename C::Element;
  T* out = output_of<T>(p, item, row);
  if (out == nullptr) return;
  const float factor = row_factor(p, item, whole.denominator);
  float y[4];
#pragma unroll
  for (int c = 0; c < 4; c++) y[c] = rows[row] < 0 ? 0.0f : values[c] * factor;
  store_pack<4>(out + column, y);
}

// Whole lists, where a warp has all keys of its rows: through the rows of Q that it alone has read, so that a row goes
// out 16 bytes a lane.
template <typename C>
__device__ __forceinline__ void write_warp(const Params& p, const Item& item, WarpState<C>& state, int row_warp,
                                           Shared<int> rows, Shared<typename C::Element> q) {
  using T = typename C::Element;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
  const Shared<T> own = q + row_warp * C::kOwnRows * C::kStride;
#pragma unroll
  for (int row = 0; row < 2 * C::kRowTiles; row++) {
    const bool is_there = rows[row_warp * C::kOwnRows + g + 8 * row] >= 0;
    const float factor = row_factor(p, item, reduce_lanes<Sum, 4>(state.rows[row].denominator));
#pragma unroll
    for (int n = 0; n < C::kD / 8; n++) {
      Pack<T, 2> pair;
#pragma unroll
      for (int i = 0; i < 2; i++)
        pair.values[i] = from_float<T>(is_there ? state.sums[row / 2][n][2 * (row % 2) + i] * factor : 0.0f);
      shared_cast<Pack<T, 2>>(own + (g + 8 * row) * C::kStride + n * 8 + 2 * t)[0] = pair;
    }
  }
  __syncwarp();
  constexpr int kPacks = C::kD / C::kPack;
  for (int i = lane; i < C::kOwnRows * kPacks; i += kWarpSize) {
    const int row = i / kPacks, column = i % kPacks * C::kPack;
    T* out = column < p.args.head_dim ? output_of<T>(p, item, row_warp * C::kOwnRows + row) : nullptr;
    if (out == nullptr) continue;
    const Pack<T, C::kPack> pack = shared_cast<Pack<T, C::kPack>>(own + row * C::kStride + column)[0];
    *reinterpret_cast<Pack<T, C::kPack>*>(out + column) = pack;
  }
}

// The chunk's part of the workspace: sums [kRows][kD], then maxima and denominators [kRows][2].
template <typename C>
__device__ __forceinline__ float* partial_of(const Params& p, const Item& item, int chunk) {
  return p.cuda.workspace + (item.partial + chunk * item.step) * C::kPartialSize;
}

template <typename C>
__device__ __forceinline__ void leave_partial(WarpState<C>& state, int row_warp, float* partial) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int row = 0; row < 2 * C::kRowTiles; row++) {
    const int index = row_warp * C::kOwnRows + g + 8 * row;
    const float denominator = reduce_lanes<Sum, 4>(state.rows[row].denominator);
    if (t == 0) {
      partial[C::kRows * C::kD + 2 * index] = state.rows[row].maximum;
      partial[C::kRows * C::kD + 2 * index + 1] = denominator;
    }
#pragma unroll
    for (int n = 0; n < C::kD / 8; n++) {
      const Pack<float, 2> pair = {{state.sums[row / 2][n][2 * (row % 2)], state.sums[row / 2][n][2 * (row % 2) + 1]}};
      *reinterpret_cast<Pack<float, 2>*>(partial + index * C::kD + n * 8 + 2 * t) = pair;
    }
  }
}

// --- the kernel --------------------------------------------------------------------------------------------------

// kHasMarks: there are pairs within a slot that do not see each other (a causal limit, global tokens). Without, no
// score needs a branch.
template <typename C, bool kHasMarks>
__global__ void __launch_bounds__(C::kBlockThreads, 1) block_sparse_attention_kernel(Params p) {
  using T = typename C::Element;
  const Shared<T> q = dynamic_shared<T>();
  const Shared<T> stages = dynamic_shared<T>(C::kQueryBytes);
  const Shared<int> rows = dynamic_shared<int>(C::kLimitsOffset);  // column of each, -1 where it is no token
  const Shared<float> scratch = dynamic_shared<float>(C::kScratchOffset);
  const Shared<int> all_columns = dynamic_shared<int>(C::kColumnsOffset);
  const Shared<float> all_biases = dynamic_shared<float>(C::kBiasesOffset);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int row_warp = warp % C::kRowWarps, key_warp = warp / C::kRowWarps;
  wait_for_previous_kernel();
  let_next_kernel_start();  // it fetches its weights meanwhile
  Item item;
  if (!find_item<C>(p, item)) return;

  // --- rows: which of them are tokens ---
  int last_column = -1;
  if (thread < C::kRows) {
    const int column = item.first_column + thread;
    if (thread < item.rows && is_token(p, item, column)) last_column = column;
    rows[thread] = last_column;
  }
  // Whole numbers up to 2^24 in fp32: T is checked.
  last_column = static_cast<int>(reduce_block<Max>(static_cast<float>(last_column), scratch));
  if (last_column < 0) {
    if (item.chunk > 0) return;
    for (int i = thread; i < C::kRows * (C::kD / 4); i += C::kBlockThreads) {
      const int row = i / (C::kD / 4), column = i % (C::kD / 4) * 4;
      if (column < p.args.head_dim) write_row<C>(p, item, rows, row, column, {}, {});
    }
    return;
  }
  load_rows<C>(p, item, rows, q);
  [[maybe_unused]] int own_columns[2 * C::kRowTiles];
  [[maybe_unused]] bool are_global[2 * C::kRowTiles];
  if constexpr (kHasMarks) {
#pragma unroll
    for (int row = 0; row < 2 * C::kRowTiles; row++) {
      own_columns[row] = rows[row_warp * C::kOwnRows + lane / 4 + 8 * row];
      are_global[row] = is_global(p, item, own_columns[row]);
    }
  }

  // --- the chunk's slots, tile by tile ---
  const int64_t kv_head = item.head / (p.args.num_heads / p.args.num_kv_heads);
  const T* k = static_cast<const T*>(p.args.k) + item.batch * p.args.k_strides[0] + kv_head * p.args.k_strides[1];
  const T* v = static_cast<const T*>(p.args.v) + item.batch * p.args.v_strides[0] + kv_head * p.args.v_strides[1];
  const int past = item.count << p.block_shift;
  WarpState<C> state = {};
  TileFacts facts, next_facts, later_facts;
  int tile = next_tile<C>(p, item, 0, past, last_column, facts);
  int next = next_tile<C>(p, item, tile + C::kKeys, past, last_column, next_facts);
  describe_slots<C>(p, item, tile, all_columns, all_biases);
  describe_slots<C>(p, item, next, all_columns + C::kKeys, all_biases + C::kKeys);
  __syncthreads();
  if (tile < past) load_slots<C>(p, k, v, facts, all_columns, stages);
  copy_async_commit();
  for (int i = 0; tile < past; i++) {
    const int slots = i % C::kSlotStages * C::kKeys, next_slots = (i + 1) % C::kSlotStages * C::kKeys;
    const int later_slots = (i + 2) % C::kSlotStages * C::kKeys;
    constexpr int kStageSize = 2 * C::kKeyTileSize;
    const int later = next_tile<C>(p, item, next + C::kKeys, past, last_column, later_facts);
    if (later_facts.needs_slots()) {
      describe_slots<C>(p, item, later, all_columns + later_slots, all_biases + later_slots);
    }
    if (next < past) {
      load_slots<C>(p, k, v, next_facts, all_columns + next_slots, stages + (i + 1) % C::kStages * kStageSize);
    }
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();  // this tile and the next one's slots are there for all
    [[maybe_unused]] const Shared<int> columns = all_columns + slots;
    const Shared<float> biases = all_biases + slots;
    const auto seen = [&](int row, int slot, float score) -> float {
      const float biased = score * p.sign + biases[slot];
      if constexpr (kHasMarks) {
        if (!facts.is_marked) return biased;
        const int key = columns[slot];
        if (key < 0) return biased;
        const int column = key & ~kTokensOnly;
        const bool sees = !(p.args.causal && column > own_columns[row]) &&
                          (column == key || are_global[row] || is_global(p, item, column));
        return sees ? biased : -INFINITY;
      } else {
        return biased;
      }
    };
    attend_tile<C>(state, q + row_warp * C::kOwnRows * C::kStride, stages + i % C::kStages * kStageSize, 0, key_warp,
                   {p.unit, 1.0f}, facts.is_plain, seen);
    __syncthreads();  // nobody reads it any more
    tile = next, next = later;
    facts = next_facts, next_facts = later_facts;
  }
  copy_async_wait<0>();
  __syncthreads();

  // --- the warps' parts become the block's: results of a whole list, a partial of a chunk ---
  const bool is_whole = item.num_chunks == 1;
  float* own_partial = is_whole ? nullptr : partial_of<C>(p, item, item.chunk);
  if constexpr (C::kKeyWarps == 1) {
    if (is_whole) return write_warp<C>(p, item, state, row_warp, rows, q);
    leave_partial<C>(state, row_warp, own_partial);
  } else {
    const Shared<float> sums = dynamic_shared<float>();  // in the place of queries and keys
    const Shared<float> states = dynamic_shared<float>(C::kStatesOffset);
    leave_state<C>(state, row_warp, key_warp, sums, states);
    __syncthreads();
    merge_rows<C>(
        p, C::kKeyWarps, [&](int part, int row, int which) { return states[2 * (part * C::kRows + row) + which]; },
        [&](int part, int row, int column) { return sums[(part * C::kRows + row) * C::kD + column]; },
        [&](int row, int column, const float (&values)[4], const RowState& whole) {
          if (is_whole) return write_row<C>(p, item, rows, row, column, values, whole);
          store_pack<4>(own_partial + row * C::kD + column, values);
          if (column > 0) return;
          own_partial[C::kRows * C::kD + 2 * row] = whole.maximum;
          own_partial[C::kRows * C::kD + 2 * row + 1] = whole.denominator;
        });
    if (is_whole) return;
  }

  // --- the last chunk of a list to come merges them all ---
  __threadfence();  // what this thread wrote is there before the block is counted
  __syncthreads();
  const Shared<int> is_last = shared_cast<int>(scratch);
  if (thread == 0) {
    const auto last = static_cast<unsigned>(item.num_chunks) - 1;
    is_last[0] = atomicInc(p.cuda.counters + item.partial, last) == last;  // wraps to 0
  }
  __syncthreads();
  if (is_last[0] == 0) return;
  __threadfence();
  merge_rows<C>(
      p, item.num_chunks,
      [&](int part, int row, int which) { return partial_of<C>(p, item, part)[C::kRows * C::kD + 2 * row + which]; },
      [&](int part, int row, int column) { return partial_of<C>(p, item, part)[row * C::kD + column]; },
      [&](int row, int column, const float (&values)[4], const RowState& whole) {
        write_row<C>(p, item, rows, row, column, values, whole);
      });
}

// --- choice ------------------------------------------------------------------------------------------------------

int head_dim_bucket(int64_t head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

// Query rows of a block of threads. Heads of 256 leave room for 32 in shared memory.
int rows_for(int64_t head_dim, int64_t block_size) {
  if (head_dim_bucket(head_dim) == 256) return 32;
  return static_cast<int>(std::min<int64_t>(block_size, 64));
}

template <typename T, int kD, int kRows>
void attend(const Params& p, int64_t blocks, const CudaStream& stream) {
  using C = Config<T, kD, kRows>;
  const bool has_marks = p.args.causal || p.args.global_tokens != nullptr;
  launch("block_sparse_attention_kernel",
         has_marks ? block_sparse_attention_kernel<C, true> : block_sparse_attention_kernel<C, false>,
         {.blocks = {blocks},
          .threads = C::kBlockThreads,
          .shared_bytes = C::kSharedBytes,
          .starts_before_previous = true},
         stream, p);
}

template <typename T, int kD>
void attend_width(const Params& p, int rows, int64_t blocks, const CudaStream& stream) {
  if constexpr (kD == 256) {
    attend<T, kD, 32>(p, blocks, stream);
  } else {
    switch (rows) {
      case 16:
        return attend<T, kD, 16>(p, blocks, stream);
      case 32:
        return attend<T, kD, 32>(p, blocks, stream);
      default:
        return attend<T, kD, 64>(p, blocks, stream);
    }
  }
}

}  // namespace

BlockSparseAttentionCudaPlan block_sparse_attention_cuda_plan(const BlockSparseAttentionArgs& args,
                                                              const BlockSparseAttentionCudaArgs& cuda) {
  BlockSparseAttentionCudaPlan plan;
  plan.rows = rows_for(args.head_dim, args.block_size);
  plan.block_tiles = std::max<int64_t>(1, args.block_size / plan.rows);
  const int64_t repeats =
      (cuda.plan_heads == 1 ? args.num_heads : 1) * (cuda.plan_batches == 1 ? cuda.batch : 1) * plan.block_tiles;
  plan.num_blocks = cuda.num_items * repeats;
  plan.num_counters = cuda.num_partials * repeats;
  plan.workspace_floats = plan.num_counters * plan.rows * (head_dim_bucket(args.head_dim) + 2);
  return plan;
}

void block_sparse_attention_cuda(const BlockSparseAttentionArgs& args, const BlockSparseAttentionCudaArgs& cuda,
                                 const BlockSparseAttentionCudaPlan& plan, const CudaStream& stream) {
  ALULA_CHECK(args.tokens < (1 << 24), "q has ", args.tokens, " tokens; accepted: below 2^24");
  // A scale that small leaves no difference between scores, but is too small to divide a bias by.
  const bool is_nothing = std::abs(args.scale) < 1e-30f;
  Params p = {args,
              cuda,
              0,
              static_cast<int>(plan.block_tiles),
              is_nothing ? 0.0f : std::copysign(1.0f, args.scale),
              is_nothing ? kLog2E : std::abs(args.scale) * kLog2E};
  while (1 << p.block_shift < args.block_size) p.block_shift++;
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    switch (head_dim_bucket(args.head_dim)) {
      case 64:
        return attend_width<T, 64>(p, plan.rows, plan.num_blocks, stream);
      case 128:
        return attend_width<T, 128>(p, plan.rows, plan.num_blocks, stream);
      default:
        return attend_width<T, 256>(p, plan.rows, plan.num_blocks, stream);
    }
  });
}

}  // namespace alula
