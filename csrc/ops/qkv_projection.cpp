#include "ops/qkv_projection.h"

#include <array>

#include "core/cuda.h"
#include "core/refuse_grad.h"
#include "core/tensor.h"
#include "cpu/panel_gemm_parallel.h"
#include "ops/calls.h"
#include "ops/kv_cache.h"

namespace alula {

Call<QkvProjectionArgs> check_qkv_projection(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                             const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                             double norm_eps, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                                             const Tensor& kv_cache, const Tensor& positions,
                                             const OptionalTensor& rotary_table, const OptionalTensor& rotary_positions,
                                             const OptionalTensor& mlp, int64_t mlp_activation, int64_t format) {
  const Place place = place_of(x, "x");
  ALULA_CHECK(x.dim() == 3, "x has shape ", shape_of(x), "; expected [B, T, E]");
  const int64_t batch = x.size(0), tokens = x.size(1), k = x.size(2);
  check_heads(num_heads, num_kv_heads, head_dim);
  ALULA_CHECK(!mlp || mlp->dim() == 3, "mlp has shape ", shape_of(*mlp), "; expected [B, T, F]");
  const int64_t mlp_features = mlp ? mlp->size(mlp->dim() - 1) : 0;
  const int64_t n = (num_heads + 2 * num_kv_heads) * head_dim + mlp_features;
  Call<PanelGemmArgs> gemm = check_gemm_weights(weight, format, n, k, x, "x", bias, norm_weight, norm_bias, norm_eps);
  Call<QkvProjectionArgs> call = {{}, std::move(gemm.kept)};
  check_kv_cache(kv_cache, batch, num_kv_heads, head_dim, place);
  check_dtype(kv_cache, "kv_cache", x.scalar_type(), dtype_owner(format));
  check_own_memory(kv_cache, "kv_cache");
  const auto* slot = static_cast<const int32_t*>(call.keep(checked_positions(positions, batch, tokens, place)));
  for (int64_t i = 0; i < batch * tokens && !place.is_cuda(); i++) {  // on CUDA the kernel looks at them
    ALULA_CHECK(slot[i] < kv_cache.size(2), "positions holds ", slot[i], "; kv_cache has room for positions below ",
                kv_cache.size(2));
  }

  ALULA_CHECK(rotary_table.has_value() == rotary_positions.has_value(),
              "rotary_table and rotary_positions go together; one of them is missing");
  OptionalTensor table, turns;
  if (rotary_table) {
    table = checked_rotary_table(*rotary_table, head_dim, place);
    turns = checked_positions(*rotary_positions, batch, tokens, place);
    if (!place.is_cuda()) check_rotary_positions(*turns, *table);
  }
  if (mlp) {
    check_place(*mlp, "mlp", place);
    check_shape(*mlp, "mlp", {batch, tokens, -1}, "[B, T, F]");
    check_dtype(*mlp, "mlp", x.scalar_type(), dtype_owner(format));
    check_own_memory(*mlp, "mlp");
    check_token_rows(*mlp, "mlp");
  }
  check_activation(mlp_activation);

  gemm.args.x = call.keep(as_contiguous(x));
  gemm.args.m = batch * tokens;
  call.args = {
      .gemm = gemm.args,
      .tokens = tokens,
      .num_heads = num_heads,
      .num_kv_heads = num_kv_heads,
      .head_dim = head_dim,
      .q = nullptr,
      .kv_cache = kv_cache.mutable_data_ptr(),
      .kv_strides = {kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2)},
      .positions = slot,
      .rotary_table = static_cast<const float*>(call.keep(table)),
      .rotary_positions = static_cast<const int32_t*>(call.keep(turns)),
      .rotary_dim = table ? table->size(1) : 0,
      .mlp = mlp ? mlp->mutable_data_ptr() : nullptr,
      .mlp_stride = mlp ? mlp->stride(1) : 0,
      .mlp_activation = static_cast<int>(mlp_activation),
  };
  return call;
}

void run_qkv_projection(const QkvProjectionArgs& args) {
  const QkvProjectionKernels& kernels = ALULA_KERNELS(kQkvProjection);
  run_panel_gemm("qkv_projection", args.gemm, kernels.gemm,
                 [&](const void* packed, int64_t p0, int64_t p1, int64_t b0, int64_t b1) {
                   kernels.multiply(args, packed, p0, p1, b0, b1);
                 });
}

void run_keys_and_values(const QkvProjectionArgs& args) {
  const QkvProjectionKernels& kernels = ALULA_KERNELS(kQkvProjection);
  const int64_t begin = args.num_heads * args.head_dim, end = begin + 2 * args.num_kv_heads * args.head_dim;
  const int64_t first = begin / kPanelRows;
  PanelGemmArgs part = args.gemm;  // as many panels, for the shares of the threads
  part.n = (num_panels(end) - first) * kPanelRows;
  run_panel_gemm("qkv_projection (keys and values)", part, kernels.gemm,
                 [&](const void* packed, int64_t p0, int64_t p1, int64_t b0, int64_t b1) {
                   kernels.multiply(args, packed, first + p0, first + p1, b0, b1);
                 });
}

namespace {

void launch_on_cuda(QkvProjectionArgs& args, const Tensor& x, const Tensor& weight,
                    [[maybe_unused]] const QkvPlaces& places, const CudaScope& scope) {
  const PanelGemmArgs& gemm = args.gemm;
  if (gemm.format.kind != WeightKind::kDense) {
    [[maybe_unused]] const PreparedQuantized prepared = prepare_quantized("qkv_projection", args.gemm, x, scope);
    ALULA_CUDA_CALL(qkv_projection_quantized_cuda(args, places, prepared.plan, prepared.work, scope.stream()));
    return;
  }
  const bool is_few = gemm.m <= kMaxFewRows;
  ALULA_TRACE_CUDA("qkv_projection", gemm.dtype, size_class(gemm.m), " rows, ", gemm.k, " -> ", gemm.n,
                   gemm.norm_weight ? ", layer norm" : "", is_few ? ": one kernel" : ": library product");
  if (is_few) {
    ALULA_CUDA_CALL(qkv_projection_few_rows_cuda(args, places, scope.stream()));
    return;
  }
  const Tensor product = library_product(gemm, x, weight, scope);
  ALULA_CUDA_CALL(qkv_projection_epilogue_cuda(args, product.const_data_ptr(), places, scope.stream()));
}

void run_on_cuda(QkvProjectionArgs& args, const Tensor& x, const Tensor& weight, int64_t num_slots,
                 int64_t num_rotary_positions) {
  if (args.gemm.m == 0) return;
  const CudaScope scope(x);
  const IdNotes notes(scope);
  launch_on_cuda(args, x, weight, {num_slots, num_rotary_positions, notes.faults()}, scope);
  notes.raise_if_waiting();
}

}  // namespace

Tensor qkv_projection(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps,
                      int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, const Tensor& kv_cache,
                      const Tensor& positions, const OptionalTensor& rotary_table,
                      const OptionalTensor& rotary_positions, const OptionalTensor& mlp, int64_t mlp_activation,
                      int64_t format) {
  Call<QkvProjectionArgs> call =
      check_qkv_projection(x, weight, bias, norm_weight, norm_bias, norm_eps, num_heads, num_kv_heads, head_dim,
                           kv_cache, positions, rotary_table, rotary_positions, mlp, mlp_activation, format);
  const Place place = place_of(x, "x");
  Tensor q = new_large_tensor({x.size(0), x.size(1), num_heads, head_dim}, x.scalar_type(), place);
  call.args.q = q.mutable_data_ptr();
  if (place.is_cuda()) {
    run_on_cuda(call.args, as_contiguous(x), weight, kv_cache.size(2), rotary_table ? rotary_table->size(0) : 0);
    return q;
  }
  run_qkv_projection(call.args);
  return q;
}

STABLE_TORCH_LIBRARY_IMPL(alula, CPU, m) { m.impl("qkv_projection", ALULA_BOX(qkv_projection)); }
STABLE_TORCH_LIBRARY_IMPL(alula, CUDA, m) { m.impl("qkv_projection", ALULA_BOX(qkv_projection)); }

}  // namespace alula
