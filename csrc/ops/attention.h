// attention: softmax(scale q k^T + mask) v over the merged cache, prefill and decode, multi-head to multi-query.
//
// A query row is one head of one token. The rows of a batch row that read one key/value head are numbered
// (token, head of the group), padding left out, and cut into tiles; a tile walks its keys in fixed tiles of
// keys_per_tile slots.
#pragma once

#include "core/types.h"
#include "cpu/isa.h"
#include "cuda/device.h"

namespace alula {

struct AttentionArgs {
  DType dtype;               // of q, kv_cache and out
  int64_t batch;             // B
  int64_t tokens;            // T
  int64_t num_heads;         // H
  int64_t num_kv_heads;      // G, divides H
  int64_t head_dim;          // D
  const void* q;             // [B, T, H, D]
  const void* kv_cache;      // [B, G, S, 2 * D]: key, then value; the last dimension is contiguous
  int64_t kv_strides[3];     // of B, G, S, in elements
  const int32_t* positions;  // [B, T]: the slot of a query; negative: padding, whose output is zeros
  const int32_t* lengths;    // [B]: how many slots hold a key
  bool causal;               // a query sees no slot beyond its own
  MaskKind mask_kind;
  const void* mask;         // [B, H, T, S'], bool: true = visible; else added to the scores. Null for kNone
  int64_t mask_strides[4];  // of B, H, T, S', in elements; 0 where it is broadcast
  const float* head_mask;   // [H], may be null
  float scale;
  void* out;  // [B, T, H * D] with out_stride elements from a token to the next
  int64_t out_stride;
};

// Rows of one tile: those numbered [first_row, first_row + num_rows) of batch row `batch` and key/value head `kv_head`.
struct AttentionTile {
  int64_t batch, kv_head;
  const int32_t* tokens;  // [num_rows of the batch row / group]: the tokens of the batch row that are no padding
  const int32_t* limits;  // the same: how many slots each of them sees
  int32_t first_row, num_rows;
  int32_t limit;  // most slots that one of the rows sees
};

struct AttentionKernels {
  int rows_per_block;  // a tile's rows should be a multiple of it
  int max_rows;        // of a tile
  int keys_per_tile;
  // Bytes of working memory of a thread, aligned to 64.
  int64_t (*scratch_bytes)(const AttentionArgs& args);
  // Bytes of what a tile keeps of one key tile, for `rows` rows; a multiple of 64.
  int64_t (*partial_bytes)(const AttentionArgs& args, int rows);
  // All keys of the tile, and its part of `out`. `after`: the tile that this thread takes up next, null if not known.
  void (*attend_all)(const AttentionArgs& args, const AttentionTile& tile, const AttentionTile* after, void* scratch);
  // Key tile `index` alone, into partial [partial_bytes].
  void (*attend_one)(const AttentionArgs& args, const AttentionTile& tile, int64_t index, void* partial, void* scratch);
  // The partials of key tiles 0 .. count - 1, one after another, merged in order: the same bits as attend_all.
  void (*combine)(const AttentionArgs& args, const AttentionTile& tile, const void* partials, int64_t count,
                  void* scratch);
};

ALULA_DECLARE_KERNELS(AttentionKernels, kAttention)

// --- CUDA: positions and lengths lie on the device ------------------------------------------------------------------

struct AttentionCudaArgs {
  int64_t num_slots;                  // S
  int64_t mask_keys;                  // S' of the mask; keys beyond are hidden
  bool is_query_even, is_cache_even;  // can be read 16 bytes at a time
  int num_splits;                     // set by the launcher
  float* workspace;                   // [workspace_floats] of the plan
  uint32_t* counters;                 // [num_counters], zeros before and after
};

// How the work is cut. Known on the host without any length, so that a captured graph serves every one.
struct AttentionCudaPlan {
  int rows;  // of a block of threads
  int64_t num_row_tiles;
  int num_splits;  // of the keys
  int64_t workspace_floats, num_counters;
};

AttentionCudaPlan attention_cuda_plan(const AttentionArgs& args, int64_t num_slots, const CudaDevice& device);
void attention_cuda(const AttentionArgs& args, const AttentionCudaArgs& cuda, const AttentionCudaPlan& plan,
                    const CudaStream& stream);

}  // namespace alula
