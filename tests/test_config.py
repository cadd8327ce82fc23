"""Configurations: defaults, aliases and files as transformers has them; contradictions refused."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from alula.config import AutoConfig, GPTBigCodeConfig, PretrainedConfig
from alula.models import GPTBigCodeModel

KEYS = [
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "activation_function",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "layer_norm_epsilon",
    "initializer_range",
    "scale_attn_weights",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "attention_softmax_in_fp32",
    "scale_attention_softmax_in_fp32",
    "multi_query",
    "add_cross_attention",
    "tie_word_embeddings",
    "hidden_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_labels",
    "id2label",
    "label2id",
    "problem_type",
    "return_dict",
    "output_hidden_states",
    "model_type",
]


def test_defaults_are_those_of_transformers() -> None:
    ours, theirs = GPTBigCodeConfig(), transformers.GPTBigCodeConfig()
    assert {key: getattr(ours, key) for key in KEYS} == {key: getattr(theirs, key) for key in KEYS}
    assert ours.dtype is None
    assert ours.head_dim == 64
    assert ours.intermediate_size == 3072


def test_aliases_read_and_write_one_value() -> None:
    config = GPTBigCodeConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=3, max_position_embeddings=50)
    assert (config.n_embd, config.n_head, config.n_layer, config.n_positions) == (96, 4, 3, 50)
    config.hidden_size = 128
    config.n_layer = 7
    assert config.n_embd == 128
    assert config.num_hidden_layers == 7
    assert "hidden_size" not in config.to_dict()
    assert GPTBigCodeConfig(hidden_size=96, n_embd=96).n_embd == 96
    with pytest.raises(AttributeError, match="no attribute 'n_heads'"):
        _ = config.n_heads


def test_unknown_keys_are_kept_and_written_back(tmp_path: Path) -> None:
    extra = {"summary_type": "cls_index", "_name_or_path": "x", "nested": {"a": [1, None]}, "transformers_version": "4"}
    config = GPTBigCodeConfig(n_layer=2, **extra)
    assert config.nested == {"a": [1, None]}
    config.save_pretrained(tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["config.json"]
    for back in (
        GPTBigCodeConfig.from_pretrained(tmp_path / "new"),
        GPTBigCodeConfig.from_pretrained(str(tmp_path / "new" / "config.json")),
        AutoConfig.from_pretrained(tmp_path / "new"),
    ):
        assert back == config
        assert {key: getattr(back, key) for key in extra} == extra
    assert GPTBigCodeConfig.from_pretrained(tmp_path / "new", n_layer=5, hidden_size=192).n_layer == 5
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert config != GPTBigCodeConfig()


def test_files_pass_to_transformers_and_back(tmp_path: Path) -> None:
    labels = {"id2label": {0: "no", 1: "yes", 2: "?"}, "label2id": {"no": 0, "yes": 1, "?": 2}}
    theirs = transformers.GPTBigCodeConfig(
        n_embd=64, n_head=2, multi_query=False, **labels, dtype="bfloat16", n_inner=100
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = AutoConfig.from_pretrained(tmp_path / "theirs")
    assert {key: getattr(ours, key) for key in KEYS} == {key: getattr(theirs, key) for key in KEYS}
    assert ours.dtype == torch.bfloat16
    ours.save_pretrained(tmp_path / "ours")
    back = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert {key: getattr(back, key) for key in KEYS} == {key: getattr(theirs, key) for key in KEYS}
    assert back.dtype == torch.bfloat16


def test_dtype_by_either_key() -> None:
    assert GPTBigCodeConfig(torch_dtype="float16").dtype == torch.float16
    assert GPTBigCodeConfig(dtype="torch.bfloat16").dtype == torch.bfloat16
    assert GPTBigCodeConfig(dtype=torch.float32, torch_dtype="float16").dtype == torch.float32
    written = GPTBigCodeConfig(torch_dtype=torch.bfloat16).to_dict()
    assert written["dtype"] == "bfloat16"
    assert "torch_dtype" not in written
    with pytest.raises(ValueError, match=r"dtype.*'int8'.*float32, bfloat16"):
        GPTBigCodeConfig(dtype="int8")


def test_labels() -> None:
    config = GPTBigCodeConfig(num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config = GPTBigCodeConfig(**json.loads(GPTBigCodeConfig(id2label={0: "a", 1: "b"}).to_json_string()))
    assert config.id2label == {0: "a", 1: "b"}
    assert config.label2id == {"a": 0, "b": 1}
    assert config.num_labels == 2
    assert "id2label" not in GPTBigCodeConfig().to_dict()
    assert GPTBigCodeConfig.from_dict({"id2label": {"0": "a"}}, num_labels=4).num_labels == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_embd": 100, "n_head": 3}, r"n_embd=100 is not divisible by n_head=3"),
        ({"n_embd": 60, "n_head": 5}, r"head size .* = 12 is not supported; accepted: a multiple of 8 up to 256"),
        ({"n_embd": 528, "n_head": 2}, r"head size .* = 264 is not supported"),
        ({"hidden_size": 64, "n_embd": 96}, r"hidden_size=64 and n_embd=96 name one value but differ"),
        ({"multi_query": True, "num_key_value_heads": 4}, r"num_key_value_heads=4 contradicts .* make it 1"),
        ({"multi_query": False, "num_key_value_heads": 1}, r"num_key_value_heads=1 contradicts .* make it 12"),
        ({"head_dim": 32}, r"head_dim=32 contradicts .* make it 64"),
        ({"num_labels": 3, "id2label": {"0": "a"}}, r"num_labels=3 contradicts id2label, which has 1"),
        ({"num_labels": 0}, r"num_labels=0 .* positive integer"),
        ({"id2label": ["a"]}, r"id2label=\['a'\]"),
        ({"label2id": {"a": "b"}}, r"label2id="),
        ({"n_layer": 0}, r"n_layer=0 .* positive integer"),
        ({"n_head": -2}, r"n_head=-2"),
        ({"vocab_size": "50257"}, r"vocab_size='50257'"),
        ({"n_embd": 768.0}, r"n_embd=768.0"),
        ({"n_positions": True}, r"n_positions=True"),
        ({"n_inner": 0}, r"n_inner=0 .* or null"),
        ({"multi_query": "yes"}, r"multi_query='yes' .* true or false"),
        ({"multi_query": 1}, r"multi_query=1"),
        ({"layer_norm_epsilon": 0}, r"layer_norm_epsilon=0"),
        ({"layer_norm_epsilon": float("nan")}, r"layer_norm_epsilon=nan"),
        ({"resid_pdrop": 1.5}, r"resid_pdrop=1.5 .* from 0 to 1"),
        ({"activation_function": "gelo"}, r"activation_function='gelo' .* one of .*gelu_new.*relu.*silu"),
        ({"activation_function": None}, r"activation_function=None"),
        ({"eos_token_id": "</s>"}, r"eos_token_id='</s>'"),
        ({"eos_token_id": [1, 2.5]}, r"eos_token_id=\[1, 2.5\]"),
        ({"problem_type": "ranking"}, r"problem_type='ranking' .* regression"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, r"needs num_labels >= 2"),
        ({"add_cross_attention": True}, r"add_cross_attention=True is not supported with multi-query"),
        ({"model_type": "gpt2"}, r"GPTBigCodeConfig reads model_type 'gpt_bigcode', .* 'gpt2'"),
        ({"validate": 3}, r"key 'validate', a name of GPTBigCodeConfig itself"),
    ],
)
def test_values_that_cannot_be_right(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTBigCodeConfig(**values)


def test_values_changed_later_are_checked_when_a_model_is_made() -> None:
    config = GPTBigCodeConfig(n_embd=64, n_head=4, n_layer=1, vocab_size=20, n_positions=8)
    config.n_head = 5
    with pytest.raises(ValueError, match="not divisible"):
        GPTBigCodeModel(config)
    with pytest.raises(TypeError, match="takes a GPTBigCodeConfig, not a dict"):
        GPTBigCodeModel({"n_head": 4})


def test_auto_config(tmp_path: Path) -> None:
    assert isinstance(AutoConfig.for_model("gpt_bigcode", n_layer=2), GPTBigCodeConfig)
    with pytest.raises(ValueError, match=r"unknown model_type 'llama'; accepted: gpt_bigcode, gpt2, codegen"):
        AutoConfig.for_model("llama")
    with pytest.raises(FileNotFoundError, match="neither a model folder nor a config file"):
        AutoConfig.from_pretrained(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        AutoConfig.from_pretrained(tmp_path)
    file = tmp_path / "config.json"
    for text, message in (
        ('{"model_type": "llama"}', r"model_type 'llama'; accepted: gpt_bigcode, gpt2, codegen"),
        ("{}", "names no model_type"),
        ('{"model_type": ["gpt_bigcode"]}', r"model_type \['gpt_bigcode'\]"),
        ('{"model_type": "gpt_bigcode", ', "is not valid JSON"),
        ("[1]", "holds a JSON list"),
        ("[" * 100_000, "is not valid JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            AutoConfig.from_pretrained(tmp_path)
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="is not valid JSON"):
        AutoConfig.from_pretrained(tmp_path)


def test_original_santacoder_configuration(tmp_path: Path) -> None:
    values = {
        "model_type": "gpt2",
        "attention_head_type": "multiquery",
        "architectures": ["GPT2LMHeadCustomModel"],
        "auto_map": {"AutoConfig": "configuration_gpt2_mq.GPT2CustomConfig"},
        "activation_function": "gelu_fast",
        "n_embd": 64,
        "n_head": 2,
        "n_inner": 96,
        "reorder_and_upcast_attn": False,
        "scale_attn_by_inverse_layer_idx": False,
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    for cls in (AutoConfig, GPTBigCodeConfig):
        config = cls.from_pretrained(tmp_path)
        assert isinstance(config, GPTBigCodeConfig)
        assert (config.multi_query, config.n_inner, config.activation_function) == (True, 96, "gelu_fast")
        assert not hasattr(config, "auto_map")
    for key, value in (("attention_head_type", "multihead"), ("scale_attn_by_inverse_layer_idx", True)):
        (tmp_path / "config.json").write_text(json.dumps({**values, key: value}))
        with pytest.raises(ValueError, match=key):
            AutoConfig.from_pretrained(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GPTBigCodeConfig(n_layer=2).save_pretrained(tmp_path)

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        GPTBigCodeConfig(n_layer=3).save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert PretrainedConfig.get_config_dict(tmp_path)["n_layer"] == 2
