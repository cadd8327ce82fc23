// rotary on the CPU: a head is widened to fp32 on the stack, turned, and narrowed into its place.
#include "ops/rotary.h"

#include "core/dispatch.h"
#include "cpu/rotate.h"

namespace alula::ALULA_ISA {
namespace {

template <typename W>
void rotate_as(const RotaryArgs& args, int64_t first, int64_t last) {
  constexpr int64_t kMaxHeadDim = 256;
  alignas(64) float head[kMaxHeadDim];
  const int64_t half = args.rotary_dim / 2;
  for (int64_t token = first; token < last; token++) {
    const int64_t b = token / args.tokens, t = token % args.tokens;
    const float* cosine = args.table + args.positions[token] * args.rotary_dim;
    for (int64_t h = 0; h < args.num_heads; h++) {
      const W* x =
          static_cast<const W*>(args.x) + b * args.x_strides[0] + t * args.x_strides[1] + h * args.x_strides[2];
      W* out = static_cast<W*>(args.out) + b * args.out_strides[0] + t * args.out_strides[1] + h * args.out_strides[2];
      for (int64_t i = 0; i < args.head_dim; i += Vec::kWidth) {
        const int64_t left = args.head_dim - i;
        store(head + i, left < Vec::kWidth ? load(x + i, static_cast<int>(left)) : load(x + i));
      }
      if (args.is_interleaved) {
        rotate_interleaved(head, cosine, cosine + half, args.rotary_dim);
      } else {
        rotate_halves(head, cosine, cosine + half, args.rotary_dim);
      }
      for (int64_t i = 0; i < args.head_dim; i += Vec::kWidth) {
        const int64_t left = args.head_dim - i;
        if (left < Vec::kWidth) {
          store(out + i, load(head + i), static_cast<int>(left));
        } else {
          store(out + i, load(head + i));
        }
      }
    }
  }
}

void rotate(const RotaryArgs& args, int64_t first_token, int64_t last_token) {
  dispatch_dtype(args.dtype, [&](auto tag) { rotate_as<typename decltype(tag)::Type>(args, first_token, last_token); });
}

}  // namespace

const RotaryKernels kRotary = {rotate};

}  // namespace alula::ALULA_ISA
