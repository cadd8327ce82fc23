"""What GPT-2 alone has: double heads, question answering, Conv1D checkpoints, its options; against transformers."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import alula
import pytest
import torch
import transformers
from alula.config import GPT2Config
from alula.ops import ACTIVATIONS
from decoder_cases import TOLERANCE, alula_model, hf_model, padding_mask, random_ids, random_values, worst

CLASSES = (
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
)


def small(**changes: Any) -> GPT2Config:
    return GPT2Config(**random_values(1, "gpt2", n_embd=48, n_head=3, n_layer=2, vocab_size=61, **changes))


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_scales_of_the_scores(scaled: bool, by_layer: bool) -> None:
    flags = {"scale_attn_weights": scaled, "scale_attn_by_inverse_layer_idx": by_layer}
    reference = hf_model(5, "GPT2LMHeadModel", n_layer=3, **flags)
    model = alula_model(reference)
    ids = random_ids(model, 2, 14)
    theirs, ours = reference(ids, output_attentions=True), model(ids, output_attentions=True)
    assert worst(ours.logits, theirs.logits) <= TOLERANCE
    assert all(worst(a, b) <= TOLERANCE for a, b in zip(ours.attentions, theirs.attentions, strict=True))


def test_reordering_and_upcasting_change_nothing() -> None:
    model = alula_model(hf_model(6, "GPT2LMHeadModel", reorder_and_upcast_attn=False))
    other = alula_model(hf_model(6, "GPT2LMHeadModel", reorder_and_upcast_attn=True))
    ids = random_ids(model, 2, 14)
    assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize("name", sorted({*ACTIVATIONS} & {*transformers.activations.ACT2FN}))
def test_activations_by_the_names_of_transformers(name: str) -> None:
    reference = hf_model(8, "GPT2LMHeadModel", activation_function=name, n_embd=48, n_head=3)
    model = alula_model(reference)
    ids = random_ids(model, 2, 9)
    assert worst(model(ids).logits, reference(ids).logits) <= TOLERANCE


# --- double heads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["last", "first", "mean", "cls_index"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"summary_activation": "tanh"},
        {"summary_activation": "gelu_new", "summary_proj_to_labels": False},
        {"summary_use_proj": False, "summary_activation": "relu"},
        {"summary_use_proj": False, "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_double_heads(kind: str, options: dict[str, Any]) -> None:
    reference = hf_model(3, "GPT2DoubleHeadsModel", summary_type=kind, **options)
    model = alula_model(reference)
    batch, choices, tokens = 2, 3, 11
    ids = random_ids(model, batch * choices, tokens).view(batch, choices, tokens)
    mask = padding_mask("right", batch * choices, tokens).view(ids.shape)
    types = random_ids(model, batch * choices, tokens, 7).view(ids.shape)
    at = torch.tensor([[0, 4, 10], [3, 1, 2]])
    for kwargs in ({}, {"mc_token_ids": at}, {"mc_token_ids": at, "attention_mask": mask, "token_type_ids": types}):
        labels = {"labels": ids}
        if model.multiple_choice_head.summary is not None and model.multiple_choice_head.summary.out_features == 1:
            labels["mc_labels"] = torch.tensor([2, 0])
        labels["output_hidden_states"] = True
        theirs, ours = reference(ids, **kwargs, **labels), model(ids, **kwargs, **labels)
        assert ours.keys() == list(theirs.keys())
        for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            assert worst(a, b) <= TOLERANCE
        assert worst(ours.logits, theirs.logits) <= TOLERANCE
        assert worst(ours.mc_logits, theirs.mc_logits) <= TOLERANCE
        assert abs(ours.loss - theirs.loss) <= TOLERANCE
        if "mc_labels" in labels:
            assert abs(ours.mc_loss - theirs.mc_loss) <= TOLERANCE
    embeds = model.get_input_embeddings()(ids)
    assert worst(model(inputs_embeds=embeds).mc_logits, model(ids).mc_logits) <= 1e-5
    flat = model(ids[:, 0], mc_token_ids=at[:, 0])
    theirs = reference(ids[:, 0], mc_token_ids=at[:, 0])
    assert worst(flat.logits, theirs.logits) <= TOLERANCE
    assert worst(flat.mc_logits, theirs.mc_logits) <= TOLERANCE
    assert isinstance(model(ids, return_dict=False), tuple)


def test_double_heads_generate() -> None:
    reference = hf_model(3, "GPT2DoubleHeadsModel", eos_token_id=None)
    ids = random_ids(reference, 2, 5)
    theirs = reference.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=3)
    assert torch.equal(alula_model(reference).generate(ids, max_new_tokens=8), theirs)


def test_choices_that_cannot_be_right() -> None:
    model = alula.GPT2DoubleHeadsModel(small())
    ids = torch.ones(2, 3, 5, dtype=torch.int64)
    for wrong, message in (
        (torch.full((2, 3), 5), "mc_token_ids holds 5; accepted: 0 to 4"),
        (torch.full((2, 3), -1), "mc_token_ids holds -1; accepted: 0 to 4"),
        (torch.zeros(2, 2, dtype=torch.int64), r"mc_token_ids has shape \[2, 2\] .*; accepted: \[2, 3\], int64"),
        (torch.zeros(2, 3), r"dtype torch\.float32; accepted"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, mc_token_ids=wrong)
    with pytest.raises(ValueError, match="label 3 is out of range; accepted: 0 to 2"):
        model(ids, mc_labels=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"mc_labels have shape \[3\]; accepted: \[2\]"):
        model(ids, mc_labels=torch.tensor([0, 1, 2]))


# --- question answering ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_question_answering(seed: int) -> None:
    reference = hf_model(seed, "GPT2ForQuestionAnswering")
    model = alula_model(reference)
    ids, mask = random_ids(model, 3, 12), padding_mask("right", 3, 12)
    for start, end in (([1, 5, 11], [2, 5, 11]), ([1, 99, 3], [4, 12, 77]), ([[0], [1], [2]], [[3], [4], [5]])):
        positions = {"start_positions": torch.tensor(start), "end_positions": torch.tensor(end)}
        theirs = reference(ids, attention_mask=mask, **positions, output_hidden_states=True)
        ours = model(ids, attention_mask=mask, **positions, output_hidden_states=True)
        assert ours.keys() == list(theirs.keys())
        assert worst(ours.start_logits, theirs.start_logits) <= TOLERANCE
        assert worst(ours.end_logits, theirs.end_logits) <= TOLERANCE
        assert abs(ours.loss - theirs.loss) <= TOLERANCE
    assert model(ids).loss is None
    with pytest.raises(ValueError, match=r"start_positions have shape \[2\]; accepted: \[3\]"):
        model(ids, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([1, 2]))


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_checkpoints_pass_to_and_from_transformers(cls: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = copy.deepcopy(hf_model(4, cls, add_cross_attention=cls == "GPT2Model")).to(dtype)
    reference.save_pretrained(tmp_path / "theirs")
    model = getattr(alula, cls).from_pretrained(tmp_path / "theirs")
    assert model.dtype == dtype
    state = reference.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "ours", max_shard_size="40KB")
    back = getattr(transformers, cls).from_pretrained(tmp_path / "ours")
    assert back.dtype == dtype
    assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())
    again = getattr(alula, cls).from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_auto_classes_choose_by_the_configuration(tmp_path: Path) -> None:
    hf_model(4, "GPT2LMHeadModel", tie_word_embeddings=False).save_pretrained(tmp_path)
    assert type(alula.AutoModelForCausalLM.from_pretrained(tmp_path)) is alula.GPT2LMHeadModel
    assert type(alula.AutoConfig.from_pretrained(tmp_path)) is GPT2Config
    with pytest.warns(UserWarning, match=r"not used by GPT2Model: lm_head\.weight"):
        assert type(alula.AutoModel.from_pretrained(tmp_path)) is alula.GPT2Model
    for auto, cls, head in (
        ("AutoModelForSequenceClassification", "GPT2ForSequenceClassification", "score"),
        ("AutoModelForTokenClassification", "GPT2ForTokenClassification", "classifier"),
        ("AutoModelForQuestionAnswering", "GPT2ForQuestionAnswering", "qa_outputs"),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert type(getattr(alula, auto).from_pretrained(tmp_path)) is getattr(alula, cls)
        texts = [str(warning.message) for warning in caught]
        assert any(f"lacks {head}.weight" in text and "initialised at random" in text for text in texts), texts


def test_buffers_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    reference = hf_model(4, "GPT2LMHeadModel")
    reference.config.save_pretrained(tmp_path)
    old = {name.removeprefix("transformer."): value for name, value in reference.state_dict().items()}
    del old["lm_head.weight"]
    if not reference.config.tie_word_embeddings:
        old["lm_head.weight"] = reference.lm_head.weight.data
    for layer in range(reference.config.n_layer):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8)
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(old, tmp_path / "pytorch_model.bin")
    state = alula.GPT2LMHeadModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in reference.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(tied: bool) -> None:
    model = alula_model(hf_model(15, "GPT2LMHeadModel", tie_word_embeddings=tied, vocab_size=97))
    ids = random_ids(model, 2, 9)
    before = model(ids).logits
    model.resize_token_embeddings(103)
    assert torch.equal(model(ids).logits[..., :97], before)
    model(torch.tensor([[102]]))
    model.resize_token_embeddings(97)
    assert torch.equal(model(ids).logits, before)


# --- configuration ---------------------------------------------------------------------------------------------------


def test_configuration_defaults_are_those_of_transformers() -> None:
    ours, theirs = GPT2Config(), transformers.GPT2Config()
    keys = [*GPT2Config.fields, *GPT2Config.aliases, "tie_word_embeddings", "use_cache", "pad_token_id", "num_labels"]
    assert {key: getattr(ours, key) for key in keys} == {key: getattr(theirs, key) for key in keys}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_embd": 100, "n_head": 3}, "not divisible by n_head=3"),
        ({"summary_type": "attn"}, "summary_type='attn' .* one of last, first, mean, cls_index"),
        ({"summary_activation": "gelo"}, "summary_activation='gelo' .* null or one of gelu, .*sigmoid"),
        ({"summary_first_dropout": 2}, "summary_first_dropout=2 .* from 0 to 1"),
        ({"scale_attn_by_inverse_layer_idx": 1}, "scale_attn_by_inverse_layer_idx=1 .* true or false"),
        ({"model_type": "codegen"}, "GPT2Config reads model_type 'gpt2'"),
    ],
)
def test_values_that_cannot_be_right(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT2Config(**values)


def test_original_santacoder_files_are_not_gpt2() -> None:
    with pytest.raises(ValueError, match=r"attention_head_type .* load them as GPTBigCode"):
        GPT2Config.from_dict({"model_type": "gpt2", "attention_head_type": "multiquery"})


def test_calls_that_cannot_be_right() -> None:
    model = alula.GPT2LMHeadModel(small())
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="the configuration has add_cross_attention=False"):
        model(ids, encoder_hidden_states=torch.zeros(2, 4, 48))
    limit = model.config.n_positions
    with pytest.raises(ValueError, match=f"more than n_positions={limit}"):
        model(torch.ones(1, limit + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"position_ids holds {limit}; accepted: 0 to {limit - 1}"):
        model(ids, position_ids=torch.tensor([[0, 1, limit]]))
    classifier = alula.GPT2ForSequenceClassification(small(pad_token_id=None))
    with pytest.raises(ValueError, match=r"a batch of 2 .* no pad_token_id"):
        classifier(ids)
