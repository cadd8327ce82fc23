"""Continue a text. It is printed as it is made, after the prompt; then one line about speed on standard error."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alula.commands import CommandError

__all__ = ["add_arguments", "run"]

DEFAULT_NEW_TOKENS = 128
DTYPES = {"auto": "auto"} | {
    alias: name
    for name, aliases in {"float32": ("fp32",), "bfloat16": ("bf16",), "float16": ("fp16",)}.items()
    for alias in (name, *aliases)
}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alula generate`."""
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="text to continue; without it, or as -, standard input is read")
    add("--model", metavar="PATH", help="folder in Hugging Face format (default: the small model inside alula)")
    add("--dtype", choices=DTYPES, default="auto", metavar="DTYPE", help="auto (as stored), float32, bfloat16, float16")
    add("--max-new-tokens", type=int, metavar="N", help="at most this many (default: the model's, else 128)")
    add("--temperature", type=float, metavar="T", help="sample at this temperature; 0 takes the most likely token")
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens; 0 is off")
    add("--top-p", type=float, metavar="P", help="sample from the most likely tokens that hold this probability")
    add("--min-p", type=float, metavar="P", help="leave out tokens less likely than P times the most likely one")
    add("--repetition-penalty", type=float, metavar="R", help="above 1: tokens that occurred become less likely")
    add("--seed", type=int, metavar="N", help="makes sampling repeatable; row b of a batch uses N + b")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated ($'\\n' is a line end)")
    add("--batch-file", metavar="FILE", help='a prompt per line, or JSON lines with "prompt"; run as one batch')
    add("--json", action="store_true", help="print one JSON object per prompt, and nothing else, when done")


def run(args: argparse.Namespace) -> int:
    """Generate as asked; returns the exit code."""
    from alula.generation_config import GenerationConfig

    options = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "stop_strings": args.stop,
    }
    options = {name: value for name, value in options.items() if value is not None}
    GenerationConfig().update(**options)  # complains before anything is loaded
    if args.seed is not None and args.seed < 0:
        raise CommandError(f"--seed must be at least 0, but is {args.seed}")
    if any(name in options for name in _SAMPLING):
        options["do_sample"] = options.get("temperature") != 0
    prompts = _read_batch(args) if args.batch_file is not None else [_read_prompt(args)]
    folder = _model_folder(args.model)

    from alula import tokenizer as tokenizers
    from alula.generation import Generation
    from alula.models.auto import AutoModelForCausalLM

    tokenizer = tokenizers.load(folder)
    ids = [_encode(tokenizer, prompt, i) for i, prompt in enumerate(prompts)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[args.dtype])
    config = getattr(model, "generation_config", None)
    if config is None:
        config = model.generation_config = GenerationConfig.from_pretrained(folder, model.config)
    if config.max_new_tokens is None and config.max_length is None:
        config.max_new_tokens = DEFAULT_NEW_TOKENS
    generation = Generation(
        model, ids, tokenizer=tokenizer, with_text=True, seed=_seed(args, config, options), **options
    )
    printer = _Printer(prompts, is_quiet=args.json)
    is_interrupted = False
    clock = _Clock()
    try:
        printer.begin()
        for _ in clock.time(generation):
            printer.add(generation.texts, [bool(reason) for reason in generation.finish_reasons])
    except KeyboardInterrupt:
        is_interrupted = True
        printer.add(generation.flush(), [True] * len(prompts))
    printer.end()
    if is_interrupted:
        speed = None
        _say(f"alula: stopped by Ctrl-C after {sum(generation.num_new_tokens)} new tokens")
    else:
        speed = _Speed.measure(model, generation, clock)
    if args.json:
        for row in range(len(prompts)):
            print(json.dumps(_report(generation, row, prompts[row], printer.texts[row], speed), ensure_ascii=False))
    elif speed is not None:
        _say(speed.line(generation))
    sys.stdout.flush()
    return 130 if is_interrupted else 0


# --- what goes in ----------------------------------------------------------------------------------------------------


def _read_prompt(args: argparse.Namespace) -> str:
    prompt = args.prompt
    if prompt is None or prompt == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise CommandError(
                'there is no prompt; give one, as in alula generate "def fibonacci(n):", or send it to standard input'
            )
        prompt = _decode(sys.stdin.buffer.read(), "standard input")
    if not prompt:
        raise CommandError("the prompt is empty; give at least one character to continue")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise CommandError("the prompt is not valid UTF-8") from None
    return prompt


def _read_batch(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        raise CommandError("give a PROMPT or --batch-file, not both")
    name = args.batch_file
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise CommandError(f"--batch-file {name} cannot be read: {error.strerror}") from error
    lines = [(number, line) for number, line in enumerate(_decode(data, name).split("\n"), 1) if line.strip()]
    if not lines:
        raise CommandError(f"--batch-file {name} holds no prompt; write one per line")
    if _prompt_of(lines[0][1]) is None:
        return [line.removesuffix("\r") for _, line in lines]
    prompts = []
    for number, line in lines:
        prompt = _prompt_of(line)
        if prompt is None:
            raise CommandError(f'{name}, line {number}: expected a JSON object with "prompt", as in line {lines[0][0]}')
        if not prompt:
            raise CommandError(f"{name}, line {number}: the prompt is empty")
        prompts.append(prompt)
    return prompts


def _prompt_of(line: str) -> str | None:
    """The "prompt" of a line that is a JSON object with one, else None."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    return prompt if isinstance(prompt, str) else None


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{name} is not UTF-8 text: byte {data[error.start]:#04x} at {error.start}") from None


def _encode(tokenizer: Any, prompt: str, index: int) -> list[int]:
    ids = tokenizer.encode(prompt)
    if not ids:
        raise CommandError(f"prompt {index + 1} becomes no token with this model's tokenizer")
    return ids


def _model_folder(path: str | None) -> Path:
    if path is None:
        from importlib.resources import files

        folder = Path(str(files("alula"))) / "assets" / "tiny-python"
        if not folder.is_dir():
            raise CommandError("this build of alula holds no model; give one with --model PATH")
        return folder
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CommandError(f"--model {path} is a file; give the folder that holds config.json and the weights")
    hint = ""
    if path.count("/") == 1 and not path.startswith((".", "/")):
        hint = f"; alula downloads nothing: `hf download {path} --local-dir FOLDER` fetches a model from the Hub"
    raise CommandError(
        f"--model {path} does not exist; give a folder with config.json, weights and tokenizer.json{hint}"
    )


def _seed(args: argparse.Namespace, config: Any, options: dict[str, Any]) -> int | None:
    if not options.get("do_sample", config.do_sample):
        return None
    return int(time.time_ns() % 2**32) if args.seed is None else args.seed


# --- what comes out --------------------------------------------------------------------------------------------------


class _Printer:
    """Prints the rows of a batch in order: the first that runs as it is made, the others when it is their turn."""

    def __init__(self, prompts: list[str], is_quiet: bool) -> None:
        self.texts = [""] * len(prompts)
        self._prompts = prompts
        self._is_quiet = is_quiet
        self._is_done = [False] * len(prompts)
        self._row = 0
        self._num_printed = 0
        self._last = ""

    def begin(self) -> None:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        self._head()

    def add(self, pieces: list[str], is_done: list[bool]) -> None:
        for row, piece in enumerate(pieces):
            self.texts[row] += piece
            self._is_done[row] = self._is_done[row] or is_done[row]
        self._show()
        while self._is_done[self._row] and self._row + 1 < len(self.texts):
            self._close()
            self._row += 1
            self._num_printed = 0
            self._head()
            self._show()

    def end(self) -> None:
        self._close()

    def _head(self) -> None:
        if len(self.texts) > 1:
            self._write(f"[{self._row + 1}/{len(self.texts)}]\n")
        self._write(self._prompts[self._row])

    def _show(self) -> None:
        piece = self.texts[self._row][self._num_printed :]
        self._num_printed += len(piece)
        self._write(piece)

    def _close(self) -> None:
        if not self._last.endswith("\n"):
            self._write("\n")

    def _write(self, text: str) -> None:
        if text:
            self._last = text[-1]
        if text and not self._is_quiet:
            sys.stdout.write(text)
            sys.stdout.flush()


class _Clock:
    """Times the steps of a generation: the first reads the prompt, the others decode."""

    def __init__(self) -> None:
        self.prompt_seconds = 0.0
        self.decode_seconds = 0.0
        self.decode_steps = 0

    def time(self, steps: Any) -> Any:
        while True:
            start = time.perf_counter()
            try:
                step = next(steps)
            except StopIteration:
                return
            seconds = time.perf_counter() - start
            if self.prompt_seconds == 0.0:
                self.prompt_seconds = seconds
            else:
                self.decode_seconds += seconds
                self.decode_steps += 1
            yield step


@dataclass(frozen=True)
class _Speed:
    prompt_seconds: float
    tokens_per_second: float
    weight_bytes: int
    weight_bytes_per_second: float | None
    read_bandwidth: float
    is_in_cache: bool
    cache_bytes: int

    @classmethod
    def measure(cls, model: Any, generation: Any, clock: _Clock) -> _Speed:
        from alula.limits import last_level_cache_bytes, read_bandwidth

        num_new = sum(generation.num_new_tokens)
        num_decoded = num_new - len(generation.num_new_tokens)
        weight_bytes = model.decode_bytes()
        cache_bytes = last_level_cache_bytes()
        return cls(
            prompt_seconds=clock.prompt_seconds,
            tokens_per_second=(
                num_decoded / clock.decode_seconds if clock.decode_steps else num_new / clock.prompt_seconds
            ),
            weight_bytes=weight_bytes,
            weight_bytes_per_second=(
                weight_bytes * clock.decode_steps / clock.decode_seconds if clock.decode_steps else None
            ),
            read_bandwidth=read_bandwidth(),
            is_in_cache=weight_bytes <= cache_bytes,
            cache_bytes=cache_bytes,
        )

    @property
    def share(self) -> float | None:
        return None if self.weight_bytes_per_second is None else self.weight_bytes_per_second / self.read_bandwidth

    def line(self, generation: Any) -> str:
        parts = [
            f"{sum(generation.prompt_lengths)} prompt tokens ({1e3 * self.prompt_seconds:.1f} ms)",
            f"{sum(generation.num_new_tokens)} new tokens",
            f"{self.tokens_per_second:.1f} tokens/s",
        ]
        if self.weight_bytes_per_second is not None:
            parts.append(f"{self.weight_bytes_per_second / 1e9:.2f} GB/s of weights read")
            limit = (
                f"{100 * self.share:.0f} % of the {self.read_bandwidth / 1e9:.1f} GB/s this machine reads from memory"
            )
            if self.is_in_cache:
                limit += f" (in cache: {self.weight_bytes / 1e6:.1f} MB of weights in {self.cache_bytes / 1e6:.0f} MB)"
            parts.append(limit)
        if generation.seeds[0] is not None:
            parts.append(f"seed {generation.seeds[0]}")
        return "alula: " + ", ".join(parts)


def _report(generation: Any, row: int, prompt: str, text: str, speed: _Speed | None) -> dict[str, Any]:
    report = {
        "prompt": prompt,
        "text": text,
        "prompt_tokens": generation.prompt_lengths[row],
        "new_tokens": generation.num_new_tokens[row],
        "finish_reason": generation.finish_reasons[row] or "interrupted",
        "stop": generation.stopped_by(row),
        "seed": generation.seeds[row],
    }
    if speed is not None:
        report |= {
            "tokens_per_second": round(speed.tokens_per_second, 2),
            "prompt_seconds": round(speed.prompt_seconds, 6),
            "weight_bytes_per_token": speed.weight_bytes,
            "weights_gb_per_second": None if speed.share is None else round(speed.weight_bytes_per_second / 1e9, 3),
            "read_bandwidth_gb_per_second": round(speed.read_bandwidth / 1e9, 3),
            "share_of_read_bandwidth": None if speed.share is None else round(speed.share, 4),
            "weights_fit_in_cache": speed.is_in_cache,
        }
    return report


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
