#!/usr/bin/env python3
"""Train tiny-python, the small code model that ships with alula, from scratch on a CPU.

The model is a GPTBigCode transformer with multi-query attention (the architecture of StarCoder), small enough for a
Python wheel.  It learns from the source of the standard library of the interpreter that runs this script, half of the
files rearranged for fill-in-the-middle, and is written as a Hugging Face folder: `config.json`, `model.safetensors`
in bf16, `tokenizer.json` and the rest.

    python examples/train_tiny_python.py --minutes 55 --out tiny-python
    python examples/train_tiny_python.py --out tiny-python --complete 'def fibonacci(n):'

The learning rate follows the wall clock, not a step count: the run ends when its minutes are over, however fast the
machine is.  Every few minutes, and on Ctrl-C, the whole state is saved to `tiny-python.ckpt` and a usable model to the
folder; `--resume` carries on with the minutes that were left.  A seed fixes the initial weights and the order of the
data; how many steps fit into the time depends on the machine.

Needs only torch (2.9 or newer, for Muon), numpy, safetensors and tokenizers; tqdm draws the progress where there is
a terminal.  `--check` compares the logits of a finished folder with those of transformers, and needs transformers.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import os
import signal
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

SPECIAL_TOKENS = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"]
END, FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX, FIM_PAD = range(len(SPECIAL_TOKENS))

# Folders that are not the library proper: tests, demonstrations, generated tables, what others have installed.
LEFT_OUT = {"test", "tests", "idle_test", "turtledemo", "lib2to3", "pydoc_data", "site-packages", "__pycache__"}
LARGEST_ENCODING = 8_000  # bytes; the larger files in encodings/ are character tables
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
        is_table = name.parts[0] == "encodings" and path.stat().st_size > LARGEST_ENCODING
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
    """Train a byte-level BPE; GPT-2's splitting leaves a line break and the indentation after it in one piece."""
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
        """Yield rows of `row` tokens; `fim_rate` is the share of the files turned into exercises."""
        self.texts = texts
        self.tokenizer = tokenizer
        self.row = row
        self.fim_rate = fim_rate
        self.rng = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            stream = np.concatenate([self._document(self.texts[i]) for i in self.rng.permutation(len(self.texts))])
            stream = stream[self.rng.integers(self.row) :]
            rows = stream[: len(stream) // self.row * self.row].reshape(-1, self.row)
            for i in self.rng.permutation(len(rows)):
                yield torch.from_numpy(rows[i])

    def batches(self, rows: int) -> Iterator[Tensor]:
        """Yield stacks of `rows` rows."""
        stream = iter(self)
        while True:
            yield torch.stack([next(stream) for _ in range(rows)])

    def _document(self, text: str) -> np.ndarray:
        """Encode one file, left to right or, with probability `fim_rate`, as fill-in-the-middle exercises."""
        ids: list[int] = []
        if self.rng.random() >= self.fim_rate:
            # Encoded in pieces, so that a prompt that stops inside a word or an indentation looks familiar.
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
        """Cut a text into pieces of random length."""
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
    """The sizes of a model."""

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
    """The feed-forward half of a block."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.c_fc = nn.Linear(s.width, s.inner)
        self.c_proj = nn.Linear(s.inner, s.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and added to the residual stream."""

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
    """The language model: token ids in, logits out; the output matrix is the embedding matrix."""

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
# Held-out loss
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


# ---------------------------------------------------------------------------------------------------------------------
# The Hugging Face folder
# ---------------------------------------------------------------------------------------------------------------------


def export(folder: Path, shape: Shape, weights: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Write what transformers' `save_pretrained` writes for a GPTBigCodeForCausalLM with tied embeddings."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": FIM_PAD}
    config = {
        "architectures": ["GPTBigCodeForCausalLM"],
        "model_type": "gpt_bigcode",
        "multi_query": True,
        "activation_function": "gelu_pytorch_tanh",
        "n_embd": shape.width,
        "n_head": shape.heads,
        "n_inner": shape.inner,
        "n_layer": shape.layers,
        "n_positions": shape.positions,
        "vocab_size": shape.vocab,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        **ids,
    }
    generation = {**ids, "do_sample": True, "temperature": 0.4, "top_p": 0.95, "repetition_penalty": 1.1}
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<fim_pad>"}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.positions,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    special_map = {**special, "additional_special_tokens": SPECIAL_TOKENS[FIM_PREFIX : FIM_SUFFIX + 1]}
    for name, content in {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": special_map,
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    tensors = {name: w.detach().bfloat16().contiguous() for name, w in weights.items()}
    temporary = folder / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")


def load(folder: Path) -> tuple[GPTBigCode, Tokenizer]:
    """Load an exported folder, in fp32."""
    config = json.loads((folder / "config.json").read_text())
    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
    model = GPTBigCode(Shape(*(config[name] for name in names)))
    model.load_state_dict({name: w.float() for name, w in load_file(folder / "model.safetensors").items()})
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


@torch.no_grad()
def check(folder: Path) -> None:
    """Compare our fp32 logits with those of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = load(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = Path(__file__).read_text()
    ids = tokenizer.encode(text).ids[: model.shape.positions]
    assert ids == AutoTokenizer.from_pretrained(folder)(text)["input_ids"][: len(ids)], "the token ids differ"
    batch = torch.tensor([ids])
    difference = (model(batch) - reference(batch).logits).abs().max().item()
    print(f"largest difference from transformers: {difference:.1e}")
    assert difference < 1e-4, "the logits differ"


@torch.no_grad()
def complete(folder: Path, prompt: str, n_tokens: int, seed: int) -> str:
    """Sample a completion with the settings of `generation_config.json`."""
    model, tokenizer = load(folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt).ids
    n_prompt = len(ids)
    while len(ids) < n_prompt + n_tokens:
        logits = model(torch.tensor([ids[-model.shape.positions :]]))[0, -1]
        seen = torch.tensor(sorted(set(ids)))
        penalty = settings["repetition_penalty"]
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        probabilities, order = (logits / settings["temperature"]).softmax(-1).sort(descending=True)
        probabilities[probabilities.cumsum(-1) - probabilities >= settings["top_p"]] = 0.0
        chosen = int(order[torch.multinomial(probabilities, 1, generator=generator)])
        if chosen == END:
            break
        ids.append(chosen)
    return tokenizer.decode(ids[n_prompt:])


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def keep_heap() -> None:
    """Stop glibc from handing every large activation back to the kernel: the page faults cost too much time."""
    if sys.platform == "linux":
        mmap_max, trim_threshold, top_pad = -4, -1, -2
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 256 << 20)):
                libc.mallopt(parameter, value)


class Trainer:
    """Mixed precision by hand: forward and backward run in bf16, the optimizers on fp32 master weights.

    The matrices inside the blocks are trained by Muon, everything else by AdamW.  A moving average of the master
    weights is what gets exported.
    """

    def __init__(self, shape: Shape, options: argparse.Namespace) -> None:
        self.options = options
        self.model = GPTBigCode(shape)
        self.master = {name: nn.Parameter(p.detach().clone()) for name, p in self.model.named_parameters()}
        self.average = {name: p.detach().clone() for name, p in self.master.items()}
        self.model.bfloat16()
        matrices = [p for name, p in self.master.items() if p.ndim == 2 and ".h." in name]
        embeddings = [p for name, p in self.master.items() if p.ndim == 2 and ".h." not in name]
        vectors = [p for p in self.master.values() if p.ndim == 1]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=options.muon_lr, weight_decay=0.1),
            torch.optim.AdamW(
                [{"params": embeddings, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
                lr=options.adam_lr,
                betas=(0.9, 0.95),
                fused=True,
            ),
        ]
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.steps = 0
        self.seconds = 0.0

    def step(self, batch: Tensor, lr_scale: float) -> float:
        """Learn from one batch and return its loss."""
        logits = self.model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        parameters = dict(self.model.named_parameters())
        for name, p in self.master.items():
            p.grad = parameters[name].grad.float()
        nn.utils.clip_grad_norm_(self.master.values(), 1.0)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * lr_scale
            optimizer.step()
        self.steps += 1
        decay = min(self.options.ema, (self.steps + 1) / (self.steps + 10))
        with torch.no_grad():
            for name, p in self.master.items():
                self.average[name].lerp_(p, 1 - decay)
                parameters[name].copy_(p)
                parameters[name].grad = None
        return loss.item()

    def save(self, path: Path, tokenizer: Tokenizer) -> None:
        """Write everything that `restore` needs."""
        temporary = path.with_suffix(".tmp")
        torch.save(
            {
                "shape": asdict(self.model.shape),
                "tokenizer": tokenizer.to_str(),
                "master": {name: p.detach() for name, p in self.master.items()},
                "average": self.average,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "steps": self.steps,
                "seconds": self.seconds,
            },
            temporary,
        )
        temporary.replace(path)

    def restore(self, state: dict[str, Any]) -> None:
        """Carry on from a saved state."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                self.master[name].copy_(state["master"][name])
                self.average[name].copy_(state["average"][name])
                p.copy_(state["master"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps, self.seconds = state["steps"], state["seconds"]


class Interrupt:
    """Turn the first Ctrl-C into a flag, so that a step is never cut short; a second one interrupts as usual."""

    def __init__(self) -> None:
        self.seen = False
        signal.signal(signal.SIGINT, self)

    def __call__(self, *_: object) -> None:
        self.seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def train(options: argparse.Namespace) -> None:
    """Train until the minutes are over, export, and measure the held-out loss."""
    keep_heap()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    checkpoint: Path = options.checkpoint or options.out.with_name(options.out.name + ".ckpt")
    train_files, held_out_files = read_stdlib()
    texts, held_out = list(train_files.values()), list(held_out_files.values())
    log(f"{len(texts)} files, {sum(len(t.encode()) for t in texts)} bytes to learn from")
    log(f"{len(held_out)} files, {sum(len(t.encode()) for t in held_out)} bytes held out: {', '.join(held_out_files)}")

    state = torch.load(checkpoint) if options.resume else None
    if state:
        shape, tokenizer = Shape(**state["shape"]), Tokenizer.from_str(state["tokenizer"])
    else:
        shape = Shape(options.vocab, options.positions, options.width, options.layers, options.heads, options.inner)
        tokenizer = train_tokenizer(texts, options.vocab)
    trainer = Trainer(shape, options)
    if state:
        trainer.restore(state)
    log(f"{shape}: {sum(p.numel() for p in trainer.master.values())} parameters")

    def save() -> None:
        trainer.save(checkpoint, tokenizer)
        export(options.out, shape, trainer.average, tokenizer)

    corpus = Corpus(texts, tokenizer, shape.positions + 1, options.fim_rate, options.seed + trainer.steps)
    batches = corpus.batches(options.rows)
    budget = options.minutes * 60
    interrupt = Interrupt()
    bar = progress_bar(budget)
    saved = time.monotonic()
    started = saved - trainer.seconds
    smooth = math.nan
    while trainer.seconds < budget and not interrupt.seen:
        done = trainer.seconds / budget
        lr_scale = max(1e-3, min(done / options.warmup, (1 - done) / (1 - options.warmup)))
        loss = trainer.step(next(batches), lr_scale)
        smooth = loss if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss
        trainer.seconds = time.monotonic() - started
        if bar is not None:
            bar.n = min(trainer.seconds, budget)
            bar.set_postfix_str(f"step {trainer.steps}, loss {smooth:.3f}")
        elif trainer.steps % options.log_every == 0:
            tokens = trainer.steps * options.rows * shape.positions
            log(f"{trainer.seconds:6.0f} s  step {trainer.steps}  {tokens} tokens  loss {smooth:.3f}")
        if time.monotonic() - saved > options.save_minutes * 60:
            save()
            saved = time.monotonic()
    if bar is not None:
        bar.close()

    save()
    tokens = trainer.steps * options.rows * shape.positions
    log(f"{trainer.steps} steps, {tokens} tokens, {trainer.seconds / 60:.1f} minutes")
    if interrupt.seen:
        log("interrupted: --resume carries on from here")
        return
    model, tokenizer = load(options.out)
    log(f"held out: {bits_per_byte(model, tokenizer, held_out):.4f} bits per byte")


def log(message: str) -> None:
    """Say something on stderr."""
    print(message, file=sys.stderr, flush=True)


def progress_bar(seconds: float) -> Any:
    """Return a tqdm bar if there is a terminal to show it and tqdm to draw it."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=round(seconds), unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total} s{postfix}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("tiny-python"), help="the model folder to write")
    add("--minutes", type=float, default=55.0, help="length of the run by the wall clock")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="carry on from the checkpoint")
    add("--checkpoint", type=Path, help="default: OUT.ckpt")
    add("--save-minutes", type=float, default=4.0, help="minutes between two checkpoints")
    add("--log-every", type=int, default=20, help="steps between two lines where there is no terminal")
    add("--check", action="store_true", help="only compare OUT with transformers")
    add("--complete", metavar="PROMPT", help="only let OUT complete a prompt, with the settings in its folder")
    add("--tokens", type=int, default=128, help="the most tokens that --complete adds")
    for name, value in {"vocab": 2048, "positions": 512, "width": 256, "layers": 4, "heads": 4, "inner": 768}.items():
        add(f"--{name}", type=int, default=value)
    add("--rows", type=int, default=8, help="rows of `positions` tokens in a batch")
    add("--fim-rate", type=float, default=0.5, help="share of the files made into fill-in-the-middle exercises")
    add("--muon-lr", type=float, default=0.02)
    add("--adam-lr", type=float, default=3e-3)
    add("--warmup", type=float, default=0.03, help="share of the run")
    add("--ema", type=float, default=0.99, help="decay of the moving average of the weights")
    options = parser.parse_args()
    if options.check:
        check(options.out)
    elif options.complete is not None:
        print(options.complete + complete(options.out, options.complete, options.tokens, options.seed))
    else:
        train(options)


if __name__ == "__main__":
    main()
