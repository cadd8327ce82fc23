// Checks of what a caller hands in. A failed check throws before anything is written; the text says what is wrong and
// what is accepted.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace alula {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace alula

#define ALULA_CHECK(condition, ...) \
  do {                              \
    if (!(condition)) [[unlikely]]  \
      ::alula::fail(__VA_ARGS__);   \
  } while (false)
