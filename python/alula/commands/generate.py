"""Continue a text. It is printed as it is made, after the prompt; then one line about speed on standard error.

--temperature, --top-k, --top-p and --min-p turn sampling on (a temperature of 0 turns it off); without them the model's
generation_config.json decides.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from alula.commands import CommandError
from alula.commands.loading import add_quantization_arguments, quantization_options
from alula.commands.output import Clock, Printer, Speed, report_of

__all__ = ["DTYPES", "add_arguments", "decode_input", "model_folder", "run"]

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
    add_quantization_arguments(parser)
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
    GenerationConfig().updated(**options)  # complains before anything is loaded
    if args.seed is not None and args.seed < 0:
        raise CommandError(f"--seed must be at least 0, but is {args.seed}")
    if any(name in options for name in _SAMPLING):
        options["do_sample"] = options.get("temperature") != 0
    prompts = _read_batch(args) if args.batch_file is not None else [_read_prompt(args)]
    folder = model_folder(args.model)

    from alula.config import AutoConfig
    from alula.generation import Generation
    from alula.models.auto import AutoModelForCausalLM
    from alula.tokenization import AutoTokenizer

    _check_isa()
    AutoConfig.from_pretrained(folder)  # a folder that is no model is named as such, before its tokenizer is
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [_encode(tokenizer, prompt, i) for i, prompt in enumerate(prompts)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[args.dtype], **quantization_options(args))
    config = getattr(model, "generation_config", None)
    if config is None:
        config = model.generation_config = GenerationConfig.from_pretrained(folder, model.config)
    if config.max_new_tokens is None and config.max_length is None:
        config.max_new_tokens = DEFAULT_NEW_TOKENS
    generation = Generation(
        model, ids, tokenizer=tokenizer, with_text=True, seed=_seed(args, config, options), **options
    )
    printer = Printer(prompts, is_quiet=args.json)
    is_interrupted = False
    clock = Clock()
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
        speed = Speed.measure(model, generation, clock)
    if args.json:
        for row in range(len(prompts)):
            print(json.dumps(report_of(generation, row, prompts[row], printer.texts[row], speed), ensure_ascii=False))
    elif speed is not None:
        _say(speed.line(generation))
    sys.stdout.flush()
    return 130 if is_interrupted else 0


def _check_isa() -> None:
    """RuntimeError for an instruction set that this CPU lacks, before the prompt is printed. torch is imported."""
    from alula import _C

    _C.isa()


# --- what goes in ----------------------------------------------------------------------------------------------------


def _read_prompt(args: argparse.Namespace) -> str:
    prompt = args.prompt
    if prompt is None or prompt == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise CommandError(
                'there is no prompt; give one, as in alula generate "def fibonacci(n):", or send it to standard input'
            )
        prompt = decode_input(sys.stdin.buffer.read(), "standard input")
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
    lines = [(number, line) for number, line in enumerate(decode_input(data, name).split("\n"), 1) if line.strip()]
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


def decode_input(data: bytes, name: str) -> str:
    """UTF-8 text; CommandError naming the byte that is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{name} is not UTF-8 text: byte {data[error.start]:#04x} at {error.start}") from None


def _encode(tokenizer: Any, prompt: str, index: int) -> list[int]:
    ids = tokenizer.encode(prompt, verbose=False)
    if not ids:
        raise CommandError(f"prompt {index + 1} becomes no token with this model's tokenizer")
    return ids


def model_folder(path: str | None, argument: str = "--model") -> Path:
    """The folder that `argument` gives, or of the model inside alula; CommandError where there is none."""
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
        raise CommandError(f"{argument} {path} is a file; give the folder that holds config.json and the weights")
    hint = ""
    if path.count("/") == 1 and not path.startswith((".", "/")):
        hint = f"; alula downloads nothing: `hf download {path} --local-dir FOLDER` fetches a model from the Hub"
    raise CommandError(
        f"{argument} {path} does not exist; give a folder with config.json, weights and tokenizer.json{hint}"
    )


def _seed(args: argparse.Namespace, config: Any, options: dict[str, Any]) -> int | None:
    if not options.get("do_sample", config.do_sample):
        return None
    return int(time.time_ns() % 2**32) if args.seed is None else args.seed


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
