// decoder_blocks: a whole stack of decoder blocks in one call, by the kernels of linear, qkv_projection and attention.
//
// Every call of an op costs 4 to 6 us beside its work, and every parallel_for in it some more: much, where sixty calls
// make a step of a few milliseconds. Here all is checked first, then a team (cpu/team.h) goes through the blocks. With
// more rows than one tile takes, each product is long enough to be shared out on its own.
#include "ops/decoder_blocks.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "core/refuse_grad.h"
#include "core/tensor.h"
#include "cpu/panel_gemm_parallel.h"
#include "ops/calls.h"
#include "ops/kv_cache.h"

namespace alula {
namespace {

// Weights a thread fetches at most while it waits for the others: a small part of a second-level cache.
constexpr int64_t kFetchBytes = 128 * 1024;

// The tensors of a block, in the order of `weights`. Sequential blocks have all, parallel ones the first six: kQkv has
// the rows of MLP in below it, kOut the columns of MLP out beside it.
enum Weight { kNorm1, kNorm1Bias, kQkv, kQkvBias, kOut, kOutBias, kNorm2, kNorm2Bias, kFc, kFcBias, kProj, kProjBias };
constexpr size_t kParallelWeights = kOutBias + 1;
constexpr size_t kSequentialWeights = kProjBias + 1;

// What bind_decoder_blocks checked and keeps: a stack of blocks, all but its inputs.
struct Stack {
  bool is_parallel;
  int64_t width, num_heads, num_kv_heads, head_dim, mlp_width;
  int activation;
  std::vector<float> scales;
  ScalarType dtype;
  std::vector<Tensor> weights;
  std::vector<int64_t> formats;
  std::vector<Call<PanelGemmArgs>> gemms;  // per block: QKV (and MLP in), then those of Block::linear
  size_t per_block() const { return is_parallel ? 2 : 4; }
  size_t layers() const { return scales.size(); }
};

// Stacks by the number that stands for them. Python holds a number as long as the stack is needed.
class Stacks {
 public:
  int64_t add(std::shared_ptr<const Stack> stack) {
    const std::lock_guard lock(mutex_);
    stacks_.emplace(++last_, std::move(stack));
    return last_;
  }
  std::shared_ptr<const Stack> at(int64_t id) {
    const std::lock_guard lock(mutex_);
    const auto found = stacks_.find(id);
    ALULA_CHECK(found != stacks_.end(), "blocks is ", id,
                ", which stands for no stack of blocks; bind one with alula.ops.DecoderBlocks and keep it");
    return found->second;
  }
  void remove(int64_t id) {
    const std::lock_guard lock(mutex_);
    stacks_.erase(id);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const Stack>> stacks_;
  int64_t last_ = 0;
};

Stacks& stacks() {
  static Stacks* const all = new Stacks;  // never destroyed: Python may let go of numbers at exit
  return *all;
}

struct Block {
  QkvProjectionArgs qkv;
  AttentionArgs attention;
  std::array<LinearArgs, 3> linear;  // sequential: attention output, MLP in, MLP out; parallel: both outputs
};

// The calling member's share of a packed weight, as run_panel_gemm will deal it out, from its start.
Fetch share_of_weight(const PanelGemmArgs& args, const TeamMember& member) {
  const int64_t panels = num_panels(args.n);
  const Range share = share_of(panels, member.rank, member.size());
  const int64_t dense = args.dtype == DType::kFloat32 ? args.k * 4 : (args.k + args.k % 2) * 2;
  const bool is_dense = args.format.kind == WeightKind::kDense;
  const int64_t panel = is_dense ? kPanelRows * dense : panel_bytes(args.format, args.k);
  const int64_t bytes = (share.end - share.begin) * panel;
  return {static_cast<const char*>(args.weight) + share.begin * panel, bytes < kFetchBytes ? bytes : kFetchBytes};
}

// One thread of many, or the one that has them all: every block in order.
void run_blocks(const std::vector<Block>& blocks, size_t products, AttentionPlan& plan) {
  TeamMember* member = current_member();
  const auto fetch_next = [member](const PanelGemmArgs& next) {
    if (member && member->team) member->fetch = share_of_weight(next, *member);
  };
  for (size_t layer = 0; layer < blocks.size(); layer++) {
    const Block& block = blocks[layer];
    fetch_next(block.linear[0].gemm);
    run_qkv_projection(block.qkv);
    run_attention(block.attention, plan);
    for (size_t i = 0; i < products; i++) {
      if (i + 1 < products) {
        fetch_next(block.linear[i + 1].gemm);
      } else if (layer + 1 < blocks.size()) {
        fetch_next(blocks[layer + 1].qkv.gemm);
      }
      run_linear(block.linear[i]);
    }
  }
}

}  // namespace

// For run_row_by_row, which calls it for each row.
Tensor decoder_blocks(const Tensor& x, int64_t id, const std::vector<Tensor>& kv_caches, const Tensor& positions,
                      const Tensor& lengths, const OptionalTensor& mask, const std::vector<Tensor>& head_masks,
                      bool causal, const OptionalTensor& rotary_table, const OptionalTensor& rotary_positions,
                      int64_t tokens_to_keep);

int64_t bind_decoder_blocks(std::vector<Tensor> weights, std::vector<int64_t> formats, bool is_parallel,
                            int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t mlp_width,
                            const std::vector<double>& scales, double norm_eps, int64_t activation) {
  const size_t layers = scales.size(), tensors = is_parallel ? kParallelWeights : kSequentialWeights;
  ALULA_CHECK(layers > 0, "scales is empty; give a number for each block");
  ALULA_CHECK(weights.size() == layers * tensors, "weights holds ", weights.size(), " tensors; ", layers,
              is_parallel ? " parallel" : " sequential", " blocks (one for each of scales) have ", layers * tensors,
              ", ", tensors, " each");
  ALULA_CHECK(formats.size() == weights.size(), "formats holds ", formats.size(), " numbers; expected one for each of ",
              weights.size(), " weights");
  check_heads(num_heads, num_kv_heads, head_dim);
  check_activation(activation);
  ALULA_CHECK(mlp_width > 0, "mlp_width is ", mlp_width, "; it must be positive");
  ALULA_CHECK(weights[kNorm1].dim() == 1, "the first weight has shape ", shape_of(weights[kNorm1]),
              "; expected [E], the weight of a layer norm");
  const int64_t width = weights[kNorm1].size(0), attended = num_heads * head_dim;
  const int64_t qkv_rows = attended + 2 * num_kv_heads * head_dim;

  auto stack = std::make_shared<Stack>();
  for (size_t layer = 0; layer < layers; layer++) {
    const Tensor* w = weights.data() + layer * tensors;
    const auto add = [&](int64_t n, int64_t k, Weight weight, const OptionalTensor& norm,
                         const OptionalTensor& norm_bias) {
      stack->gemms.push_back(check_gemm_weights(w[weight], formats[layer * tensors + weight], n, k, weights[kNorm1],
                                                "the first layer norm", w[weight + 1], norm, norm_bias, norm_eps));
    };
    add(is_parallel ? qkv_rows + mlp_width : qkv_rows, width, kQkv, w[kNorm1], w[kNorm1Bias]);
    add(width, is_parallel ? attended + mlp_width : attended, kOut, {}, {});
    if (is_parallel) continue;
    add(mlp_width, width, kFc, w[kNorm2], w[kNorm2Bias]);
    add(width, mlp_width, kProj, {}, {});
  }
  stack->is_parallel = is_parallel;
  stack->width = width;
  stack->num_heads = num_heads, stack->num_kv_heads = num_kv_heads, stack->head_dim = head_dim;
  stack->mlp_width = mlp_width;
  stack->activation = static_cast<int>(activation);
  stack->scales.assign(scales.begin(), scales.end());
  stack->dtype = weights[kNorm1].scalar_type();
  stack->weights = std::move(weights);
  stack->formats = std::move(formats);
  return stacks().add(std::move(stack));
}

void release_decoder_blocks(int64_t id) { stacks().remove(id); }

namespace {

// What decoder_blocks is given beside the stack and x: inputs that all blocks share, and a cache for each.
struct Inputs {
  const std::vector<Tensor>& kv_caches;
  Tensor positions;
  const Tensor& lengths;
  OptionalTensor mask;
  const std::vector<Tensor>& head_masks;
  bool causal;
  const OptionalTensor& rotary_table;
  OptionalTensor rotary_positions;

  OptionalTensor head_mask(size_t layer) const {
    return head_masks.empty() ? OptionalTensor() : OptionalTensor(head_masks[layer]);
  }
};

// One of each for all blocks: a block has read them before the next one writes.
struct Activations {
  Tensor hidden, q, attended, mlp;

  Activations(const Stack& stack, int64_t batch, int64_t tokens) {
    const int64_t attended_width = stack.num_heads * stack.head_dim;
    hidden = new_large_tensor({batch, tokens, stack.width}, stack.dtype);
    q = new_large_tensor({batch, tokens, stack.num_heads, stack.head_dim}, stack.dtype);
    if (stack.is_parallel) {
      Tensor inner = new_large_tensor({batch, tokens, attended_width + stack.mlp_width}, stack.dtype);
      attended = torch::stable::narrow(inner, 2, 0, attended_width);
      mlp = torch::stable::narrow(inner, 2, attended_width, stack.mlp_width);
    } else {
      attended = new_large_tensor({batch, tokens, attended_width}, stack.dtype);
      mlp = new_large_tensor({batch, tokens, stack.mlp_width}, stack.dtype);
    }
  }
};

// The calls of all blocks on the tokens of some rows: checked once, the blocks differ in pointers, scales, head masks.
class Calls {
 public:
  Calls(const Stack& stack, const Tensor& input, const Activations& to, const Inputs& inputs)
      : stack_(stack),
        input_(input),
        to_(to),
        inputs_(inputs),
        qkv_(check_qkv_projection(input, stack.weights[kQkv], stack.weights[kQkvBias], stack.weights[kNorm1],
                                  stack.weights[kNorm1Bias], 0.0, stack.num_heads, stack.num_kv_heads, stack.head_dim,
                                  inputs.kv_caches[0], inputs.positions, inputs.rotary_table, inputs.rotary_positions,
                                  stack.is_parallel ? OptionalTensor(to.mlp) : OptionalTensor(),
                                  stack.is_parallel ? stack.activation : 0, stack.formats[kQkv])) {
    for (size_t layer = 0; layer < (inputs.head_masks.empty() ? 1 : stack.layers()); layer++) {
      attentions_.push_back(check_attention(to.q, inputs.kv_caches[layer], inputs.positions, inputs.lengths,
                                            inputs.mask, inputs.head_mask(layer), stack.scales[layer], inputs.causal));
    }
  }

  // The block number `layer`. The first one that runs reads the input, the others what the one before has written.
  Block block(size_t layer, bool is_first) const {
    const size_t per_block = stack_.per_block();
    const PanelGemmArgs& first_gemm = qkv_.args.gemm;
    const auto product = [&](size_t index, const void* from) {
      PanelGemmArgs gemm = stack_.gemms[layer * per_block + index].args;
      gemm.x = from;
      gemm.m = first_gemm.m;
      return gemm;
    };
    const Tensor& kv = inputs_.kv_caches[layer];
    const void* from = is_first ? input_.const_data_ptr() : to_.hidden.const_data_ptr();
    Block block;
    block.qkv = qkv_.args;
    block.qkv.gemm = product(0, from);
    block.qkv.q = to_.q.mutable_data_ptr();
    block.qkv.kv_cache = kv.mutable_data_ptr();
    block.attention = attentions_[inputs_.head_masks.empty() ? 0 : layer].args;
    block.attention.scale = stack_.scales[layer];
    block.attention.kv_cache = kv.const_data_ptr();
    for (int i = 0; i < 3; i++) block.qkv.kv_strides[i] = block.attention.kv_strides[i] = kv.stride(i);
    block.attention.out = to_.attended.mutable_data_ptr();
    block.attention.out_stride = to_.attended.stride(1);
    void* out = to_.hidden.mutable_data_ptr();
    block.linear[0] = {product(1, to_.attended.const_data_ptr()), 0, from, out};
    if (stack_.is_parallel) return block;
    block.linear[1] = {product(2, out), stack_.activation, nullptr, to_.mlp.mutable_data_ptr()};
    block.linear[2] = {product(3, to_.mlp.const_data_ptr()), 0, out, out};
    return block;
  }

 private:
  const Stack& stack_;
  const Tensor& input_;
  const Activations& to_;
  const Inputs& inputs_;
  Call<QkvProjectionArgs> qkv_;
  std::vector<Call<AttentionArgs>> attentions_;  // with head masks each block has its own
};

Tensor last(Tensor t, int64_t dim, int64_t count) { return torch::stable::narrow(t, dim, t.size(dim) - count, count); }

// All caches but the first, which is checked with the first block.
void check_other_caches(const Stack& stack, const std::vector<Tensor>& kv_caches, int64_t batch) {
  for (size_t layer = 1; layer < stack.layers(); layer++) {
    const Tensor& kv = kv_caches[layer];
    check_kv_cache(kv, batch, stack.num_kv_heads, stack.head_dim);
    check_dtype(kv, "kv_cache", stack.dtype, "the stack");
    check_own_memory(kv, "kv_cache");
    ALULA_CHECK(kv.size(2) == kv_caches[0].size(2), "kv_caches hold ", kv_caches[0].size(2), " and ", kv.size(2),
                " slots; expected the same for all blocks");
  }
}

// A step of decoding: one team for all blocks.
void run_in_team(const std::vector<Block>& blocks, size_t products, const PanelGemmKernels& kernels) {
  AttentionPlan& plan = plan_attention(blocks[0].attention);
  size_t bytes = 0;
  for (const Block& block : blocks) {
    bytes = std::max(bytes, packed_bytes(block.qkv.gemm, kernels));
    for (size_t i = 0; i < products; i++) bytes = std::max(bytes, packed_bytes(block.linear[i].gemm, kernels));
  }
  run_team(
      [&] {
        thread_scratch<PackedX>().reserve(bytes);
        reserve_attention(plan);
      },
      [&](TeamMember&) { run_blocks(blocks, products, plan); });
}

// The last block, for the last `count` tokens of each row: of the others it only stores keys and values.
Tensor run_last_block(const Stack& stack, const Tensor& x, const Calls& all, const Inputs& inputs, int64_t count) {
  const size_t layer = stack.layers() - 1;
  const Tensor kept = as_contiguous(last(x, 1, count));
  const Activations to(stack, x.size(0), count);
  Inputs theirs = inputs;
  theirs.positions = last(inputs.positions, 1, count);
  if (inputs.rotary_positions) theirs.rotary_positions = last(*inputs.rotary_positions, 1, count);
  if (inputs.mask) theirs.mask = last(*inputs.mask, 2, count);
  const Calls calls(stack, kept, to, theirs);
  const Block block = calls.block(layer, true);
  run_keys_and_values(all.block(layer, layer == 0).qkv);
  run_blocks({block}, stack.per_block() - 1, plan_attention(block.attention));
  return to.hidden;
}

// What running a row of the batch alone costs beside its tokens, in tokens. 8 rows of 16 to 256 tokens one by one took
// as long as together and 4 to 17 tokens a row more, 10 mostly (two cores of an AMD EPYC, fp32 and bf16, E 768 and
// 2048); with E 2048 in fp32, from 128 tokens on, less than together.
constexpr int64_t kTokensOfARow = 16;

// Where each row's tokens begin, if nothing but padding lies before them, none of it among the last `count`, and the
// rows one by one cost less than with it; else empty.
std::vector<int64_t> starts_behind_padding(const Tensor& positions, int64_t count) {
  const int64_t batch = positions.size(0), tokens = positions.size(1);
  const auto* slots = static_cast<const int32_t*>(positions.const_data_ptr());
  const auto is_padding = [](int32_t slot) { return slot < 0; };
  std::vector<int64_t> starts;
  int64_t cost = 0;
  for (const int32_t* row = slots; row < slots + batch * tokens; row += tokens) {
    const int32_t* start = std::find_if_not(row, row + tokens, is_padding);
    if (row + tokens - start < count || std::any_of(start, row + tokens, is_padding)) return {};
    starts.push_back(start - row);
    cost += row + tokens - start + kTokensOfARow;
  }
  return cost < batch * tokens ? starts : std::vector<int64_t>();
}

// Each row of the batch without the padding before its tokens.
Tensor run_row_by_row(const Tensor& x, int64_t id, const Inputs& inputs, const std::vector<int64_t>& starts,
                      int64_t count) {
  const int64_t batch = x.size(0), tokens = x.size(1);
  Tensor out = new_large_tensor({batch, count, x.size(2)}, x.scalar_type());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t b = 0; b < batch; b++) {
    const auto row = [b](Tensor t) { return torch::stable::narrow(t, 0, b, 1); };
    const auto real = [&](const Tensor& t) { return last(row(t), 1, tokens - starts[b]); };
    std::vector<Tensor> kv_caches;
    for (const Tensor& kv : inputs.kv_caches) kv_caches.push_back(row(kv));
    OptionalTensor turns = inputs.rotary_positions;
    if (turns) turns = real(*turns);
    const Tensor part = decoder_blocks(real(x), id, kv_caches, real(inputs.positions), row(inputs.lengths), {},
                                       inputs.head_masks, inputs.causal, inputs.rotary_table, turns, count);
    const auto bytes = static_cast<size_t>(part.numel()) * x.element_size();
    std::memcpy(to + b * bytes, part.const_data_ptr(), bytes);
  }
  return out;
}

}  // namespace

Tensor decoder_blocks(const Tensor& x, int64_t id, const std::vector<Tensor>& kv_caches, const Tensor& positions,
                      const Tensor& lengths, const OptionalTensor& mask, const std::vector<Tensor>& head_masks,
                      bool causal, const OptionalTensor& rotary_table, const OptionalTensor& rotary_positions,
                      int64_t tokens_to_keep) {
  const std::shared_ptr<const Stack> stack = stacks().at(id);
  const size_t layers = stack->layers(), products = stack->per_block() - 1;
  check_cpu(x, "x");
  check_shape(x, "x", {-1, -1, stack->width}, "[B, T, E]");
  check_dtype(x, "x", stack->dtype, "the stack");
  ALULA_CHECK(kv_caches.size() == layers, "kv_caches holds ", kv_caches.size(), " tensors; the stack has ", layers,
              " blocks");
  ALULA_CHECK(head_masks.empty() || head_masks.size() == layers, "head_masks holds ", head_masks.size(),
              " tensors; expected none, or one for each of ", layers, " blocks");
  ALULA_CHECK(tokens_to_keep >= 0, "tokens_to_keep is ", tokens_to_keep, "; accepted: 0 (all), or a positive count");
  const int64_t batch = x.size(0), tokens = x.size(1);
  const int64_t kept = tokens_to_keep > 0 && tokens_to_keep < tokens ? tokens_to_keep : tokens;
  const Tensor input = as_contiguous(x);
  const Activations to(*stack, batch, tokens);
  const Inputs inputs = {kv_caches, positions, lengths, mask, head_masks, causal, rotary_table, rotary_positions};
  const Calls calls(*stack, input, to, inputs);
  check_other_caches(*stack, kv_caches, batch);
  if (batch * tokens == 0) return last(to.hidden, 1, kept);

  const PanelGemmKernels& kernels = ALULA_KERNELS(kLinear).gemm;
  const bool in_team = batch * tokens <= kernels.rows_per_block && num_threads() > 1;
  const bool stops_early = kept < tokens && !in_team;  // with few rows, reading the weights is what takes time
  if (stops_early && !mask) {
    const std::vector<int64_t> starts = starts_behind_padding(as_contiguous(positions), kept);
    if (!starts.empty()) {
      ALULA_TRACE("decoder_blocks", value_dtype(x, "x"), batch, " rows one by one, without their padding");
      return run_row_by_row(input, id, inputs, starts, kept);
    }
  }
  ALULA_TRACE("decoder_blocks", value_dtype(x, "x"), layers, " blocks, ", size_class(batch * tokens),
              " rows: ", in_team ? "one team for all" : "a parallel_for for each product",
              stops_early ? ", the last one for the tokens kept" : "");
  std::vector<Block> blocks;
  blocks.reserve(layers);
  for (size_t layer = 0; layer < layers - stops_early; layer++) blocks.push_back(calls.block(layer, layer == 0));
  if (in_team) {
    run_in_team(blocks, products, kernels);
  } else if (!blocks.empty()) {
    run_blocks(blocks, products, plan_attention(blocks[0].attention));
  }
  if (stops_early) return run_last_block(*stack, blocks.empty() ? input : to.hidden, calls, inputs, kept);
  return kept < tokens ? as_contiguous(last(to.hidden, 1, kept)) : to.hidden;
}

STABLE_TORCH_LIBRARY_IMPL(alula, CPU, m) {
  m.impl("bind_decoder_blocks", ALULA_BOX(bind_decoder_blocks));
  m.impl("decoder_blocks", ALULA_BOX(decoder_blocks));
}

}  // namespace alula
