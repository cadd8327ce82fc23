// What kernels ask of the hardware beyond plain C++: shared memory, asynchronous copies, tensor cores, conversions.
//
// The only file with PTX. tests/simt/cuda/hardware.cuh gives every name here its meaning in plain C++, so that the same
// kernel source runs on the host; barriers, shuffles, votes and atomics go by CUDA's own names there too.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace alula {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// --- shared memory -------------------------------------------------------------------------------------------------

// A pointer into shared memory. On the host it checks bounds, initialisation and the barriers between threads.
template <typename T>
using Shared = T*;

// The block's dynamic shared memory from `offset` bytes on. All shared memory is dynamic.
template <typename T>
__device__ __forceinline__ Shared<T> dynamic_shared(int offset = 0) {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory + offset);
}

template <typename To, typename From>
__device__ __forceinline__ Shared<To> shared_cast(From* pointer) {
  return reinterpret_cast<To*>(pointer);
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 16 bytes of global memory to shared memory, in the background; 16 zeros where `is_there` is false (the source is not
// read then). Both sides aligned to 16.
template <typename T>
__device__ __forceinline__ void copy_async_16(Shared<T> to, const void* from, bool is_there) {
  const int bytes = is_there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

// Closes a group of copies.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last `kPending` groups of this thread have arrived. Other threads' copies need a barrier after.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- tensor cores --------------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8. A lane gets of each the
// two neighbours at row lane / 4, columns 2 * (lane % 4) on.
template <typename T>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices.
template <typename T>
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8], fp32 sums. With g = lane / 4, t = lane % 4, a lane holds
//   a: (g, 2t..) (g+8, 2t..) (g, 2t+8..) (g+8, 2t+8..)   b: (2t.., g) (2t+8.., g)   c: (g, 2t..) (g+8, 2t..)
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c [16, 8] += a [16, 8] b [8, 8] of TF32 values (to_tf32), fp32 sums.
//   a: (g, t) (g+8, t) (g, t+4) (g+8, t+4)   b: (t, g) (t+4, g)   c: as above
__device__ __forceinline__ void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// fp32 rounded to 10 bits after the point, in a register of its own kind.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// --- numbers -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_of_float(float x) { return __float_as_uint(x); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two neighbours in one register, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pair_of(float low, float high);
template <>
__device__ __forceinline__ uint32_t pair_of<bf16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
__device__ __forceinline__ uint32_t pair_of<f16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// The sums of two pairs, each rounded to T.
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b, f16) {
  uint32_t y;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b, bf16) {
  uint32_t y;  // sm_80 has no sum of its own
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(0x3f803f80), "r"(b));
  return y;
}

// a & mask | bits in one instruction; written plainly, constants make it two (seen in machine code).
__device__ __forceinline__ uint32_t masked_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(a), "r"(mask), "r"(bits));
  return y;
}

// (a & mask) ^ bits, likewise.
__device__ __forceinline__ uint32_t masked_xor(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(y) : "r"(a), "r"(mask), "r"(bits));
  return y;
}

// Byte i is byte `selector >> 4 * i` (0 to 7) of b:a, a's first.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector));
  return y;
}

// 2^x, relative error 2^-22; 0 for -inf and below 2^-126, inf for inf. One instruction: numbers that small would take
// four.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- global memory -------------------------------------------------------------------------------------------------

// 16 bytes that this kernel reads once and nobody writes meanwhile: past the first-level cache. Not by ld.global.nc:
// the assembler moves such a load behind wait_for_previous_kernel(), where it comes too late (seen in machine code).
__device__ __forceinline__ void load_once(uint32_t (&r)[4], const void* from) {
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "l"(from));
}

// 4, 8 or 16 bytes of global memory, aligned, by one instruction: an assignment beside a branch may become one of each
// value (seen in machine code).
template <int N>
__device__ __forceinline__ void store_words(void* to, const uint32_t (&words)[N]) {
  static_assert(N == 1 || N == 2 || N == 4, "what one instruction stores");
  if constexpr (N == 1) {
    asm volatile("st.global.b32 [%0], %1;" ::"l"(to), "r"(words[0]) : "memory");
  } else if constexpr (N == 2) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(words[0]), "r"(words[1]) : "memory");
  } else {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
  }
}

// --- the kernels before and after in the stream (sm_90: programmatic dependent launch) -------------------------------
//
// In a captured graph a kernel starts when every block of the one before has called let_next_kernel_start() or has
// ended, which is before that one's results can be read, and before whatever came before it has ended unless it waited
// first. So: wait, then let the next one start; write nothing and read only weights before the wait.

// Until what the kernels before wrote can be read, and what they read can be overwritten.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may be started as soon as there is room for it: its blocks fetch their first weights while this one
// still works.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace alula
