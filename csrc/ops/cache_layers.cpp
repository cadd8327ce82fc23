// cache_layers: memory for the keys and values of all layers, uninitialized.
#include "core/refuse_grad.h"
#include "core/tensor.h"
#include "cpu/weight_memory.h"

namespace alula {
namespace {

constexpr int64_t kMostLayers = 1 << 20;
constexpr int64_t kMostBytes = int64_t{1} << 47;

}  // namespace

std::vector<Tensor> cache_layers(const Tensor& like, int64_t count, const std::vector<int64_t>& sizes) {
  const Place place = place_of(like, "like");
  value_dtype(like, "like");
  ALULA_CHECK(count >= 0 && count <= kMostLayers, "count is ", count, "; accepted: 0 to ", kMostLayers);
  int64_t bytes = (count > 0 ? count : 1) * static_cast<int64_t>(sizeof(float));  // at most; an address has 47 bits
  for (const int64_t size : sizes) {
    ALULA_CHECK(size >= 0, "sizes holds ", size, "; accepted: 0 or more");
    const int64_t factor = size > 0 ? size : 1;  // strides are products of the others
    ALULA_CHECK(bytes <= kMostBytes / factor, "count layers of these sizes are more than 2^47 bytes");
    bytes *= factor;
  }
  if (!place.is_cuda()) return new_cache_tensors(count, sizes, like.scalar_type());
  std::vector<Tensor> layers;
  layers.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i++) layers.push_back(new_tensor(sizes, like.scalar_type(), place));
  return layers;
}

STABLE_TORCH_LIBRARY_IMPL(alula, CPU, m) { m.impl("cache_layers", ALULA_BOX(cache_layers)); }

STABLE_TORCH_LIBRARY_IMPL(alula, CUDA, m) { m.impl("cache_layers", ALULA_BOX(cache_layers)); }

}  // namespace alula
