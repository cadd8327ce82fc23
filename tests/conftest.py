"""The grid that op tests run on: every ISA this CPU has x every dtype, seeded per test.

A test that takes `isa` runs once per ISA, which is forced and afterwards restored; one that does not runs on the best.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path

import alula._library
import pytest
import torch
from alula import _C

# alula.bench is the folder bench/ of a checkout, also where alula is not installed but on PYTHONPATH.
alula.__path__.append(str(Path(__file__).resolve().parent.parent))

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.force_isa(request.param)
    assert _C.isa() == request.param
    yield request.param
    _C.force_isa(before)


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """The same numbers on every run, others for every test."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of torch threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    gpu = {
        outcome: sum("gpu" in getattr(report, "keywords", ()) for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed", "skipped")
    }
    if gpu["skipped"]:
        line = f"{gpu['skipped']} GPU TESTS WERE SKIPPED: nothing in this run says anything about CUDA"
        terminalreporter.write_sep("=", line, red=True, bold=True)
    elif gpu["passed"] or gpu["failed"]:
        terminalreporter.write_sep("=", f"GPU tests: {gpu['passed']} passed, {gpu['failed']} failed, none skipped")
    else:
        terminalreporter.write_sep("=", "GPU tests: none exist in this run, none were skipped")
