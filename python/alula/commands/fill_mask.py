"""Say what may stand in place of [MASK]: the likeliest tokens of each mask in a text, with their probabilities.

The text may be read from standard input. It needs a masked language model (BigBird) with its tokenizer.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, NamedTuple

from alula.commands import CommandError
from alula.commands.generate import DTYPES, decode_input, model_folder

__all__ = ["add_arguments", "run"]


class Candidate(NamedTuple):
    """A token for a mask, and the text with it in place of that mask."""

    probability: float
    token: int
    piece: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alula fill-mask`."""
    add = parser.add_argument
    add("text", nargs="?", metavar="TEXT", help="a text with [MASK] in it; without it, or as -, standard input is read")
    add("--model", metavar="PATH", required=True, help="folder of a masked language model in Hugging Face format")
    add("--top-k", type=int, default=5, metavar="K", help="tokens shown for each mask (default %(default)s)")
    add("--dtype", choices=DTYPES, default="auto", metavar="DTYPE", help="auto (as stored), float32, bfloat16, float16")
    add("--json", action="store_true", help="print one JSON object, and nothing else")


def run(args: argparse.Namespace) -> int:
    """Fill the masks as asked; returns the exit code."""
    if args.top_k < 1:
        raise CommandError(f"--top-k must be at least 1, but is {args.top_k}")
    text = _read_text(args.text)
    folder = model_folder(args.model)

    from alula.config import AutoConfig
    from alula.models.auto import AutoModelForMaskedLM
    from alula.tokenization import AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in AutoModelForMaskedLM.classes:
        kinds = ", ".join(AutoModelForMaskedLM.classes)
        raise CommandError(
            f"--model {args.model} is a {config.model_type} model, which fills no masks; accepted: {kinds}"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, masks = _find_masks(tokenizer, text, config.max_position_embeddings)
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=DTYPES[args.dtype])
    found = _fill(model, tokenizer, ids, masks, args.top_k)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    print(_as_json(text, masks, found) if args.json else _as_tables(found))
    return 0


def _read_text(text: str | None) -> str:
    if text is None or text == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise CommandError(
                'there is no text; give one, as in alula fill-mask "Plants [MASK].", or send it to standard input'
            )
        text = decode_input(sys.stdin.buffer.read(), "standard input").rstrip("\r\n")
    if not text.strip():
        raise CommandError("the text is empty; write one with [MASK] in it")
    return text


def _find_masks(tokenizer: Any, text: str, limit: int) -> tuple[list[int], list[int]]:
    """The ids of the text, and where the masks are among them."""
    mask = tokenizer.mask_token_id
    if mask is None:
        raise CommandError("this model's tokenizer has no mask token")
    ids = tokenizer.encode(text, verbose=False)
    masks = [i for i, index in enumerate(ids) if index == mask]
    if not masks:
        raise CommandError(f"the text holds no {tokenizer.mask_token}; write it where a word is missing")
    if len(ids) > limit:
        raise CommandError(
            f"the text is {len(ids)} tokens long, more than the {limit} that this model takes; shorten it"
        )
    return ids, masks


def _fill(model: Any, tokenizer: Any, ids: list[int], masks: list[int], count: int) -> list[list[Candidate]]:
    """The likeliest tokens of each mask, best first."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([ids]), logits_to_keep=torch.tensor(masks)).logits[0]
    probabilities = logits.float().softmax(-1)
    best = probabilities.topk(min(count, probabilities.shape[1]))
    found = []
    for at, values, tokens in zip(masks, best.values.tolist(), best.indices.tolist(), strict=True):
        rows = []
        for value, token in zip(values, tokens, strict=True):
            filled = tokenizer.decode([*ids[:at], token, *ids[at + 1 :]], skip_special_tokens=True)
            piece = tokenizer.convert_ids_to_tokens(token)
            rows.append(Candidate(value, token, piece or f"<id {token}>", filled))
        found.append(rows)
    return found


def _as_tables(found: list[list[Candidate]]) -> str:
    """A table for each mask, under its number where there are several."""
    blocks = []
    width = max(len(row.piece) for rows in found for row in rows)
    for number, rows in enumerate(found, 1):
        lines = [f"mask {number}"] if len(found) > 1 else []
        lines.append(f"probability  {'token':<{width}}  id")
        lines += [f"{row.probability:>11.4f}  {row.piece:<{width}}  {row.token}" for row in rows]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _as_json(text: str, masks: list[int], found: list[list[Candidate]]) -> str:
    """Positions count tokens of the text, special ones included; `sequence` has the other masks left out."""
    report = [
        {
            "position": at,
            "candidates": [
                {"token": row.token, "token_str": row.piece, "probability": row.probability, "sequence": row.text}
                for row in rows
            ],
        }
        for at, rows in zip(masks, found, strict=True)
    ]
    return json.dumps({"text": text, "masks": report}, ensure_ascii=False)
