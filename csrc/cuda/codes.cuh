// The codes of a quantized weight (cpu/weight_format.h) as operands of the tensor cores, unpacked in registers.
//
// A product has 32 rows of W, a panel, as its left operands (two tiles of 16 rows) and rows of X as right operands. A
// sum over K may run in any order, so the four neighbours of K that lie together in a panel are said to be those that
// one lane holds of a step of 16 k: a word of 8-bit codes is a row's share of an operand as it lies in memory, and so
// is either half of a word of 4-bit codes. With g = lane / 4 and t = lane % 4, a lane has k 4 t .. 4 t + 3 of each
// step, of rows row_of<kCodes>(tile, g) and the next.
//
// Codes become whole numbers, which 16-bit types and TF32 hold exactly (nf4: the table's values, rounded to T); scales
// multiply fp32 sums. So nothing of a weight is rounded but nf4's table. Words of 16-bit types are made without a
// conversion: a code in the low bits of 1024 (fp16) or 128 (bf16) is that number plus the code.
#pragma once

#include <bit>
#include <type_traits>

#include "cpu/weight_format.h"
#include "cuda/hardware.cuh"
#include "cuda/vec.cuh"

namespace alula {

// How codes become numbers. kInt4 is the asymmetric format, too.
enum class Codes { kInt8, kInt4, kNf4 };

// Four neighbours of K of one row.
template <typename T>
struct Quad {
  uint32_t pairs[2];
};
template <>
struct Quad<float> {
  float values[4];
};

// The first of the two neighbouring rows of a panel whose sums a lane holds in tile 0 or 1.
template <Codes kCodes>
__device__ __forceinline__ int row_of(int tile, int g) {
  return kCodes == Codes::kInt8 ? 4 * g + 2 * tile : 16 * tile + 2 * g;
}

// What the pairs of a quad of 16-bit values are: neighbours 0 and 1, 2 and 3; or, where X has been laid out so, too, 0
// and 2, 1 and 3, which takes no moving of bytes.
enum class Order { kPlain, kSpread };

// The bytes of a word, one in each half of two words.
template <Order kOrder>
__device__ __forceinline__ uint32_t bytes_of_pair(uint32_t word, int pair) {
  if constexpr (kOrder == Order::kSpread) return word >> 8 * pair;  // the byte above it is masked out
  return pick_bytes(word, 0, pair == 0 ? 0x4140 : 0x4342);
}

// 8-bit codes, less 128.
template <typename T, Order kOrder = Order::kPlain>
__device__ __forceinline__ Quad<T> quad_of_bytes(uint32_t word) {
  Quad<T> quad;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; i++) quad.values[i] = float_of_bits(0x4b000000 | (word >> 8 * i & 0xff)) - 8388736.0f;
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t bytes = bytes_of_pair<kOrder>(word, i);
      if constexpr (std::is_same_v<T, f16>) {
        quad.pairs[i] = add_pairs(masked_or(bytes, 0x00ff00ff, 0x64006400), 0xe480e480, T{});  // 1024 + code - 1152
      } else {
        // 128 + the low 7 bits, less 128 where bit 7 is set and less 256 where it is not.
        quad.pairs[i] =
            add_pairs(masked_or(bytes, 0x007f007f, 0x43004300), masked_xor(bytes, 0x00800080, 0xc380c380), T{});
      }
    }
  }
  return quad;
}

// What 4-bit codes count from, `zero`, as quads_of_nibbles wants it.
template <typename T>
__device__ __forceinline__ uint32_t nibble_offset(float zero) {
  if constexpr (std::is_same_v<T, float>) {
    return 0;
  } else {
    const float base = std::is_same_v<T, f16> ? 1024.0f : 128.0f;
    return pair_of<T>(-base - zero, -base - zero);
  }
}

// 4-bit codes of rows r (low halves of the bytes) and r + 16 (high halves), less `zero`.
template <typename T, Order kOrder = Order::kPlain>
__device__ __forceinline__ void quads_of_nibbles(Quad<T>& low, Quad<T>& high, uint32_t word, float zero,
                                                 uint32_t offset) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      low.values[i] = float_of_bits(0x4b000000 | (word >> 8 * i & 15)) - 8388608.0f - zero;
      high.values[i] = float_of_bits(0x4b000000 | (word >> (8 * i + 4) & 15)) - 8388608.0f - zero;
    }
  } else {
    constexpr uint32_t kBase = std::is_same_v<T, f16> ? 0x64006400 : 0x43004300;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t bytes = bytes_of_pair<kOrder>(word, i);
      low.pairs[i] = add_pairs(masked_or(bytes, 0x000f000f, kBase), offset, T{});
      high.pairs[i] = add_pairs(masked_or(bytes >> 4, 0x000f000f, kBase), offset, T{});
    }
  }
}

// --- nf4 -------------------------------------------------------------------------------------------------------------

// Bits of kNf4[code] in T: fp32's own, or rounded to the nearest.
template <typename T>
constexpr uint32_t nf4_bits(int code) {
  const auto bits = std::bit_cast<uint32_t>(kNf4[code]);
  if (std::is_same_v<T, float>) return bits;
  if (std::is_same_v<T, bf16>) return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  if (kNf4[code] == 0.0f) return 0;
  // All others are normal numbers in fp16: 10 bits after the point, exponents count from 15 in place of 127.
  const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  return (rounded >> 16 & 0x8000) | ((rounded & 0x7fffffff) - (112u << 23)) >> 13;
}

// Byte `byte` of the values of codes 4 * quarter .. 4 * quarter + 3.
template <typename T>
constexpr uint32_t nf4_bytes(int byte, int quarter) {
  uint32_t bytes = 0;
  for (int i = 0; i < 4; i++) bytes |= (nf4_bits<T>(4 * quarter + i) >> 8 * byte & 0xff) << 8 * i;
  return bytes;
}

// The table's byte `kByte` as four words; scalars, found by the host's compiler.
template <typename T, int kByte>
struct Nf4Bytes {
  static constexpr uint32_t k0 = nf4_bytes<T>(kByte, 0), k1 = nf4_bytes<T>(kByte, 1), k2 = nf4_bytes<T>(kByte, 2),
                            k3 = nf4_bytes<T>(kByte, 3);
};

// That byte of four codes' values. `codes`: the codes, a nibble each, less their highest bit; `upper`: which of two
// tables of eight.
template <typename T, int kByte>
__device__ __forceinline__ uint32_t look_up_bytes(uint32_t codes, uint32_t upper) {
  using Table = Nf4Bytes<T, kByte>;
  return pick_bytes(pick_bytes(Table::k0, Table::k1, codes), pick_bytes(Table::k2, Table::k3, codes), upper);
}

template <typename T>
__device__ __forceinline__ void quads_of_nf4(Quad<T>& low, Quad<T>& high, uint32_t word) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    // Four codes: (row r, k), (row r + 16, k), (row r, k + 1), (row r + 16, k + 1) with k = 2 i.
    const uint32_t half = word >> 16 * i, codes = half & 0x7777, upper = (half >> 1 & 0x4444) | 0x3210;
    if constexpr (std::is_same_v<T, float>) {
      const uint32_t b0 = look_up_bytes<T, 0>(codes, upper), b1 = look_up_bytes<T, 1>(codes, upper);
      const uint32_t b2 = look_up_bytes<T, 2>(codes, upper), b3 = look_up_bytes<T, 3>(codes, upper);
      const uint32_t low01 = pick_bytes(b0, b1, 0x6240), low23 = pick_bytes(b2, b3, 0x6240);
      const uint32_t high01 = pick_bytes(b0, b1, 0x7351), high23 = pick_bytes(b2, b3, 0x7351);
      low.values[2 * i] = float_of_bits(pick_bytes(low01, low23, 0x5410));
      low.values[2 * i + 1] = float_of_bits(pick_bytes(low01, low23, 0x7632));
      high.values[2 * i] = float_of_bits(pick_bytes(high01, high23, 0x5410));
      high.values[2 * i + 1] = float_of_bits(pick_bytes(high01, high23, 0x7632));
    } else {
      const uint32_t b0 = look_up_bytes<T, 0>(codes, upper), b1 = look_up_bytes<T, 1>(codes, upper);
      low.pairs[i] = pick_bytes(b0, b1, 0x6240);
      high.pairs[i] = pick_bytes(b0, b1, 0x7351);
    }
  }
}

// --- operands and products -------------------------------------------------------------------------------------------

// The left operands of one step of 16 k: a lane's two neighbouring rows of each tile of 16.
template <typename T>
struct PanelStep {
  Quad<T> rows[2][2];  // [tile][row]
};

// From the words of rows 4 g .. 4 g + 3.
template <typename T, Order kOrder = Order::kPlain>
__device__ __forceinline__ PanelStep<T> step_of_bytes(const uint32_t (&words)[4]) {
  PanelStep<T> step;
#pragma unroll
  for (int i = 0; i < 4; i++) step.rows[i / 2][i % 2] = quad_of_bytes<T, kOrder>(words[i]);
  return step;
}

// From the words of rows 2 g and 2 g + 1, which hold rows 16 further, too.
template <typename T, Codes kCodes, Order kOrder = Order::kPlain>
__device__ __forceinline__ PanelStep<T> step_of_nibbles(const uint32_t (&words)[2], float zero, uint32_t offset) {
  PanelStep<T> step;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if constexpr (kCodes == Codes::kNf4) {
      static_assert(kOrder == Order::kPlain, "the table's values come in the order of K");
      quads_of_nf4<T>(step.rows[0][i], step.rows[1][i], words[i]);
    } else {
      quads_of_nibbles<T, kOrder>(step.rows[0][i], step.rows[1][i], words[i], zero, offset);
    }
  }
  return step;
}

template <typename T>
__device__ __forceinline__ Quad<T> quad_of_ones() {
  if constexpr (std::is_same_v<T, float>) {
    return {{1.0f, 1.0f, 1.0f, 1.0f}};
  } else {
    return {{pair_of<T>(1.0f, 1.0f), pair_of<T>(1.0f, 1.0f)}};
  }
}

template <typename T>
__device__ __forceinline__ Quad<T> quad_of_values(const float (&v)[4]) {
  if constexpr (std::is_same_v<T, float>) {
    return {{v[0], v[1], v[2], v[3]}};
  } else {
    return {{pair_of<T>(v[0], v[1]), pair_of<T>(v[2], v[3])}};
  }
}

// c [16 rows of W, 8 rows of X] += w x^T over 16 k. A lane holds of c
//   [0], [1]: its first row of W, rows 2 t and 2 t + 1 of X;   [2], [3]: its second row of W.
// fp32: x is split into two TF32 values, 22 bits; so is w where kIsExact does not say that it is one.
template <typename T, bool kIsExact>
__device__ __forceinline__ void multiply_step(float (&c)[4], const Quad<T> (&w)[2], const Quad<T>& x) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      uint32_t large[4], small[4], x_large[2], x_small[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        x_large[j] = to_tf32(x.values[i + j]);
        x_small[j] = to_tf32(x.values[i + j] - float_of_bits(x_large[j]));
#pragma unroll
        for (int row = 0; row < 2; row++) {
          const float value = w[row].values[i + j];
          large[2 * j + row] = to_tf32(value);
          small[2 * j + row] = to_tf32(value - float_of_bits(large[2 * j + row]));
        }
      }
      if constexpr (!kIsExact) multiply_add_tf32(c, small, x_large);
      multiply_add_tf32(c, large, x_small);
      multiply_add_tf32(c, large, x_large);
    }
  } else {
    const uint32_t a[4] = {w[0].pairs[0], w[1].pairs[0], w[0].pairs[1], w[1].pairs[1]};
    multiply_add(c, a, x.pairs, T{});
  }
}

}  // namespace alula
