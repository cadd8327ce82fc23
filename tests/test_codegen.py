"""What CodeGen alone has: rotary positions, sharded projections, merged matrices, a head with bias."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import alula
import pytest
import torch
import transformers
from alula.config import CodeGenConfig
from decoder_cases import TOLERANCE, alula_model, hf_model, random_ids, random_values, worst
from torch._subclasses.fake_tensor import FakeTensorMode

CLASSES = ("CodeGenModel", "CodeGenForCausalLM")


def small(**changes: Any) -> CodeGenConfig:
    values = {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 61, "rotary_dim": 8, **changes}
    return CodeGenConfig(**random_values(1, "codegen", **values))


@pytest.mark.parametrize("rotary_dim", [2, 6, 24, 40, 80])
def test_any_part_of_a_head_turns(rotary_dim: int) -> None:
    reference = hf_model(2, "CodeGenForCausalLM", n_embd=320, n_head=4, rotary_dim=rotary_dim)
    model = alula_model(reference)
    ids = random_ids(model, 2, 20)
    positions = torch.randint(48, (2, 20), generator=torch.Generator().manual_seed(1))
    for kwargs in ({}, {"position_ids": positions}, {"position_ids": positions[:1]}):
        assert worst(model(ids, **kwargs).logits, reference(ids, **kwargs).logits) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "inner"), [(4, 37), (12, None), (4, 1)])
def test_weights_are_read_back_from_the_merged_matrices(heads: int, inner: int | None, dtype: torch.dtype) -> None:
    """Whatever the sizes, and after any part of them changed."""
    reference = copy.deepcopy(
        hf_model(2, "CodeGenForCausalLM", n_embd=8 * heads, n_head=heads, n_inner=inner, rotary_dim=8)
    )
    model = alula_model(reference.to(dtype), dtype)
    ids = random_ids(model, 1, 8)
    for _ in range(2):
        model(ids)
        state = model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in reference.state_dict().items())
        for name in ("attn.qkv_proj", "mlp.fc_in", "attn.out_proj", "mlp.fc_out"):
            theirs = reference.transformer.h[0].get_submodule(name)
            layer = model.transformer.h[0].get_submodule(name)
            x = torch.randn(3, layer.in_features, dtype=dtype)
            if name != "attn.qkv_proj":  # its rows come in alula's order
                assert worst(layer(x), theirs(x)) <= (1e-5 if dtype == torch.float32 else 0.1)
            theirs.weight.data = theirs.weight.data.flip(0)
            layer.weight = theirs.weight
    if dtype == torch.float32:
        assert worst(model(ids).logits, reference(ids).logits) <= TOLERANCE
    model.to(torch.bfloat16).float()
    expected = {name: value.bfloat16().float() for name, value in reference.state_dict().items()}
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model.decode_bytes() == sum(
        value.numel() * 4 for name, value in expected.items() if "wte" not in name and "lm_head.weight" not in name
    ) + model.lm_head.stored("weight").nbytes + _padding_bytes(model)


def test_fake_tensors_take_no_weights() -> None:
    """A first pass of which nothing has values says so, and changes nothing; a later one gives shapes."""
    reference = hf_model(2, "CodeGenForCausalLM")
    model, ids = alula_model(reference), random_ids(reference, 2, 6)

    def traced() -> torch.Tensor:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return model(mode.from_tensor(ids)).logits

    with pytest.raises(RuntimeError, match="run the model before"):
        traced()
    expected = reference(ids).logits
    assert worst(model(ids).logits, expected) <= TOLERANCE
    assert traced().shape == expected.shape
    assert worst(model(ids).logits, expected) <= TOLERANCE


def _padding_bytes(model: Any) -> int:
    """Bytes by which packed matrices exceed their values: the kernels read whole panels."""
    extra = 0
    for block in model.transformer.h:
        for name in ("attn.qkv_proj", "mlp.fc_in", "attn.out_proj", "mlp.fc_out"):
            layer = block.get_submodule(name)
            extra += layer.stored("weight").nbytes - 4 * layer.in_features * layer.out_features
    return extra


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_checkpoints_pass_to_and_from_transformers(cls: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = copy.deepcopy(hf_model(4, cls)).to(dtype)
    reference.save_pretrained(tmp_path / "theirs")
    model = getattr(alula, cls).from_pretrained(tmp_path / "theirs")
    assert model.dtype == dtype
    state = reference.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "ours", max_shard_size="300KB")
    back = getattr(transformers, cls).from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())
    auto = alula.AutoModel if cls == "CodeGenModel" else alula.AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "ours")
    assert type(again) is type(model)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_buffers_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    reference = hf_model(4, "CodeGenForCausalLM")
    reference.config.save_pretrained(tmp_path)
    old = dict(reference.state_dict())
    for layer in range(reference.config.n_layer):
        for name, value in (
            ("causal_mask", torch.ones(1, 1, 8, 8)),
            ("bias", torch.ones(8)),
            ("masked_bias", torch.ones(())),
        ):
            old[f"transformer.h.{layer}.attn.{name}"] = value
    torch.save(old, tmp_path / "pytorch_model.bin")
    state = alula.CodeGenForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in reference.state_dict().items())


def test_eight_shards(tmp_path: Path) -> None:
    """CodeGen2: the same model with its rows cut in eight gives the same logits and is written back in eight."""
    reference = hf_model(2, "CodeGenForCausalLM", n_embd=128, n_head=8, rotary_dim=16)
    four, ids = alula_model(reference), random_ids(reference, 2, 9)
    state = dict(reference.state_dict())
    for name, value in state.items():
        if "qkv_proj" in name:
            query, values, key = (part.flatten(0, 1) for part in value.view(4, 3, 32, 128).unbind(1))
            state[name] = torch.stack([part.view(8, 16, 128) for part in (query, values, key)], 1).view(384, 128)
    eight = alula.CodeGenForCausalLM(
        CodeGenConfig(**{**reference.config.to_dict(), "num_shards": 8}), init_weights=False
    )
    eight.load_state_dict(state)
    assert torch.equal(eight(ids).logits, four(ids).logits)
    assert all(torch.equal(value, state[name]) for name, value in eight.state_dict().items())
    eight.save_pretrained(tmp_path)
    assert torch.equal(alula.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, four(ids).logits)
    four.save_pretrained(tmp_path)
    assert not torch.equal(
        alula.CodeGenForCausalLM.from_pretrained(tmp_path, num_shards=8)(ids).logits, four(ids).logits
    )


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_has_a_bias_whatever_happens_to_it(tied: bool, tmp_path: Path) -> None:
    reference = copy.deepcopy(hf_model(6, "CodeGenForCausalLM", tie_word_embeddings=tied, vocab_size=97))
    model = alula_model(reference)
    ids = random_ids(model, 2, 9)
    before = model(ids).logits
    assert worst(before, reference(ids).logits) <= TOLERANCE
    model.resize_token_embeddings(103)
    assert torch.equal(model(ids).logits[..., :97], before)
    assert torch.allclose(model.lm_head.bias[97:], reference.lm_head.bias.mean(), atol=1e-6)
    model.save_pretrained(tmp_path)
    assert torch.equal(alula.CodeGenForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    model.resize_token_embeddings(97)
    assert torch.equal(model(ids).logits, before)
    head = torch.nn.Linear(model.config.n_embd, 97)
    model.set_output_embeddings(head)
    reference.set_output_embeddings(head)
    assert worst(model(ids).logits, reference(ids).logits) <= TOLERANCE


def test_configuration_defaults_are_those_of_transformers() -> None:
    ours, theirs = CodeGenConfig(), transformers.CodeGenConfig()
    keys = [*CodeGenConfig.fields, *CodeGenConfig.aliases, "tie_word_embeddings", "use_cache", "num_labels"]
    keys.remove("num_shards")
    assert {key: getattr(ours, key) for key in keys} == {key: getattr(theirs, key) for key in keys}
    assert ours.num_shards == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rotary_dim": 7}, "rotary_dim=7 does not fit the head size 16; accepted: an even number up to the head size"),
        ({"rotary_dim": 18}, "rotary_dim=18 does not fit the head size 16"),
        ({"rotary_dim": 0}, "rotary_dim=0 .* positive integer"),
        ({"rotary_dim": None}, "rotary_dim=None .* positive integer"),
        ({"n_head": 2, "n_embd": 64}, "n_embd=64 and n_head=2 are not both divisible by num_shards=4"),
        ({"num_shards": 3}, "not both divisible by num_shards=3"),
        ({"num_shards": 0}, "num_shards=0 .* positive integer"),
        ({"n_ctx": "2048"}, "n_ctx='2048'"),
    ],
)
def test_values_that_cannot_be_right(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**values)


def test_calls_that_cannot_be_right() -> None:
    """They say what is wrong and leave the cache as it was."""
    model = alula.CodeGenForCausalLM(small())
    ids, limit = torch.ones(2, 3, dtype=torch.int64), model.config.n_positions
    cache = model(ids).past_key_values
    expected = model(ids, past_key_values=cache).logits
    cache.crop(3)
    for kwargs, message in (
        ({"input_ids": torch.ones(2, limit, dtype=torch.int64)}, f"more than n_positions={limit}"),
        ({"position_ids": torch.tensor([[0, 1, limit]])}, f"position_ids holds {limit}; accepted: 0 to {limit - 1}"),
        ({"position_ids": torch.tensor([[0, -1, 2]])}, f"position_ids holds -1; accepted: 0 to {limit - 1}"),
        ({"token_type_ids": torch.full((2, 3), 61)}, "token_type_ids holds 61; accepted: 0 to 60"),
        ({"input_ids": ids + 60}, "input_ids holds 61; accepted: 0 to 60"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{"input_ids": ids, **kwargs}, past_key_values=cache)
        assert (cache.get_seq_length(), cache.lengths.tolist()) == (3, [3, 3])
    assert torch.equal(model(ids, past_key_values=cache).logits, expected)
