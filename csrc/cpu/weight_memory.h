// Where packed weights and caches live: side by side in large pages, so that a small model's matrices, each less than a
// page of 2 MiB, are read with few address translations as well. One row through 3072 x 768 in bfloat16 from weights
// beyond the caches: 28 GB/s from pages of 4 KiB, 36 GB/s from these (2 threads, a machine that reads 36 GB/s).
#pragma once

#include "core/tensor.h"

namespace alula {

// Uninitialized, contiguous, aligned to 64 bytes. Its memory goes back to the system when the tensor does.
Tensor new_weight_tensor(const std::vector<int64_t>& sizes, ScalarType dtype);

// `count` of them in one mapping, each with its own storage. What is small is torch's.
std::vector<Tensor> new_cache_tensors(int64_t count, const std::vector<int64_t>& sizes, ScalarType dtype);

}  // namespace alula
