"""Which devices a model can live on, and why another one cannot be used."""

from __future__ import annotations

import torch

from alula import _C

__all__ = ["checked_device", "raise_id_fault", "why_no_gpu"]


def raise_id_fault(device: torch.device) -> None:
    """ValueError, once, if a kernel of a CUDA device has found an id outside its table since the last time; it does not
    wait for the device, so ids of calls that have not run yet are not known."""
    if device.type == "cuda":
        wrong = _C.take_cuda_id_fault(device.index or 0)
        if wrong:
            raise ValueError(wrong)


def why_no_gpu() -> str | None:
    """Why torch cannot use a GPU here; None where it can."""
    if torch.cuda.is_available():
        return None
    why = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
    return f"torch {torch.__version__} {why}"


def checked_device(device: torch.device | str | int | None) -> torch.device:
    """The device with its index, None being the CPU.

    ValueError for anything but the CPU and a CUDA GPU that torch sees and this build has code for; it says which of
    these is missing.
    """
    asked = torch.device("cpu" if device is None else device)
    if asked.type == "cpu":
        return torch.device("cpu")
    build = _C.build_info()
    accepted = "cpu" if build["cuda"] is None else "cpu, cuda"
    name = f"device {str(device)!r}" if isinstance(device, str) else f"device {device}"
    if asked.type != "cuda":
        raise ValueError(f"{name} is not supported by this build; accepted: {accepted}")
    if build["cuda"] is None:
        raise ValueError(f"{name} is not supported by this build; accepted: cpu ({build['cuda_reason']})")
    why = why_no_gpu()
    if why:
        raise ValueError(f"{name} cannot be used: {why}; accepted: cpu")
    index = torch.cuda.current_device() if asked.index is None else asked.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"{name} does not exist; torch sees {torch.cuda.device_count()} CUDA devices")
    missing = _C.missing_cuda_code(*torch.cuda.get_device_capability(index), build["cuda_archs"])
    if missing:
        raise ValueError(f"{name} cannot be used: {missing}")
    return torch.device("cuda", index)
