#include "ops/layer_norm.h"

#include <array>

#include "core/cuda.h"
#include "core/refuse_grad.h"
#include "core/scratch.h"
#include "core/tensor.h"
#include "core/trace.h"
#include "cpu/parallel.h"

namespace alula {
namespace {

// A thread is worth waking (about 3 us) for this many values (about 5 us).
constexpr int64_t kValuesPerThread = 16 * 1024;

}  // namespace

Tensor layer_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps,
                  const OptionalTensor& residual) {
  const Place place = place_of(x, "x");
  const DType dtype = value_dtype(x, "x");
  ALULA_CHECK(x.dim() >= 1, "x has no dimensions; expected [..., E]");
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const int64_t width = sizes.back();
  const OptionalTensor w = feature_vector(weight, "weight", width, x, "x");
  const OptionalTensor b = feature_vector(bias, "bias", width, x, "x");
  OptionalTensor r = residual;
  if (r) {
    check_place(*r, "residual", place);
    check_dtype(*r, "residual", x.scalar_type(), "x");
    const bool fits = std::vector<int64_t>(r->sizes().begin(), r->sizes().end()) == sizes;
    ALULA_CHECK(fits, "residual has shape ", shape_of(*r), "; expected that of x, ", shape_of(x));
    r = as_contiguous(r);
  }
  const Tensor input = as_contiguous(x);
  Tensor out = new_large_tensor(sizes, x.scalar_type(), place);

  if (out.numel() == 0) return out;
  const LayerNormArgs args = {
      .dtype = dtype,
      .x = input.const_data_ptr(),
      .residual = data_or_null(r),
      .weight = data_or_null(w),
      .bias = data_or_null(b),
      .out = out.mutable_data_ptr(),
      .width = width,
      .eps = static_cast<float>(eps),
      .writes_past_caches = is_beyond_caches(out.numel() * out.element_size()),
  };
  if (place.is_cuda()) {
    const CudaScope scope(x);
    ALULA_TRACE_CUDA("layer_norm", dtype, size_class(out.numel() / width), " rows of ", width,
                     r ? " with residual" : "");
    ALULA_CUDA_CALL(layer_norm_cuda(args, out.numel() / width, scope.stream()));
    return out;
  }
  ALULA_TRACE("layer_norm", dtype, size_class(out.numel() / width), " rows of ", width, r ? " with residual" : "",
              args.writes_past_caches ? ": result past the caches" : ": result through the caches");
  const LayerNormKernels& kernels = ALULA_KERNELS(kLayerNorm);
  const int64_t grain = (kValuesPerThread + width - 1) / width;
  parallel_ranges(out.numel() / width, grain, [&](int64_t begin, int64_t end) {
    struct NormRow;
    const auto bytes = static_cast<size_t>(scratch_floats(args)) * sizeof(float);
    kernels.normalize(args, begin, end, static_cast<float*>(thread_scratch<NormRow>().reserve(bytes)));
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(alula, CPU, m) { m.impl("layer_norm", ALULA_BOX(layer_norm)); }
STABLE_TORCH_LIBRARY_IMPL(alula, CUDA, m) { m.impl("layer_norm", ALULA_BOX(layer_norm)); }

}  // namespace alula
