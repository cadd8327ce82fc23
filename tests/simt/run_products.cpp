// linear and qkv_projection: arguments from a request. A product that a library would make comes with it; what follows
// a quantized weight's plan has its memory from here.
#include <cmath>

#include "ops/linear.h"
#include "ops/qkv_projection.h"
#include "request.h"

namespace simt {
namespace {

using namespace alula;

// The plan for the GPU that is played, and its memory.
struct Quantized {
  QuantizedPlan plan;
  std::vector<float> workspace;
  std::vector<uint32_t> counters;

  Quantized(const Request& r, const PanelGemmArgs& gemm)
      : plan(quantized_plan(gemm, static_cast<int>(r.i("num_multiprocessors")))),
        workspace(static_cast<size_t>(plan.workspace_floats), NAN),
        counters(static_cast<size_t>(plan.num_counters)) {}

  QuantizedWork work() { return {workspace.data(), counters.data()}; }

  // `plan` tells the test: [few, large, splits]. Counters are zero again.
  void report(const Request& r) const {
    for (const uint32_t counter : counters) {
      if (counter != 0) throw std::runtime_error("a counter is left at " + std::to_string(counter));
    }
    int64_t* to = r.t<int64_t>("plan");
    to[0] = plan.is_few, to[1] = plan.is_large, to[2] = plan.splits;
  }
};

WeightFormat format_of(const Request& r) {
  const int64_t code = r.integers.count("format") ? r.i("format") : 0;
  return {static_cast<WeightKind>(code & 15), (code & 16) != 0, static_cast<int>(code >> 8)};
}

PanelGemmArgs gemm(const Request& r) {
  return {r.dtype("dtype"), r.t("x"), r.t("weight"), r.t("bias"), r.t("norm_weight"), r.t("norm_bias"),
          r.f("norm_eps"),  r.i("m"), r.i("n"),      r.i("k"),    format_of(r)};
}

void run_linear(const Request& r) {
  const LinearArgs args = {gemm(r), static_cast<int>(r.i("activation")), r.t("residual"), r.t("out")};
  if (args.gemm.format.kind != WeightKind::kDense) {
    Quantized quantized(r, args.gemm);
    linear_quantized_cuda(args, quantized.plan, quantized.work(), r.stream());
    return quantized.report(r);
  }
  return r.i("few_rows") ? linear_few_rows_cuda(args, r.stream()) : linear_epilogue_cuda(args, r.stream());
}

void run_qkv_projection(const Request& r) {
  const int64_t* strides = r.t<const int64_t>("kv_strides");
  const QkvProjectionArgs args = {
      .gemm = gemm(r),
      .tokens = r.i("tokens"),
      .num_heads = r.i("num_heads"),
      .num_kv_heads = r.i("num_kv_heads"),
      .head_dim = r.i("head_dim"),
      .q = r.t("q"),
      .kv_cache = r.t("kv_cache"),
      .kv_strides = {strides[0], strides[1], strides[2]},
      .positions = r.t<const int32_t>("positions"),
      .rotary_table = r.t<const float>("rotary_table"),
      .rotary_positions = r.t<const int32_t>("rotary_positions"),
      .rotary_dim = r.i("rotary_dim"),
      .mlp = r.t("mlp"),
      .mlp_stride = r.i("mlp_stride"),
      .mlp_activation = static_cast<int>(r.i("mlp_activation")),
  };
  const QkvPlaces places = {r.i("num_slots"), r.i("num_rotary_positions"), r.t<IdFaults>("faults")};
  if (args.gemm.format.kind != WeightKind::kDense) {
    Quantized quantized(r, args.gemm);
    qkv_projection_quantized_cuda(args, places, quantized.plan, quantized.work(), r.stream());
    return quantized.report(r);
  }
  if (r.i("few_rows")) return qkv_projection_few_rows_cuda(args, places, r.stream());
  qkv_projection_epilogue_cuda(args, r.t("product"), places, r.stream());
}

const Registration kLinear("linear", run_linear);
const Registration kQkvProjection("qkv_projection", run_qkv_projection);

}  // namespace
}  // namespace simt
