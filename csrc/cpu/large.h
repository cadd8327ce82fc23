// Results larger than the caches: where they come from and how they are written.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace alula {

// From here on a result is written past the caches: whoever reads it will find the most of it gone from them anyway,
// and a plain store would first read the line that it overwrites.
constexpr int64_t kPastCachesBytes = 16 << 20;

inline bool is_beyond_caches(int64_t bytes) { return bytes >= kPastCachesBytes; }

// Asks for pages of 2 MiB where [data, data + bytes) holds whole ones: fewer page faults when it is first written,
// fewer address translations whenever it is read.
inline void ask_for_large_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr size_t kLargePage = 2 << 20;
  const size_t begin = (reinterpret_cast<size_t>(data) + kLargePage - 1) / kLargePage * kLargePage;
  const size_t end = (reinterpret_cast<size_t>(data) + static_cast<size_t>(bytes)) / kLargePage * kLargePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: failing is fine
#endif
}

}  // namespace alula
