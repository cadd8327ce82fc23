"""Whole models on a GPU, bf16, random weights: alula's generation in turn with transformers (eager, sdpa, and compiled
with a static cache and CUDA graphs), and with quantized weights in turn with itself in bf16.

A step of transformers is its forward and an argmax that stays on the device (its own `generate` does more), of alula a
step of `generate`. Every contestant makes the same number of tokens between two looks at the clock; the time of a step
is the difference of a long and a short run, so that the prompt and what happens once drop out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from alula.bench import presets
from torch import Tensor

from .timing import Bench

SHORT, LONG, ROUNDS = 8, 72, 3
QUICK_SHORT, QUICK_LONG = 2, 4
TOLERANCE = 3e-2  # of the largest logit, between alula and transformers' eager model, both bf16

Generate = Callable[[Tensor, int], Any]  # of ids [B, T]: makes that many tokens, greedy


class Shape(NamedTuple):
    """What is timed: `weights` is "bf16" or a format of quantized weights; padded rows have padding on the left, more
    in every row, up to half of the prompt."""

    name: str
    config: dict[str, Any]
    batch: int
    tokens: int  # of the prompt
    weights: str = "bf16"
    is_padded: bool = False
    is_large: bool = False  # takes minutes to make: only where it is asked for by name

    @property
    def title(self) -> str:
        return f"{self.name} B{self.batch} T{self.tokens} {self.weights}{' left-padded' if self.is_padded else ''}"

    def prompt(self) -> tuple[Tensor, Tensor | None]:
        """ids and attention mask, both int64 [B, T]."""
        size, generator = (self.batch, self.tokens), torch.Generator().manual_seed(self.batch)
        ids = torch.randint(4, self.config["vocab_size"], size, generator=generator)
        if not self.is_padded:
            return ids, None
        padding = torch.arange(self.batch) * self.tokens // (2 * self.batch)
        return ids, (torch.arange(self.tokens) >= padding.unsqueeze(1)).long()


def shapes(bench: Bench) -> list[Shape]:
    if bench.quick:
        tiny = presets.gpt_bigcode(2, 32, 4, 64, 90)
        padded = Shape("tiny", tiny, 3, 9, is_padded=True)
        return [Shape("tiny", tiny, 1, 5), Shape("tiny", tiny, 3, 9), padded, Shape("tiny", tiny, 1, 5, "int8")]
    gpt2, santacoder = presets.PRESETS["gpt2"], presets.PRESETS["santacoder"]
    return [
        Shape("santacoder", santacoder, 1, 128),
        Shape("santacoder", santacoder, 8, 1024, is_padded=True),
        Shape("santacoder", santacoder, 8, 128),
        Shape("gpt2", gpt2, 1, 128),
        Shape("santacoder", santacoder, 1, 128, "int8"),
        Shape("santacoder", santacoder, 1, 128, "int4"),
        Shape("starcoder", presets.PRESETS["starcoder"], 1, 128, is_large=True),
    ]


def run(bench: Bench, only: str, limits: dict[str, float], end: float) -> Iterator[dict[str, Any]]:
    """A row for each shape, as soon as it is known; contestants that cannot be had are named with the reason."""
    made: tuple[tuple[str, bool], dict[str, Any]] | None = None
    for shape in shapes(bench):
        kind = (shape.name, shape.weights == "bf16")
        if only not in shape.title or (shape.is_large and shape.name not in only) or time.monotonic() > end:
            continue
        try:
            if made is None or made[0] != kind:
                made = None  # its memory first
                bench.forget()
                made = (kind, _contestants(bench, shape.config) if kind[1] else _dense(bench, shape.config))
            given = made[1]
            if not kind[1]:
                given = {**given, "alula": _quantized(bench, given["alula bf16"], shape.weights)}
            row = _measure(bench, shape, given, limits, end)
        except Exception as error:  # one model that fails does not keep the others from running
            row = {"model": shape.title, "wrong": f"{type(error).__name__}: {error}"[:500]}
        print(_line(row), flush=True)
        yield row


def _contestants(bench: Bench, config: dict[str, Any]) -> dict[str, Any]:
    """alula's model and transformers', of the same weights; `missing`: why there is none."""
    import alula

    cls = getattr(alula, config["architectures"][0])
    try:
        import transformers
    except ImportError as error:
        ours = cls(cls.config_class(**config), dtype=torch.bfloat16).to(bench.device)
        return {"alula": ours, "missing": str(error)}
    torch.manual_seed(0)
    hf_config = transformers.AutoConfig.for_model(**config)
    with torch.device(bench.device):
        eager = transformers.AutoModelForCausalLM.from_config(
            hf_config, dtype=torch.bfloat16, attn_implementation="eager"
        )
    eager.eval()
    ours = cls(cls.config_class(**config), dtype=torch.bfloat16, init_weights=False)
    ours.load_state_dict({name: value.cpu() for name, value in eager.state_dict().items()})
    return {"alula": ours.to(bench.device), "hf": eager}


def _dense(bench: Bench, config: dict[str, Any]) -> dict[str, Any]:
    """What a model with quantized weights is compared with: itself in bf16."""
    import alula

    cls = getattr(alula, config["architectures"][0])
    torch.manual_seed(0)
    return {"alula bf16": cls(cls.config_class(**config), dtype=torch.bfloat16).to(bench.device)}


def _quantized(bench: Bench, dense: Any, format: str) -> Any:
    """A copy of the model with weights of this format."""
    ours = type(dense)(dense.config, dtype=torch.bfloat16, init_weights=False)
    ours.load_state_dict({name: value.cpu() for name, value in dense.state_dict().items()})
    return ours.quantize(format, activations="full").to(bench.device)


def _measure(bench: Bench, shape: Shape, made: dict[str, Any], limits: dict[str, float], end: float) -> dict[str, Any]:
    ours = made["alula"]
    given, mask = (None if part is None else part.to(bench.device) for part in shape.prompt())
    row: dict[str, Any] = {"model": shape.title, "wrong": "", "missing": {}}
    row.update({"ms": {}, "spread_ms": {}, "prefill_ms": {}})
    short, long = (QUICK_SHORT, QUICK_LONG) if bench.quick else (SHORT, LONG)
    contestants: dict[str, Generate] = {"alula": _alula(ours, mask)}
    if "hf" in made:
        with torch.inference_mode():
            theirs = made["hf"](given, **_padding(mask), logits_to_keep=1).logits.float()
            actual = ours(given, **_padding(mask), logits_to_keep=1).logits.float()
            error = (actual - theirs).abs().max() / theirs.abs().max()
        if not error <= TOLERANCE:
            return {**row, "wrong": f"logits differ by {float(error):.2g} of the largest"}
        row["logits differ by"] = float(error)
        contestants["hf eager"] = _hf(made["hf"], "eager", mask)
        contestants["hf sdpa"] = _hf(made["hf"], "sdpa", mask)
        if mask is None:
            contestants["hf compiled"] = _hf_compiled(bench, made["hf"], shape.tokens + long)
    elif "alula bf16" in made:
        with torch.inference_mode():
            theirs = made["alula bf16"](given, logits_to_keep=1).logits.float()
            error = (ours(given, logits_to_keep=1).logits.float() - theirs).norm() / theirs.norm()
        row["logits differ by"] = float(error)
        contestants["alula bf16"] = _alula(made["alula bf16"])
    else:
        row["missing"]["transformers"] = made["missing"]
    times: dict[str, list[float]] = {}
    for turn in range(ROUNDS + 1):
        for name, generate in list(contestants.items()):
            if time.monotonic() > end and name != "alula":
                row["missing"].setdefault(name, "no time was left")
                continue
            try:
                took = [_seconds(bench, generate, given, count) for count in (1, short, long)]
            except Exception as error:  # a peer that this version of it cannot run
                if name == "alula":
                    raise
                row["missing"][name] = f"{type(error).__name__}: {error}"[:300]
                del contestants[name]
                continue
            if turn:
                times.setdefault(name, []).append((took[2] - took[1]) / (long - short) * 1e3)
                row["prefill_ms"].setdefault(name, []).append(took[0] * 1e3)
    row["ms"] = {name: statistics.median(values) for name, values in times.items()}
    row["spread_ms"] = {name: [min(values), max(values)] for name, values in times.items()}
    row["prefill_ms"] = {name: statistics.median(values) for name, values in row["prefill_ms"].items()}
    if row["ms"].get("alula", 0) > 0:
        row["GB/s"] = ours.decode_bytes() / row["ms"]["alula"] / 1e6
        row["of the copy"] = row["GB/s"] / limits["copy GB/s"]
    return row


def _seconds(bench: Bench, generate: Generate, ids: Tensor, count: int) -> float:
    bench.synchronize()
    start = time.perf_counter()
    generate(ids, count)
    bench.synchronize()
    return time.perf_counter() - start


def _alula(model: Any, mask: Tensor | None = None) -> Generate:
    return lambda ids, count: model.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=[], pad_token_id=0
    )


def _padding(mask: Tensor | None) -> dict[str, Tensor]:
    """What transformers' forward takes of an attention mask [B, S]: itself, and the positions [B, S] that follow."""
    if mask is None:
        return {}
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def _hf(model: Any, attention: str, mask: Tensor | None = None) -> Generate:
    @torch.inference_mode()
    def generate(ids: Tensor, count: int) -> Tensor:
        model.set_attn_implementation(attention)
        given = _padding(mask)
        out = model(ids, **given, use_cache=True, logits_to_keep=1)
        for _ in range(count - 1):
            newest = out.logits[:, -1:].argmax(-1)
            if given:
                longer = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
                given = {"attention_mask": longer, "position_ids": given["position_ids"][:, -1:] + 1}
            out = model(newest, **given, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1)

    return generate


def _hf_compiled(bench: Bench, model: Any, max_tokens: int) -> Generate:
    """The prompt goes through the model as it is, the steps through one compiled graph over a static cache."""
    from transformers import StaticCache

    step = bench.compiled(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    cache = StaticCache(config=model.config, max_cache_len=max_tokens)

    @torch.no_grad()
    def generate(ids: Tensor, count: int) -> Tensor:
        model.set_attn_implementation("sdpa")
        cache.reset()
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        newest = out.logits[:, -1:].argmax(-1)
        for i in range(count - 1):
            if bench.is_gpu:
                torch.compiler.cudagraph_mark_step_begin()
            position = torch.full((1, 1), ids.shape[1] + i, device=ids.device)
            out = step(newest, past_key_values=cache, position_ids=position, use_cache=True, logits_to_keep=1)
            newest = out.logits[:, -1:].argmax(-1).clone()
        return newest

    return generate


def _line(row: dict[str, Any]) -> str:
    if row["wrong"]:
        return f"{row['model']:<32} WRONG: {row['wrong']}"
    times = "  ".join(f"{name} {value:.3f} ms" for name, value in row["ms"].items())
    share = f"  {row['of the copy']:.0%} of the copy" if "of the copy" in row else ""
    missing = "".join(f"  ({name} missing: {why})" for name, why in row["missing"].items())
    return f"{row['model']:<32} a step: {times}{share}{missing}"
