// GPUs, as the ops see them: what a device can do, whether this build has code for it, and the stream to launch on.
// Plain data: no torch and no CUDA header, so that <op>.cpp, <op>_cuda.cu and the host executor all include it.
#pragma once

#include <cstdint>
#include <string>

#define ALULA_EXPORT __attribute__((visibility("default")))

namespace alula {

struct CudaDevice {
  int index = 0;
  int major = 0, minor = 0;  // compute capability
  int num_multiprocessors = 1;
  int64_t max_shared_bytes = 48 * 1024;  // of a block, when asked for
  bool has_dependent_launch = false;     // sm_90 and newer
};

struct CudaStream {
  const CudaDevice* device;
  void* handle;  // a cudaStream_t
};

// Facts of GPU `index`, read once. Throws where this build has no code for it (missing_code below).
const CudaDevice& cuda_device(int index);

// Why a GPU of this compute capability cannot run code built for `archs` ("80 90a", CMake's ALULA_CUDA_ARCHS; "120+"
// also holds PTX that newer GPUs compile); empty where it can.
ALULA_EXPORT std::string missing_code(int major, int minor, const std::string& archs);

// The architectures of this build; empty in a CPU-only one.
ALULA_EXPORT std::string cuda_archs();

// Which capture into a graph the stream is part of; 0 for none.
uint64_t capture_id(const CudaStream& stream);

// Whether what the stream does next in its capture follows one kernel, and that alone: not a copy, not several streams.
bool follows_captured_kernel(const CudaStream& stream);

// ALULA_SYNC=1: each launch waits for its kernel, so that an error is raised by the op that caused it.
bool waits_for_kernels();

// Throws "<what>: <CUDA's text>" unless `error` (a cudaError_t) is success.
void check_cuda(int error, const char* what);

}  // namespace alula
