#include "fiber.h"

#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

}  // namespace

#if defined(__x86_64__)

// Saves the registers that a call keeps on this stack, its pointer to *save, and goes on where `load` was saved.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

struct Fiber::Context {
  void* stack = std::aligned_alloc(64, kStackBytes);
  void* inside = nullptr;
  void* outside = nullptr;
  ~Context() { std::free(stack); }
};

namespace {
Fiber* starting = nullptr;
void (*run_fiber)(Fiber*) = nullptr;

void first_entry() {
  run_fiber(starting);
  std::abort();  // a body that ended is not entered again
}
}  // namespace

void Fiber::start(void (*body)()) {
  body_ = body;
  run_fiber = &Fiber::run;
  auto* top = reinterpret_cast<uint64_t*>(static_cast<char*>(context_->stack) + kStackBytes);
  *--top = 0;  // where first_entry would return to; keeps the stack aligned as after a call
  *--top = reinterpret_cast<uint64_t>(&first_entry);
  for (int i = 0; i < 6; i++) *--top = 0;
  context_->inside = top;
}

void Fiber::enter() {
  starting = this;
  simt_switch(&context_->outside, context_->inside);
}

void Fiber::leave() { simt_switch(&context_->inside, context_->outside); }

#else

struct Fiber::Context {
  void* stack = std::aligned_alloc(64, kStackBytes);
  ucontext_t inside, outside;
  ~Context() { std::free(stack); }
};

namespace {
Fiber* starting = nullptr;
void (*run_fiber)(Fiber*) = nullptr;
void first_entry() { run_fiber(starting); }
}  // namespace

void Fiber::start(void (*body)()) {
  body_ = body;
  run_fiber = &Fiber::run;
  getcontext(&context_->inside);
  context_->inside.uc_stack.ss_sp = context_->stack;
  context_->inside.uc_stack.ss_size = kStackBytes;
  context_->inside.uc_link = nullptr;
  makecontext(&context_->inside, first_entry, 0);
}

void Fiber::enter() {
  starting = this;
  swapcontext(&context_->outside, &context_->inside);
}

void Fiber::leave() { swapcontext(&context_->inside, &context_->outside); }

#endif

Fiber::Fiber() : context_(std::make_unique<Context>()) {}
Fiber::~Fiber() = default;

void Fiber::run(Fiber* self) {
  self->body_();
  self->leave();
}

}  // namespace simt
