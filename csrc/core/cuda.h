// The torch side of CUDA: where an op runs, and what it launches on. Used by <op>.cpp files only.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "core/tensor.h"
#include "cuda/device.h"

namespace alula {

// The current stream of a tensor's GPU, which is the current one until the end of the scope. Throws, with the reason,
// in a CPU-only build and on a GPU that this build has no code for.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& t);
  const CudaStream& stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  CudaStream stream_;
};

}  // namespace alula

// A call of a function that <op>_cuda.cu defines. CudaScope has thrown before it in a CPU-only build.
#if ALULA_WITH_CUDA
#define ALULA_CUDA_CALL(call) (call)
#else
#define ALULA_CUDA_CALL(call) ((void)0)
#endif
