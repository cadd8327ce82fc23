// Every op of the library: its schema, one line each. Meanings: python/alula/ops/<name>.py; kernels:
// ops/<name>_cpu.cpp.
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(alula, m) {
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("unpack_weight(Tensor packed, int out_features, int in_features) -> Tensor");
  m.def("quantize_weight(Tensor weight, int format) -> Tensor");
  m.def("quantize_columns(Tensor weight, Tensor factor, int format) -> (Tensor, Tensor)");
  m.def("dequantize_weight(Tensor packed, int out_features, int in_features, int format, ScalarType dtype) -> Tensor");
  m.def("embedding(Tensor input_ids, Tensor packed, int num_embeddings, int embedding_dim, Tensor? position_ids, Tensor? position_table, Tensor? token_type_ids, Tensor? token_type_table=None, float scale=1.0, int format=0, ScalarType? dtype=None) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, int out_features, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, int activation, Tensor? residual, int format=0) -> Tensor");
  m.def("cache_layers(Tensor like, int count, int[] sizes) -> Tensor[]");
  m.def("qkv_projection(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, int num_heads, int num_kv_heads, int head_dim, Tensor(a!) kv_cache, Tensor positions, Tensor? rotary_table=None, Tensor? rotary_positions=None, Tensor(b!)? mlp=None, int mlp_activation=0, int format=0) -> Tensor");
  m.def("rotary(Tensor q, Tensor k, Tensor positions, Tensor table, bool is_interleaved) -> (Tensor, Tensor)");
  m.def("rotary_(Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor table, bool is_interleaved) -> ()");
  m.def("attention(Tensor q, Tensor kv_cache, Tensor positions, Tensor lengths, Tensor? mask, Tensor? head_mask, float scale, bool causal) -> Tensor");
  m.def("attention_into(Tensor q, Tensor kv_cache, Tensor positions, Tensor lengths, Tensor? mask, Tensor? head_mask, float scale, bool causal, Tensor(a!) out) -> ()");
  m.def("block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor entries, Tensor? global_tokens, int block_size, Tensor? first, Tensor? lengths, Tensor? mask, Tensor? head_mask, float scale, bool causal, Tensor? schedule=None, int num_partials=0) -> Tensor");
  m.def("bind_decoder_blocks(Tensor[] weights, int[] formats, bool is_parallel, int num_heads, int num_kv_heads, int head_dim, int mlp_width, float[] scales, float norm_eps, int activation) -> int");
  m.def("decoder_blocks(Tensor x, int blocks, Tensor(a!)[] kv_caches, Tensor positions, Tensor lengths, Tensor? mask, Tensor[] head_masks, bool causal, Tensor? rotary_table, Tensor? rotary_positions, int tokens_to_keep=0) -> Tensor");
  m.def("scaled_masked_softmax(Tensor scores, Tensor? mask, float scale, bool causal, ScalarType? dtype) -> Tensor");
  m.def("choose_token(Tensor scores, Tensor? drawn, Tensor pad_id, Tensor? eos_ids, bool advances, Tensor(a!) tokens, Tensor(b!) running, Tensor(c!) out, Tensor(d!) step, Tensor(e!) report, Tensor(f!) lengths, Tensor(g!) positions, Tensor(h!) slots, Tensor(i!) seen) -> ()");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? residual) -> Tensor");
}
// clang-format on
