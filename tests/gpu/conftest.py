"""Tests that need a CUDA device: each is marked `gpu`, and skipped, loudly counted, where there is none.

After some errors (an access out of bounds, an assertion) a process cannot use its GPU any more, and whatever runs after
that fails for nothing. So the run ends there, and says so in a line that prove.py finds: it runs the tests after that
one (`--after ID`) in another process.
"""

from collections.abc import Iterator

import pytest
import torch
from alula import _C


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--after", metavar="ID", help="only the tests that come after this one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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
    last = config.getoption("--after", default=None)
    ids = [item.nodeid for item in items]
    if last in ids:
        items[:] = items[ids.index(last) + 1 :]


@pytest.fixture(autouse=True)
def synchronized(request: pytest.FixtureRequest) -> Iterator[None]:
    """A kernel's error belongs to the test that launched it."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        request.session.shouldstop = f"the GPU is lost after {request.node.nodeid}"
        raise
