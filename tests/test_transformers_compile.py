"""torch.compile of accelerated models: one graph, alula's ops in it, the same results."""
# ruff: noqa: E402

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import alula.integrations.transformers as at
import torch
from decoder_cases import random_ids
from torch._dynamo.backends.debugging import aot_eager
from transformers_cases import IS_5, LANGUAGE_MODELS, close, left_padded, own_pair, pair


class Graphs:
    """A backend that keeps the names of the ops it is given."""

    def __init__(self) -> None:
        self.ops: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.ops.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return aot_eager(graph, inputs)

    def __deepcopy__(self, memo: dict) -> Graphs:  # generate copies its configuration, and the backend in it
        return self

    def prove(self) -> None:
        for ops in self.ops:
            assert sum("alula.decoder_blocks" in op for op in ops) == 1
            assert not any("scaled_dot_product" in op or "softmax" in op for op in ops)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_full_graph(cls: str) -> None:
    models = own_pair(2, cls)
    graphs = Graphs()
    compiled = torch.compile(models.fast, fullgraph=True, backend=graphs)
    ids = random_ids(models.plain, 2, 7)
    mask = left_padded(ids)
    close(compiled(ids, attention_mask=mask).logits, models.plain(ids, attention_mask=mask).logits, mask)
    out = compiled(ids)
    close(out.logits, models.plain(ids).logits)
    assert out.past_key_values.get_seq_length() == 7
    assert len(graphs.ops) == 2
    graphs.prove()


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_steps_of_a_fixed_cache_share_a_graph(cls: str) -> None:
    models = own_pair(2, cls)
    graphs = Graphs()
    compiled = torch.compile(models.fast, fullgraph=True, backend=graphs)
    ids = random_ids(models.plain, 2, 9)
    expected = models.plain(ids).logits
    cache = at.make_cache(models.fast.config, 16)

    def inputs(start: int, end: int) -> dict[str, Any]:
        extra = {} if IS_5 else {"cache_position": torch.arange(start, end)}
        return {"input_ids": ids[:, start:end], "past_key_values": cache, "use_cache": True, **extra}

    close(models.fast(**inputs(0, 4)).logits, expected[:, :4])
    for column in range(4, 9):
        close(compiled(**inputs(column, column + 1)).logits, expected[:, column : column + 1])
    assert int(cache.get_seq_length()) == 9
    assert len(graphs.ops) == 1
    graphs.prove()


def generated(model: Any, ids: torch.Tensor, graphs: Graphs | None = None) -> torch.Tensor:
    """Seven tokens, greedily, the rows left padded; the steps compiled where there is a backend for them."""
    arguments = {
        "attention_mask": left_padded(ids),
        "max_new_tokens": 7,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 3,
    }
    if graphs is not None:
        config = transformers.CompileConfig(fullgraph=True, backend=graphs, mode=None)
        config._compile_all_devices = True
        arguments |= {"cache_implementation": "static", "compile_config": config}
    return model.generate(ids, **arguments)


@pytest.mark.parametrize("cls", LANGUAGE_MODELS[:2])
def test_generate_compiles_its_steps(cls: str) -> None:
    models = own_pair(2, cls)
    ids = random_ids(models.plain, 2, 5)
    graphs = Graphs()
    assert torch.equal(generated(models.fast, ids, graphs), generated(models.plain, ids))
    assert len(graphs.ops) == 1
    graphs.prove()


@pytest.mark.parametrize("cls", LANGUAGE_MODELS[:2])
def test_steps_compiled_before(cls: str) -> None:
    """What generate compiled stays on the model: it follows accelerate and restore."""
    models = own_pair(2, cls)
    model, ids, graphs = models.fast, random_ids(models.plain, 2, 5), Graphs()
    expected = generated(models.plain, ids)
    at.restore(model)
    assert torch.equal(generated(model, ids, graphs), expected)
    assert not any("alula." in op for op in graphs.ops.pop())
    report = at.accelerate(model)
    assert torch.equal(generated(model, ids, graphs), expected)
    assert len(graphs.ops) == 1
    graphs.prove()
    passes = report.fast_calls
    at.restore(model)
    assert torch.equal(generated(model, ids, graphs), expected)
    assert report.fast_calls == passes
    assert len(graphs.ops) == 1


def test_follows_loaded_weights() -> None:
    models = own_pair(2, "GPT2LMHeadModel")
    other = pair(3, "GPT2LMHeadModel").plain
    same_shapes = {key: value * 0.5 for key, value in models.plain.state_dict().items()}
    assert other is not models.plain
    compiled = torch.compile(models.fast, fullgraph=True, backend="aot_eager")
    ids = random_ids(models.plain, 1, 5)
    kept = {key: value.clone() for key, value in models.plain.state_dict().items()}
    compiled(ids)
    try:
        for model in (models.plain, models.fast):
            model.load_state_dict(same_shapes)
        close(compiled(ids).logits, models.plain(ids).logits)
    finally:
        for model in (models.plain, models.fast):
            model.load_state_dict(kept)


@pytest.mark.parametrize("keep_weights", [True, False], ids=["kept", "given up"])
@pytest.mark.parametrize("fullgraph", [True, False], ids=["full graph", "breaks"])
@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_changed_into_what_alula_cannot_run(cls: str, fullgraph: bool, keep_weights: bool) -> None:
    """Said as an eager pass says it, with a cache and without, until it is undone."""
    plain, model, _ = own_pair(2, cls)
    at.accelerate(model, keep_weights=keep_weights)
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    ids = random_ids(plain, 2, 5)
    expected = plain(ids).logits
    close(compiled(ids).logits, expected)
    error = torch._dynamo.exc.Unsupported if fullgraph else ValueError
    model.double()
    for use_cache in (True, False):
        for run, kind in ((compiled, error), (model, ValueError), (compiled, error)):
            with pytest.raises(kind, match=r"Model was changed into what alula cannot run: .*float64"):
                run(ids, use_cache=use_cache)
    model.float()
    for use_cache in (True, False):
        close(compiled(ids, use_cache=use_cache).logits, expected)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.get_output_embeddings().double()
        with pytest.raises(error, match=r"Linear was changed into what alula cannot run: .*float64"):
            compiled(ids)
    at.restore(model.float())
    close(compiled(ids).logits, expected)


@pytest.mark.parametrize("cls", LANGUAGE_MODELS[:2])
def test_attention_implementation(cls: str) -> None:
    import copy

    plain = pair(2, cls).plain
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation("alula")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    ids = random_ids(plain, 2, 6)
    mask = left_padded(ids)
    close(compiled(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits, mask)
