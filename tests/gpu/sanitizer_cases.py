"""Each CUDA kernel once on a small shape, for compute-sanitizer: tests/gpu/prove.py runs this under it."""

import os

# Each tensor is an allocation of its own: in torch's blocks of 2 MiB nothing would be out of bounds.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from alula import BlockPlan, ops


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):

        def rand(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, device="cuda").to(dtype)

        for keys in (37, 1500, 9001):
            ops.scaled_masked_softmax(rand(2, 3, keys), torch.rand(3, keys, device="cuda") < 0.5, causal=True)
            ops.scaled_masked_softmax(rand(2, 3, keys))
        for width in (97, 512, 4104):
            ops.layer_norm(rand(3, width), rand(width), rand(width), residual=rand(3, width))
        positions = torch.arange(6, dtype=torch.int32, device="cuda").repeat(2, 1)
        table = ops.rotary_table(50, 16, device="cuda")
        for interleaved in (True, False):
            ops.rotary(rand(2, 6, 4, 24), rand(2, 6, 1, 24), positions, table, interleaved=interleaved)
        weight = ops.pack(rand(77, 130))
        ops.embedding(torch.randint(0, 77, (2, 6), device="cuda"), weight)
        for rows in (1, 5, 16, 20):
            ops.linear(rand(rows, 130), weight, rand(77), norm_weight=rand(130), activation="gelu")
        ops.linear(rand(20, 130), ops.pack(rand(80, 130)), rand(80), residual=rand(20, 80))  # epilogue by packs
        for kind in ("int8", "int4", "int4_asymmetric", "nf4"):
            packed = ops.pack(rand(77, 130), kind)
            ops.embedding(torch.randint(0, 77, (2, 6), device="cuda"), packed._replace(value_dtype=dtype))
            for rows in (1, 16, 20):
                ops.linear(rand(rows, 130), packed, rand(77), norm_weight=rand(130), activation="gelu")
            ops.linear(rand(2, 4100), ops.pack(rand(33, 4100), kind))  # K over blocks
            packed.unpack()
        ops.linear(rand(2100, 72), ops.pack(rand(2100, 72), "int4"))  # large tiles
        qkv = ops.pack(rand(6 * 24, 130))
        cache = rand(2, 1, 300, 48)
        heads = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 24}
        for tokens in (1, 6, 12):
            where = torch.arange(tokens, dtype=torch.int32, device="cuda").repeat(2, 1)
            turns = {"rotary_table": table, "rotary_positions": where}
            ops.qkv_projection(rand(2, tokens, 130), qkv, kv_cache=cache, positions=where, **heads, **turns)
        lengths = torch.tensor([300, 7], dtype=torch.int32, device="cuda")
        for tokens, head_count in ((1, 4), (1, 40), (40, 3)):
            where = torch.arange(260, 260 + tokens, dtype=torch.int32, device="cuda").repeat(2, 1)
            ops.attention(rand(2, tokens, head_count, 24), cache, where, lengths)
        many = 8 * torch.cuda.get_device_properties("cuda").multi_processor_count + 9
        where = torch.full((1, many), 60, dtype=torch.int32, device="cuda")
        for head_dim in (64, 128):  # blocks of 128 rows
            ops.attention(rand(1, many, 32, head_dim), rand(1, 1, 70, 2 * head_dim), where, lengths[1:] + 60)
        wide = rand(1, 1, 70, 512)
        ops.attention(rand(1, 2, 3, 256), wide, positions[:1, :2], lengths[1:])
        for size, head_dim in ((16, 24), (32, 72), (64, 64), (64, 136), (128, 64)):
            lists = [list(range(10)) * 2] + [[block] for block in range(1, 10)]
            plan = BlockPlan.from_lists(lists, size, is_causal=size == 32)
            q, k, v = rand(2, 10 * size - 3, 3, head_dim), *rand(2, 1, 10 * size, 2 * head_dim).split(head_dim, dim=-1)
            lengths_of = torch.tensor([10 * size - 3, size], dtype=torch.int32, device="cuda")
            ops.block_sparse_attention(
                q, k, v, plan, lengths=lengths_of, mask=torch.rand(q.shape[:2], device="cuda") < 0.9
            )
            ops.block_sparse_attention(q, k, v, plan)
        state = ops.RowState(
            tokens=torch.zeros(3, 1, dtype=torch.int64, device="cuda"),
            running=torch.ones(3, dtype=torch.bool, device="cuda"),
            out=torch.zeros(3, 4, dtype=torch.int64, device="cuda"),
            step=torch.zeros(1, dtype=torch.int64, device="cuda"),
            report=torch.zeros(2, 3, device="cuda"),
            lengths=torch.zeros(3, dtype=torch.int32, device="cuda"),
            positions=torch.zeros(3, 1, dtype=torch.int64, device="cuda"),
            slots=torch.zeros(3, 1, dtype=torch.int32, device="cuda"),
            seen=torch.zeros(3, dtype=torch.int32, device="cuda"),
        )
        pad = torch.zeros(1, dtype=torch.int64, device="cuda")
        for size in (50, 20011):
            ops.choose_token(rand(3, size), state, pad, pad, drawn=None if size > 50 else state.positions[:, 0])
    torch.cuda.synchronize()
    print("every kernel has run")


if __name__ == "__main__":
    main()
