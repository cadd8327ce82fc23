#include "ops/block_sparse_attention.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <tuple>
#include <vector>

#include "core/cuda.h"
#include "core/refuse_grad.h"
#include "core/scratch.h"
#include "core/tensor.h"
#include "core/trace.h"
#include "cpu/parallel.h"
#include "ops/kv_cache.h"

namespace alula {
namespace {

// Below this many multiply-adds a second thread costs more than it saves.
constexpr double kAloneMultiplyAdds = 400e3;
// Tiles of one head that a thread does one after another, sharing packed key blocks.
constexpr size_t kTilesOfRun = 16;

// --- checks ------------------------------------------------------------------------------------------------------

// [B, G, S, D], last dimension contiguous.
void check_keys(const Tensor& t, const char* name, const Tensor& q, int64_t num_kv_heads, Place place) {
  check_place(t, name, place);
  check_shape(t, name, {q.size(0), num_kv_heads, -1, q.size(3)}, "[B, G, S, D]");
  check_dtype(t, name, q.scalar_type(), "q");
  ALULA_CHECK(t.size(2) >= q.size(1), name, " has ", t.size(2), " slots for the keys of ", q.size(1), " tokens");
  ALULA_CHECK(t.stride(3) == 1 || t.size(3) == 1, name, " has stride ", t.stride(3),
              " in its last dimension; it must be contiguous there");
}

// The plan's lists; contiguous on return.
struct Lists {
  Tensor starts, entries;
  int64_t num_batches, num_heads, num_blocks;

  const int32_t* of(int64_t batch, int64_t head) const {
    const int64_t row = (num_batches == 1 ? 0 : batch) * num_heads + (num_heads == 1 ? 0 : head);
    return static_cast<const int32_t*>(starts.const_data_ptr()) + row * (num_blocks + 1);
  }
  const int32_t* entry(int64_t i) const { return static_cast<const int32_t*>(entries.const_data_ptr()) + 2 * i; }
};

// On CUDA nobody sees what they hold; the kernel takes care.
Lists checked_lists(const Tensor& starts, const Tensor& entries, const Tensor& q, int64_t block_size,
                    bool has_global_tokens, Place place) {
  check_place(starts, "starts", place);
  check_place(entries, "entries", place);
  check_dtype(starts, "starts", ScalarType::Int, "a plan");
  check_dtype(entries, "entries", ScalarType::Int, "a plan");
  check_shape(entries, "entries", {-1, 2}, "[listed blocks, 2]");
  const int64_t batch = q.size(0), tokens = q.size(1), num_heads = q.size(2);
  ALULA_CHECK(starts.dim() == 3 && starts.size(2) >= 1, "starts has shape ", shape_of(starts),
              "; expected [1 or B, 1 or H, blocks + 1]");
  Lists lists = {as_contiguous(starts), as_contiguous(entries), starts.size(0), starts.size(1), starts.size(2) - 1};
  ALULA_CHECK(
      (lists.num_batches == 1 || lists.num_batches == batch) && (lists.num_heads == 1 || lists.num_heads == num_heads),
      "the plan has lists for ", lists.num_batches, " batch rows and ", lists.num_heads, " heads; accepted: 1 or ",
      batch, " and 1 or ", num_heads);
  const int64_t needed = (tokens + block_size - 1) / block_size;
  ALULA_CHECK(lists.num_blocks == needed, "the plan is for ", lists.num_blocks, " blocks of ", block_size, "; ", tokens,
              " tokens are ", needed, " blocks");
  if (place.is_cuda()) return lists;
  const int64_t total = entries.size(0), count = starts.numel();
  const auto* start = static_cast<const int32_t*>(lists.starts.const_data_ptr());
  for (int64_t i = 0; i < count; i++) {
    const bool begins_row = i % (lists.num_blocks + 1) == 0;
    ALULA_CHECK(start[i] >= 0 && start[i] <= total && (begins_row || start[i] >= start[i - 1]),
                "the plan's starts hold ", start[i], " at ", i, "; they must ascend from 0 to ", total,
                ", the number of entries");
  }
  for (int64_t i = 0; i < total; i++) {
    const int32_t* entry = lists.entry(i);
    ALULA_CHECK(entry[0] >= 0 && entry[0] < lists.num_blocks, "the plan lists key block ", entry[0],
                "; accepted: 0 to ", lists.num_blocks - 1);
    ALULA_CHECK(entry[1] >= 0, "the plan lists key block ", entry[0], " with count ", entry[1],
                "; accepted: 1 and more, or 0 for global tokens only");
    ALULA_CHECK(entry[1] > 0 || has_global_tokens, "the plan lists key block ", entry[0],
                " with count 0, for global tokens only, and global_tokens is missing");
  }
  return lists;
}

// int32 [B], contiguous on return.
OptionalTensor checked_columns(const OptionalTensor& t, const char* name, int64_t batch, Place place) {
  if (!t) return t;
  check_place(*t, name, place);
  check_shape(*t, name, {batch}, "[B]");
  check_dtype(*t, name, ScalarType::Int, "an index");
  return as_contiguous(t);
}

OptionalTensor checked_flags(const OptionalTensor& t, const char* name, int64_t rows, int64_t columns,
                             const char* meaning, Place place) {
  if (!t) return t;
  check_place(*t, name, place);
  check_shape(*t, name, {rows, columns}, meaning);
  check_dtype(*t, name, ScalarType::Bool, "a mask (true = visible)");
  return as_contiguous(t);
}

// --- what there is to do -----------------------------------------------------------------------------------------

// A piece of work: tiles [tile, tile + num_tiles) one after another, or (chunk >= 0) one chunk of one tile.
struct Item {
  size_t tile, num_tiles;
  int64_t chunk;
  double cost;  // multiply-adds
};

// Kept by each calling thread, so that a call allocates little.
struct Work {
  std::vector<int32_t> grid, ends;    // [B]
  std::vector<int32_t> query_blocks;  // of all shapes, in their order
  std::vector<BlockTile> shapes;      // tiles of the lists in hand, for batch row 0 and head 0
  std::vector<size_t> block_at;       // of each shape: where its query blocks begin in query_blocks
  std::vector<BlockTile> tiles;
  std::vector<Item> items;
  // Of tiles whose chunks are shared out: where their partials begin, chunks not done.
  std::vector<size_t> partials_at;
  std::vector<int32_t> pending;
  size_t partial_bytes;
  double cost;
};

bool is_same_list(const Lists& lists, const BlockTile& a, int32_t first, int32_t count) {
  return a.num_entries == count && std::memcmp(lists.entry(a.first_entry), lists.entry(first),
                                               static_cast<size_t>(count) * 2 * sizeof(int32_t)) == 0;
}

// The tiles of one head: query blocks of long lists that are equal are one tile, so that a key block is packed once for
// all of them; short lists are a tile each, and share packed blocks with their neighbours.
void make_shapes(Work& work, const Lists& lists, const int32_t* starts, int64_t max_blocks) {
  work.shapes.clear();
  std::vector<std::vector<int32_t>> members;
  for (int32_t block = 0; block < lists.num_blocks; block++) {
    const int32_t first = starts[block], count = starts[block + 1] - first;
    size_t home = work.shapes.size();
    if (2 * count > lists.num_blocks) {
      for (size_t i = 0; i < work.shapes.size() && home == work.shapes.size(); i++) {
        const bool has_room = static_cast<int64_t>(members[i].size()) < max_blocks;
        if (has_room && is_same_list(lists, work.shapes[i], first, count)) home = i;
      }
    }
    if (home == work.shapes.size()) {
      work.shapes.push_back({0, 0, nullptr, 0, first, count});
      members.emplace_back();
    }
    members[home].push_back(block);
  }
  for (size_t i = 0; i < work.shapes.size(); i++) {
    work.block_at.push_back(work.query_blocks.size());
    work.shapes[i].num_query_blocks = static_cast<int32_t>(members[i].size());
    work.query_blocks.insert(work.query_blocks.end(), members[i].begin(), members[i].end());
  }
}

double cost_of(const BlockSparseAttentionArgs& args, const BlockTile& tile) {
  const double n = static_cast<double>(args.block_size);
  return 2 * n * n * static_cast<double>(args.head_dim) * tile.num_query_blocks * tile.num_entries;
}

void make_tiles(Work& work, const BlockSparseAttentionArgs& args, const BlockSparseAttentionKernels& kernels,
                const Lists& lists, int64_t batch) {
  work.query_blocks.clear();
  work.block_at.clear();
  work.tiles.clear();
  work.cost = 0;
  const bool is_shared = lists.num_batches == 1 && lists.num_heads == 1;
  // Query blocks are referred to by place until all of them are there.
  std::vector<size_t> places;
  size_t first_shape = 0;
  for (int64_t b = 0; b < batch; b++) {
    for (int64_t h = 0; h < args.num_heads; h++) {
      if (!is_shared || (b == 0 && h == 0)) {
        first_shape = work.block_at.size();
        make_shapes(work, lists, lists.of(b, h), kernels.max_rows / args.block_size);
      }
      for (size_t i = 0; i < work.shapes.size(); i++) {
        BlockTile tile = work.shapes[i];
        tile.batch = static_cast<int32_t>(b);
        tile.head = static_cast<int32_t>(h);
        work.cost += cost_of(args, tile);
        work.tiles.push_back(tile);
        places.push_back(work.block_at[first_shape + i]);
      }
    }
  }
  for (size_t i = 0; i < work.tiles.size(); i++) work.tiles[i].query_blocks = work.query_blocks.data() + places[i];
}

// Runs of neighbouring tiles; a tile that is a large part of a thread's share by its chunks. In the order of the heads,
// so that a head's keys and values are in the caches while its tiles are done, and within a head the largest first.
void make_items(Work& work, const BlockSparseAttentionArgs& args, const BlockSparseAttentionKernels& kernels) {
  work.items.clear();
  work.partial_bytes = 0;
  const size_t count = work.tiles.size();
  work.partials_at.assign(count, 0);
  work.pending.assign(count, 0);
  const double share = work.cost / static_cast<double>(num_threads());
  for (size_t i = 0; i < count; i++) {
    const BlockTile& tile = work.tiles[i];
    const double cost = cost_of(args, tile);
    const int64_t chunks = kernels.num_chunks(args, tile.num_entries);
    if (num_threads() > 1 && chunks > 1 && 4 * cost > share) {
      work.partials_at[i] = work.partial_bytes;
      work.pending[i] = static_cast<int32_t>(chunks);
      work.partial_bytes += static_cast<size_t>(chunks * kernels.partial_bytes(args));
      for (int64_t chunk = 0; chunk < chunks; chunk++) {
        work.items.push_back({i, 1, chunk, cost / static_cast<double>(chunks)});
      }
      continue;
    }
    Item* last = work.items.empty() ? nullptr : &work.items.back();
    const bool joins = last != nullptr && last->chunk < 0 && last->tile + last->num_tiles == i &&
                       last->num_tiles < kTilesOfRun && 8 * (last->cost + cost) < share &&
                       work.tiles[last->tile].head == tile.head && work.tiles[last->tile].batch == tile.batch &&
                       chunks == kernels.num_chunks(args, work.tiles[i - 1].num_entries);
    if (joins) {
      last->num_tiles++;
      last->cost += cost;
    } else {
      work.items.push_back({i, 1, -1, cost});
    }
  }
  std::stable_sort(work.items.begin(), work.items.end(), [&](const Item& a, const Item& b) {
    const BlockTile& x = work.tiles[a.tile];
    const BlockTile& y = work.tiles[b.tile];
    return std::tie(x.batch, x.head, b.cost) < std::tie(y.batch, y.head, a.cost);
  });
}

void run_items(Work& work, const BlockSparseAttentionArgs& args, const BlockSparseAttentionKernels& kernels) {
  struct Partials;
  struct Working;
  auto* partials =
      static_cast<char*>(work.partial_bytes ? thread_scratch<Partials>().reserve(work.partial_bytes) : nullptr);
  const auto scratch_bytes = static_cast<size_t>(kernels.scratch_bytes(args));
  const auto partial_bytes = static_cast<size_t>(kernels.partial_bytes(args));
  const size_t count = work.items.size();
  const auto run = [&](const Item& item, void* scratch) {
    if (item.chunk < 0)
      return kernels.attend_tiles(args, &work.tiles[item.tile], static_cast<int64_t>(item.num_tiles), scratch);
    const BlockTile& tile = work.tiles[item.tile];
    char* all = partials + work.partials_at[item.tile];
    kernels.attend_one(args, tile, item.chunk, all + static_cast<size_t>(item.chunk) * partial_bytes, scratch);
    if (std::atomic_ref(work.pending[item.tile]).fetch_sub(1, std::memory_order_acq_rel) == 1) {
      kernels.combine(args, tile, all, scratch);
    }
  };
  const bool alone = work.cost <= kAloneMultiplyAdds;
  std::atomic<size_t> next{0};
  parallel_parts(alone ? 1 : std::min<int64_t>(static_cast<int64_t>(count), num_threads()), [&](int64_t) {
    void* scratch = thread_scratch<Working>().reserve(scratch_bytes);
    for (size_t item = next++; item < count; item = next++) run(work.items[item], scratch);
  });
}

// Where each row's tokens are, and zeros for the output of those that are none.
void set_tokens(Work& work, BlockSparseAttentionArgs& args, const OptionalTensor& first, const OptionalTensor& lengths,
                int64_t batch, size_t token_bytes) {
  const auto* begin = static_cast<const int32_t*>(data_or_null(first));
  const auto* length = static_cast<const int32_t*>(data_or_null(lengths));
  work.grid.resize(static_cast<size_t>(batch));
  work.ends.resize(static_cast<size_t>(batch));
  for (size_t b = 0; b < static_cast<size_t>(batch); b++) {
    const int64_t from = begin ? begin[b] : 0;
    ALULA_CHECK(from >= 0 && from <= args.tokens, "first holds ", from, "; accepted: 0 to ", args.tokens);
    const int64_t count = length ? length[b] : args.tokens - from;
    ALULA_CHECK(count >= 0 && count <= args.tokens - from, "lengths holds ", count, "; row ", b, " begins at ", from,
                " of ", args.tokens, " columns, so 0 to ", args.tokens - from, " is accepted");
    work.grid[b] = static_cast<int32_t>(from);
    work.ends[b] = static_cast<int32_t>(from + count);
  }
  args.grid = work.grid.data();
  args.ends = work.ends.data();
  for (int64_t b = 0; b < batch; b++) {
    const int64_t from = args.grid[b], end = args.ends[b];
    for (int64_t t = 0; t < args.tokens; t++) {
      const bool is_token = t >= from && t < end && (args.visible == nullptr || args.visible[b * args.tokens + t]);
      if (!is_token)
        std::memset(static_cast<char*>(args.out) + static_cast<size_t>(b * args.tokens + t) * token_bytes, 0,
                    token_bytes);
    }
  }
}

// The CPU: cut into tiles, shared out over threads.
void run_on_cpu(BlockSparseAttentionArgs& args, const Lists& lists, const OptionalTensor& first,
                const OptionalTensor& lengths, int64_t batch) {
  static thread_local Work own_work;
  Work& work = own_work;  // a reference, so that other threads see this one's
  const BlockSparseAttentionKernels& kernels = ALULA_KERNELS(kBlockSparseAttention);
  const size_t element_bytes = args.dtype == DType::kFloat32 ? 4 : 2;
  set_tokens(work, args, first, lengths, batch, static_cast<size_t>(args.num_heads * args.head_dim) * element_bytes);
  make_tiles(work, args, kernels, lists, batch);
  make_items(work, args, kernels);
  ALULA_TRACE("block_sparse_attention", args.dtype, "H ", args.num_heads, " D ", args.head_dim, " N ", args.block_size,
              ", batch ", size_class(batch), ", ", size_class(args.tokens), " tokens", args.causal ? ", causal" : "",
              args.visible ? ", mask" : "", work.partial_bytes ? ": long rows by chunks" : ": runs of rows",
              " over threads");
  run_items(work, args, kernels);
}

// CUDA: cut as the plan's schedule says.
void run_on_cuda(const BlockSparseAttentionArgs& args, BlockSparseAttentionCudaArgs cuda, const Tensor& like) {
  const CudaScope scope(like);
  const int64_t step = args.dtype == DType::kFloat32 ? 4 : 8;
  const auto is_even = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  cuda.is_query_even = is_even(args.q);
  cuda.are_keys_even = is_even(args.k) && is_even(args.v);
  for (const auto& strides : {args.k_strides, args.v_strides}) {
    for (int i = 0; i < 3; i++) cuda.are_keys_even = cuda.are_keys_even && strides[i] % step == 0;
  }
  BlockSparseAttentionCudaPlan plan = {};
  ALULA_CUDA_CALL(plan = block_sparse_attention_cuda_plan(args, cuda));
  ALULA_TRACE_CUDA("block_sparse_attention", args.dtype, "H ", args.num_heads, " D ", args.head_dim, " N ",
                   args.block_size, ", batch ", size_class(cuda.batch), ", ", size_class(args.tokens), " tokens",
                   args.causal ? ", causal" : "", args.visible ? ", mask" : "", ": ", plan.rows, " rows a block",
                   plan.num_counters > 0 ? ", long lists over blocks" : "");
  OptionalTensor workspace;
  if (plan.num_counters > 0) {
    workspace = new_tensor({plan.workspace_floats}, ScalarType::Float, place_of(like, "q"));
    cuda.workspace = static_cast<float*>(workspace->mutable_data_ptr());
    cuda.counters = zeroed_counters(like, scope, plan.num_counters);
  }
  ALULA_CUDA_CALL(block_sparse_attention_cuda(args, cuda, plan, scope.stream()));
}

// int32 [items, kScheduleColumns], contiguous on return.
Tensor checked_schedule(const OptionalTensor& schedule, int64_t num_partials, Place place) {
  ALULA_CHECK(schedule, "schedule is missing: on CUDA the op takes all of BlockPlan.on(device)");
  check_place(*schedule, "schedule", place);
  check_dtype(*schedule, "schedule", ScalarType::Int, "a plan");
  check_shape(*schedule, "schedule", {-1, kScheduleColumns},
              "[items, (list, block, first entry, entries, chunk, chunks)]");
  ALULA_CHECK(num_partials >= 0 && num_partials <= schedule->size(0), "num_partials is ", num_partials,
              "; the schedule has ", schedule->size(0), " items");
  return as_contiguous(*schedule);
}

}  // namespace

Tensor block_sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts,
                              const Tensor& entries, const OptionalTensor& global_tokens, int64_t block_size,
                              const OptionalTensor& first, const OptionalTensor& lengths, const OptionalTensor& mask,
                              const OptionalTensor& head_mask, double scale, bool causal,
                              const OptionalTensor& schedule, int64_t num_partials) {
  const Place place = place_of(q, "q");
  ALULA_CHECK(q.dim() == 4, "q has shape ", shape_of(q), "; expected [B, T, H, D]");
  const int64_t batch = q.size(0), tokens = q.size(1), num_heads = q.size(2), head_dim = q.size(3);
  BlockSparseAttentionArgs args = {};
  args.dtype = value_dtype(q, "q");
  ALULA_CHECK(k.dim() == 4, "k has shape ", shape_of(k), "; expected [B, G, S, D]");
  check_heads(num_heads, k.size(1), head_dim);
  check_keys(k, "k", q, k.size(1), place);
  check_keys(v, "v", q, k.size(1), place);
  ALULA_CHECK(block_size == 16 || block_size == 32 || block_size == 64 || block_size == 128, "block_size is ",
              block_size, "; accepted: 16, 32, 64, 128");
  Tensor out = new_large_tensor({batch, tokens, num_heads * head_dim}, q.scalar_type(), place);
  if (out.numel() == 0) return out;
  const Lists lists = checked_lists(starts, entries, q, block_size, global_tokens.has_value(), place);
  const OptionalTensor flags =
      checked_flags(global_tokens, "global_tokens", lists.num_batches, lists.num_blocks * block_size,
                    "[batch rows of the plan, blocks * block_size]", place);
  const OptionalTensor visible = checked_flags(mask, "mask", batch, tokens, "[B, T]", place);
  const OptionalTensor begins = checked_columns(first, "first", batch, place);
  const OptionalTensor counts = checked_columns(lengths, "lengths", batch, place);
  OptionalTensor head_factors = head_mask;
  if (head_factors) {
    check_place(*head_factors, "head_mask", place);
    check_shape(*head_factors, "head_mask", {num_heads}, "[H]");
    check_dtype(*head_factors, "head_mask", ScalarType::Float, "a factor of probabilities");
    head_factors = as_contiguous(*head_factors);
  }

  const Tensor query = as_contiguous(q);
  args.tokens = tokens;
  args.num_heads = num_heads;
  args.num_kv_heads = k.size(1);
  args.head_dim = head_dim;
  args.block_size = block_size;
  args.q = query.const_data_ptr();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  for (int i = 0; i < 3; i++) {
    args.k_strides[i] = k.stride(i);
    args.v_strides[i] = v.stride(i);
  }
  args.entries = static_cast<const int32_t*>(lists.entries.const_data_ptr());
  args.global_tokens = static_cast<const uint8_t*>(data_or_null(flags));
  args.global_stride = lists.num_batches == 1 ? 0 : lists.num_blocks * block_size;
  args.visible = static_cast<const uint8_t*>(data_or_null(visible));
  args.head_mask = static_cast<const float*>(data_or_null(head_factors));
  args.scale = static_cast<float>(scale);
  args.causal = causal;
  args.out = out.mutable_data_ptr();
  if (!place.is_cuda()) {
    run_on_cpu(args, lists, begins, counts, batch);
    return out;
  }
  const Tensor items = checked_schedule(schedule, num_partials, place);
  run_on_cuda(args,
              {
                  .batch = batch,
                  .num_blocks = lists.num_blocks,
                  .plan_batches = lists.num_batches,
                  .plan_heads = lists.num_heads,
                  .num_entries = entries.size(0),
                  .schedule = static_cast<const int32_t*>(items.const_data_ptr()),
                  .num_items = items.size(0),
                  .num_partials = num_partials,
                  .first = static_cast<const int32_t*>(data_or_null(begins)),
                  .lengths = static_cast<const int32_t*>(data_or_null(counts)),
                  .is_query_even = false,
                  .are_keys_even = false,
                  .workspace = nullptr,
                  .counters = nullptr,
              },
              out);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(alula, CPU, m) { m.impl("block_sparse_attention", ALULA_BOX(block_sparse_attention)); }

STABLE_TORCH_LIBRARY_IMPL(alula, CUDA, m) { m.impl("block_sparse_attention", ALULA_BOX(block_sparse_attention)); }

}  // namespace alula
