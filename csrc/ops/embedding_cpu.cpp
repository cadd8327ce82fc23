// embedding on the CPU. A row of the packed table is a column of its panel: one element (bf16: one pair) of every 32, a
// cache line each. That costs a token some microseconds and saves a second copy of the table beside a tied output
// matrix.
#include "ops/embedding.h"

#include "core/dispatch.h"
#include "cpu/quantized_gemm.h"
#include "cpu/tile.h"

namespace alula::ALULA_ISA {
namespace {

// Values [begin, begin + count) of row `id` of the table.
template <typename W>
ALULA_INLINE void row_of_table(const EmbeddingArgs& args, int64_t id, int64_t begin, int64_t count, float* out) {
  if (args.format.kind != WeightKind::kDense) {
    dequantize_row(args.format, args.table, id, args.width, begin, count, out);
    return;
  }
  constexpr int kPair = Operand<W>::kStep;
  const int64_t panel_size = (args.width + kPair - 1) / kPair * kPair * kPanel;
  const W* row = static_cast<const W*>(args.table) + id / kPanel * panel_size + id % kPanel * kPair;
  for (int64_t i = 0; i < count; i++) {
    const int64_t k = begin + i;
    out[i] = to_float(row[k / kPair * kPanel * kPair + k % kPair]);
  }
}

template <typename W>
void embed_as(const EmbeddingArgs& args, int64_t first, int64_t last) {
  constexpr int64_t kChunk = 1024;  // elements summed on the stack
  alignas(64) float sum[kChunk], type[kChunk];
  for (int64_t token = first; token < last; token++) {
    W* out = static_cast<W*>(args.out) + token * args.width;
    const W* position = nullptr;
    if (args.position_table) {
      position =
          static_cast<const W*>(args.position_table) + args.position_ids[token % args.position_period] * args.width;
    }
    for (int64_t begin = 0; begin < args.width; begin += kChunk) {
      const int64_t count = args.width - begin < kChunk ? args.width - begin : kChunk;
      row_of_table<W>(args, args.input_ids[token], begin, count, sum);
      if (args.scale != 1.0f) {
        for (int64_t i = 0; i < count; i++) sum[i] *= args.scale;
      }
      if (position) {
        for (int64_t i = 0; i < count; i++) sum[i] += to_float(position[begin + i]);
      }
      if (args.token_type_table) {
        const W* row = static_cast<const W*>(args.token_type_table) + args.token_type_ids[token] * args.width;
        for (int64_t i = 0; i < count; i++) sum[i] += to_float(row[begin + i]);
      } else if (args.token_type_ids) {
        row_of_table<W>(args, args.token_type_ids[token], begin, count, type);
        for (int64_t i = 0; i < count; i++) sum[i] += type[i];
      }
      for (int64_t i = 0; i < count; i++) out[begin + i] = from_float<W>(sum[i]);
    }
  }
}

void embed(const EmbeddingArgs& args, int64_t first_token, int64_t last_token) {
  dispatch_dtype(args.dtype, [&](auto tag) { embed_as<typename decltype(tag)::Type>(args, first_token, last_token); });
}

}  // namespace

const EmbeddingKernels kEmbedding = {embed};

}  // namespace alula::ALULA_ISA
