// qkv_projection: layer norm, product, bias, split into query and merged key/value, and the write into the cache.
#pragma once

#include "cpu/isa.h"
#include "cpu/panel_gemm_args.h"

namespace alula {

struct QkvProjectionArgs {
  PanelGemmArgs gemm;        // M = B * T, N = (H + 2 * G) * D, rows of W: [q (H*D) | k (G*D) | v (G*D)]
  int64_t tokens;            // T
  int64_t num_heads;         // H
  int64_t num_kv_heads;      // G
  int64_t head_dim;          // D
  void* q;                   // [B, T, H, D]
  void* kv_cache;            // [B, G, S, 2 * D]: key, then value; the last dimension is contiguous
  int64_t kv_strides[3];     // of B, G, S, in elements
  const int32_t* positions;  // [B, T]: the S where a token is written; negative: nowhere
};

struct QkvProjectionKernels {
  PanelGemmKernels gemm;
  void (*multiply)(const QkvProjectionArgs& args, const void* packed, int64_t first_panel, int64_t last_panel,
                   int64_t first_block, int64_t last_block);
};

ALULA_DECLARE_KERNELS(QkvProjectionKernels, kQkvProjection)

}  // namespace alula
