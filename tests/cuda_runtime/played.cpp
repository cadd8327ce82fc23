// The host side of CUDA (csrc/cuda/launch.h, device_cuda.cu) against a runtime that is played: the GPU it tells of and
// what goes wrong come from the command line. tests/test_cuda_runtime.py compiles and runs this; no GPU is needed.
//
//   played SCENARIO [MAJOR MINOR]
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/device.h"
#include "cuda/id_faults.h"
#include "cuda/launch.h"

namespace {

int major = 9, minor = 0;
int attributes_of_last_launch = -1;
cudaLaunchConfig_t last_launch = {};
cudaStream_t last_waited_for = nullptr;
long streams_waited_for = 0, launches = 0;
cudaError_t error_of_launch = cudaSuccess, error_of_wait = cudaSuccess;
cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
cudaGraphNodeType captured_last = cudaGraphNodeTypeKernel;
size_t num_captured_last = 1;

void some_kernel(int) {}

}  // namespace

// --- the runtime -----------------------------------------------------------------------------------------------------

extern "C" {

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor         ? major
           : attribute == cudaDevAttrComputeCapabilityMinor       ? minor
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 99 * 1024
           : attribute == cudaDevAttrMultiProcessorCount          ? 108
                                                                  : 0;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  launches++;
  last_launch = *config;
  attributes_of_last_launch = static_cast<int>(config->numAttrs);
  return error_of_launch;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  last_waited_for = stream;
  streams_waited_for++;
  return error_of_wait;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t*, const cudaGraphNode_t** nodes, const cudaGraphEdgeData**,
                                     size_t* count) {
  static const cudaGraphNode_t some_nodes[2] = {};
  *status = capture;
  *id = 7;
  if (nodes != nullptr) *nodes = some_nodes;
  if (count != nullptr) *count = num_captured_last;
  return cudaSuccess;
}

cudaError_t cudaGraphNodeGetType(cudaGraphNode_t, cudaGraphNodeType* type) {
  *type = captured_last;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::malloc(bytes);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an illegal memory access was encountered"; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorIllegalAddress"; }

}  // extern "C"

// --- scenarios -------------------------------------------------------------------------------------------------------

namespace {

using namespace alula;

void launch_some(const CudaStream& stream, bool starts_early = false, int64_t shared_bytes = 0) {
  launch("some_kernel", some_kernel,
         {.blocks = {4}, .threads = 32, .shared_bytes = shared_bytes, .starts_before_previous = starts_early}, stream,
         3);
}

void play(const std::string& scenario) {
  const CudaDevice& device = cuda_device(0);
  const CudaStream stream = {&device, nullptr};
  if (scenario == "dependent") {
    for (const auto status : {cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive}) {
      capture = status;
      for (const bool starts_early : {true, false}) {
        launch_some(stream, starts_early);
        std::printf("%d ", attributes_of_last_launch);
      }
    }
    for (const auto type : {cudaGraphNodeTypeMemset, cudaGraphNodeTypeMemcpy, cudaGraphNodeTypeKernel}) {
      captured_last = type;
      launch_some(stream, true);
      std::printf("%d ", attributes_of_last_launch);
    }
    for (const size_t count : {0, 2}) {
      num_captured_last = count;
      launch_some(stream, true);
      std::printf("%d ", attributes_of_last_launch);
    }
  } else if (scenario == "where and how much") {
    int here = 0;  // a stream is an address
    const CudaStream some_stream = {&device, &here};
    launch("some_kernel", some_kernel, {.blocks = {5, 4, 3}, .threads = 96, .shared_bytes = 1000}, some_stream, 3);
    const dim3 grid = last_launch.gridDim, block = last_launch.blockDim;
    std::printf("%u %u %u, %u %u %u, %zu bytes, ", grid.x, grid.y, grid.z, block.x, block.y, block.z,
                last_launch.dynamicSmemBytes);
    const auto is_here = [&](cudaStream_t one) { return one == reinterpret_cast<cudaStream_t>(&here); };
    std::printf("%d, waited %ld %d", is_here(last_launch.stream), streams_waited_for, is_here(last_waited_for));
  } else if (scenario == "many blocks") {
    launch("some_kernel", some_kernel, {.blocks = {1, 65536}, .threads = 32}, stream, 3);
  } else if (scenario == "launch fails") {
    error_of_launch = cudaErrorIllegalAddress;
    launch_some(stream);
  } else if (scenario == "kernel fails") {
    error_of_wait = cudaErrorIllegalAddress;
    launch_some(stream);
    std::printf("nobody waited");
  } else if (scenario == "much shared memory") {
    launch_some(stream, false, 100 * 1024);
  } else if (scenario == "nothing to do") {
    launch("some_kernel", some_kernel, {.blocks = {0}, .threads = 32}, stream, 3);
    std::printf("%ld", launches);
  } else if (scenario == "wrong ids") {
    capture = cudaStreamCaptureStatusActive;
    std::printf("%d ", id_faults(stream) == nullptr);
    capture = cudaStreamCaptureStatusNone;
    IdFaults* faults = id_faults(stream);
    std::printf("%d [%s] ", faults == id_faults(stream), take_id_fault(0).c_str());
    const auto note = [&](int kind, int64_t id, int64_t limit) {
      faults->of[kind].id = id;
      faults->of[kind].limit = limit;
    };
    note(0, 50257, 50257);
    note(1, -3, 1024);
    for (const int device : {0, 0, 1}) std::printf("[%s] ", take_id_fault(device).c_str());
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 3) major = std::atoi(arguments[2]), minor = std::atoi(arguments[3]);
  try {
    play(arguments[1]);
  } catch (const std::exception& error) {
    std::printf("error: %s", error.what());
  }
  return 0;
}
