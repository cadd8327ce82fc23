"""The ops' CUDA kernels in the host executor, with the arguments of alula.ops (weights plain [N, K])."""

from __future__ import annotations

import torch
from simt_process import DTYPES, Executor
from torch import Tensor

MASK_KINDS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def new_result(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """NaN everywhere, which no kernel may leave behind; `offset` elements off an address aligned to 16."""
    count = int(torch.Size(shape).numel())
    return torch.full((count + offset,), torch.nan, dtype=dtype)[offset:].view(shape)


def padded_rows(weight: Tensor) -> Tensor:
    """As csrc/cuda/weight_layout.h: rows padded with zeros to a multiple of 16 bytes."""
    step = 16 // weight.element_size()
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % step))


class Ops:
    """One executor and the order in which it runs threads."""

    def __init__(self, executor: Executor, order: str = "forward") -> None:
        self.executor, self.order = executor, order

    def call(self, op: str, results: tuple[str, ...], **values: object) -> dict[str, Tensor]:
        return self.executor.call(op, results=results, order=self.order, **values)

    def scaled_masked_softmax(
        self,
        scores: Tensor,
        mask: Tensor | None = None,
        *,
        scale: float = 1.0,
        causal: bool = False,
        dtype: torch.dtype | None = None,
        offset: int = 0,
    ) -> Tensor:
        out_dtype = dtype or scores.dtype
        strides, kind = [0] * scores.dim(), 0
        if mask is not None:
            kind, mask = MASK_KINDS[mask.dtype], mask.contiguous()
            missing = scores.dim() - mask.dim()
            strides = [0] * missing + [s if n != 1 else 0 for n, s in zip(mask.shape, mask.stride(), strict=True)]
        return self.call(
            "scaled_masked_softmax",
            ("out",),
            scores=scores,
            mask=mask,
            mask_kind=kind,
            mask_strides=integers(*strides),
            sizes=integers(*scores.shape),
            rows=scores.numel() // max(1, scores.shape[-1]),
            dtype=DTYPES[scores.dtype],
            out_dtype=DTYPES[out_dtype],
            out=new_result(scores.shape, out_dtype, offset),
            scale=float(scale),
            causal=causal,
        )["out"]

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *,
        residual: Tensor | None = None,
    ) -> Tensor:
        return self.call(
            "layer_norm",
            ("out",),
            x=x,
            weight=weight,
            bias=bias,
            residual=residual,
            eps=float(eps),
            width=x.shape[-1],
            rows=x.numel() // x.shape[-1],
            dtype=DTYPES[x.dtype],
            out=new_result(x.shape, x.dtype),
        )["out"]

    def rotary(
        self,
        q: Tensor,
        k: Tensor,
        positions: Tensor,
        table: Tensor,
        *,
        interleaved: bool = True,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor]:
        results = {} if inplace else {"q_out": new_result(q.shape, q.dtype), "k_out": new_result(k.shape, k.dtype)}
        places = {
            f"{name}_{what}": integers(*value)
            for name, x in (("q", q), ("k", k))
            for what, value in (("sizes", x.shape), ("strides", x.stride()), ("out_strides", x.stride()))
        }
        out = self.call(
            "rotary",
            ("q", "k") if inplace else ("q_out", "k_out"),
            q=q,
            k=k,
            positions=positions,
            table=table,
            rotary_dim=table.shape[1],
            num_positions=table.shape[0],
            tokens=q.shape[0] * q.shape[1],
            interleaved=interleaved,
            dtype=DTYPES[q.dtype],
            **results,
            **places,
        )
        return tuple(out.values())

    def embedding(
        self,
        input_ids: Tensor,
        table: Tensor,
        *,
        position_ids: Tensor | None = None,
        position_table: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        token_type_table: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        packed = padded_rows(table)
        return self.call(
            "embedding",
            ("out",),
            input_ids=input_ids,
            table=packed,
            table_stride=packed.shape[1],
            num_embeddings=table.shape[0],
            width=table.shape[1],
            position_ids=position_ids,
            position_period=1 if position_ids is None else position_ids.numel(),
            position_table=position_table,
            num_positions=0 if position_table is None else position_table.shape[0],
            token_type_ids=token_type_ids,
            token_type_table=token_type_table,
            num_token_types=0 if token_type_table is None else token_type_table.shape[0],
            scale=float(scale),
            tokens=input_ids.numel(),
            dtype=DTYPES[table.dtype],
            out=new_result((*input_ids.shape, table.shape[1]), table.dtype),
        )["out"]
