#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

#include "core/env.h"

namespace alula {
namespace {

#define ALULA_ISA_NAME(name) #name,
const std::vector<std::string> kNames = {ALULA_FOR_EACH_ISA(ALULA_ISA_NAME)};
#undef ALULA_ISA_NAME

bool is_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // libgcc's cpu_supports also asks the operating system (XGETBV) whether it saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::generic:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return isa == Isa::generic;
}

std::string accepted() {
  std::string names;
  for (const std::string& name : available_isas()) names += (names.empty() ? "" : ", ") + name;
  return names;
}

Isa parse(const std::string& name) {
  for (size_t i = 0; i < kNames.size(); i++) {
    if (kNames[i] != name) continue;
    if (is_supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
    throw std::invalid_argument("this CPU does not have the instruction set '" + name + "'; it has: " + accepted());
  }
  throw std::invalid_argument("unknown instruction set '" + name + "'; this CPU has: " + accepted());
}

Isa initial() {
  const std::string forced = env_string("ALULA_FORCE_ISA");
  if (!forced.empty()) return parse(forced);
  Isa best = Isa::generic;
  for (size_t i = 0; i < kNames.size(); i++) {
    if (is_supported(static_cast<Isa>(i))) best = static_cast<Isa>(i);
  }
  return best;
}

std::atomic<Isa>& state() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

Isa current_isa() { return state().load(std::memory_order_relaxed); }

std::string isa_name(Isa isa) { return kNames.at(static_cast<size_t>(isa)); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (size_t i = 0; i < kNames.size(); i++) {
    if (is_supported(static_cast<Isa>(i))) names.push_back(kNames[i]);
  }
  return names;
}

void force_isa(const std::string& name) { state() = parse(name); }

}  // namespace alula
