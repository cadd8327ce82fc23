"""What every model class can do: be made, loaded, saved, moved between dtypes, resized, counted."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from alula.cache import KVCache
from alula.config import PretrainedConfig, parse_dtype, without_downloading
from alula.devices import checked_device
from alula.memory import raises_torch_errors
from alula.models.heads import LMHead
from alula.models.layers import DENSE, Embedding, Linear, Module, PositionTable
from alula.models.quantizing import Quantizable, refuse_rounded_activations
from alula.models.stored_matrices import StoredMatrices, stored_quantization
from alula.quantization import QuantizationConfig
from alula.weights import Checkpoint, StateDictSource, TensorSource, check_dtype, load_weights, save_weights

__all__ = ["PreTrainedModel"]


# Arguments of transformers' from_pretrained that mean something, and what alula has in their place.
_NAMES_HERE = {
    "device_map": 'device="cuda"',
    "load_in_4bit": 'quantize="nf4"',
    "load_in_8bit": 'quantize="int8"',
    "quantization_config": 'quantize="int8", "int4", "int4_asymmetric" or "nf4"',
}


def _resolve_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | None:
    dtype = torch_dtype if dtype is None else dtype
    return None if dtype is None or dtype == "auto" else check_dtype(parse_dtype(dtype))


class PreTrainedModel(Quantizable, Module):
    """Base of the model classes. Always in evaluation mode when made; dropout is never applied.

    Subclasses set ``config_class``, ``ignored_tensors`` (a pattern of buffers that old checkpoints carry, without the
    base model's prefix) and ``optional_weights`` (prefixes of head weights that are initialised, with a warning, where
    a checkpoint lacks them).
    """

    config_class: ClassVar[type[PretrainedConfig]]
    base_model_prefix: ClassVar[str] = "transformer"
    ignored_tensors: ClassVar[re.Pattern[str]] = re.compile(r"(?!)")
    optional_weights: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("forward", "decode_step"):
            if name in cls.__dict__:
                setattr(cls, name, raises_torch_errors(cls.__dict__[name]))

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, not a {type(config).__name__}"
            )
        config.validate()
        self.config = config

    # --- making and loading ---------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: PretrainedConfig, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """A model with random weights, in ``dtype``, else the configuration's, else float32."""
        return cls(config, dtype=_resolve_dtype(dtype, None) or config.dtype)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        config: PretrainedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        quantize: str | None = None,
        group_size: int | None = None,
        keep: str | Sequence[str] = (),
        activations: str | None = None,
        **overrides: Any,
    ) -> PreTrainedModel:
        """Loads a Hugging Face-format folder: config.json and safetensors (single or sharded) or pytorch_model.bin.

        Args:
            path: the folder.
            config: used instead of the folder's.
            dtype: float32, bfloat16, float16 or their names; None or "auto": the checkpoint's. ``torch_dtype`` is its
                older name.
            device: "cpu", or a GPU as "cuda" or "cuda:1" where the build has CUDA kernels for it.
            quantize: "int8", "int4", "int4_asymmetric" or "nf4": matrices are quantized one by one as they are read,
                with ``group_size`` and all but those that ``keep`` names, see :meth:`quantize`.
            activations: "int8" (the default of quantized matrices) or "full", see :meth:`quantize`; of a folder that is
                quantized already, in place of what it says. On a GPU they are always "full", and "int8" is refused.
            **overrides: values of the configuration to replace, such as ``num_labels=3``. Arguments of transformers
                about downloading, and ``low_cpu_mem_usage``, are taken and change nothing.

        The weights are packed one by one out of a memory map: the process grows by little more than the packed model.
        The matrices of a folder that alula quantized stay in the map.
        Raises FileNotFoundError for a missing file and ValueError for anything in it that does not fit, naming file
        and tensor.
        """
        device = checked_device(device)
        refuse_rounded_activations(activations, device)
        dtype = _resolve_dtype(dtype, torch_dtype)
        overrides = without_downloading(overrides)
        overrides.pop("low_cpu_mem_usage", None)
        if config is None:
            values = cls.config_class.get_config_dict(path)
            config = cls.config_class.from_dict(values)
            unknown = [name for name in overrides if not hasattr(config, name)]
            if unknown:
                unknown = [f"{name} (here: {_NAMES_HERE[name]})" if name in _NAMES_HERE else name for name in unknown]
                raise TypeError(f"from_pretrained got unknown arguments: {', '.join(unknown)}")
            config = cls.config_class.from_dict(values, **overrides) if overrides else config
        elif overrides:
            raise TypeError(f"from_pretrained got a config and also values for it: {', '.join(overrides)}")
        checkpoint = Checkpoint(path)
        if config.num_hidden_layers > len(checkpoint.names()):  # before making modules for all of them
            raise ValueError(
                f"{path} does not fit its configuration: num_hidden_layers is {config.num_hidden_layers}, but the "
                f"checkpoint holds {len(checkpoint.names())} tensors"
            )
        stored = stored_quantization(config, checkpoint)
        quantization = QuantizationConfig.of_arguments(stored, quantize, group_size, keep, activations, path)
        dtype = dtype or check_dtype(checkpoint.dtype(), f"{path}: weights of dtype")
        model = cls(config, dtype=dtype, init_weights=False)
        source: TensorSource = checkpoint
        if quantization is not None:
            model._set_formats(quantization, is_stored=stored is not None)
        loaded: set[str] = set()
        if stored is not None:
            source = packed = StoredMatrices(model, checkpoint, stored)
            loaded = packed.loaded
        source = model.checkpoint_view(source)
        missing = load_weights(model, source, dtype, optional=model.optional_prefixes(), loaded=loaded).missing
        if stored is not None:
            packed.load(dtype)
            if packed.unexpected:
                unused = ", ".join(packed.unexpected)
                warnings.warn(f"{path}: tensors not used by {cls.__name__}: {unused}", stacklevel=2)
        if missing:
            warnings.warn(f"{path} lacks {', '.join(missing)}: initialised at random", stacklevel=2)
            model.init_weights(missing)
        config.dtype = dtype
        if device.type != "cpu":
            model.to(device)
        model.base_model._bind()
        return model

    def optional_prefixes(self) -> tuple[str, ...]:
        """Prefixes of the names that a checkpoint may lack."""
        return self.optional_weights

    def _bind(self) -> None:
        """Brings the weights into the form that a pass reads them in; happens by itself before a pass, too."""

    def init_weights(self, names: list[str] | None = None) -> None:
        """Random values as Hugging Face draws them, for all weights or the named ones; torch's generator seeds them."""
        raise RuntimeError(f"{type(self).__name__} does not say how its weights are initialised")

    def checkpoint_view(self, source: TensorSource) -> TensorSource:
        """The source under this family's present names and layout; families with older layouts override it."""
        return source

    def is_ignored_tensor(self, name: str) -> bool:
        """Whether a checkpoint's tensor (named without the base model's prefix) is a buffer of no use here."""
        return self.ignored_tensors.fullmatch(name) is not None

    def tied_aliases(self) -> dict[str, str]:
        """Names that repeat another weight: alias -> the weight's name."""
        return {}

    # --- saving ---------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike, max_shard_size: int | str = "50GB") -> None:
        """Writes config.json and safetensors that Hugging Face transformers loads back with equal bits.

        A quantized model is written as it is, and only alula reads that; ``model.dequantize()`` first for transformers.
        ``max_shard_size``: bytes or a text such as "5GB"; beyond it the weights go into shards with an index. Files are
        written under temporary names and renamed once complete.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        slots, metadata = self._stored_slots()
        save_weights(slots, folder, max_shard_size, metadata)
        if not self.is_quantized:
            self._forget_quantization()
        self.config.architectures = [type(self).__name__]
        self.config.dtype = self.dtype
        self.config.save_pretrained(folder)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Copies of all weights in the checkpoint's names and layout; a tied alias is the same tensor as its weight."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        state = super().state_dict(*args, **kwargs)
        for alias, target in self.tied_aliases().items():
            state[prefix + alias] = state[prefix + target]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Fills the model from a dict of tensors, converted to the model's dtype; all is checked before any is written.

        ``strict``: missing and unexpected names are a ValueError. ``assign`` makes no difference: weights are packed.
        """
        source = self.checkpoint_view(StateDictSource(state_dict))
        optional = () if strict else ("",)
        report = load_weights(self, source, self.dtype, optional=optional, strict=strict)
        return _IncompatibleKeys(report.missing, report.unexpected)

    # --- facts ----------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> PreTrainedModel:
        return getattr(self, self.base_model_prefix, self)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and of what the model returns."""
        return self.get_input_embeddings().dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are, and what the model returns."""
        return self.get_input_embeddings().device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreTrainedModel:
        super()._apply(fn, recurse)
        for name in ("_positions", "_rotary_table"):  # tables that are no weights
            table = self.__dict__.get(name)
            if table is not None:
                self.__dict__[name] = table.to(self.device)
        return self

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of weights, tied ones once; ``exclude_embeddings``: without the tables of tokens, positions and token
        types. Nothing is trainable."""
        if only_trainable:
            return 0
        slots = self.weight_slots().values()
        return sum(
            slot.nbytes // slot.dtype.itemsize
            for slot in slots
            if not (exclude_embeddings and isinstance(slot.module, Embedding | PositionTable))
        )

    def decode_bytes(self) -> int:
        """Bytes of weights read in one decode step: all but the embedding table, of which a step reads single rows,
        unless it is the output projection too."""
        total = 0
        for slot in self.weight_slots().values():
            if slot.name != "weight" or isinstance(slot.module, Linear) or len(slot.shape) == 1:
                total += slot.module.stored(slot.name).nbytes
        head = self.get_output_embeddings()
        if isinstance(head, LMHead) and head.is_tied:
            total += head.stored("weight").nbytes
        return total

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache that fits this model; ``max_length`` None: it grows by doubling."""
        return KVCache(self.config, batch_size, max_length, dtype=self.dtype, device=self.device)

    # --- embeddings -----------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> Embedding:
        return self.base_model.wte

    def set_input_embeddings(self, value: nn.Module | Tensor) -> None:
        """Takes a table [V, E], or a module with such a weight. A tied output projection follows."""
        table = self._as_table(value)
        embedding = Embedding(*table.shape, self.dtype)
        embedding.format = self.get_input_embeddings().format
        embedding.write("weight", table)
        self._replace_input_embeddings(embedding)

    def _replace_input_embeddings(self, embedding: Embedding) -> None:
        head = self.get_output_embeddings()
        if isinstance(head, LMHead) and head.is_tied:
            self._place_output_embeddings(self._resized_head(head, embedding.num_embeddings, True, embedding))
        self._place_input_embeddings(embedding)
        self.config.vocab_size = embedding.num_embeddings

    def _place_input_embeddings(self, embedding: Embedding) -> None:
        self.base_model.wte = embedding

    def get_output_embeddings(self) -> Linear | None:
        return None

    def _place_output_embeddings(self, head: LMHead) -> None:
        self.lm_head = head

    def set_output_embeddings(self, value: nn.Module | Tensor) -> None:
        """Gives the output projection weights [V, E] of its own; a tied model becomes untied, and its configuration
        says so."""
        if self.get_output_embeddings() is None:
            raise ValueError(f"{type(self).__name__} has no output embeddings")
        table = self._as_table(value)
        if table.shape[0] != self.config.vocab_size:
            raise ValueError(f"output embeddings have {table.shape[0]} rows, the vocabulary {self.config.vocab_size}")
        bias = getattr(value, "bias", None) if isinstance(value, nn.Module) else None
        head = self.get_output_embeddings().with_vocabulary(table.shape[0])
        head.format = self.get_output_embeddings().weight_format
        head.write("weight", table)
        if "bias" in head.shapes:
            bias = self.get_output_embeddings().read("bias") if bias is None else bias.detach().to(self.dtype)
            head.write("bias", bias)
        self._place_output_embeddings(head)
        self.config.tie_word_embeddings = False

    def _as_table(self, value: nn.Module | Tensor) -> Tensor:
        table = value if isinstance(value, Tensor) else getattr(value, "weight", None)
        width = self.get_input_embeddings().embedding_dim
        if not isinstance(table, Tensor) or table.dim() != 2 or table.shape[1] != width or not table.shape[0]:
            got = list(table.shape) if isinstance(table, Tensor) else type(value).__name__
            raise ValueError(f"embeddings given as {got}; accepted: a tensor or a module with a weight [V, {width}]")
        return table.detach().to(self.dtype)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Embedding:
        """Changes the vocabulary to ``new_num_tokens`` (None: as it is), rounded up to ``pad_to_multiple_of``.

        New rows are the mean of the old ones (``mean_resizing``) or random with the configuration's
        ``initializer_range``. An output projection of its own is resized alike. Returns the input embeddings.
        """
        old = self.get_input_embeddings().num_embeddings
        for name, value in (("new_num_tokens", new_num_tokens), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r}; accepted: a positive integer or None")
        count = old if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            count = -(-count // pad_to_multiple_of) * pad_to_multiple_of
        if count != old:
            if any(layer is not None and layer.format != DENSE for layer in self._tables()):
                raise ValueError(
                    "the vocabulary of a model with quantized embeddings cannot change; change it before that, or "
                    "quantize with keep=['embeddings', 'lm_head']"
                )
            head = self.get_output_embeddings()
            own_head = None
            if isinstance(head, LMHead) and not head.is_tied:
                own_head = self._resized_head(head, count, mean_resizing)
            self.set_input_embeddings(self._resized(self.get_input_embeddings().read("weight"), count, mean_resizing))
            if own_head is not None:
                self._place_output_embeddings(own_head)
        return self.get_input_embeddings()

    def _tables(self) -> tuple[Embedding, Linear | None]:
        return self.get_input_embeddings(), self.get_output_embeddings()

    def _resized_head(self, head: LMHead, count: int, mean_resizing: bool, tied_to: Embedding | None = None) -> LMHead:
        resized = head.with_vocabulary(count, tied_to)
        for name in resized.shapes:
            resized.write(name, self._resized(head.read(name), count, mean_resizing))
        return resized

    def _resized(self, table: Tensor, count: int, mean_resizing: bool) -> Tensor:
        if count <= table.shape[0]:
            return table[:count]
        if table.dim() == 1:  # a bias
            rest = count - table.shape[0]
            filler = table.mean(0, dtype=torch.float32) if mean_resizing else 0.0
            return torch.cat([table, torch.zeros(rest, dtype=table.dtype) + filler]).to(table.dtype)
        rows = table.new_empty(count - table.shape[0], table.shape[1])
        if mean_resizing:
            rows.copy_(table.mean(0, dtype=torch.float32).expand_as(rows))
        else:
            rows.normal_(std=self.config.initializer_range)
        return torch.cat([table, rows])

    # --- running --------------------------------------------------------------------------------------------

    def check_inference(self, *inputs: Tensor | None) -> None:
        """RuntimeError where a gradient would silently be missing: training mode with gradients on, or an input that
        requires one."""
        if torch.is_grad_enabled():
            if self.training and self.is_quantized:
                raise RuntimeError(
                    "a quantized model cannot be trained: its weights are integers. Call model.eval(), or run under "
                    "torch.no_grad()"
                )
            if self.training:
                raise RuntimeError(
                    "alula cannot train yet: the model is in training mode and gradients are enabled. Call "
                    "model.eval(), or run under torch.no_grad()"
                )
            if any(tensor is not None and tensor.requires_grad for tensor in inputs):
                raise RuntimeError(
                    "alula has no backward yet: an input requires grad. Run under torch.no_grad(), or detach() it"
                )
