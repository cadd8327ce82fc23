// Where packed weights and caches live: side by side in large pages, so that a small model's matrices, each less than a
// page of 2 MiB, are read with few address translations as well. One row through 3072 x 768 in bfloat16 from weights
// beyond the caches: 28 GB/s from pages of 4 KiB, 36 GB/s from these (2 threads, a machine that reads 36 GB/s).
#pragma once

#include "core/tensor.h"

namespace alula {

// Uninitialized, contiguous, aligned to 64 bytes. Its memory goes back to the system with it.
Tensor new_weight_tensor(const std::vector<int64_t>& sizes, ScalarType dtype);

// `count` of them in one mapping, each with its own storage. What is small is torch's. Up to 128 MiB are kept for the
// next cache when the last of them has gone, since the system clears new pages: before a prompt of 512 tokens through
// CodeGen-350M in fp32 (84 MB) that took 5 to 200 ms of 1300, by the state of its memory (AMD EPYC, Zen 4, two cores).
// The system may take kept memory where it needs some. Beyond 128 MiB each tensor's goes back with it, so that a cache
// that grows holds the old and the new of one layer at a time.
std::vector<Tensor> new_cache_tensors(int64_t count, const std::vector<int64_t>& sizes, ScalarType dtype);

}  // namespace alula
