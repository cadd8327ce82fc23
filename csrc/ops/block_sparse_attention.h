// block_sparse_attention: attention in which each block of queries has a list of key blocks (csrc/ops/block_plan.h).
//
// Row b's blocks start at column grid[b]: its block i holds the tokens grid[b] + i * N .. grid[b] + i * N + N - 1. The
// tokens of row b are those in [grid[b], ends[b]) that `visible` does not rule out, as queries and as keys.
#pragma once

#include "core/types.h"
#include "cpu/isa.h"
#include "cuda/device.h"

namespace alula {

struct BlockSparseAttentionArgs {
  DType dtype;                         // of q, k, v and out
  int64_t tokens;                      // T
  int64_t num_heads;                   // H
  int64_t num_kv_heads;                // G, divides H
  int64_t head_dim;                    // D
  int64_t block_size;                  // N
  const void* q;                       // [B, T, H, D]
  const void* k;                       // [B, G, S, D], S >= T; the last dimension is contiguous
  const void* v;                       // the same
  int64_t k_strides[3], v_strides[3];  // of B, G, S, in elements
  const int32_t* entries;              // [total, 2]: key block, count; count 0: pairs with a global token only
  const uint8_t* global_tokens;        // [1 or B, n * N], by the place in the row's blocks; may be null
  int64_t global_stride;               // from a batch row to the next; 0 where they share
  const uint8_t* visible;              // [B, T]; null: all
  const int32_t* grid;                 // [B]; on the CPU
  const int32_t* ends;                 // [B]; on the CPU
  const float* head_mask;              // [H], may be null
  float scale;
  bool causal;  // a query sees no key behind itself
  void* out;    // [B, T, H * D]
};

// Query blocks with equal lists, which one head attends at once.
struct BlockTile {
  int32_t batch, head;
  const int32_t* query_blocks;  // [num_query_blocks]
  int32_t num_query_blocks;     // at most max_rows / N
  int32_t first_entry, num_entries;
};

struct BlockSparseAttentionKernels {
  int max_rows;  // of a tile
  // Bytes of working memory of a thread, aligned to 64.
  int64_t (*scratch_bytes)(const BlockSparseAttentionArgs& args);
  // Bytes of what a tile keeps of one chunk; a multiple of 64.
  int64_t (*partial_bytes)(const BlockSparseAttentionArgs& args);
  // Key blocks are met in chunks: how many of them a list of num_entries makes.
  int64_t (*num_chunks)(const BlockSparseAttentionArgs& args, int64_t num_entries);
  // Tiles of one head, one after another, and their part of `out`; a key block that several use is packed once.
  void (*attend_tiles)(const BlockSparseAttentionArgs& args, const BlockTile* tiles, int64_t num_tiles, void* scratch);
  // One chunk alone, into partial [partial_bytes].
  void (*attend_one)(const BlockSparseAttentionArgs& args, const BlockTile& tile, int64_t chunk, void* partial,
                     void* scratch);
  // The partials of all chunks of a tile, one after another, merged in order: the same bits as attend_tiles.
  void (*combine)(const BlockSparseAttentionArgs& args, const BlockTile& tile, const void* partials, void* scratch);
};

ALULA_DECLARE_KERNELS(BlockSparseAttentionKernels, kBlockSparseAttention)

// --- CUDA: plan and lengths lie on the device -----------------------------------------------------------------------

// Of an item of the schedule: list (batch row of the plan * its heads + head), query block, first entry, number of
// entries, chunk, number of chunks of the list. Chunks of a list are neighbours.
constexpr int kScheduleColumns = 6;

struct BlockSparseAttentionCudaArgs {
  int64_t batch, num_blocks;          // B; of the plan
  int64_t plan_batches, plan_heads;   // 1 or B, 1 or H: how many have lists of their own
  int64_t num_entries;                // of `entries`
  const int32_t* schedule;            // [num_items, kScheduleColumns]
  int64_t num_items, num_partials;    // the first num_partials items are chunks of lists, the others whole lists
  const int32_t* first;               // [B]; null: 0
  const int32_t* lengths;             // [B]; null: all from `first` on
  bool is_query_even, are_keys_even;  // can be read 16 bytes at a time
  float* workspace;                   // [workspace_floats] of the plan below
  uint32_t* counters;                 // [num_counters], zeros before and after
};

struct BlockSparseAttentionCudaPlan {
  int rows;             // of a block of threads
  int64_t block_tiles;  // of a query block
  int64_t num_blocks;   // of threads
  int64_t workspace_floats, num_counters;
};

BlockSparseAttentionCudaPlan block_sparse_attention_cuda_plan(const BlockSparseAttentionArgs& args,
                                                              const BlockSparseAttentionCudaArgs& cuda);
void block_sparse_attention_cuda(const BlockSparseAttentionArgs& args, const BlockSparseAttentionCudaArgs& cuda,
                                 const BlockSparseAttentionCudaPlan& plan, const CudaStream& stream);

}  // namespace alula
