#pragma once

namespace alula {

// What CMakeLists.txt knew when it built this library. It stands here, not in alula._C, because one library serves many
// Pythons and each has an alula._C of its own.
struct BuildFacts {
  const char* version;
  const char* compiler;
  const char* torch_abi;
  const char* cuda_version;  // of nvcc; empty in a CPU-only build
  const char* cuda_reason;   // why there is no CUDA; empty where there is
};

__attribute__((visibility("default"))) const BuildFacts& build_facts();

}  // namespace alula
