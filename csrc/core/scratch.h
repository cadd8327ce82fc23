// Working memory of a thread that outlives a call, so that a step of decoding allocates nothing.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#include "core/forbid.h"

namespace alula {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // At least `bytes`, aligned to 64; what was there before is gone.
  void* reserve(size_t bytes) {
    if (bytes > capacity_) {
      std::free(data_);
      capacity_ = 0;
      const size_t rounded = (bytes + 63) / 64 * 64;
      data_ = std::aligned_alloc(64, rounded);
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = rounded;
    }
    permit(data_, bytes);
    forbid(static_cast<char*>(data_) + bytes, capacity_ - bytes);
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t capacity_ = 0;
};

// One per thread and purpose: `thread_scratch<struct MyPurpose>()`.
template <typename Purpose>
Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace alula
