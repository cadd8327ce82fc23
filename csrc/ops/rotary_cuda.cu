// rotary on CUDA: query and key in one launch, a block for a token, its threads for pieces of its heads. A piece is 16
// bytes of values where everything lies even, else one pair. A position outside the table gives NaN and is noted for
// the host: it cannot be checked without waiting for the device.
//
// A thread for a piece of any token would divide by the sizes of all dimensions: as many instructions again.
//
// Not measured yet: no GPU was at hand.
#include "ops/rotary.h"

#include "core/dispatch.h"
#include "cuda/launch.h"
#include "cuda/note_id.cuh"
#include "cuda/vec.cuh"

namespace alula {
namespace {

constexpr int kMaxThreads = 256;

struct Params {
  RotaryArgs q, k;                  // of the same tokens and head size
  int num_pieces, pieces_per_head;  // of a token
  int64_t num_positions;            // P
  IdFaults* faults;
};

// The pair (a, b) turned by an angle.
__device__ __forceinline__ void turn(float& a, float& b, float cosine, float sine) {
  const float turned = a * cosine - b * sine;
  b = b * cosine + a * sine;
  a = turned;
}

// The block's token and its angles.
struct Token {
  int64_t batch, number;  // in its batch row
  const float* cosines;
  const float* sines;
  float spoiled;  // added to angles: NaN for a position that does not exist
};

__device__ __forceinline__ Token token_of(const Params& p) {
  const unsigned token = blockIdx.x, tokens = static_cast<unsigned>(p.q.tokens);  // grids are smaller than 2^31
  const int64_t position = p.q.positions[token];
  const bool is_there = position >= 0 && position < p.num_positions;
  if (!is_there && threadIdx.x == 0) note_id(p.faults, IdKind::kRotaryPosition, position, p.num_positions);
  const float* cosines = p.q.table + (is_there ? position : 0) * p.q.rotary_dim;
  return {token / tokens, token % tokens, cosines, cosines + p.q.rotary_dim / 2, is_there ? 0.0f : NAN};
}

// Where a piece's head begins.
template <typename T>
struct Place {
  const T* x;
  T* out;
  int index;  // of the piece in its head
};

template <typename T>
__device__ __forceinline__ Place<T> place_of(const Params& p, const Token& token, int piece) {
  int head = piece / p.pieces_per_head;
  const int index = piece - head * p.pieces_per_head;
  const bool is_key = head >= p.q.num_heads;
  const RotaryArgs& args = is_key ? p.k : p.q;
  if (is_key) head -= static_cast<int>(p.q.num_heads);
  return {static_cast<const T*>(args.x) + token.batch * args.x_strides[0] + token.number * args.x_strides[1] +
              head * args.x_strides[2],
          static_cast<T*>(args.out) + token.batch * args.out_strides[0] + token.number * args.out_strides[1] +
              head * args.out_strides[2],
          index};
}

// N angles from `from` on, aligned to 8 bytes, and to 16 where N is 4 or more.
template <int N>
__device__ __forceinline__ void load_angles(float (&angles)[N], const float* from, float spoiled) {
  constexpr int kAtOnce = N < 4 ? N : 4;
#pragma unroll
  for (int first = 0; first < N; first += kAtOnce) {
    const auto pack = *reinterpret_cast<const Pack<float, kAtOnce>*>(from + first);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) angles[first + i] = pack.values[i] + spoiled;
  }
}

// A piece: 16 bytes, and for halves the 16 bytes that they turn with.
template <typename T, bool kInterleaved>
__global__ void __launch_bounds__(kMaxThreads) rotary_packs_kernel(Params p) {
  constexpr int N = kPackSize<T>;
  const Token token = token_of(p);
  const int half = static_cast<int>(p.q.rotary_dim / 2);
  for (int piece = static_cast<int>(threadIdx.x); piece < p.num_pieces; piece += static_cast<int>(blockDim.x)) {
    const Place<T> place = place_of<T>(p, token, piece);
    const int index = place.index * N;
    float v[N];
    if (kInterleaved) {
      load_pack(v, place.x + index);
      if (index < 2 * half) {
        float cosines[N / 2], sines[N / 2];
        load_angles(cosines, token.cosines + index / 2, token.spoiled);
        load_angles(sines, token.sines + index / 2, token.spoiled);
#pragma unroll
        for (int i = 0; i < N; i += 2) turn(v[i], v[i + 1], cosines[i / 2], sines[i / 2]);
      }
      store_pack(place.out + index, v);
    } else if (index < half) {
      float w[N], cosines[N], sines[N];
      load_pack(v, place.x + index);
      load_pack(w, place.x + half + index);
      load_angles(cosines, token.cosines + index, token.spoiled);
      load_angles(sines, token.sines + index, token.spoiled);
#pragma unroll
      for (int i = 0; i < N; i++) turn(v[i], w[i], cosines[i], sines[i]);
      store_pack(place.out + index, v);
      store_pack(place.out + half + index, w);
    } else {
      load_pack(v, place.x + half + index);
      store_pack(place.out + half + index, v);
    }
  }
}

// A piece: a pair, or one value that does not turn. Any strides and starts.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) rotary_pairs_kernel(Params p) {
  const Token token = token_of(p);
  const int half = static_cast<int>(p.q.rotary_dim / 2);
  for (int piece = static_cast<int>(threadIdx.x); piece < p.num_pieces; piece += static_cast<int>(blockDim.x)) {
    const Place<T> place = place_of<T>(p, token, piece);
    if (place.index >= half) {
      place.out[half + place.index] = place.x[half + place.index];
      continue;
    }
    const int first = p.q.is_interleaved ? 2 * place.index : place.index;
    const int second = p.q.is_interleaved ? first + 1 : first + half;
    float a = to_float(place.x[first]), b = to_float(place.x[second]);
    turn(a, b, token.cosines[place.index] + token.spoiled, token.sines[place.index] + token.spoiled);
    place.out[first] = from_float<T>(a);
    place.out[second] = from_float<T>(b);
  }
}

bool lies_even(const RotaryArgs& args, int64_t n) {
  bool even = is_aligned_16(args.x) && is_aligned_16(args.out);
  for (int i = 0; i < 3; i++) even = even && args.x_strides[i] % n == 0 && args.out_strides[i] % n == 0;
  return even && args.head_dim % n == 0;
}

}  // namespace

void rotary_cuda(const RotaryArgs& q, const RotaryArgs& k, int64_t num_tokens, int64_t num_positions, IdFaults* faults,
                 const CudaStream& stream) {
  dispatch_dtype(q.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int N = kPackSize<T>;
    const int64_t half = q.rotary_dim / 2;
    const bool takes_packs = lies_even(q, N) && lies_even(k, N) && is_aligned_16(q.table) &&
                             (q.is_interleaved ? q.rotary_dim : half) % N == 0;
    const int64_t per_head = !takes_packs       ? q.head_dim - half
                             : q.is_interleaved ? q.head_dim / N
                                                : (q.head_dim - half) / N;
    const int64_t pieces = (q.num_heads + k.num_heads) * per_head;
    ALULA_CHECK(pieces < (int64_t{1} << 30), "q and k have ", q.num_heads, " and ", k.num_heads, " heads of ",
                q.head_dim, "; accepted: up to 2^30 values of a token");
    if (pieces == 0) return;
    const Params p = {q, k, static_cast<int>(pieces), static_cast<int>(per_head), num_positions, faults};
    const int64_t threads = (pieces + kWarpSize - 1) / kWarpSize * kWarpSize;
    const LaunchOptions options = {.blocks = {num_tokens},
                                   .threads = static_cast<int>(threads < kMaxThreads ? threads : kMaxThreads)};
    if (!takes_packs) return launch("rotary_pairs_kernel", rotary_pairs_kernel<T>, options, stream, p);
    launch("rotary_packs_kernel", q.is_interleaved ? rotary_packs_kernel<T, true> : rotary_packs_kernel<T, false>,
           options, stream, p);
  });
}

}  // namespace alula
