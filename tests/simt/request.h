// One call of an op, as the tests send it: numbers and tensors by name.
//
// On standard input:  run <op> <order>, then lines  i <name> <integer> | f <name> <real> |
// t <name> <bytes> <offset> <is result>, each t followed by its bytes, then  end.  On standard output:  ok, then
// t <name> <bytes> and the bytes of each result, then  end;  or  fault <text>;  or  error <text>.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/types.h"
#include "cuda/device.h"

namespace simt {

// An allocation of exactly these bytes, so that AddressSanitizer sees each access beyond it. `offset` bytes from an
// address aligned to 16.
class Buffer {
 public:
  Buffer(size_t bytes, size_t offset);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() const { return memory_ + offset_; }
  size_t size() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_, offset_;
};

class Request {
 public:
  std::map<std::string, int64_t> integers;
  std::map<std::string, double> reals;
  std::map<std::string, std::unique_ptr<Buffer>> tensors;
  std::vector<std::string> results;

  // Throws std::runtime_error where there is none.
  int64_t i(const std::string& name) const;
  float f(const std::string& name) const;
  alula::DType dtype(const std::string& name) const { return static_cast<alula::DType>(i(name)); }

  // Null where there is none.
  template <typename T = void>
  T* t(const std::string& name) const {
    const auto found = tensors.find(name);
    return found == tensors.end() ? nullptr : reinterpret_cast<T*>(found->second->data());
  }

  alula::CudaStream stream() const;
};

using Op = void (*)(const Request&);

// `static const Registration here("op", run_op);`
struct Registration {
  Registration(const char* name, Op op);
};

}  // namespace simt
