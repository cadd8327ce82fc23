// What csrc/cuda/hardware.cuh declares, and what CUDA's compiler knows by itself, on the host: see ../executor.h.
#pragma once

#include <math.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../executor.h"
#include "core/types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())

// --- CUDA's own names ------------------------------------------------------------------------------------------------

inline void __syncthreads(simt::Site site = simt::Site::current()) { simt::block_barrier(site); }

inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Site site = simt::Site::current()) {
  char nothing = 0;
  simt::warp_collective("__syncwarp", mask, &nothing, [](void* const(&)[32]) {}, true, site);
}

namespace simt {

template <typename T>
struct Shuffle {
  T value, result;
  int source;  // lane
};

template <typename T>
T shuffle(const char* what, unsigned mask, T value, int source, Site site) {
  Shuffle<T> mine = {value, value, source};
  const auto execute = [](void* const(&lanes)[32]) {
    for (int lane = 0; lane < 32; lane++) {
      auto* const self = static_cast<Shuffle<T>*>(lanes[lane]);
      if (self == nullptr || self->source == lane) continue;
      const auto* const other =
          static_cast<const Shuffle<T>*>(self->source >= 0 && self->source < 32 ? lanes[self->source] : nullptr);
      if (other == nullptr) {
        self->source = -1;  // reported by the lane itself
      } else {
        self->result = other->value;
      }
    }
  };
  warp_collective(what, mask, &mine, execute, false, site);
  if (mine.source == -1)
    fault(std::string(what) + " reads lane " + std::to_string(source) + ", which does not take part");
  return mine.result;
}

inline int lane_index() {
  return static_cast<int>((thread_index().x + block_size().x * (thread_index().y + block_size().y * thread_index().z)) %
                          32);
}

struct Vote {
  bool predicate;
  unsigned result;
};

inline unsigned ballot(const char* what, unsigned mask, bool predicate, Site site) {
  Vote mine = {predicate, 0};
  const auto execute = [](void* const(&lanes)[32]) {
    unsigned result = 0;
    for (int lane = 0; lane < 32; lane++) {
      if (lanes[lane] != nullptr && static_cast<Vote*>(lanes[lane])->predicate) result |= 1u << lane;
    }
    for (void* lane : lanes) {
      if (lane != nullptr) static_cast<Vote*>(lane)->result = result;
    }
  };
  warp_collective(what, mask, &mine, execute, false, site);
  return mine.result;
}

}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Site site = simt::Site::current()) {
  const int lane = simt::lane_index();
  return simt::shuffle("__shfl_sync", mask, value, lane / width * width + (source & (width - 1)), site);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, simt::Site site = simt::Site::current()) {
  const int lane = simt::lane_index(), source = lane ^ bits;
  return simt::shuffle("__shfl_xor_sync", mask, value, source / width > lane / width ? lane : source, site);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = 32, simt::Site site = simt::Site::current()) {
  const int lane = simt::lane_index(), source = lane + distance;
  return simt::shuffle("__shfl_down_sync", mask, value, source / width > lane / width ? lane : source, site);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = 32, simt::Site site = simt::Site::current()) {
  const int lane = simt::lane_index(), source = lane - distance;
  return simt::shuffle("__shfl_up_sync", mask, value, source < lane / width * width ? lane : source, site);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate, simt::Site site = simt::Site::current()) {
  return simt::ballot("__ballot_sync", mask, predicate, site);
}
inline bool __any_sync(unsigned mask, bool predicate, simt::Site site = simt::Site::current()) {
  return simt::ballot("__any_sync", mask, predicate, site) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate, simt::Site site = simt::Site::current()) {
  return simt::ballot("__all_sync", mask, predicate, site) == mask;
}

// Fibers change places at collectives only, so plain reads and writes are atomic.
template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}

inline unsigned atomicInc(unsigned* to, unsigned last) {
  simt::count_block();
  const unsigned before = *to;
  *to = before >= last ? 0 : before + 1;
  return before;
}

inline void __threadfence() { simt::fence(); }
inline void __threadfence_system() {}

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

namespace alula {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// --- shared memory ---------------------------------------------------------------------------------------------------

template <typename T>
class SharedRef {
 public:
  explicit SharedRef(int64_t offset) : offset_(offset) {}
  SharedRef(const SharedRef&) = default;
  operator T() const {
    simt::check_shared(offset_, sizeof(T), alignof(T), false);
    T value;
    std::memcpy(&value, simt::shared_memory() + offset_, sizeof(T));
    return value;
  }
  void operator=(const T& value) const {
    simt::check_shared(offset_, sizeof(T), alignof(T), true);
    std::memcpy(simt::shared_memory() + offset_, &value, sizeof(T));
  }
  void operator=(const SharedRef& other) const { *this = static_cast<T>(other); }
  void operator+=(const T& value) const { *this = static_cast<T>(*this) + value; }

 private:
  int64_t offset_;
};

template <typename T>
class Shared {
 public:
  Shared() = default;
  explicit Shared(int64_t offset) : offset_(offset) {}
  SharedRef<T> operator[](int64_t i) const { return SharedRef<T>(offset_ + i * static_cast<int64_t>(sizeof(T))); }
  SharedRef<T> operator*() const { return (*this)[0]; }
  Shared operator+(int64_t i) const { return Shared(offset_ + i * static_cast<int64_t>(sizeof(T))); }
  Shared operator-(int64_t i) const { return *this + -i; }
  Shared& operator+=(int64_t i) { return *this = *this + i; }
  int64_t offset() const { return offset_; }

 private:
  int64_t offset_ = -1;
};

template <typename T>
Shared<T> dynamic_shared(int offset = 0) {
  return Shared<T>(offset);
}

template <typename To, typename From>
Shared<To> shared_cast(Shared<From> pointer) {
  return Shared<To>(pointer.offset());
}

template <typename T>
void copy_async_16(Shared<T> to, const void* from, bool is_there) {
  simt::copy_async(to.offset(), from, is_there);
}

inline void copy_async_commit() { simt::copy_async_commit(); }

template <int kPending>
void copy_async_wait() {
  simt::copy_async_wait(kPending);
}

// --- numbers ---------------------------------------------------------------------------------------------------------

inline float float_of_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t bits_of_float(float x) { return std::bit_cast<uint32_t>(x); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }

template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  if (x != x) return {0x7fff};
  const auto bits = std::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}

template <typename T>
uint32_t pair_of(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <typename T>
uint32_t add_pairs(uint32_t a, uint32_t b, T) {
  const auto half = [](uint32_t pair, int which) { return to_float(T{static_cast<uint16_t>(pair >> 16 * which)}); };
  return pair_of<T>(half(a, 0) + half(b, 0), half(a, 1) + half(b, 1));
}

inline uint32_t masked_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }

inline uint32_t masked_xor(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) ^ bits; }

inline uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t y = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t which = selector >> 4 * i & 15;
    if (which > 7) simt::fault("pick_bytes: a selector above 7 means something else to the GPU");
    y |= static_cast<uint32_t>(both >> 8 * which & 0xff) << 8 * i;
  }
  return y;
}

inline uint32_t to_tf32(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7f800000) == 0x7f800000) return bits;
  return (bits + 0x1000) & 0xffffe000;  // to nearest, halves away from zero
}

// Wrong by the most that the GPU may be, up or down as the bits of x have it; whole powers are exact.
inline float exp2_approximate(float x) {
  const float y = exp2f(x);
  if (y < 0x1p-126f) return 0.0f;
  if (!isfinite(y) || x == rintf(x)) return y;
  const uint32_t mixed = std::bit_cast<uint32_t>(x) * 2654435769u;
  return y * (mixed >> 31 != 0 ? 1.0f + 0x1p-22f : 1.0f - 0x1p-22f);
}

// --- tensor cores ----------------------------------------------------------------------------------------------------

struct MatrixLoad {
  uint16_t row[8];
  uint32_t* result;
  bool is_transposed;
};

inline void load_any_matrices(uint32_t (&r)[4], int64_t offset, bool is_transposed, simt::Site site) {
  MatrixLoad mine = {{}, r, is_transposed};
  simt::check_shared(offset, 16, 16, false);
  std::memcpy(mine.row, simt::shared_memory() + offset, 16);
  const auto execute = [](void* const(&lanes)[32]) {
    const auto at = [&](int matrix, int row, int column) -> uint32_t {
      return static_cast<const MatrixLoad*>(lanes[matrix * 8 + row])->row[column];
    };
    for (int lane = 0; lane < 32; lane++) {
      const auto* const self = static_cast<const MatrixLoad*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int m = 0; m < 4; m++) {
        self->result[m] = self->is_transposed ? at(m, 2 * t, g) | at(m, 2 * t + 1, g) << 16
                                              : at(m, g, 2 * t) | at(m, g, 2 * t + 1) << 16;
      }
    }
  };
  simt::warp_collective("ldmatrix", kWholeWarp, &mine, execute, false, site);
}

template <typename T>
void load_matrices(uint32_t (&r)[4], Shared<T> row, simt::Site site = simt::Site::current()) {
  load_any_matrices(r, row.offset(), false, site);
}

template <typename T>
void load_matrices_transposed(uint32_t (&r)[4], Shared<T> row, simt::Site site = simt::Site::current()) {
  load_any_matrices(r, row.offset(), true, site);
}

struct Product {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

// c + the products, as tensor cores add: the products are exact; they and c are lined up with the largest of them and
// cut off below fp32's last bit of that, and so is the sum. PTX leaves the rounding open; measurements of GPUs (Fasi,
// Higham, Mikaitis and Pranesh 2021) found this, or a bit or two more. Sums of many steps thus lean towards zero.
template <int kCount>
float add_products(float c, const double (&products)[kCount]) {
  double largest = fabs(static_cast<double>(c)), plain = c;
  for (const double product : products) {
    largest = fmax(largest, fabs(product));
    plain += product;
  }
  if (largest == 0.0 || !isfinite(plain) || !isfinite(largest)) return static_cast<float>(plain);
  const int exponent = static_cast<int>(std::bit_cast<uint64_t>(largest) >> 52) - 1023;
  const int last_bit = exponent < -126 ? -149 : exponent - 23;
  const auto power = [](int n) { return std::bit_cast<double>(static_cast<uint64_t>(n + 1023) << 52); };
  const double step = power(last_bit), steps = power(-last_bit);
  double sum = trunc(c * steps);
  for (const double product : products) sum += trunc(product * steps);
  sum *= step;
  const auto rounded = static_cast<float>(sum);
  return fabs(static_cast<double>(rounded)) > fabs(sum) ? nextafterf(rounded, 0.0f) : rounded;
}

// c [16, 8] += a [16, K] b [K, 8], element (i, k) of a as at_a(lanes, i, k) and so on; kAtOnce products a sum.
template <int kDepth, int kAtOnce, typename AtA, typename AtB>
void multiply_add_all(void* const (&lanes)[32], const AtA& at_a, const AtB& at_b) {
  float a[16][kDepth], b[kDepth][8];
  for (int k = 0; k < kDepth; k++) {
    for (int row = 0; row < 16; row++) a[row][k] = at_a(lanes, row, k);
    for (int column = 0; column < 8; column++) b[k][column] = at_b(lanes, k, column);
  }
  for (int lane = 0; lane < 32; lane++) {
    const auto* const self = static_cast<const Product*>(lanes[lane]);
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (int first = 0; first < kDepth; first += kAtOnce) {
        double products[kAtOnce];
        for (int k = 0; k < kAtOnce; k++) products[k] = static_cast<double>(a[row][first + k]) * b[first + k][column];
        self->c[i] = add_products(self->c[i], products);
      }
    }
  }
}

template <typename T>
void multiply_add_16(void* const (&lanes)[32]) {
  const auto half = [](uint32_t pair, int which) { return to_float(T{static_cast<uint16_t>(pair >> 16 * which)}); };
  multiply_add_all<16, 8>(
      lanes,
      [&](void* const(&all)[32], int row, int k) {
        const auto* const owner = static_cast<const Product*>(all[row % 8 * 4 + k % 8 / 2]);
        return half(owner->a[row / 8 + k / 8 * 2], k % 2);
      },
      [&](void* const(&all)[32], int k, int column) {
        const auto* const owner = static_cast<const Product*>(all[column * 4 + k % 8 / 2]);
        return half(owner->b[k / 8], k % 2);
      });
}

inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16,
                         simt::Site site = simt::Site::current()) {
  Product mine = {c, a, b};
  simt::warp_collective("mma", kWholeWarp, &mine, multiply_add_16<bf16>, false, site);
}

inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16,
                         simt::Site site = simt::Site::current()) {
  Product mine = {c, a, b};
  simt::warp_collective("mma", kWholeWarp, &mine, multiply_add_16<f16>, false, site);
}

inline void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              simt::Site site = simt::Site::current()) {
  Product mine = {c, a, b};
  const auto execute = [](void* const(&lanes)[32]) {
    // The hardware reads 10 bits after the point, whatever is below them.
    const auto value = [](uint32_t bits) { return float_of_bits(bits & 0xffffe000); };
    multiply_add_all<8, 4>(
        lanes,
        [&](void* const(&all)[32], int row, int k) {
          return value(static_cast<const Product*>(all[row % 8 * 4 + k % 4])->a[row / 8 + k / 4 * 2]);
        },
        [&](void* const(&all)[32], int k, int column) {
          return value(static_cast<const Product*>(all[column * 4 + k % 4])->b[k / 4]);
        });
  };
  simt::warp_collective("mma", kWholeWarp, &mine, execute, false, site);
}

// --- global memory, neighbouring kernels -----------------------------------------------------------------------------

inline void load_once(uint32_t (&r)[4], const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) simt::fault("16-byte load from a misaligned address");
  const auto* words = static_cast<const uint32_t*>(from);
  for (int i = 0; i < 4; i++) r[i] = words[i];
}

template <int N>
inline void store_words(void* to, const uint32_t (&words)[N]) {
  if (reinterpret_cast<uintptr_t>(to) % (4 * N) != 0) simt::fault("a store of several words to a misaligned address");
  for (int i = 0; i < N; i++) static_cast<uint32_t*>(to)[i] = words[i];
}

// Counted per launch: see launch.h.
inline void wait_for_previous_kernel() { simt::waits().waited++; }
inline void let_next_kernel_start() {
  if (simt::waits().released++ >= simt::waits().waited) {
    simt::fault(
        "let_next_kernel_start() before wait_for_previous_kernel(): the next kernel would not wait for the ones before");
  }
}

}  // namespace alula
