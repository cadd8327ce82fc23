// The torch side of CUDA: where an op runs, and what it launches on. Used by <op>.cpp files only.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "core/tensor.h"
#include "cpu/panel_gemm_args.h"
#include "cuda/device.h"
#include "cuda/id_faults.h"
#include "cuda/quantized_product.h"

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

// Where a kernel notes ids outside their tables (cuda/id_faults.h).
class IdNotes {
 public:
  explicit IdNotes(const CudaScope& scope);
  IdFaults* faults() const { return faults_; }  // may be null
  // Under ALULA_SYNC=1, where the kernel has ended: throws, with what it noted.
  void raise_if_waiting() const;

 private:
  IdFaults* faults_ = nullptr;
};

// layer_norm(x), [M, K], or x where there is none. x is contiguous.
Tensor normed_rows(const PanelGemmArgs& gemm, const Tensor& x, const CudaScope& scope);

// layer_norm(x) W^T by torch's own product, [M, N]: for more rows than alula has a kernel for. x is contiguous.
Tensor library_product(const PanelGemmArgs& gemm, const Tensor& x, const Tensor& weight, const CudaScope& scope);

// At least `count` counters that are zero and that each kernel of the scope's stream leaves zero. A captured graph has
// its own, which it sets to zero itself.
uint32_t* zeroed_counters(const Tensor& like, const CudaScope& scope, int64_t count);

// What a launch with a quantized weight needs beside the op's arguments, and the tensors that it points into.
struct PreparedQuantized {
  QuantizedPlan plan;
  QuantizedWork work;
  OptionalTensor workspace, normed;
};

// Plans the product; norms many rows, of which `gemm` then has no norm. `op` is for the trace.
PreparedQuantized prepare_quantized(const char* op, PanelGemmArgs& gemm, const Tensor& x, const CudaScope& scope);

}  // namespace alula

// A call of a function that <op>_cuda.cu defines. CudaScope has thrown before it in a CPU-only build.
#if ALULA_WITH_CUDA
#define ALULA_CUDA_CALL(call) (call)
#else
#define ALULA_CUDA_CALL(call) ((void)0)
#endif
