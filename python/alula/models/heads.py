"""What stands on top of a model: the output projection, pooling, and the losses, all in float32.

Alphabet: B batch, T tokens, E model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from alula.models.blocks import product
from alula.models.inputs import require_tensors
from alula.models.layers import Embedding, Linear, WeightFormat
from alula.ops import PackedWeight

__all__ = [
    "LMHead",
    "causal_lm_loss",
    "choice_loss",
    "last_token_indices",
    "normed_linear",
    "select_positions",
    "sequence_classification_loss",
    "span_loss",
    "token_classification_loss",
]

IGNORE_INDEX = -100


class LMHead(Linear):
    """Output projection [V, E]. Tied, it owns no weight and reads the embedding's packed table."""

    def __init__(
        self,
        width: int,
        vocab_size: int,
        dtype: torch.dtype,
        tied_to: Embedding | None = None,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__(width, vocab_size, dtype, bias=bias)
        self._source = () if tied_to is None else (tied_to,)  # in a tuple: not a submodule of ours
        if tied_to is not None:
            del self.shapes["weight"]

    @property
    def is_tied(self) -> bool:
        return bool(self._source)

    @property
    def weight_format(self) -> WeightFormat:
        return self._source[0].format if self._source else self.format

    def stored(self, name: str) -> PackedWeight:
        return self._source[0].stored(name) if self._source and name == "weight" else super().stored(name)

    def __getattr__(self, name: str):
        if name == "weight" and self.__dict__.get("_source"):
            return self._source[0].weight
        return super().__getattr__(name)

    def __setattr__(self, name: str, value) -> None:
        if name == "weight" and self.__dict__.get("_source"):
            self._source[0].weight = value
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        unexpected: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs)
        unexpected_keys += [name for name in unexpected if not (self._source and name == f"{prefix}weight")]

    def with_vocabulary(self, size: int, tied_to: Embedding | None = None) -> LMHead:
        """A head like this one for ``size`` tokens, without values."""
        return LMHead(self.in_features, size, self.dtype, tied_to, bias="bias" in self.shapes)


def normed_linear(x: Tensor, norm: tuple[Tensor, Tensor, float], layer: Linear) -> Tensor:
    """``layer(layer_norm(x))`` in one call; ``norm`` is (weight, bias, eps)."""
    return product(x, layer.stored("weight"), layer.stored_bias(), *norm)


def select_positions(hidden: Tensor, keep: int | Sequence[int] | Tensor) -> Tensor:
    """The positions of [B, T, E] that logits are asked for.

    keep: 0 all; n > 0 the last n; an int64 tensor [n] (or a list) those columns of every row, [B, n] those of each row;
    a bool tensor [B, T] the true ones, flattened to [n, E].
    """
    if isinstance(keep, int):
        if keep < 0:
            raise ValueError(f"logits_to_keep={keep}; accepted: 0 (all), a positive count, or a tensor of positions")
        return hidden[:, -keep:] if keep and keep < hidden.shape[1] else hidden
    batch, tokens = hidden.shape[:2]
    if isinstance(keep, (list, tuple)) and all(isinstance(place, int) for place in keep):
        keep = torch.tensor(keep, dtype=torch.int64)
    if not isinstance(keep, Tensor):
        raise TypeError(
            f"logits_to_keep is a {type(keep).__name__}; accepted: 0 (all), a positive count, or a tensor of positions"
        )
    if keep.dtype == torch.bool:
        if list(keep.shape) != [batch, tokens]:
            raise ValueError(f"logits_to_keep of dtype bool has shape {list(keep.shape)}; accepted: {[batch, tokens]}")
        return hidden[keep]
    if keep.dtype not in (torch.int64, torch.int32) or keep.dim() not in (1, 2):
        raise ValueError(
            f"logits_to_keep has dtype {keep.dtype} and shape {list(keep.shape)}; accepted: int64 [n] or [{batch}, n], "
            f"bool {[batch, tokens]}"
        )
    if keep.numel() and (int(keep.min()) < -tokens or int(keep.max()) >= tokens):
        raise ValueError(f"logits_to_keep {keep.tolist()} reaches outside the {tokens} positions")
    keep = keep.long()
    if keep.dim() == 1:
        return hidden[:, keep]
    if keep.shape[0] != batch:
        raise ValueError(f"logits_to_keep has {keep.shape[0]} rows, the batch {batch}")
    return torch.take_along_dim(hidden, (keep % tokens).unsqueeze(-1), dim=1)


def _cross_entropy(logits: Tensor, labels: Tensor, num_items: int | Tensor | None = None) -> Tensor:
    """Mean over labels that are not -100 (or their sum over ``num_items``); logits [n, C], labels int64 [n]."""
    classes = logits.shape[-1]
    wrong = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise ValueError(f"label {int(wrong[0])} is out of range; accepted: 0 to {classes - 1}, or {IGNORE_INDEX}")
    if num_items is None:
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX)
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum") / num_items


def _check_labels(labels: Tensor, shape: list[int], name: str = "labels") -> Tensor:
    require_tensors(**{name: labels})
    if list(labels.shape) != shape:
        raise ValueError(f"{name} have shape {list(labels.shape)}; accepted: {shape}")
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(f"{name} have dtype {labels.dtype}; accepted: int64")
    return labels.long()


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    *,
    shift_labels: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each position's logits [B, T, V] with the next position's label, int64 [B, T].

    Labels of -100 are left out. ``shift_labels`` are taken as they are, unshifted. ``num_items_in_batch`` divides the
    sum instead of the number of labels.
    """
    given, name = (labels, "labels") if shift_labels is None else (shift_labels, "shift_labels")
    given = _check_labels(given, list(logits.shape[:2]), name)
    if shift_labels is None:
        given = F.pad(given, (0, 1), value=IGNORE_INDEX)[:, 1:]
    return _cross_entropy(logits.flatten(0, 1), given.flatten(), num_items_in_batch)


def last_token_indices(
    input_ids: Tensor | None, batch: int, tokens: int, pad_token_id: int | None, device: torch.device
) -> Tensor:
    """int64 [B]: the last position of each row that is not ``pad_token_id``; the last of all without ids or pad id.

    A row of pads only gives 0. Raises ValueError for more than one row without a pad id.
    """
    if pad_token_id is None:
        if batch != 1:
            raise ValueError(
                f"a batch of {batch} sequences cannot be classified: the configuration has no pad_token_id to find the "
                "last token of each by; set config.pad_token_id or pass one sequence at a time"
            )
        return torch.tensor([tokens - 1], device=device)
    if input_ids is None:
        return torch.full((batch,), tokens - 1, device=device)
    return ((input_ids != pad_token_id) * torch.arange(tokens, device=device)).argmax(-1)


def sequence_classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Loss of one label (or vector of labels) a sequence. logits [B, num_labels].

    problem_type: ``regression`` (mean squared error; labels [B] or [B, num_labels]), ``single_label_classification``
    (cross-entropy; int64 [B]), ``multi_label_classification`` (binary cross-entropy; [B, num_labels]). None: regression
    for one label, else by the labels' dtype, integers meaning single-label.
    """
    require_tensors(labels=labels)
    batch, num_labels = logits.shape
    if problem_type is None:
        if num_labels == 1:
            problem_type = "regression"
        elif labels.dtype in (torch.int64, torch.int32):
            problem_type = "single_label_classification"
        else:
            problem_type = "multi_label_classification"
    logits = logits.float()
    if problem_type == "single_label_classification":
        return _cross_entropy(logits, _check_labels(labels.reshape(-1), [batch]))
    if problem_type == "regression" and num_labels == 1:
        labels, logits = labels.reshape(-1), logits.reshape(-1)
    if labels.shape != logits.shape:
        raise ValueError(f"labels have shape {list(labels.shape)}; accepted for {problem_type}: {list(logits.shape)}")
    if problem_type == "regression":
        return F.mse_loss(logits, labels.float())
    return F.binary_cross_entropy_with_logits(logits, labels.float())


def token_classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of [B, T, num_labels] with int64 [B, T]; -100 is left out."""
    return _cross_entropy(logits.flatten(0, 1), _check_labels(labels, list(logits.shape[:2])).flatten())


def span_loss(start: Tensor, end: Tensor, start_positions: Tensor, end_positions: Tensor) -> Tensor:
    """Mean of the cross-entropies of the first and the last token. Logits [B, T], positions int64 [B] or [B, 1];
    negative ones count as 0, ones beyond T are left out."""
    batch, tokens = start.shape
    require_tensors(start_positions=start_positions, end_positions=end_positions)
    losses = []
    for name, logits, positions in (("start", start, start_positions), ("end", end, end_positions)):
        positions = positions.squeeze(-1) if positions.dim() > 1 else positions
        positions = _check_labels(positions, [batch], f"{name}_positions")
        losses.append(F.cross_entropy(logits.float(), positions.clamp(0, tokens), ignore_index=tokens))
    return (losses[0] + losses[1]) / 2


def choice_loss(logits: Tensor, labels: Tensor, name: str = "labels") -> Tensor:
    """Cross-entropy of the scores of choices [..., C] with int64 labels, one for each row of scores; ``name`` is what
    the caller calls them."""
    require_tensors(**{name: labels})
    rows = logits.reshape(-1, logits.shape[-1])
    return _cross_entropy(rows, _check_labels(labels.reshape(-1), [rows.shape[0]], name))
