// The ops of one kernel: arguments from a request.
#include "ops/embedding.h"
#include "ops/layer_norm.h"
#include "ops/quantize_weight.h"
#include "ops/rotary.h"
#include "ops/scaled_masked_softmax.h"
#include "request.h"

namespace simt {
namespace {

using namespace alula;

// A list of integers, sent as an int64 tensor.
std::vector<int64_t> integers(const Request& r, const std::string& name) {
  const int64_t* first = r.t<const int64_t>(name);
  return {first, first + r.tensors.at(name)->size() / sizeof(int64_t)};
}

void run_softmax(const Request& r) {
  const std::vector<int64_t> sizes = integers(r, "sizes"), strides = integers(r, "mask_strides");
  scaled_masked_softmax_cuda(
      {
          .dtype = r.dtype("dtype"),
          .out_dtype = r.dtype("out_dtype"),
          .scores = r.t("scores"),
          .out = r.t("out"),
          .num_tokens = sizes.size() >= 2 ? sizes[sizes.size() - 2] : 1,
          .num_keys = sizes.back(),
          .scale = r.f("scale"),
          .is_causal = r.i("causal") != 0,
          .writes_past_caches = false,
          .mask_kind = static_cast<MaskKind>(r.i("mask_kind")),
          .mask = r.t("mask"),
          .num_leading = static_cast<int>(sizes.size()) - 1,
          .leading_sizes = sizes.data(),
          .mask_strides = strides.data(),
          .mask_key_stride = strides.back(),
      },
      r.i("rows"), r.stream());
}

void run_layer_norm(const Request& r) {
  layer_norm_cuda({r.dtype("dtype"), r.t("x"), r.t("residual"), r.t("weight"), r.t("bias"), r.t("out"), r.i("width"),
                   r.f("eps"), false},
                  r.i("rows"), r.stream());
}

void run_rotary(const Request& r) {
  const auto args = [&](const std::string& x) {
    const std::vector<int64_t> sizes = integers(r, x + "_sizes");  // B, T, heads, D
    const std::vector<int64_t> from = integers(r, x + "_strides"), to = integers(r, x + "_out_strides");
    const bool in_place = r.t(x + "_out") == nullptr;
    return RotaryArgs{
        .dtype = r.dtype("dtype"),
        .tokens = sizes[1],
        .num_heads = sizes[2],
        .head_dim = sizes[3],
        .rotary_dim = r.i("rotary_dim"),
        .is_interleaved = r.i("interleaved") != 0,
        .x = r.t(x),
        .x_strides = {from[0], from[1], from[2]},
        .out = in_place ? r.t(x) : r.t(x + "_out"),
        .out_strides = {to[0], to[1], to[2]},
        .positions = r.t<const int32_t>("positions"),
        .table = r.t<const float>("table"),
    };
  };
  rotary_cuda(args("q"), args("k"), r.i("tokens"), r.i("num_positions"), r.t<IdFaults>("faults"), r.stream());
}

void run_embedding(const Request& r) {
  static_assert(sizeof(IdFaults) == 2 * kIdKinds * sizeof(int64_t), "the test gives as much");
  auto* faults = r.t<IdFaults>("faults");
  embedding_cuda(
      {
          .dtype = r.dtype("dtype"),
          .format = {static_cast<WeightKind>(r.i("format") & 15), true, static_cast<int>(r.i("format") >> 8)},
          .width = r.i("width"),
          .table = r.t("table"),
          .input_ids = r.t<const int64_t>("input_ids"),
          .scale = r.f("scale"),
          .token_type_ids = r.t<const int64_t>("token_type_ids"),
          .token_type_table = r.t("token_type_table"),
          .position_ids = r.t<const int64_t>("position_ids"),
          .position_period = r.i("position_period"),
          .position_table = r.t("position_table"),
          .out = r.t("out"),
      },
      {r.i("table_stride"), r.i("num_embeddings"), r.i("num_positions"), r.i("num_token_types"), faults}, r.i("tokens"),
      r.stream());
}

void run_dequantize_weight(const Request& r) {
  const int64_t code = r.i("format");
  dequantize_weight_cuda({{static_cast<WeightKind>(code & 15), true, static_cast<int>(code >> 8)},
                          r.t("packed"),
                          r.i("n"),
                          r.i("k"),
                          r.dtype("dtype"),
                          r.t("out")},
                         r.stream());
}

const Registration kSoftmax("scaled_masked_softmax", run_softmax);
const Registration kLayerNorm("layer_norm", run_layer_norm);
const Registration kRotary("rotary", run_rotary);
const Registration kEmbedding("embedding", run_embedding);
const Registration kDequantizeWeight("dequantize_weight", run_dequantize_weight);

}  // namespace
}  // namespace simt
