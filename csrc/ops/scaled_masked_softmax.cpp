#include "ops/scaled_masked_softmax.h"

#include <array>

#include "core/cuda.h"
#include "core/refuse_grad.h"
#include "core/scratch.h"
#include "core/tensor.h"
#include "core/trace.h"
#include "cpu/parallel.h"

namespace alula {
namespace {

// A thread is worth waking (about 3 us) for this many scores (about 5 us).
constexpr int64_t kScoresPerThread = 16 * 1024;

// Of every dimension of `scores`, the stride of `mask` broadcast to it.
std::vector<int64_t> broadcast_strides(const Tensor& mask, const Tensor& scores) {
  const int64_t missing = scores.dim() - mask.dim();
  std::vector<int64_t> strides(scores.dim(), 0);
  bool fits = missing >= 0;
  for (int64_t d = 0; fits && d < mask.dim(); d++) {
    fits = mask.size(d) == 1 || mask.size(d) == scores.size(missing + d);
    if (fits && mask.size(d) != 1) strides[missing + d] = mask.stride(d);
  }
  ALULA_CHECK(fits, "mask has shape ", shape_of(mask), "; expected one that broadcasts to that of scores, ",
              shape_of(scores));
  return strides;
}

}  // namespace

Tensor scaled_masked_softmax(const Tensor& scores, const OptionalTensor& mask, double scale, bool causal,
                             std::optional<ScalarType> dtype) {
  const Place place = place_of(scores, "scores");
  const DType in_dtype = value_dtype(scores, "scores");
  ALULA_CHECK(scores.dim() >= (causal ? 2 : 1), "scores has shape ", shape_of(scores), "; expected ",
              causal ? "[..., T, S], as causal is set" : "[..., S]");
  std::vector<int64_t> strides(scores.dim(), 0);
  if (mask) {
    check_place(*mask, "mask", place);
    strides = broadcast_strides(*mask, scores);
  }
  const Tensor input = as_contiguous(scores);
  const std::vector<int64_t> sizes(scores.sizes().begin(), scores.sizes().end());
  const ScalarType out_type = dtype.value_or(scores.scalar_type());
  ALULA_CHECK(out_type == ScalarType::Float || out_type == ScalarType::BFloat16 || out_type == ScalarType::Half,
              "dtype is ", name_of(out_type), "; accepted: float32, bfloat16, float16");
  Tensor out = new_large_tensor(sizes, out_type, place);

  const int64_t keys = sizes.back();
  if (out.numel() == 0) return out;
  const ScaledMaskedSoftmaxArgs args = {
      .dtype = in_dtype,
      .out_dtype = value_dtype(out, "dtype"),
      .scores = input.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .num_tokens = sizes.size() >= 2 ? sizes[sizes.size() - 2] : 1,
      .num_keys = keys,
      .scale = static_cast<float>(scale),
      .is_causal = causal,
      .writes_past_caches = is_beyond_caches(out.numel() * out.element_size()),
      .mask_kind = mask ? mask_kind_of(*mask) : MaskKind::kNone,
      .mask = data_or_null(mask),
      .num_leading = static_cast<int>(sizes.size()) - 1,
      .leading_sizes = sizes.data(),
      .mask_strides = strides.data(),
      .mask_key_stride = strides.back(),
  };
  if (place.is_cuda()) {
    const CudaScope scope(scores);
    ALULA_TRACE_CUDA("scaled_masked_softmax", in_dtype, size_class(out.numel() / keys), " rows of ", size_class(keys),
                     " -> ", dtype_name(args.out_dtype), mask ? ", mask " + name_of(mask->scalar_type()) : "",
                     causal ? ", causal" : "");
    ALULA_CUDA_CALL(scaled_masked_softmax_cuda(args, out.numel() / keys, scope.stream()));
    return out;
  }
  ALULA_TRACE("scaled_masked_softmax", in_dtype, size_class(out.numel() / keys), " rows of ", size_class(keys), " -> ",
              dtype_name(args.out_dtype), mask ? ", mask " + name_of(mask->scalar_type()) : "",
              causal ? ", causal" : "", args.out_dtype == DType::kFloat32 ? ": exp" : ": 2^x",
              args.writes_past_caches ? ", result past the caches" : ", result through the caches");
  const ScaledMaskedSoftmaxKernels& kernels = ALULA_KERNELS(kScaledMaskedSoftmax);
  const int64_t grain = (kScoresPerThread + keys - 1) / keys;
  parallel_ranges(out.numel() / keys, grain, [&](int64_t begin, int64_t end) {
    struct Exponentials;
    const auto bytes = static_cast<size_t>(scratch_floats(args)) * sizeof(float);
    kernels.softmax(args, begin, end, static_cast<float*>(thread_scratch<Exponentials>().reserve(bytes)));
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(alula, CPU, m) { m.impl("scaled_masked_softmax", ALULA_BOX(scaled_masked_softmax)); }
STABLE_TORCH_LIBRARY_IMPL(alula, CUDA, m) { m.impl("scaled_masked_softmax", ALULA_BOX(scaled_masked_softmax)); }

}  // namespace alula
