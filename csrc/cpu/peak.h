// How fast one core multiplies and adds, measured: the limit that benchmarks compare with.
#pragma once

#include "cpu/isa.h"

namespace alula {

struct PeakKernels {
  // Run about `iterations` x 24 independent multiply-adds of full registers and return the operations
  // done; 0 where the instruction set has no such instruction. `sink` keeps the compiler from dropping the work.
  double (*fp32_fma)(long iterations, float* sink);
  double (*bf16_dot)(long iterations, float* sink);
  double (*int8_dot)(long iterations, float* sink);
};

ALULA_DECLARE_KERNELS(PeakKernels, kPeak)

__attribute__((visibility("default"))) const PeakKernels& peak_kernels();

}  // namespace alula
