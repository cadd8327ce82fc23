// Several values at once: 16-byte loads and stores of any dtype, widened to fp32.
#pragma once

#include <type_traits>

#include "cuda/hardware.cuh"

namespace alula {

// N values side by side, moved by one instruction where N * sizeof(T) is 4, 8 or 16.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

// Values of T in 16 bytes.
template <typename T>
constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));

template <int N, typename T>
__device__ __forceinline__ void load_pack(float (&x)[N], const T* from) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = to_float(pack.values[i]);
}

// N values as they lie in memory, in registers of 32 bits. A Pack of 16-bit values that is loaded under a condition is
// taken apart value by value (seen in machine code: two instructions each); words are not.
template <typename T, int N>
struct alignas(sizeof(T) * N) Words {
  static constexpr int kWords = N * static_cast<int>(sizeof(T)) / 4;
  uint32_t words[kWords];
};

template <int N, typename T>
__device__ __forceinline__ void widen(float (&x)[N], const Words<T, N>& from) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    if constexpr (std::is_same_v<T, float>) {
      x[i] = float_of_bits(from.words[i]);
    } else if constexpr (std::is_same_v<T, bf16>) {
      x[i] = float_of_bits(i % 2 == 0 ? from.words[i / 2] << 16 : from.words[i / 2] & 0xffff0000);
    } else {
      x[i] = to_float(T{static_cast<uint16_t>(from.words[i / 2] >> 16 * (i % 2))});
    }
  }
}

// To global memory; fp32 by two instructions of 16 bytes where N is 8.
template <int N, typename T>
__device__ __forceinline__ void store_pack(T* to, const float (&x)[N]) {
  constexpr int kAtOnce = N < kPackSize<T> ? N : kPackSize<T>;
  if constexpr (N * sizeof(T) < 4) {
    to[0] = from_float<T>(x[0]);
  } else {
#pragma unroll
    for (int first = 0; first < N; first += kAtOnce) {
      uint32_t words[kAtOnce * static_cast<int>(sizeof(T)) / 4];
      if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < kAtOnce; i += 2) words[i / 2] = pair_of<T>(x[first + i], x[first + i + 1]);
      } else {
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) words[i] = bits_of_float(x[first + i]);
      }
      store_words(to + first, words);
    }
  }
}

// Whether a pointer may be read 16 bytes at a time.
inline bool is_aligned_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace alula
