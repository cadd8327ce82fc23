// block_sparse_attention: arguments from a request.
#include "ops/block_sparse_attention.h"

#include <algorithm>

#include "request.h"

namespace simt {
namespace {

using namespace alula;

void run_block_sparse_attention(const Request& r) {
  const int64_t* k = r.t<const int64_t>("k_strides");
  const int64_t* v = r.t<const int64_t>("v_strides");
  const BlockSparseAttentionArgs args = {
      .dtype = r.dtype("dtype"),
      .tokens = r.i("tokens"),
      .num_heads = r.i("num_heads"),
      .num_kv_heads = r.i("num_kv_heads"),
      .head_dim = r.i("head_dim"),
      .block_size = r.i("block_size"),
      .q = r.t("q"),
      .k = r.t<char>("k") + r.i("k_offset"),
      .v = r.t<char>(r.i("is_merged") ? "k" : "v") + r.i("v_offset"),
      .k_strides = {k[0], k[1], k[2]},
      .v_strides = {v[0], v[1], v[2]},
      .entries = r.t<const int32_t>("entries"),
      .global_tokens = r.t<const uint8_t>("global_tokens"),
      .global_stride = r.i("global_stride"),
      .visible = r.t<const uint8_t>("visible"),
      .grid = nullptr,
      .ends = nullptr,
      .head_mask = r.t<const float>("head_mask"),
      .scale = r.f("scale"),
      .causal = r.i("causal") != 0,
      .out = r.t("out"),
  };
  BlockSparseAttentionCudaArgs cuda = {
      .batch = r.i("batch"),
      .num_blocks = r.i("num_blocks"),
      .plan_batches = r.i("plan_batches"),
      .plan_heads = r.i("plan_heads"),
      .num_entries = r.i("num_entries"),
      .schedule = r.t<const int32_t>("schedule"),
      .num_items = r.i("num_items"),
      .num_partials = r.i("num_partials"),
      .first = r.t<const int32_t>("first"),
      .lengths = r.t<const int32_t>("lengths"),
      .is_query_even = r.i("is_query_even") != 0,
      .are_keys_even = r.i("are_keys_even") != 0,
      .workspace = nullptr,
      .counters = nullptr,
  };
  const BlockSparseAttentionCudaPlan plan = block_sparse_attention_cuda_plan(args, cuda);
  const Buffer workspace(static_cast<size_t>(plan.workspace_floats) * 4, 0);
  const Buffer counters(static_cast<size_t>(plan.num_counters) * 4, 0);
  std::fill_n(workspace.data(), workspace.size(), static_cast<char>(0xff));
  std::fill_n(counters.data(), counters.size(), static_cast<char>(0));
  cuda.workspace = reinterpret_cast<float*>(workspace.data());
  cuda.counters = reinterpret_cast<uint32_t*>(counters.data());
  block_sparse_attention_cuda(args, cuda, plan, r.stream());
  const bool are_zeros = std::all_of(counters.data(), counters.data() + counters.size(), [](char c) { return c == 0; });
  if (!are_zeros) throw std::runtime_error("a counter is not zero after the call");
}

const Registration kBlockSparseAttention("block_sparse_attention", run_block_sparse_attention);

}  // namespace
}  // namespace simt
