"""What the tests of choosing tokens on the device share: prompts and options, the way of a GPU taken on the CPU, and
stand-ins for what a CPU has not: a device that cannot be read, a graph."""

from types import SimpleNamespace

import pytest
import torch
from alula import cuda_graph, generation
from alula.cache import KVCache
from alula.cuda_graph import can_step
from decoder_cases import alula_model, hf_model
from torch.utils._python_dispatch import TorchDispatchMode

PROMPTS = [[5, 17, 3, 22, 4], [12], [7, 7, 8, 9, 1, 1, 0, 33, 12]]
SAMPLED = {"do_sample": True, "seed": 3}
OPTIONS = [
    {},
    {"repetition_penalty": 1.5},
    SAMPLED,
    {**SAMPLED, "temperature": 0.6, "top_k": 20},
    {**SAMPLED, "top_p": 0.8, "repetition_penalty": 1.2},
    {**SAMPLED, "temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    {**SAMPLED, "temperature": 0},
]


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation takes the way of a GPU."""
    monkeypatch.setattr(generation, "chooses_on_device", can_step)


@pytest.fixture
def small_model():
    return alula_model(hf_model(1, "GPTBigCodeForCausalLM"))


def on_host(model, prompts, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "chooses_on_device", lambda model: False)
        return model.generate(prompts, **options)


class Reads(TorchDispatchMode):
    """The operations that would make a GPU wait for its host or the other way round."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "item")

    def __init__(self):
        super().__init__()
        self.found, self.count = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        name = func.name().split("::")[-1].split(".")[0]
        if name in self.WAITING or (name == "index" and any(t.dtype == torch.bool for t in args[1] if t is not None)):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


class NothingToRead:
    """Stands for a model on a device whose values the host cannot have, and does not mix with those of the CPU."""

    device, dtype, weights_stamp = torch.device("meta"), torch.float32, 0
    config = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=64)

    def get_output_embeddings(self):
        return SimpleNamespace(out_features=50)

    def new_cache(self, rows, max_length=None):
        return KVCache(self.config, rows, max_length, dtype=self.dtype, device=self.device)

    def decode_step(self, tokens, position_ids, slots, lengths, cache):
        assert {t.device.type for t in (tokens, position_ids, slots, lengths, *cache.layers)} == {"meta"}
        assert (slots.dtype, lengths.dtype, tokens.dtype) == (torch.int32, torch.int32, torch.int64)
        return torch.empty(*tokens.shape, 50, device="meta")


class PlayedGraph:
    """Runs again what was captured, into the tensor that the capture gave."""

    def __init__(self, call, model, logits):
        self._run, self._logits = lambda: call(model), logits

    def replay(self):
        self._logits.copy_(self._run())


@pytest.fixture
def captures(monkeypatch):
    """The rows of each step that was captured, in order."""
    made = []

    def capture(self, call, model):
        made.append(self.rows)
        logits = torch.empty(self.rows, model.get_output_embeddings().out_features)
        return PlayedGraph(call, model, logits), logits

    init = cuda_graph.DecodeStep.__init__

    def with_capture(self, *args):
        init(self, *args)
        assert not self._can_capture, "a CPU has no graphs"
        self._can_capture = True

    monkeypatch.setattr(cuda_graph.DecodeStep, "__init__", with_capture)
    monkeypatch.setattr(cuda_graph.DecodeStep, "_capture", capture)
    return made
