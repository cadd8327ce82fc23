// embedding on CUDA: a block owns a token and adds its word row, position row and token-type row in fp32.
//
// An id outside its table gives a row of NaN, and is noted where the host looks later: it cannot be checked without
// waiting for the device. Of a quantized table a thread reads a word, four neighbours of the row (cuda/dequantize.cuh);
// plain tables beside it element by element.
//
// Not measured yet: no GPU was at hand.
#include "ops/embedding.h"

#include "core/dispatch.h"
#include "cuda/dequantize.cuh"
#include "cuda/launch.h"
#include "cuda/note_id.cuh"
#include "cuda/vec.cuh"

namespace alula {
namespace {

constexpr int kMaxThreads = 256;

struct Params {
  EmbeddingArgs args;
  EmbeddingTables tables;
};

// N values of a row from `column` on, added to `sum`; NaN where the row does not exist.
template <int N, typename T>
__device__ __forceinline__ void add_row(float (&sum)[N], const T* table, int64_t stride, int64_t id, int64_t rows,
                                        int64_t column) {
  float v[N];
  const bool is_there = id >= 0 && id < rows;
  if (is_there) load_pack(v, table + id * stride + column);
#pragma unroll
  for (int i = 0; i < N; i++) sum[i] += is_there ? v[i] : NAN;
}

__device__ __forceinline__ void note_ids(const Params& p, int64_t token) {
  const EmbeddingArgs& args = p.args;
  note_id(p.tables.faults, IdKind::kInput, args.input_ids[token], p.tables.num_embeddings);
  if (args.position_ids != nullptr) {
    note_id(p.tables.faults, IdKind::kPosition, args.position_ids[token % args.position_period],
            p.tables.num_positions);
  }
  if (args.token_type_ids != nullptr) {
    note_id(p.tables.faults, IdKind::kTokenType, args.token_type_ids[token],
            args.token_type_table == nullptr ? p.tables.num_embeddings : p.tables.num_token_types);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads) embedding_kernel(Params p) {
  const EmbeddingArgs& args = p.args;
  const int64_t token = blockIdx.x;
  if (threadIdx.x == 0) note_ids(p, token);
  const auto* table = static_cast<const T*>(args.table);
  const bool types_are_words = args.token_type_table == nullptr;
  const auto* types = types_are_words ? table : static_cast<const T*>(args.token_type_table);
  for (int64_t column = static_cast<int64_t>(threadIdx.x) * N; column < args.width;
       column += static_cast<int64_t>(blockDim.x) * N) {
    float sum[N] = {};
    add_row(sum, table, p.tables.stride, args.input_ids[token], p.tables.num_embeddings, column);
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] *= args.scale;
    if (args.position_ids != nullptr) {
      const int64_t position = args.position_ids[token % args.position_period];
      add_row(sum, static_cast<const T*>(args.position_table), args.width, position, p.tables.num_positions, column);
    }
    if (args.token_type_ids != nullptr) {
      add_row(sum, types, types_are_words ? p.tables.stride : args.width, args.token_type_ids[token],
              types_are_words ? p.tables.num_embeddings : p.tables.num_token_types, column);
    }
    store_pack(static_cast<T*>(args.out) + token * args.width + column, sum);
  }
}

// Values of a row from column 4 * step on, added to `sum`; NaN where the row does not exist.
__device__ __forceinline__ void add_quantized_row(float (&sum)[4], const QuantizedRows& table, int64_t id, int64_t rows,
                                                  int step, float scale) {
  float v[4] = {};
  const bool is_there = id >= 0 && id < rows;
  if (is_there) dequantize_step(v, table, id, step);
#pragma unroll
  for (int i = 0; i < 4; i++) sum[i] += is_there ? v[i] * scale : NAN;
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) quantized_embedding_kernel(Params p, QuantizedRows table) {
  const EmbeddingArgs& args = p.args;
  const int64_t token = blockIdx.x;
  const auto width = static_cast<int>(args.width);
  if (threadIdx.x == 0) note_ids(p, token);
  for (int step = static_cast<int>(threadIdx.x); 4 * step < width; step += static_cast<int>(blockDim.x)) {
    float sum[4] = {-0.0f, -0.0f, -0.0f, -0.0f};  // which changes no value, -0 included
    add_quantized_row(sum, table, args.input_ids[token], p.tables.num_embeddings, step, args.scale);
    if (args.token_type_ids != nullptr && args.token_type_table == nullptr) {
      add_quantized_row(sum, table, args.token_type_ids[token], p.tables.num_embeddings, step, 1.0f);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int column = 4 * step + i;
      if (column >= width) break;
      float one[1] = {sum[i]};
      if (args.position_ids != nullptr) {
        const int64_t position = args.position_ids[token % args.position_period];
        add_row(one, static_cast<const T*>(args.position_table), width, position, p.tables.num_positions, column);
      }
      if (args.token_type_table != nullptr) {
        add_row(one, static_cast<const T*>(args.token_type_table), width, args.token_type_ids[token],
                p.tables.num_token_types, column);
      }
      static_cast<T*>(args.out)[token * width + column] = from_float<T>(one[0]);
    }
  }
}

int threads_for(int64_t pieces) {
  const int64_t warps = (pieces + kWarpSize - 1) / kWarpSize;
  return static_cast<int>(warps * kWarpSize < kMaxThreads ? warps * kWarpSize : kMaxThreads);
}

}  // namespace

void embedding_cuda(const EmbeddingArgs& args, const EmbeddingTables& tables, int64_t num_tokens,
                    const CudaStream& stream) {
  const Params p = {args, tables};
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (args.format.kind != WeightKind::kDense) {
      return launch("quantized_embedding_kernel", quantized_embedding_kernel<T>,
                    {.blocks = {num_tokens}, .threads = threads_for((args.width + 3) / 4)}, stream, p,
                    quantized_rows(args.format, args.table, args.width));
    }
    constexpr int N = kPackSize<T>;
    const bool is_even = args.width % N == 0 && is_aligned_16(args.table) && is_aligned_16(args.position_table) &&
                         is_aligned_16(args.token_type_table) && is_aligned_16(args.out);
    const int64_t pieces = is_even ? args.width / N : args.width;
    launch("embedding_kernel", is_even ? embedding_kernel<T, N> : embedding_kernel<T, 1>,
           {.blocks = {num_tokens}, .threads = threads_for(pieces)}, stream, p);
  });
}

}  // namespace alula
