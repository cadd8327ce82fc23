// What kernels that attend to keys tile by tile share: how a tile lies in shared memory, what a warp does with one, how
// the warps' parts become the block's. What a row sees of a tile is the caller's: `seen(row, slot, score)`.
//
// A block of kWarps warps holds kRows query rows [kRows][kStride] and, in kStages stages, tiles of kKeys slots: keys
// [kKeys][kStride], then values. Warps share out the rows, 16 or 32 each, and the keys of a tile where the rows are
// fewer than the warps have room for. A warp reads a tile's keys once for all of its rows: with 16 of them, by the
// figures on paper, shared memory gives operands no faster than tensor cores take them. Scores and sums are fp32, the
// products' operands are T (fp32 in three TF32 products).
#pragma once

#include <algorithm>

#include "cuda/mma.cuh"
#include "cuda/online_softmax.cuh"
#include "cuda/reduce.cuh"

namespace alula::tiles {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpRows = 16;

// Everything about a tile that the compiler knows. kD: head size rounded up; kRowWarps: warps that share out the rows;
// kRowTiles: of 16 rows, that a warp has.
template <typename T, int kHeadDim, int kRowWarpsOfBlock, int kRowTilesOfWarp = 1, int kWarpsOfBlock = kWarps>
struct Tile {
  using Element = T;
  static constexpr int kD = kHeadDim;
  static constexpr int kRowWarps = kRowWarpsOfBlock;
  static constexpr int kRowTiles = kRowTilesOfWarp;
  static constexpr int kBlockThreads = kWarpsOfBlock * kWarpSize;
  static constexpr int kKeyWarps = kWarpsOfBlock / kRowWarps;
  static constexpr int kRows = kRowWarps * kRowTiles * kWarpRows;
  static constexpr bool kIsLarge = kD > 128 || (kD > 64 && (kRowTiles > 1 || (sizeof(T) == 4 && kRowWarps == 4)));
  static constexpr int kKeys = (sizeof(T) == 2 ? 64 : 32) / (kIsLarge ? 2 : 1);
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  static constexpr int kPack = 16 / static_cast<int>(sizeof(T));
  // 16 bytes of padding a row: neighbouring rows begin in other banks.
  static constexpr int kStride = kD + kPack;
  static constexpr int kKeyTileSize = kKeys * kStride;  // elements of a tile of keys; as many of values follow
  static constexpr int kStages = 2;
  static constexpr int kQueryBytes = kRows * kStride * static_cast<int>(sizeof(T));
  static constexpr int kStageBytes = 2 * kKeyTileSize * static_cast<int>(sizeof(T));
  // At the end the warps' sums are there instead: [key warp][row][kD].
  static constexpr int kSumsBytes = kKeyWarps * kRows * kD * 4;
  static constexpr int kLimitsOffset = std::max(kQueryBytes + kStages * kStageBytes, kSumsBytes);
  static constexpr int kStatesOffset = kLimitsOffset + kRows * 4;
  static constexpr int kScratchOffset = kStatesOffset + (kKeyWarps + 1) * kRows * 2 * 4;
  static constexpr int kSharedBytes = kScratchOffset + kWarps * 4;
  static_assert(kWarpKeys % WarpProduct<T>::kDepth == 0 && kWarpKeys % 8 == 0, "a warp's keys are whole steps");
  static_assert(kD % 16 == 0, "head sizes are rounded up to whole steps");
  static_assert(kSharedBytes <= 99 * 1024, "every GPU since sm_80 can give a block this much");
};

// Brings kRows rows of kPacks packs of 16 bytes to shared memory, by copies in the background or, where the source does
// not lie even, element by element. All packs of a thread are one column's: what depends on the column alone is found
// once, and the copies follow each other in few instructions. from(row, pack) is where a pack comes from, read only
// where is_there(row, pack) holds (zeros elsewhere); to(row, pack) where it goes.
template <typename C, int kRows, int kPacks, typename To, typename From, typename IsThere>
__device__ __forceinline__ void copy_packs(bool is_even, const To& to, const From& from, const IsThere& is_there) {
  using T = typename C::Element;
  constexpr int kStep = C::kBlockThreads / kPacks;
  static_assert(C::kBlockThreads % kPacks == 0 && kRows % kStep == 0, "the threads take whole rows at a time");
  const int first = static_cast<int>(threadIdx.x) / kPacks, pack = static_cast<int>(threadIdx.x) % kPacks;
  if (is_even) {
    const Shared<T> begin = to(first, pack);
#pragma unroll
    for (int row = 0; row < kRows; row += kStep) {
      copy_async_16(begin + row * C::kStride, from(first + row, pack), is_there(first + row, pack));
    }
  } else {
#pragma unroll 1
    for (int row = first; row < kRows; row += kStep) {
      const Shared<T> begin = to(row, pack);
#pragma unroll 1
      for (int i = 0; i < C::kPack; i++) begin[i] = is_there(row, pack) ? from(row, pack)[i] : T{};
    }
  }
}

// A warp's rows: lane 4 g + t holds of rows 16 m + g and 16 m + g + 8 (index 2 m and 2 m + 1) the columns 8 n + 2 t and
// the next of tile n.
template <typename C>
struct WarpState {
  RowState rows[2 * C::kRowTiles];
  float sums[C::kRowTiles][C::kD / 8][4];
};

// One tile of keys, those of this warp: scores, softmax so far, sums. `q` is the warp's own rows; the tile begins with
// slot `first`. Where `sees_all`, every row sees every slot, and scores are the plain products; elsewhere
// seen(row, slot, score) is what becomes of the score of the lane's row `row`, -inf where it does not see the slot.
template <typename C, typename Seen>
__device__ __forceinline__ void attend_tile(WarpState<C>& state, Shared<typename C::Element> q,
                                            Shared<typename C::Element> stage, int first, int key_warp,
                                            ScoreUnits units, bool sees_all, const Seen& seen) {
  using T = typename C::Element;
  using Product = WarpProduct<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, t = lane % 4;
  const int own_first = key_warp * C::kWarpKeys;
  const Shared<T> keys = stage + own_first * C::kStride;
  const Shared<T> values = keys + C::kKeyTileSize;

  // Scores of 8 keys a tile; where a warp has just 8, the second tile of the loaded pair is not used.
  constexpr int kTiles = C::kWarpKeys / 8;
  float scores[C::kRowTiles][kTiles][4] = {};
#pragma unroll
  for (int d = 0; d < C::kD; d += Product::kDepth) {
    typename Product::Left a[C::kRowTiles];
#pragma unroll
    for (int m = 0; m < C::kRowTiles; m++) {
      Product::load_left(a[m], q + m * kWarpRows * C::kStride + d, C::kStride, lane);
    }
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      typename Product::Right b[2];
      Product::load_right_rows(b, keys + n * 8 * C::kStride + d, C::kStride, lane);
#pragma unroll
      for (int m = 0; m < C::kRowTiles; m++) {
        Product::multiply(scores[m][n], a[m], b[0]);
        if (n + 1 < kTiles) Product::multiply(scores[m][n + 1 < kTiles ? n + 1 : n], a[m], b[1]);
      }
    }
  }

  if (!sees_all) {
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int slot = first + own_first + n * 8 + 2 * t + i;
#pragma unroll
        for (int row = 0; row < 2 * C::kRowTiles; row++) {
          float& score = scores[row / 2][n][row % 2 * 2 + i];
          score = seen(row, slot, score);
        }
      }
    }
  }

  // The largest score of each row; where one is above the slack, of all lanes that hold the row.
  float largest[2 * C::kRowTiles];
  bool is_any_above = false;
#pragma unroll
  for (int row = 0; row < 2 * C::kRowTiles; row++) {
    largest[row] = -INFINITY;
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) largest[row] = fmaxf(largest[row], scores[row / 2][n][row % 2 * 2 + i]);
    }
    is_any_above |= is_above(state.rows[row], largest[row], units);
  }
  if (__any_sync(kWholeWarp, is_any_above)) {
#pragma unroll
    for (int row = 0; row < 2 * C::kRowTiles; row++) {
      const float correction = raise_maximum(state.rows[row], reduce_lanes<Max, 4>(largest[row]), units);
#pragma unroll
      for (int n = 0; n < C::kD / 8; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) state.sums[row / 2][n][row % 2 * 2 + i] *= correction;
      }
    }
  }

  // Probabilities; a lane's share of the denominators is added up over lanes at the very end.
#pragma unroll
  for (int row = 0; row < 2 * C::kRowTiles; row++) {
    const float subtracted = subtrahend(state.rows[row].maximum);
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float& score = scores[row / 2][n][row % 2 * 2 + i];
        score = probability(score, subtracted, units);
        state.rows[row].denominator += score;
      }
    }
  }
#pragma unroll
  for (int step = 0; step < C::kWarpKeys / Product::kDepth; step++) {
    typename Product::Left a[C::kRowTiles];
#pragma unroll
    for (int m = 0; m < C::kRowTiles; m++) a[m] = Product::left_of(&scores[m][step * Product::kDepth / 8]);
#pragma unroll
    for (int n = 0; n < C::kD / 8; n += 2) {
      typename Product::Right b[2];
      Product::load_right_columns(b, values + step * Product::kDepth * C::kStride + n * 8, C::kStride, lane);
#pragma unroll
      for (int m = 0; m < C::kRowTiles; m++) {
        Product::multiply(state.sums[m][n], a[m], b[0]);
        Product::multiply(state.sums[m][n + 1], a[m], b[1]);
      }
    }
  }
}

// The warps' states into shared memory: sums [key warp][row][kD], maxima and denominators [key warp][row][2].
template <typename C>
__device__ __forceinline__ void leave_state(WarpState<C>& state, int row_warp, int key_warp, Shared<float> sums,
                                            Shared<float> states) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int row = 0; row < 2 * C::kRowTiles; row++) {
    const int index = key_warp * C::kRows + row_warp * C::kRowTiles * kWarpRows + g + 8 * row;
    const float denominator = reduce_lanes<Sum, 4>(state.rows[row].denominator);
    if (t == 0) {
      states[2 * index] = state.rows[row].maximum;
      states[2 * index + 1] = denominator;
    }
#pragma unroll
    for (int n = 0; n < C::kD / 8; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        sums[index * C::kD + n * 8 + 2 * t + i] = state.sums[row / 2][n][2 * (row % 2) + i];
      }
    }
  }
}

// Of `count` parts of a row: the common maximum and, relative to it, the denominator. Part i is at `maximum_of(i)` and
// `denominator_of(i)`.
template <typename MaximumOf, typename DenominatorOf>
__device__ __forceinline__ RowState merged(int count, ScoreUnits units, const MaximumOf& maximum_of,
                                           const DenominatorOf& denominator_of) {
  RowState row;
  for (int i = 0; i < count; i++) row.maximum = fmaxf(row.maximum, maximum_of(i));
  for (int i = 0; i < count; i++) {
    row.denominator += denominator_of(i) * weight_of(maximum_of(i), row.maximum, units);
  }
  return row;
}

}  // namespace alula::tiles
