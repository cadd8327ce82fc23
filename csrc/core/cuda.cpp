#include "core/cuda.h"

#include <dlfcn.h>

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
  STABLE_TORCH_ERROR_CODE_CHECK(getter(index, &handle));
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

}  // namespace alula
