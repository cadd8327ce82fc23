// csrc/cuda/launch.h on the host: the same call runs the kernel in the executor.
#pragma once

#include <cstdint>
#include <string>

#include "../executor.h"
#include "core/check.h"
#include "cuda/device.h"

namespace alula {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

struct LaunchOptions {
  Grid blocks;
  int threads;
  int64_t shared_bytes = 0;
  bool starts_before_previous = false;
};

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), const LaunchOptions& options, const CudaStream&,
            const Args&... args) {
  const Grid& blocks = options.blocks;
  if (blocks.x <= 0 || blocks.y <= 0 || blocks.z <= 0) return;
  const auto index = [](const Grid& grid) {
    return simt::Index{static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)};
  };
  simt::waits() = {};
  simt::run({name, index(blocks), {static_cast<unsigned>(options.threads), 1, 1}, options.shared_bytes, [&] {
               kernel(static_cast<Params>(args)...);
             }});
  // A kernel that may start early must not end before the one before has: what comes after relies on it.
  if (options.starts_before_previous && simt::waits().waited != blocks.x * blocks.y * blocks.z * options.threads) {
    throw simt::Fault(std::string(name) + ": some threads ended without wait_for_previous_kernel()");
  }
}

}  // namespace alula
