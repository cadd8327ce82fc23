// Sums and maxima over a warp and over a block, in an order that does not depend on timing: every lane gets the same
// bits, on every run.
#pragma once

#include "cuda/hardware.cuh"

namespace alula {

struct Sum {
  static constexpr float kNothing = 0.0f;
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// NaN is passed over.
struct Max {
  static constexpr float kNothing = -__builtin_huge_valf();
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Over each aligned group of kLanes lanes (a power of two) of a whole warp.
template <typename Op, int kLanes = kWarpSize>
__device__ __forceinline__ float reduce_lanes(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    x = Op{}(x, __shfl_xor_sync(kWholeWarp, x, distance));
  }
  return x;
}

// Over the block, whole warps of it. `scratch` holds a float per warp and may be used again at once: a barrier at the
// beginning keeps this call's writes from the readers of the last.
template <typename Op>
__device__ __forceinline__ float reduce_block(float x, Shared<float> scratch) {
  x = reduce_lanes<Op>(x);
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  if (warps == 1) return x;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  float y = Op::kNothing;
  if (lane < warps) y = scratch[lane];
  return reduce_lanes<Op>(y);
}

}  // namespace alula
