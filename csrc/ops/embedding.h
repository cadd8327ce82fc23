// embedding: the sum of a word row times a scale, a position row and a token-type row, in fp32.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/isa.h"
#include "cpu/weight_format.h"
#include "cuda/id_faults.h"

namespace alula {

struct EmbeddingArgs {
  DType dtype;                    // of the result, of the position table and of a dense table
  WeightFormat format;            // of the table
  int64_t width;                  // E
  const void* table;              // packed [V, E] (cpu/panel_gemm_args.h, cpu/weight_format.h)
  const int64_t* input_ids;       // [tokens]
  float scale;                    // of the word row
  const int64_t* token_type_ids;  // [tokens]; may be null
  const void* token_type_table;   // [Y, E], plain; null: token types are rows of `table`, too
  const int64_t* position_ids;    // [position_period], token t takes entry t % position_period; may be null
  int64_t position_period;
  const void* position_table;  // [P, E], plain; null with position_ids
  void* out;                   // [tokens, E]
};

struct EmbeddingKernels {
  void (*embed)(const EmbeddingArgs& args, int64_t first_token, int64_t last_token);
};

ALULA_DECLARE_KERNELS(EmbeddingKernels, kEmbedding)

// The tables as they lie on CUDA, and their rows: what cannot be checked on the host.
struct EmbeddingTables {
  int64_t stride;  // elements from row to row of a dense [V, E] (cuda/weight_layout.h)
  int64_t num_embeddings, num_positions, num_token_types;
  IdFaults* faults;  // where wrong ids are noted (cuda/id_faults.h); may be null
};

void embedding_cuda(const EmbeddingArgs& args, const EmbeddingTables& tables, int64_t num_tokens,
                    const CudaStream& stream);

}  // namespace alula
