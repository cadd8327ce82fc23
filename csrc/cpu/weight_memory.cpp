#include "cpu/weight_memory.h"

#include <sys/mman.h>

#include <memory>
#include <mutex>

#include "core/forbid.h"

namespace alula {
namespace {

constexpr size_t kSlabBytes = 64 << 20;
constexpr size_t kAlignment = 64;
constexpr size_t kPage = 4096;
constexpr size_t kLargePage = 2 << 20;
constexpr size_t kSpareBytes = 128 << 20;  // the largest mapping of a cache that the next one may get

constexpr size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// A mapping that tensors are cut from, one after the other. It lives as long as any of them.
class Slab {
 public:
  // keeps_pages: of single tensors, for whoever gets the slab after the last one.
  explicit Slab(size_t bytes, bool keeps_pages = false) : size_(bytes), keeps_pages_(keeps_pages) {
    base_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ALULA_CHECK(base_ != MAP_FAILED, "there is no memory for ", size_, " bytes");
    ask_for_large_pages(base_, static_cast<int64_t>(size_));
    forbid(base_, size_);
  }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;
  ~Slab() {
    permit(base_, size_);  // what is mapped here next is not ours
    munmap(base_, size_);
  }

  size_t size() const { return size_; }

  // Empty, for other tensors. The system may take its pages until somebody writes to them.
  void clear() {
    used_ = 0;
    forbid(base_, size_);
#if defined(MADV_FREE)
    madvise(base_, size_, MADV_FREE);  // a wish: failing is fine
#endif
  }

  // Null where it does not fit.
  void* take(size_t bytes) {
    if (bytes > size_ - used_) return nullptr;
    void* data = static_cast<char*>(base_) + used_;
    used_ += round_up(bytes, kAlignment);
    permit(data, bytes);
    return data;
  }

  // Gives whole pages back to the system, unless they are kept; the room at the end is used again.
  void release(void* data, size_t bytes) {
    forbid(data, bytes);
    const auto begin = static_cast<size_t>(static_cast<char*>(data) - static_cast<char*>(base_));
    const size_t end = begin + round_up(bytes, kAlignment);
    const size_t first = round_up(begin, kPage), last = end / kPage * kPage;
    if (first < last && !keeps_pages_) madvise(static_cast<char*>(base_) + first, last - first, MADV_DONTNEED);
    if (end == used_) used_ = begin;
  }

 private:
  void* base_;
  size_t size_;
  size_t used_ = 0;
  bool keeps_pages_;
};

struct State {
  std::mutex mutex;
  std::shared_ptr<Slab> current;  // what the next weight is cut from
  std::mutex spare_mutex;
  std::unique_ptr<Slab> spare;  // of the last cache that went
};
// Never destroyed: weights may outlive every other static object.
State& state() {
  static auto* const only = new State;
  return *only;
}

struct Piece {
  std::shared_ptr<Slab> slab;
  void* data;
};

Piece take(size_t bytes) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (bytes > kSlabBytes / 4) {  // a mapping of its own: at most a quarter of a slab is left empty
    auto slab = std::make_shared<Slab>(round_up(bytes, kLargePage) + kLargePage);
    void* data = slab->take(bytes);
    return {slab, data};
  }
  void* data = s.current ? s.current->take(bytes) : nullptr;
  if (data == nullptr) {
    s.current = std::make_shared<Slab>(kSlabBytes);
    data = s.current->take(bytes);
  }
  return {s.current, data};
}

// For a cache of `bytes`: the spare one if it fits well.
std::shared_ptr<Slab> cache_slab(size_t bytes) {
  if (bytes > kSpareBytes) return std::make_shared<Slab>(bytes);
  State& s = state();
  std::unique_ptr<Slab> slab;
  {
    const std::lock_guard lock(s.spare_mutex);
    if (s.spare && s.spare->size() >= bytes && s.spare->size() / 2 <= bytes) slab = std::move(s.spare);
  }
  if (!slab) slab = std::make_unique<Slab>(bytes, true);
  return {slab.release(), [&s](Slab* used) {
            std::unique_ptr<Slab> spare(used);
            spare->clear();
            const std::lock_guard lock(s.spare_mutex);
            s.spare.swap(spare);
          }};
}

struct Layout {
  std::vector<int64_t> strides;
  size_t bytes;
};

Layout contiguous(const std::vector<int64_t>& sizes, ScalarType dtype) {
  int64_t count = 1;
  std::vector<int64_t> strides(sizes.size());
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = count;
    count *= sizes[i];
  }
  const size_t element = dtype == ScalarType::Byte ? 1 : dtype == ScalarType::Float ? 4 : 2;
  return {std::move(strides), static_cast<size_t>(count) * element};
}

Tensor tensor_in(Piece piece, const std::vector<int64_t>& sizes, const Layout& layout, ScalarType dtype) {
  const auto release = [slab = std::move(piece.slab), bytes = layout.bytes](void* data) mutable {
    const std::lock_guard lock(state().mutex);
    slab->release(data, bytes);
    slab.reset();
  };
  return torch::stable::from_blob(piece.data, sizes, layout.strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype, release);
}

}  // namespace

Tensor new_weight_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) {
  const Layout layout = contiguous(sizes, dtype);
  if (layout.bytes < kPage) return torch::stable::empty(sizes, dtype);
  return tensor_in(take(layout.bytes), sizes, layout, dtype);
}

std::vector<Tensor> new_cache_tensors(int64_t count, const std::vector<int64_t>& sizes, ScalarType dtype) {
  const Layout layout = contiguous(sizes, dtype);
  const size_t all = static_cast<size_t>(count) * round_up(layout.bytes, kAlignment);
  std::vector<Tensor> tensors;
  tensors.reserve(static_cast<size_t>(count));
  if (all < 2 * kLargePage) {
    for (int64_t i = 0; i < count; i++) tensors.push_back(torch::stable::empty(sizes, dtype));
    return tensors;
  }
  const std::shared_ptr<Slab> slab = cache_slab(round_up(all, kLargePage));
  for (int64_t i = 0; i < count; i++) {
    tensors.push_back(tensor_in({slab, slab->take(layout.bytes)}, sizes, layout, dtype));
  }
  return tensors;
}

}  // namespace alula
