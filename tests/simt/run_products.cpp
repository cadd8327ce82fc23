// linear and qkv_projection: arguments from a request. A product that a library would make comes with it.
#include "ops/linear.h"
#include "ops/qkv_projection.h"
#include "request.h"

namespace simt {
namespace {

using namespace alula;

PanelGemmArgs gemm(const Request& r) {
  return {r.dtype("dtype"), r.t("x"), r.t("weight"), r.t("bias"), r.t("norm_weight"), r.t("norm_bias"), r.f("norm_eps"),
          r.i("m"),         r.i("n"), r.i("k"),      {}};
}

void run_linear(const Request& r) {
  const LinearArgs args = {gemm(r), static_cast<int>(r.i("activation")), r.t("residual"), r.t("out")};
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
  const int64_t slots = r.i("num_slots"), positions = r.i("num_rotary_positions");
  if (r.i("few_rows")) return qkv_projection_few_rows_cuda(args, slots, positions, r.stream());
  qkv_projection_epilogue_cuda(args, r.t("product"), slots, positions, r.stream());
}

const Registration kLinear("linear", run_linear);
const Registration kQkvProjection("qkv_projection", run_qkv_projection);

}  // namespace
}  // namespace simt
