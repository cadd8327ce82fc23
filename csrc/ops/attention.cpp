#include "ops/attention.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <tuple>

#include "core/cuda.h"
#include "core/refuse_grad.h"
#include "core/scratch.h"
#include "core/tensor.h"
#include "core/trace.h"
#include "cpu/parallel.h"
#include "ops/calls.h"
#include "ops/kv_cache.h"

namespace alula {
namespace {

// Below this much work a second thread costs more than it saves: multiply-adds, and elements of the cache read.
constexpr double kAloneMultiplyAdds = 400e3;
constexpr double kAloneElements = 50e3;

// Of a tile whose rows are cut for more threads alone.
constexpr int64_t kLeastRows = 4;

// --- checks ------------------------------------------------------------------------------------------------------

void set_mask(AttentionArgs& args, const OptionalTensor& mask, int64_t batch, int64_t longest, Place place) {
  args.mask_kind = MaskKind::kNone;
  if (!mask) return;
  check_place(*mask, "mask", place);
  args.mask_kind = mask_kind_of(*mask);
  const auto fits = [](int64_t size, int64_t full) { return size == full || size == 1; };
  ALULA_CHECK(mask->dim() == 4 && fits(mask->size(0), batch) && fits(mask->size(1), args.num_heads) &&
                  mask->size(2) == args.tokens && mask->size(3) >= longest,
              "mask has shape ", shape_of(*mask), "; accepted: [", batch, " or 1, ", args.num_heads, " or 1, ",
              args.tokens, ", at least ", longest, "] (B, H, T, the largest of lengths)");
  args.mask = mask->const_data_ptr();
  for (int i = 0; i < 4; i++) args.mask_strides[i] = mask->size(i) == 1 && i < 2 ? 0 : mask->stride(i);
}

// int32 [B], each in [0, S]; contiguous on return.
Tensor checked_lengths(const Tensor& lengths, int64_t batch, int64_t capacity, Place place) {
  check_place(lengths, "lengths", place);
  check_shape(lengths, "lengths", {batch}, "[B]");
  check_dtype(lengths, "lengths", ScalarType::Int, "an index");
  const Tensor result = as_contiguous(lengths);
  if (place.is_cuda()) return result;  // the kernel takes what fits
  const auto* length = static_cast<const int32_t*>(result.const_data_ptr());
  for (int64_t b = 0; b < batch; b++) {
    ALULA_CHECK(length[b] >= 0 && length[b] <= capacity, "lengths holds ", length[b], "; kv_cache has ", capacity,
                " slots, so 0 to ", capacity, " is accepted");
  }
  return result;
}

// [B, T, H * D], rows of tokens one after another with an even step.
void check_out(const Tensor& out, int64_t batch, int64_t tokens, int64_t width, ScalarType dtype, Place place) {
  check_place(out, "out", place);
  check_shape(out, "out", {batch, tokens, width}, "[B, T, H * D]");
  check_dtype(out, "out", dtype, "q");
  check_own_memory(out, "out");
  check_token_rows(out, "out");
}

// --- what there is to do -----------------------------------------------------------------------------------------

// Few rows and hardly more than one key tile: rows are shared out, where key tiles would leave threads without work. A
// step of SantaCoder's shape at 128 tokens (16 rows, D 128): 29 in place of 37 us a layer, int4 weights around it.
bool cuts_rows(const AttentionArgs& args, const AttentionKernels& kernels) {
  const int64_t rows = args.tokens * (args.num_heads / args.num_kv_heads);
  if (args.batch * args.num_kv_heads >= num_threads() || args.batch == 0) return false;
  if (rows < 2 * kLeastRows || rows > 4 * kernels.rows_per_block) return false;
  const int64_t keys = *std::max_element(args.lengths, args.lengths + args.batch);
  return keys <= kernels.keys_per_tile * 5 / 4 &&
         2.0 * static_cast<double>(rows * args.head_dim * keys) > kAloneMultiplyAdds;
}

// Lists the tokens that are no padding, zeros the output of those that are, and cuts the rows into tiles.
void make_tiles(AttentionPlan& plan, const AttentionArgs& args, const AttentionKernels& kernels) {
  const auto& [positions, lengths, batch] = std::tie(args.positions, args.lengths, args.batch);
  const size_t element_bytes = args.dtype == DType::kFloat32 ? 4 : 2;
  const size_t token_bytes = static_cast<size_t>(args.num_heads * args.head_dim) * element_bytes;
  const size_t stride_bytes = static_cast<size_t>(args.out_stride) * element_bytes;
  const int64_t group = args.num_heads / args.num_kv_heads;
  plan.tokens.resize(static_cast<size_t>(batch * args.tokens));
  plan.limits.resize(static_cast<size_t>(batch * args.tokens));
  plan.tiles.clear();
  plan.multiply_adds = plan.elements = 0;

  // Tiles as large as leaves each thread a few: a packed key tile serves all rows of a tile.
  const int64_t share = batch * args.tokens * args.num_heads / (num_threads() * 6);
  int64_t wanted = std::clamp<int64_t>(share, 4 * kernels.rows_per_block, kernels.max_rows);
  int64_t unit = kernels.rows_per_block;
  if (cuts_rows(args, kernels)) {
    unit = 2;
    wanted = std::max<int64_t>(kLeastRows, (args.tokens * group + num_threads() - 1) / num_threads());
  }

  for (int64_t b = 0; b < batch; b++) {
    int32_t* tokens = plan.tokens.data() + b * args.tokens;
    int32_t* limits = plan.limits.data() + b * args.tokens;
    int64_t count = 0;
    for (int64_t t = 0; t < args.tokens; t++) {
      const int32_t position = positions[b * args.tokens + t];
      if (position < 0) {
        const auto at = static_cast<size_t>(b * args.tokens + t) * stride_bytes;
        std::memset(static_cast<char*>(args.out) + at, 0, token_bytes);
        continue;
      }
      tokens[count] = static_cast<int32_t>(t);
      limits[count++] = args.causal ? std::min(lengths[b], position + (position < lengths[b])) : lengths[b];
    }
    const int64_t rows = count * group;
    const int64_t cuts = (rows + wanted - 1) / wanted;
    for (int64_t g = 0; g < args.num_kv_heads; g++) {
      const int64_t blocks = (rows + unit - 1) / unit;
      for (int64_t cut = 0; cut < cuts; cut++) {
        const int64_t first = blocks * cut / cuts * unit;
        const int64_t last = std::min(rows, blocks * (cut + 1) / cuts * unit);
        if (first == last) continue;
        const int32_t limit = *std::max_element(limits + first / group, limits + (last - 1) / group + 1);
        plan.tiles.push_back(
            {b, g, tokens, limits, static_cast<int32_t>(first), static_cast<int32_t>(last - first), limit});
        plan.multiply_adds += 2.0 * static_cast<double>(last - first) * static_cast<double>(args.head_dim) * limit;
        plan.elements += 2.0 * static_cast<double>(args.head_dim) * limit;
      }
    }
  }
}

// Few tiles and many keys: an item is one key tile of one tile, and who finishes a tile's last item merges them all.
void plan_items(AttentionPlan& plan, const AttentionArgs& args, const AttentionKernels& kernels) {
  struct Partials;
  const size_t count = plan.tiles.size();
  plan.first_item.assign(count + 1, 0);
  plan.offsets.assign(count + 1, 0);
  plan.pending.assign(count, 0);
  for (size_t i = 0; i < count; i++) {
    const AttentionTile& tile = plan.tiles[i];
    const int64_t items = std::max<int64_t>(1, (tile.limit + kernels.keys_per_tile - 1) / kernels.keys_per_tile);
    plan.pending[i] = static_cast<int32_t>(items);
    plan.first_item[i + 1] = plan.first_item[i] + items;
    plan.offsets[i + 1] = plan.offsets[i] + items * kernels.partial_bytes(args, tile.num_rows);
  }
  plan.partials = static_cast<char*>(thread_scratch<Partials>().reserve(static_cast<size_t>(plan.offsets[count])));
}

struct Working;

void* working_memory(const AttentionPlan& plan) { return thread_scratch<Working>().reserve(plan.scratch_bytes); }

void run_key_tiles(const AttentionArgs& args, AttentionPlan& plan, const AttentionKernels& kernels) {
  // Equal shares of neighbours, so that a thread's next item is mostly the next key tile, which it fetches ahead.
  parallel_ranges(plan.first_item.back(), 1, [&](int64_t begin, int64_t end) {
    void* scratch = working_memory(plan);
    const auto after = std::upper_bound(plan.first_item.begin(), plan.first_item.end(), begin);
    size_t i = static_cast<size_t>(after - plan.first_item.begin()) - 1;
    for (int64_t item = begin; item < end; item++) {
      if (item == plan.first_item[i + 1]) i++;
      const AttentionTile& tile = plan.tiles[i];
      const int64_t index = item - plan.first_item[i], items = plan.first_item[i + 1] - plan.first_item[i];
      char* partial = plan.partials + plan.offsets[i] + index * kernels.partial_bytes(args, tile.num_rows);
      kernels.attend_one(args, tile, index, partial, scratch);
      std::atomic_ref pending(plan.pending[i]);
      if (pending.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        kernels.combine(args, tile, plan.partials + plan.offsets[i], items, scratch);
        pending.store(static_cast<int32_t>(items), std::memory_order_relaxed);  // for the next layer
      }
    }
  });
}

// Whoever is free takes the next tile; the last ones see most keys, so they go first. In a team (a few query rows, all
// alike) the shares are fixed. Who does which tile does not show in the results.
void run_row_tiles(const AttentionArgs& args, AttentionPlan& plan, const AttentionKernels& kernels) {
  const auto count = static_cast<int64_t>(plan.tiles.size());
  const auto tile_at = [&](int64_t item) { return &plan.tiles[static_cast<size_t>(count - 1 - item)]; };
  const auto attend = [&](int64_t begin, int64_t end) {
    void* scratch = working_memory(plan);
    for (int64_t item = begin; item < end; item++) {
      kernels.attend_all(args, *tile_at(item), item + 1 < end ? tile_at(item + 1) : nullptr, scratch);
    }
  };
  if (plan.way == AttentionPlan::Way::kOneThread) {
    parallel_parts(1, [&](int64_t) { attend(0, count); });
  } else if (current_member()) {
    parallel_ranges(count, 1, attend);
  } else {
    std::atomic<int64_t> next{0};
    parallel_parts(std::min(count, num_threads()), [&](int64_t) {
      for (int64_t item = next++; item < count; item = next++) attend(item, item + 1);
    });
  }
}

const char* name_of(MaskKind kind) {
  constexpr const char* kNames[] = {"", ", bool mask", ", float32 mask", ", bfloat16 mask", ", float16 mask"};
  return kNames[static_cast<int>(kind)];
}

}  // namespace

AttentionPlan& plan_attention(const AttentionArgs& args) {
  static thread_local AttentionPlan own_plan;
  AttentionPlan& plan = own_plan;
  const AttentionKernels& kernels = ALULA_KERNELS(kAttention);
  make_tiles(plan, args, kernels);
  plan.scratch_bytes = static_cast<size_t>(kernels.scratch_bytes(args));
  const auto count = static_cast<int64_t>(plan.tiles.size());
  using Way = AttentionPlan::Way;
  plan.way = Way::kRowTiles;
  if (num_threads() == 1 || (plan.multiply_adds <= kAloneMultiplyAdds && plan.elements <= kAloneElements)) {
    plan.way = Way::kOneThread;
  } else if (count < 3 * num_threads() && !(cuts_rows(args, kernels) && count >= num_threads())) {
    plan.way = Way::kKeyTiles;
    plan_items(plan, args, kernels);
  }
  ALULA_TRACE("attention", args.dtype, "H ", args.num_heads, " G ", args.num_kv_heads, " D ", args.head_dim, ", batch ",
              size_class(args.batch), ", ", size_class(args.tokens), " tokens on up to ",
              size_class(*std::max_element(args.lengths, args.lengths + args.batch)), " keys",
              args.causal ? ", causal" : "", name_of(args.mask_kind),
              plan.way == Way::kOneThread  ? ": one thread"
              : plan.way == Way::kKeyTiles ? ": key tiles over threads"
                                           : ": row tiles over threads");
  return plan;
}

void reserve_attention(const AttentionPlan& plan) { working_memory(plan); }

void run_attention(const AttentionArgs& args, AttentionPlan& plan) {
  const AttentionKernels& kernels = ALULA_KERNELS(kAttention);
  if (plan.way == AttentionPlan::Way::kKeyTiles) {
    run_key_tiles(args, plan, kernels);
  } else {
    run_row_tiles(args, plan, kernels);
  }
}

Call<AttentionArgs> check_attention(const Tensor& q, const Tensor& kv_cache, const Tensor& positions,
                                    const Tensor& lengths, const OptionalTensor& mask, const OptionalTensor& head_mask,
                                    double scale, bool causal) {
  Call<AttentionArgs> call = {};
  AttentionArgs& args = call.args;
  const Place place = place_of(q, "q");
  ALULA_CHECK(q.dim() == 4, "q has shape ", shape_of(q), "; expected [B, T, H, D]");
  args.batch = q.size(0), args.tokens = q.size(1), args.num_heads = q.size(2), args.head_dim = q.size(3);
  args.dtype = value_dtype(q, "q");
  ALULA_CHECK(kv_cache.dim() == 4, "kv_cache has shape ", shape_of(kv_cache), "; expected [B, G, S, 2 * D]");
  args.num_kv_heads = kv_cache.size(1);
  check_heads(args.num_heads, args.num_kv_heads, args.head_dim);
  check_kv_cache(kv_cache, args.batch, args.num_kv_heads, args.head_dim, place);
  check_dtype(kv_cache, "kv_cache", q.scalar_type(), "q");
  args.positions = static_cast<const int32_t*>(call.keep(checked_positions(positions, args.batch, args.tokens, place)));
  args.lengths = static_cast<const int32_t*>(call.keep(checked_lengths(lengths, args.batch, kv_cache.size(2), place)));
  OptionalTensor head_factors = head_mask;
  if (head_factors) {
    check_place(*head_factors, "head_mask", place);
    check_shape(*head_factors, "head_mask", {args.num_heads}, "[H]");
    check_dtype(*head_factors, "head_mask", ScalarType::Float, "a factor of probabilities");
    head_factors = as_contiguous(*head_factors);
  }

  args.q = call.keep(as_contiguous(q));
  args.kv_cache = kv_cache.const_data_ptr();
  for (int i = 0; i < 3; i++) args.kv_strides[i] = kv_cache.stride(i);
  args.causal = causal;
  // On CUDA nobody knows the lengths here: keys beyond a mask are hidden.
  const bool knows_lengths = args.batch > 0 && !place.is_cuda();
  set_mask(args, mask, args.batch, knows_lengths ? *std::max_element(args.lengths, args.lengths + args.batch) : 0,
           place);
  args.head_mask = static_cast<const float*>(call.keep(head_factors));
  args.scale = static_cast<float>(scale);
  return call;
}

namespace {

void run_on_cuda(const AttentionArgs& args, const Tensor& like, int64_t num_slots, int64_t mask_keys) {
  if (args.batch == 0 || args.tokens == 0) return;
  const CudaScope scope(like);
  const int64_t step = args.dtype == DType::kFloat32 ? 4 : 8;
  const auto is_even = [&](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && args.head_dim % step == 0;
  };
  bool is_cache_even = is_even(args.kv_cache);
  for (const int64_t stride : args.kv_strides) is_cache_even = is_cache_even && stride % step == 0;
  [[maybe_unused]] AttentionCudaArgs cuda = {num_slots, mask_keys, is_even(args.q), is_cache_even, 1, nullptr, nullptr};
  AttentionCudaPlan plan = {};
  ALULA_CUDA_CALL(plan = attention_cuda_plan(args, num_slots, *scope.stream().device));
  ALULA_TRACE_CUDA("attention", args.dtype, "H ", args.num_heads, " G ", args.num_kv_heads, " D ", args.head_dim,
                   ", batch ", size_class(args.batch), ", ", size_class(args.tokens), " tokens on up to ",
                   size_class(num_slots), " keys", args.causal ? ", causal" : "", name_of(args.mask_kind), ": ",
                   plan.rows, " rows a block, keys over ", plan.num_splits, " blocks");
  OptionalTensor workspace;
  if (plan.num_splits > 1) {
    workspace = new_tensor({plan.workspace_floats}, ScalarType::Float, place_of(like, "q"));
    cuda.workspace = static_cast<float*>(workspace->mutable_data_ptr());
    cuda.counters = zeroed_counters(like, scope, plan.num_counters);
  }
  ALULA_CUDA_CALL(attention_cuda(args, cuda, plan, scope.stream()));
}

void run_into(Call<AttentionArgs> call, const Tensor& kv_cache, const OptionalTensor& mask, const Tensor& out) {
  call.args.out = out.mutable_data_ptr();
  call.args.out_stride = out.stride(1);
  if (!out.is_cpu()) return run_on_cuda(call.args, out, kv_cache.size(2), mask ? mask->size(3) : 0);
  run_attention(call.args, plan_attention(call.args));
}

}  // namespace

Tensor attention(const Tensor& q, const Tensor& kv_cache, const Tensor& positions, const Tensor& lengths,
                 const OptionalTensor& mask, const OptionalTensor& head_mask, double scale, bool causal) {
  Call<AttentionArgs> call = check_attention(q, kv_cache, positions, lengths, mask, head_mask, scale, causal);
  Tensor out = new_tensor({q.size(0), q.size(1), q.size(2) * q.size(3)}, q.scalar_type(), place_of(q, "q"));
  run_into(std::move(call), kv_cache, mask, out);
  return out;
}

void attention_into(const Tensor& q, const Tensor& kv_cache, const Tensor& positions, const Tensor& lengths,
                    const OptionalTensor& mask, const OptionalTensor& head_mask, double scale, bool causal,
                    const Tensor& out) {
  Call<AttentionArgs> call = check_attention(q, kv_cache, positions, lengths, mask, head_mask, scale, causal);
  check_out(out, q.size(0), q.size(1), q.size(2) * q.size(3), q.scalar_type(), place_of(q, "q"));
  run_into(std::move(call), kv_cache, mask, out);
}

STABLE_TORCH_LIBRARY_IMPL(alula, CPU, m) {
  m.impl("attention", ALULA_BOX(attention));
  m.impl("attention_into", ALULA_BOX(attention_into));
}

STABLE_TORCH_LIBRARY_IMPL(alula, CUDA, m) {
  m.impl("attention", ALULA_BOX(attention));
  m.impl("attention_into", ALULA_BOX(attention_into));
}

}  // namespace alula
