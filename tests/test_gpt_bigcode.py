"""What GPTBigCode alone has: one key/value head for all query heads."""

from __future__ import annotations

import torch
from alula.config import GPTBigCodeConfig
from alula.models import GPTBigCodeForCausalLM
from decoder_cases import alula_model, hf_model, random_ids, worst


def test_multi_query_is_multi_head_with_equal_heads() -> None:
    query = alula_model(hf_model(5, multi_query=True, n_embd=72, n_head=3))
    config = GPTBigCodeConfig(**{**query.config.to_dict(), "multi_query": False})
    head = GPTBigCodeForCausalLM(config, init_weights=False)
    state = query.state_dict()
    for name, value in state.items():
        if ".c_attn." in name:
            q, k, v = value.split([72, 24, 24])
            rows = [torch.stack([q_head, k, v]) for q_head in q.unflatten(0, (3, 24))]
            state[name] = torch.stack(rows).flatten(0, 2)
    head.load_state_dict(state)
    ids = random_ids(query, 2, 15)
    assert worst(head(ids).logits, query(ids).logits) <= 1e-5
