"""Options and prompts that generation refuses, naming what is wrong, before the model or a cache is touched."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from alula.generation import Generation, GenerationConfig, generate, stream
from toy_decoder import ToyDecoder


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([], {}, "batch is empty"),
        ([[]], {}, "prompt 0 is empty"),
        ([[1], []], {}, "prompt 1 is empty"),
        (torch.zeros(1, 0, dtype=torch.int64), {}, "prompt is empty"),
        (torch.zeros(0, 3, dtype=torch.int64), {}, r"B >= 1, but has \[0, 3\]"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), {}, r"shape \[B, T\]"),
        (torch.zeros(1, 2), {}, "must be integers, but are torch.float32"),
        ([[1.5]], {}, "must be integers"),
        ([["a"]], {}, "must be ids"),
        ([1, 2.5], {}, "prompt 0 must be a list of ids, but is 1"),
        (torch.tensor([[1, 2]]), {"attention_mask": GenerationConfig()}, "attention_mask is a GenerationConfig"),
        ("text", {}, "but is a str"),
        ([64], {}, "id 64; accepted: 0 to 63"),
        ([-1], {}, "id -1; accepted"),
        (torch.tensor([[1, 2]]), {"attention_mask": torch.ones(1, 3)}, r"\[1, 3\]; accepted: \[1, 2\]"),
        (torch.tensor([[1, 2]]), {"attention_mask": torch.zeros(1, 2)}, "prompt 0 is empty"),
        ([[1, 2]], {"attention_mask": torch.ones(1, 2)}, "lists of ids need none"),
        ([1] * 129, {}, "has 129 tokens, but the model has n_positions=128"),
        ([1], {"max_new_tokens": 128}, "n_positions=128; ask for at most 127"),
        ([1] * 5, {"max_length": 5}, "leaves no room after a prompt of 5 tokens"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([1], {"max_new_tokens": 2.5}, "max_new_tokens must be an integer"),
        ([1], {"temperature": -0.1, "do_sample": True}, "temperature must be at least 0"),
        ([1], {"temperature": float("nan"), "do_sample": True}, "temperature must be at least 0"),
        ([1], {"temperature": "hot"}, "temperature must be a number"),
        ([1], {"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ([1], {"top_p": 1.01}, "top_p must be above 0 and at most 1"),
        ([1], {"top_k": -1}, "top_k must be at least 0"),
        ([1], {"min_p": 1.5}, "min_p must be at least 0 and at most 1"),
        ([1], {"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ([1], {"do_sample": 1}, "do_sample must be True or False"),
        ([1], {"num_return_sequences": 0}, "num_return_sequences must be at least 1"),
        ([1], {"eos_token_id": "x"}, "eos_token_id must be"),
        ([1], {"eos_token_id": [1, -2]}, "eos_token_id must be at least 0"),
        ([1], {"stop_strings": [""]}, "stop_strings must be non-empty"),
        ([1], {"stop_strings": "x"}, "need a tokenizer"),
        ([1], {"stop_strings": "x", "tokenizer": object()}, "must have a decode"),
        ([1], {"max_new_token": 3}, "no option `max_new_token`; did you mean `max_new_tokens`"),
        ([1], {"temprature": 3}, "did you mean `temperature`"),
        ([1], {"num_beams": 4}, "num_beams=4 is not supported; accepted: 1"),
        ([1], {"num_beams": torch.tensor([1, 1])}, "is not supported; accepted: 1"),
        ([1], {"cache_implementation": "static"}, "cache_implementation='static' is not supported; accepted: None"),
        ([1], {"token_type_ids": torch.zeros(1, 1)}, "token_type_ids=tensor.* is not supported; accepted: None"),
        ([1], {"nonsense": 3}, "no option `nonsense`; accepted: bos_token_id, "),
        ([1], {"do_sample": True, "seed": -3}, "seed must be an integer >= 0"),
        ([1], {"do_sample": True, "seed": [1, 2]}, r"a list of 1 \(one per row\)"),
        ([1], {"do_sample": True, "seed": 1.5}, "seed must be an integer >= 0"),
        ([1], {"eos_token_id": torch.tensor([1.5])}, "eos_token_id must be"),
        ([1], {"do_sample": True, "seed": 1, "generator": torch.Generator()}, "not both"),
    ],
)
def test_bad_input_is_named_before_anything_runs(prompt, options, message):
    model = ToyDecoder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            generate(model, prompt, **options)
        if "attention_mask" not in options:
            with pytest.raises(ValueError, match=message):
                stream(model, prompt, **options)
    assert not model.calls


def test_no_prompt_or_two():
    with pytest.raises(ValueError, match="takes the prompt as"):
        generate(ToyDecoder())
    with pytest.raises(ValueError, match="takes the prompt as"):
        generate(ToyDecoder(), [1], inputs=[1])


def test_neutral_options_of_hugging_face_are_accepted():
    neutral = {"num_beams": 1, "use_cache": True, "return_dict_in_generate": False, "synced_gpus": False}
    neutral |= dict.fromkeys(("assistant_model", "prefix_allowed_tokens_fn", "negative_prompt_ids", "inputs_embeds"))
    assert generate(ToyDecoder(), [1], max_new_tokens=2, **neutral).shape == (1, 3)


@pytest.mark.parametrize("name", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("value", [lambda ids, logits: logits, [3], 3])
def test_processors_and_criteria_are_lists_of_callables(name, value):
    model = ToyDecoder()
    with pytest.raises(TypeError, match=f"{name} must be a list of callables"):
        generate(model, [1], **{name: value})
    assert not model.calls


@pytest.mark.parametrize("value", [{"max_new_tokens": 3}, "greedy"])
def test_what_is_no_generation_config(value):
    with pytest.raises(TypeError, match=f"generation_config is a {type(value).__name__}; accepted: a GenerationConfig"):
        generate(ToyDecoder(), [1], generation_config=value)


def test_sampling_options_without_sampling_warn():
    with pytest.warns(UserWarning, match="top_k matter only with do_sample=True"):
        generate(ToyDecoder(), [1], top_k=5, max_new_tokens=2)


def test_generation_config_files(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": [3, 4], "do_sample": true, "top_k": 7, "transformers_version": "5", "x": 1}')
    config = GenerationConfig.from_pretrained(tmp_path)
    assert (config.eos_ids, config.do_sample, config.top_k, config.temperature) == ((3, 4), True, 7, 1.0)
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == config
    path.write_text('{"num_beams": 4, "top_p": 0.5}')
    with pytest.warns(UserWarning, match="num_beams"):
        assert GenerationConfig.from_pretrained(tmp_path).top_p == 0.5
    for text, message in (("{", "is not JSON"), ("[]", "must hold a JSON object"), ('{"top_p": 3}', "top_p must be")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            GenerationConfig.from_pretrained(tmp_path)
    path.unlink()
    assert GenerationConfig.from_pretrained(tmp_path, ToyDecoder().config).eos_ids == ()


def test_generation_configurations_are_updated_in_place():
    config = GenerationConfig(eos_token_id=3)
    copy = config.updated(top_k=7, eos_token_id=[])
    assert (copy.top_k, copy.eos_ids, config.top_k, config.eos_ids) == (7, (), 0, (3,))
    assert config.update(top_k=7, max_new_tokens=4) == {}
    assert (config.top_k, config.max_new_tokens, config.eos_ids) == (7, 4, (3,))
    assert config.to_diff_dict() == {"top_k": 7, "max_new_tokens": 4, "eos_token_id": 3}
    assert GenerationConfig(**config.to_dict()) == config
    for options, message in (({"top_p": 3.0}, "top_p must be"), ({"top_q": 0.5}, "did you mean `top_p`")):
        with pytest.raises(ValueError, match=message):
            config.update(top_k=9, **options)
        assert config.top_k == 7
    model = ToyDecoder()
    model.generation_config = GenerationConfig()
    model.generation_config.update(max_new_tokens=4)
    assert generate(model, [1]).shape == (1, 5)


def test_none_is_an_option_that_is_not_used():
    chosen = {
        "max_new_tokens": 4,
        "min_new_tokens": 2,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "num_return_sequences": 2,
        "stop_strings": ["a"],
        "eos_token_id": [3],
        "bos_token_id": 1,
        "pad_token_id": 5,
    }
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(map(str, ids)))
    config = GenerationConfig().updated(**chosen)
    for name, value in chosen.items():
        changed = config.updated(**{name: None})
        assert changed.to_dict() == config.to_dict() | {name: getattr(GenerationConfig(), name)}
        assert changed.chosen == chosen.keys() - {name}
        assert getattr(GenerationConfig().merge(changed), name) == getattr(GenerationConfig(), name)
        assert getattr(config.merge(changed), name) == value
        assert GenerationConfig(**{name: None}) == GenerationConfig()
        model = ToyDecoder()
        model.generation_config = config
        call = Generation(model, [[1]], tokenizer=tokenizer, **{name: None})
        assert call.config == changed
    config.update(**dict.fromkeys(chosen))
    assert config == GenerationConfig()
    assert not config.chosen
    with pytest.raises(ValueError, match="did you mean `top_k`"):
        config.updated(top_kk=None)


def test_none_samples_as_if_it_were_left_out_of_a_model_without_it():
    plain, model = ToyDecoder(), ToyDecoder()
    model.generation_config = GenerationConfig(top_k=2, top_p=0.5, min_p=0.3, temperature=0.3, repetition_penalty=2.0)
    options = {"do_sample": True, "max_new_tokens": 30, "seed": 3}
    expected = generate(plain, [1], **options)
    none = dict.fromkeys(("top_k", "top_p", "min_p", "temperature", "repetition_penalty"))
    assert torch.equal(generate(model, [1], **options, **none), expected)
    assert not torch.equal(generate(model, [1], **options), expected)


def test_numbers_may_come_as_arrays_and_tensors():
    model = ToyDecoder()
    plain = {"max_new_tokens": 6, "do_sample": True, "temperature": 0.5, "eos_token_id": [3, 4], "pad_token_id": 3}
    wrapped = {name: torch.tensor(value) for name, value in plain.items()} | {"do_sample": np.bool_(True)}
    expected = generate(model, [[1], [2]], seed=7, **plain)
    for seed in (torch.tensor(7), np.int64(7), torch.tensor([7, 8]), np.array([7, 8])):
        assert torch.equal(generate(model, [[1], [2]], seed=seed, **wrapped), expected)
