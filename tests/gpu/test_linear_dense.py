"""The linear for few rows of unquantised weights on a GPU: against float64, beside what the library gives."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import ops
from tests.equality import same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
if torch.cuda.is_available() and (reason := ops.no_kernels_on(torch.device("cuda", 0))) is not None:
    pytest.skip(reason, allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")

DTYPES = (torch.bfloat16, torch.float16)
ROWS = (1, 2, 3, 5, 8, 9, 13, 16)


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """What the allocator hands out next is NaN: an element that is not written shows."""
    for size in (2**12, 2**16, 2**20, 2**24):
        torch.full((size,), float("nan"), device="cuda")
    torch.cuda.synchronize()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    ops.reset_implementations()
    yield
    ops.reset_implementations()


def dense():  # type: ignore[no-untyped-def]
    from kernels.triton import linear_dense

    return linear_dense


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    random = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(*shape, device="cuda", generator=random).to(dtype)


def operands(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x with channels of other sizes, a weight, a bias."""
    x = draw(rows, inputs, seed=1, dtype=dtype)
    x[:, : min(inputs, 3)] *= 20
    return x, (draw(outputs, inputs, seed=2) / inputs**0.5).to(dtype), draw(outputs, seed=3, dtype=dtype)


def assert_close(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """Within one rounding to the result's type and float32's error for sums of products; and where there are
    many results, no further from float64 as a whole than half as far again as the library's."""
    want, size = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    if bias is not None:
        want, size = want + bias.double(), size + bias.double().abs()
    assert y.dtype == x.dtype and y.shape == want.shape
    error = (y.double() - want).abs()
    bound = want.abs() * torch.finfo(y.dtype).eps / 2 + size * 2e-5 + torch.finfo(y.dtype).tiny
    assert bool((error <= bound).all()), float((error / bound).max())
    if error.numel() >= 100:
        library = (F.linear(x, w, bias).double() - want).norm()
        assert float(error.norm()) <= 1.5 * float(library)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [8, 72, 576, 1000, 1536, 4096, 14336])
@pytest.mark.parametrize("outputs", [1, 15, 16, 100, 577])
def test_ragged_shapes(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    for rows in ROWS:
        x, w, bias = operands(rows, outputs, inputs, dtype)
        assert_close(dense().dense(x, w), x, w)
        y = dense().dense(x, w, bias)
        assert_close(y, x, w, bias)
        assert torch.equal(dense().dense(x, w, bias, overlapped=True), y)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [(6144, 4096), (28672, 4096), (4096, 14336), (4608, 3584), (3584, 18944), (2048, 2048), (2048, 8192)],
)
def test_models_widths(outputs: int, inputs: int, rows: int) -> None:
    x, w, bias = operands(rows, outputs, inputs, torch.bfloat16)
    assert_close(dense().dense(x, w), x, w)
    assert_close(dense().dense(x, w, bias, overlapped=True), x, w, bias)


@pytest.mark.parametrize("rows", [1, 16])
def test_a_head_of_half_a_billion_weights(rows: int) -> None:
    x, w, _ = operands(rows, 128256, 4096, torch.bfloat16)
    y = dense().dense(x, w)
    for part in (slice(0, 300), slice(64000, 64300), slice(128256 - 300, None)):
        assert_close(y[:, part], x, w[part])
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("share", range(4))
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 300, 4096), (16, 129, 4096), (9, 200, 14336)])
def test_every_choice(rows: int, outputs: int, inputs: int, share: int) -> None:
    """A quarter of the choices a test, so that several processes compile them."""
    x, w, bias = operands(rows, outputs, inputs, torch.bfloat16)
    for choice in dense().candidates(rows, outputs, inputs)[share::4]:
        y = dense().dense(x, w, bias, choice=choice)
        assert_close(y, x, w, bias)
        for _ in range(3):  # the same bits each time
            assert torch.equal(dense().dense(x, w, bias, choice=choice, overlapped=True), y), choice


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_stand_where_they_belong(dtype: torch.dtype) -> None:
    """One input at a time, over all of K: each weight stands alone in the result, to the bit."""
    inputs = 1160
    w = draw(37, inputs, dtype=dtype)
    for rows in (1, 8, 16):
        for choice in dense().candidates(rows, 37, inputs)[::3]:
            for first in range(0, inputs - rows + 1, rows):
                x = torch.zeros(rows, inputs, dtype=dtype, device="cuda")
                x[range(rows), range(first, first + rows)] = 1
                found = dense().dense(x, w, choice=choice)
                assert torch.equal(found, w.T[first : first + rows]), (choice, first)


def test_shapes_and_strides() -> None:
    x, w, bias = operands(6, 100, 512, torch.bfloat16)
    want = dense().dense(x, w, bias)
    assert torch.equal(dense().dense(x.view(2, 3, 512), w, bias), want.view(2, 3, 100))
    assert dense().dense(x[:0], w, bias).shape == (0, 100)
    assert torch.equal(dense().dense(x[:1], w, bias)[0], dense().dense(x[0], w, bias))
    wide = torch.full((6, 1024), float("nan"), dtype=torch.bfloat16, device="cuda")
    for begin in (0, 8, 3, 512):  # taken as they lie, or copied where that is not possible
        wide.fill_(float("nan"))
        wide[:, begin : begin + 512] = x
        assert torch.equal(dense().dense(wide[:, begin : begin + 512], w, bias), want), begin
        apart = wide.view(2, 3, 1024)[..., begin : begin + 512]
        assert torch.equal(dense().dense(apart, w, bias), want.view(2, 3, 100)), begin
    turned = x.t().contiguous().t()
    assert torch.equal(dense().dense(turned, w, bias), want)
    every_second = torch.empty(12, 512, dtype=torch.bfloat16, device="cuda")
    every_second[::2] = x
    assert torch.equal(dense().dense(every_second[::2], w, bias), want)


def test_bad_rows_keep_to_themselves() -> None:
    x, w, _ = operands(6, 100, 512, torch.bfloat16)
    clean = dense().dense(x, w)
    x[2, 5], x[4, 7] = float("nan"), float("inf")
    y = dense().dense(x, w)
    assert bool(y[2].isnan().all()) and not bool(y[4].isfinite().any())
    rest = [0, 1, 3, 5]
    assert torch.equal(y[rest], clean[rest])
    w[9, 3] = float("nan")
    bad = dense().dense(x, w)
    assert bool(bad[:, 9].isnan().all())
    others = [n for n in range(100) if n != 9]
    assert same(bad[:, others], y[:, others])


def test_graphs_are_captured_and_replayed() -> None:
    x, w, bias = operands(4, 577, 1536, torch.bfloat16)
    want = dense().dense(x, w, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [dense().dense(x, w, bias, overlapped=early) for early in (False, True, True)]
    for _ in range(3):
        for y in found:
            y.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(y, want) for y in found)
    x.copy_(x.flip(0))
    graph.replay()
    assert all(torch.equal(y, want.flip(0)) for y in found)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_a_chain_of_early_launches_sees_what_came_before(rows: int) -> None:
    """Linears of several widths, each launched while the one that makes its inputs may still run, between
    norms that are launched so too; launched, captured and replayed many times."""
    widths = (4096, 14336, 4096, 6144, 576, 4096)
    weights = [draw(n, k, seed=n) / k**0.5 for k, n in pairwise(widths)]
    x = draw(rows, 4096, seed=7)

    def chain() -> Tensor:
        y = x
        for _ in range(4):
            for w in weights:
                y = ops.dense(ops.rmsnorm(y, eps=1e-5).normalised, w)
        return y

    with ops.reference_only():
        reference = chain()
    want = chain()
    assert float((want.double() - reference.double()).norm() / reference.double().norm()) < 0.1
    with ops.weights_at_rest():
        for _ in range(5):
            assert torch.equal(chain(), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = chain()
    for _ in range(20):
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, want)


def test_the_operation_runs_the_kernel_where_it_may() -> None:
    x, w, bias = operands(16, 100, 512, torch.bfloat16)
    assert torch.equal(ops.dense(x, w, bias), dense().dense(x, w, bias))
    assert ops.implementations() == {"dense": {"triton": 1}}
    many = torch.cat((x, x[:1]))
    learned = nn.Parameter(w.clone())
    for given, weight in ((many, w), (x.float(), w.float()), (x.double(), w.double()), (x, learned)):
        of = bias.to(given.dtype)
        assert torch.equal(ops.dense(given, weight, of), F.linear(given, weight, of))
    ops.dense(x, learned).float().square().sum().backward()
    assert learned.grad is not None and bool(learned.grad.isfinite().all())
    with torch.no_grad():
        assert torch.equal(ops.dense(x, learned, bias), dense().dense(x, w, bias))
    assert ops.implementations()["dense"] == {
        "triton": 2,
        "reference (more than 16 rows)": 1,
        "reference (inputs in torch.float32)": 1,
        "reference (inputs in torch.float64)": 1,
        "reference (inputs that need gradients)": 2,
    }
