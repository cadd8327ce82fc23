"""The ops' CUDA kernels in the host executor, with the arguments of alula.ops (dense weights plain [N, K])."""

from __future__ import annotations

import torch
from alula.ops import ACTIVATIONS, PackedWeight, RowState
from alula.testing import reference
from simt_process import DTYPES, Executor
from torch import Tensor

MAX_FEW_ROWS = 16  # csrc/cuda/weight_layout.h

MASK_KINDS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def no_faults() -> Tensor:
    """Room for wrong ids of every kind (csrc/cuda/id_faults.h), int64 [4, 2]: none."""
    return torch.zeros(4, 2, dtype=torch.int64)


def new_result(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """NaN everywhere, which no kernel may leave behind; `offset` elements off an address aligned to 16."""
    count = int(torch.Size(shape).numel())
    return torch.full((count + offset,), torch.nan, dtype=dtype)[offset:].view(shape)


def padded_rows(weight: Tensor) -> Tensor:
    """As csrc/cuda/weight_layout.h: rows padded with zeros to a multiple of 16 bytes."""
    step = 16 // weight.element_size()
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % step))


class Ops:
    """One executor, the order in which it runs threads, and how many multiprocessors the GPU that is played has (which
    decides how quantized products are cut up). `plan`: of the last of these, (is few rows, is large, splits); `splits`
    of the keys and `rows` of a block: of the last attention."""

    def __init__(self, executor: Executor, order: str = "forward", num_multiprocessors: int = 1) -> None:
        self.executor, self.order, self.num_multiprocessors = executor, order, num_multiprocessors
        self.plan: tuple[int, int, int] | None = None

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
        faults: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        results = {} if inplace else {"q_out": new_result(q.shape, q.dtype), "k_out": new_result(k.shape, k.dtype)}
        places = {
            f"{name}_{what}": integers(*value)
            for name, x in (("q", q), ("k", k))
            for what, value in (("sizes", x.shape), ("strides", x.stride()), ("out_strides", x.stride()))
        }
        out = self.call(
            "rotary",
            (*(("q", "k") if inplace else ("q_out", "k_out")), *(("faults",) if faults is not None else ())),
            faults=faults,
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
        if faults is not None:
            faults.copy_(out.pop("faults"))
        return tuple(out.values())

    def embedding(
        self,
        input_ids: Tensor,
        table: Tensor | PackedWeight,
        *,
        position_ids: Tensor | None = None,
        position_table: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        token_type_table: Tensor | None = None,
        scale: float = 1.0,
        faults: Tensor | None = None,
    ) -> Tensor:
        """`faults`: as :func:`no_faults` makes it; gets (id, limit) of a wrong input id, position and token type."""
        is_packed = isinstance(table, PackedWeight)
        packed = table.data if is_packed else padded_rows(table)
        num_embeddings, width = table[1:3] if is_packed else table.shape
        noted = no_faults() if faults is None else faults
        results = self.call(
            "embedding",
            ("out", "faults"),
            faults=noted,
            input_ids=input_ids,
            table=packed,
            format=table.code if is_packed else 0,
            table_stride=packed.shape[1],
            num_embeddings=num_embeddings,
            width=width,
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
            out=new_result((*input_ids.shape, width), table.dtype),
        )
        noted.copy_(results["faults"])
        assert faults is not None or not noted.any(), f"wrong ids: {noted.tolist()}"
        return results["out"]

    def dequantize_weight(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        return self.call(
            "dequantize_weight",
            ("out",),
            packed=packed.data,
            format=packed.code,
            n=packed.out_features,
            k=packed.in_features,
            dtype=DTYPES[dtype],
            out=new_result((packed.out_features, packed.in_features), dtype),
        )["out"]

    def _quantized_product(
        self,
        x: Tensor,
        weight: PackedWeight,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        norm_eps: float,
    ) -> dict[str, object]:
        rows = x.numel() // x.shape[-1] if x.numel() else 0
        if rows > MAX_FEW_ROWS and norm_weight is not None:
            x = reference.layer_norm(x, norm_weight, norm_bias, norm_eps).to(x.dtype)
            norm_weight = norm_bias = None
        return {
            "x": x,
            "weight": weight.data,
            "format": weight.code,
            "bias": bias,
            "norm_weight": norm_weight,
            "norm_bias": norm_bias,
            "norm_eps": norm_eps,
            "m": rows,
            "n": weight.out_features,
            "k": weight.in_features,
            "dtype": DTYPES[x.dtype],
            "few_rows": rows <= MAX_FEW_ROWS,
            "num_multiprocessors": self.num_multiprocessors,
            "plan": integers(-1, -1, -1),
        }

    def _product(
        self,
        x: Tensor,
        weight: Tensor | PackedWeight,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        norm_eps: float,
    ) -> dict[str, object]:
        """What every product takes. Beyond MAX_FEW_ROWS rows that with a dense weight comes from PyTorch, as
        "product"."""
        if isinstance(weight, PackedWeight):
            return self._quantized_product(x, weight, bias, norm_weight, norm_bias, norm_eps)
        rows = x.numel() // x.shape[-1] if x.numel() else 0
        values: dict[str, object] = {
            "bias": bias,
            "norm_eps": norm_eps,
            "m": rows,
            "n": weight.shape[0],
            "k": weight.shape[1],
            "dtype": DTYPES[x.dtype],
            "few_rows": rows <= MAX_FEW_ROWS,
        }
        if rows <= MAX_FEW_ROWS:
            packed = padded_rows(weight)
            return {**values, "x": x, "weight": packed, "norm_weight": norm_weight, "norm_bias": norm_bias}
        if norm_weight is not None:
            x = reference.layer_norm(x, norm_weight, norm_bias, norm_eps).to(x.dtype)
        return {**values, "product": (x.double() @ weight.double().T).to(x.dtype).view(rows, -1)}

    def _call_product(self, op: str, results: tuple[str, ...], **values: object) -> dict[str, Tensor]:
        if "plan" not in values:
            return self.call(op, results, **values)
        out = self.call(op, (*results, "plan"), **values)
        self.plan = tuple(out.pop("plan").tolist())
        return out

    def linear(
        self,
        x: Tensor,
        weight: Tensor | PackedWeight,
        bias: Tensor | None = None,
        *,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        norm_eps: float = 1e-5,
        activation: str = "none",
        residual: Tensor | None = None,
    ) -> Tensor:
        values = self._product(x, weight, bias, norm_weight, norm_bias, norm_eps)
        out = new_result((*x.shape[:-1], values["n"]), x.dtype)
        product = values.pop("product", None)
        return self._call_product(
            "linear",
            ("out",),
            out=out if product is None else product.view(out.shape),
            residual=residual,
            activation=ACTIVATIONS[activation],
            **values,
        )["out"]

    def qkv_projection(
        self,
        x: Tensor,
        weight: Tensor | PackedWeight,
        bias: Tensor | None = None,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kv_cache: Tensor,
        positions: Tensor,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        norm_eps: float = 1e-5,
        rotary_table: Tensor | None = None,
        rotary_positions: Tensor | None = None,
        mlp: Tensor | None = None,
        mlp_activation: str = "none",
        faults: Tensor | None = None,
    ) -> Tensor:
        """`kv_cache` and `mlp` are changed in place, and `faults` as in :meth:`embedding`, of a rotary position."""
        batch, tokens, _ = x.shape
        results = {"q": new_result((batch, tokens, num_heads, head_dim), x.dtype), "kv_cache": kv_cache}
        if mlp is not None:
            results["mlp"] = mlp
        if faults is not None:
            results["faults"] = faults
        out = self._call_product(
            "qkv_projection",
            tuple(results),
            tokens=tokens,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            kv_strides=integers(*kv_cache.stride()),
            num_slots=kv_cache.shape[2],
            positions=positions,
            rotary_table=rotary_table,
            rotary_positions=rotary_positions,
            rotary_dim=0 if rotary_table is None else rotary_table.shape[1],
            num_rotary_positions=0 if rotary_table is None else rotary_table.shape[0],
            mlp_stride=0 if mlp is None else mlp.stride(1),
            mlp_activation=ACTIVATIONS[mlp_activation],
            **results,
            **self._product(x, weight, bias, norm_weight, norm_bias, norm_eps),
        )
        kv_cache.copy_(out["kv_cache"])
        if mlp is not None:
            mlp.copy_(out["mlp"])
        if faults is not None:
            faults.copy_(out["faults"])
        return out["q"]

    def choose_token(
        self,
        scores: Tensor,
        state: RowState,
        pad_id: Tensor,
        eos_ids: Tensor | None = None,
        *,
        drawn: Tensor | None = None,
        advances: bool = True,
        num_multiprocessors: int = 1,
    ) -> None:
        """`state` is changed in place."""
        results = dict(zip(RowState._fields, state, strict=True))
        out = self.call(
            "choose_token",
            tuple(results),
            scores=scores,
            dtype=DTYPES[scores.dtype],
            rows=scores.shape[0],
            vocab_size=scores.shape[1],
            drawn=drawn,
            pad_id=pad_id,
            eos_ids=eos_ids,
            num_eos=0 if eos_ids is None else len(eos_ids),
            advances=advances,
            num_new=state.out.shape[1],
            num_multiprocessors=num_multiprocessors,
            **results,
        )
        for name, tensor in results.items():
            tensor.copy_(out[name])

    def attention(
        self,
        q: Tensor,
        kv_cache: Tensor,
        positions: Tensor,
        lengths: Tensor,
        *,
        scale: float | None = None,
        causal: bool = True,
        mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        num_multiprocessors: int = 1,
    ) -> Tensor:
        """`num_multiprocessors`: of the GPU that is played; more of them split the keys further."""
        batch, tokens, num_heads, head_dim = q.shape
        mask_strides = [0] * 4
        if mask is not None:
            mask = mask.contiguous()
            mask_strides = [
                0 if i < 2 and n == 1 else s for i, (n, s) in enumerate(zip(mask.shape, mask.stride(), strict=True))
            ]
        step = 16 // q.element_size()
        results = {
            "out": new_result((batch, tokens, num_heads * head_dim), q.dtype),
            "splits": torch.zeros(1, dtype=torch.int64),
            "rows": torch.zeros(1, dtype=torch.int64),
        }
        out = self.call(
            "attention",
            tuple(results),
            q=q,
            kv_cache=kv_cache,
            positions=positions,
            lengths=lengths,
            mask=mask,
            mask_kind=0 if mask is None else MASK_KINDS[mask.dtype],
            mask_strides=integers(*mask_strides),
            mask_keys=0 if mask is None else mask.shape[3],
            head_mask=head_mask,
            scale=float(head_dim**-0.5 if scale is None else scale),
            causal=causal,
            batch=batch,
            tokens=tokens,
            num_heads=num_heads,
            num_kv_heads=kv_cache.shape[1],
            head_dim=head_dim,
            num_slots=kv_cache.shape[2],
            kv_strides=integers(*kv_cache.stride()),
            is_query_even=q.data_ptr() % 16 == 0 and head_dim % step == 0,
            is_cache_even=kv_cache.data_ptr() % 16 == 0 and head_dim % step == 0,
            num_multiprocessors=num_multiprocessors,
            out_stride=num_heads * head_dim,
            dtype=DTYPES[q.dtype],
            **results,
        )
        self.splits, self.rows = int(out["splits"]), int(out["rows"])
        return out["out"]
