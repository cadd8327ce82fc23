// The activations over values in memory: a table of loops, compiled once per instruction set for all ops.
#include "cpu/activation.h"

#include <array>
#include <utility>

namespace alula::ALULA_ISA {
namespace {

using InPlace = void (*)(float* values, int64_t count);

template <Activation kActivation>
void activate_values(float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += Vec::kWidth) {
    const int lanes = static_cast<int>(count - i < Vec::kWidth ? count - i : Vec::kWidth);
    store(values + i, activate<kActivation>(load(values + i, lanes)), lanes);
  }
}

template <int... kCodes>
constexpr std::array<InPlace, sizeof...(kCodes)> table(std::integer_sequence<int, kCodes...>) {
  return {activate_values<static_cast<Activation>(kCodes)>...};
}
constexpr auto kTable = table(std::make_integer_sequence<int, kNumActivations>{});

}  // namespace

void activate(int activation, float* values, int64_t count) { kTable[static_cast<size_t>(activation)](values, count); }

}  // namespace alula::ALULA_ISA
