// rotary on CUDA: query and key in one launch, a thread for each piece of a head. A piece is 16 bytes of values where
// everything lies even, else one pair. A position outside the table gives NaN and is noted for the host: it cannot be
// checked without waiting for the device.
//
// Not measured yet: no GPU was at hand.
#include "ops/rotary.h"

#include "core/dispatch.h"
#include "cuda/launch.h"
#include "cuda/note_id.cuh"
#include "cuda/vec.cuh"

namespace alula {
namespace {

constexpr int kThreads = 256;

struct Params {
  RotaryArgs q, k;  // of the same tokens and head size
  int64_t num_pieces, pieces_per_head;
  int64_t num_positions;  // P
  IdFaults* faults;
};

// The pair (a, b) turned by an angle.
__device__ __forceinline__ void turn(float& a, float& b, float cosine, float sine) {
  const float turned = a * cosine - b * sine;
  b = b * cosine + a * sine;
  a = turned;
}

// Where a piece's head begins, and the angles of its token.
template <typename T>
struct Place {
  const T* x;
  T* out;
  int half, index;  // of the piece in its head
  const float* cosines;
  const float* sines;
  float spoiled;  // added to angles: NaN for a position that does not exist
};

template <typename T>
__device__ __forceinline__ Place<T> place_of(const Params& p, int64_t piece) {
  const int64_t row = piece / p.pieces_per_head;  // (token of B * T, head of q, then of k)
  const int64_t heads = p.q.num_heads + p.k.num_heads;
  const int64_t token = row / heads;
  int64_t head = row % heads;
  const bool is_key = head >= p.q.num_heads;
  const RotaryArgs& args = is_key ? p.k : p.q;
  if (is_key) head -= p.q.num_heads;
  const int64_t b = token / args.tokens, t = token % args.tokens;
  const int64_t position = args.positions[token];
  const bool is_there = position >= 0 && position < p.num_positions;
  if (!is_there) note_id(p.faults, IdKind::kRotaryPosition, position, p.num_positions);
  Place<T> place;
  place.x = static_cast<const T*>(args.x) + b * args.x_strides[0] + t * args.x_strides[1] + head * args.x_strides[2];
  place.out =
      static_cast<T*>(args.out) + b * args.out_strides[0] + t * args.out_strides[1] + head * args.out_strides[2];
  place.half = static_cast<int>(args.rotary_dim / 2);
  place.index = static_cast<int>(piece % p.pieces_per_head);
  place.cosines = args.table + (is_there ? position : 0) * args.rotary_dim;
  place.sines = place.cosines + place.half;
  place.spoiled = is_there ? 0.0f : NAN;
  return place;
}

// A piece: 16 bytes, and for halves the 16 bytes that they turn with.
template <typename T, bool kInterleaved>
__global__ void __launch_bounds__(kThreads) rotary_packs_kernel(Params p) {
  constexpr int N = kPackSize<T>;
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (piece >= p.num_pieces) return;
  const Place<T> place = place_of<T>(p, piece);
  const int index = place.index * N;
  float v[N];
  if (kInterleaved) {
    load_pack(v, place.x + index);
    if (index < 2 * place.half) {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const int pair = (index + i) / 2;
        turn(v[i], v[i + 1], place.cosines[pair] + place.spoiled, place.sines[pair] + place.spoiled);
      }
    }
    store_pack(place.out + index, v);
  } else if (index < place.half) {
    float w[N];
    load_pack(v, place.x + index);
    load_pack(w, place.x + place.half + index);
#pragma unroll
    for (int i = 0; i < N; i++) {
      turn(v[i], w[i], place.cosines[index + i] + place.spoiled, place.sines[index + i] + place.spoiled);
    }
    store_pack(place.out + index, v);
    store_pack(place.out + place.half + index, w);
  } else {
    load_pack(v, place.x + place.half + index);
    store_pack(place.out + place.half + index, v);
  }
}

// A piece: a pair, or one value that does not turn. Any strides and starts.
template <typename T>
__global__ void __launch_bounds__(kThreads) rotary_pairs_kernel(Params p) {
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (piece >= p.num_pieces) return;
  const Place<T> place = place_of<T>(p, piece);
  if (place.index >= place.half) {
    place.out[place.half + place.index] = place.x[place.half + place.index];
    return;
  }
  const int first = p.q.is_interleaved ? 2 * place.index : place.index;
  const int second = p.q.is_interleaved ? first + 1 : first + place.half;
  float a = to_float(place.x[first]), b = to_float(place.x[second]);
  turn(a, b, place.cosines[place.index] + place.spoiled, place.sines[place.index] + place.spoiled);
  place.out[first] = from_float<T>(a);
  place.out[second] = from_float<T>(b);
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
    const bool takes_packs = lies_even(q, N) && lies_even(k, N) && (q.is_interleaved ? q.rotary_dim : half) % N == 0;
    const int64_t pieces = !takes_packs       ? q.head_dim - half
                           : q.is_interleaved ? q.head_dim / N
                                              : (q.head_dim - half) / N;
    const Params p = {q, k, num_tokens * (q.num_heads + k.num_heads) * pieces, pieces, num_positions, faults};
    const LaunchOptions options = {.blocks = {(p.num_pieces + kThreads - 1) / kThreads}, .threads = kThreads};
    if (!takes_packs) return launch("rotary_pairs_kernel", rotary_pairs_kernel<T>, options, stream, p);
    launch("rotary_packs_kernel", q.is_interleaved ? rotary_packs_kernel<T, true> : rotary_packs_kernel<T, false>,
           options, stream, p);
  });
}

}  // namespace alula
