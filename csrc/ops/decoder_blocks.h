// decoder_blocks: a whole stack of decoder blocks in one call. What alula._C needs of it: letting go of a stack.
#pragma once

#include <cstdint>

namespace alula {

// Forgets the stack that torch.ops.alula.bind_decoder_blocks numbered `id`; calls that run with it end undisturbed.
__attribute__((visibility("default"))) void release_decoder_blocks(int64_t id);

}  // namespace alula
