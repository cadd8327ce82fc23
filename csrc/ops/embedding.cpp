#include "ops/embedding.h"

#include <algorithm>
#include <array>

#include "core/cuda.h"
#include "core/refuse_grad.h"
#include "core/tensor.h"
#include "core/trace.h"
#include "cpu/panel_gemm_parallel.h"

namespace alula {
namespace {

// int64, contiguous on return, every entry in [0, limit); on CUDA the kernel looks at the entries.
Tensor checked_ids(const Tensor& ids, const char* name, int64_t limit, const char* limit_name, Place place) {
  check_place(ids, name, place);
  check_dtype(ids, name, ScalarType::Long, "an id");
  const Tensor checked = as_contiguous(ids);
  if (place.is_cuda()) return checked;
  const auto* data = static_cast<const int64_t*>(checked.const_data_ptr());
  for (int64_t i = 0; i < checked.numel(); i++) {
    ALULA_CHECK(data[i] >= 0 && data[i] < limit, name, " holds ", data[i], "; accepted: 0 to ", limit - 1, " (",
                limit_name, " is ", limit, ")");
  }
  return checked;
}

bool same_shape(const Tensor& a, const Tensor& b) {
  return std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin(), b.sizes().end());
}

}  // namespace

Tensor embedding(const Tensor& input_ids, const Tensor& packed, int64_t num_embeddings, int64_t embedding_dim,
                 const OptionalTensor& position_ids, const OptionalTensor& position_table,
                 const OptionalTensor& token_type_ids, const OptionalTensor& token_type_table, double scale,
                 int64_t format_code, std::optional<ScalarType> out_dtype) {
  const WeightFormat format = checked_format(format_code);
  const Place place = place_of(packed, "weight");
  if (format.kind == WeightKind::kDense) {
    check_packed_weight(packed, num_embeddings, embedding_dim, place);
    ALULA_CHECK(!out_dtype || *out_dtype == packed.scalar_type(), "dtype is ", name_of(*out_dtype),
                "; a dense table gives its own, ", name_of(packed.scalar_type()));
  } else {
    check_quantized_weight(packed, format, num_embeddings, embedding_dim, place);
    ALULA_CHECK(out_dtype, "dtype is missing; a quantized table has none, give that of the result");
  }
  const ScalarType scalar_type = out_dtype ? *out_dtype : packed.scalar_type();
  const Tensor ids = checked_ids(input_ids, "input_ids", num_embeddings, "the number of embeddings", place);
  ALULA_CHECK(position_ids.has_value() == position_table.has_value(),
              "position_ids and position_table go together; one of them is missing");
  OptionalTensor positions, table, types, type_table;
  if (position_ids && position_table) {
    check_place(*position_table, "position_table", place);
    check_shape(*position_table, "position_table", {-1, embedding_dim}, "[positions, E]");
    check_dtype(*position_table, "position_table", scalar_type, "the packed table");
    table = as_contiguous(*position_table);
    positions = checked_ids(*position_ids, "position_ids", table->size(0), "the number of positions", place);
    // The same positions for every row of the batch, or one for each token.
    const bool one_row = ids.dim() >= 1 && positions->dim() >= 1 && positions->numel() == ids.size(ids.dim() - 1) &&
                         positions->size(positions->dim() - 1) == positions->numel();
    ALULA_CHECK(one_row || same_shape(*positions, ids), "position_ids has shape ", shape_of(*position_ids),
                "; expected that of input_ids, ", shape_of(input_ids), ", or one row of it");
  }
  ALULA_CHECK(token_type_ids || !token_type_table, "token_type_table is given without token_type_ids");
  if (token_type_table) {
    check_place(*token_type_table, "token_type_table", place);
    check_shape(*token_type_table, "token_type_table", {-1, embedding_dim}, "[token types, E]");
    check_dtype(*token_type_table, "token_type_table", scalar_type, "the packed table");
    type_table = as_contiguous(*token_type_table);
  }
  if (token_type_ids) {
    types = checked_ids(*token_type_ids, "token_type_ids", type_table ? type_table->size(0) : num_embeddings,
                        type_table ? "the number of token types" : "the number of embeddings", place);
    ALULA_CHECK(same_shape(*types, ids), "token_type_ids has shape ", shape_of(*token_type_ids),
                "; expected that of input_ids, ", shape_of(input_ids));
  }

  std::vector<int64_t> sizes(ids.sizes().begin(), ids.sizes().end());
  sizes.push_back(embedding_dim);
  Tensor out = new_tensor(sizes, scalar_type, place);
  const DType dtype = value_dtype(out, "the result");
  const auto ids_or_null = [](const OptionalTensor& t) {
    return t ? static_cast<const int64_t*>(t->const_data_ptr()) : nullptr;
  };
  const EmbeddingArgs args = {
      .dtype = dtype,
      .format = format,
      .width = embedding_dim,
      .table = packed.const_data_ptr(),
      .input_ids = static_cast<const int64_t*>(ids.const_data_ptr()),
      .scale = static_cast<float>(scale),
      .token_type_ids = ids_or_null(types),
      .token_type_table = data_or_null(type_table),
      .position_ids = ids_or_null(positions),
      .position_period = positions ? positions->numel() : 1,
      .position_table = data_or_null(table),
      .out = out.mutable_data_ptr(),
  };
  if (place.is_cuda()) {
    if (out.numel() == 0) return out;
    const CudaScope scope(packed);
    ALULA_TRACE_CUDA("embedding", dtype, size_class(ids.numel()), " tokens, width ", embedding_dim, ", ",
                     kind_name(format.kind), " table");
    const IdNotes notes(scope);
    [[maybe_unused]] const EmbeddingTables tables = {packed.size(1), num_embeddings, table ? table->size(0) : 0,
                                                     type_table ? type_table->size(0) : 0, notes.faults()};
    const std::string earlier = take_id_fault(packed.get_device_index());
    ALULA_CHECK(earlier.empty(), earlier);
    ALULA_CUDA_CALL(embedding_cuda(args, tables, ids.numel(), scope.stream()));
    notes.raise_if_waiting();
    return out;
  }
  ALULA_TRACE("embedding", dtype, size_class(ids.numel()), " tokens, width ", embedding_dim);
  const EmbeddingKernels& kernels = ALULA_KERNELS(kEmbedding);
  parallel_ranges(ids.numel(), 4, [&](int64_t begin, int64_t end) { kernels.embed(args, begin, end); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(alula, CPU, m) { m.impl("embedding", ALULA_BOX(embedding)); }
STABLE_TORCH_LIBRARY_IMPL(alula, CUDA, m) { m.impl("embedding", ALULA_BOX(embedding)); }

}  // namespace alula
