#include "ops/block_plan.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

namespace alula {
namespace {

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

constexpr int64_t kMostBlocks = 1 << 20;
constexpr int32_t kTokensOnly = -1;  // in a row of counts: listed with count 0

void check_size(int64_t num_blocks, int64_t num_heads, int64_t least_blocks) {
  if (num_blocks < least_blocks || num_blocks > kMostBlocks) {
    refuse("a plan of ", num_blocks, " blocks; accepted: ", least_blocks, " to ", kMostBlocks);
  }
  if (num_heads < 1) refuse("num_heads is ", num_heads, "; a plan has 1 list for all heads or one for each");
}

// Collects rows of counts into lists.
class Writer {
 public:
  Writer(int64_t num_blocks, int64_t num_heads) {
    plan_.num_heads = num_heads;
    plan_.num_blocks = num_blocks;
    plan_.starts.reserve(static_cast<size_t>(num_heads * (num_blocks + 1)));
  }

  void begin_head() { plan_.starts.push_back(end()); }

  void add_row(const std::vector<int32_t>& counts) {
    for (size_t block = 0; block < counts.size(); block++) {
      if (counts[block] == 0) continue;
      plan_.entries.push_back(static_cast<int32_t>(block));
      plan_.entries.push_back(std::max(counts[block], 0));
    }
    if (plan_.entries.size() / 2 > INT32_MAX) refuse("a plan of more than ", INT32_MAX, " listed blocks");
    plan_.starts.push_back(end());
  }

  BlockPlan take() { return std::move(plan_); }

 private:
  int32_t end() const { return static_cast<int32_t>(plan_.entries.size() / 2); }

  BlockPlan plan_;
};

// The numbers of Steele, Lea and Flood's SplitMix64 (2014): the same on every machine and with every library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  // Even in [0, n): values beyond the last multiple of n are drawn again.
  uint64_t below(uint64_t n) {
    const uint64_t last = UINT64_MAX - UINT64_MAX % n;
    uint64_t value = next();
    while (value >= last) value = next();
    return value % n;
  }

 private:
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  uint64_t state_;
};

// Blocks named by number, from the end where negative, sorted and without repetition.
std::vector<int64_t> named_blocks(const std::vector<int64_t>& given, int64_t num_blocks, const char* name) {
  std::vector<int64_t> blocks;
  for (const int64_t block : given) {
    if (block < -num_blocks || block >= num_blocks) {
      refuse(name, " holds ", block, "; accepted: ", -num_blocks, " to ", num_blocks - 1, " in a plan of ", num_blocks,
             " blocks");
    }
    blocks.push_back(block < 0 ? block + num_blocks : block);
  }
  std::sort(blocks.begin(), blocks.end());
  blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
  return blocks;
}

bool contains(const std::vector<int64_t>& sorted, int64_t value) {
  return std::binary_search(sorted.begin(), sorted.end(), value);
}

// Counts `wanted` more blocks of [0, end), among those not counted yet; all of them where there are fewer.
void draw(std::vector<int32_t>& counts, int64_t end, int64_t wanted, Random& random) {
  std::vector<size_t> free;
  for (size_t block = 0; block < static_cast<size_t>(end); block++) {
    if (counts[block] == 0) free.push_back(block);
  }
  const size_t drawn = std::min(free.size(), static_cast<size_t>(wanted));
  for (size_t i = 0; i < drawn; i++) {
    std::swap(free[i], free[i + random.below(free.size() - i)]);
    counts[free[i]] = 1;
  }
}

}  // namespace

std::vector<int32_t> BlockPlan::counts() const {
  const auto n = static_cast<size_t>(num_blocks);
  std::vector<int32_t> table(static_cast<size_t>(num_heads) * n * n, 0);
  for (size_t head = 0; head < static_cast<size_t>(num_heads); head++) {
    for (size_t row = 0; row < n; row++) {
      const int32_t* start = starts.data() + head * (n + 1) + row;
      for (auto i = static_cast<size_t>(start[0]); i < static_cast<size_t>(start[1]); i++) {
        const int32_t count = entries[2 * i + 1];
        table[(head * n + row) * n + static_cast<size_t>(entries[2 * i])] = count == 0 ? kTokensOnly : count;
      }
    }
  }
  return table;
}

BlockPlan reference_plan(int64_t num_blocks, int64_t num_heads, int64_t num_random, const int32_t* random) {
  check_size(num_blocks, num_heads, 4);
  if (num_random < 0) refuse("num_random_blocks is ", num_random, "; it must not be negative");
  Writer writer(num_blocks, num_heads);
  std::vector<int32_t> counts;
  for (int64_t head = 0; head < num_heads; head++) {
    writer.begin_head();
    for (int64_t row = 0; row < num_blocks; row++) {
      const bool sees_all = row == 0 || row == num_blocks - 1;
      counts.assign(static_cast<size_t>(num_blocks), sees_all ? 1 : 0);
      if (!sees_all) {
        counts.front() = counts.back() = 1;
        for (int64_t block = row - 1; block <= row + 1; block++) counts[static_cast<size_t>(block)] = 1;
        for (int64_t i = 0; i < num_random; i++) {
          const int32_t block = random[(head * (num_blocks - 2) + row - 1) * num_random + i];
          if (block < 0 || block >= num_blocks) {
            refuse("random block ", block, " of head ", head, ", row ", row, "; accepted: 0 to ", num_blocks - 1);
          }
          counts[static_cast<size_t>(block)]++;
        }
      }
      writer.add_row(counts);
    }
  }
  return writer.take();
}

BlockPlan pattern_plan(const BlockPattern& pattern) {
  const int64_t n = pattern.num_blocks;
  check_size(n, pattern.num_heads, 1);
  if (pattern.window < 1 || pattern.window % 2 == 0) {
    refuse("window is ", pattern.window, " blocks; accepted: odd numbers, the query's own block in the middle");
  }
  if (pattern.num_random_blocks < 0) {
    refuse("num_random_blocks is ", pattern.num_random_blocks, "; it must not be negative");
  }
  const std::vector<int64_t> globals = named_blocks(pattern.global_blocks, n, "global_blocks");
  const std::vector<int64_t> tokens = named_blocks(pattern.token_blocks, n, "the blocks of global_tokens");
  const int64_t side = std::min(pattern.window / 2, n);
  Random random(pattern.seed);
  Writer writer(n, pattern.num_heads);
  std::vector<int32_t> counts;
  for (int64_t head = 0; head < pattern.num_heads; head++) {
    writer.begin_head();
    for (int64_t row = 0; row < n; row++) {
      const int64_t end = pattern.is_causal ? row + 1 : n;  // of what the row may see
      const bool is_global = contains(globals, row);
      counts.assign(static_cast<size_t>(n), 0);
      const auto see = [&](int64_t begin, int64_t past) {
        for (int64_t block = std::max<int64_t>(begin, 0); block < std::min(past, end); block++) {
          counts[static_cast<size_t>(block)] = 1;
        }
      };
      if (is_global) {
        see(0, n);
      } else {
        see(row - side, row + side + 1);
        for (const int64_t block : globals) see(block, block + 1);
        draw(counts, end, pattern.num_random_blocks, random);
      }
      const auto see_tokens = [&](int64_t block) {
        int32_t& count = counts[static_cast<size_t>(block)];
        if (block < end && count == 0) count = kTokensOnly;
      };
      for (const int64_t block : tokens) see_tokens(block);
      if (contains(tokens, row)) {
        for (int64_t block = 0; block < end; block++) see_tokens(block);
      }
      writer.add_row(counts);
    }
  }
  return writer.take();
}

BlockPlan listed_plan(int64_t num_blocks, int64_t num_heads, const std::vector<int64_t>& starts,
                      const std::vector<int64_t>& blocks) {
  check_size(num_blocks, num_heads, 1);
  if (static_cast<int64_t>(starts.size()) != num_heads * num_blocks + 1 || starts.front() != 0 ||
      starts.back() != static_cast<int64_t>(blocks.size()) || !std::is_sorted(starts.begin(), starts.end())) {
    refuse("starts do not cut ", blocks.size(), " blocks into ", num_heads, " x ", num_blocks, " lists");
  }
  Writer writer(num_blocks, num_heads);
  std::vector<int32_t> counts;
  for (int64_t head = 0; head < num_heads; head++) {
    writer.begin_head();
    for (int64_t row = 0; row < num_blocks; row++) {
      counts.assign(static_cast<size_t>(num_blocks), 0);
      const auto list = static_cast<size_t>(head * num_blocks + row);
      for (auto i = static_cast<size_t>(starts[list]); i < static_cast<size_t>(starts[list + 1]); i++) {
        if (blocks[i] < 0 || blocks[i] >= num_blocks) {
          refuse("the list of head ", head, ", query block ", row, " holds key block ", blocks[i], "; accepted: 0 to ",
                 num_blocks - 1);
        }
        counts[static_cast<size_t>(blocks[i])]++;
      }
      writer.add_row(counts);
    }
  }
  return writer.take();
}

}  // namespace alula
