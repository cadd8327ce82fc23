#!/usr/bin/env python3
"""Train tiny-python, the small code model that ships with alula, from scratch on a CPU.

The model is a GPTBigCode transformer with multi-query attention (the StarCoder architecture), small enough for a
Python wheel.  It learns from the source of the standard library of the interpreter that runs this script, half of it
rearranged for fill-in-the-middle, and is written as a Hugging Face folder: `config.json`, `model.safetensors` (bf16),
`tokenizer.json` and the rest.

    python examples/train_tiny_python.py --minutes 55 --out tiny-python

The learning rate follows the wall clock, not a step count: the run ends when its minutes are over, however fast the
machine is.  Every few minutes, and on Ctrl-C, the state is saved to `OUT/../tiny-python.ckpt` (see `--checkpoint`)
together with a usable model folder; `--resume` carries on from there with the minutes that were left.

Needs only torch, numpy, safetensors and tokenizers (tqdm is used where there is one).  `--check` compares the logits
of an exported folder with those of transformers' GPTBigCodeForCausalLM, and needs transformers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

SPECIAL_TOKENS = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"]
END, FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX, FIM_PAD = range(len(SPECIAL_TOKENS))

# Tests are another dialect, tables are not prose, and lib2to3 and site-packages are not the library proper.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "lib2to3", "pydoc_data", "__pycache__", "turtledemo"}
HELD_OUT_PER_MILLE = 25


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def read_stdlib() -> tuple[dict[str, str], dict[str, str]]:
    """Return the training and the held-out files of the standard library, as {relative name: text}."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        is_table = name.parts[0] == "encodings" and path.stat().st_size > 8_000
        if LEFT_OUT.intersection(name.parts) or is_table or name.parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            digest = hashlib.sha256(name.as_posix().encode()).digest()
            is_held_out = int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_MILLE
            (held_out if is_held_out else train)[name.as_posix()] = text
    return train, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE.  GPT-2's splitting keeps a line break and the indentation after it in one piece."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Corpus:
    """An endless stream of training rows: all files, newly shuffled, cut and rearranged in every epoch."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer, row: int, fim_rate: float, seed: int) -> None:
        self.texts = texts
        self.tokenizer = tokenizer
        self.row = row
        self.fim_rate = fim_rate
        self.rng = np.random.default_rng(seed)
        self.epoch = 0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            stream = np.concatenate([self._document(self.texts[i]) for i in self.rng.permutation(len(self.texts))])
            stream = stream[self.rng.integers(self.row) :]
            rows = stream[: len(stream) // self.row * self.row].reshape(-1, self.row)
            for i in self.rng.permutation(len(rows)):
                yield torch.from_numpy(rows[i])
            self.epoch += 1

    def batches(self, rows: int) -> Iterator[Tensor]:
        stream = iter(self)
        while True:
            yield torch.stack([next(stream) for _ in range(rows)])

    def _document(self, text: str) -> np.ndarray:
        """Encode one file, left to right or, with probability `fim_rate`, as fill-in-the-middle exercises."""
        ids: list[int] = []
        if self.rng.random() >= self.fim_rate:
            # Pieces are encoded apart, so that a prompt that stops inside a word or an indentation looks familiar.
            for piece in self.tokenizer.encode_batch_fast(self._cut(text, 100, 1500), add_special_tokens=False):
                ids += piece.ids
            ids.append(END)
        else:
            pieces = []
            for chunk in self._cut(text, 150, 1500):
                a, b = sorted(self.rng.integers(len(chunk) + 1, size=2))
                pieces += [chunk[:a], chunk[b:], chunk[a:b]]
            encoded = [e.ids for e in self.tokenizer.encode_batch_fast(pieces, add_special_tokens=False)]
            for prefix, suffix, middle in zip(encoded[::3], encoded[1::3], encoded[2::3], strict=True):
                ids += [FIM_PREFIX, *prefix, FIM_SUFFIX, *suffix, FIM_MIDDLE, *middle, END]
        return np.array(ids, dtype=np.int64)

    def _cut(self, text: str, shortest: int, longest: int) -> list[str]:
        pieces, start = [], 0
        while start < len(text):
            end = start + int(self.rng.integers(shortest, longest))
            pieces.append(text[start:end])
            start = end
        return pieces


# ---------------------------------------------------------------------------------------------------------------------
# Model: GPTBigCode, with the parameter names of Hugging Face
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    vocab: int
    positions: int
    width: int
    layers: int
    heads: int
    inner: int


class Attention(nn.Module):
    """Causal multi-query attention: every head has its own queries, all share one key and one value."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.width, self.heads, self.head_dim = s.width, s.heads, s.width // s.heads
        self.c_attn = nn.Linear(s.width, s.width + 2 * self.head_dim)
        self.c_proj = nn.Linear(s.width, s.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.c_attn(x).split((self.width, self.head_dim, self.head_dim), dim=-1)
        q = q.view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k, v = (t.unsqueeze(1).expand(-1, self.heads, -1, -1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(batch, length, self.width))


class MLP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.c_fc = nn.Linear(s.width, s.inner)
        self.c_proj = nn.Linear(s.inner, s.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(s.width)
        self.attn = Attention(s)
        self.ln_2 = nn.LayerNorm(s.width)
        self.mlp = MLP(s)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPTBigCode(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(s.vocab, s.width),
                "wpe": nn.Embedding(s.positions, s.width),
                "h": nn.ModuleList(Block(s) for _ in range(s.layers)),
                "ln_f": nn.LayerNorm(s.width),
            }
        )
        for name, p in self.named_parameters():
            if p.ndim == 2:
                into_residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * s.layers) if into_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids: Tensor) -> Tensor:
        t = self.transformer
        x = t["wte"](ids) + t["wpe"].weight[: ids.shape[1]]
        for block in t["h"]:
            x = block(x)
        return F.linear(t["ln_f"](x), t["wte"].weight)


# ---------------------------------------------------------------------------------------------------------------------
# Probe
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bits_per_byte(model: GPTBigCode, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Held-out loss, plain left to right: windows of `positions` tokens, each moving on by half a window.

    Every file starts after <|endoftext|>; every token is scored once, and after the first window with at least half a
    window of context before it.
    """
    size = model.shape.positions
    nats, n_bytes = 0.0, 0
    for text in texts:
        ids = torch.tensor([END, *tokenizer.encode(text, add_special_tokens=False).ids])
        n_bytes += len(text.encode())
        scored = 1
        while scored < len(ids):
            start = 0 if scored == 1 else scored - size // 2
            window = ids[start : start + size + 1]
            logits = model(window[None, :-1])[0].float()
            losses = F.cross_entropy(logits, window[1:], reduction="none")
            nats += losses[scored - 1 - start :].double().sum().item()
            scored = start + len(window)
    return nats / math.log(2) / n_bytes


def main() -> None:
    a = argparse.ArgumentParser()
    a.add_argument("--minutes", type=float, default=1)
    a.add_argument("--vocab", type=int, default=2048)
    a.add_argument("--width", type=int, default=192)
    a.add_argument("--layers", type=int, default=6)
    a.add_argument("--heads", type=int, default=6)
    a.add_argument("--seq", type=int, default=512)
    a.add_argument("--batch", type=int, default=16)
    a.add_argument("--lr", type=float, default=3e-3)
    a.add_argument("--mlr", type=float, default=0.02)
    a.add_argument("--muon", action="store_true")
    a.add_argument("--bf16", action="store_true")
    a.add_argument("--compile", action="store_true")
    a.add_argument("--steps", type=int, default=10**9)
    o = a.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    train, held = read_stdlib()
    print(len(train), sum(map(len, train.values())), len(held), sum(map(len, held.values())))
    tok = train_tokenizer(list(train.values()), o.vocab)
    c = Corpus(list(train.values()), tok, o.seq + 1, 0.5, 0)
    t = time.time()
    s = Shape(o.vocab, o.seq, o.width, o.layers, o.heads, 4 * o.width)
    m = GPTBigCode(s)
    print(o, "params", sum(p.numel() for p in m.parameters()))
    batches = c.batches(o.batch)
    next(batches)
    print("tokenize", time.time() - t)
    hidden = [p for n, p in m.named_parameters() if p.ndim == 2 and ".h." in n] if o.muon else []
    hid = {id(p) for p in hidden}
    opts = [torch.optim.AdamW([p for p in m.parameters() if id(p) not in hid], lr=o.lr, betas=(0.9, 0.95),
                              weight_decay=0.1, fused=True)]
    if hidden:
        opts.append(torch.optim.Muon(hidden, lr=o.mlr, weight_decay=0.1, momentum=0.95))
    base = [o.lr, o.mlr]
    f = torch.compile(m) if o.compile else m

    def step(b: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=o.bf16):
            logits = f(b[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), b[:, 1:].flatten())

    step(next(batches)).backward()
    for x in opts:
        x.zero_grad()
    t0 = time.time()
    n = 0
    tt = t0
    while (p := (time.time() - t0) / 60 / o.minutes) < 1 and n < o.steps:
        lr = min(1, p / 0.03 + 0.01) * (1 - p)
        for x, bl in zip(opts, base):
            for g in x.param_groups:
                g["lr"] = bl * lr
        loss = step(next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        for x in opts:
            x.step()
            x.zero_grad()
        n += 1
        if n % 20 == 0:
            print(n, round(loss.item(), 3), f"{20 * o.batch * o.seq / (time.time() - tt):.0f} tok/s", flush=True)
            tt = time.time()
    print("final", n, n * o.batch * o.seq, "bpb", bits_per_byte(m, tok, list(held.values())), time.time() - t0)


main()
