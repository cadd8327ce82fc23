"""The host executor of CUDA kernels: it computes what a GPU would, and reports each planted mistake."""

from collections.abc import Iterator

import pytest
import torch
from alula.testing.compare import assert_close
from simt_process import DTYPES, ORDERS, Executor, Fault

THREADS = 128


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    executor = Executor()
    yield executor
    executor.close()


def run_sum(executor: Executor, mistake: int, order: str = "forward", blocks: int = 2) -> torch.Tensor:
    x = torch.randn(blocks * THREADS)
    zero = torch.zeros(1, dtype=torch.int32)
    values = {"x": x, "y": torch.zeros(blocks), "counter": zero, "blocks": zero}
    y = executor.call("sum", results=("y",), order=order, mistake=mistake, n=len(x), threads=THREADS, **values)["y"]
    assert_close(y, x.double().view(blocks, THREADS).sum(1))
    return y


@pytest.mark.parametrize("order", ORDERS)
def test_a_right_kernel_gives_the_right_sums_in_every_order(executor: Executor, order: str) -> None:
    run_sum(executor, 0, order, blocks=5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "mistake, report",
    [
        (1, r"heap-buffer-overflow.*\n?.*WRITE of size 4"),
        (2, r"heap-buffer-overflow.*\n?.*READ of size 4"),
        (3, r"heap-buffer-overflow.*\n?.*READ of size 4"),
        (4, r"misaligned address"),
        (5, r"shared memory (race|read).*(reads what thread \d+ wrote|nobody has written)"),
        (6, r"shared memory race.*with no barrier between"),
        (7, r"shared memory race.*(writes what thread|reads what thread)"),
        (8, r"shared memory read at byte 512, which nobody has written"),
        (9, r"shared memory write of 4 bytes at byte 528, out of the block's 528"),
        (10, r"deadlock.*__syncthreads faults.cu:\d+.*__shfl_xor_sync faults.cu:\d+|race|nobody has written"),
        (11, r"deadlock.*threads 64-127 have ended|race|nobody has written"),
        (12, r"deadlock.*threads 0-15 at __shfl_xor_sync.*threads 16-31 at __shfl_xor_sync"),
        (14, r"__shfl_sync reads lane 20, which does not take part"),
        (15, r"is read while an asynchronous copy into it is under way"),
        (16, r"race|nobody has written|under way"),
        (17, r"ends with asynchronous copies under way"),
        (19, r"some threads ended without wait_for_previous_kernel"),
        (20, r"let_next_kernel_start\(\) before wait_for_previous_kernel"),
        (21, r"is written while an asynchronous copy into it is under way"),
        (22, r"is written while an asynchronous copy into it is under way"),
        (23, r"counted before what thread 0 wrote is sure to be there"),
        (24, r"counted before what thread 1 wrote is sure to be there"),
        (25, r"__shfl_xor_sync at faults.cu:\d+ by lane 16, which its mask leaves out|reads lane \d+, which does not"),
    ],
)
def test_a_planted_mistake_is_reported(executor: Executor, mistake: int, report: str, order: str) -> None:
    with pytest.raises(Fault, match=report) as caught:
        run_sum(executor, mistake, order)
    assert "sum_kernel" in str(caught.value) or "faults.cu" in str(caught.value)


def test_a_wrong_lane_gives_wrong_sums_or_is_reported(executor: Executor) -> None:
    with pytest.raises((AssertionError, Fault)):
        run_sum(executor, 13)


def test_a_kernel_that_relies_on_the_order_of_blocks_gives_other_sums(executor: Executor) -> None:
    with pytest.raises(AssertionError):
        run_sum(executor, 18, "forward")
    with pytest.raises(AssertionError):
        run_sum(executor, 18, "reverse")


def test_it_goes_on_after_a_fault(executor: Executor) -> None:
    for mistake in (1, 5, 12):
        with pytest.raises(Fault):
            run_sum(executor, mistake)
        run_sum(executor, 0)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrix_loads_and_products(executor: Executor, dtype: torch.dtype, is_transposed: bool) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    given = b if is_transposed else b.T.contiguous()
    sent = {"a": a, "b": given, "c": torch.zeros(16, 8), "dtype": DTYPES[dtype]}
    c = executor.call("product", results=("c",), is_transposed=is_transposed, **sent)["c"]
    assert_close(c, a.double() @ b.double())


def test_products_of_tf32(executor: Executor) -> None:
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    c = executor.call("product", results=("c",), dtype=0, is_transposed=False, a=a, b=b, c=torch.zeros(16, 8))["c"]
    assert_close(c, a.double() @ b.double(), tolerance=2e-3)
    a, b = (a * 8).round(), (b * 8).round()  # which TF32 holds exactly
    c = executor.call("product", results=("c",), dtype=0, is_transposed=False, a=a, b=b, c=torch.zeros(16, 8))["c"]
    assert_close(c, a.double() @ b.double(), tolerance=0.0)


def test_sums_of_products_are_cut_off_like_those_of_tensor_cores(executor: Executor) -> None:
    """1, and what is too small beside it: fp32 would round 15 times 2^-24 up, here each is lost by itself."""
    a, b = torch.zeros(16, 16), torch.zeros(16, 8)
    a[:, 0] = b[0] = 1.0
    a[0, 1:], a[1, 1:], a[2, 1:], a[3, 1:4] = 2.0**-12, -(2.0**-12), 2.0**-11, -(2.0**-11)
    b[1:] = 2.0**-12
    sent = {"a": a.half(), "b": b.half(), "c": torch.zeros(16, 8), "dtype": DTYPES[torch.float16]}
    c = executor.call("product", results=("c",), is_transposed=True, **sent)["c"][:4, 0]
    assert c.tolist() == [1.0, 1.0, 1.0 + 15 * 2.0**-23, 1.0 - 3 * 2.0**-23]
