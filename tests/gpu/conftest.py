"""Tests that need a CUDA device: each is marked `gpu`, and skipped, loudly counted, where there is none."""

import pytest
import torch
from alula import _C


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = None
    if not torch.cuda.is_available():
        why = "torch finds no CUDA device"
    elif _C.build_info()["cuda"] is None:
        why = f"no CUDA kernels in this build: {_C.build_info()['cuda_reason']}"
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if why:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def synchronized():
    """A kernel's error belongs to the test that launched it."""
    yield
    torch.cuda.synchronize()
