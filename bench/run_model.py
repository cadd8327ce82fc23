"""`alula bench model`: a model of a published shape with random weights, checked, then timed in turn with peers.

Of a decoder prefill and decode are timed, of an encoder the whole forward.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import random
from pathlib import Path

import torch
from alula.bench import contexts, limits, machine, model_folder, presets, report, through
from alula.bench.encoder_rounds import EncoderGroup
from alula.bench.engine import Engine, EngineError
from alula.bench.model_rounds import QUANTIZED, Group, Workload, plan_groups
from alula.bench.peers import ENCODER_PEERS, PEERS

HEADER = ("phase", "engine", "weights", "median", "+-", "rate", "of limit", "alula / it", "max error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `alula bench model`."""
    peers = ",".join(name for name in PEERS if name != "alula")
    shapes = [*presets.PRESETS, *presets.ENCODERS]
    parser.add_argument("--preset", choices=shapes, default="mqa-768", help="shape (default %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", *QUANTIZED),
        default="bf16",
        help="weights (default %(default)s); int4 and nf4 in groups of 64, of decoders only",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, help="prompt of the prefill (default 128); an encoder's input (all)"
    )
    parser.add_argument(
        "--context",
        type=lengths,
        metavar="N[,N...]",
        help="tokens before the timed steps (default: the prompt); several lengths are timed in turn",
    )
    parser.add_argument("--batch", type=int, default=1, help="rows (default %(default)s)")
    parser.add_argument("--left-pad", action="store_true", help="rows of unequal lengths, padded on the left")
    parser.add_argument("--new-tokens", type=int, default=32, help="timed steps of a round (default %(default)s)")
    parser.add_argument(
        "--peers",
        metavar="NAMES",
        help=f"comma-separated: {peers}; all; none (default hf-sdpa; of an encoder hf-eager)",
    )
    parser.add_argument(
        "--through",
        choices=("transformers",),
        help="also time a model of transformers that alula accelerates, against the same model plain",
    )
    parser.add_argument("--openvino-python", metavar="PATH", help="interpreter of OpenVINO's own environment")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each engine (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (default %(default)s)")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of loading alula's model")
    parser.add_argument("--no-alula", action="store_true", help="time the peers alone")
    parser.add_argument("--quick", action="store_true", help="one round, few tokens: a check, not a figure")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="keeps the weights (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON lines")


def lengths(text: str) -> list[int]:
    """The numbers of a comma-separated list."""
    return [int(part) for part in text.split(",")]


def default_cache() -> Path:
    """Where weights are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "alula-bench"


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """0: done and alula right; 1: alula wrong or failed; 2: arguments that cannot be, or nothing to compare with; 130:
    interrupted."""
    if args.quick:
        args.rounds, args.new_tokens = 1, min(args.new_tokens, 4)
    config, is_encoder = presets.config_of(args.preset), args.preset in presets.ENCODERS
    try:
        names = engine_names(args)
        workload = make_encoder_workload(args, config) if is_encoder else make_workload(args, config)
    except ValueError as error:
        report.note(f"alula bench model: {error}")
        return 2
    if not has_reference():
        report.note("alula bench model compares with transformers, which is missing: pip install transformers")
        return 2
    torch.set_num_threads(args.threads)
    folder = model_folder.ensure(args.cache, args.preset, "bf16" if args.dtype in QUANTIZED else args.dtype)
    recorder = report.Recorder(args.json)
    header = machine.describe(args.threads, argv)
    print(machine.one_line(header), flush=True)
    measured = limits.measure(args.threads, 0.05 if args.quick else 0.5)
    print(measured.line(), flush=True)
    sizes = f"{args.prompt_tokens} tokens"
    if not is_encoder:
        sizes = f"prompt {args.prompt_tokens}, context {', '.join(map(str, args.context))}"
    print(
        f"{args.preset}: {presets.parameters(config) / 1e6:.0f} M parameters, {args.dtype}; batch {args.batch}"
        f"{' left-padded' if args.left_pad else ''}, {sizes}",
        flush=True,
    )
    recorder.add({**header, "limits": dataclasses.asdict(measured), "preset": args.preset, "config": config})
    status = 0
    try:
        if args.memory:
            recorder.add(loading_memory(folder, args))
        groups = [names] if is_encoder else plan_groups(names, config, args.dtype, machine.available_memory())
        for members in groups:
            kind = EncoderGroup if is_encoder else Group
            group = kind(members, folder, workload, args.openvino_python, measured)
            try:
                group.check()
                group.time(args.rounds)
            finally:
                group.close()
                records = group.records()
                for record in records:
                    recorder.add(record)
                if records:
                    print(f"\n{report.table(HEADER, [row(record) for record in records])}", flush=True)
                for line in [*contexts.summary(records), *through.summary(records)]:
                    print(line, flush=True)
            if "alula" in members and "alula" not in group.right:
                status = 1
                break
    except EngineError as error:  # other engines' are caught where they are checked and timed
        report.note(f"alula bench model: {error}")
        status = 2
    except KeyboardInterrupt:
        report.note("interrupted; the results so far stand above")
        status = 130
    finally:
        recorder.close()
    return status


def has_reference() -> bool:
    """Whether transformers is there, whose outputs every engine's are compared with."""
    return importlib.util.find_spec("transformers") is not None


def engine_names(args: argparse.Namespace) -> list[str]:
    """The engines asked for, alula first. ValueError for a name that is none."""
    is_encoder = args.preset in presets.ENCODERS
    known = [name for name in (ENCODER_PEERS if is_encoder else PEERS) if name != "alula"]
    peers = args.peers or ("hf-eager" if is_encoder else "hf-sdpa")
    asked = {"all": known, "none": []}.get(peers, peers.split(","))
    if args.through:
        ours = through.engine_names(presets.config_of(args.preset), is_encoder)
        asked = [*ours[: 1 if args.peers else 2], *(asked if args.peers else [])]
    for name in asked:
        if name not in known:
            raise ValueError(f"--peers: {name!r} is none of {', '.join(known)}")
    names = [*([] if args.no_alula else ["alula"]), *dict.fromkeys(asked)]
    if not names:
        raise ValueError("nothing to time: --no-alula and no peers")
    return names


def make_workload(args: argparse.Namespace, config: presets.Config) -> Workload:
    """Prompts of random ids, the same in every run. ValueError for counts that the model has no room for."""
    args.prompt_tokens = 128 if args.prompt_tokens is None else args.prompt_tokens
    args.context = [args.prompt_tokens] if args.context is None else list(dict.fromkeys(args.context))
    _check_counts(args, "prompt_tokens", "context", "batch", "new_tokens", "rounds", "threads")
    draw = random.Random(7)

    def prompts(longest: int) -> list[list[int]]:
        shortest = max(1, longest // 2)
        others = range(args.batch - 1)
        lengths = [longest, *(draw.randint(shortest, longest) if args.left_pad else longest for _ in others)]
        return [[draw.randrange(config["vocab_size"]) for _ in range(length)] for length in lengths]

    workload = Workload(
        preset=args.preset,
        config=config,
        dtype=args.dtype,
        threads=args.threads,
        prompts=prompts(args.prompt_tokens),
        contexts=[prompts(longest) for longest in args.context],
        left_pad=args.left_pad,
        new_tokens=args.new_tokens,
    )
    if workload.max_tokens > config["n_positions"]:
        raise ValueError(
            f"{workload.max_tokens} tokens (prompt or context, --new-tokens {args.new_tokens} and 4 more) exceed the "
            f"{config['n_positions']} positions of {args.preset}"
        )
    return workload


def make_encoder_workload(args: argparse.Namespace, config: presets.Config) -> Workload:
    """Rows of random ids, the same in every run, by default as long as the model takes. ValueError for others."""
    limit = config["max_position_embeddings"]
    args.prompt_tokens = limit if args.prompt_tokens is None else args.prompt_tokens
    _check_counts(args, "prompt_tokens", "batch", "rounds", "threads")
    for name in ("context", "left_pad", "memory"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is for decoders, and {args.preset} is an encoder")
    if args.prompt_tokens > limit:
        raise ValueError(f"--prompt-tokens {args.prompt_tokens} exceeds the {limit} positions of {args.preset}")
    draw = random.Random(7)
    rows = [[draw.randrange(config["vocab_size"]) for _ in range(args.prompt_tokens)] for _ in range(args.batch)]
    return Workload(
        preset=args.preset,
        config=config,
        dtype=args.dtype,
        threads=args.threads,
        prompts=rows,
        contexts=[rows],
        left_pad=False,
        new_tokens=0,
    )


def _check_counts(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        least = min(value) if isinstance(value, list) else value
        if least < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {least}")


def loading_memory(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Load alula's model in a fresh process and report its peak of resident memory above one that imported torch."""
    with Engine("alula", folder, threads=args.threads, label="alula-memory") as engine:
        facts = engine.load(folder=folder, work=folder, dtype=args.dtype, threads=args.threads, max_tokens=8, batch=1)
    size = model_folder.checkpoint_bytes(folder)
    above = facts["peak_bytes"] - facts["baseline_bytes"]
    print(
        f"loading: {facts['load_s']:.1f} s, peak {above / 1e6:.0f} MB above an interpreter with torch imported, "
        f"{above / size:.2f} x the checkpoint's {size / 1e6:.0f} MB",
        flush=True,
    )
    return {
        "kind": "memory",
        "preset": args.preset,
        "dtype": args.dtype,
        "load_s": facts["load_s"],
        "checkpoint_bytes": size,
        "baseline_bytes": facts["baseline_bytes"],
        "peak_bytes": facts["peak_bytes"],
        "ratio": above / size,
    }


def row(record: dict) -> tuple[str, ...]:
    """A record as a row of the table."""
    start = (report.phase(record), record["engine"], record["weights"])
    if "median_s" not in record:
        state = "WRONG" if not record["correct"] else "not timed"
        return (*start, state, "", "", "", "", f"{record['max_error']:.2g}")
    half = (record["q75_s"] - record["q25_s"]) / 2 / record["median_s"]
    return (
        *start,
        report.seconds(record["median_s"]),
        f"{100 * half:.1f} %",
        report.rate(record["rate"], record["unit"]),
        report.share(record["limit_share"]),
        report.times(record["alula_ratio"]),
        f"{record['max_error']:.2g}",
    )
