// What follows the product of qkv_projection on CUDA: bias, split, rotary, the write into the cache and the MLP's
// activation, two neighbouring features at a time.
//
// Head sizes are multiples of 8, so two neighbouring features of even number are a pair of one head: what the rotary
// embedding turns together. What the host checks of positions on the CPU cannot be checked here without waiting: a
// slot beyond the cache is written nowhere, a rotary position outside the table gives NaN and is noted for the host.
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

  __device__ __forceinline__ void operator()(int64_t row, int feature, float y0, float y1) const {
    const int head_dim = static_cast<int>(args.head_dim), d = feature % head_dim;
    const int q_features = static_cast<int>(args.num_heads) * head_dim;
    const int k_end = q_features + static_cast<int>(args.num_kv_heads) * head_dim;
    const int qkv_features = k_end + static_cast<int>(args.num_kv_heads) * head_dim;
    const bool has_second = feature + 1 < args.gemm.n;  // of q, k and v always
    if (args.gemm.bias != nullptr) {
      const T* bias = static_cast<const T*>(args.gemm.bias) + feature;
      y0 += to_float(bias[0]);
      if (has_second) y1 += to_float(bias[1]);
    }
    if (feature >= qkv_features) {
      T* mlp = static_cast<T*>(args.mlp) + row * args.mlp_stride + feature - qkv_features;
      const auto activation = static_cast<Activation>(args.mlp_activation);
      mlp[0] = from_float<T>(activate(activation, y0));
      if (has_second) mlp[1] = from_float<T>(activate(activation, y1));
      return;
    }
    if (args.rotary_table != nullptr && feature < k_end && d < args.rotary_dim) {
      const int64_t position = args.rotary_positions[row];
      const bool is_there = position >= 0 && position < places.num_rotary_positions;
      if (!is_there) note_id(places.faults, IdKind::kRotaryPosition, position, places.num_rotary_positions);
      const float* angle = args.rotary_table + (is_there ? position : 0) * args.rotary_dim + d / 2;
      const float cosine = is_there ? angle[0] : NAN, sine = is_there ? angle[args.rotary_dim / 2] : NAN;
      const float turned = y0 * cosine - y1 * sine;
      y1 = y1 * cosine + y0 * sine;
      y0 = turned;
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
    to[0] = from_float<T>(y0);
    to[1] = from_float<T>(y1);
  }
};

}  // namespace alula
