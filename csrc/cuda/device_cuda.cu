// The GPUs of this machine, asked of the CUDA runtime.
#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstring>
#include <mutex>

#include "core/check.h"
#include "cuda/device.h"
#include "cuda/id_faults.h"

namespace alula {
namespace {

constexpr int kMaxDevices = 64;

CudaDevice read_device(int index) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, index), "asking for a GPU's attributes");
    return value;
  };
  CudaDevice device;
  device.index = index;
  device.major = attribute(cudaDevAttrComputeCapabilityMajor);
  device.minor = attribute(cudaDevAttrComputeCapabilityMinor);
  device.num_multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  device.max_shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.has_dependent_launch = device.major >= 9;
  return device;
}

}  // namespace

const CudaDevice& cuda_device(int index) {
  struct Known {
    std::once_flag once;
    CudaDevice device;
    std::string missing;
  };
  static std::array<Known, kMaxDevices> known;
  ALULA_CHECK(index >= 0 && index < kMaxDevices, "GPU ", index, "; accepted: 0 to ", kMaxDevices - 1);
  Known& entry = known[static_cast<size_t>(index)];
  std::call_once(entry.once, [&] {
    entry.device = read_device(index);
    entry.missing = missing_code(entry.device.major, entry.device.minor, cuda_archs());
  });
  ALULA_CHECK(entry.missing.empty(), entry.missing);
  return entry.device;
}

namespace {

std::array<std::atomic<IdFaults*>, kMaxDevices> faults_of_devices;

}  // namespace

IdFaults* known_id_faults(int device_index) {
  if (device_index < 0 || device_index >= kMaxDevices) return nullptr;
  return faults_of_devices[static_cast<size_t>(device_index)].load(std::memory_order_acquire);
}

IdFaults* id_faults(const CudaStream& stream) {
  const int index = stream.device->index;
  if (IdFaults* known = known_id_faults(index)) return known;
  if (capture_id(stream) != 0) return nullptr;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (IdFaults* known = known_id_faults(index)) return known;
  // Never given back: a kernel or a graph that knows the address may outlive everything here.
  void* memory = nullptr;
  check_cuda(cudaHostAlloc(&memory, sizeof(IdFaults), cudaHostAllocMapped | cudaHostAllocPortable),
             "memory for wrong ids");
  std::memset(memory, 0, sizeof(IdFaults));
  auto* faults = static_cast<IdFaults*>(memory);
  faults_of_devices[static_cast<size_t>(index)].store(faults, std::memory_order_release);
  return faults;
}

uint64_t capture_id(const CudaStream& stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check_cuda(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream.handle), &status, &id), "asking for a capture");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

bool follows_captured_kernel(const CudaStream& stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaGraphNode_t* nodes = nullptr;
  size_t count = 0;
  const auto handle = static_cast<cudaStream_t>(stream.handle);
#if CUDART_VERSION >= 13000
  const cudaGraphEdgeData* edges = nullptr;
  const int error = cudaStreamGetCaptureInfo(handle, &status, &id, nullptr, &nodes, &edges, &count);
#else
  const int error = cudaStreamGetCaptureInfo_v2(handle, &status, &id, nullptr, &nodes, &count);
#endif
  check_cuda(error, "asking for a capture");
  if (status != cudaStreamCaptureStatusActive || count != 1) return false;
  cudaGraphNodeType type = cudaGraphNodeTypeEmpty;
  check_cuda(cudaGraphNodeGetType(nodes[0], &type), "asking for a capture");
  return type == cudaGraphNodeTypeKernel;
}

void check_cuda(int error, const char* what) {
  if (error == cudaSuccess) [[likely]]
    return;
  cudaGetLastError();  // forgotten, where that is possible: the next call starts clean
  fail(what, ": CUDA says: ", cudaGetErrorString(static_cast<cudaError_t>(error)), " (",
       cudaGetErrorName(static_cast<cudaError_t>(error)), ")");
}

}  // namespace alula
