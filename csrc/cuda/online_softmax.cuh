// Softmax over scores that come tile by tile (Milakov and Gimelshein 2018): of each row the largest score so far, and
// sums relative to it. fp32; exponentials by 2^x.
//
// The maximum follows the scores with some slack: it is raised where a score is more than 2^8 times as probable, so
// that sums are seldom rescaled. Nothing is lost: sums stay below 2^8 for each key, and the last division takes the
// maximum out again.
#pragma once

#include "cuda/hardware.cuh"

namespace alula {

constexpr float kLog2E = 1.44269504088896341f;

struct RowState {
  float maximum = -INFINITY;
  float denominator = 0.0f;
};

// A score v stands for 2^(v score state), the maximum m of a row for 2^(m state). With state = 1 an exponent takes one
// instruction and is rounded once (the rounding of v score in the maximum is the same for a whole row, and is divided
// out); with score = 1 differences of scores are exact however large they are, as masks that add -3e38 need.
struct ScoreUnits {
  float score, state;
};

// What is subtracted from scores: 0 in place of -inf, so that a row that has seen nothing has exponentials 0.
__device__ __forceinline__ float subtrahend(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// Whether the largest of some scores is above the slack. Not for NaN.
__device__ __forceinline__ bool is_above(const RowState& row, float largest, ScoreUnits units) {
  constexpr float kSlack = 8.0f;
  return (largest * units.score - row.maximum) * units.state > kSlack;
}

// Raises the maximum to the largest score of the row, if that is above the slack; returns what all sums so far are to
// be multiplied with.
__device__ __forceinline__ float raise_maximum(RowState& row, float largest, ScoreUnits units) {
  if (!is_above(row, largest, units)) return 1.0f;
  const float raised = largest * units.score;
  const float correction = exp2_approximate((row.maximum - raised) * units.state);
  row.maximum = raised;
  row.denominator *= correction;
  return correction;
}

__device__ __forceinline__ float probability(float score, float subtracted, ScoreUnits units) {
  return exp2_approximate(fmaf(score, units.score, -subtracted) * units.state);
}

// What sums relative to `maximum` are multiplied with to be relative to `whole`.
__device__ __forceinline__ float weight_of(float maximum, float whole, ScoreUnits units) {
  return exp2_approximate((maximum - subtrahend(whole)) * units.state);
}

}  // namespace alula
