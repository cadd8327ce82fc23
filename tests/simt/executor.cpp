#include "executor.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>

#include "fiber.h"

namespace simt {
namespace {

constexpr int kLanes = 32;
constexpr int64_t kCellBytes = 2;  // shared memory is watched in cells of the smallest type in use

enum class State { kReady, kAtBlockBarrier, kAtWarpCollective, kDone };

struct AsyncCopy {
  int64_t offset;
  std::array<unsigned char, 16> bytes;  // of the source at the time of the copy
};

struct Thread {
  Fiber fiber;
  Index index;
  int number = 0;  // in the block
  State state = State::kReady;
  Site site;  // of the barrier or collective it waits at, or passed last
  bool has_passed = false;
  const char* collective = nullptr;
  unsigned mask = 0;
  bool orders_memory = false;
  void* data = nullptr;
  Execute execute = nullptr;
  std::vector<std::vector<AsyncCopy>> copies;  // committed groups, then the open one
  uint64_t fence_time = 0;                     // of the last __threadfence
};

// Who touched a cell last, and when: a time is a pair (block barriers passed, warp barriers its warp has passed).
struct Cell {
  uint64_t write_time = 0, read_time = 0;
  uint32_t write_warp_time = 0, read_warp_time = 0;
  uint64_t copy_time = 0;            // of an asynchronous copy into it that is under way, else 0
  int16_t writer = -1, reader = -1;  // a reader of -2: several of one warp; -3: of several warps
  int16_t reader_warp = -1;
};

struct Block {
  const Launch* launch = nullptr;
  Index index;
  std::vector<Thread> threads;
  std::vector<uint32_t> warp_time;
  uint64_t start_time = 0;
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;
};

Block block;
Thread* current = nullptr;
uint64_t now = 1;  // block barriers passed, over all launches
Order order = Order::kForward;
std::string fault_text;

std::string place(const Site& site) {
  const std::string path = site.file_name();
  return path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(site.line());
}

std::string where(const Thread& thread) {
  std::ostringstream text;
  text << block.launch->name << ", block (" << block.index.x << ", " << block.index.y << ", " << block.index.z
       << "), thread " << thread.number;
  if (thread.has_passed) text << ", after " << place(thread.site);
  return text.str();
}

void set_fault(const std::string& text) {
  if (fault_text.empty()) fault_text = text;
}

void wait(State state, Site site) {
  current->state = state;
  current->site = site;
  current->fiber.leave();
  current->has_passed = true;
}

// --- shared memory ---------------------------------------------------------------------------------------------------

// Whether what happened at (time, warp_time) by a thread of warp `other_warp` is over for `thread`.
bool is_over(uint64_t time, uint32_t warp_time, int other_warp, const Thread& thread) {
  if (time < now) return true;
  const int warp = thread.number / kLanes;
  return warp == other_warp && warp_time < block.warp_time[static_cast<size_t>(warp)];
}

[[noreturn]] void race(int64_t offset, const char* does, const char* did, int other) {
  fault("shared memory race at byte " + std::to_string(offset) + ": this thread " + does + " what thread " +
        (other < 0 ? "others" : std::to_string(other)) + " " + did + ", with no barrier between");
}

void touch(Cell& cell, int64_t offset, bool writes) {
  const Thread& thread = *current;
  const int warp = thread.number / kLanes;
  const uint32_t warp_time = block.warp_time[static_cast<size_t>(warp)];
  if (cell.copy_time >= block.start_time) {
    fault("shared memory at byte " + std::to_string(offset) + (writes ? " is written" : " is read") +
          " while an asynchronous copy into it is under way");
  }
  if (cell.write_time >= block.start_time && cell.writer != thread.number &&
      !is_over(cell.write_time, cell.write_warp_time, cell.writer / kLanes, thread)) {
    race(offset, writes ? "writes" : "reads", "wrote", cell.writer);
  }
  if (writes) {
    if (cell.read_time >= block.start_time && cell.reader != thread.number &&
        !is_over(cell.read_time, cell.read_warp_time, cell.reader == -3 ? -1 : cell.reader_warp, thread)) {
      race(offset, "writes", "read", cell.reader);
    }
    cell.write_time = now;
    cell.write_warp_time = warp_time;
    cell.writer = static_cast<int16_t>(thread.number);
    return;
  }
  if (cell.write_time < block.start_time) {
    fault("shared memory read at byte " + std::to_string(offset) + ", which nobody has written");
  }
  const bool is_first = cell.read_time != now || cell.read_time < block.start_time;
  if (is_first || cell.reader == thread.number) {
    cell.reader = static_cast<int16_t>(thread.number);
  } else {
    cell.reader = cell.reader_warp == warp && cell.reader != -3 ? -2 : -3;
  }
  cell.reader_warp = static_cast<int16_t>(warp);
  cell.read_time = now;
  cell.read_warp_time = warp_time;
}

// --- running ---------------------------------------------------------------------------------------------------------

std::vector<int> shuffled(int count, unsigned seed) {
  std::vector<int> result(static_cast<size_t>(count));
  for (int i = 0; i < count; i++) result[static_cast<size_t>(i)] = i;
  if (order == Order::kReverse) std::reverse(result.begin(), result.end());
  if (order == Order::kRandom) {
    std::mt19937 random(seed);
    std::shuffle(result.begin(), result.end(), random);
  }
  return result;
}

void body() {
  block.launch->kernel();
  for (const auto& group : current->copies) {
    if (!group.empty()) fault("the thread ends with asynchronous copies under way");
  }
  current->state = State::kDone;
}

std::string list_of_waits() {
  std::ostringstream text;
  int shown = 0;
  for (size_t i = 0; i < block.threads.size();) {
    size_t end = i + 1;
    const Thread& thread = block.threads[i];
    const auto same = [&](const Thread& other) {
      return other.state == thread.state && (thread.state == State::kDone || (other.site.line() == thread.site.line() &&
                                                                              place(other.site) == place(thread.site)));
    };
    while (end < block.threads.size() && same(block.threads[end])) end++;
    if (shown++ == 8) return text.str() + "; ...";
    text << (i ? "; " : "") << "threads " << i << "-" << end - 1;
    if (thread.state == State::kDone) {
      text << " have ended";
    } else {
      const bool at_barrier = thread.state == State::kAtBlockBarrier;
      text << " at " << (at_barrier ? "__syncthreads" : thread.collective) << " " << place(thread.site);
    }
    i = end;
  }
  return text.str();
}

// Runs the collectives whose lanes have all come. Returns whether there was one.
bool release_warps() {
  bool released = false;
  for (size_t first = 0; first < block.threads.size(); first += kLanes) {
    const size_t count = std::min<size_t>(kLanes, block.threads.size() - first);
    for (size_t lane = 0; lane < count; lane++) {
      Thread& thread = block.threads[first + lane];
      if (thread.state != State::kAtWarpCollective) continue;
      if (!(thread.mask >> lane & 1)) {
        set_fault(block.launch->name + ": " + thread.collective + " at " + place(thread.site) + " by lane " +
                  std::to_string(lane) + ", which its mask leaves out");
        return true;
      }
      bool complete = true;
      void* data[kLanes] = {};
      for (size_t other = 0; other < kLanes && complete; other++) {
        if (!(thread.mask >> other & 1)) continue;
        if (other >= count) {
          complete = false;
          break;
        }
        const Thread& peer = block.threads[first + other];
        complete = peer.state == State::kAtWarpCollective && peer.mask == thread.mask &&
                   peer.execute == thread.execute && peer.site.line() == thread.site.line() &&
                   std::strcmp(peer.site.file_name(), thread.site.file_name()) == 0;
        data[other] = peer.data;
      }
      if (!complete) continue;
      current = &thread;
      thread.execute(data);
      if (thread.orders_memory) block.warp_time[first / kLanes]++;
      for (size_t other = 0; other < count; other++) {
        if (data[other] != nullptr) block.threads[first + other].state = State::kReady;
      }
      released = true;
    }
  }
  return released;
}

void run_block(Index index) {
  block.index = index;
  block.start_time = ++now;
  const unsigned seed = index.x * 7919u + index.y * 104729u + index.z + 1;
  const auto count = static_cast<int>(block.threads.size());
  for (int i = 0; i < count; i++) {
    Thread& thread = block.threads[static_cast<size_t>(i)];
    thread.state = State::kReady;
    thread.has_passed = false;
    thread.copies.assign(1, {});
    thread.fence_time = 0;
    thread.fiber.start(body);
  }
  std::fill(block.warp_time.begin(), block.warp_time.end(), 0u);
  std::memset(block.shared.data(), 0xff, block.shared.size());  // NaN in every floating-point type
  const std::vector<int> turns = shuffled(count, seed);
  while (fault_text.empty()) {
    bool ran = false;
    for (const int i : turns) {
      Thread& thread = block.threads[static_cast<size_t>(i)];
      if (thread.state != State::kReady) continue;
      current = &thread;
      thread.fiber.enter();
      ran = true;
      if (!fault_text.empty()) return;
    }
    if (release_warps()) continue;
    if (!fault_text.empty()) return;
    const auto is_done = [](const Thread& thread) { return thread.state == State::kDone; };
    if (std::all_of(block.threads.begin(), block.threads.end(), is_done)) return;
    const Site& site = block.threads[0].site;
    const auto is_at_it = [&](const Thread& thread) {
      return thread.state == State::kAtBlockBarrier && place(thread.site) == place(site);
    };
    if (std::all_of(block.threads.begin(), block.threads.end(), is_at_it)) {
      now++;
      for (Thread& thread : block.threads) thread.state = State::kReady;
      continue;
    }
    if (!ran) {
      std::ostringstream text;
      text << block.launch->name << ", block (" << index.x << ", " << index.y << ", " << index.z
           << "): deadlock, no thread can go on: " << list_of_waits();
      set_fault(text.str());
    }
  }
}

}  // namespace

Order& thread_order() { return order; }

const Index& thread_index() { return current->index; }
const Index& block_index() { return block.index; }
const Index& block_size() { return block.launch->block; }
const Index& grid_size() { return block.launch->grid; }

void fault(const std::string& text) {
  set_fault(where(*current) + ": " + text);
  for (;;) current->fiber.leave();
}

void block_barrier(Site site) { wait(State::kAtBlockBarrier, site); }

void warp_collective(const char* what, unsigned mask, void* data, Execute execute, bool orders_memory, Site site) {
  current->collective = what;
  current->mask = mask;
  current->data = data;
  current->execute = execute;
  current->orders_memory = orders_memory;
  wait(State::kAtWarpCollective, site);
}

unsigned char* shared_memory() { return block.shared.data(); }
int64_t shared_size() { return block.launch->shared_bytes; }

void check_shared(int64_t offset, int64_t bytes, int64_t alignment, bool writes) {
  if (offset < 0 || offset + bytes > block.launch->shared_bytes) {
    fault("shared memory " + std::string(writes ? "write" : "read") + " of " + std::to_string(bytes) +
          " bytes at byte " + std::to_string(offset) + ", out of the block's " +
          std::to_string(block.launch->shared_bytes));
  }
  if (offset % alignment != 0) {
    fault("shared memory access at byte " + std::to_string(offset) + ", which is not aligned to " +
          std::to_string(alignment));
  }
  for (int64_t cell = offset / kCellBytes; cell * kCellBytes < offset + bytes; cell++) {
    touch(block.cells[static_cast<size_t>(cell)], cell * kCellBytes, writes);
  }
}

namespace {

void set_copy_time(int64_t offset, uint64_t time) {
  for (int64_t cell = offset / kCellBytes; cell * kCellBytes < offset + 16; cell++) {
    block.cells[static_cast<size_t>(cell)].copy_time = time;
  }
}

}  // namespace

// The data arrive at the wait and not before; writing the destination begins now.
void copy_async(int64_t offset, const void* from, bool is_there) {
  check_shared(offset, 16, 16, true);
  if (is_there && reinterpret_cast<uintptr_t>(from) % 16 != 0) fault("asynchronous copy from a misaligned address");
  AsyncCopy copy = {offset, {}};
  if (is_there) std::memcpy(copy.bytes.data(), from, 16);
  set_copy_time(offset, now);
  current->copies.back().push_back(copy);
}

void copy_async_commit() { current->copies.emplace_back(); }

void copy_async_wait(int pending) {
  auto& groups = current->copies;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const AsyncCopy& copy : groups.front()) {
      set_copy_time(copy.offset, 0);
      check_shared(copy.offset, 16, 16, true);
      std::memcpy(block.shared.data() + copy.offset, copy.bytes.data(), 16);
    }
    groups.erase(groups.begin());
  }
}

void fence() { current->fence_time = now; }

// What threads wrote to global memory before they were at a fence is there for whoever sees the count, if they met at a
// barrier after it; a fence of the counting thread after a barrier serves all.
void count_block() {
  if (current->fence_time == now && now > block.start_time) return;
  for (const Thread& thread : block.threads) {
    if (thread.fence_time < block.start_time || (thread.fence_time == now && thread.number != current->number)) {
      fault("the block is counted before what thread " + std::to_string(thread.number) +
            " wrote is sure to be there: no __threadfence() with a barrier behind it");
    }
  }
}

void run(const Launch& launch) {
  block.launch = &launch;
  const size_t count = static_cast<size_t>(launch.block.x) * launch.block.y * launch.block.z;
  if (count == 0 || count > 1024) throw Fault(launch.name + ": " + std::to_string(count) + " threads a block");
  if (launch.shared_bytes > 227 * 1024) throw Fault(launch.name + ": more shared memory than any GPU has");
  if (block.threads.size() != count) block.threads = std::vector<Thread>(count);
  for (size_t i = 0; i < count; i++) {
    Thread& thread = block.threads[i];
    thread.number = static_cast<int>(i);
    const auto number = static_cast<unsigned>(i);
    thread.index = {number % launch.block.x, number / launch.block.x % launch.block.y,
                    number / launch.block.x / launch.block.y};
  }
  block.warp_time.assign((count + kLanes - 1) / kLanes, 0);
  block.shared.resize(static_cast<size_t>(launch.shared_bytes));
  block.cells.resize(std::max(block.cells.size(), static_cast<size_t>(launch.shared_bytes / kCellBytes + 1)));
  fault_text.clear();
  const auto blocks = static_cast<int>(launch.grid.x * launch.grid.y * launch.grid.z);
  for (const int i : shuffled(blocks, 3)) {
    const auto number = static_cast<unsigned>(i);
    run_block({number % launch.grid.x, number / launch.grid.x % launch.grid.y, number / launch.grid.x / launch.grid.y});
    if (!fault_text.empty()) throw Fault(fault_text);
  }
}

}  // namespace simt
