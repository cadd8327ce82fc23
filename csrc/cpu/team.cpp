#include "cpu/team.h"

#include <chrono>
#include <thread>

namespace alula {
namespace {

// Threads of one pool start within microseconds of each other; on a crowded machine, within a time slice or two.
constexpr auto kPatience = std::chrono::milliseconds(200);
constexpr int kSpins = 4000;  // before the core is offered to others
constexpr int64_t kLine = 64;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Team::Way Team::stay_alone() {
  Way open = Way::kOpen;
  return way_.compare_exchange_strong(open, Way::kAlone, std::memory_order_acq_rel) ? Way::kAlone : Way::kOpen;
}

Team::Way Team::meet_first() {
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    Way open = Way::kOpen;
    const bool decides = way_.compare_exchange_strong(open, Way::kTogether, std::memory_order_acq_rel);
    return decides ? Way::kTogether : Way::kOpen;
  }
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  for (int spins = 1;; spins++) {
    const Way way = way_.load(std::memory_order_acquire);
    if (way != Way::kOpen) return way == Way::kTogether ? Way::kTogether : Way::kOpen;
    if (spins % kSpins != 0) {
      relax();
      continue;
    }
    std::this_thread::yield();
    if (std::chrono::steady_clock::now() > deadline && stay_alone() == Way::kAlone) return Way::kAlone;
  }
}

void Team::meet(Fetch& fetch) {
  const uint32_t round = round_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    return;
  }
  for (int spins = 1; round_.load(std::memory_order_acquire) == round; spins++) {
    if (fetch.bytes > 0) {
      __builtin_prefetch(fetch.begin, 0, 2);
      fetch.begin += kLine;
      fetch.bytes -= kLine;
    } else if (spins % kSpins != 0) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

TeamMember*& current_member() {
  static thread_local TeamMember* member = nullptr;
  return member;
}

}  // namespace alula
