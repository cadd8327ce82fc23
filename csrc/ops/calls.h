// The two halves of an op that decoder_blocks strings together: a check, which turns tensors into the kernel's
// arguments, and a run, which shares them out over threads. linear, qkv_projection and attention are one of each.
#pragma once

#include <vector>

#include "core/tensor.h"
#include "ops/attention.h"
#include "ops/linear.h"
#include "ops/qkv_projection.h"

namespace alula {

// Arguments, and the tensors that they point into.
template <typename Args>
struct Call {
  Args args;
  std::vector<Tensor> kept;

  const void* keep(const Tensor& t) {
    kept.push_back(t);
    return t.const_data_ptr();
  }
  const void* keep(const OptionalTensor& t) { return t ? keep(*t) : nullptr; }
};

// The part of both products that does not change from call to call: checked weights, no input, no rows. `like`, named
// `like_name` in errors, has the dtype of the activations.
Call<PanelGemmArgs> check_gemm_weights(const Tensor& weight, int64_t format, int64_t out_features, int64_t in_features,
                                       const Tensor& like, const char* like_name, const OptionalTensor& bias,
                                       const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                       double norm_eps);

// Without `out`.
Call<LinearArgs> check_linear(const Tensor& x, const Tensor& weight, int64_t out_features, const OptionalTensor& bias,
                              const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps,
                              int64_t activation, const OptionalTensor& residual, int64_t format);
void run_linear(const LinearArgs& args);

// Without `q`.
Call<QkvProjectionArgs> check_qkv_projection(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                             const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                             double norm_eps, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                                             const Tensor& kv_cache, const Tensor& positions,
                                             const OptionalTensor& rotary_table, const OptionalTensor& rotary_positions,
                                             const OptionalTensor& mlp, int64_t mlp_activation, int64_t format);
void run_qkv_projection(const QkvProjectionArgs& args);
// Of the columns only keys and values, and what shares a panel with them.
void run_keys_and_values(const QkvProjectionArgs& args);

// Without `out` and `out_stride`.
Call<AttentionArgs> check_attention(const Tensor& q, const Tensor& kv_cache, const Tensor& positions,
                                    const Tensor& lengths, const OptionalTensor& mask, const OptionalTensor& head_mask,
                                    double scale, bool causal);

// How an attention is cut up: the same for every layer of a pass. Kept by each calling thread, so that a step of
// decoding allocates nothing.
struct AttentionPlan {
  enum class Way { kOneThread, kRowTiles, kKeyTiles } way;
  std::vector<int32_t> tokens, limits;  // of all batch rows, one after another
  std::vector<AttentionTile> tiles;
  double multiply_adds, elements;
  // kKeyTiles. Per tile and one more at the end: its first item, where its partials begin. Per tile: items not done.
  std::vector<int64_t> first_item, offsets;
  std::vector<int32_t> pending;
  char* partials;
  size_t scratch_bytes;  // of each thread
};

// Cuts up `args` by the positions and lengths that its check has seen.
AttentionPlan& plan_attention(const AttentionArgs& args);
// Working memory of the calling thread, so that run_attention needs none and cannot fail.
void reserve_attention(const AttentionPlan& plan);
// Attends by the plan of `args`, or of arguments that differ in pointers, scale and head mask alone.
void run_attention(const AttentionArgs& args, AttentionPlan& plan);

}  // namespace alula
