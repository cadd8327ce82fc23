// What follows the product of qkv_projection on CUDA: bias, split, rotary, the write into the cache and the MLP's
// activation, of some neighbouring features at a time.
//
// Head sizes are multiples of 8, so the features of a pack belong to one head, and two neighbours of even number are
// what the rotary embedding turns together. What the host checks of positions on the CPU cannot be checked here without
// waiting: a slot beyond the cache is written nowhere, a rotary position outside the table gives NaN and is noted for
// the host.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/note_id.cuh"
#include "cuda/vec.cuh"
#include "ops/qkv_projection.h"

namespace alula {

template <typename T>
struct QkvEpilogue {
  QkvProjectionArgs args;
  QkvPlaces places;

  // Features [feature, + N) of a row; of two, the second may be one too many, behind q, k and v.
  template <int N>
  __device__ __forceinline__ void operator()(int64_t row, int feature, float (&y)[N]) const {
    const int head_dim = static_cast<int>(args.head_dim), d = feature % head_dim;
    const int q_features = static_cast<int>(args.num_heads) * head_dim;
    const int k_end = q_features + static_cast<int>(args.num_kv_heads) * head_dim;
    const int qkv_features = k_end + static_cast<int>(args.num_kv_heads) * head_dim;
    const bool has_all = N > 2 || feature + 1 < args.gemm.n;
    if (args.gemm.bias != nullptr) {
      const T* bias = static_cast<const T*>(args.gemm.bias) + feature;
      float b[N] = {};
      if constexpr (N > 2) {
        load_pack(b, bias);
      } else {
        b[0] = to_float(bias[0]);
        if (has_all) b[1] = to_float(bias[1]);
      }
#pragma unroll
      for (int i = 0; i < N; i++) y[i] += b[i];
    }
    if (feature >= qkv_features) {
      activate_all(static_cast<Activation>(args.mlp_activation), y);
      store(static_cast<T*>(args.mlp) + row * args.mlp_stride + feature - qkv_features, y, has_all);
      return;
    }
    if (args.rotary_table != nullptr && feature < k_end && d < args.rotary_dim) {
      const int64_t position = args.rotary_positions[row];
      const bool is_there = position >= 0 && position < places.num_rotary_positions;
      if (!is_there) note_id(places.faults, IdKind::kRotaryPosition, position, places.num_rotary_positions);
      const float* angle = args.rotary_table + (is_there ? position : 0) * args.rotary_dim + d / 2;
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        if (d + i >= args.rotary_dim) break;
        const float cosine = is_there ? angle[i / 2] : NAN, sine = is_there ? angle[args.rotary_dim / 2 + i / 2] : NAN;
        const float turned = y[i] * cosine - y[i + 1] * sine;
        y[i + 1] = y[i + 1] * cosine + y[i] * sine;
        y[i] = turned;
      }
    }
    T* to = static_cast<T*>(args.q) + row * q_features + feature;
    if (feature >= q_features) {
      const int64_t slot = args.positions[row];
      if (slot < 0 || slot >= places.num_slots) return;
      const bool is_value = feature >= k_end;
      const int head = (feature - (is_value ? k_end : q_features)) / head_dim;
      to = static_cast<T*>(args.kv_cache) + row / args.tokens * args.kv_strides[0] + head * args.kv_strides[1] +
           slot * args.kv_strides[2] + (is_value ? head_dim : 0) + d;
    }
    store(to, y, true);
  }

  template <int N>
  static __device__ __forceinline__ void store(T* to, const float (&y)[N], bool has_all) {
    if constexpr (N > 2) {
      store_pack(to, y);
    } else {
      to[0] = from_float<T>(y[0]);
      if (has_all) to[1] = from_float<T>(y[1]);
    }
  }

  // Whether it may be called with packs of 16 bytes.
  bool takes_packs() const {
    const int64_t strides = args.kv_strides[0] | args.kv_strides[1] | args.kv_strides[2];
    return (args.gemm.n | args.mlp_stride | strides) % kPackSize<T> == 0 && is_aligned_16(args.gemm.bias) &&
           is_aligned_16(args.q) && is_aligned_16(args.mlp) && is_aligned_16(args.kv_cache);
  }
};

}  // namespace alula
