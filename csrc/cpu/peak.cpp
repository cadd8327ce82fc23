#include "cpu/peak.h"

#include <array>

namespace alula {

const PeakKernels& peak_kernels() { return ALULA_KERNELS(kPeak); }

}  // namespace alula
