#include "ops/linear.h"

#include <array>

#include "core/tensor.h"
#include "cpu/panel_gemm_parallel.h"

namespace alula {

Tensor linear(const Tensor& x, const Tensor& weight, int64_t out_features, const OptionalTensor& bias,
              const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps, int64_t activation,
              const OptionalTensor& residual, int64_t format) {
  check_cpu(x, "x");
  ALULA_CHECK(x.dim() >= 1, "x has no dimensions; expected [..., in_features]");
  const int64_t k = x.size(x.dim() - 1);
  const CheckedWeight w = checked_weight(weight, format, out_features, x);
  check_activation(activation);
  ALULA_CHECK(norm_weight || !norm_bias, "norm_bias is given without norm_weight; give both, or norm_weight alone");
  const OptionalTensor b = feature_vector(bias, "bias", out_features, x, w.like);
  const OptionalTensor nw = feature_vector(norm_weight, "norm_weight", k, x, w.like);
  const OptionalTensor nb = feature_vector(norm_bias, "norm_bias", k, x, w.like);

  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  OptionalTensor r = residual;
  if (r) {
    check_cpu(*r, "residual");
    check_dtype(*r, "residual", x.scalar_type(), w.like);
    const bool fits = std::vector<int64_t>(r->sizes().begin(), r->sizes().end()) == sizes;
    ALULA_CHECK(fits, "residual has shape ", shape_of(*r), "; expected that of the result: x ", shape_of(x), " with ",
                out_features, " features");
    r = as_contiguous(r);
  }
  const Tensor input = as_contiguous(x);
  Tensor out = torch::stable::empty(sizes, x.scalar_type());

  int64_t m = 1;
  for (size_t i = 0; i + 1 < sizes.size(); i++) m *= sizes[i];
  const LinearArgs args = {
      .gemm = {w.dtype, input.const_data_ptr(), weight.const_data_ptr(), data_or_null(b), data_or_null(nw),
               data_or_null(nb), static_cast<float>(norm_eps), m, out_features, k, w.format},
      .activation = static_cast<int>(activation),
      .residual = data_or_null(r),
      .out = out.mutable_data_ptr(),
  };
  const LinearKernels& kernels = ALULA_KERNELS(kLinear);
  run_panel_gemm("linear", args.gemm, kernels.gemm,
                 [&](const void* packed, int64_t p0, int64_t p1, int64_t b0, int64_t b1) {
                   kernels.multiply(args, packed, p0, p1, b0, b1);
                 });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(alula, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace alula
