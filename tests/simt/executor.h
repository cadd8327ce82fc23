// Runs CUDA kernels on the host, a fiber per thread, and reports what a GPU would do silently.
//
// Every thread of a block is a fiber that runs until it meets a barrier or a warp collective (shuffle, vote, matrix
// product). A block's threads run in one of three orders; blocks run one after another, in the same three orders.
// Reported, with kernel, block, thread and the source line last passed:
//   - shared memory: out of bounds, misaligned, read before it was written, written and read or written twice by two
//     threads with no barrier between
//   - collectives: lanes of one warp at different ones, lanes that left, shuffles from lanes that do not take part
//   - barriers: threads at different ones, threads that left while others wait
//   - asynchronous copies: their place read or written before the wait, copies still under way at the end
//   - counters of blocks: a block that is counted before what its threads wrote is sure to be there
// Global memory: each tensor is an allocation of its own and everything is compiled with AddressSanitizer.
#pragma once

#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

using Site = std::source_location;

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

enum class Order { kForward, kReverse, kRandom };

// What a kernel did wrong.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Launch {
  std::string name;
  Index grid, block;
  int64_t shared_bytes;
  std::function<void()> kernel;
};

// Set by the caller of a launcher, used by every launch after.
Order& thread_order();

// Runs all blocks. Throws Fault.
void run(const Launch& launch);

// --- for the headers that stand in for csrc/cuda ---------------------------------------------------------------------

// Threads of the launch that waited for the previous kernel, and that let the next one start.
struct Waits {
  int64_t waited = 0, released = 0;
};
inline Waits& waits() {
  static Waits of_launch;
  return of_launch;
}

const Index& thread_index();
const Index& block_index();
const Index& block_size();
const Index& grid_size();

// Ends the launch with a Fault. Called on a fiber; does not return.
[[noreturn]] void fault(const std::string& text);

void block_barrier(Site site);

// Posts `data` and waits for all lanes of `mask`; then execute(data of lane 0..31, null where not in mask) runs once.
// `orders_memory`: a barrier for the warp's shared memory too.
using Execute = void (*)(void* const (&lanes)[32]);
void warp_collective(const char* what, unsigned mask, void* data, Execute execute, bool orders_memory, Site site);

// Shared memory. Offsets are bytes from its start.
unsigned char* shared_memory();
int64_t shared_size();
void check_shared(int64_t offset, int64_t bytes, int64_t alignment, bool writes);

// __threadfence; an atomic count of the block, by one of its threads.
void fence();
void count_block();

void copy_async(int64_t offset, const void* from, bool is_there);
void copy_async_commit();
void copy_async_wait(int pending);

}  // namespace simt
