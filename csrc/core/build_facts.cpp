#include "core/build_facts.h"

namespace alula {

const BuildFacts& build_facts() {
  static constexpr BuildFacts kFacts{.version = ALULA_VERSION,
                                     .compiler = ALULA_COMPILER,
                                     .torch_abi = "2.11",
                                     .cuda_version = ALULA_CUDA_VERSION,
                                     .cuda_reason = ALULA_CUDA_REASON};
  return kFacts;
}

}  // namespace alula
