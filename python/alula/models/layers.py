"""The pieces models are made of, and the loop that runs a stack of decoder blocks.

A weight is stored the way the kernels read it (matrices packed, multi-head QKV rows regrouped) and is seen the way
its checkpoint has it: ``layer.weight`` and ``state_dict()`` give copies in the checkpoint's layout, bit for bit;
assignment and ``load_state_dict`` write. The module tree carries Hugging Face's names; the hot path does not walk it,
but runs over a flat list of tensors taken from it (:func:`run_blocks`).

Alphabet: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head size, E model width, F MLP
width, V vocabulary, P positions, N output features, K input features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alula import ops
from alula.ops import PackedWeight
from alula.weights import check_dtype

__all__ = ["QKV", "Embedding", "LayerNorm", "Linear", "Module", "ModuleList", "PositionTable", "WeightSlot"]

# Bound once: attribute look-ups on torch.ops cost more than the calls' own overhead.
embedding_op = torch.ops.alula.embedding.default
linear_op = torch.ops.alula.linear.default
qkv_op = torch.ops.alula.qkv_projection.default
attention_op = torch.ops.alula.attention.default
layer_norm_op = torch.ops.alula.layer_norm.default


class _Version:
    """Counts changes of any weight of any model, so that flat lists of tensors know when they are out of date."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


VERSION = _Version()


class WeightSlot(NamedTuple):
    """One tensor of a checkpoint: where it lives and what it looks like there."""

    module: WeightModule
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.module.shapes[self.name]

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        return self.module.read(self.name)

    def write(self, value: Tensor) -> None:
        self.module.write(self.name, value)


class Module(nn.Module):
    """An nn.Module of an inference engine: parameters are copies that cannot be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            VERSION.count += 1

    def weight_slots(self, prefix: str = "") -> dict[str, WeightSlot]:
        """Every tensor of the checkpoint below this module, by full name, in the order of the modules."""
        slots = {}
        for path, module in self.named_modules(prefix=prefix):
            if isinstance(module, WeightModule):
                for name in module.shapes:
                    slots[f"{path}.{name}" if path else name] = WeightSlot(module, name)
        return slots

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Names and copies of the weights in the checkpoint's layout.

        The copies are inference tensors: changing one in place or asking it for gradients raises, since neither could
        reach the model. Assign or ``load_state_dict`` to change weights.
        """
        for name, slot in self.weight_slots(prefix).items():
            if recurse or slot.module is self:
                yield name, slot.module.frozen(slot.name)

    def requires_grad_(self, requires_grad: bool = True) -> Module:
        if requires_grad:
            raise RuntimeError("alula has no backward yet: its weights cannot require grad")
        return self


class ModuleList(Module, nn.ModuleList):
    """nn.ModuleList of such modules."""

    def __init__(self, modules: Sequence[nn.Module] = ()) -> None:
        nn.ModuleList.__init__(self, modules)
        self.training = False


class WeightModule(Module):
    """A module that owns tensors of a checkpoint.

    Args:
        shapes: name -> shape in the checkpoint.
        packed: those of the names that are stored packed.
        dtype: of all of them.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], packed: tuple[str, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.shapes = shapes
        self.dtype = dtype
        self._packed_names = packed
        self._data: dict[str, Tensor | PackedWeight] = {}

    def stored(self, name: str) -> Tensor | PackedWeight:
        """The tensor as the kernels read it. RuntimeError if it was never loaded."""
        try:
            return self._data[name]
        except KeyError:
            raise RuntimeError(f"{name} of this {type(self).__name__} has no values: load or initialise it") from None

    def read(self, name: str) -> Tensor:
        """A copy in the checkpoint's layout."""
        stored = self.stored(name)
        return self._to_checkpoint(stored.unpack() if isinstance(stored, PackedWeight) else stored.clone())

    def frozen(self, name: str) -> Tensor:
        """As :meth:`read`, but PyTorch refuses to change it in place or to track its gradient."""
        with torch.inference_mode():
            return self.read(name).clone() if name in self._packed_names else self.read(name)

    def write(self, name: str, value: Tensor) -> None:
        """Stores a tensor given in the checkpoint's layout and of this module's shape; its dtype becomes the module's
        where it is the only one."""
        if tuple(value.shape) != self.shapes[name]:
            raise ValueError(f"{name} has shape {list(value.shape)}, expected {list(self.shapes[name])}")
        check_dtype(value.dtype, f"{name}: dtype")
        with torch.inference_mode(False), torch.no_grad():
            value = self._from_checkpoint(value.detach())
            self._data[name] = ops.pack(value) if name in self._packed_names else value.clone().contiguous()
        object.__setattr__(self, "dtype", value.dtype)
        VERSION.count += 1

    def _to_checkpoint(self, value: Tensor) -> Tensor:
        return value

    def _from_checkpoint(self, value: Tensor) -> Tensor:
        return value

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("shapes", ()):
            return self.frozen(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("shapes", ()):
            self.write(name, value.to(self.dtype))
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(shape)}" for name, shape in self.shapes.items())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in self.shapes:
            destination[prefix + name] = self.read(name)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        for name in self.shapes:
            value = state_dict.get(prefix + name)
            if value is None:
                missing_keys.append(prefix + name)
                continue
            try:
                self.write(name, value.to(self.dtype))
            except ValueError as error:
                error_msgs.append(f"{prefix}{error}")
        unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k[len(prefix) :] not in self.shapes]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightModule:
        probe = fn(torch.empty(0, dtype=self.dtype))
        if probe.device.type != "cpu":
            raise ValueError(f"device {probe.device} is not supported by this build; accepted: cpu")
        if probe.dtype != self.dtype:
            check_dtype(probe.dtype)
            for name in list(self._data):
                self.write(name, self.read(name).to(probe.dtype))
            object.__setattr__(self, "dtype", probe.dtype)
        return self


class Embedding(WeightModule):
    """Token table [V, E], packed, so that a tied output projection reads the very same memory."""

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype) -> None:
        super().__init__({"weight": (num_embeddings, embedding_dim)}, ("weight",), dtype)

    @property
    def num_embeddings(self) -> int:
        return self.shapes["weight"][0]

    @property
    def embedding_dim(self) -> int:
        return self.shapes["weight"][1]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Rows of the table: int64 [B, T] -> [B, T, E]."""
        return ops.embedding(input_ids, self.stored("weight"))


class PositionTable(WeightModule):
    """Position table [P, E], not packed: a few rows of it are read in a call."""

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype) -> None:
        super().__init__({"weight": (num_embeddings, embedding_dim)}, (), dtype)

    def forward(self, position_ids: Tensor) -> Tensor:
        return self.stored("weight")[position_ids]


class LayerNorm(WeightModule):
    """Weight and bias [E]. In a decoder block it runs inside the product that follows it."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__({"weight": (width,), "bias": (width,)}, (), dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.stored("weight"), self.stored("bias"), self.eps)


class Linear(WeightModule):
    """Weight [N, K] packed, optional bias [N]."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool = True) -> None:
        shapes: dict[str, tuple[int, ...]] = {"weight": (out_features, in_features)}
        if bias:
            shapes["bias"] = (out_features,)
        super().__init__(shapes, ("weight",), dtype)
        self.in_features, self.out_features = in_features, out_features

    def stored_bias(self) -> Tensor | None:
        return self.stored("bias") if "bias" in self.shapes else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.stored("weight"), self.stored_bias())


class QKV(Linear):
    """The query, key and value projections as one matrix with rows ``[q (H*D) | k (G*D) | v (G*D)]``.

    ``interleaved``: the checkpoint has rows (H, 3, D) instead, query, key and value of a head together (GPTBigCode's
    multi-head layout).
    """

    def __init__(
        self, width: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, *, interleaved: bool
    ) -> None:
        super().__init__(width, (num_heads + 2 * num_kv_heads) * head_dim, dtype)
        self.num_heads, self.head_dim, self.interleaved = num_heads, head_dim, interleaved

    def _from_checkpoint(self, value: Tensor) -> Tensor:
        if not self.interleaved:
            return value
        return value.unflatten(0, (self.num_heads, 3, self.head_dim)).transpose(0, 1).flatten(0, 2)

    def _to_checkpoint(self, value: Tensor) -> Tensor:
        if not self.interleaved:
            return value
        return value.unflatten(0, (3, self.num_heads, self.head_dim)).transpose(0, 1).flatten(0, 2)


# --- the decoder loop -----------------------------------------------------------------------------------


class BlockShape(NamedTuple):
    """What all blocks of a stack have in common."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    width: int
    mlp_width: int
    scale: float
    norm_eps: float
    activation: int


class BlockWeights(NamedTuple):
    """The tensors of one pre-layer-norm block, in the order :func:`run_blocks` takes them."""

    norm1_weight: Tensor  # [E]
    norm1_bias: Tensor
    qkv_weight: Tensor  # packed [(H + 2 G) D, E]
    qkv_bias: Tensor
    out_weight: Tensor  # packed [E, H D]
    out_bias: Tensor
    norm2_weight: Tensor  # [E]
    norm2_bias: Tensor
    fc_weight: Tensor  # packed [F, E]
    fc_bias: Tensor
    proj_weight: Tensor  # packed [E, F]
    proj_bias: Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)


def bind_block(norm1: LayerNorm, qkv: QKV, out: Linear, norm2: LayerNorm, fc: Linear, proj: Linear) -> BlockWeights:
    """The stored tensors of a block's modules."""
    tensors: list[Tensor] = []
    for module in (norm1, qkv, out, norm2, fc, proj):
        weight = module.stored("weight")
        tensors += [weight.data if isinstance(weight, PackedWeight) else weight, module.stored("bias")]
    return BlockWeights(*tensors)


# Called in every block with (layer index, block input [B, T, E], query [B, T, H, D]).
BlockObserver = Callable[[int, Tensor, Tensor], None]


def run_blocks(
    blocks: Sequence[BlockWeights],
    shape: BlockShape,
    x: Tensor,
    kv_layers: Sequence[Tensor],
    positions: Tensor,
    lengths: Tensor,
    padding_positions: Tensor | None = None,
    mask: Tensor | None = None,
    head_masks: Sequence[Tensor] | None = None,
    causal: bool = True,
    observe: BlockObserver | None = None,
) -> Tensor:
    """Runs pre-layer-norm blocks, five calls each: QKV (normed), attention, output (+ residual), MLP in (normed,
    activated), MLP out (+ residual).

    Args:
        x: [B, T, E]. kv_layers: per block [B, G, S, 2*D], written. positions, lengths: int32 [B, T], [B].
        padding_positions: int32 [B, T], the last slot that each padding query sees, negative for tokens. These queries
            have a call of their own, so that tokens give the same bits whatever padding follows them.
        mask: as :func:`alula.ops.attention` takes it. head_masks: per block float32 [H].
        observe: called in every block with its index, its input and its query [B, T, H, D], once keys are written.

    Returns: [B, T, E], not normed.
    """
    heads, kv_heads, head_dim, width, mlp_width, scale, eps, activation = shape
    for layer, (n1w, n1b, qkv_w, qkv_b, out_w, out_b, n2w, n2b, fc_w, fc_b, proj_w, proj_b) in enumerate(blocks):
        kv = kv_layers[layer]
        q = qkv_op(x, qkv_w, qkv_b, n1w, n1b, eps, heads, kv_heads, head_dim, kv, positions)
        if observe is not None:
            observe(layer, x, q)
        head_mask = None if head_masks is None else head_masks[layer]
        y = attention_op(q, kv, positions, lengths, mask, head_mask, scale, causal)
        if padding_positions is not None:
            y += attention_op(q, kv, padding_positions, lengths, mask, head_mask, scale, causal)
        x = linear_op(y, out_w, width, out_b, None, None, eps, 0, x)
        y = linear_op(x, fc_w, mlp_width, fc_b, n2w, n2b, eps, activation, None)
        x = linear_op(y, proj_w, width, proj_b, None, None, eps, 0, x)
    return x


def attention_probabilities(
    q: Tensor,
    kv: Tensor,
    positions: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    causal: bool,
    mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    real_columns: Tensor | None = None,
) -> Tensor:
    """The probabilities :func:`alula.ops.attention` uses and does not keep, [B, H, T, columns], in q's dtype.

    ``real_columns`` (bool [B, columns]) spreads the slots of a padded cache over the
    columns of the batch; padding columns get zeros.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads, longest = kv.shape[1], int(lengths.max())
    keys = kv[:, :, :longest, :head_dim].float()
    grouped = q.float().unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4)  # [B, G, H/G, T, D]
    scores = torch.matmul(grouped, keys.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * scale  # [B, H, T, S]
    slots = torch.arange(longest, device=q.device)
    visible = (slots < lengths.view(-1, 1, 1)) & (positions >= 0).unsqueeze(2)
    if causal:
        visible = visible & (slots <= positions.unsqueeze(2))
    visible = visible.unsqueeze(1)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask[..., :longest]
    elif mask is not None:
        scores = scores + mask[..., :longest].float()
    probabilities = ops.scaled_masked_softmax(scores, visible)
    if head_mask is not None:
        probabilities = probabilities * head_mask.view(-1, 1, 1)
    if real_columns is not None:
        slot_of = (real_columns.cumsum(1) - 1).clamp_(min=0).view(batch, 1, 1, -1)
        probabilities = probabilities.gather(3, slot_of.expand(-1, heads, tokens, -1))
        probabilities = probabilities * real_columns.view(batch, 1, 1, -1)
    return probabilities.to(q.dtype)
