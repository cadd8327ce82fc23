// Telling the host of an id outside its table (cuda/id_faults.h), from a kernel.
#pragma once

#include "cuda/hardware.cuh"
#include "cuda/id_faults.h"

namespace alula {

// Notes `id` unless it is one of `count`. `faults` may be null.
__device__ __forceinline__ void note_id(IdFaults* faults, IdKind kind, int64_t id, int64_t count) {
  if (faults == nullptr || (id >= 0 && id < count)) return;
  auto& fault = faults->of[static_cast<int>(kind)];
  fault.id = id;
  __threadfence_system();
  fault.limit = count;
}

}  // namespace alula
