// choose_token: the most likely token of each row, or one that was drawn, and what it changes in the state of the rows.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cuda/device.h"

#ifdef __CUDACC__
#define ALULA_BOTH_SIDES __host__ __device__ inline
#else
#define ALULA_BOTH_SIDES inline
#endif

namespace alula {

// The state of R rows while they generate, and what a choice is made of.
struct ChooseTokenArgs {
  DType dtype;           // of the scores
  const void* scores;    // [R, V] with row_stride elements from row to row
  const int64_t* drawn;  // [R]: the tokens to take; null: those with the largest score
  int64_t rows, vocab_size, row_stride;
  const int64_t* pad_id;   // [1], of rows that do not run
  const int64_t* eos_ids;  // [num_eos]; null with 0
  int64_t num_eos;
  bool advances;  // the tokens before have been stored

  int64_t* tokens;     // [R]: chosen; 0 in rows that do not run
  bool* running;       // [R]
  int64_t* out;        // [R, num_new]: column `step` is written, padding in rows that do not run
  int64_t num_new;     // N
  int64_t* step;       // [1], moves on by one
  float* report;       // [2, R]: what `out` got; the largest score of a running row where that is no finite number
  int32_t* lengths;    // [R], tokens stored
  int64_t* positions;  // [R], of the token to be read next
  int32_t* slots;      // [R]: where that is stored, -1 in rows that have ended
  int32_t* seen;       // [R]: tokens stored with it
};

// A score and where it is, as a whole number: larger for larger scores, for NaN above all, and for the first of equals.
// -0 counts as 0.
using ScoreKey = unsigned long long;

ALULA_BOTH_SIDES ScoreKey score_key(uint32_t bits, int64_t index) {
  if (bits == 0x80000000u) bits = 0;
  uint32_t order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if ((bits & 0x7fffffffu) > 0x7f800000u) order = 0xffffffffu;
  return static_cast<ScoreKey>(order) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

// The bits of the score.
ALULA_BOTH_SIDES uint32_t score_bits(ScoreKey key) {
  const auto order = static_cast<uint32_t>(key >> 32);
  if (order == 0xffffffffu) return 0x7fc00000u;
  return order & 0x80000000u ? order & 0x7fffffffu : ~order;
}

ALULA_BOTH_SIDES int64_t score_index(ScoreKey key) {
  return static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(key));
}

// Moves row `row` on: its largest score is `key`.
ALULA_BOTH_SIDES void choose_row(const ChooseTokenArgs& args, int64_t row, ScoreKey key, int64_t step) {
  const bool was_running = args.running[row];
  const int64_t token = args.drawn != nullptr ? args.drawn[row] : score_index(key);
  const int64_t chosen = was_running ? token : args.pad_id[0];
  if (step >= 0 && step < args.num_new) args.out[row * args.num_new + step] = chosen;
  args.tokens[row] = was_running ? token : 0;
  args.report[row] = static_cast<float>(chosen);
  const uint32_t bits = score_bits(key);
  if (was_running && (bits & 0x7f800000u) == 0x7f800000u) {
    union {
      uint32_t bits;
      float value;
    } largest = {bits};
    args.report[args.rows + row] = largest.value;
  }
  if (args.advances && was_running) {
    args.lengths[row]++;
    args.positions[row]++;
  }
  bool runs = was_running;
  for (int64_t i = 0; i < args.num_eos; i++) runs = runs && chosen != args.eos_ids[i];
  args.running[row] = runs;
  args.slots[row] = runs ? args.lengths[row] : -1;
  args.seen[row] = args.lengths[row] + (runs ? 1 : 0);
}

// On CUDA: the scores of a row are shared out over `splits` blocks; the last block of all moves the rows on.
struct ChooseTokenPlan {
  int splits;
  int64_t num_keys;  // of the workspace
};
ChooseTokenPlan choose_token_plan(const ChooseTokenArgs& args, const CudaDevice& device);

// `workspace` [R, splits]; `counter`: a zero, which the kernel leaves zero.
void choose_token_cuda(const ChooseTokenArgs& args, const ChooseTokenPlan& plan, ScoreKey* workspace, uint32_t* counter,
                       const CudaStream& stream);

}  // namespace alula
