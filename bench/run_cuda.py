"""`alula bench cuda`: the ops on a GPU, in turn with PyTorch's own and as a share of what the GPU was seen to do.

Each case is first compared with the peer's result; a case that differs is reported and not timed. Times are of the GPU
(events), the median of rounds in which all contestants take turns, over copies of the operands that together exceed the
second-level cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[int], Any]  # called with the number of a copy of the operands


class Case(NamedTuple):
    name: str
    contestants: dict[str, Function]  # "alula" first
    copies: int
    nbytes: float = 0.0  # that must move
    flops: float = 0.0
    tolerance: float = 2e-2  # of the largest value, between alula and the first peer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `alula bench cuda`."""
    parser.add_argument("--json", metavar="FILE", help="also write the results as JSON")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each case (default %(default)s)")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Print the table; returns the exit status: 1 where a result was wrong."""
    if not torch.cuda.is_available():
        print("alula bench cuda needs a CUDA device; torch finds none")
        return 2
    with torch.inference_mode():
        limits = {"copy GB/s": copy_rate(), "bf16 product TFLOP/s": product_rate()}
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: " + str(limits))
        rows = []
        for make in (norm_cases, softmax_cases, linear_cases, decode_cases, prefill_cases, block_sparse_cases):
            for case in make():
                if args.filter in case.name:
                    rows.append(measure(case, args.rounds, limits))
                    print(line_of(rows[-1]))
                torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"limits": limits, "command": argv, "cases": rows}, file, indent=1)
    return 1 if any(row["wrong"] for row in rows) else 0


def elapsed(function: Function, first: int, repeats: int) -> float:
    """Microseconds of one call, over `repeats` calls queued together."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(2_000_000)  # the queue is full before the first call runs
    start.record()
    for i in range(repeats):
        function(first + i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / repeats


def copy_rate() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    to = torch.empty_like(source)
    times = [elapsed(lambda _: to.copy_(source), 0, 4) for _ in range(5)]
    return round(2 * source.nbytes / min(times) / 1e3, 1)


def product_rate() -> float:
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    times = [elapsed(lambda _: a @ a, 0, 3) for _ in range(4)]
    return round(2 * 8192**3 / min(times) / 1e6, 1)


def measure(case: Case, rounds: int, limits: dict[str, float]) -> dict[str, Any]:
    """Compare, warm up, take turns."""
    results, failed = {}, {}
    for name, function in case.contestants.items():
        try:
            results[name] = function(0)
        except Exception as error:  # a peer that does not run here, such as one that is compiled, leaves the others
            if name == "alula":
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    names = list(results)
    wrong = ""
    if len(names) > 1:
        ours, theirs = results[names[0]].float(), results[names[1]].float()
        error = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-30)
        wrong = "" if error <= case.tolerance else f"differs by {error:.2g} of the largest value"
    times: dict[str, list[float]] = {name: [] for name in names}
    if not wrong:
        for i in range(rounds + 2):
            for name in names:
                function = case.contestants[name]
                time = elapsed(lambda n, f=function: f(n % case.copies), i * 20, 20)
                if i >= 2:
                    times[name].append(time)
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    row: dict[str, Any] = {"case": case.name, "wrong": wrong, "us": medians, "failed": failed}
    row["spread_us"] = {name: [min(values), max(values)] for name, values in times.items() if values}
    if medians and case.nbytes:
        row["GB/s"] = case.nbytes / medians[names[0]] / 1e3
        row["of the copy"] = row["GB/s"] / limits["copy GB/s"]
    if medians and case.flops:
        row["TFLOP/s"] = case.flops / medians[names[0]] / 1e6
        row["of the product"] = row["TFLOP/s"] / limits["bf16 product TFLOP/s"]
    return row


def line_of(row: dict[str, Any]) -> str:
    if row["wrong"]:
        return f"{row['case']:<52} WRONG: {row['wrong']}"
    times = "  ".join(f"{name} {time:.1f} us" for name, time in row["us"].items())
    share = "".join(f"  {row[k]:.0%} {k}" for k in ("of the copy", "of the product") if k in row)
    failed = "".join(f"  {name} does not run: {why.splitlines()[0][:80]}" for name, why in row["failed"].items())
    return f"{row['case']:<52} {times}{share}{failed}"


def copies_of(nbytes: float) -> int:
    """Copies of operands that exceed the caches together."""
    return max(1, min(64, int(256e6 / max(nbytes, 1)) + 1))


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").to(torch.bfloat16)


def norm_cases() -> list[Case]:
    from alula import ops

    cases = []
    for rows, width in ((16384, 768), (16384, 2048), (4096, 6144)):
        nbytes = 4.0 * rows * width
        xs = [rand(rows, width) for _ in range(copies_of(nbytes))]
        w, b = rand(width), rand(width)
        contestants = {
            "alula": lambda i, xs=xs, w=w, b=b: ops.layer_norm(xs[i], w, b),
            "torch": lambda i, xs=xs, w=w, b=b, n=width: F.layer_norm(xs[i], (n,), w, b),
        }
        cases.append(Case(f"layer_norm {rows}x{width} bf16", contestants, len(xs), nbytes))
    return cases


def softmax_cases() -> list[Case]:
    from alula import ops

    cases = []
    for rows, keys in ((65536, 1024), (16384, 4096), (4096, 16384)):
        nbytes = 4.0 * rows * keys
        xs = [rand(rows, keys) for _ in range(copies_of(nbytes))]
        contestants = {
            "alula": lambda i, xs=xs: ops.scaled_masked_softmax(xs[i], scale=0.125),
            "torch": lambda i, xs=xs: (xs[i] * 0.125).softmax(-1),
        }
        cases.append(Case(f"scaled_masked_softmax {rows}x{keys} bf16", contestants, len(xs), nbytes))
    return cases


def linear_cases() -> list[Case]:
    from alula import ops

    cases = []
    for rows in (1, 4, 16):
        for n, k in ((2304, 2048), (2048, 2048), (8192, 2048), (2048, 8192), (49280, 2048)):
            nbytes = 2.0 * n * k
            weights = [rand(n, k) / k**0.5 for _ in range(copies_of(nbytes))]
            packed = [ops.pack(weight) for weight in weights]
            x, bias = rand(rows, k), rand(n)
            contestants = {
                "alula": lambda i, x=x, p=packed, b=bias: ops.linear(x, p[i], b),
                "torch": lambda i, x=x, w=weights, b=bias: F.linear(x, w[i], b),
            }
            cases.append(Case(f"linear {rows}x{n}x{k} bf16", contestants, len(weights), nbytes))
    return cases


def decode_cases() -> list[Case]:
    from alula import ops

    cases = []
    for batch, heads, kv_heads, context in (
        (1, 16, 1, 512),
        (1, 16, 1, 2048),
        (1, 16, 1, 8192),
        (8, 16, 1, 8192),
        (64, 16, 1, 8192),
        (8, 48, 1, 8192),
        (8, 12, 12, 1024),
    ):
        head_dim = 128 if kv_heads == 1 else 64
        nbytes = 4.0 * batch * kv_heads * context * head_dim
        caches = [rand(batch, kv_heads, context, 2 * head_dim) for _ in range(copies_of(nbytes))]
        q = rand(batch, 1, heads, head_dim)
        positions = torch.full((batch, 1), context - 1, dtype=torch.int32, device="cuda")
        lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")

        def peer(i: int, caches=caches, q=q, d=head_dim) -> Tensor:
            key, value = caches[i].split(d, dim=-1)
            out = F.scaled_dot_product_attention(q.transpose(1, 2), key, value, enable_gqa=True)
            return out.transpose(1, 2).flatten(2)

        contestants = {
            "alula": lambda i, q=q, c=caches, p=positions, n=lengths: ops.attention(q, c[i], p, n),
            "torch sdpa": peer,
        }
        name = f"attention decode B{batch} H{heads} G{kv_heads} D{head_dim} S{context} bf16"
        cases.append(Case(name, contestants, len(caches), nbytes))
    return cases


def prefill_cases() -> list[Case]:
    from alula import ops

    cases = []
    for heads, kv_heads, head_dim, tokens in ((16, 1, 128, 2048), (48, 1, 128, 8192), (12, 12, 64, 1024)):
        flops = 2.0 * heads * tokens * tokens * head_dim  # half of the square, two products
        caches = [rand(1, kv_heads, tokens, 2 * head_dim) for _ in range(2)]
        q = rand(1, tokens, heads, head_dim)
        positions = torch.arange(tokens, dtype=torch.int32, device="cuda")[None]
        lengths = torch.full((1,), tokens, dtype=torch.int32, device="cuda")

        def peer(i: int, caches=caches, q=q, d=head_dim) -> Tensor:
            key, value = caches[i].split(d, dim=-1)
            out = F.scaled_dot_product_attention(q.transpose(1, 2), key, value, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).flatten(2)

        contestants = {
            "alula": lambda i, q=q, c=caches, p=positions, n=lengths: ops.attention(q, c[i], p, n),
            "torch sdpa": peer,
        }
        name = f"attention prefill H{heads} G{kv_heads} D{head_dim} T{tokens} bf16"
        cases.append(Case(name, contestants, len(caches), flops=flops))
    return cases


def block_sparse_cases() -> list[Case]:
    from alula.bench.cases import cuda_block_sparse as sparse

    cases = []
    for batch, tokens, num_random in sparse.SHAPES:
        contestants, copies, flops = sparse.contestants(batch, tokens, num_random)
        blocks = f"5 + {num_random}" if num_random else "5"
        name = f"block_sparse_attention {blocks} blocks B{batch} H{sparse.HEADS} D{sparse.DIM} T{tokens} bf16"
        cases.append(Case(name, contestants, copies, flops=flops))
    return cases
