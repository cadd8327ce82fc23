#include "cuda/device.h"

#include <sstream>

#include "core/env.h"
#include "cuda/id_faults.h"

namespace alula {

// Machine code for sm_XY runs on X.Z with Z >= Y; that of an architecture with a letter (90a) on X.Y alone; PTX ("+")
// is compiled by the driver for everything newer.
std::string missing_code(int major, int minor, const std::string& archs) {
  std::ostringstream name;
  name << "sm_" << major << minor;
  if (major < 8) return "this GPU is " + name.str() + "; alula's CUDA kernels need sm_80 or newer";
  std::istringstream list(archs);
  for (std::string arch; list >> arch;) {
    const int number = std::stoi(arch);
    const int other_major = number / 10, other_minor = number % 10;
    const bool has_letter = arch.find_first_of("af") != std::string::npos, has_ptx = arch.back() == '+';
    if (major == other_major && minor == other_minor) return "";
    if (major == other_major && minor > other_minor && !has_letter) return "";
    if (has_ptx && !has_letter && 10 * major + minor > number) return "";
  }
  return "this GPU is " + name.str() + "; this build of alula has code for " + archs +
         ". Build with ALULA_CUDA_ARCHS naming it";
}

std::string cuda_archs() { return ALULA_CUDA_ARCHS; }

std::string take_text(IdFaults* faults) {
  if (faults == nullptr) return "";
  constexpr const char* kNames[] = {"input_ids", "position_ids", "token_type_ids",
                                    "rotary_positions (position_ids of a model)"};
  std::string text;
  for (int kind = 0; kind < kIdKinds; kind++) {
    auto& fault = faults->of[kind];
    const int64_t limit = fault.limit;
    if (limit == 0) continue;
    fault.limit = 0;
    text += text.empty() ? "" : "; ";
    text += kNames[kind];
    text += " holds " + std::to_string(fault.id) + "; accepted: 0 to " + std::to_string(limit - 1);
  }
  return text;
}

std::string take_id_fault([[maybe_unused]] int device_index) {
#if ALULA_WITH_CUDA
  std::string text = take_text(known_id_faults(device_index));
  if (text.empty()) return text;
  return text + " (found on cuda:" + std::to_string(device_index) +
         " in a call before this one, whose result is NaN; ALULA_SYNC=1 raises at the call)";
#else
  return "";
#endif
}

bool waits_for_kernels() {
  static const bool waits = env_flag("ALULA_SYNC");
  return waits;
}

}  // namespace alula
