#include "ops/linear.h"

#include <array>

#include "core/cuda.h"
#include "core/refuse_grad.h"
#include "core/tensor.h"
#include "cpu/panel_gemm_parallel.h"
#include "ops/calls.h"

namespace alula {

Call<PanelGemmArgs> check_gemm_weights(const Tensor& weight, int64_t format, int64_t out_features, int64_t in_features,
                                       const Tensor& like, const char* like_name, const OptionalTensor& bias,
                                       const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                       double norm_eps) {
  const CheckedWeight w = checked_weight(weight, format, out_features, in_features, like, like_name);
  ALULA_CHECK(norm_weight || !norm_bias, "norm_bias is given without norm_weight; give both, or norm_weight alone");
  const char* owner = dtype_owner(format);
  Call<PanelGemmArgs> call = {};
  call.args = {
      .dtype = w.dtype,
      .x = nullptr,
      .weight = weight.const_data_ptr(),
      .bias = call.keep(feature_vector(bias, "bias", out_features, like, owner)),
      .norm_weight = call.keep(feature_vector(norm_weight, "norm_weight", in_features, like, owner)),
      .norm_bias = call.keep(feature_vector(norm_bias, "norm_bias", in_features, like, owner)),
      .norm_eps = static_cast<float>(norm_eps),
      .m = 0,
      .n = out_features,
      .k = in_features,
      .format = w.format,
  };
  return call;
}

Call<LinearArgs> check_linear(const Tensor& x, const Tensor& weight, int64_t out_features, const OptionalTensor& bias,
                              const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps,
                              int64_t activation, const OptionalTensor& residual, int64_t format) {
  const Place place = place_of(x, "x");
  ALULA_CHECK(x.dim() >= 1, "x has no dimensions; expected [..., in_features]");
  const int64_t k = x.size(x.dim() - 1);
  Call<PanelGemmArgs> gemm =
      check_gemm_weights(weight, format, out_features, k, x, "x", bias, norm_weight, norm_bias, norm_eps);
  check_activation(activation);
  if (residual) {
    check_place(*residual, "residual", place);
    check_dtype(*residual, "residual", x.scalar_type(), dtype_owner(format));
    bool fits = residual->dim() == x.dim() && residual->size(x.dim() - 1) == out_features;
    for (int64_t i = 0; i + 1 < x.dim(); i++) fits = fits && residual->size(i) == x.size(i);
    ALULA_CHECK(fits, "residual has shape ", shape_of(*residual), "; expected that of the result: x ", shape_of(x),
                " with ", out_features, " features");
  }
  Call<LinearArgs> call = {{gemm.args, static_cast<int>(activation), nullptr, nullptr}, std::move(gemm.kept)};
  call.args.gemm.x = call.keep(as_contiguous(x));
  call.args.gemm.m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) call.args.gemm.m *= x.size(i);
  call.args.residual = call.keep(as_contiguous(residual));
  return call;
}

void run_linear(const LinearArgs& args) {
  const LinearKernels& kernels = ALULA_KERNELS(kLinear);
  run_panel_gemm("linear", args.gemm, kernels.gemm,
                 [&](const void* packed, int64_t p0, int64_t p1, int64_t b0, int64_t b1) {
                   kernels.multiply(args, packed, p0, p1, b0, b1);
                 });
}

namespace {

// `out` where the kernel fills it, else the library's product, which takes its place.
Tensor linear_on_cuda(LinearArgs& args, const Tensor& x, const Tensor& weight, const Tensor& out) {
  const PanelGemmArgs& gemm = args.gemm;
  if (gemm.m == 0 || gemm.n == 0) return out;
  const CudaScope scope(x);
  if (gemm.format.kind != WeightKind::kDense) {
    [[maybe_unused]] const PreparedQuantized prepared = prepare_quantized("linear", args.gemm, x, scope);
    ALULA_CUDA_CALL(linear_quantized_cuda(args, prepared.plan, prepared.work, scope.stream()));
    return out;
  }
  const bool is_few = gemm.m <= kMaxFewRows;
  ALULA_TRACE_CUDA("linear", gemm.dtype, size_class(gemm.m), " rows, ", gemm.k, " -> ", gemm.n,
                   gemm.norm_weight ? ", layer norm" : "", is_few ? ": one kernel" : ": library product");
  if (is_few) {
    ALULA_CUDA_CALL(linear_few_rows_cuda(args, scope.stream()));
    return out;
  }
  const Tensor product = torch::stable::reshape(library_product(gemm, x, weight, scope), out.sizes());
  args.out = product.mutable_data_ptr();
  if (gemm.bias || args.activation || args.residual) {
    ALULA_CUDA_CALL(linear_epilogue_cuda(args, scope.stream()));
  }
  return product;
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, int64_t out_features, const OptionalTensor& bias,
              const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps, int64_t activation,
              const OptionalTensor& residual, int64_t format) {
  Call<LinearArgs> call =
      check_linear(x, weight, out_features, bias, norm_weight, norm_bias, norm_eps, activation, residual, format);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  const Place place = place_of(x, "x");
  Tensor out = new_large_tensor(sizes, x.scalar_type(), place);
  call.args.out = out.mutable_data_ptr();
  if (place.is_cuda()) return linear_on_cuda(call.args, as_contiguous(x), weight, out);
  run_linear(call.args);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(alula, CPU, m) { m.impl("linear", ALULA_BOX(linear)); }
STABLE_TORCH_LIBRARY_IMPL(alula, CUDA, m) { m.impl("linear", ALULA_BOX(linear)); }

}  // namespace alula
