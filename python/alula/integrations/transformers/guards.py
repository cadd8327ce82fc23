"""Models that cannot be accelerated as they are: said before anything is touched, with what to do about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from alula.integrations.transformers.released import is_released

__all__ = ["refuse"]


def refuse(model: Any) -> None:
    """Raises TypeError for what is no transformers model, and ValueError for one that something else has changed."""
    _refuse_wrapper(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"accelerate takes a transformers model (PreTrainedModel), not a {type(model).__name__}")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("the model is compiled (model.compile()); accelerate it first, compile it afterwards")
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model has PEFT adapters loaded; merge them into the weights (merge_and_unload()) or remove them, then "
            "accelerate"
        )
    _refuse_quantized(model)
    _refuse_devices(model)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError("gradient checkpointing is on, which is for training; call gradient_checkpointing_disable()")
    if model.training:
        raise ValueError(
            "the model is in training mode; alula has no backward and no dropout yet. Call model.eval() first"
        )


def _refuse_wrapper(model: Any) -> None:
    library = type(model).__module__.partition(".")[0]
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise ValueError("the model is compiled (torch.compile); accelerate it first, compile the result")
    if library == "peft":
        raise ValueError(
            f"the model is wrapped by PEFT ({type(model).__name__}); merge the adapters with merge_and_unload(), then "
            "accelerate what that returns"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"the model is wrapped in {type(model).__name__}; accelerate model.module before wrapping it")
    if library in ("optimum", "deepspeed", "fairscale") or "FullyShardedDataParallel" in type(model).__name__:
        raise ValueError(f"the model is wrapped by {type(model).__module__}.{type(model).__name__}")


def _refuse_quantized(model: PreTrainedModel) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(model.config, "quantization_config", None)
    if quantizer is None and config is None and not getattr(model, "is_quantized", False):
        return
    method = getattr(config, "quant_method", None)
    if method is None and isinstance(config, dict):
        method = config.get("quant_method")
    name = str(getattr(method, "value", method) or type(quantizer).__name__)
    raise ValueError(
        f"the model is quantized by another library ({name}); alula reads float32, bfloat16 and float16 weights. Load "
        "it without quantization_config"
    )


def _refuse_devices(model: PreTrainedModel) -> None:
    mapped = getattr(model, "hf_device_map", None)
    devices = sorted({str(device) for device in mapped.values()}) if mapped else []
    if len(devices) > 1:
        raise ValueError(f"the model is spread over devices ({', '.join(devices)}) by device_map; accepted: one device")
    found = sorted(
        {
            str(parameter.device)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if not is_released(module, name)
        }
    )
    if found not in ([], ["cpu"]):
        raise ValueError(f"the model is on {', '.join(found)}; accepted: cpu")
    if getattr(model, "_tp_size", None) not in (None, 1) or getattr(model, "tp_size", None) not in (None, 1):
        raise ValueError("the model is split by tensor parallelism; accepted: one whole model on one device")
