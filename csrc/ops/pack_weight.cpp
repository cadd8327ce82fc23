// pack_weight, unpack_weight: a plain weight [N, K] to and from panels of 32 rows, K-major (cpu/panel_gemm_args.h).
//
// On CUDA a packed weight has rows (cuda/weight_layout.h).
//
// Pure moves of 2- or 4-byte elements, done once at load, in address order of the packed side. Any strides of the plain
// side, so that a transposed (Conv1D) checkpoint tensor is packed from its view.
#include "core/refuse_grad.h"
#include "core/tensor.h"
#include "cpu/panel_gemm_args.h"
#include "cpu/panel_gemm_parallel.h"
#include "cpu/parallel.h"
#include "cpu/weight_memory.h"

namespace alula {
namespace {

// kPair 1: [panel][K][32], kPair 2: [panel][ceil(K/2)][32][2].
template <typename T, int kPair>
void pack_panels(const T* weight, int64_t row_stride, int64_t column_stride, int64_t n, int64_t k, T* packed) {
  const int64_t panel_size = (k + kPair - 1) / kPair * kPair * kPanelRows;
  parallel_ranges(num_panels(n), 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++) {
      T* out = packed + panel * panel_size;
      for (int64_t i = 0; i < panel_size; i++, out++) {
        const int64_t column = i / (kPanelRows * kPair) * kPair + i % kPair;
        const int64_t row = panel * kPanelRows + i / kPair % kPanelRows;
        *out = row < n && column < k ? weight[row * row_stride + column * column_stride] : T{0};
      }
    }
  });
}

template <typename T, int kPair>
void unpack_panels(const T* packed, int64_t n, int64_t k, T* weight) {
  const int64_t panel_size = (k + kPair - 1) / kPair * kPair * kPanelRows;
  parallel_ranges(num_panels(n), 1, [&](int64_t first, int64_t last) {
    const int64_t end = last * kPanelRows < n ? last * kPanelRows : n;
    for (int64_t row = first * kPanelRows; row < end; row++) {
      const T* panel = packed + row / kPanelRows * panel_size + row % kPanelRows * kPair;
      for (int64_t column = 0; column < k; column++) {
        weight[row * k + column] = panel[column / kPair * kPanelRows * kPair + column % kPair];
      }
    }
  });
}

// cuda/weight_layout.h: by torch's own copies.
Tensor with_padded_rows(const Tensor& weight, int64_t stride, Place place) {
  Tensor packed = new_tensor({weight.size(0), stride}, weight.scalar_type(), place);
  if (stride != weight.size(1)) torch::stable::zero_(packed);
  Tensor rows = torch::stable::narrow(packed, 1, 0, weight.size(1));
  torch::stable::copy_(rows, weight);
  return packed;
}

}  // namespace

Tensor pack_weight(const Tensor& weight) {
  const Place place = place_of(weight, "weight");
  ALULA_CHECK(weight.dim() == 2, "weight has shape ", shape_of(weight), "; expected [out_features, in_features]");
  const DType dtype = value_dtype(weight, "weight");
  const int64_t n = weight.size(0), k = weight.size(1);
  if (place.is_cuda()) return with_padded_rows(weight, row_stride(dtype, k), place);
  const bool paired = dtype == DType::kBFloat16;
  Tensor packed = paired ? new_weight_tensor({num_panels(n), (k + 1) / 2, kPanelRows, 2}, weight.scalar_type())
                         : new_weight_tensor({num_panels(n), k, kPanelRows}, weight.scalar_type());
  const int64_t rows = weight.stride(0), columns = weight.stride(1);
  if (paired) {
    pack_panels<uint16_t, 2>(static_cast<const uint16_t*>(weight.const_data_ptr()), rows, columns, n, k,
                             static_cast<uint16_t*>(packed.mutable_data_ptr()));
  } else if (dtype == DType::kFloat16) {
    pack_panels<uint16_t, 1>(static_cast<const uint16_t*>(weight.const_data_ptr()), rows, columns, n, k,
                             static_cast<uint16_t*>(packed.mutable_data_ptr()));
  } else {
    pack_panels<uint32_t, 1>(static_cast<const uint32_t*>(weight.const_data_ptr()), rows, columns, n, k,
                             static_cast<uint32_t*>(packed.mutable_data_ptr()));
  }
  return packed;
}

Tensor unpack_weight(const Tensor& packed, int64_t out_features, int64_t in_features) {
  const Place place = place_of(packed, "weight");
  const DType dtype = check_packed_weight(packed, out_features, in_features, place);
  if (place.is_cuda()) {
    Tensor whole = packed;
    return torch::stable::clone(torch::stable::contiguous(torch::stable::narrow(whole, 1, 0, in_features)));
  }
  Tensor weight = torch::stable::empty({out_features, in_features}, packed.scalar_type());
  if (dtype == DType::kBFloat16) {
    unpack_panels<uint16_t, 2>(static_cast<const uint16_t*>(packed.const_data_ptr()), out_features, in_features,
                               static_cast<uint16_t*>(weight.mutable_data_ptr()));
  } else if (dtype == DType::kFloat16) {
    unpack_panels<uint16_t, 1>(static_cast<const uint16_t*>(packed.const_data_ptr()), out_features, in_features,
                               static_cast<uint16_t*>(weight.mutable_data_ptr()));
  } else {
    unpack_panels<uint32_t, 1>(static_cast<const uint32_t*>(packed.const_data_ptr()), out_features, in_features,
                               static_cast<uint32_t*>(weight.mutable_data_ptr()));
  }
  return weight;
}

STABLE_TORCH_LIBRARY_IMPL(alula, CPU, m) {
  m.impl("pack_weight", ALULA_BOX(pack_weight));
  m.impl("unpack_weight", ALULA_BOX(unpack_weight));
}

STABLE_TORCH_LIBRARY_IMPL(alula, CUDA, m) {
  m.impl("pack_weight", ALULA_BOX(pack_weight));
  m.impl("unpack_weight", ALULA_BOX(unpack_weight));
}

}  // namespace alula
