"""All decoder families against transformers, eager attention, float32; and against themselves."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import alula
import pytest
import torch
import transformers
from alula.ops import decoder_blocks
from decoder_cases import (
    FAMILIES,
    LANGUAGE_MODELS,
    TOLERANCE,
    alula_model,
    hf_model,
    padding_mask,
    random_ids,
    worst,
)
from torch import Tensor

SEEDS = range(20)
# Whether the installed transformers takes positions [B, n] and flags [B, T] as logits_to_keep.
SELECTS_BY_ROW = hasattr(transformers.modeling_utils, "slice_logits_to_keep")
CLASSIFIERS = ("GPTBigCodeForSequenceClassification", "GPT2ForSequenceClassification")
PADDINGS = ("none", "left", "right", "holes")


@pytest.fixture(params=LANGUAGE_MODELS)
def lm(request: pytest.FixtureRequest) -> str:
    """A language model's class."""
    return request.param


def causal(mask: Tensor | None, batch: int, tokens: int) -> Tensor:
    """[B, T, T] bool: what a causal model with this padding sees."""
    visible = torch.ones(batch, tokens, tokens, dtype=torch.bool).tril()
    return visible if mask is None else visible & mask.bool()[:, None, :]


# --- the forward pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_a_pass_returns(lm: str, seed: int) -> None:
    reference = hf_model(seed, lm)
    model = alula_model(reference)
    padding = PADDINGS[seed % 4]
    batch, tokens = 1 + seed % 3, 5 + seed % 19
    ids, mask = random_ids(model, batch, tokens, seed), padding_mask(padding, batch, tokens)
    labels = ids if seed % 2 or mask is None else ids.masked_fill(mask == 0, -100)
    kwargs = {"attention_mask": mask, "labels": labels, "output_hidden_states": True, "output_attentions": True}
    theirs, ours = reference(ids, **kwargs), model(ids, **kwargs)
    assert ours.keys() == list(theirs.keys())
    assert len(model(ids, **kwargs, return_dict=False)) == len(ours)
    # Padding after a token sees what transformers lets it see, so there every position is compared.
    real = mask if padding == "left" else None
    assert worst(ours.logits, theirs.logits, real) <= TOLERANCE
    if padding != "left":  # there the first label follows a padding token, which sees nothing
        assert abs(ours.loss - theirs.loss) <= TOLERANCE
    assert len(ours.hidden_states) == len(theirs.hidden_states) == reference.config.n_layer + 1
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert worst(a, b, real) <= TOLERANCE
    assert len(ours.attentions) == len(theirs.attentions) == reference.config.n_layer
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        assert worst(a.transpose(1, 2), b.transpose(1, 2), real) <= TOLERANCE
    plain = model(ids, attention_mask=mask)
    assert torch.equal(plain.logits, ours.logits), "asking for attentions changed the logits"
    assert plain.keys() == ["logits", "past_key_values"]


@pytest.mark.parametrize("seed", SEEDS)
def test_cached_and_chunked_passes_equal_one_pass(lm: str, seed: int) -> None:
    reference = hf_model(seed, lm)
    model = alula_model(reference)
    batch, tokens = 1 + seed % 3, 24
    mask = padding_mask(PADDINGS[(seed + 1) % 4], batch, tokens)
    ids = random_ids(model, batch, tokens, seed)
    whole = reference(ids, attention_mask=mask).logits
    for cuts in ([13, 14, 15, 16, 24], [1, 9, 10, 24], [5 + seed % 7, 24]):
        cache = model.new_cache(batch, max_length=tokens if seed % 2 else None)
        parts, begin = [], 0
        for end in cuts:
            seen = None if mask is None else mask[:, (begin if seed % 3 else 0) : end]
            out = model(ids[:, begin:end], past_key_values=cache, attention_mask=seen)
            assert out.past_key_values is cache
            assert cache.get_seq_length() == end
            parts.append(out.logits)
            begin = end
        assert worst(torch.cat(parts, 1), whole, mask) <= TOLERANCE


@pytest.mark.parametrize("seed", range(0, 20, 2))
def test_greedy_tokens(lm: str, seed: int) -> None:
    reference = hf_model(seed, lm, eos_token_id=None, n_positions=64)
    model = alula_model(reference)
    batch, tokens, new = 3, 9, 24
    ids, mask = random_ids(model, batch, tokens, seed), padding_mask("left", batch, tokens)
    theirs = reference.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=3)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=1)
    ours = ids
    for step in range(new):
        last = out.logits[:, -1].argmax(-1, keepdim=True)
        ours = torch.cat([ours, last], 1)
        here = positions[:, -1:] + 1 + step
        out = model(last, past_key_values=out.past_key_values, position_ids=here, logits_to_keep=1)
    assert torch.equal(ours, theirs)


def test_every_isa(lm: str, isa: str) -> None:
    for seed in (1, 4, 7, 10):
        reference = hf_model(seed, lm)
        model = alula_model(reference)
        ids, mask = random_ids(model, 2, 21, seed), padding_mask("left", 2, 21)
        theirs = reference(ids, attention_mask=mask).logits
        first = model(ids[:, :20], attention_mask=mask[:, :20])
        second = model(ids[:, 20:], attention_mask=mask, past_key_values=first.past_key_values)
        assert worst(torch.cat([first.logits, second.logits], 1), theirs, mask) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("seed", range(0, 20, 3))
def test_low_precision_error_budget(lm: str, seed: int, dtype: torch.dtype) -> None:
    """At most twice the error that transformers makes in the same dtype, measured from float32."""
    fixed = {} if lm.startswith("CodeGen") else {"scale_attn_weights": True}
    reference = hf_model(seed, lm, **fixed)
    rounded, exact = copy.deepcopy(reference).to(dtype), copy.deepcopy(reference)
    exact.load_state_dict({name: value.float() for name, value in rounded.state_dict().items()})
    model = alula_model(rounded, dtype)
    ids, mask = random_ids(model, 3, 19, seed), padding_mask(PADDINGS[seed % 4], 3, 19)
    truth = exact(ids, attention_mask=mask).logits
    out = model(ids, attention_mask=mask, use_cache=True)
    assert out.logits.dtype == dtype
    budget = 2 * worst(rounded(ids, attention_mask=mask).logits, truth, mask) + 1e-3
    assert worst(out.logits, truth, mask) <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("seed", range(6))
def test_a_row_does_not_depend_on_its_batch(lm: str, seed: int, dtype: torch.dtype) -> None:
    """Equal bits: a left-padded row of a batch and the row alone, in the prompt and while decoding."""
    model = alula_model(hf_model(seed, lm), dtype)
    tokens, steps = 23, 5
    ids = random_ids(model, 5, tokens + steps, seed)
    lengths = [23, 4, 17, 1, 10]
    mask = torch.tensor([[0] * (tokens - n) + [1] * n for n in lengths])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(ids[:, :tokens], attention_mask=mask, position_ids=positions)
    together = [out.logits]
    for step in range(steps):
        column = ids[:, tokens + step, None]
        here = torch.tensor(lengths)[:, None] + step
        together.append(model(column, past_key_values=out.past_key_values, position_ids=here).logits)
    together = torch.cat(together, 1)
    for row, length in enumerate(lengths):
        own = ids[row : row + 1, tokens - length :]
        alone = model(own[:, :length])
        logits = [alone.logits]
        for step in range(steps):
            column = own[:, length + step, None]
            logits.append(model(column, past_key_values=alone.past_key_values).logits)
        assert torch.equal(torch.cat(logits, 1)[0], together[row, tokens - length :]), f"row {row}"


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@pytest.mark.parametrize(
    ("lm", "fixed"),
    [
        ("GPTBigCodeForCausalLM", {"multi_query": True}),
        ("GPTBigCodeForCausalLM", {"multi_query": False}),
        ("GPT2LMHeadModel", {}),
        ("CodeGenForCausalLM", {"rotary_dim": 8}),
    ],
)
def test_a_short_row_does_not_depend_on_its_padding(lm: str, fixed: dict[str, Any], padding: str) -> None:
    """Equal bits where a row has so few tokens that kernels for few rows serve it alone."""
    model = alula_model(hf_model(2, lm, **fixed, n_embd=64, n_head=4))
    for tokens in range(2, 9):
        ids, mask = random_ids(model, 4, tokens, tokens), padding_mask(padding, 4, tokens)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        together = model(ids, attention_mask=mask, position_ids=positions).logits
        for row in range(4):
            real = mask[row].bool()
            assert torch.equal(model(ids[row : row + 1, real]).logits[0], together[row, real])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_runs_give_equal_bits(lm: str, dtype: torch.dtype) -> None:
    model = alula_model(hf_model(3, lm), dtype)
    ids = random_ids(model, 2, 33)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model(ids).logits, model(ids, use_cache=False).logits)


def test_calls_of_a_decode_step(lm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = alula_model(hf_model(7, lm, n_layer=3))
    cache = model(random_ids(model, 1, 6)).past_key_values
    calls: list[str] = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "alula":
                calls.append(func._opname)
            return func(*args, **(kwargs or {}))

    with Counting():
        model(torch.tensor([[5]]), past_key_values=cache, logits_to_keep=1)
        plain_calls, calls[:] = list(calls), []
        model(torch.tensor([[5]]), past_key_values=cache, logits_to_keep=1, output_hidden_states=True)
    block = ["qkv_projection", "attention", "linear", "linear", "linear"]
    if lm.startswith("CodeGen"):
        block = ["qkv_projection", "attention_into", "linear"]
    assert plain_calls == ["embedding", "decoder_blocks", "linear"]
    assert calls[:-2] == ["embedding", *block, *block, *block]  # what happens in between is looked at
    assert set(calls[-2:]) == {"layer_norm", "linear"}


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_masks_of_three_and_four_dimensions(lm: str, seed: int) -> None:
    """They stand alone: transformers adds no causal limit to a 4-D mask either."""
    reference = hf_model(seed, lm)
    model = alula_model(reference)
    heads, tokens = model.config.n_head, 11
    ids = random_ids(model, 2, tokens, seed)
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(2, 1, tokens, tokens, generator=generator) < 0.6
    visible |= torch.eye(tokens, dtype=torch.bool)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    theirs = reference(ids, attention_mask=additive, output_attentions=True)
    rows = torch.rand(2, 1, 1, tokens, generator=generator) < 0.6  # one row of a mask stands for all
    rows[..., 0] = True
    row_bias = torch.zeros(rows.shape).masked_fill(~rows, torch.finfo(torch.float32).min)
    for mask in (row_bias, rows, rows[:, 0]):
        assert (
            worst(model(ids, attention_mask=mask).logits, reference(ids, attention_mask=row_bias).logits) <= TOLERANCE
        )
    for mask in (additive, visible, visible[:, 0], additive[:, 0], visible.expand(2, heads, tokens, tokens)):
        ours = model(ids, attention_mask=mask, output_attentions=True)
        assert worst(ours.logits, theirs.logits) <= TOLERANCE
        assert all(worst(a, b) <= TOLERANCE for a, b in zip(ours.attentions, theirs.attentions, strict=True))
    bias = torch.randn(1, heads, tokens, tokens, generator=generator)
    theirs = reference(ids, attention_mask=bias).logits
    assert worst(model(ids, attention_mask=bias).logits, theirs) <= TOLERANCE
    part = model(ids[:, :7], attention_mask=bias[:, :, :7, :7])  # cached: the mask spans past and new columns
    rest = model(ids[:, 7:], attention_mask=visible[:, :, 7:], past_key_values=part.past_key_values)
    assert rest.logits.shape == (2, 4, model.config.vocab_size)


def test_a_mask_equal_to_the_padding_one_gives_the_same(lm: str) -> None:
    model = alula_model(hf_model(2, lm))
    ids, mask = random_ids(model, 3, 12), padding_mask("right", 3, 12)
    flat = model(ids, attention_mask=mask).logits
    assert worst(model(ids, attention_mask=causal(mask, 3, 12)).logits, flat, mask) <= 1e-5
    assert torch.equal(model(ids, attention_mask=mask.bool()).logits, flat)
    assert torch.equal(model(ids, attention_mask=mask.float()).logits, flat)


@pytest.mark.parametrize("seed", range(4))
def test_token_types_positions_and_embeddings(lm: str, seed: int) -> None:
    reference = hf_model(seed, lm)
    model = alula_model(reference)
    ids, types = random_ids(model, 2, 10, seed), random_ids(model, 2, 10, seed + 99)
    positions = torch.arange(20, 30).flip(0).repeat(2, 1)
    for kwargs in (
        {"token_type_ids": types},
        {"token_type_ids": torch.zeros_like(ids)},
        {"position_ids": positions},
        {"position_ids": positions[:1], "token_type_ids": types},
    ):
        theirs = reference(ids, **kwargs).logits
        assert worst(model(ids, **kwargs).logits, theirs) <= TOLERANCE
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(embeds, reference.get_input_embeddings()(ids))
        assert worst(model(inputs_embeds=embeds, **kwargs).logits, theirs) <= TOLERANCE
    assert torch.equal(model(ids.int()).logits, model(ids).logits)
    strided = torch.stack([ids, ids], 2)[:, :, 0]
    assert torch.equal(model(strided).logits, model(ids).logits)


def test_logits_to_keep(lm: str) -> None:
    reference = hf_model(6, lm)
    model = alula_model(reference)
    ids = random_ids(model, 3, 12)
    whole = model(ids).logits
    flags = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    for keep in (
        1,
        5,
        12,
        40,
        [0, -1],
        torch.tensor([0, 3, 11]),
        torch.tensor([-1]),
        torch.tensor([[1], [4], [7]]),
        torch.tensor([[-1, 2], [0, -12], [-3, 11]]),
        flags,
    ):
        if isinstance(keep, Tensor) and keep.dim() == 2 and not SELECTS_BY_ROW:
            every = reference(ids).logits  # older releases take any tensor for columns of every row
            theirs = every[keep] if keep.dtype == torch.bool else torch.take_along_dim(every, keep[..., None], dim=1)
        else:
            theirs = reference(ids, logits_to_keep=keep).logits
        ours = model(ids, logits_to_keep=keep).logits
        assert worst(ours, theirs) <= TOLERANCE
    assert torch.equal(model(ids, logits_to_keep=4).logits, whole[:, -4:])
    assert torch.equal(model(ids, logits_to_keep=0).logits, whole)
    with pytest.raises(ValueError, match="logits_to_keep=-1; accepted"):
        model(ids, logits_to_keep=-1)
    for wrong in (None, "1", 1.5, slice(1, 3)):
        with pytest.raises(TypeError, match=f"logits_to_keep is a {type(wrong).__name__}; accepted: 0 .*, a positive"):
            model(ids, logits_to_keep=wrong)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_logits_to_keep_changes_nothing_else(lm: str, padding: str) -> None:
    """What else a pass gives, and what later passes see, whether or not the last block leaves tokens out."""
    model = alula_model(hf_model(6, lm))
    ids, mask = random_ids(model, 2, 30), padding_mask(padding, 2, 30)
    for options in ({}, {"output_hidden_states": True}, {"output_attentions": True}):
        whole = model(ids, attention_mask=mask, use_cache=True, **options)
        kept = model(ids, attention_mask=mask, use_cache=True, logits_to_keep=2, **options)
        assert torch.equal(kept.logits, whole.logits[:, -2:])
        for name in ("hidden_states", "attentions"):
            for ours, all_of_them in zip(kept.get(name) or (), whole.get(name) or (), strict=True):
                assert torch.equal(ours, all_of_them)
        after = [model(ids[:, :1], past_key_values=run.past_key_values).logits for run in (kept, whole)]
        assert torch.equal(*after)


@pytest.mark.parametrize("options", [{}, {"output_attentions": True}], ids=["one call", "op by op"])
def test_logits_to_keep_under_a_mask_of_every_query(lm: str, options: dict[str, Any]) -> None:
    model = alula_model(hf_model(6, lm))
    ids, mask = random_ids(model, 2, 30), torch.rand(2, 1, 30, 30) < 0.7
    whole = model(ids, attention_mask=mask, **options)
    kept = model(ids, attention_mask=mask, logits_to_keep=2, **options)
    assert torch.equal(kept.logits, whole.logits[:, -2:])


@pytest.mark.parametrize("shape", ["H", "L,H"])
def test_head_mask_scales_the_heads(lm: str, shape: str) -> None:
    reference = copy.deepcopy(hf_model(9, lm))
    model = alula_model(reference)
    config = model.config
    layers_, heads, head_dim = config.n_layer, config.n_head, config.head_dim
    size = (heads,) if shape == "H" else (layers_, heads)
    head_mask = torch.rand(size, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    for layer, block in enumerate(reference.transformer.h):
        row = (head_mask if head_mask.dim() == 1 else head_mask[layer]).repeat_interleave(head_dim)
        out = block.attn.out_proj if lm.startswith("CodeGen") else block.attn.c_proj
        out.weight.data *= row.unsqueeze(1) if lm.startswith("GPT2") else row
    ids = random_ids(model, 2, 9)
    ours = model(ids, head_mask=head_mask, output_attentions=True)
    theirs = reference(ids, output_attentions=True)
    assert worst(ours.logits, theirs.logits) <= TOLERANCE
    row = head_mask if head_mask.dim() == 1 else head_mask[0]
    assert worst(ours.attentions[0], theirs.attentions[0] * row.view(1, -1, 1, 1)) <= TOLERANCE


def test_outputs_are_read_by_attribute_key_and_index(lm: str) -> None:
    model = alula_model(hf_model(0, lm))
    ids = random_ids(model, 2, 7)
    out = model(ids, labels=ids, output_hidden_states=True)
    assert out[0] is out.loss is out["loss"]
    assert out[1] is out.logits
    assert out.keys() == ["loss", "logits", "past_key_values", "hidden_states"]
    assert list(out) == out.keys()
    assert "attentions" not in out
    assert len(out) == 4
    assert out.attentions is None
    assert out.get("attentions", 7) == 7
    assert out[:2] == (out.loss, out.logits)
    with pytest.raises(KeyError):
        out["attentions"]
    plain = model(ids, labels=ids, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[1], out.logits)
    without = model(ids, use_cache=False)
    assert without.past_key_values is None
    model.config.use_cache = False
    assert model(ids).past_key_values is None
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)


@pytest.mark.parametrize("cls", [f"{family}Model" for family in FAMILIES])
def test_base_model(cls: str) -> None:
    reference = hf_model(8, cls)
    model = alula_model(reference)
    ids = random_ids(model, 2, 13)
    theirs, ours = reference(ids, output_hidden_states=True), model(ids, output_hidden_states=True)
    assert worst(ours.last_hidden_state, theirs.last_hidden_state) <= TOLERANCE
    assert torch.equal(ours.last_hidden_state, ours.hidden_states[-1])
    assert worst(model(ids, return_dict=False)[0], theirs.last_hidden_state) <= TOLERANCE


# --- losses and heads ------------------------------------------------------------------------------------------------


def test_causal_lm_losses(lm: str) -> None:
    reference = hf_model(4, lm)
    model = alula_model(reference)
    ids = random_ids(model, 3, 10)
    labels = ids.clone()
    labels[0, :4] = -100
    for kwargs in (
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": 17},
        {"labels": labels, "num_items_in_batch": torch.tensor(5)},
        {"labels": labels, "shift_labels": ids},
    ):
        assert abs(model(ids, **kwargs).loss - reference(ids, **kwargs).loss) <= TOLERANCE
    assert abs(model(ids, labels=labels[:, -4:], logits_to_keep=4).loss.item()) > 0
    half = alula_model(hf_model(4, lm), torch.bfloat16)
    assert half(ids, labels=labels).loss.dtype == torch.float32


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize(
    ("problem_type", "num_labels"),
    [
        ("regression", 1),
        ("regression", 3),
        ("single_label_classification", 4),
        ("multi_label_classification", 3),
        (None, 1),
        (None, 3),
    ],
)
@pytest.mark.parametrize("cls", CLASSIFIERS)
def test_sequence_classification(cls: str, problem_type: str | None, num_labels: int, padding: str) -> None:
    reference = copy.deepcopy(hf_model(11, cls, num_labels=num_labels, problem_type=problem_type))
    model = alula_model(reference)
    ids, mask = random_ids(model, 4, 12), padding_mask(padding, 4, 12)
    if mask is not None:
        ids = ids.masked_fill(mask == 0, 3)
    generator = torch.Generator().manual_seed(2)
    if problem_type == "single_label_classification" or (problem_type is None and num_labels == 3):
        labels = torch.randint(num_labels, (4,), generator=generator)
    elif problem_type == "multi_label_classification":
        labels = torch.randint(2, (4, num_labels), generator=generator).float()
    else:
        labels = torch.randn((4, num_labels) if num_labels > 1 else 4, generator=generator)
    theirs = reference(ids, attention_mask=mask, labels=labels)
    ours = model(ids, attention_mask=mask, labels=labels)
    assert worst(ours.logits, theirs.logits) <= TOLERANCE
    assert abs(ours.loss - theirs.loss) <= TOLERANCE
    assert model.config.problem_type == problem_type, "a pass must not change the configuration"
    embeds = model.get_input_embeddings()(ids)
    theirs = reference(inputs_embeds=embeds, attention_mask=mask).logits
    if padding != "right":  # there transformers pools a padding position, which means nothing
        assert worst(model(inputs_embeds=embeds, attention_mask=mask).logits, theirs) <= TOLERANCE
    if padding == "none":
        model.config.pad_token_id = None
        alone = model(ids[:1]).logits
        assert worst(alone, reference(ids[:1]).logits) <= TOLERANCE


@pytest.mark.parametrize("cls", ["GPTBigCodeForTokenClassification", "GPT2ForTokenClassification"])
def test_token_classification(cls: str) -> None:
    reference = hf_model(12, cls, num_labels=5)
    model = alula_model(reference)
    ids, mask = random_ids(model, 2, 9), padding_mask("right", 2, 9)
    labels = torch.randint(5, (2, 9), generator=torch.Generator().manual_seed(3)).masked_fill(mask == 0, -100)
    theirs = reference(ids, attention_mask=mask, labels=labels)
    ours = model(ids, attention_mask=mask, labels=labels)
    assert worst(ours.logits, theirs.logits, mask) <= TOLERANCE
    assert abs(ours.loss - theirs.loss) <= TOLERANCE
    assert ours.keys() == ["loss", "logits"]


@pytest.mark.parametrize("has_head", [True, False])
def test_a_failing_pass_leaves_the_cache_as_it_was(lm: str, has_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = alula_model(hf_model(3, lm, n_layer=2))
    ids = random_ids(model, 2, 9)
    cache = model(ids[:, :4]).past_key_values

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoder_blocks, "decoder_blocks_op", interrupted)
        with pytest.raises(KeyboardInterrupt):
            (model if has_head else model.transformer)(ids[:, 4:], past_key_values=cache)
    assert cache.get_seq_length() == 4
    assert cache.lengths.tolist() == [4, 4]
    assert worst(model(ids[:, 4:], past_key_values=cache).logits, model(ids).logits[:, 4:]) <= 1e-5


def test_transformers_arguments_come_in_the_same_order() -> None:
    names = [name for name in alula.__all__ if name.startswith(tuple(FAMILIES)) and "Config" not in name]
    names = [name for name in names if "Tokenizer" not in name]
    assert len(names) == 12
    for name in names:
        theirs = inspect.signature(getattr(transformers, name).forward).parameters
        ours = list(inspect.signature(getattr(alula, name).forward).parameters)
        wanted = [p for p in theirs if p not in ("kwargs", "head_mask", "output_attentions", "output_hidden_states")]
        wanted = [p for p in wanted if p not in ("return_dict", "cache_position")]
        assert [p for p in ours if p in wanted] == wanted, name
