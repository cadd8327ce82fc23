"""BigBird off the CPU, without a GPU: on the meta device, where a tensor that was made elsewhere does not go unseen."""

from typing import Any

import alula
import pytest
import torch
from alula import BlockPlan, ops
from big_bird_cases import CLASSES, random_values, switch
from torch import Tensor

META = torch.device("meta")


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("is_sparse", [False, True])
def test_every_tensor_is_on_the_device_of_the_model(cls: str, is_sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be looked at there: checks of values are left out, and the probabilities of full attention."""
    monkeypatch.setattr("alula.models.layers.checked_device", lambda device: device)
    monkeypatch.setattr("alula.models.big_bird.out_of_range", lambda ids, count: False)
    values = random_values(3)
    model = getattr(alula, cls)(alula.BigBirdConfig(**values)).to(META)
    tokens = switch(values) + 10 * is_sparse
    ids = torch.zeros(2, tokens, dtype=torch.int64, device=META)
    options: dict[str, Any] = {"output_hidden_states": True, "output_attentions": is_sparse}
    if cls == "BigBirdForQuestionAnswering":
        lengths = torch.zeros(2, 1, dtype=torch.int64, device=META)
        monkeypatch.setattr(model, "_question_lengths", lambda *ids: lengths)
    output = model(ids[None] if cls == "BigBirdForMultipleChoice" else ids, **options)
    tensors = [value for value in output.to_tuple() if isinstance(value, Tensor)]
    tensors += [*output.hidden_states, *(output.attentions or ())]
    assert {tensor.device for tensor in tensors} == {META}


def test_a_plan_follows_the_device_of_the_query() -> None:
    plan = BlockPlan.pattern(100, 16, global_tokens=(3,))
    q, k = torch.zeros(2, 100, 3, 16, device=META), torch.zeros(2, 3, 100, 16, device=META)
    assert ops.block_sparse_attention(q, k, k, plan).device == META
    assert ops.block_sparse_probabilities(q, k, plan).device == META
    assert plan.on(META) is plan.on(META)
    with pytest.raises(RuntimeError, match="mask"):
        ops.block_sparse_attention(q, k, k, plan, mask=torch.ones(2, 100, dtype=torch.bool))
