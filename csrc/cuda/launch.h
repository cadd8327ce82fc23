// The one way to launch a kernel: on the caller's stream, checked.
//
// Included by *_cuda.cu only. tests/simt/cuda/launch.h runs the same call on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/check.h"
#include "cuda/device.h"

namespace alula {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

struct LaunchOptions {
  Grid blocks;
  int threads;                          // a block
  int64_t shared_bytes = 0;             // dynamic shared memory of a block
  bool starts_before_previous = false;  // sm_90, in graphs: see wait_for_previous_kernel() in cuda/hardware.cuh
};

// `name` is what an error and ALULA_SYNC=1 call the kernel. Throws std::runtime_error.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), const LaunchOptions& options, const CudaStream& stream,
            const Args&... args) {
  const Grid& blocks = options.blocks;
  if (blocks.x <= 0 || blocks.y <= 0 || blocks.z <= 0) return;
  ALULA_CHECK(blocks.x <= 0x7fffffff && blocks.y <= 65535 && blocks.z <= 65535, name, ": a grid of ", blocks.x, " x ",
              blocks.y, " x ", blocks.z, " blocks is more than CUDA takes (2147483647 x 65535 x 65535)");
  constexpr int64_t kSharedWithoutAsking = 48 * 1024;
  if (options.shared_bytes > kSharedWithoutAsking) {
    const int64_t most = stream.device->max_shared_bytes;
    ALULA_CHECK(options.shared_bytes <= most, name, " needs ", options.shared_bytes,
                " bytes of shared memory a block; this GPU has ", most);
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(options.shared_bytes)),
               name);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y), static_cast<unsigned>(blocks.z));
  config.blockDim = dim3(static_cast<unsigned>(options.threads));
  config.dynamicSmemBytes = static_cast<size_t>(options.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &attribute;
  // Such a kernel reads weights before it waits, and what the kernel before it wrote may not be there yet. In a graph
  // that is what a step made, never a weight; elsewhere it may be one that was packed just now. Graphs have such a
  // dependence between kernels alone.
  const bool starts_early =
      options.starts_before_previous && stream.device->has_dependent_launch && follows_captured_kernel(stream);
  config.numAttrs = starts_early ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name);
  if (waits_for_kernels()) check_cuda(cudaStreamSynchronize(config.stream), name);
}

}  // namespace alula
