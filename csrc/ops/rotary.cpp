#include "ops/rotary.h"

#include <array>
#include <tuple>

#include "core/cuda.h"
#include "core/refuse_grad.h"
#include "core/trace.h"
#include "cpu/parallel.h"
#include "ops/kv_cache.h"

namespace alula {
namespace {

RotaryArgs rotary_args(const Tensor& x, const char* name, const Tensor& out, const Tensor& positions,
                       const Tensor& table, bool is_interleaved) {
  ALULA_CHECK(x.stride(3) == 1, name, " has stride ", x.stride(3),
              " in its last dimension; it must be contiguous there");
  return {
      .dtype = value_dtype(x, name),
      .tokens = x.size(1),
      .num_heads = x.size(2),
      .head_dim = x.size(3),
      .rotary_dim = table.size(1),
      .is_interleaved = is_interleaved,
      .x = x.const_data_ptr(),
      .x_strides = {x.stride(0), x.stride(1), x.stride(2)},
      .out = out.mutable_data_ptr(),
      .out_strides = {out.stride(0), out.stride(1), out.stride(2)},
      .positions = static_cast<const int32_t*>(positions.const_data_ptr()),
      .table = static_cast<const float*>(table.const_data_ptr()),
  };
}

// Both tensors in one pass over the tokens, so that a token's table row is read once.
void run(const Tensor& q, const Tensor& k, const Tensor& q_out, const Tensor& k_out, const Tensor& positions,
         const Tensor& table, bool is_interleaved) {
  const Place place = place_of(q, "q");
  check_place(k, "k", place);
  ALULA_CHECK(q.dim() == 4, "q has shape ", shape_of(q), "; expected [B, T, H, D]");
  const int64_t batch = q.size(0), tokens = q.size(1), head_dim = q.size(3);
  check_shape(k, "k", {batch, tokens, -1, head_dim}, "[B, T, G, D]");
  check_dtype(k, "k", q.scalar_type(), "q");
  ALULA_CHECK(head_dim <= kMaxHeadDim, "head_dim is ", head_dim, "; accepted: up to ", kMaxHeadDim);
  const Tensor where = checked_positions(positions, batch, tokens, place);
  const Tensor angles = checked_rotary_table(table, head_dim, place);
  if (!place.is_cuda()) check_rotary_positions(where, angles);
  const RotaryArgs of_q = rotary_args(q, "q", q_out, where, angles, is_interleaved);
  const RotaryArgs of_k = rotary_args(k, "k", k_out, where, angles, is_interleaved);
  if (place.is_cuda()) {
    if (batch * tokens == 0) return;
    const CudaScope scope(q);
    ALULA_TRACE_CUDA("rotary", of_q.dtype, size_class(batch * tokens), " tokens, head size ", head_dim,
                     is_interleaved ? ", interleaved" : ", halves");
    const IdNotes notes(scope);
    ALULA_CUDA_CALL(rotary_cuda(of_q, of_k, batch * tokens, angles.size(0), notes.faults(), scope.stream()));
    notes.raise_if_waiting();
    return;
  }
  ALULA_TRACE("rotary", of_q.dtype, size_class(batch * tokens), " tokens, head size ", head_dim,
              is_interleaved ? ", interleaved" : ", halves");
  const RotaryKernels& kernels = ALULA_KERNELS(kRotary);
  const int64_t values = (of_q.num_heads + of_k.num_heads) * head_dim;
  parallel_ranges(batch * tokens, 1 + 16384 / (values + 1), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++) {
      kernels.rotate(of_q, token, token + 1);
      kernels.rotate(of_k, token, token + 1);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& table,
                                  bool is_interleaved) {
  const Tensor q_in = as_contiguous(q), k_in = as_contiguous(k);
  const Place place = place_of(q, "q");
  Tensor q_out = new_tensor(q.sizes(), q.scalar_type(), place);
  Tensor k_out = new_tensor(k.sizes(), k.scalar_type(), place);
  run(q_in, k_in, q_out, k_out, positions, table, is_interleaved);
  return {q_out, k_out};
}

void rotary_(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& table, bool is_interleaved) {
  check_own_memory(q, "q");
  check_own_memory(k, "k");
  run(q, k, q, k, positions, table, is_interleaved);
}

STABLE_TORCH_LIBRARY_IMPL(alula, CPU, m) {
  m.impl("rotary", ALULA_BOX(rotary));
  m.impl("rotary_", ALULA_BOX(rotary_));
}

STABLE_TORCH_LIBRARY_IMPL(alula, CUDA, m) {
  m.impl("rotary", ALULA_BOX(rotary));
  m.impl("rotary_", ALULA_BOX(rotary_));
}

}  // namespace alula
