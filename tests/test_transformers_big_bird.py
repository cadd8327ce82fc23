"""BigBird: every class, block-sparse and full, against the plain model; the patterns of transformers' common tests."""
# ruff: noqa: E402

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import alula.integrations.transformers as at
import torch
from alula.integrations.transformers import big_bird as adapter
from big_bird_cases import needs_causal_decoder
from transformers_cases import IS_5, Pair, close, same_state, state_of

CLASSES = (
    "BigBirdModel",
    "BigBirdForPreTraining",
    "BigBirdForMaskedLM",
    "BigBirdForSequenceClassification",
    "BigBirdForMultipleChoice",
    "BigBirdForTokenClassification",
    "BigBirdForQuestionAnswering",
)
VALUES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": 70,
    "max_position_embeddings": 320,
    "block_size": 16,
    "num_random_blocks": 2,
    "sep_token_id": 2,
}
LONG, ODD, SHORT = 160, 153, 40


@functools.lru_cache(maxsize=16)
def made(cls: str, **fixed: Any) -> Any:
    plain = getattr(transformers, cls)(transformers.BigBirdConfig(**{**VALUES, **fixed})).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "LayerNorm" in name:
                weight.copy_(0.2 * noise + name.endswith("weight"))
            else:
                weight.copy_(0.2 * noise if weight.dim() == 1 else noise * weight.shape[1] ** -0.5)
    return plain


def pair(cls: str, **fixed: Any) -> Pair:
    """Fresh copies: a short input changes a model for good."""
    plain, fast = copy.deepcopy(made(cls, **fixed)), copy.deepcopy(made(cls, **fixed))
    return Pair(plain, fast, at.accelerate(fast))


def inputs(tokens: int, padding: str = "none", choices: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    ids = torch.randint(4, 70, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = None
    if padding != "none":
        mask = torch.ones(2, tokens, dtype=torch.int64)
        mask[1, slice(0, 19) if padding == "left" else slice(tokens - 19, None)] = 0
    if choices:
        ids = ids[:, None].repeat(1, 2, 1)
        mask = None if mask is None else mask[:, None].repeat(1, 2, 1)
    return ids, mask


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("tokens", [LONG, ODD, SHORT])
def test_classes(cls: str, tokens: int) -> None:
    models = pair(cls)
    for padding in ("none", "right", "left"):
        ids, mask = inputs(tokens, padding, cls == "BigBirdForMultipleChoice")
        plain, fast = (model(ids, attention_mask=mask) for model in models[:2])
        assert list(plain.keys()) == list(fast.keys())
        for key, value in plain.items():
            if not isinstance(value, torch.Tensor):
                continue
            by_token = value.dim() >= 2 and value.shape[1] == tokens and value.shape[:2] == ids.shape
            close(fast[key], value, mask if by_token else None)
    models.prove(3)


@pytest.mark.parametrize("options", [{"num_random_blocks": 3}, {"use_bias": False}, {"rescale_embeddings": True}])
@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_options(options: dict[str, Any], act: str) -> None:
    models = pair("BigBirdModel", hidden_act=act, **options)
    ids, mask = inputs(256, "right")
    close(models.fast(ids, attention_mask=mask)[0], models.plain(ids, attention_mask=mask)[0], mask)
    models.prove(1)


def test_stays_with_full_attention_like_the_plain_model() -> None:
    models = pair("BigBirdModel")
    for tokens in (LONG, SHORT, LONG):
        ids, _ = inputs(tokens)
        close(models.fast(ids)[0], models.plain(ids)[0])
        assert models.fast.attention_type == models.plain.attention_type
    assert models.fast.attention_type == "original_full"
    models.fast.set_attention_type("block_sparse")
    models.plain.set_attention_type("block_sparse")
    ids, _ = inputs(LONG)
    close(models.fast(ids)[0], models.plain(ids)[0])
    models.prove(4)


def test_restore() -> None:
    model = copy.deepcopy(made("BigBirdForMaskedLM"))
    before = state_of(model)
    report = at.accelerate(model)
    ids, _ = inputs(LONG)
    model(ids)
    assert report.fast_calls == 1
    assert at.restore(model) == 2
    same_state(before, state_of(model))


def test_report() -> None:
    text = str(pair("BigBirdForMaskedLM").report)
    assert "2 x BigBirdLayer in bert -> qkv_projection, block_sparse_attention" in text
    assert "output projection in cls.predictions.decoder" in text


@pytest.mark.parametrize("tokens", [SHORT, LONG])
def test_outputs(tokens: int) -> None:
    # from the start: 5.x loses the attentions of the call that changes a model
    models = pair("BigBirdModel", attention_type="original_full" if tokens == SHORT else "block_sparse")
    ids, _ = inputs(tokens)
    wanted = {"output_hidden_states": True, "output_attentions": tokens == SHORT}
    plain, fast = (model(ids, **wanted) for model in models[:2])
    assert list(plain.keys()) == list(fast.keys())
    for kind in ("hidden_states", "attentions"):
        for one, other in zip(fast.get(kind) or (), plain.get(kind) or (), strict=True):
            close(one, other)
    theirs, ours = (model(ids, return_dict=False, **wanted) for model in models[:2])
    assert [type(item) for item in theirs] == [type(item) for item in ours]
    models.prove(2)


@pytest.mark.parametrize("wanted", ["output_attentions", "output_hidden_states"])
def test_what_the_plain_blocks_do(wanted: str) -> None:
    """Block-sparse probabilities, and hidden states with transformers' own padding, are transformers' own."""
    models = pair("BigBirdModel")
    ids, _ = inputs(ODD)
    with pytest.warns(UserWarning, match="runs on transformers' own blocks"):
        fast = models.fast(ids, **{wanted: True})
    plain = models.plain(ids, **{wanted: True})
    for one, other in zip(fast[wanted[7:]], plain[wanted[7:]], strict=True):
        close(one, other)
    assert sum(models.report.plain_calls.values()) == 1


def test_inputs_embeds_positions_and_types() -> None:
    models = pair("BigBirdModel")
    ids, _ = inputs(LONG)
    embeds = models.plain.embeddings.word_embeddings(ids)
    for given in (
        {"inputs_embeds": embeds},
        {"input_ids": ids, "token_type_ids": (ids > 30).long()},
        {"input_ids": ids, "position_ids": torch.arange(LONG)[None].flip(1).repeat(2, 1)},
    ):
        close(models.fast(**given)[0], models.plain(**given)[0])
    models.prove(3)


def test_weights_and_dtype_are_followed() -> None:
    models = pair("BigBirdForMaskedLM")
    ids, _ = inputs(LONG)
    for model in models[:2]:
        with torch.no_grad():
            model.bert.encoder.layer[1].attention.self.key.weight.mul_(-1)
            model.cls.predictions.decoder.weight.mul_(0.5)
    close(models.fast(ids).logits, models.plain(ids).logits)
    reference = models.plain(ids).logits
    fast, plain = models.fast.bfloat16()(ids).logits, models.plain.bfloat16()(ids).logits
    assert fast.dtype == plain.dtype
    budget = (plain.float() - reference).abs().max()
    assert (fast.float() - reference).abs().max() <= 2 * budget
    models.prove()


@needs_causal_decoder
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True}, {"use_cache": False}])
def test_decoder_generates(mode: dict[str, Any]) -> None:
    models = pair("BigBirdForCausalLM", is_decoder=True, attention_type="original_full")
    ids, _ = inputs(9)
    mask = torch.ones_like(ids)
    if IS_5:
        mask[1, :3] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    tokens = []
    for model in models[:2]:
        torch.manual_seed(0)
        tokens.append(model.generate(ids, **{"do_sample": False, **arguments, **mode}))
    assert torch.equal(*tokens)
    models.prove()


def test_a_decoder_without_a_causal_mask_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases that give decoders the mask of an encoder get what they mean, not what is right."""
    monkeypatch.setattr(adapter, "_MASKS_DECODERS", False)
    models = pair("BigBirdForCausalLM", is_decoder=True, attention_type="original_full")
    ids, _ = inputs(9)
    with pytest.warns(UserWarning, match="without a causal mask"):
        fast = models.fast(ids).logits
    close(fast, models.plain(ids).logits)
    assert not models.report.fast_calls


def test_sparse_decoder_runs_on_the_plain_blocks() -> None:
    models = pair("BigBirdForCausalLM", is_decoder=True)
    ids, _ = inputs(LONG)
    with pytest.warns(UserWarning, match="which is not causal"):
        fast = models.fast(ids, use_cache=False).logits
    close(fast, models.plain(ids, use_cache=False).logits)


def test_training_is_refused() -> None:
    models = pair("BigBirdModel")
    with pytest.raises(RuntimeError, match="training mode"):
        models.fast.train()(inputs(LONG)[0])
    with pytest.raises(ValueError, match="training mode"):
        at.accelerate(copy.deepcopy(models.plain).train())


def test_refusals_inside() -> None:
    model = copy.deepcopy(made("BigBirdModel"))
    model.encoder.layer[1].intermediate.intermediate_act_fn = torch.nn.Softplus()
    says = r"layer\.1\.intermediate\.intermediate_act_fn is torch\..*Softplus\(.*\), the configuration says gelu_new"
    with pytest.raises(ValueError, match=says):
        at.accelerate(model)
    odd = transformers.BigBirdModel(transformers.BigBirdConfig(**{**VALUES, "block_size": 24})).eval()
    with pytest.raises(ValueError, match="block_size=24"):
        at.accelerate(odd)


def test_determinism_and_rows() -> None:
    models = pair("BigBirdModel")
    ids, _ = inputs(LONG)
    together = models.fast(ids)[0]
    assert torch.equal(models.fast(ids)[0], together)
    assert torch.equal(models.fast(ids[1:])[0], together[1:])


# --- what transformers' common model tests ask of every class --------------------------------------------------------


@pytest.fixture(params=CLASSES)
def encoder(request: pytest.FixtureRequest) -> Any:
    models = pair(request.param)
    yield models.fast
    assert models.report.fast_calls
    assert not models.report.plain_calls


def ids_of(model: Any, tokens: int = LONG) -> torch.Tensor:
    return inputs(tokens, choices=type(model).__name__ == "BigBirdForMultipleChoice")[0]


def test_model_outputs_equivalence(encoder: Any) -> None:
    for flags in ({}, {"output_hidden_states": True}):
        named, plain = (encoder(ids_of(encoder), return_dict=kind, **flags) for kind in (True, False))
        assert isinstance(plain, tuple)
        given = [item for item in named.to_tuple() if item is not None]
        for one, other in zip(given, [item for item in plain if item is not None], strict=True):
            for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (one, other)), strict=True):
                assert torch.equal(a, b)


def test_forward_signature_and_embeddings(encoder: Any) -> None:
    import inspect

    body = encoder.base_model
    names = list(inspect.signature(body.forward).parameters)
    assert names == list(inspect.signature(type(body).forward).parameters)[1:]
    assert names[0] == "input_ids"
    ids = inputs(LONG)[0]
    embeds = body.get_input_embeddings()(ids)
    assert torch.equal(body(ids)[0], body(inputs_embeds=embeds)[0])


def test_hidden_states_output(encoder: Any) -> None:
    body = encoder.base_model
    out = body(inputs(LONG)[0], output_hidden_states=True)
    assert len(out.hidden_states) == body.config.num_hidden_layers + 1
    assert {state.shape for state in out.hidden_states} == {(2, LONG, body.config.hidden_size)}
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)


def test_attention_outputs_of_full_attention() -> None:
    models = pair("BigBirdModel", attention_type="original_full")
    ids, mask = inputs(SHORT, "right")
    out = models.fast(ids, attention_mask=mask, output_attentions=True)
    config = models.fast.config
    assert len(out.attentions) == config.num_hidden_layers
    for attention in out.attentions:
        assert attention.shape == (2, config.num_attention_heads, SHORT, SHORT)
        assert torch.allclose(attention.sum(-1), torch.ones(()), atol=1e-5)
        assert not attention[1, :, :, SHORT - 19 :].any()
    models.prove(1)


def test_resize_tokens_embeddings() -> None:
    models = pair("BigBirdForMaskedLM")
    ids, _ = inputs(LONG)
    before = models.fast(ids).logits
    size = models.fast.config.vocab_size
    models.fast.resize_token_embeddings(size + 10, mean_resizing=False)
    report = at.accelerate(models.fast)
    after = models.fast(ids).logits
    assert after.shape[-1] == size + 10
    close(after[..., :size], before)
    assert "output projection" in str(report)


def test_save_load(encoder: Any, tmp_path: Any) -> None:
    ids = ids_of(encoder)
    expected = encoder(ids)[0]
    encoder.save_pretrained(tmp_path)
    again = type(encoder).from_pretrained(tmp_path, attn_implementation="eager").eval()
    report = at.accelerate(again)
    assert torch.equal(again(ids)[0], expected)
    assert report.fast_calls == 1


def test_exported() -> None:
    """The traced pass leaves nothing behind for the next one of the same length, of this model or another."""
    models = pair("BigBirdModel")
    length = LONG + 48  # of no other test: plans are shared
    ids = torch.randint(3, 70, (2, length), generator=torch.Generator().manual_seed(2))
    program = torch.export.export(models.fast, (ids,), {"return_dict": False}, strict=False)
    assert any("alula" in str(node.target) for node in program.graph.nodes)
    expected = models.plain(ids)[0]
    close(models.fast(ids)[0], expected)
    close(program.module()(ids, return_dict=False)[0], expected)
