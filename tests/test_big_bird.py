"""BigBirdModel against transformers in float32: full and block-sparse, padded, in training mode, as a decoder."""

from __future__ import annotations

from typing import Any

import alula
import numpy as np
import pytest
import torch
import transformers
from alula.models import big_bird_blocks
from big_bird_cases import (
    TOLERANCE,
    alula_model,
    fresh,
    hf_model,
    needs_causal_decoder,
    padding_mask,
    random_ids,
    random_values,
    switch,
    worst,
)
from torch import Tensor

SEEDS = range(12)


def small(**changes: Any) -> alula.BigBirdConfig:
    return alula.BigBirdConfig(**random_values(0, **changes))


def lengths(config: Any) -> list[int]:
    """Both sides of the switch to blocks, multiples of the block size and others."""
    limit, size = switch(config), config.block_size
    return [1, 19, limit, limit + 1, limit + size, limit + 2 * size + 5]


def assert_like(ours: Any, theirs: Any, real: Tensor | None) -> None:
    """Hidden states of every position, probabilities of every query that is a token."""
    tokens = ours.last_hidden_state.shape[1]
    assert worst(ours.last_hidden_state, theirs.last_hidden_state) <= TOLERANCE
    assert worst(ours.pooler_output, theirs.pooler_output) <= TOLERANCE
    for mine, want in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert mine.shape[1] == tokens
        assert worst(mine, want[:, :tokens]) <= TOLERANCE
    for mine, want in zip(ours.attentions, theirs.attentions, strict=True):
        assert mine.shape[2:] == (tokens, tokens)
        want = want[:, :, :tokens, :tokens]
        if real is not None:
            mine, want = (p.transpose(1, 2)[real.bool()] for p in (mine, want))
        assert worst(mine, want) <= TOLERANCE


# --- an encoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_like_transformers(seed: int) -> None:
    reference = hf_model(seed)
    model = alula_model(reference)
    for tokens in lengths(model.config):
        ids = random_ids(model, 2, tokens, seed)
        types = torch.randint(0, model.config.type_vocab_size, ids.shape)
        for kind in ("none", "right", "left", "holes")[: 4 if tokens > 2 else 1]:
            mask = padding_mask(kind, 2, tokens)
            given = {"attention_mask": mask, "token_type_ids": types if kind != "none" else None}
            theirs, ours = fresh(reference)(ids, **given), model(ids, **given)
            assert worst(ours.last_hidden_state, theirs.last_hidden_state) <= TOLERANCE, (tokens, kind)
            assert worst(ours.pooler_output, theirs.pooler_output) <= TOLERANCE


def test_every_instruction_set(isa: str) -> None:
    reference = hf_model(3)
    model = alula_model(reference)
    for tokens in (33, switch(model.config) + 30):
        ids, mask = random_ids(model, 2, tokens), padding_mask("right", 2, tokens)
        theirs = fresh(reference)(ids, attention_mask=mask).last_hidden_state
        assert worst(model(ids, attention_mask=mask).last_hidden_state, theirs) <= TOLERANCE


@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
@pytest.mark.parametrize("kind", ["none", "right", "left"])
def test_all_outputs(kind: str, attention_type: str) -> None:
    reference = hf_model(3, attention_type=attention_type, num_random_blocks=2, block_size=16, num_hidden_layers=2)
    model = alula_model(reference)
    tokens = switch(model.config) + 21
    ids, mask = random_ids(model, 2, tokens), padding_mask(kind, 2, tokens)
    options = {"attention_mask": mask, "output_attentions": True, "output_hidden_states": True}
    theirs, ours = reference(ids, **options), model(ids, **options)
    assert ours.keys() == list(theirs.keys())
    assert len(ours.hidden_states) == model.config.num_hidden_layers + 1
    assert_like(ours, theirs, mask)
    assert len(model(ids, **options, return_dict=False)) == len(ours)
    assert torch.equal(model(ids, **options)[0], ours.last_hidden_state)
    assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, ours.last_hidden_state)


def test_embeddings_and_positions_may_be_given() -> None:
    reference = hf_model(5, rescale_embeddings=True)
    model = alula_model(reference)
    for tokens in (30, switch(model.config) + 7):
        ids = random_ids(model, 2, tokens)
        positions = torch.randint(0, 1100, (2, tokens))
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(embeds, reference.get_input_embeddings()(ids))
        for given in ({"position_ids": positions}, {}):
            theirs = fresh(reference)(inputs_embeds=embeds, **given).last_hidden_state
            assert worst(model(inputs_embeds=embeds, **given).last_hidden_state, theirs) <= TOLERANCE
            assert worst(model(ids, **given).last_hidden_state, theirs) <= TOLERANCE
        row = positions[:1]
        assert torch.equal(
            model(ids, position_ids=row).last_hidden_state,
            model(ids, position_ids=row.expand(2, -1)).last_hidden_state,
        )


def test_head_mask() -> None:
    """As if the heads that are masked were not multiplied with the output matrix."""
    reference = hf_model(1, hidden_size=48, num_attention_heads=3, num_hidden_layers=2)
    model, without = alula_model(reference), alula_model(reference)
    heads = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    for layer, keep in zip(without.encoder.layer, heads, strict=True):
        dense = layer.attention.output.dense
        dense.weight = dense.weight * keep.repeat_interleave(16)
    for tokens in (40, switch(model.config) + 9):
        ids = random_ids(model, 2, tokens)
        ours = model(ids, head_mask=heads, output_attentions=True)
        assert worst(ours.last_hidden_state, without(ids).last_hidden_state) <= TOLERANCE
        assert not ours.attentions[0][:, 1].any()
        plain = model(ids, output_attentions=True)
        assert worst(ours.attentions[0][:, 2], plain.attentions[0][:, 2]) <= 1e-6
        assert torch.equal(model(ids, head_mask=torch.ones(3)).last_hidden_state, plain.last_hidden_state)


def test_any_number_of_random_blocks() -> None:
    """None at all, which transformers cannot do: the blocks of the window and the two ends, each once."""
    values = {"num_random_blocks": 0, "block_size": 16, "num_hidden_layers": 1}
    model = alula.BigBirdModel(small(**values))
    ids = random_ids(model, 2, 16 * 7 - 3)
    seen = model(ids, output_attentions=True).attentions[0] > 0
    blocks = torch.nn.functional.max_pool2d(seen.float(), 16, ceil_mode=True)
    expected = torch.zeros(7, 7)
    expected[[0, -1]] = expected[:, [0, -1]] = 1
    for i in range(1, 6):
        expected[i, i - 1 : i + 2] = 1
    assert torch.equal(blocks, expected.expand_as(blocks))


def test_low_precision(dtype: torch.dtype) -> None:
    reference = hf_model(2, num_hidden_layers=2)
    model = alula_model(reference, dtype)
    tokens = switch(model.config) + 11
    ids = random_ids(model, 2, tokens)
    exact = fresh(reference)(ids).last_hidden_state
    low = type(reference)(reference.config).to(dtype).eval()
    low.load_state_dict(reference.state_dict())
    allowed = 2 * worst(fresh(low)(ids).last_hidden_state, exact) + TOLERANCE
    ours = model(ids)
    assert ours.last_hidden_state.dtype == ours.pooler_output.dtype == dtype
    assert worst(ours.last_hidden_state, exact) <= allowed


def test_a_row_is_the_row_alone() -> None:
    model = alula.BigBirdModel(small(num_hidden_layers=2))
    for tokens in (50, switch(model.config) + 23):
        ids = random_ids(model, 3, tokens)
        mask = padding_mask("right", 3, tokens)
        together = model(ids, attention_mask=mask).last_hidden_state
        for row in range(3):
            alone = model(ids[row : row + 1], attention_mask=mask[row : row + 1]).last_hidden_state
            assert torch.equal(alone[0], together[row])
        poisoned = ids.masked_fill(mask == 0, 9)
        again = model(poisoned, attention_mask=mask).last_hidden_state
        assert torch.equal(again[mask.bool()], together[mask.bool()])


@pytest.mark.parametrize("is_training", [False, True])
def test_left_padding_with_positions_is_the_row_alone(is_training: bool) -> None:
    """Positions that count from a row's first token say that its blocks begin there, too."""
    model = alula_model(hf_model(2, num_hidden_layers=2)).train(is_training)
    tokens = switch(model.config) + 70
    ids, mask = random_ids(model, 4, tokens), torch.ones(4, tokens, dtype=torch.int64)
    for row, count in enumerate((0, 33, 100, tokens - 1)):  # the last two are short enough for full attention
        mask[row, :count] = 0
    positions = mask.cumsum(1) - 1
    options = {"output_attentions": True, "output_hidden_states": True}
    for width in (tokens, 60):  # the second is full attention for all rows
        cut = [t[:, -width:] for t in (ids, mask, positions)]
        cut[2] = (cut[1].cumsum(1) - 1).clamp(min=0)
        ours = model(cut[0], attention_mask=cut[1], position_ids=cut[2], **options)
        for row, real in enumerate(cut[1].bool()):
            alone = model(cut[0][row : row + 1, real], **options)
            assert worst(ours.last_hidden_state[row, real], alone.last_hidden_state[0]) <= 2e-5
            assert worst(ours.pooler_output[row], alone.pooler_output[0]) <= 2e-5
            assert worst(ours.hidden_states[1][row, real], alone.hidden_states[1][0]) <= 2e-5
            assert worst(ours.attentions[1][row][:, real][..., real], alone.attentions[1][0]) <= 2e-5


def test_parts_of_an_mlp_change_no_bit(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model = alula.BigBirdModel(small(num_hidden_layers=2), dtype=dtype)
    ids = random_ids(model, 2, 97)
    whole = model(ids).last_hidden_state
    for part in (1, 500, 9000):
        monkeypatch.setattr(big_bird_blocks, "LARGE", part)
        monkeypatch.setattr(big_bird_blocks, "PART", part)
        assert torch.equal(model(ids).last_hidden_state, whole)


# --- which attention -------------------------------------------------------------------------------------------------


def test_the_choice_is_made_in_every_call() -> None:
    reference = hf_model(4)
    model, sticky = alula_model(reference), alula_model(reference, sticky=True)
    limit = switch(model.config)
    long, short = random_ids(model, 1, limit + 10), random_ids(model, 1, 20)
    sparse = fresh(reference)(long).last_hidden_state
    reference(short)
    full = reference(long).last_hidden_state
    assert worst(sparse, full) > 1e-2
    for _ in range(2):
        assert worst(model(long).last_hidden_state, sparse) <= TOLERANCE
        model(short)
        assert model.attention_type == "block_sparse"
    assert worst(sticky(long).last_hidden_state, sparse) <= TOLERANCE
    sticky(short)
    assert sticky.attention_type == "original_full"
    assert worst(sticky(long).last_hidden_state, full) <= TOLERANCE
    sticky.set_attention_type("block_sparse")
    assert worst(sticky(long).last_hidden_state, sparse) <= TOLERANCE
    model.set_attention_type("original_full")
    assert worst(model(long).last_hidden_state, full) <= TOLERANCE
    with pytest.raises(ValueError, match="attention_type='full'; accepted: block_sparse, original_full"):
        model.set_attention_type("full")
    assert alula.BigBirdConfig.from_dict(sticky.config.to_dict()).sticky
    assert "sticky" not in model.config.to_dict()


@pytest.mark.parametrize("seed", range(6))
def test_random_blocks_of_training(seed: int) -> None:
    reference = hf_model(seed, num_hidden_layers=2).train()
    model = alula_model(reference).train()
    try:
        for tokens in (switch(model.config) + 3, switch(model.config) + 4 * model.config.block_size, 1024, 1021):
            ids = random_ids(model, 1, tokens)
            mask = padding_mask("right", 1, tokens)
            theirs = fresh(reference)(ids, attention_mask=mask).last_hidden_state
            state = np.random.get_state()[1].copy()  # noqa: NPY002  the global one must stay as it is
            ours = model(ids, attention_mask=mask).last_hidden_state
            assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
            assert worst(ours, theirs) <= TOLERANCE, tokens
            assert worst(model.eval()(ids, attention_mask=mask).last_hidden_state, theirs) > 1e-3
            model.train()
    finally:
        reference.eval()


@pytest.mark.parametrize("tokens", [3072, 4090])
def test_long_inputs(tokens: int) -> None:
    fixed = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    sizes = {"block_size": 64, "num_random_blocks": 3, "max_position_embeddings": 4096}
    reference = hf_model(0, **fixed, **sizes)
    model = alula_model(reference)
    ids = random_ids(model, 1, tokens)
    try:
        for is_training in (False, True):
            theirs = fresh(reference.train(is_training))(ids).last_hidden_state
            assert worst(model.train(is_training)(ids).last_hidden_state, theirs) <= TOLERANCE
    finally:
        reference.eval()


def test_training_needs_no_grad() -> None:
    model = alula.BigBirdModel(small()).train()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="cannot train yet"):
        model(torch.ones(1, 5, dtype=torch.int64))


def test_own_plans() -> None:
    """All blocks: full attention. A short input, too. One plan a layer."""
    model = alula.BigBirdModel(small(num_hidden_layers=2, block_size=16))
    tokens = switch(model.config) - 20
    ids, mask = random_ids(model, 2, tokens), padding_mask("left", 2, tokens)
    full = model(ids, attention_mask=mask, output_attentions=True)
    everything = alula.BlockPlan.pattern(tokens, 16, global_blocks=range(-(-tokens // 16)))
    for plan in (everything, [everything, everything]):
        ours = model(ids, attention_mask=mask, output_attentions=True, block_plan=plan)
        real = mask.bool()
        assert worst(ours.last_hidden_state[real], full.last_hidden_state[real]) <= TOLERANCE
        assert worst(ours.attentions[1].transpose(1, 2)[real], full.attentions[1].transpose(1, 2)[real]) <= TOLERANCE
    narrow = alula.BlockPlan.pattern(tokens, 16, global_blocks=())
    ours = model(ids, block_plan=[everything, narrow], output_attentions=True)
    assert ours.attentions[0].all()
    assert not ours.attentions[1][..., 0, 40:].any()
    for plan, message in (
        ([narrow], "block_plan must be one alula.BlockPlan, or one for each of the 2 layers"),
        (alula.BlockPlan.pattern(tokens + 16, 16), f"block_plan has .* blocks of 16; the input {tokens} tokens"),
        (alula.BlockPlan.pattern(tokens, 16, num_random_blocks=1, num_heads=77), "block_plan is for 77 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, block_plan=plan)
    decoder = alula.BigBirdModel(small(is_decoder=True, block_size=16))
    with pytest.raises(ValueError, match="block_plan is not causal, and the model a decoder"):
        decoder(ids, block_plan=everything, use_cache=False)
    causal = alula.BlockPlan.pattern(tokens, 16, global_blocks=range(-(-tokens // 16)), is_causal=True)
    sparse = decoder(ids, block_plan=causal).last_hidden_state
    assert worst(sparse, decoder(ids, use_cache=False).last_hidden_state) <= TOLERANCE


# --- a decoder -------------------------------------------------------------------------------------------------------


@needs_causal_decoder
@pytest.mark.parametrize("kind", ["none", "left", "right"])
def test_decoder_like_transformers(kind: str) -> None:
    reference = hf_model(7, "BigBirdForCausalLM", is_decoder=True, attention_type="original_full")
    model = alula_model(reference)
    ids, mask = random_ids(model, 3, 41), padding_mask(kind, 3, 41)
    theirs = reference(ids, attention_mask=mask, use_cache=False).logits
    ours = model(ids, attention_mask=mask, output_attentions=True)
    real = torch.ones_like(ids) if mask is None else mask
    assert worst(ours.logits[real.bool()], theirs[real.bool()]) <= TOLERANCE
    assert not ours.attentions[0].triu(1).any()
    cache, steps = None, []
    for begin, end in ((0, 7), (7, 8), (8, 9), (9, 30), (30, 41)):
        step = model(
            ids[:, begin:end],
            attention_mask=None if mask is None else mask[:, :end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = step.past_key_values
        steps.append(step.logits)
    assert worst(torch.cat(steps, 1)[real.bool()], ours.logits[real.bool()]) <= TOLERANCE
    assert cache.get_seq_length() == 41


@needs_causal_decoder
def test_decoder_generates() -> None:
    reference = hf_model(8, "BigBirdForCausalLM", is_decoder=True, attention_type="original_full", eos_token_id=None)
    model = alula_model(reference)
    ids, mask = random_ids(model, 2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    theirs = [
        reference.generate(ids[i : i + 1, 4 * i :], max_new_tokens=8, do_sample=False, pad_token_id=0)[0, -8:]
        for i in range(2)
    ]
    assert torch.equal(model.generate(ids, mask, max_new_tokens=8)[:, -8:], torch.stack(theirs))
    encoder = alula.BigBirdForCausalLM(small())
    for call in (encoder.generate, encoder.stream):
        with pytest.raises(ValueError, match="is an encoder: it cannot generate; make it with is_decoder=True"):
            call(ids)


@pytest.mark.parametrize("is_training", [False, True])
def test_sparse_decoding_is_causal_or_refused(is_training: bool) -> None:
    model = alula_model(hf_model(9, "BigBirdForCausalLM", is_decoder=True, num_random_blocks=1, block_size=16))
    model.train(is_training)
    tokens = switch(model.config) + 30
    ids = random_ids(model, 1, tokens)
    whole = model(ids, output_attentions=True)
    assert whole.past_key_values is None
    assert not whole.attentions[0].triu(1).any()
    changed = ids.clone()
    changed[:, tokens - 20 :] = 9
    assert worst(model(changed).logits[:, : tokens - 20], whole.logits[:, : tokens - 20]) <= 1e-5
    assert worst(model(changed).logits[:, tokens - 20 :], whole.logits[:, tokens - 20 :]) > 1e-2
    if not is_training:  # what follows does not change what was
        shorter = model(ids[:, : tokens - 13]).logits
        assert worst(shorter, whole.logits[:, : tokens - 13]) <= 1e-5
    for options in ({"use_cache": True}, {"past_key_values": model.new_cache(1)}):
        with pytest.raises(ValueError, match="keeps no cache; pass use_cache=False, or make"):
            model(ids, **options)
    with pytest.raises(ValueError, match="keeps no cache"):
        model.eval().generate(ids, max_new_tokens=2)
    cached = model(ids[:, :40], use_cache=True)
    assert cached.past_key_values.get_seq_length() == 40


def rewired(model: Any, ids: Tensor, states: Tensor, states_mask: Tensor | None) -> Tensor:
    """transformers' own modules as a decoder with an encoder should run them. (Its forward hands the encoder's states
    to self-attention, too, which then sees no token before.)"""
    bert = model.bert
    x = bert.embeddings(ids)
    causal = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    hidden = None if states_mask is None else torch.where(states_mask.bool(), 0.0, -torch.inf)[:, None, None]
    for layer in bert.encoder.layer:
        x, _ = layer.attention(x, attention_mask=causal)
        x, _ = layer.crossattention(x, encoder_hidden_states=states, encoder_attention_mask=hidden)
        x = layer.feed_forward_chunk(x)
    return model.cls(x)


@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
def test_cross_attention(kind: str) -> None:
    reference = hf_model(1, "BigBirdForCausalLM", is_decoder=True, add_cross_attention=True, num_hidden_layers=2)
    model = alula_model(reference)
    assert model.bert.attention_type == "original_full"
    ids = random_ids(model, 2, 12)
    states = torch.randn(2, 17, model.config.hidden_size)
    mask = padding_mask(kind, 2, 17)
    given = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    expected = rewired(reference, ids, states, mask)
    ours = model(ids, **given, output_attentions=True)
    assert worst(ours.logits, expected) <= TOLERANCE
    assert ours.cross_attentions[1].shape == (2, model.config.num_attention_heads, 12, 17)
    first = model(ids[:, :5], **given)
    rest = model(ids[:, 5:], past_key_values=first.past_key_values)
    assert worst(torch.cat([first.logits, rest.logits], 1), expected) <= TOLERANCE
    assert worst(model(ids, use_cache=False, **given).logits, expected) <= TOLERANCE


# --- what cannot be right --------------------------------------------------------------------------------------------


def test_bad_inputs() -> None:
    model = alula.BigBirdModel(small(max_position_embeddings=300, num_random_blocks=1, block_size=16))
    decoder = alula.BigBirdModel(small(is_decoder=True))
    ones = torch.ones(2, 150, dtype=torch.int64)
    embeds = torch.zeros(2, 150, model.config.hidden_size)
    pairs = torch.ones(2, 150, 150)
    for change, message in (
        (
            {"input_ids": torch.ones(1, 301, dtype=torch.int64)},
            "301 tokens are more than max_position_embeddings=300; cut",
        ),
        ({"position_ids": torch.full((1, 150), 300)}, "position_ids holds 300; accepted: 0 to 299"),
        ({"position_ids": torch.zeros(1, 149, dtype=torch.int64)}, r"position_ids has shape \[1, 149\]"),
        ({"token_type_ids": torch.full((2, 150), 2)}, "token_type_ids holds 2; accepted: 0 to 1"),
        ({"token_type_ids": torch.zeros(3, 150, dtype=torch.int64)}, r"token_type_ids has shape \[3, 150\]"),
        ({"input_ids": torch.full((2, 150), 999)}, "input_ids holds 999; accepted: 0 to"),
        ({"input_ids": ones.float()}, "input_ids has dtype"),
        ({"input_ids": None}, "give exactly one of input_ids and inputs_embeds"),
        ({"inputs_embeds": embeds}, "give exactly one of input_ids and inputs_embeds"),
        ({"input_ids": None, "inputs_embeds": embeds[..., :-1]}, "inputs_embeds has shape"),
        ({"input_ids": None, "inputs_embeds": embeds.half()}, "inputs_embeds has dtype"),
        ({"attention_mask": torch.ones(2, 149)}, r"attention_mask has shape \[2, 149\]; accepted: \[2, 150\]"),
        ({"attention_mask": torch.ones(150)}, r"attention_mask has shape \[150\]"),
        ({"attention_mask": pairs}, "attention_type='original_full' takes masks of pairs"),
        ({"head_mask": torch.ones(7)}, r"head_mask has shape \[7\]"),
        ({"past_key_values": decoder.new_cache(2)}, "past_key_values is given to an encoder"),
        ({"encoder_hidden_states": embeds}, "need a model with cross-attention"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{"input_ids": ones, **change})
    short = torch.ones(2, 9, dtype=torch.int64)
    for mask in (torch.ones(2, 10), torch.ones(2, 8, 9), torch.ones(2, 77, 9, 9)):
        with pytest.raises(ValueError, match="attention_mask has shape"):
            model(short, attention_mask=mask)
    long = alula.BigBirdModel(small(is_decoder=True, attention_type="original_full"))
    cache = long(short[:, :7], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="7 cached and 1095 new tokens make 1102, more than max_position_embeddings"):
        long(torch.ones(2, 1095, dtype=torch.int64), past_key_values=cache)


def test_masks_of_pairs_with_full_attention() -> None:
    reference = hf_model(6, attention_type="original_full")
    model = alula_model(reference)
    ids = random_ids(model, 2, 24)
    mask = torch.rand(2, 1, 24, 24) < 0.7
    mask[..., 0] = True
    # transformers adds a mask of four dimensions as it is, bools as ones
    theirs = reference(ids, attention_mask=torch.where(mask, 0.0, -torch.inf)).last_hidden_state
    for given in (mask, mask[:, 0], torch.where(mask, 0.0, -1e9)):
        assert worst(model(ids, attention_mask=given).last_hidden_state, theirs) <= TOLERANCE
    blind = model(ids, attention_mask=torch.zeros(2, 24, 24, dtype=torch.bool)).last_hidden_state
    assert not blind.isnan().any()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"hidden_size": 50, "num_attention_heads": 3}, "hidden_size=50 is not divisible by num_attention_heads=3"),
        ({"hidden_size": 36, "num_attention_heads": 3}, "accepted: a multiple of 8 up to 256"),
        ({"block_size": 48}, "block_size=48 is not supported; accepted: a power of two"),
        ({"block_size": 0}, "block_size=0 in BigBirdConfig; accepted: a positive integer"),
        ({"num_random_blocks": -1}, "num_random_blocks=-1 .*; accepted: an integer that is not negative"),
        ({"attention_type": "sparse"}, "accepted: one of block_sparse, original_full"),
        ({"hidden_act": "softplus"}, "hidden_act='softplus'"),
        ({"classifier_dropout": 2}, "classifier_dropout=2 .*; accepted: a number from 0 to 1, or null"),
        ({"add_cross_attention": True}, "add_cross_attention=True needs is_decoder=True"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(next(iter(value))),
)
def test_configurations_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alula.BigBirdConfig(**values)


def test_unsupported_block_sizes_are_named() -> None:
    model = alula.BigBirdModel(small(block_size=8, num_random_blocks=1))
    assert model(torch.ones(1, 20, dtype=torch.int64)).last_hidden_state.shape[1] == 20
    with pytest.raises(ValueError, match="block_size is 8; accepted: 16, 32, 64, 128"):
        model(torch.ones(1, 100, dtype=torch.int64))


def test_defaults_are_those_of_transformers() -> None:
    ours, theirs = alula.BigBirdConfig(), transformers.BigBirdConfig()
    keys = [key for key in theirs.to_dict() if key in ours.fields or key in ("use_cache", "tie_word_embeddings")]
    assert len(keys) > 20
    assert {key: getattr(ours, key) for key in keys} == {key: getattr(theirs, key) for key in keys}
    assert (ours.head_dim, ours.num_key_value_heads, ours.max_full_tokens) == (64, 12, 704)
    assert ours.to_dict().keys() <= {*theirs.to_dict(), "transformers_version"}
