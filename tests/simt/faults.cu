// Kernels with one mistake each, and the same ones without: what the executor must report and must not.
#include "cuda/hardware.cuh"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "request.h"

namespace alula {
namespace {

enum class Mistake : int {
  kNone,
  kWritePastEnd,          // global, one element
  kReadPastEnd,           // global, one element
  kReadBeforeStart,       // global, one element
  kMisalignedLoad,        // 16 bytes from an odd element
  kNoBarrier,             // a value of another warp read without one
  kNoWarpBarrier,         // a value of another lane read without one
  kNoBarrierBeforeReuse,  // shared memory written again while others still read it
  kNeverWritten,          // shared memory
  kSharedPastEnd,
  kBarrierInBranch,     // __syncthreads by half of the threads
  kEndBeforeBarrier,    // threads that return while others wait
  kShuffleInBranch,     // lanes at different shuffles of one warp
  kWrongLane,           // the sum is taken from a neighbour too far
  kShuffleFromOutside,  // from a lane that does not take part
  kNoCopyWait,          // data of an asynchronous copy read before the wait
  kNoCopyBarrier,       // data of another thread's asynchronous copy read without a barrier
  kCopyLeftOver,        // an asynchronous copy under way at the end
  kOrderOfBlocks,       // blocks that rely on the order they run in
  kNoWaitForPrevious,   // some threads never wait for the kernel before
  kNextBeforeWait,      // the next kernel is let start first
  kWriteUnderCopy,      // shared memory written where an asynchronous copy is under way to
  kCopyUnderCopy,       // a second copy to the same place before the first is waited for
  kNoFence,             // the block counts itself and its result may not be there yet
  kNoFenceOfOthers,     // the same, but for the result of the thread that counts
  kOutsideMask,         // lanes at a shuffle whose mask leaves them out
};

// y[i] = sum of the `blockDim.x` values of x's block i, each thread bringing one. In a roundabout way, with room for
// every mistake.
template <Mistake kMistake>
__global__ void sum_kernel(const float* x, float* y, int* counter, unsigned* blocks, int n) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, block = static_cast<int>(blockIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const Shared<float> values = dynamic_shared<float>();           // [threads]
  const Shared<float> sums = dynamic_shared<float>(threads * 4);  // [threads / 32]
  int from = block * threads + thread;
  if (kMistake == Mistake::kNextBeforeWait) let_next_kernel_start();
  if (kMistake != Mistake::kNoWaitForPrevious || thread < threads / 2) {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  if (kMistake == Mistake::kReadPastEnd && from == n - 1) from = n;
  if (kMistake == Mistake::kReadBeforeStart && from == 0) from = -1;

  if (kMistake == Mistake::kMisalignedLoad && thread == 0) {
    float four[4];
    load_pack(four, x + 1);
  }
  // Every fourth thread copies the values of four.
  if (thread % 4 == 0) copy_async_16(values + thread, x + block * threads + thread, true);
  copy_async_commit();
  if (kMistake == Mistake::kWriteUnderCopy && thread == 4) values[thread] = 0.0f;
  if (kMistake == Mistake::kCopyUnderCopy && thread == 4) {
    copy_async_16(values + thread, x + block * threads + thread, true);
    copy_async_commit();
  }
  if (kMistake == Mistake::kReadPastEnd || kMistake == Mistake::kReadBeforeStart) y[0] = x[from];
  if (kMistake != Mistake::kNoCopyWait && kMistake != Mistake::kCopyLeftOver) copy_async_wait<0>();
  if (kMistake == Mistake::kCopyLeftOver) return;
  if (kMistake == Mistake::kBarrierInBranch) {
    if (thread < threads / 2) __syncthreads();
  } else if (kMistake == Mistake::kEndBeforeBarrier) {
    if (thread >= threads / 2) {
      copy_async_wait<0>();
      return;
    }
    __syncthreads();
  } else if (kMistake != Mistake::kNoCopyBarrier) {
    __syncthreads();
  }
  float value = values[thread];

  if (kMistake == Mistake::kNeverWritten) value += sums[0];
  if (kMistake == Mistake::kSharedPastEnd && thread == 0) sums[threads / 32] = 1.0f;
  if (kMistake == Mistake::kShuffleInBranch) {
    if (lane < 16) {
      value += __shfl_xor_sync(kWholeWarp, value, 16);
    } else {
      value += __shfl_xor_sync(kWholeWarp, value, 16);
    }
  } else if (kMistake == Mistake::kOutsideMask) {
    value += __shfl_xor_sync(0xffffu, value, 16);
  } else if (kMistake == Mistake::kShuffleFromOutside) {
    if (lane < 16) value += __shfl_sync(0xffffu, value, 20);
  } else {
    value += __shfl_xor_sync(kWholeWarp, value, 16);
  }
  // The rest of the warp's sum through shared memory, lane by lane.
  values[thread] = value;
  if (kMistake != Mistake::kNoWarpBarrier) __syncwarp();
  for (int distance = 8; distance > 0; distance /= 2) {
    float other = 0.0f;
    if (lane < distance) {
      other = values[thread + distance + (kMistake == Mistake::kWrongLane && distance == 4 ? 1 : 0)];
      other += values[thread];
    }
    __syncwarp();
    if (lane < distance) values[thread] = other;
    if (kMistake != Mistake::kNoWarpBarrier) __syncwarp();
  }
  if (lane == 0) sums[thread / 32] = values[thread];
  if (kMistake != Mistake::kNoBarrier) __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < threads / 32; i++) total += sums[i];
  if (kMistake == Mistake::kNoBarrierBeforeReuse && thread == threads - 1) sums[0] = 0.0f;
  if (kMistake == Mistake::kOrderOfBlocks && thread == 0) {
    total += static_cast<float>(*counter);
    *counter += 1;
  }
  if (thread == 0) y[kMistake == Mistake::kWritePastEnd && block == 1 ? block + 1 : block] = total;
  if (kMistake != Mistake::kNoFence && (kMistake != Mistake::kNoFenceOfOthers || thread == 0)) __threadfence();
  __syncthreads();
  if (thread == 0) atomicInc(blocks, gridDim.x - 1);
}

template <Mistake kMistake>
void run_as(const simt::Request& request) {
  const auto threads = static_cast<int>(request.i("threads")), n = static_cast<int>(request.i("n"));
  launch("sum_kernel", sum_kernel<kMistake>, {{n / threads}, threads, threads * 4 + threads / 32 * 4, true},
         request.stream(), request.t<const float>("x"), request.t<float>("y"), request.t<int>("counter"),
         request.t<unsigned>("blocks"), n);
}

template <int kFirst, int kLast>
void run_any(const simt::Request& request) {
  if (request.i("mistake") == kFirst) return run_as<static_cast<Mistake>(kFirst)>(request);
  if constexpr (kFirst < kLast) run_any<kFirst + 1, kLast>(request);
}

const simt::Registration kSum("sum", run_any<0, static_cast<int>(Mistake::kOutsideMask)>);

// --- what the tensor cores are said to do ----------------------------------------------------------------------------

// c [16, 8] = a [16, 16] b, b given as [8, 16] (loaded as it is) or as [16, 8] (loaded transposed).
template <typename T>
__global__ void product_kernel(const T* a, const T* b, float* c, bool is_transposed) {
  const int lane = static_cast<int>(threadIdx.x);
  const Shared<T> tile_a = dynamic_shared<T>(), tile_b = dynamic_shared<T>(16 * 16 * 2);
  for (int i = lane; i < 256; i += 32) tile_a[i] = a[i];
  for (int i = lane; i < 256; i += 32) tile_b[i] = i < 128 ? b[i] : T{0};
  __syncwarp();
  uint32_t ra[4], rb[4];
  load_matrices(ra, tile_a + lane % 16 * 16 + lane / 16 * 8);
  if (is_transposed) {
    load_matrices_transposed(rb, tile_b + lane % 16 * 8);  // matrices 0 and 1 are rows 0-7 and 8-15
  } else {
    load_matrices(rb, tile_b + lane % 8 * 16 + lane / 8 % 2 * 8);
  }
  float sums[4] = {0, 0, 0, 0};
  const uint32_t pair[2] = {rb[0], rb[1]};
  multiply_add(sums, ra, pair, T{});
  for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// c [16, 8] = a [16, 8] b [8, 8] in TF32.
__global__ void product_tf32_kernel(const float* a, const float* b, float* c) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const uint32_t ra[4] = {to_tf32(a[g * 8 + t]), to_tf32(a[(g + 8) * 8 + t]), to_tf32(a[g * 8 + t + 4]),
                          to_tf32(a[(g + 8) * 8 + t + 4])};
  const uint32_t rb[2] = {to_tf32(b[t * 8 + g]), to_tf32(b[(t + 4) * 8 + g])};
  float sums[4] = {0, 0, 0, 0};
  multiply_add_tf32(sums, ra, rb);
  for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = sums[i];
}

template <typename T>
void run_product_as(const simt::Request& request) {
  launch("product_kernel", product_kernel<T>, {{1}, 32, 1024}, request.stream(), request.t<const T>("a"),
         request.t<const T>("b"), request.t<float>("c"), request.i("is_transposed") != 0);
}

void run_product(const simt::Request& request) {
  switch (request.dtype("dtype")) {
    case DType::kFloat32:
      return launch("product_tf32_kernel", product_tf32_kernel, {{1}, 32}, request.stream(),
                    request.t<const float>("a"), request.t<const float>("b"), request.t<float>("c"));
    case DType::kBFloat16:
      return run_product_as<bf16>(request);
    case DType::kFloat16:
      return run_product_as<f16>(request);
  }
}

const simt::Registration kProduct("product", run_product);

}  // namespace
}  // namespace alula
