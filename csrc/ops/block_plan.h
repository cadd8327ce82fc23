// Block plans: which key blocks each query block attends to, and how often each of them counts.
//
// A sequence of n blocks of N tokens. Each query block has a list of (key block, count): a key of a block that is
// listed with count c enters the softmax c times, which is log(c) added to its score. A count of 0 means that only the
// pairs with a global token in them (the query's or the key's) see each other. Lists are sorted by key block, and no
// block is listed twice. No torch here: pybind11 hands plans to Python as numpy arrays.
#pragma once

#include <cstdint>
#include <vector>

namespace alula {

struct __attribute__((visibility("default"))) BlockPlan {
  int64_t num_heads;             // 1: all heads share the lists
  int64_t num_blocks;            // n
  std::vector<int32_t> starts;   // [num_heads, n + 1]: list i of head h is entries starts[h][i] .. starts[h][i + 1] - 1
  std::vector<int32_t> entries;  // [total, 2]: key block, count

  // [num_heads, n, n]: counts; 0 where a block is not listed, -1 for a count of 0.
  std::vector<int32_t> counts() const;
};

// What an own pattern is made of.
struct BlockPattern {
  int64_t num_heads = 1;
  int64_t num_blocks = 0;
  int64_t window = 3;                  // odd; the query's own block in the middle
  std::vector<int64_t> global_blocks;  // seen by all and seeing all
  std::vector<int64_t> token_blocks;   // blocks that hold global tokens
  int64_t num_random_blocks = 0;       // drawn for each head and row among the blocks that it does not see anyway
  uint64_t seed = 0;
  bool is_causal = false;  // no block after the query's own
};

// BigBird's pattern (Zaheer et al. 2020): rows 0 and n - 1 see all; row 1 sees {0, 1, 2, n - 1}, row n - 2 sees {0, n -
// 3, n - 2, n - 1}, row i between sees {0, i - 1, i, i + 1, n - 1}; rows 1 to n - 2 see their random blocks on top, and
// a block that occurs k times counts k times. random: [num_heads, n - 2, num_random]. Throws std::invalid_argument for
// n < 4 and for a random block out of range.
__attribute__((visibility("default"))) BlockPlan reference_plan(int64_t num_blocks, int64_t num_heads,
                                                                int64_t num_random, const int32_t* random);

// Throws std::invalid_argument, naming what does not fit.
__attribute__((visibility("default"))) BlockPlan pattern_plan(const BlockPattern& pattern);

// Lists as given: list i of head h is blocks[starts[h][i]] .. blocks[starts[h][i + 1] - 1], in any order; a block that
// occurs k times gets the count k. Throws std::invalid_argument for a block out of range.
__attribute__((visibility("default"))) BlockPlan listed_plan(int64_t num_blocks, int64_t num_heads,
                                                             const std::vector<int64_t>& starts,
                                                             const std::vector<int64_t>& blocks);

}  // namespace alula
