"""A decoder whose next token is a fixed function of all tokens before it, kept in a real key/value cache."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from alula.cache import KVCache
from alula.generation import GenerationMixin
from torch import Tensor


class ToyDecoder(GenerationMixin):
    """Logits are row h of a table [1009, V], h a hash of the tokens and positions stored in the row's cache.

    `forced`: logits that favour exactly these tokens, one a step, whatever the prompt.  `calls` records what the model
    was asked.  `fail_at`: raise this exception in the n-th call, after the cache has taken the tokens in.
    """

    def __init__(self, vocab_size: int = 64, positions: int = 128, forced: list[int] | None = None) -> None:
        self.config = SimpleNamespace(
            vocab_size=vocab_size,
            max_position_embeddings=positions,
            num_hidden_layers=1,
            num_key_value_heads=1,
            head_dim=8,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.generation_config = None
        self.table = torch.randn(1009, vocab_size, generator=torch.Generator().manual_seed(1)) * 3
        self.forced = forced
        self.calls: list[dict] = []
        self.fail_at: tuple[int, BaseException] | None = None

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        return KVCache(self.config, batch_size, max_length)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        return_dict: bool = False,
    ) -> SimpleNamespace:
        assert torch.is_inference_mode_enabled()
        assert logits_to_keep == 1
        assert use_cache
        assert return_dict
        num_rows, num_tokens = input_ids.shape
        assert 0 <= int(input_ids.min()) <= int(input_ids.max()) < self.config.vocab_size
        self.calls.append({"ids": input_ids.clone(), "mask": attention_mask, "cache": past_key_values})
        first = past_key_values.get_seq_length() == 0
        positions, lengths = past_key_values.prepare(num_tokens, attention_mask)
        if position_ids is not None:
            assert torch.equal(position_ids[positions >= 0].int(), positions[positions >= 0])
        elif first:
            assert bool((positions == torch.arange(num_tokens)).all())
        slots = past_key_values.layers[0]
        for b in range(num_rows):
            for t in range(num_tokens):
                if positions[b, t] >= 0:
                    slots[b, 0, positions[b, t], 0] = float(input_ids[b, t])
        if self.fail_at is not None and self.fail_at[0] == len(self.calls):
            raise self.fail_at[1]
        logits = torch.stack([self._row(slots[b, 0, : lengths[b], 0]) for b in range(num_rows)])
        if self.forced is not None:
            logits = torch.zeros_like(logits)
            logits[:, self.forced[(len(self.calls) - 1) % len(self.forced)]] = 10.0
        return SimpleNamespace(logits=logits[:, None], past_key_values=past_key_values)

    def _row(self, tokens: Tensor) -> Tensor:
        value = 7
        for i, token in enumerate(tokens.tolist()):
            value = (value * 31 + int(token) * (i + 3)) % 1009
        return self.table[value]
