"""What happens on the second of two GPUs while the first is the current one; skipped where there is one."""

import alula
import pytest
import torch
from alula import ops
from alula.testing.compare import assert_equal_bits
from decoder_cases import alula_model, hf_model, random_ids

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU or none: two are needed")


def test_ops_run_where_their_tensors_are(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 200).to(dtype), torch.randn(96, 200).to(dtype)
    results = []
    for device in ("cuda:0", "cuda:1"):
        packed = ops.pack(weight.to(device))
        with torch.cuda.device(0):
            results.append(ops.linear(x.to(device), packed))
        assert results[-1].device == torch.device(device)
    assert_equal_bits(results[1].cpu(), results[0].cpu())


def test_tensors_on_two_gpus_are_refused() -> None:
    with pytest.raises(RuntimeError, match="residual is on another device"):
        ops.layer_norm(torch.zeros(2, 8).cuda(0), torch.ones(8).cuda(0), residual=torch.zeros(2, 8).cuda(1))


def test_generation_on_each_of_two_gpus() -> None:
    ours = alula_model(hf_model(5, "GPTBigCodeForCausalLM"))
    ids = random_ids(ours, 2, 9)
    options = {"max_new_tokens": 24, "eos_token_id": [], "do_sample": True, "seed": 3, "top_p": 0.9}
    first = ours.to("cuda:0").generate(ids, **options)
    second = ours.to("cuda:1").generate(ids, **options)
    assert second.device == torch.device("cuda", 1)
    assert torch.equal(first.cpu(), second.cpu())
    cache = alula.KVCache(ours.config, 2, dtype=ours.dtype, device="cuda:0")
    with pytest.raises(ValueError, match="past_key_values is on cuda:0, the model on cuda:1"):
        ours(ids.to("cuda:1"), past_key_values=cache)
