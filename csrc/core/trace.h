// ALULA_LOG=1: a line on standard error for each distinct decision of the dispatch, the first time it is taken.
//
//   alula: linear avx512_bf16 float32 1 rows, 768 -> 3072: panels over 2, row blocks over 1 threads, x packed by each
//   for itself
//
// When it is off, an op pays for one load and one branch.
#pragma once

#include <cstdint>
#include <cstdio>
#include <mutex>
#include <set>
#include <sstream>
#include <string>

#include "core/env.h"
#include "core/types.h"
#include "cpu/isa.h"

namespace alula {

inline bool is_tracing() {
  static const bool on = env_flag("ALULA_LOG");
  return on;
}

inline const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

// Numbers that rarely decide anything alone are named by a range, so that a prompt of each length is no new decision:
// 1, 2, 3-4, 5-8, 9-16, ...
inline std::string size_class(int64_t n) {
  if (n <= 2) return std::to_string(n);
  int64_t top = 4;
  while (top < n) top *= 2;
  return std::to_string(top / 2 + 1) + "-" + std::to_string(top);
}

template <typename... Parts>
__attribute__((noinline, cold)) void trace_at(const std::string& where, const char* op, DType dtype,
                                              const Parts&... parts) {
  static std::mutex mutex;
  static std::set<std::string> seen;
  std::ostringstream text;
  text << "alula: " << op << ' ' << where << ' ' << dtype_name(dtype) << ' ';
  (text << ... << parts) << '\n';
  const std::lock_guard lock(mutex);
  if (seen.insert(text.str()).second) std::fputs(text.str().c_str(), stderr);
}

template <typename... Parts>
__attribute__((noinline, cold)) void trace(const char* op, DType dtype, const Parts&... parts) {
  trace_at(isa_name(current_isa()), op, dtype, parts...);
}

}  // namespace alula

// The parts of the line are not computed when nobody asked for it.
#define ALULA_TRACE(...)                    \
  do {                                      \
    if (::alula::is_tracing()) [[unlikely]] \
      ::alula::trace(__VA_ARGS__);          \
  } while (false)

#define ALULA_TRACE_CUDA(...)                 \
  do {                                        \
    if (::alula::is_tracing()) [[unlikely]]   \
      ::alula::trace_at("cuda", __VA_ARGS__); \
  } while (false)
