// Environment variables, all of them: README.md has the table.
#pragma once

#include <cstdlib>
#include <string>

namespace alula {

inline std::string env_string(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

inline bool env_flag(const char* name) {
  const std::string value = env_string(name);
  return !value.empty() && value != "0";
}

}  // namespace alula
