"""Calls of models with heads that are refused: the message names the argument, and a cache stays as it was."""

from __future__ import annotations

from typing import Any

import alula
import pytest
import torch
from alula.cache import KVCache

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
GPT2 = {
    "n_embd": 48,
    "n_head": 3,
    "n_layer": 2,
    "vocab_size": 61,
    "n_positions": 48,
    "num_labels": 3,
    "pad_token_id": 0,
}
CODEGEN = {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 61, "n_positions": 48, "rotary_dim": 8}
BIG_BIRD = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "block_size": 16,
    "num_random_blocks": 1,
}
LM: list[tuple[dict[str, Any], str]] = [
    ({"labels": IDS[:, :2]}, r"labels have shape \[2, 2\]; accepted: \[2, 3\]"),
    ({"labels": IDS + 90}, r"label 9\d is out of range"),
    ({"shift_labels": IDS[:1]}, r"shift_labels have shape \[1, 3\]; accepted: \[2, 3\]"),
    ({"logits_to_keep": -1}, "logits_to_keep=-1; accepted"),
    ({"logits_to_keep": torch.tensor([3])}, "reaches outside the 3 positions"),
    ({"input_ids": IDS + 90}, "input_ids holds 9[5-9]"),
]
CASES: list[tuple[str, dict[str, Any], list[tuple[dict[str, Any], str]]]] = [
    ("GPT2LMHeadModel", GPT2, LM),
    ("GPTBigCodeForCausalLM", GPT2, LM),
    ("CodeGenForCausalLM", CODEGEN, LM),
    ("BigBirdForCausalLM", {**BIG_BIRD, "is_decoder": True}, LM[:1] + LM[2:5]),
    (
        "GPT2DoubleHeadsModel",
        GPT2,
        [
            LM[0],
            ({"mc_labels": IDS}, r"mc_labels have shape \[6\]; accepted: \[1\]"),
            ({"mc_token_ids": torch.tensor([0, 3])}, "mc_token_ids holds 3; accepted: 0 to 2"),
            LM[3],
        ],
    ),
    ("GPT2ForSequenceClassification", GPT2, [({"labels": IDS}, r"labels have shape \[6\]; accepted: \[2\]")]),
    (
        "GPTBigCodeForTokenClassification",
        GPT2,
        [({"labels": IDS[:1]}, r"labels have shape \[1, 3\]; accepted: \[2, 3\]")],
    ),
]


def make(cls: str, values: dict[str, Any]) -> Any:
    kind = getattr(alula, cls)
    return kind(kind.config_class(**values))


@pytest.mark.parametrize(("cls", "values", "calls"), CASES, ids=[case[0] for case in CASES])
def test_a_refused_call_leaves_the_cache_as_it_was(cls: str, values: dict[str, Any], calls: Any) -> None:
    model = make(cls, values)
    base = model.base_model
    cache = base(IDS, use_cache=True).past_key_values
    assert isinstance(cache, KVCache)
    expected = base(IDS, past_key_values=cache).last_hidden_state
    cache.crop(3)
    for by_position in (False, True):
        for kwargs, message in calls:
            named: dict[str, Any] = {"input_ids": IDS, "past_key_values": cache, **kwargs}
            first = ("input_ids", "past_key_values") if by_position and not cls.startswith("BigBird") else ()
            listed = [named.pop(name) for name in first]
            with pytest.raises(ValueError, match=message):
                model(*listed, **named)
            assert (cache.get_seq_length(), cache.lengths.tolist()) == (3, [3, 3])
    assert torch.equal(base(IDS, past_key_values=cache).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("cls", "values", "kwargs", "message"),
    [
        ("GPT2LMHeadModel", GPT2, {"input_ids": [[1, 2]]}, "input_ids is a list; accepted: a torch.Tensor"),
        ("GPT2LMHeadModel", GPT2, {"input_ids": IDS.numpy()}, "input_ids is a ndarray"),
        ("GPT2LMHeadModel", GPT2, {"input_ids": IDS, "attention_mask": [[1, 1, 1]]}, "attention_mask is a list"),
        ("GPT2LMHeadModel", GPT2, {"input_ids": IDS, "labels": [1]}, "labels is a list"),
        ("GPT2DoubleHeadsModel", GPT2, {"input_ids": IDS, "mc_token_ids": [1, 1]}, "mc_token_ids is a list"),
        ("GPT2DoubleHeadsModel", GPT2, {"input_ids": IDS, "mc_labels": [1, 1]}, "mc_labels is a list"),
        ("GPT2ForSequenceClassification", GPT2, {"input_ids": "text"}, "input_ids is a str"),
        ("GPT2ForSequenceClassification", GPT2, {"input_ids": IDS, "labels": [0, 1]}, "labels is a list"),
        (
            "GPT2ForQuestionAnswering",
            GPT2,
            {"input_ids": IDS, "start_positions": [0, 1], "end_positions": IDS[:, 0]},
            "start_positions is a list",
        ),
        ("CodeGenForCausalLM", CODEGEN, {"input_ids": IDS, "position_ids": [0, 1, 2]}, "position_ids is a list"),
        ("BigBirdModel", BIG_BIRD, {"input_ids": [[1, 2]]}, "input_ids is a list"),
        ("BigBirdForMultipleChoice", BIG_BIRD, {"input_ids": [[[1, 2]]]}, "input_ids is a list"),
        (
            "BigBirdForQuestionAnswering",
            BIG_BIRD,
            {"input_ids": IDS, "question_lengths": [1, 1]},
            "question_lengths is a",
        ),
    ],
)
def test_what_is_no_tensor_is_named(cls: str, values: dict[str, Any], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make(cls, values)(**kwargs)


def test_labels_are_named_as_the_caller_does() -> None:
    choices = make("BigBirdForPreTraining", BIG_BIRD)
    with pytest.raises(ValueError, match=r"next_sentence_label have shape \[3\]; accepted: \[2\]"):
        choices(IDS, labels=IDS, next_sentence_label=torch.tensor([0, 1, 0]))
    answers = make("BigBirdForQuestionAnswering", BIG_BIRD)
    lengths = torch.tensor([1, 4])
    with pytest.raises(ValueError, match=r"question_lengths holds \[1, 4\]; accepted: 0 to 3, the tokens"):
        answers(IDS, question_lengths=lengths)
    at = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"end_positions have shape \[1\]; accepted: \[2\]"):
        answers(IDS, question_lengths=lengths.clamp(max=3), start_positions=at, end_positions=at[:1])
