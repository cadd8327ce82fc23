// A function that can be left in the middle and entered again, on a stack of its own.
#pragma once

#include <cstddef>
#include <memory>

namespace simt {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From the beginning of `body`; what it was doing before is dropped. Destructors on the old stack do not run.
  void start(void (*body)());
  // Runs it until it leaves or ends.
  void enter();
  // Called by the body: back to whoever entered.
  void leave();

  struct Context;

 private:
  static void run(Fiber* self);

  std::unique_ptr<Context> context_;
  void (*body_)() = nullptr;
};

}  // namespace simt
