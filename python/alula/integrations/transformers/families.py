"""The families of transformers that alula replaces, and what is checked before a stack of blocks is taken.

A stack is recognised by what it is: the classes of its modules, whose forward methods must be transformers' own, and
the names and shapes of its parameters. A module of another class (an adapter, a quantized matrix) or with a forward of
its own is never taken over.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.big_bird import modeling_big_bird as big_bird
from transformers.models.codegen import modeling_codegen as codegen
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.gpt_bigcode import modeling_gpt_bigcode as gpt_bigcode
from transformers.pytorch_utils import Conv1D

from alula.config import BigBirdConfig, CodeGenConfig, GPT2Config, GPTBigCodeConfig, PretrainedConfig
from alula.integrations.transformers import released
from alula.models.base import PreTrainedModel
from alula.models.big_bird import BigBirdModel
from alula.models.codegen import CodeGenModel
from alula.models.gpt2 import GPT2Model
from alula.models.gpt_bigcode import GPTBigCodeModel

__all__ = ["FAMILIES", "Family", "NotReplaceable", "dtype_of", "engine_config", "family_of", "inspect_stack"]


class NotReplaceable(ValueError):
    """A stack of blocks that cannot be taken over; the message says which module and why."""


class Family(NamedTuple):
    """A stack of blocks in transformers and the alula model that computes the same.

    body, block: transformers' classes of what holds the blocks and of one. parts: the classes inside a block whose
    forward methods are replaced. dense: the class of its matrices. engine: alula's class of the body. path: where the
    blocks are in both. count: the configuration's name of how many. act: how the configuration and the modules call the
    activation. language_model: transformers' class that takes the last tokens of the body to an output projection
    (logits_to_keep), if one does. has_cross: whether cross-attention is replaced too; in transformers that of
    GPTBigCode does not run, and BigBird's self-attention looks at the encoder, too, when there is one, so both are left
    as they are.
    """

    name: str
    body: type[nn.Module]
    block: type[nn.Module]
    parts: tuple[type[nn.Module], ...]
    dense: type[nn.Module]
    engine: type[PreTrainedModel]
    config: type[PretrainedConfig]
    path: str = "h"
    count: str = "n_layer"
    act: tuple[str, str] = ("activation_function", "act")
    language_model: type[nn.Module] | None = None
    has_cross: bool = False

    def blocks(self, body: nn.Module) -> nn.ModuleList:
        """The blocks of transformers' body, or of alula's."""
        for name in self.path.split("."):
            body = getattr(body, name)
        return body

    @property
    def is_decoder(self) -> bool:
        """Whether its blocks norm before they compute, and a last layer norm follows them."""
        return self.path == "h"


FAMILIES = (
    Family(
        "GPT-2",
        gpt2.GPT2Model,
        gpt2.GPT2Block,
        (gpt2.GPT2Attention, gpt2.GPT2MLP),
        Conv1D,
        GPT2Model,
        GPT2Config,
        language_model=gpt2.GPT2LMHeadModel,
        has_cross=True,
    ),
    Family(
        "GPTBigCode",
        gpt_bigcode.GPTBigCodeModel,
        gpt_bigcode.GPTBigCodeBlock,
        (gpt_bigcode.GPTBigCodeAttention, gpt_bigcode.GPTBigCodeMLP),
        nn.Linear,
        GPTBigCodeModel,
        GPTBigCodeConfig,
        language_model=gpt_bigcode.GPTBigCodeForCausalLM,
    ),
    Family(
        "CodeGen",
        codegen.CodeGenModel,
        codegen.CodeGenBlock,
        (codegen.CodeGenAttention, codegen.CodeGenMLP),
        nn.Linear,
        CodeGenModel,
        CodeGenConfig,
        language_model=codegen.CodeGenForCausalLM,
    ),
    Family(
        "BigBird",
        big_bird.BigBirdModel,
        big_bird.BigBirdLayer,
        (
            big_bird.BigBirdAttention,
            big_bird.BigBirdSelfAttention,
            big_bird.BigBirdBlockSparseAttention,
            big_bird.BigBirdSelfOutput,
            big_bird.BigBirdIntermediate,
            big_bird.BigBirdOutput,
        ),
        nn.Linear,
        BigBirdModel,
        BigBirdConfig,
        "encoder.layer",
        "num_hidden_layers",
        ("hidden_act", "intermediate_act_fn"),
    ),
)


def family_of(module: nn.Module) -> Family | None:
    """The family whose body this module is."""
    for family in FAMILIES:
        if isinstance(module, family.body):
            return family
    return None


def engine_config(module: nn.Module, family: Family) -> PretrainedConfig:
    """alula's configuration of a body, with as many layers as it has. NotReplaceable for values alula lacks."""
    values = {**module.config.to_dict(), family.count: len(family.blocks(module))}
    try:
        return family.config(**values)
    except (TypeError, ValueError) as error:
        raise NotReplaceable(str(error)) from error


def dtype_of(module: nn.Module, family: Family) -> torch.dtype:
    """The dtype of a body's blocks, by their first parameter."""
    return next(family.blocks(module).parameters()).dtype


def inspect_stack(module: nn.Module, family: Family, engine: PreTrainedModel) -> None:
    """Raises NotReplaceable unless the body is, module by module, what alula computes."""
    _own_forward(module, family.body, "the model")
    if not getattr(module.config, "is_causal", True):
        raise NotReplaceable("config.is_causal is False: the decoder was made to look both ways")
    dtype = dtype_of(module, family)
    without_memory = {id(owner._parameters[name]) for owner, name in released.names_of(family.blocks(module))}
    if family.is_decoder:
        if type(module.ln_f) is not nn.LayerNorm:
            raise NotReplaceable(f"ln_f is a {_class(module.ln_f)}; accepted: torch.nn.LayerNorm")
        for name, parameter in module.ln_f.named_parameters():
            _plain_parameter(f"ln_f.{name}", parameter, dtype)
    for index, (block, counterpart) in enumerate(zip(family.blocks(module), family.blocks(engine), strict=True)):
        where = f"{family.path}.{index}"
        _inspect_block(where, index, block, family, getattr(module.config, family.act[0]))
        expected = {name: tuple(slot.shape) for name, slot in counterpart.weight_slots().items()}
        for name, parameter in block.named_parameters():
            shape = expected.pop(name, None)
            if shape is None:
                raise NotReplaceable(f"{where} has a parameter {name} that alula does not know")
            if tuple(parameter.shape) != shape:
                raise NotReplaceable(f"{where}.{name} has shape {list(parameter.shape)}, expected {list(shape)}")
            _plain_parameter(f"{where}.{name}", parameter, dtype, id(parameter) in without_memory)
        if expected:
            raise NotReplaceable(f"{where} lacks {', '.join(expected)}")


def _inspect_block(where: str, index: int, block: nn.Module, family: Family, activation: str) -> None:
    _own_forward(block, family.block, where)
    attentions = (block.attn, getattr(block, "crossattention", block.attn)) if family.is_decoder else (block.attention,)
    for layer in (getattr(attention, "layer_idx" if family.is_decoder else "seed", None) for attention in attentions):
        if layer != index:
            raise NotReplaceable(f"{where} says layer_idx={layer}; blocks must be in the order of their caches")
    act = ACT2FN[activation] if isinstance(activation, str) else None
    for name, inner in block.named_modules():
        path = f"{where}.{name}"
        if not name or isinstance(inner, nn.Dropout):
            continue
        if isinstance(inner, family.parts):
            _own_forward(inner, next(part for part in family.parts if isinstance(inner, part)), path)
        elif name.endswith(f".{family.act[1]}"):
            if type(inner) is not type(act) or _numbers(inner) != _numbers(act):
                made_with = ", ".join(f"{key}={value}" for key, value in _numbers(inner).items())
                raise NotReplaceable(f"{path} is {_class(inner)}({made_with}), the configuration says {activation}")
        elif type(inner) not in (family.dense, nn.LayerNorm):
            raise NotReplaceable(
                f"{path} is a {_class(inner)}; accepted: {family.dense.__name__} and LayerNorm as transformers makes "
                "them (merge adapters into the weights, and load without quantization)"
            )
        elif "forward" in inner.__dict__:
            raise NotReplaceable(f"{path} has a forward method of its own (another library wraps it)")


def _own_forward(module: nn.Module, cls: type[nn.Module], where: str) -> None:
    if "forward" in module.__dict__ and "_alula" not in module.__dict__:
        raise NotReplaceable(f"{where} has a forward method of its own (another library wraps it)")
    if type(module).forward is not cls.forward:
        raise NotReplaceable(f"{where} is a {_class(module)}, whose forward is not that of {cls.__name__}")


def _plain_parameter(where: str, parameter: torch.Tensor, dtype: torch.dtype, is_released: bool = False) -> None:
    if not is_released and (type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor):
        raise NotReplaceable(f"{where} is a {type(parameter.data).__name__}; accepted: plain tensors, not quantized")
    if parameter.dtype != dtype or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        others = "" if parameter.dtype == dtype else f", other parameters {dtype}"
        raise NotReplaceable(
            f"{where} has dtype {parameter.dtype}{others}; accepted: one of float32, bfloat16, float16 for all"
        )
    if parameter.device.type != "cpu" and not is_released:
        raise NotReplaceable(f"{where} is on {parameter.device}; accepted: cpu")


def _numbers(activation: nn.Module) -> dict[str, float]:
    """What an activation was made with: a slope, a range."""
    return {name: value for name, value in vars(activation).items() if type(value) in (int, float)}


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"
