"""Cross-attention: GPT-2 against transformers, multi-head GPTBigCode against GPT-2 (whose own does not work there)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import alula
import pytest
import torch
from alula.config import GPTBigCodeConfig
from decoder_cases import TOLERANCE, alula_model, hf_model, padding_mask, random_ids, worst
from torch import Tensor


def pair(seed: int, **fixed: Any) -> tuple[Any, Any]:
    reference = hf_model(seed, "GPT2LMHeadModel", add_cross_attention=True, **fixed)
    return reference, alula_model(reference)


def states_of(model: Any, batch: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, columns, model.config.n_embd, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(8))
def test_everything_a_pass_returns(seed: int) -> None:
    reference, model = pair(seed)
    batch, tokens, columns = 1 + seed % 3, 4 + seed, 3 + 5 * (seed % 3)
    ids, states = random_ids(model, batch, tokens, seed), states_of(model, batch, columns, seed)
    generator = torch.Generator().manual_seed(seed)
    full = torch.rand(batch, 1, tokens, columns, generator=generator) < 0.6
    full[..., 0] = True
    additive = torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float32).min)
    padding = padding_mask(("left", "right", "holes")[seed % 3], batch, columns)
    masks = ((None, None), (padding, padding), (additive, additive), (full, additive), (full[:, 0], additive))
    for mask, given in masks:
        options = {"output_attentions": True, "output_hidden_states": True}
        theirs = reference(ids, encoder_hidden_states=states, encoder_attention_mask=given, **options)
        ours = model(ids, encoder_hidden_states=states, encoder_attention_mask=mask, **options)
        assert worst(ours.logits, theirs.logits) <= TOLERANCE
        for name in ("hidden_states", "attentions", "cross_attentions"):
            for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
                assert worst(a, b) <= TOLERANCE, name
        plain = model(ids, encoder_hidden_states=states, encoder_attention_mask=mask, labels=ids)
        assert torch.equal(plain.logits, ours.logits)
        assert plain.cross_attentions is None
    assert worst(model(ids).logits, reference(ids).logits) <= TOLERANCE


@pytest.mark.parametrize("seed", range(4))
def test_the_cache_keeps_keys_and_values_of_the_encoder(seed: int) -> None:
    reference, model = pair(seed)
    ids, states = random_ids(model, 3, 12, seed), states_of(model, 3, 7)
    mask, padding = padding_mask("right", 3, 7), padding_mask("left", 3, 12)
    encoder = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    whole = reference(ids, attention_mask=padding, **encoder).logits
    cache = model.new_cache(3)
    first = model(ids[:, :6], past_key_values=cache, attention_mask=padding[:, :6], **encoder)
    kept = cache.cross
    assert cache.nbytes == sum(t.nbytes for t in [*cache.layers, *kept.layers])
    again = model(ids[:, 6:7], past_key_values=cache, **encoder)
    rest = [model(ids[:, t : t + 1], past_key_values=cache) for t in range(7, 12)]
    assert cache.cross is kept
    logits = torch.cat([out.logits for out in (first, again, *rest)], 1)
    assert worst(logits, whole, padding) <= TOLERANCE
    cache.reorder(torch.tensor([2, 0]))
    swapped = model(ids[[2, 0], :1], past_key_values=cache).logits
    cache.crop(12)
    assert torch.equal(model(ids[[2, 0], :1], past_key_values=cache).logits, swapped)
    cache.reset()
    assert cache.cross is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    """Equal bits, whatever padding stands beside its tokens and beside its encoder's."""
    model = alula_model(hf_model(3, "GPT2LMHeadModel", add_cross_attention=True), dtype)
    ids, states = random_ids(model, 4, 6), states_of(model, 4, 9).to(dtype)
    for kind in ("left", "right", "holes"):
        mask, real = padding_mask(kind, 4, 6), padding_mask(kind, 4, 9)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        together = model(
            ids, attention_mask=mask, position_ids=positions, encoder_hidden_states=states, encoder_attention_mask=real
        ).logits
        for row in range(4):
            own = states[row : row + 1, real[row].bool()]
            alone = model(ids[row : row + 1, mask[row].bool()], encoder_hidden_states=own).logits
            assert torch.equal(alone[0], together[row, mask[row].bool()])


def test_head_masks_and_scales_hold_for_it_too() -> None:
    reference, model = pair(5, scale_attn_by_inverse_layer_idx=True, n_layer=3)
    heads, head_dim = model.config.n_head, model.config.head_dim
    masked = copy.deepcopy(reference)
    head_mask = torch.rand(3, heads, generator=torch.Generator().manual_seed(1))
    for layer, block in enumerate(masked.transformer.h):
        row = head_mask[layer].repeat_interleave(head_dim).unsqueeze(1)
        block.attn.c_proj.weight.data *= row
        block.crossattention.c_proj.weight.data *= row
    ids, states = random_ids(model, 2, 9), states_of(model, 2, 5)
    theirs = masked(ids, encoder_hidden_states=states).logits
    assert worst(model(ids, encoder_hidden_states=states, head_mask=head_mask).logits, theirs) <= TOLERANCE


def test_an_encoder_without_tokens_adds_nothing_but_a_bias() -> None:
    _, model = pair(2)
    ids, states = random_ids(model, 2, 5), states_of(model, 2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    out = model(ids, encoder_hidden_states=states, encoder_attention_mask=mask, output_attentions=True)
    assert out.logits.isfinite().all()
    assert not out.cross_attentions[0][1].any()
    other = model(ids, encoder_hidden_states=states + 1, encoder_attention_mask=mask)
    assert torch.equal(other.logits[1], out.logits[1])


@pytest.mark.parametrize("seed", range(4))
def test_greedy_tokens(seed: int) -> None:
    reference, model = pair(seed, eos_token_id=None)
    ids, padding = random_ids(model, 3, 7, seed), padding_mask("left", 3, 7)
    states, mask = states_of(model, 3, 6), padding_mask("holes", 3, 6)
    encoder = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 3}
    theirs = reference.generate(ids, attention_mask=padding, **encoder, **options)
    assert torch.equal(model.generate(ids, attention_mask=padding, **encoder, **options), theirs)
    twice = model.generate(ids, attention_mask=padding, **encoder, **options, num_return_sequences=2)
    assert torch.equal(twice[::2], theirs)
    assert torch.equal(twice[1::2], theirs)


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "relu"])
def test_multi_head_gpt_bigcode_is_gpt2_with_other_layouts(activation: str, tmp_path: Path) -> None:
    reference, model = pair(3, activation_function=activation)
    config, heads = model.config, model.config.n_head
    same = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function")
    shared = {name: getattr(config, name) for name in (*same, "layer_norm_epsilon", "tie_word_embeddings")}
    other = alula.GPTBigCodeForCausalLM(
        GPTBigCodeConfig(
            **shared, scale_attn_weights=config.scale_attn_weights, multi_query=False, add_cross_attention=True
        ),
        init_weights=False,
    )
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("weight") and value.dim() == 2 and ".h." in name:
            value = value.T
        if ".attn.c_attn." in name:  # GPTBigCode has the rows of a head together
            value = value.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
        state[name] = value.contiguous()
    other.load_state_dict(state)
    ids, states, mask = random_ids(model, 2, 8), states_of(model, 2, 6), padding_mask("right", 2, 6)
    encoder = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    if config.scale_attn_by_inverse_layer_idx:
        assert config.n_layer == 1, "choose another seed: GPTBigCode has no such scale"
    assert worst(other(ids, **encoder).logits, reference(ids, **encoder).logits) <= TOLERANCE
    other.save_pretrained(tmp_path)
    back = alula.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(back(ids, **encoder).logits, other(ids, **encoder).logits)


def test_a_checkpoint_without_cross_attention_gets_one_at_random(tmp_path: Path) -> None:
    hf_model(3, "GPT2LMHeadModel").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"lacks transformer\.h\.0\.crossattention.*initialised at random"):
        model = alula.GPT2LMHeadModel.from_pretrained(tmp_path, add_cross_attention=True)
    ids = random_ids(model, 2, 5)
    assert torch.equal(model(ids).logits, alula.GPT2LMHeadModel.from_pretrained(tmp_path)(ids).logits)
    assert model(ids, encoder_hidden_states=states_of(model, 2, 3)).logits.isfinite().all()


@pytest.mark.parametrize("has_head", [True, False])
def test_a_failing_pass_keeps_nothing_of_the_encoder(has_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair(1)
    ids, cache = random_ids(model, 2, 4), model.new_cache(2)

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.transformer, "_run_blocks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            (model if has_head else model.transformer)(
                ids, past_key_values=cache, encoder_hidden_states=states_of(model, 2, 5)
            )
    assert cache.cross is None
    assert cache.get_seq_length() == 0
    others = states_of(model, 2, 3)
    again = model(ids, past_key_values=cache, encoder_hidden_states=others).logits
    assert torch.equal(again, model(ids, encoder_hidden_states=others).logits)


def test_calls_that_cannot_be_right() -> None:
    _, model = pair(1)
    width = model.config.n_embd
    ids, states = random_ids(model, 2, 4), states_of(model, 2, 5)
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]])
    cache = model(ids, encoder_hidden_states=states, encoder_attention_mask=mask).past_key_values
    new, full = model.new_cache(2), torch.ones(2, 4, 5).bool()
    encoder = {"encoder_hidden_states": states}
    for past, kwargs, message in (
        (new, {"encoder_attention_mask": mask}, "encoder_attention_mask is given without encoder_hidden_states"),
        (new, {"encoder_hidden_states": states[:1]}, "encoder_hidden_states has a batch of 1, the input one of 2"),
        (new, {"encoder_hidden_states": states[..., 1:]}, rf"encoder_hidden_states has shape .*{width}\]"),
        (new, {"encoder_hidden_states": states[:, :0]}, r"encoder_hidden_states has shape \[2, 0"),
        (new, {"encoder_hidden_states": states.bfloat16()}, "encoder_hidden_states has dtype torch.bfloat16"),
        (new, {**encoder, "encoder_attention_mask": mask[:, 1:]}, r"shape \[2, 4\]; accepted: \[2, 5\]"),
        (new, {**encoder, "encoder_attention_mask": full.long()}, "has dtype torch.int64; accepted: bool"),
        (cache, {"encoder_hidden_states": states[:, 1:]}, "has 4 columns; past_key_values keeps .* of 5"),
        (
            cache,
            {"encoder_attention_mask": mask.roll(1, 1)},
            "differs from the one that past_key_values was filled with",
        ),
        (cache, {"encoder_attention_mask": full}, "cannot follow padding that was left out"),
    ):
        columns = past.get_seq_length()
        with pytest.raises(ValueError, match=message):
            model(ids, past_key_values=past, **kwargs)
        assert past.get_seq_length() == columns
    with pytest.raises(ValueError, match="labels have shape"):  # seen when the pass is over
        model(ids, past_key_values=new, labels=ids[:, 1:], **encoder)
    assert new.cross is None
    assert new.get_seq_length() == 0
    with pytest.raises(ValueError, match="add_cross_attention=True is not supported with multi-query attention"):
        GPTBigCodeConfig(add_cross_attention=True)
    plain = alula.CodeGenForCausalLM(alula.CodeGenConfig(n_embd=64, n_head=4, n_layer=1, vocab_size=20, rotary_dim=8))
    with pytest.raises(TypeError, match="encoder_hidden_states"):
        plain(ids, encoder_hidden_states=states)
