// Ids that a kernel found outside their table, told to the host without making it wait: the kernel writes into memory
// of the host that lies in the GPU's addresses, and only where something is wrong. The host looks whenever it likes;
// what it sees is late by as much as the GPU is behind.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/device.h"

namespace alula {

enum class IdKind : int { kInput, kPosition, kTokenType, kRotaryPosition };
constexpr int kIdKinds = 4;

// The last wrong id of each kind; limit 0: none. The limit is written after the id.
struct IdFaults {
  struct {
    volatile int64_t id, limit;
  } of[kIdKinds];
};

// Those of a GPU, which is the current one; made at first use. Null in a capture that comes before it.
IdFaults* id_faults(const CudaStream& stream);

// The same, if they were made.
IdFaults* known_id_faults(int device_index);

// What is wrong, in words, and none the next time; empty where nothing is.
std::string take_text(IdFaults* faults);

// Of a GPU; empty where nothing is known to be wrong, and in a CPU-only build.
ALULA_EXPORT std::string take_id_fault(int device_index);

}  // namespace alula
