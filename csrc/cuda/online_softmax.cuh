// Softmax over scores that come tile by tile (Milakov and Gimelshein 2018): of each row the largest score so far, and
// sums relative to it. fp32; exponentials by 2^x.
//
// A score v stands for exp(v * c): c is the scale where v is the plain product (differences of large scores are then
// exact), 1 where scale and mask are in v already.
#pragma once

#include "cuda/hardware.cuh"

namespace alula {

struct RowState {
  float maximum = -INFINITY;
  float denominator = 0.0f;
};

// What is subtracted from scores: 0 in place of -inf, so that a row that has seen nothing has exponentials 0.
__device__ __forceinline__ float subtrahend(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// Takes a new maximum; returns what all sums so far are to be multiplied with. `factor` is c / ln 2.
__device__ __forceinline__ float raise_maximum(RowState& row, float maximum, float factor) {
  const float raised = fmaxf(row.maximum, maximum);
  const float correction =
      row.maximum == -INFINITY ? 1.0f : exp2_approximate((row.maximum - subtrahend(raised)) * factor);
  row.maximum = raised;
  row.denominator *= correction;
  return correction;
}

__device__ __forceinline__ float probability(float score, float subtracted, float factor) {
  return exp2_approximate((score - subtracted) * factor);
}

}  // namespace alula
