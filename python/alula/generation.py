"""Generating tokens with a decoder: `generate`, `stream`, and the `Generation` both are made of.

B rows (prompts x num_return_sequences), T columns of the padded prompts, N new tokens at most, V vocabulary.
Inside, rows are packed to the right (left padding) and the padding is never stored, so a row's tokens are those it
would get alone.  The tensors of a call are allocated at its start: the cache for T + N tokens a row and the ids
[B, T + N]; a step allocates nothing that grows with the text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alula.device_generation import DeviceSteps, chooses_on_device
from alula.generation_config import GenerationConfig
from alula.generation_limits import (
    check_past,
    list_of_callables,
    min_new_tokens_of,
    num_new_tokens_of,
    pack_right,
    row_seeds,
    warn_unused,
)
from alula.prompts import pad_id_of, read_prompts
from alula.sampling import RepetitionPenalty, Sampler, greedy
from alula.stopping import TextStream

__all__ = ["Generation", "GenerationConfig", "GenerationMixin", "generate", "stream"]

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
            generation_config = GenerationConfig.of(generation_config)
            config = config.merge(generation_config)
        config = config.updated(**options)
        warn_unused(config, options)
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
        num_new = num_new_tokens_of(config, num_columns, int(lengths.max()), model.config, is_asked)
        num_past = check_past(past_key_values, ids)
        seeds = row_seeds(seed, generator, num_rows) if config.do_sample else [None] * num_rows

        self._pad_id = pad_id_of(config)
        # An end beyond the vocabulary (a small model with the default ids of its family) has no logit to be held down.
        if any(token >= model.config.vocab_size for token in config.eos_ids):
            config = config.updated(eos_token_id=[id for id in config.eos_ids if id < model.config.vocab_size])
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
        self._eos_ids = frozenset(config.eos_ids)
        self._min_new = min_new_tokens_of(config, num_columns)
        self._processors = list_of_callables("logits_processor", logits_processor)
        self._criteria = list_of_callables("stopping_criteria", stopping_criteria)
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
        self._running = torch.ones(num_rows, 1, dtype=torch.int64, device=model.device)
        self._steps: DeviceSteps | None = None  # where tokens are chosen on the device
        # The host decides nothing between steps, so that they can be queued ahead of what has been read.
        self._decides = bool(self._processors or self._criteria or config.stop_strings)
        self._looks_ahead = False

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
        self._open_cache()
        columns = self._cache.get_seq_length()
        try:
            with torch.inference_mode():
                if self._steps is not None:
                    chosen, logits = self._step_on_device(self._steps, is_first)
                else:
                    logits = (self._prefill() if is_first else self._decode())[:, -1].float()
                    chosen = self._choose(self._process(logits))
            tokens = torch.tensor(chosen, dtype=torch.int64)
            self.ids[:, self.length] = tokens
        except BaseException:
            self._cache.crop(columns)
            raise
        self.length += 1
        if not is_first and self._steps is None:
            self._positions += self._running
        self._end_rows(chosen, logits)
        return tokens

    def run(self) -> None:
        """All steps. Where no row can end before the last, on a GPU, nothing is read back before it."""
        self._open_cache()
        steps, is_first = self._steps, self.length == self._num_prompt
        if steps is None or self._decides or self._eos_ids or self._streams is not None or not is_first:
            for _ in self:
                pass
            return
        columns = self._cache.get_seq_length()
        try:
            with torch.inference_mode():
                self._begin_on_device(steps)
                while self.length + steps.num_queued < self.ids.shape[1]:
                    steps.queue()
                self.ids[:, self.length :] = steps.read_all()
        except BaseException:
            self._cache.crop(columns)
            raise
        self.length = self.ids.shape[1]
        self.num_new_tokens = [self.length - self._num_prompt] * len(self.ids)
        for b in range(len(self.ids)):
            self._end(b, "length")

    def _open_cache(self) -> None:
        """The cache to fill, and who chooses tokens."""
        if self._steps is not None or self.length != self._num_prompt:
            return
        rows, columns = self.ids.shape
        if chooses_on_device(self._model):
            num_new = columns - self._num_prompt
            slots = max(self.prompt_lengths) + num_new - 1
            cache = self._cache
            if cache is None and self._encoder:  # its keys lie elsewhere in every call: no step is kept for the next
                cache = self._model.new_cache(rows, max_length=slots)
            self._steps = DeviceSteps(self._model, rows, slots, num_new, cache, self)
            self._looks_ahead = cache is None and not self._decides
            self._cache = self._steps.cache
        elif self._cache is None:
            self._cache = self._model.new_cache(rows, max_length=columns)

    def _begin_on_device(self, steps: DeviceSteps) -> Tensor:
        """Read the prompt and choose the first tokens; logits [R, V]."""
        logits = self._prefill()[:, -1].float()
        steps.begin(
            self.config,
            self._positions,
            seeds=self.seeds,
            prompts=self._prompts,
            min_new=self._min_new,
            pad_id=self._pad_id,
        )
        return steps.first(logits, self._processor())

    def _step_on_device(self, steps: DeviceSteps, is_first: bool) -> tuple[list[int], Tensor | None]:
        """The next token of each row, and the model's logits [B, V] where somebody decides by them."""
        logits = None
        if is_first:
            logits = self._begin_on_device(steps)
        elif steps.num_queued == steps.num_read:
            logits = steps.queue(self._processor())
        if self._looks_ahead and self._num_prompt + steps.num_queued < self.ids.shape[1]:
            steps.queue()
        return steps.read(), None if logits is None else logits[: len(self.ids)].float()

    def _processor(self) -> Callable[[Tensor], Tensor] | None:
        """The caller's processors as one function of logits [B, V]."""
        if not self._processors:
            return None

        def process(logits: Tensor) -> Tensor:
            for processor in self._processors:
                logits = processor(self.sequences, logits)
            return logits

        return process

    def flush(self) -> list[str]:
        """End the texts early: return, per row, the text that was held back."""
        return [stream.flush() for stream in self._streams or ()]

    def _prefill(self) -> Tensor:
        """Read the prompts that the cache does not hold yet; logits [B, 1, V]."""
        ids, mask = self.ids[:, : self.length], self._mask
        if mask is not None and not self._num_past:
            ids, mask = pack_right(ids, mask)
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
        ids = self.ids[:, self.length - 1 : self.length].to(self._model.device)
        has_ended = any(self.finish_reasons)
        return self._model(
            input_ids=ids * self._running if has_ended else ids,
            attention_mask=self._running if has_ended else None,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        ).logits

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
        processor = self._processor()
        return logits if processor is None else processor(logits)

    def _choose(self, logits: Tensor) -> list[int]:
        """Choose a token of `logits` float32 [B, V] for each row that runs, padding for the others."""
        rows = logits.cpu().numpy()
        return [
            self._pad_id if reason else choose(row)
            for reason, choose, row in zip(self.finish_reasons, self._choosers, rows, strict=True)
        ]

    def _end_rows(self, tokens: list[int], logits: Tensor | None) -> None:
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
        if self._steps is None:
            self._running[row] = 0
        else:
            self._steps.end_row(row, is_known=reason == "eos")
            if self.is_done:
                self._steps.release()
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


def generate(
    model: Any,
    input_ids: Prompts | None = None,
    attention_mask: Tensor | None = None,
    *,
    streamer: Any = None,
    inputs: Prompts | None = None,
    **options: Any,
) -> Tensor:
    """Generate up to `max_new_tokens` tokens for each prompt.  Names and meanings are Hugging Face's: an option that is
    left out is the model's, one given as None is not used.

    Args:
        model: a causal language model of alula.
        input_ids: int64 [B, T], or a prompt as a list of ids, or prompts of unequal length as a list of lists or of 1-D
            tensors.  `inputs` is another name for it.
        attention_mask: [B, T], 1 for tokens and 0 for padding, wherever the padding is; only with a tensor [B, T].
        streamer: an object with `put(ids)` and `end()`, as in transformers; gets the prompt, then each step's ids [B].
        generation_config: a `GenerationConfig`, alula's or transformers'; options given by name win over it, and what
            is set in it wins over the model's own (None is not).
        max_new_tokens, max_length, min_new_tokens, min_length: limits; `*_length` count the padded prompt too.
        do_sample: draw at random; otherwise the most likely token is taken (greedy).
        temperature, top_k, top_p, min_p: for sampling, applied in this order.
        repetition_penalty: > 1 makes tokens of the prompt and of the text so far less likely.
        num_return_sequences: rows per prompt, one after the other.
        stop_strings: a row ends when a token completes one of them; needs `tokenizer`.
        tokenizer: any object with `decode(ids)`.
        eos_token_id: an id or a list of ids that end a row.  Default: the model's; None or an empty list: none.
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
        generation.run()
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
