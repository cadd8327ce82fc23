// Work over torch's own threads. Kernels are serial functions of a range; this is the only place that makes ranges.
//
// Inside a team (team.h) every member calls these functions with the same arguments, does its share and waits for the
// others; outside, one caller hands the shares to the threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <exception>

#include "cpu/team.h"

namespace alula {

struct Range {
  int64_t begin, end;
};

// Share `part` of `parts` equal shares of [0, n).
inline Range share_of(int64_t n, int64_t part, int64_t parts) { return {n * part / parts, n * (part + 1) / parts}; }

inline int64_t num_threads() {
  if (const TeamMember* member = current_member()) return member->size();
  return static_cast<int64_t>(torch::stable::get_num_threads());
}

// f(part) for part in [0, parts), each on a thread of its own while there are threads.
template <typename F>
void parallel_parts(int64_t parts, const F& f) {
  if (TeamMember* member = current_member()) {
    for (int64_t part = member->rank; part < parts; part += member->size()) f(part);
    member->meet();
    return;
  }
  if (parts == 1) return f(0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) f(part);
  });
}

// f(begin, end) over equal shares of [0, n), with at least `grain` items each.
template <typename F>
void parallel_ranges(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  const int64_t useful = (n + grain - 1) / grain;
  const int64_t parts = useful < num_threads() ? useful : num_threads();
  parallel_parts(parts, [&](int64_t part) {
    const Range range = share_of(n, part, parts);
    f(range.begin, range.end);
  });
}

// Runs f(member) on every member of a team of all threads. `prepare()` runs on each first, and may throw; f must not.
template <typename Prepare, typename F>
void run_team(const Prepare& prepare, const F& f) {
  const int64_t size = num_threads();
  Team team(size);
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  torch::stable::parallel_for(0, size, 1, [&](int64_t begin, int64_t end) {
    TeamMember*& current = current_member();
    TeamMember* const outer = current;
    try {
      prepare();
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
    // One thread with the shares of several: torch did not start a thread for each.
    const Team::Way way = end - begin == 1 && size > 1 ? team.meet_first() : team.stay_alone();
    if (way == Team::Way::kOpen || failed) return;
    TeamMember member = {};
    if (way == Team::Way::kTogether) member = {&team, begin, {}};
    current = &member;
    f(member);
    current = outer;
  });
  if (failed) std::rethrow_exception(error);
}

}  // namespace alula
