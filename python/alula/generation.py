"""Generating tokens with a decoder: `generate`, `stream`, and the `Generation` both are made of.

B rows (prompts x num_return_sequences), T columns of the padded prompts, N new tokens at most, V vocabulary.
Inside, rows are packed to the right (left padding) and the padding is never stored, so a row's tokens are those it
would get alone.  The tensors of a call are allocated at its start: the cache for T + N tokens a row and the ids
[B, T + N]; a step allocates nothing that grows with the text.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from alula.generation_config import GenerationConfig
from alula.prompts import pad_id_of, read_prompts
from alula.sampling import RepetitionPenalty, Sampler, greedy
from alula.stopping import TextStream

if TYPE_CHECKING:
    from alula.cuda_graph import DecodeGraph

__all__ = ["Generation", "GenerationConfig", "GenerationMixin", "generate", "stream"]

DEFAULT_NEW_TOKENS = 20
_FEWEST_GRAPH_STEPS = 8  # what a capture into a CUDA graph is worth for; a guess, not measured
_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p")

Prompts = Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor]
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
StoppingCriteria = Callable[[Tensor, Tensor], "Tensor | bool"]


class Generation:
    """One call of `generate`, step by step: an iterator over the new tokens, int64 [B] each (padding in ended rows).

    Everything is checked by the constructor, before the model or a cache is touched; the first step reads the prompt.
    If a step is interrupted, by Ctrl-C or an error, the cache is taken back to the last whole step.

    Attributes: `ids` int64 [B, T + N], filled up to column `length`; `finish_reasons`, per row None while it runs, then
    "eos", "stop" (a stop string, see `stopped_by`), "length" or "criteria"; `texts`, per row the text to show that the
    last step completed, if `with_text`; `num_new_tokens` per row, without padding; `seeds` per row, None where it is
    not sampled.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Prompts,
        attention_mask: Tensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        past_key_values: Any = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        tokenizer: Any = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Sequence[StoppingCriteria] | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        with_text: bool = False,
        **options: Any,
    ) -> None:
        config = getattr(model, "generation_config", None) or GenerationConfig.from_model_config(model.config)
        if generation_config is not None:
            config = config.merge(generation_config)
        config = config.update(**options)
        _warn_unused(config, options)
        if (config.stop_strings or with_text) and tokenizer is None:
            raise ValueError("stop_strings need a tokenizer: generate(..., stop_strings=..., tokenizer=tokenizer)")
        ids, mask = read_prompts(input_ids, attention_mask, config, model.config.vocab_size)
        self._encoder: dict[str, Tensor] = {}  # for the first pass: the cache keeps what it makes of it
        if encoder_hidden_states is not None:
            self._encoder["encoder_hidden_states"] = encoder_hidden_states
        if encoder_attention_mask is not None:
            self._encoder["encoder_attention_mask"] = encoder_attention_mask
        if config.num_return_sequences > 1:
            repeats = config.num_return_sequences
            self._encoder = {name: value.repeat_interleave(repeats, dim=0) for name, value in self._encoder.items()}
            ids = ids.repeat_interleave(config.num_return_sequences, dim=0)
            mask = None if mask is None else mask.repeat_interleave(config.num_return_sequences, dim=0)
        num_rows, num_columns = ids.shape
        lengths = torch.full((num_rows,), num_columns) if mask is None else mask.sum(1)
        asked = [options, {} if generation_config is None else dict.fromkeys(generation_config.chosen, True)]
        is_asked = any(o.get(name) is not None for o in asked for name in ("max_new_tokens", "max_length"))
        num_new = _num_new_tokens(config, num_columns, int(lengths.max()), model.config, is_asked)
        num_past = _check_past(past_key_values, ids)
        seeds = _row_seeds(seed, generator, num_rows) if config.do_sample else [None] * num_rows

        self.config = config
        self.seeds = seeds
        self.length = num_columns
        self.num_new_tokens = [0] * num_rows
        self.finish_reasons: list[str | None] = [None] * num_rows
        self.texts = [""] * num_rows
        self.prompt_lengths = lengths.tolist()
        self.ids = torch.empty(num_rows, num_columns + num_new, dtype=torch.int64)
        self.ids[:, :num_columns] = ids
        self._model = model
        self._mask = mask
        self._num_past = num_past
        self._num_prompt = num_columns
        self._pad_id = pad_id_of(config)
        self._eos_ids = frozenset(config.eos_ids)
        self._min_new = _min_new_tokens(config, num_columns)
        self._processors = list(logits_processor or ())
        self._criteria = list(stopping_criteria or ())
        self._cache = past_key_values
        self._choosers = [_chooser(config, seed) for seed in seeds]
        self._prompts = [row.numpy() for row in ids]
        if mask is not None:
            self._prompts = [row[real != 0] for row, real in zip(self._prompts, mask.numpy(), strict=True)]
        self._streams: list[TextStream] | None = None
        if config.stop_strings or with_text:
            stops = config.stop_strings or ()
            self._streams = [TextStream(tokenizer, stops, prompt.tolist()) for prompt in self._prompts]
        self._penalties: list[RepetitionPenalty] | None = None
        self._positions = lengths[:, None].to(model.device)  # of the next token of each row
        self._graph: DecodeGraph | None = None
        self._running = torch.ones(num_rows, 1, dtype=torch.int64, device=model.device)

    @property
    def is_done(self) -> bool:
        """Whether every row has ended."""
        return all(self.finish_reasons)

    @property
    def sequences(self) -> Tensor:
        """The prompts and the tokens so far, int64 [B, length]: a view."""
        return self.ids[:, : self.length]

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Tensor:
        if self.is_done:
            raise StopIteration
        is_first = self.length == self._num_prompt
        if self._cache is None:
            self._cache = self._model.new_cache(self.ids.shape[0], max_length=self.ids.shape[1])
        columns = self._cache.get_seq_length()
        try:
            with torch.inference_mode():
                logits = (self._prefill() if is_first else self._decode())[:, -1].float()
                chosen = self._choose(self._process(logits))
            tokens = torch.tensor(chosen, dtype=torch.int64)
            self.ids[:, self.length] = tokens
        except BaseException:
            self._cache.crop(columns)
            raise
        self.length += 1
        if not is_first:
            self._positions += self._running
        self._end_rows(chosen, logits)
        return tokens

    def flush(self) -> list[str]:
        """End the texts early: return, per row, the text that was held back."""
        return [stream.flush() for stream in self._streams or ()]

    def _prefill(self) -> Tensor:
        """Read the prompts that the cache does not hold yet; logits [B, 1, V]."""
        ids, mask = self.ids[:, : self.length], self._mask
        if mask is not None and not self._num_past:
            ids, mask = _pack_right(ids, mask)
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp_(min=0)
        device = self._model.device
        return self._model(
            input_ids=ids[:, self._num_past :].to(device),
            attention_mask=None if mask is None else mask.to(device),
            position_ids=None if positions is None else positions[:, self._num_past :].to(device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
            **self._encoder,
        ).logits

    def _decode(self) -> Tensor:
        """Read the newest token of each row; logits [B, 1, V].

        A row that has ended is masked out: nothing of it is stored, and it takes no more positions.
        """
        ids = self.ids[:, self.length - 1 : self.length]
        has_ended = any(self.finish_reasons)
        if self._model.device.type == "cuda" and not has_ended:
            graph = self._decode_graph()
            if graph is not None:
                return graph.run(ids, self._positions)
        ids = ids.to(self._model.device)
        return self._model(
            input_ids=ids * self._running if has_ended else ids,
            attention_mask=self._running if has_ended else None,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        ).logits

    def _decode_graph(self) -> DecodeGraph | None:
        """The captured step, from the second one on: a single step is not worth a capture."""
        from alula.cuda_graph import DecodeGraph, can_capture

        if self._graph is not None and self._graph.fits(self._model, self._cache):
            return self._graph
        self._graph = None
        left = self.ids.shape[1] - self.length
        if left >= _FEWEST_GRAPH_STEPS and can_capture(self._model, self._cache):
            self._graph = DecodeGraph(self._model, self._cache)
        return self._graph

    def _process(self, logits: Tensor) -> Tensor:
        """Apply the processors that come before sampling to `logits` float32 [B, V]."""
        config = self.config
        if config.repetition_penalty != 1.0:
            if self._penalties is None:
                self._penalties = [
                    RepetitionPenalty(config.repetition_penalty, logits.shape[1], prompt) for prompt in self._prompts
                ]
            pairs = zip(self._penalties, logits.cpu().numpy(), strict=True)
            logits = torch.from_numpy(np.stack([penalty.apply(row) for penalty, row in pairs])).to(logits.device)
        if self._eos_ids and self.length - self._num_prompt < self._min_new:
            logits = logits.index_fill(1, torch.tensor(self.config.eos_ids, device=logits.device), -torch.inf)
        for processor in self._processors:
            logits = processor(self.sequences, logits)
        return logits

    def _choose(self, logits: Tensor) -> list[int]:
        """Choose a token of `logits` float32 [B, V] for each row that runs, padding for the others."""
        if logits.is_cuda and not self.config.do_sample:  # two numbers a row cross over, not the vocabulary
            largest, tokens = torch.stack([*logits.max(dim=-1)]).tolist()
            if any(value != value for value in largest):
                raise ValueError("the largest logit is NaN")
            return [
                self._pad_id if reason else int(token)
                for reason, token in zip(self.finish_reasons, tokens, strict=True)
            ]
        rows = logits.cpu().numpy()
        return [
            self._pad_id if reason else choose(row)
            for reason, choose, row in zip(self.finish_reasons, self._choosers, rows, strict=True)
        ]

    def _end_rows(self, tokens: list[int], logits: Tensor) -> None:
        """Note which rows end with these tokens [B], and the text they complete; `logits` [B, V] are the model's."""
        for b, token in enumerate(tokens):
            self.texts[b] = ""
            if self.finish_reasons[b]:
                continue
            self.num_new_tokens[b] += 1
            if self._penalties is not None:
                self._penalties[b].add(token)
            if token in self._eos_ids:
                self._end(b, "eos")
            elif self._streams is not None:
                self.texts[b] = self._streams[b].push(token)
                if self._streams[b].stopped_by is not None:
                    self._end(b, "stop")
        for criterion in self._criteria:
            decision = torch.as_tensor(criterion(self.sequences, logits)).expand(len(tokens))
            for b in decision.nonzero()[:, 0].tolist():
                self._end(b, "criteria")
        if self.length == self.ids.shape[1]:
            for b in range(len(tokens)):
                self._end(b, "length")

    def _end(self, row: int, reason: str) -> None:
        if self.finish_reasons[row]:
            return
        self.finish_reasons[row] = reason
        self._running[row] = 0
        if self._streams is not None:
            self.texts[row] += self._streams[row].flush()

    def stopped_by(self, row: int) -> str | None:
        """The stop string that ended `row`, or None."""
        return None if self._streams is None else self._streams[row].stopped_by


def _chooser(config: GenerationConfig, seed: int | None) -> Callable[[np.ndarray], int]:
    if seed is None:
        return greedy
    return Sampler(
        seed, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p or 0.0
    ).draw


def _row_seeds(seed: int | Sequence[int] | None, generator: torch.Generator | None, num_rows: int) -> list[int]:
    if seed is None:
        seed = int(torch.randint(2**62, (1,), generator=generator))
    elif generator is not None:
        raise ValueError("give `seed` or `generator`, not both")
    seeds = [int(seed) + b for b in range(num_rows)] if isinstance(seed, Integral) else list(seed)
    if len(seeds) != num_rows or not all(isinstance(s, Integral) and s >= 0 for s in seeds):
        raise ValueError(f"seed must be an integer >= 0, or a list of {num_rows} (one per row), but is {seed!r}")
    return seeds


def _num_new_tokens(config: GenerationConfig, num_columns: int, longest: int, model_config: Any, is_asked: bool) -> int:
    """The number of tokens to make; a default that does not fit is cut down, a number that was asked for is refused."""
    limit = getattr(model_config, "max_position_embeddings", None)
    num_new = config.max_new_tokens
    if num_new is None:
        num_new = DEFAULT_NEW_TOKENS if config.max_length is None else config.max_length - num_columns
        if num_new < 1:
            raise ValueError(
                f"max_length={config.max_length} leaves no room after a prompt of {num_columns} tokens; "
                "give max_new_tokens, which does not count the prompt"
            )
    if limit is None or longest + num_new <= limit:
        return num_new
    if longest >= limit:
        raise ValueError(
            f"the prompt has {longest} tokens, but the model has n_positions={limit} for prompt and text together; "
            f"shorten the prompt to at most {limit - 1} tokens"
        )
    if is_asked:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={num_new} are {longest + num_new} tokens, but the model "
            f"has n_positions={limit}; ask for at most {limit - longest} new tokens or shorten the prompt"
        )
    return limit - longest


def _min_new_tokens(config: GenerationConfig, num_columns: int) -> int:
    if config.min_new_tokens is not None:
        return config.min_new_tokens
    return max(0, (config.min_length or 0) - num_columns)


def _check_past(cache: Any, ids: Tensor) -> int:
    """Return how many columns of the prompts the cache holds already."""
    if cache is None:
        return 0
    num_past = cache.get_seq_length()
    if cache.batch_size != len(ids) or num_past >= ids.shape[1]:
        raise ValueError(
            f"past_key_values holds {cache.batch_size} rows of {num_past} tokens; input_ids {list(ids.shape)} must "
            "have as many rows, and hold these tokens and at least one more"
        )
    return num_past


def _pack_right(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of each row to its left; padding ids become 0, which every vocabulary has."""
    order = mask.argsort(dim=1, stable=True)
    mask = mask.gather(1, order)
    return ids.gather(1, order) * mask, mask


def _warn_unused(config: GenerationConfig, options: dict[str, Any]) -> None:
    default = GenerationConfig()
    unused = [n for n in _SAMPLING_OPTIONS if options.get(n) not in (None, getattr(default, n), 0)]
    if unused and not config.do_sample:
        warnings.warn(f"{', '.join(unused)} matter only with do_sample=True, which is off", stacklevel=4)


def generate(
    model: Any,
    input_ids: Prompts | None = None,
    attention_mask: Tensor | None = None,
    *,
    streamer: Any = None,
    inputs: Prompts | None = None,
    **options: Any,
) -> Tensor:
    """Generate up to `max_new_tokens` tokens for each prompt.  Names and meanings are Hugging Face's.

    Args:
        model: a causal language model of alula.
        input_ids: int64 [B, T], or a prompt as a list of ids, or prompts of unequal length as a list of lists or of 1-D
            tensors.  `inputs` is another name for it.
        attention_mask: [B, T], 1 for tokens and 0 for padding, wherever the padding is; only with a tensor [B, T].
        streamer: an object with `put(ids)` and `end()`, as in transformers; gets the prompt, then each step's ids [B].
        generation_config: a `GenerationConfig`; options given by name win over it, and it wins over the model's own.
        max_new_tokens, max_length, min_new_tokens, min_length: limits; `*_length` count the padded prompt too.
        do_sample: draw at random; otherwise the most likely token is taken (greedy).
        temperature, top_k, top_p, min_p: for sampling, applied in this order.
        repetition_penalty: > 1 makes tokens of the prompt and of the text so far less likely.
        num_return_sequences: rows per prompt, one after the other.
        stop_strings: a row ends when a token completes one of them; needs `tokenizer`.
        tokenizer: any object with `decode(ids)`.
        eos_token_id: an id or a list of ids that end a row.  Default: the model's; an empty list: none.
        pad_token_id: fills a row that has ended.  Default: the model's, else the first eos id, else 0.
        seed: row b draws from a random stream seeded with `seed + b`, or with `seed[b]` of a list, so its tokens depend
            on nothing but its prompt and that number.  Default: taken from `generator`, else from torch's global one.
        generator: a torch.Generator to take the seed from.
        past_key_values: a KVCache that holds the first columns of `input_ids`; it is filled further.
        encoder_hidden_states, encoder_attention_mask: as the model's forward takes them, a row for each prompt.
        logits_processor, stopping_criteria: lists of callables (ids [B, length], logits [B, V]), as in transformers;
            the former come before temperature.

    Returns: int64 [B * num_return_sequences, T + new tokens] on the model's device: the prompts (left padded if they
    were given as lists), then the new tokens, with padding after a row's end.

    Raises: ValueError, before anything is changed, for an unknown or unaccepted option, an empty prompt or batch, ids
    outside the vocabulary, a mask that does not fit, or more tokens than the model has positions.
    """
    if (input_ids is None) == (inputs is None):
        raise ValueError("generate() takes the prompt as `input_ids`, a tensor [B, T] or a list of lists of ids")
    generation = Generation(model, inputs if input_ids is None else input_ids, attention_mask, **options)
    if streamer is None:
        for _ in generation:
            pass
        return generation.sequences.contiguous().to(model.device)
    streamer.put(generation.sequences)
    try:
        for tokens in generation:
            streamer.put(tokens)
    finally:
        streamer.end()
    return generation.sequences.contiguous().to(model.device)


def stream(model: Any, input_ids: Prompts, attention_mask: Tensor | None = None, **options: Any) -> Iterator[Tensor]:
    """Like `generate`, but yield the new tokens of each step as they are made, int64 [B] (padding in ended rows).

    Everything is checked at the call, not at the first step.
    """
    return iter(Generation(model, input_ids, attention_mask, **options))


class GenerationMixin:
    """Gives a model class `generate` and `stream`, and a `generation_config` that is loaded and saved with it.

    It stands before the class that defines `from_pretrained` and `save_pretrained`.
    """

    generation_config: GenerationConfig | None = None

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **options: Any) -> Any:
        """As the base class, and read generation_config.json; see `PreTrainedModel.from_pretrained`."""
        model = super().from_pretrained(path, **options)
        model.generation_config = GenerationConfig.from_pretrained(path, model.config)
        return model

    def save_pretrained(self, folder: str | os.PathLike, *args: Any, **options: Any) -> None:
        """As the base class, and write generation_config.json; see `PreTrainedModel.save_pretrained`."""
        super().save_pretrained(folder, *args, **options)
        config = self.generation_config or GenerationConfig.from_model_config(self.config)
        config.save_pretrained(folder)

    def generate(
        self, input_ids: Prompts | None = None, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        return generate(self, input_ids, attention_mask, **options)

    def stream(self, input_ids: Prompts, attention_mask: Tensor | None = None, **options: Any) -> Iterator[Tensor]:
        return stream(self, input_ids, attention_mask, **options)


GenerationMixin.generate.__doc__ = generate.__doc__
GenerationMixin.stream.__doc__ = stream.__doc__
