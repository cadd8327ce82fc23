#include "core/cuda.h"

#include <dlfcn.h>

#include <array>
#include <map>
#include <mutex>
#include <tuple>

#include "core/trace.h"
#include "cpu/panel_gemm_parallel.h"
#include "ops/layer_norm.h"

// Torch's own, in libtorch_cuda.so: absent on a CPU-only torch, where this library loads all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace alula {
namespace {

using StreamGetter = AOTITorchError (*)(int32_t, void**);

// The linker's answer; where it had none, that of the library which torch has loaded since.
StreamGetter stream_getter() {
  static const StreamGetter getter = [] {
    if (aoti_torch_get_current_cuda_stream != nullptr) return &aoti_torch_get_current_cuda_stream;
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    if (library == nullptr) return StreamGetter{nullptr};
    return reinterpret_cast<StreamGetter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  return getter;
}

CudaStream current_stream([[maybe_unused]] int32_t index) {
#if ALULA_WITH_CUDA
  const StreamGetter getter = stream_getter();
  ALULA_CHECK(getter != nullptr,
              "torch has CUDA tensors, but its function aoti_torch_get_current_cuda_stream was not found in "
              "libtorch_cuda.so: this torch is not one that alula knows");
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(index, &handle));
  return {&cuda_device(index), handle};
#else
  (void)stream_getter;
  return {nullptr, nullptr};
#endif
}

// The index of its GPU, where this build can use GPUs at all.
int32_t checked_gpu([[maybe_unused]] const Tensor& t) {
#if ALULA_WITH_CUDA
  return t.get_device_index();
#else
  fail("this build of alula has no CUDA kernels (", ALULA_CUDA_REASON, "), and the tensors are on a GPU");
#endif
}

}  // namespace

CudaScope::CudaScope(const Tensor& t) : guard_(checked_gpu(t)), stream_(current_stream(t.get_device_index())) {}

IdNotes::IdNotes([[maybe_unused]] const CudaScope& scope) { ALULA_CUDA_CALL(faults_ = id_faults(scope.stream())); }

void IdNotes::raise_if_waiting() const {
  if (!waits_for_kernels()) return;
  const std::string wrong = take_text(faults_);
  ALULA_CHECK(wrong.empty(), wrong);
}

Tensor normed_rows(const PanelGemmArgs& gemm, const Tensor& x, [[maybe_unused]] const CudaScope& scope) {
  if (gemm.norm_weight == nullptr) return torch::stable::reshape(x, {gemm.m, gemm.k});
  const Tensor normed = new_tensor({gemm.m, gemm.k}, x.scalar_type(), place_of(x, "x"));
  [[maybe_unused]] const LayerNormArgs args = {
      .dtype = gemm.dtype,
      .x = gemm.x,
      .residual = nullptr,
      .weight = gemm.norm_weight,
      .bias = gemm.norm_bias,
      .out = normed.mutable_data_ptr(),
      .width = gemm.k,
      .eps = gemm.norm_eps,
      .writes_past_caches = false,
  };
  ALULA_CUDA_CALL(layer_norm_cuda(args, gemm.m, scope.stream()));
  return normed;
}

Tensor library_product(const PanelGemmArgs& gemm, const Tensor& x, const Tensor& weight, const CudaScope& scope) {
  const Tensor rows = normed_rows(gemm, x, scope);
  Tensor plain = weight;
  plain = torch::stable::narrow(plain, 1, 0, gemm.k);
  const std::array<int64_t, 2> sizes = {gemm.m, gemm.n};
  return with_memory(sizes, x.scalar_type(), place_of(x, "x"),
                     [&] { return torch::stable::matmul(rows, torch::stable::transpose(plain, 0, 1)); });
}

PreparedQuantized prepare_quantized(const char* op, PanelGemmArgs& gemm, const Tensor& x, const CudaScope& scope) {
  const QuantizedPlan plan = quantized_plan(gemm, scope.stream().device->num_multiprocessors);
  const int group = gemm.format.group_size;
  ALULA_TRACE_CUDA(op, gemm.dtype, size_class(gemm.m), " rows, ", gemm.k, " -> ", gemm.n,
                   gemm.norm_weight ? ", layer norm, " : ", ", kind_name(gemm.format.kind),
                   group ? " groups of " + std::to_string(group) : "", " weight, activations as they are: ",
                   !plan.is_few      ? plan.is_large ? "large tiles" : "small tiles"
                   : plan.splits > 1 ? "one kernel, K over " + std::to_string(plan.splits) + " blocks"
                                     : "one kernel");
  PreparedQuantized prepared = {plan, {}, std::nullopt, std::nullopt};
  if (plan.splits > 1) {
    prepared.workspace = new_tensor({plan.workspace_floats}, ScalarType::Float, place_of(x, "x"));
    prepared.work = {static_cast<float*>(prepared.workspace->mutable_data_ptr()),
                     zeroed_counters(x, scope, plan.num_counters)};
  }
  if (!plan.is_few && gemm.norm_weight != nullptr) {
    prepared.normed = normed_rows(gemm, x, scope);
    gemm.x = prepared.normed->const_data_ptr();
    gemm.norm_weight = gemm.norm_bias = nullptr;
  }
  return prepared;
}

uint32_t* zeroed_counters(const Tensor& like, const CudaScope& scope, int64_t count) {
  uint64_t capture = 0;
  ALULA_CUDA_CALL(capture = capture_id(scope.stream()));
  // Never given back: a kernel or a graph that uses them may outlive everything here.
  using Key = std::tuple<int32_t, void*, uint64_t>;
  static auto& known = *new std::map<Key, Tensor>;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  const Key key = {like.get_device_index(), scope.stream().handle, capture};
  const auto found = known.find(key);
  if (found != known.end() && found->second.numel() >= count) {
    return static_cast<uint32_t*>(found->second.mutable_data_ptr());
  }
  constexpr int64_t kLeast = 4096;
  const std::array<int64_t, 1> sizes = {count < kLeast ? kLeast : count};
  const Tensor counters = with_memory(sizes, ScalarType::Int, place_of(like, "x"),
                                      [&] { return torch::stable::new_zeros(like, sizes, ScalarType::Int); });
  known.insert_or_assign(key, counters);
  return static_cast<uint32_t*>(counters.mutable_data_ptr());
}

}  // namespace alula
