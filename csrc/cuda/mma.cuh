// Products of one warp on tensor cores, tile by tile, for attention: scores S [16, n] = Q K^T and sums O [16, D] += P
// V.
//
// 16-bit types: m16n8k16, operands by ldmatrix. fp32: three TF32 products of m16n8k8 in place of one, each operand
// split into a leading and a trailing part (a b = a1 b1 + a1 b2 + a2 b1 + a part below fp32's own rounding of sums).
// Between the two products nothing moves: the lanes' scores, as they come out of the first, are the left operand of the
// second. For TF32 that takes another order of keys within a step, the same on both sides.
#pragma once

#include "cuda/hardware.cuh"

namespace alula {

template <typename T>
struct WarpProduct {
  static constexpr int kDepth = 16;  // K of one step
  struct Left {
    uint32_t r[4];
  };
  struct Right {
    uint32_t r[2];
  };

  // Rows 0-15, columns 0-15 of a row-major tile in shared memory.
  static __device__ __forceinline__ void load_left(Left& a, Shared<T> tile, int stride, int lane) {
    load_matrices(a.r, tile + lane % 16 * stride + lane / 16 * 8);
  }

  // Two right operands [16, 8] from rows 0-15 (features 0-7 and 8-15), columns 0-15 (depth) of a row-major tile.
  static __device__ __forceinline__ void load_right_rows(Right (&b)[2], Shared<T> tile, int stride, int lane) {
    uint32_t r[4];
    load_matrices(r, tile + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8);
    b[0].r[0] = r[0], b[0].r[1] = r[1], b[1].r[0] = r[2], b[1].r[1] = r[3];
  }

  // Two right operands [16, 8] from columns 0-7 and 8-15, rows 0-15 (depth) of a row-major tile.
  static __device__ __forceinline__ void load_right_columns(Right (&b)[2], Shared<T> tile, int stride, int lane) {
    uint32_t r[4];
    load_matrices_transposed(r, tile + lane % 16 * stride + lane / 16 * 8);
    b[0].r[0] = r[0], b[0].r[1] = r[1], b[1].r[0] = r[2], b[1].r[1] = r[3];
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], const Left& a, const Right& b) {
    multiply_add(c, a.r, b.r, T{});
  }

  // Columns 0-15 of scores, that is two tiles of 8, as a left operand.
  static __device__ __forceinline__ Left left_of(const float (*scores)[4]) {
    return {{pair_of<T>(scores[0][0], scores[0][1]), pair_of<T>(scores[0][2], scores[0][3]),
             pair_of<T>(scores[1][0], scores[1][1]), pair_of<T>(scores[1][2], scores[1][3])}};
  }
};

template <>
struct WarpProduct<float> {
  static constexpr int kDepth = 8;
  struct Left {
    uint32_t large[4], small[4];
  };
  struct Right {
    uint32_t large[2], small[2];
  };

  static __device__ __forceinline__ void split(float x, uint32_t& large, uint32_t& small) {
    large = to_tf32(x);
    small = to_tf32(x - float_of_bits(large));
  }

  static __device__ __forceinline__ void load_left(Left& a, Shared<float> tile, int stride, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) split(tile[(g + i % 2 * 8) * stride + t + i / 2 * 4], a.large[i], a.small[i]);
  }

  static __device__ __forceinline__ void load_right_rows(Right (&b)[2], Shared<float> tile, int stride, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        split(tile[(half * 8 + g) * stride + t + 4 * i], b[half].large[i], b[half].small[i]);
      }
    }
  }

  // Depth t of a step is row 2 t, depth t + 4 row 2 t + 1: the columns of the scores that lane t holds.
  static __device__ __forceinline__ void load_right_columns(Right (&b)[2], Shared<float> tile, int stride, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        split(tile[(2 * t + i) * stride + half * 8 + g], b[half].large[i], b[half].small[i]);
      }
    }
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], const Left& a, const Right& b) {
    multiply_add_tf32(c, a.small, b.large);
    multiply_add_tf32(c, a.large, b.small);
    multiply_add_tf32(c, a.large, b.large);
  }

  static __device__ __forceinline__ Left left_of(const float (*scores)[4]) {
    Left a;
    split(scores[0][0], a.large[0], a.small[0]);
    split(scores[0][2], a.large[1], a.small[1]);
    split(scores[0][1], a.large[2], a.small[2]);
    split(scores[0][3], a.large[3], a.small[3]);
    return a;
  }
};

}  // namespace alula
