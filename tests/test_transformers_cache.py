"""alula's cache layers against transformers' own: the same calls give the same keys, values, lengths and mask sizes."""
# ruff: noqa: E402

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import alula.integrations.transformers as at
import torch
from alula.integrations.transformers.cache import FixedLayer, GrowingLayer, adopt, merged_view
from decoder_cases import hf_model, random_ids
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers_cases import IS_5, LANGUAGE_MODELS, close, pair


def states(batch: int, tokens: int, kv_heads: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, kv_heads, tokens, 8), torch.randn(batch, kv_heads, tokens, 8)


def same(ours: Any, theirs: Any) -> None:
    assert int(ours.get_seq_length()) == int(theirs.get_seq_length())
    length = int(theirs.get_seq_length())
    if length:
        assert torch.equal(ours.keys[:, :, :length], theirs.keys[:, :, :length])
        assert torch.equal(ours.values[:, :, :length], theirs.values[:, :, :length])
        query = 3 if IS_5 else torch.arange(3)
        assert ours.get_mask_sizes(query) == theirs.get_mask_sizes(query)


@pytest.mark.parametrize("seed", range(12))
def test_growing_layer(seed: int) -> None:
    """Any sequence of calls."""
    draw = random.Random(seed)
    ours, theirs = GrowingLayer(), DynamicLayer()
    batch = 3
    for _ in range(25):
        what = draw.choice(["update"] * 4 + ["reorder", "crop", "repeat", "select", "mask", "reset"])
        if what == "update" or not theirs.is_initialized or theirs.get_seq_length() == 0:
            new = states(batch, draw.choice([1, 1, 2, 7, 60, 130]))
            results = [layer.update(*new) for layer in (ours, theirs)]
            for one, other in zip(*results, strict=True):
                assert torch.equal(one, other)
        elif what == "reorder":
            rows = torch.tensor([draw.randrange(batch) for _ in range(batch)])
            [layer.reorder_cache(rows) for layer in (ours, theirs)]
        elif what == "crop":
            count = -draw.randrange(1, theirs.get_seq_length() + 1) if IS_5 or draw.random() < 0.5 else 5
            [layer.crop(count) for layer in (ours, theirs)]
        elif what == "repeat":
            [layer.batch_repeat_interleave(2) for layer in (ours, theirs)]
            batch *= 2
        elif what in ("select", "mask"):
            rows = torch.tensor(sorted(draw.sample(range(batch), max(1, batch // 2))))
            batch = len(rows)
            if what == "mask":
                keep = torch.zeros(theirs.keys.shape[0], dtype=torch.bool)
                keep[rows] = True
                rows = keep
            [layer.batch_select_indices(rows) for layer in (ours, theirs)]
        elif what == "reset":
            ours.reset()
            theirs = DynamicLayer()  # 4.57 keeps its length over a reset
            batch = draw.choice([1, 2, 3])
        same(ours, theirs)


def test_growing_never_copies_per_step() -> None:
    layer = GrowingLayer()
    layer.update(*states(1, 5))
    addresses = set()
    for _ in range(400):
        layer.update(*states(1, 1))
        addresses.add(layer.merged.data_ptr())
    assert len(addresses) <= 5
    assert layer.merged.shape == (1, 2, 512, 16)
    assert layer.keys.data_ptr() == layer.merged.data_ptr()


def test_fixed_layer() -> None:
    ours, theirs = FixedLayer(20), StaticLayer(20)
    start = 0
    address = None
    for tokens in (6, 1, 1, 4):
        new = states(2, tokens)
        extra = () if IS_5 else ({"cache_position": torch.arange(start, start + tokens)},)
        for layer in (ours, theirs):
            layer.update(*new, *extra)
        start += tokens
        same(ours, theirs)
        assert address in (None, ours.merged.data_ptr())
        address = ours.merged.data_ptr()
        rows = torch.tensor([1, 1])
        for layer in (ours, theirs):
            layer.reorder_cache(rows)
        same(ours, theirs)
    assert torch.equal(ours.keys, theirs.keys)
    ours.reset()
    assert int(ours.get_seq_length()) == 0
    assert not ours.merged.any()
    with pytest.raises((RuntimeError, IndexError)):
        ours.update(*states(2, 21))


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_takes_over_a_filled_cache_and_gives_it_back(cls: str, fixed: bool) -> None:
    """A cache that the plain model filled is continued by the accelerated one, and the other way round."""
    models = pair(2, cls)
    ids = random_ids(models.plain, 2, 9)

    def cache() -> Any:
        return StaticCache(config=models.plain.config, max_cache_len=20) if fixed else DynamicCache()

    def step(model: Any, past: Any, start: int, end: int) -> torch.Tensor:
        extra = {} if IS_5 else {"cache_position": torch.arange(start, end)}
        return model(ids[:, start:end], past_key_values=past, use_cache=True, **extra).logits

    expected = models.plain(ids).logits
    for first, second in ((models.plain, models.fast), (models.fast, models.plain)):
        past = cache()
        close(step(first, past, 0, 4), expected[:, :4])
        close(step(second, past, 4, 8), expected[:, 4:8])
        close(step(first, past, 8, 9), expected[:, 8:])
        assert int(past.get_seq_length()) == 9
        assert isinstance(past, StaticCache if fixed else DynamicCache)
        kinds = {type(layer) for layer in past.layers}
        assert kinds == {FixedLayer if fixed else GrowingLayer}


def test_a_copied_prompt_cache() -> None:
    models = pair(2)
    ids = random_ids(models.plain, 1, 8)
    prompt = models.fast(ids[:, :5], use_cache=True).past_key_values
    first, second = copy.deepcopy(prompt), copy.deepcopy(prompt)
    a = models.fast(ids[:, 5:], past_key_values=first, use_cache=True).logits
    models.fast(ids[:, :3], past_key_values=second, use_cache=True)
    assert prompt.get_seq_length() == 5
    close(models.fast(ids[:, 5:], past_key_values=prompt, use_cache=True).logits, a)
    close(a, models.plain(ids).logits[:, 5:])


def test_reading_and_writing_keys() -> None:
    cache = at.make_cache(hf_model(2, "GPT2LMHeadModel").config)
    cache.update(*states(1, 4), 0)
    layer = cache.layers[0]
    layer.keys = torch.ones_like(layer.keys)
    assert layer.merged[:, :, :4, :8].eq(1).all()
    with pytest.raises(AttributeError, match="a view of its merged tensor"):
        layer.values = torch.zeros(1, 1, 1, 1)
    with pytest.raises(AttributeError, match=r"reset\(\)"):
        layer.keys = None


def test_layers_that_are_left_alone() -> None:
    class Own(DynamicCache):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            return super().update(*args, **kwargs)

    models = pair(2, "GPT2LMHeadModel")
    ids = random_ids(models.plain, 1, 5)
    with pytest.warns(UserWarning, match="updates in its own way"):
        out = models.fast(ids, past_key_values=Own(), use_cache=True)
    close(out.logits, models.plain(ids).logits)
    short = DynamicCache()
    short.layers = [DynamicLayer() for _ in range(9)]
    short.layer_class_to_replicate = None
    assert "9 layers, the model 2" in adopt(short, 2)
    assert type(short.layers[0]) is DynamicLayer


def test_encoder_decoder_cache_is_unwrapped() -> None:
    models = pair(2)
    ids = random_ids(models.plain, 1, 7)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    models.fast(ids[:, :4], past_key_values=cache, use_cache=True)
    out = models.fast(ids[:, 4:], past_key_values=cache, use_cache=True)
    close(out.logits, models.plain(ids).logits[:, 4:])
    assert out.past_key_values is cache
    assert cache.get_seq_length() == 7
    models.prove(2)


def test_a_failed_pass_stores_nothing() -> None:
    models = pair(2, "GPT2LMHeadModel")
    ids = random_ids(models.plain, 1, 6)
    cache = models.fast(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(RuntimeError):
        models.fast(ids[:, 4:], past_key_values=cache, attention_mask=torch.ones(1, 1, 2, 3))
    assert cache.get_seq_length() == 4
    out = models.fast(ids[:, 4:], past_key_values=cache, use_cache=True)
    close(out.logits, models.plain(ids).logits[:, 4:])


def test_a_full_fixed_cache() -> None:
    models = pair(2, "GPT2LMHeadModel")
    cache = at.make_cache(models.fast.config, 5)
    ids = random_ids(models.plain, 1, 6)
    models.fast(ids[:, :4], past_key_values=cache)
    with pytest.raises((RuntimeError, ValueError), match="5"):
        models.fast(ids[:, 4:], past_key_values=cache)


def test_merged_view() -> None:
    layer = GrowingLayer()
    keys, values = layer.update(*states(2, 5))
    merged = merged_view(keys, values)
    assert torch.equal(merged, torch.cat([keys, values], -1))
    assert merged.data_ptr() == layer.merged.data_ptr()
    assert merged_view(*states(2, 5)) is None
    assert merged_view(values, keys) is None


def test_dimensions_by_iteration() -> None:
    cache = at.make_cache(hf_model(2, "GPT2LMHeadModel").config)
    for layer in range(len(cache.layers)):
        cache.update(*states(1, 3), layer)
    for entry in cache:
        assert entry[0].shape == entry[1].shape == (1, 2, 3, 8)
