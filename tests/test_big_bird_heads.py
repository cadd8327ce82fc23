"""BigBird's heads against transformers in float32: logits, losses, checkpoints in both directions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import alula
import pytest
import safetensors.torch
import torch
import transformers
from big_bird_cases import (
    CLASSES,
    SEP,
    TOLERANCE,
    alula_model,
    fresh,
    hf_model,
    padding_mask,
    random_ids,
    random_values,
    switch,
    worst,
)
from torch import Tensor


def inputs(cls: str, model: Any, tokens: int, kind: str) -> dict[str, Any]:
    """What a class is called with: ids, a mask, labels."""
    ids, mask = random_ids(model, 4, tokens), padding_mask(kind, 4, tokens)
    labels = random_ids(model, 4, tokens, 1)
    labels[:, ::3] = -100
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if cls == "BigBirdForMultipleChoice":
        given = {name: value if value is None else value.view(2, 2, tokens) for name, value in given.items()}
        return {**given, "labels": torch.tensor([1, 0])}
    if cls == "BigBirdForQuestionAnswering":
        ends = torch.tensor([5, 9, tokens + 3, 2])
        return {**given, "start_positions": torch.tensor([[3], [7], [1], [0]]), "end_positions": ends}
    if cls == "BigBirdForSequenceClassification":
        return {**given, "labels": torch.tensor([0, 2, 1, 1])}
    if cls == "BigBirdForTokenClassification":
        return {**given, "labels": labels.clamp(-100, 2).masked_fill(labels > 2, 1)}
    if cls == "BigBirdForPreTraining":
        return {**given, "labels": labels, "next_sentence_label": torch.tensor([0, 1, 1, 0])}
    return {**given, "labels": labels}


@pytest.mark.parametrize("cls", CLASSES[1:])
@pytest.mark.parametrize("seed", range(4))
def test_like_transformers(seed: int, cls: str) -> None:
    reference = hf_model(seed, cls, num_labels=3)
    model = alula_model(reference)
    for tokens, kind in ((23, "none"), (23, "left"), (switch(model.config) + 19, "right")):
        given = inputs(cls, model, tokens, kind)
        theirs, ours = fresh(reference)(**given), model(**given)
        assert ours.keys() == list(theirs.keys())
        for name, value in ours.items():
            assert worst(value, theirs[name]) <= TOLERANCE, (name, tokens, kind)
    plain = {name: value for name, value in given.items() if name in ("input_ids", "attention_mask")}
    more = model(**plain, output_attentions=True, output_hidden_states=True)
    assert more.get("loss") is None
    assert len(more.hidden_states) == model.config.num_hidden_layers + 1
    assert len(more.attentions) == model.config.num_hidden_layers
    as_tuple = model(**given, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], model(**given).loss)


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification", None])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_sequence_losses(num_labels: int, problem: str | None) -> None:
    if problem == "single_label_classification" and num_labels == 1:
        return
    reference = hf_model(2, "BigBirdForSequenceClassification", num_labels=num_labels, classifier_dropout=0.2)
    model = alula_model(reference)
    ids = random_ids(model, 4, 13)
    labels = torch.rand(4, num_labels) if num_labels > 1 else torch.rand(4)
    if problem == "single_label_classification":
        labels = torch.tensor([0, 2, 1, 1])
    elif problem == "multi_label_classification":
        labels = (torch.rand(4, num_labels) < 0.5).float()
    reference.config.problem_type = model.config.problem_type = problem
    try:
        assert worst(model(ids, labels=labels).loss, reference(ids, labels=labels).loss) <= TOLERANCE
    finally:
        reference.config.problem_type = None


def test_question_answering() -> None:
    reference = hf_model(0, "BigBirdForQuestionAnswering")
    model = alula_model(reference)
    for tokens in (30, switch(model.config) + 8):
        ids = random_ids(model, 3, tokens)
        lengths = torch.tensor([[4], [1], [9]])
        types = torch.randint(0, 2, ids.shape)
        for given in (
            {"input_ids": ids},
            {"input_ids": ids, "question_lengths": lengths},
            {"input_ids": ids, "token_type_ids": types},
            {"inputs_embeds": model.get_input_embeddings()(ids)},
            {"inputs_embeds": model.get_input_embeddings()(ids), "question_lengths": lengths},
        ):
            theirs, ours = fresh(reference)(**given), model(**given)
            for name in ("start_logits", "end_logits"):
                assert worst(ours[name], theirs[name]) <= 0.07  # a float32 near 1e6
                is_free = theirs[name] > -1e5
                assert worst(ours[name][is_free], theirs[name][is_free]) <= TOLERANCE
    assert torch.equal(
        model(ids, question_lengths=lengths).start_logits, model(ids, question_lengths=lengths[:, 0]).start_logits
    )
    without = ids.clone()
    without[1][without[1] == SEP] = 5
    with pytest.raises(
        ValueError, match=r"row 1 of input_ids has no \[SEP\] \(sep_token_id is 66\) to end its question"
    ):
        model(without)
    with pytest.raises(ValueError, match=r"question_lengths has shape \[2\]"):
        model(ids, question_lengths=torch.tensor([1, 2]))
    pooled = alula.BigBirdForQuestionAnswering(alula.BigBirdConfig(**random_values(0)), add_pooling_layer=True)
    assert pooled(ids).pooler_output.shape == (3, pooled.config.hidden_size)


def test_left_padding_with_positions_is_the_row_alone() -> None:
    for cls in ("BigBirdForSequenceClassification", "BigBirdForPreTraining"):
        model = alula_model(hf_model(3, cls))
        ids = random_ids(model, 2, 25)
        mask = torch.ones(2, 25, dtype=torch.int64)
        mask[1, :9] = 0
        ours = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), return_dict=False)[-1]
        assert worst(ours[1], model(ids[1:, 9:], return_dict=False)[-1][0]) <= 1e-5


@pytest.mark.parametrize("cls", CLASSES[1:])
def test_own_plans(cls: str) -> None:
    """The model's own pattern given as a plan changes no bit; another one does; one of another length is refused."""
    reference = hf_model(1, cls, block_size=16, num_random_blocks=1, num_hidden_layers=2)
    model = alula_model(reference)
    tokens = switch(model.config) + 5
    ids = random_ids(model, 2, tokens)
    ids = ids.unsqueeze(1) if cls.endswith("MultipleChoice") else ids
    expected = model(ids, output_attentions=True)
    given = model(ids, block_plan=alula.BlockPlan.evaluation(tokens, 16, 1), output_attentions=True)
    assert torch.equal(given[0], expected[0])
    narrow = model(ids, block_plan=alula.BlockPlan.pattern(tokens, 16, global_blocks=()), output_attentions=True)
    assert not narrow.attentions[1][..., 0, 40:].any()
    assert not torch.equal(narrow[0], expected[0])
    with pytest.raises(ValueError, match=f"block_plan has .* blocks of 16; the input {tokens} tokens"):
        model(ids, block_plan=alula.BlockPlan.evaluation(tokens + 16, 16, 1))


def test_bad_labels_and_choices() -> None:
    config = alula.BigBirdConfig(**random_values(0))
    ids = torch.ones(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels have shape \[2, 4\]; accepted: \[2, 5\]"):
        alula.BigBirdForMaskedLM(config)(ids, labels=ids[:, :4])
    with pytest.raises(ValueError, match=r"label 999 is out of range; accepted: 0 to \d+, or -100"):
        alula.BigBirdForMaskedLM(config)(ids, labels=ids * 999)
    with pytest.raises(ValueError, match="labels need the logits of every position"):
        alula.BigBirdForMaskedLM(config)(ids, labels=ids, logits_to_keep=1)
    with pytest.raises(ValueError, match=r"input_ids has shape \[2, 5\]; accepted: \[B, C, T\], C choices"):
        alula.BigBirdForMultipleChoice(config)(ids)
    with pytest.raises(ValueError, match="give exactly one of input_ids and inputs_embeds"):
        alula.BigBirdForMultipleChoice(config)()


def test_logits_of_some_positions() -> None:
    model = alula.BigBirdForMaskedLM(alula.BigBirdConfig(**random_values(1)))
    ids = random_ids(model, 2, 40)
    at = torch.tensor([3, 17])
    assert torch.equal(model(ids, logits_to_keep=at).logits, model(ids).logits[:, at])


# --- checkpoints -----------------------------------------------------------------------------------------------------


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return set(ours) == set(theirs) and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
def test_checkpoints_keep_their_bits(cls: str, tied: bool, tmp_path: Path) -> None:
    reference = hf_model(11, cls, tie_word_embeddings=tied, use_bias=tied)
    reference.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = getattr(alula, cls).from_pretrained(tmp_path / "theirs")
    assert same(model.state_dict(), reference.state_dict())
    model.save_pretrained(tmp_path / "ours")
    files = [safetensors.torch.load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs")]
    assert same(*files)
    back = getattr(transformers, cls).from_pretrained(tmp_path / "ours")
    assert same(back.state_dict(), reference.state_dict())
    assert back.config.architectures == [cls]


def test_auto_classes(tmp_path: Path) -> None:
    alula.BigBirdForPreTraining(alula.BigBirdConfig(**random_values(1))).save_pretrained(tmp_path)
    for auto, cls in (
        ("AutoModel", "BigBirdModel"),
        ("AutoModelForPreTraining", "BigBirdForPreTraining"),
        ("AutoModelForMaskedLM", "BigBirdForMaskedLM"),
        ("AutoModelForCausalLM", "BigBirdForCausalLM"),
        ("AutoModelForMultipleChoice", "BigBirdForMultipleChoice"),
        ("AutoModelForQuestionAnswering", "BigBirdForQuestionAnswering"),
        ("AutoModelForSequenceClassification", "BigBirdForSequenceClassification"),
        ("AutoModelForTokenClassification", "BigBirdForTokenClassification"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # heads that are not there, heads of no use
            model = getattr(alula, auto).from_pretrained(tmp_path)
        assert type(model).__name__ == cls
        assert type(getattr(alula, auto).from_config(model.config)) is type(model)
    assert type(alula.AutoConfig.from_pretrained(tmp_path)) is alula.BigBirdConfig


def test_older_names_and_buffers(tmp_path: Path) -> None:
    """LayerNorm.gamma and .beta, buffers of positions, the prefix left out or put on."""
    reference = hf_model(10)
    state = {}
    for name, value in reference.state_dict().items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        state[f"bert.{name}"] = value.contiguous()
    state["bert.embeddings.position_ids"] = torch.arange(1100)[None]
    state["bert.embeddings.token_type_ids"] = torch.zeros(1, 1100, dtype=torch.int64)
    reference.config.save_pretrained(tmp_path)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = alula.BigBirdModel.from_pretrained(tmp_path)
    assert same(model.state_dict(), reference.state_dict())
    with pytest.warns(UserWarning, match=r"lacks .*classifier\.dense\.weight.*: initialised at random"):
        classifier = alula.BigBirdForSequenceClassification.from_pretrained(tmp_path)
    assert same(classifier.bert.state_dict(), reference.state_dict())
    state["bert.embeddings.LayerNorm.weight"] = torch.ones(model.config.hidden_size)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"has both '.*LayerNorm\.weight' and '.*LayerNorm\.gamma', which are one weight"
    ):
        alula.BigBirdModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_changes_its_size(tied: bool) -> None:
    reference = hf_model(9, "BigBirdForMaskedLM", tie_word_embeddings=tied)
    model = alula_model(reference)
    ids = random_ids(model, 2, 20)
    before, size = model(ids).logits, model.config.vocab_size
    model.resize_token_embeddings(size + 7)
    after = model(ids).logits
    assert after.shape[-1] == size + 7
    assert worst(after[..., :size], before) <= 1e-6
    assert model.state_dict()["cls.predictions.bias"].shape == (size + 7,)
    model.resize_token_embeddings(size)
    assert torch.equal(model(ids).logits, before)
    table = torch.randn(size, model.config.hidden_size)
    model.set_output_embeddings(table)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.state_dict()["cls.predictions.decoder.weight"], table)
    assert torch.equal(model.get_input_embeddings().weight, reference.get_input_embeddings().weight)
    own = transformers.BigBirdForMaskedLM(transformers.BigBirdConfig(**model.config.to_dict())).eval()
    own.load_state_dict(model.state_dict())
    assert worst(model(ids).logits, own(ids).logits) <= TOLERANCE


def test_other_dtypes() -> None:
    model = alula_model(hf_model(9, "BigBirdForMaskedLM", tie_word_embeddings=True))
    model.to(torch.bfloat16)
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    assert model(random_ids(model, 1, 20)).logits.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="is not supported"):
        model.to("meta")
    assert alula.BigBirdForMaskedLM.from_config(model.config, dtype="bfloat16").dtype == torch.bfloat16
    reference = hf_model(9, "BigBirdForMaskedLM", tie_word_embeddings=True)
    assert model.num_parameters() == reference.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == reference.num_parameters(exclude_embeddings=True)
