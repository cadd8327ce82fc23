// qkv_projection: layer norm, product, bias, split into query and merged key/value, rotary, and the write into the
// cache. CodeGen's parallel block has its MLP's first matrix in the same product: its columns follow, with their
// activation.
#pragma once

#include "cpu/isa.h"
#include "cpu/panel_gemm_args.h"
#include "cuda/device.h"
#include "cuda/id_faults.h"
#include "cuda/quantized_product.h"

namespace alula {

struct QkvProjectionArgs {
  PanelGemmArgs gemm;         // M = B * T, N = (H + 2 * G) * D + F, rows of W: [q (H*D) | k (G*D) | v (G*D) | mlp (F)]
  int64_t tokens;             // T
  int64_t num_heads;          // H
  int64_t num_kv_heads;       // G
  int64_t head_dim;           // D
  void* q;                    // [B, T, H, D]
  void* kv_cache;             // [B, G, S, 2 * D]: key, then value; the last dimension is contiguous
  int64_t kv_strides[3];      // of B, G, S, in elements
  const int32_t* positions;   // [B, T]: the S where a token is written; negative: nowhere
  const float* rotary_table;  // [P, rotary_dim]: cosines, then sines (cpu/rotate.h, interleaved); null: no rotary
  const int32_t* rotary_positions;  // [B, T], each in [0, P); null with rotary_table
  int64_t rotary_dim;
  void* mlp;  // [B, T, F] with mlp_stride elements from a token to the next; null where F is 0
  int64_t mlp_stride;
  int mlp_activation;  // core/activation.h
};

struct QkvProjectionKernels {
  PanelGemmKernels gemm;
  void (*multiply)(const QkvProjectionArgs& args, const void* packed, int64_t first_panel, int64_t last_panel,
                   int64_t first_block, int64_t last_block);
};

ALULA_DECLARE_KERNELS(QkvProjectionKernels, kQkvProjection)

// What positions may be, where the host cannot look at them: on CUDA.
struct QkvPlaces {
  int64_t num_slots, num_rotary_positions;  // S of the cache, P of the table
  IdFaults* faults;                         // where wrong rotary positions are noted; may be null
};

// On CUDA, a dense W as in cuda/weight_layout.h. Up to kMaxFewRows rows:
void qkv_projection_few_rows_cuda(const QkvProjectionArgs& args, const QkvPlaces& places, const CudaStream& stream);
// What follows the product [M, N]:
void qkv_projection_epilogue_cuda(const QkvProjectionArgs& args, const void* product, const QkvPlaces& places,
                                  const CudaStream& stream);
// Quantized weights, as in ops/linear.h.
void qkv_projection_quantized_cuda(const QkvProjectionArgs& args, const QkvPlaces& places, const QuantizedPlan& plan,
                                   const QuantizedWork& work, const CudaStream& stream);

}  // namespace alula
