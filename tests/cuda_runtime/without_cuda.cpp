// An op that does nothing but take a GPU's stream, with csrc/core/cuda.cpp as a build without CUDA kernels has it.
// tests/test_cuda_tensors.py compiles and calls it.
#include <torch/csrc/stable/library.h>

#include "core/cuda.h"

namespace {

void take_stream(const alula::Tensor& t) { const alula::CudaScope scope(t); }

}  // namespace

STABLE_TORCH_LIBRARY(alula_without_cuda, m) { m.def("take_stream(Tensor t) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(alula_without_cuda, CUDA, m) { m.impl("take_stream", TORCH_BOX(&take_stream)); }
