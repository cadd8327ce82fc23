// Work over torch's own threads. Kernels are serial functions of a range; this is the only place that makes ranges.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace alula {

struct Range {
  int64_t begin, end;
};

// Share `part` of `parts` equal shares of [0, n).
inline Range share_of(int64_t n, int64_t part, int64_t parts) { return {n * part / parts, n * (part + 1) / parts}; }

inline int64_t num_threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// f(part) for part in [0, parts), each on a thread of its own while there are threads.
template <typename F>
void parallel_parts(int64_t parts, const F& f) {
  if (parts == 1) return f(0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) f(part);
  });
}

// f(begin, end) over equal shares of [0, n), with at least `grain` items each.
template <typename F>
void parallel_ranges(int64_t n, int64_t grain, const F& f) {
  const int64_t useful = (n + grain - 1) / grain;
  const int64_t parts = useful < num_threads() ? useful : num_threads();
  if (parts <= 1) {
    if (n > 0) f(0, n);
    return;
  }
  parallel_parts(parts, [&](int64_t part) {
    const Range range = share_of(n, part, parts);
    f(range.begin, range.end);
  });
}

}  // namespace alula
