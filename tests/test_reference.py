"""The reference against PyTorch's own attention and by properties that need no reference."""

import pytest
import torch
import torch.nn.functional as F
from alula.testing import reference


def cache_of(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.cat([key, value], dim=-1)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_scaled_dot_product_attention(num_kv_heads: int, causal: bool) -> None:
    batch, tokens, heads, dim = 2, 5, 6, 8
    q = torch.randn(batch, heads, tokens, dim, dtype=torch.float64)
    key, value = torch.randn(2, batch, num_kv_heads, tokens, dim, dtype=torch.float64)
    group = heads // num_kv_heads
    expected = F.scaled_dot_product_attention(
        q, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), is_causal=causal
    )
    positions = torch.arange(tokens, dtype=torch.int32).expand(batch, -1)
    lengths = torch.full((batch,), tokens, dtype=torch.int32)
    out = reference.attention(q.transpose(1, 2), cache_of(key, value), positions, lengths, causal=causal)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2))


def test_attention_masks_mean_what_they_say() -> None:
    q = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    kv_cache = torch.randn(1, 1, 4, 16, dtype=torch.float64)
    kv_cache[:, :, 3] = torch.nan  # never written
    positions, lengths = torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    mask = torch.tensor([[[[True, False, True], [True, False, True], [False, False, False]]]])
    out = reference.attention(q, kv_cache, positions, lengths, mask=mask)
    torch.testing.assert_close(out[0, 0], kv_cache[0, 0, 0, 8:].repeat(2))
    torch.testing.assert_close(out[0, 1], kv_cache[0, 0, 0, 8:].repeat(2))
    assert (out[0, 2] == 0).all()
    additive = torch.zeros(1, 1, 3, 3).masked_fill(~mask, -torch.inf)
    assert torch.equal(reference.attention(q, kv_cache, positions, lengths, mask=additive), out)
    padded = reference.attention(q, kv_cache, torch.tensor([[-1, 1, 2]], dtype=torch.int32), lengths)
    assert (padded[0, 0] == 0).all()
    assert padded.isfinite().all()


def test_qkv_projection_splits_and_stores() -> None:
    heads, kv_heads, dim, width = 3, 1, 8, 24
    x = torch.randn(2, 2, width, dtype=torch.float64)
    weight = torch.randn((heads + 2 * kv_heads) * dim, width, dtype=torch.float64)
    kv_cache = torch.full((2, kv_heads, 4, 2 * dim), torch.nan, dtype=torch.float64)
    positions = torch.tensor([[-1, 0], [2, 3]], dtype=torch.int32)
    q = reference.qkv_projection(
        x, weight, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, kv_cache=kv_cache, positions=positions
    )
    plain = x @ weight.T
    torch.testing.assert_close(q.flatten(2), plain[..., : heads * dim])
    torch.testing.assert_close(kv_cache[0, 0, 0], plain[0, 1, heads * dim :])
    torch.testing.assert_close(kv_cache[1, 0, 2:], plain[1, :, heads * dim :])
    assert kv_cache[0, 0, 1:].isnan().all()
    assert kv_cache[1, 0, :2].isnan().all()


def test_softmax_of_nothing_is_zeros() -> None:
    scores = torch.randn(2, 3, 4)
    assert (reference.scaled_masked_softmax(scores, torch.zeros(4, dtype=torch.bool)) == 0).all()
    assert (reference.scaled_masked_softmax(scores, torch.full((4,), -torch.inf)) == 0).all()
    causal = reference.scaled_masked_softmax(torch.randn(5, 3), causal=True)  # T > S: the first queries see nothing
    torch.testing.assert_close(causal.sum(-1), torch.tensor([0.0, 0, 1, 1, 1], dtype=torch.float64))


def test_same_dtype_computes_in_the_dtype_of_its_input() -> None:
    x, weight = torch.randn(3, 16).bfloat16(), torch.randn(5, 16).bfloat16()
    y = reference.same_dtype(reference.linear, x, weight, activation="gelu")
    assert torch.equal(y, F.gelu(F.linear(x, weight)))
