// How a packed weight [N, K] lies on CUDA: row-major, rows padded with zeros to a multiple of 16 bytes, so that every
// row can be read 16 bytes at a time. One layout serves the few-row kernels (a row is a stream), cuBLAS (a leading
// dimension) and the embedding (a row is a row).
#pragma once

#include <cstdint>

#include "core/types.h"

namespace alula {

constexpr int64_t kRowBytes = 16;

// Up to so many rows of X a product reads W in a kernel of alula's own (cuda/few_rows.cuh); above, a library's.
constexpr int kMaxFewRows = 16;

// Elements from one row to the next.
inline int64_t row_stride(DType dtype, int64_t k) {
  const int64_t step = kRowBytes / (dtype == DType::kFloat32 ? 4 : 2);
  return (k + step - 1) / step * step;
}

}  // namespace alula
