// attention: arguments from a request.
#include "ops/attention.h"

#include <algorithm>

#include "request.h"

namespace simt {
namespace {

using namespace alula;

void run_attention(const Request& r) {
  const int64_t* kv = r.t<const int64_t>("kv_strides");
  const int64_t* mask = r.t<const int64_t>("mask_strides");
  const AttentionArgs args = {
      .dtype = r.dtype("dtype"),
      .batch = r.i("batch"),
      .tokens = r.i("tokens"),
      .num_heads = r.i("num_heads"),
      .num_kv_heads = r.i("num_kv_heads"),
      .head_dim = r.i("head_dim"),
      .q = r.t("q"),
      .kv_cache = r.t("kv_cache"),
      .kv_strides = {kv[0], kv[1], kv[2]},
      .positions = r.t<const int32_t>("positions"),
      .lengths = r.t<const int32_t>("lengths"),
      .causal = r.i("causal") != 0,
      .mask_kind = static_cast<MaskKind>(r.i("mask_kind")),
      .mask = r.t("mask"),
      .mask_strides = {mask[0], mask[1], mask[2], mask[3]},
      .head_mask = r.t<const float>("head_mask"),
      .scale = r.f("scale"),
      .out = r.t("out"),
      .out_stride = r.i("out_stride"),
  };
  // As many multiprocessors as the test says: more of them split the keys further.
  CudaDevice device = *r.stream().device;
  device.num_multiprocessors = static_cast<int>(r.i("num_multiprocessors"));
  const int64_t slots = r.i("num_slots");
  const AttentionCudaPlan plan = attention_cuda_plan(args, slots, device);
  const Buffer workspace(static_cast<size_t>(plan.workspace_floats) * 4, 0);
  const Buffer counters(static_cast<size_t>(plan.num_counters) * 4, 0);
  std::fill_n(workspace.data(), workspace.size(), static_cast<char>(0xff));
  std::fill_n(counters.data(), counters.size(), static_cast<char>(0));
  const AttentionCudaArgs cuda = {
      .num_slots = slots,
      .mask_keys = r.i("mask_keys"),
      .is_query_even = r.i("is_query_even") != 0,
      .is_cache_even = r.i("is_cache_even") != 0,
      .num_splits = 0,
      .workspace = reinterpret_cast<float*>(workspace.data()),
      .counters = reinterpret_cast<uint32_t*>(counters.data()),
  };
  attention_cuda(args, cuda, plan, r.stream());
  *r.t<int64_t>("splits") = plan.num_splits;
  *r.t<int64_t>("rows") = plan.rows;
  const bool are_zeros = std::all_of(counters.data(), counters.data() + counters.size(), [](char c) { return c == 0; });
  if (!are_zeros) throw std::runtime_error("a counter is not zero after the call");
}

const Registration kAttention("attention", run_attention);

}  // namespace
}  // namespace simt
