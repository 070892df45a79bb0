"""The operations on a GPU as methods call them: which implementation runs, that it changes no integer, and a
whole model with and without kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import ops, tuning
from kernels.reference import (
    PackedWeight,
    Quantised,
    dequantise,
    dequantise_weight,
    pack_weight,
    quantise,
)
from methods.bits import Bits
from methods.method import Context
from methods.pipeline import quantise as quantise_model
from methods.registry import parse_method
from tests import families
from tests.equality import same
from tests.methods.small_checkpoint import CALIBRATION, save

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda", 0)
if torch.cuda.is_available() and (reason := ops.no_kernels_on(CUDA)) is not None:
    pytest.skip(reason, allow_module_level=True)

BF16, F32 = torch.bfloat16, torch.float32
IDS = families.tokens(2, 24, seed=3)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    ops.reset_implementations()
    yield
    ops.reset_implementations()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 0] *= 30
    return x.to(CUDA, dtype)


def weight(outputs: int, inputs: int, groups: int = 1) -> PackedWeight:
    q = quantise(draw(outputs, inputs, seed=1), 4, symmetric=True, group=inputs // groups)
    return pack_weight(q.codes, q.scale, None, 4)


def both(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What the kernel returns, which must have run, and what the reference does."""
    ops.reset_implementations()
    kernel = call()
    (counts,) = ops.implementations().values()
    assert counts == {"triton": 1}
    with ops.reference_only():
        reference = call()
    (counts,) = ops.implementations().values()
    assert counts.pop("triton") == 1 and all("asked for" in name for name in counts)
    return kernel, reference


@pytest.mark.parametrize("rows", [1, 7, ops.FEW_ROWS, ops.FEW_ROWS + 1, 300])
@pytest.mark.parametrize(("outputs", "inputs"), [(960, 576), (72, 96), (4096, 4096)])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_linear_of_codes_is_the_references_to_the_bit(
    rows: int, outputs: int, inputs: int, bits: int
) -> None:
    w = weight(outputs, inputs)
    x = draw(rows, inputs, dtype=BF16)
    x[rows // 2] = 0
    if rows > 2:
        x[0, 3] = float("inf")
    q = quantise(x, bits, symmetric=True)
    extras: list[dict[str, Any]] = [{}, {"bias": draw(outputs, dtype=BF16), "row_scale": draw(rows, 1).abs()}]
    for extra in extras:
        for dtype in (BF16, F32):
            kernel, reference = both(partial(ops.linear, q, w, dtype=dtype, **extra))
            assert same(kernel, reference)


@pytest.mark.parametrize("rows", [1, 33])
def test_kept_channels_are_added_in_float32(rows: int) -> None:
    q, w = quantise(draw(rows, 512), 4, symmetric=True), weight(256, 512)
    x_keep, w_keep = draw(rows, 64, seed=2, dtype=BF16), draw(256, 64, seed=3, dtype=BF16)
    kernel, _ = both(lambda: ops.linear(q, w, x_keep=x_keep, w_keep=w_keep, dtype=F32))
    exact = (
        dequantise(q).double() @ dequantise_weight(w, torch.float64).T + x_keep.double() @ w_keep.double().T
    )
    assert families.relative(kernel, exact) < 1e-5


@pytest.mark.parametrize("rows", [1, 5, ops.FEW_ROWS])
def test_a_linear_of_floats_is_as_near_to_the_exact_one_as_the_reference(rows: int) -> None:
    w, x = weight(384, 1024, groups=8), draw(rows, 1024, dtype=BF16)
    kernel, reference = both(lambda: ops.linear(x, w, dtype=BF16))
    exact = x.double() @ dequantise_weight(w, torch.float64).T
    assert families.relative(kernel, exact) <= 2 * families.relative(reference, exact) + 1e-6


@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, True), (8, False)])
def test_quantise_is_the_references_to_the_bit(dtype: torch.dtype, bits: int, symmetric: bool) -> None:
    x = draw(70, 576, dtype=dtype)
    x[3], x[5, 7], x[6, 8] = 0, float("nan"), float("inf")
    kernel, reference = both(lambda: ops.quantise(x, bits, symmetric=symmetric, clip=0.9))
    assert_same_codes(kernel, reference)


def assert_same_codes(a: Quantised, b: Quantised) -> None:
    finite = b.scale.isfinite().expand_as(b.codes)
    assert same(a.scale, b.scale) and torch.equal(a.codes[finite], b.codes[finite])
    assert (a.zero is None) == (b.zero is None)
    if a.zero is not None and b.zero is not None:
        rows = b.scale.isfinite()
        assert torch.equal(a.zero[rows], b.zero[rows])


def test_fused_passes_quantise_nearly_the_same_numbers() -> None:
    """Sums in another order move a scale by its last bits and a few codes by one."""
    x = draw(33, 1536, dtype=BF16)
    add = x.flip(0)
    for extra in (None, add):
        quantiser: Any = {"bits": 8, "symmetric": True}
        norms = both(lambda: ops.rmsnorm_quantise(x, add=extra, eps=1e-5, **quantiser))  # noqa: B023
        assert families.relative(norms[0].rms, norms[1].rms) < 1e-6
        assert torch.equal(norms[0].stream, norms[1].stream)
        near(norms[0].codes, norms[1].codes)
        y, z = both(lambda: ops.rmsnorm(x, add=extra, eps=1e-5).normalised)  # noqa: B023
        assert families.relative(y, z) < 2**-7
    for gate in (None, add):
        (_, a), (_, b) = both(lambda: ops.hadamard_quantise(x, gate=gate, size=1536, **quantiser))  # noqa: B023
        near(a, b)
        y, z = both(lambda: ops.hadamard(x, gate=gate, size=1536))  # noqa: B023
        assert families.relative(y, z) < 2**-7
    near(*both(lambda: ops.quantise(x, 8, gate=add, symmetric=True)))
    y, z = both(lambda: ops.gated(add, x))
    assert families.relative(y, z) < 2**-7


def near(a: Quantised, b: Quantised) -> None:
    apart = (a.codes.int() - b.codes.int()).abs()
    assert int(apart.max()) <= 1 and float(apart.float().mean()) < 0.01
    assert torch.allclose(a.scale, b.scale, rtol=2**-7)


def test_what_a_kernel_refuses_runs_in_the_reference_and_is_named() -> None:
    x, w = draw(2, 96), weight(64, 96)
    ops.linear(x, w, dtype=F32)
    ops.quantise(draw(2, 96, dtype=BF16), 4, symmetric=True, group=32)
    found = ops.implementations()
    for operation, reason in (("linear w4a16", "float32"), ("quantise a4", "groups of 32")):
        (name,) = found[operation]
        assert name.startswith("reference (") and reason in name


def test_a_captured_graph_with_weights_at_rest_replays_the_same_bits() -> None:
    x, first, second = draw(4, 576, dtype=BF16), weight(1536, 576), weight(576, 1536)

    def run() -> Tensor:
        q = ops.quantise(x, 8, symmetric=True)
        y = ops.linear(q, first, dtype=BF16)
        _, q = ops.hadamard_quantise(y, size=1536, bits=8, symmetric=True)
        return ops.linear(q, second, dtype=BF16)

    with ops.weights_at_rest():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
    for seed in range(5):
        x.copy_(draw(4, 576, seed=seed, dtype=BF16))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, run())


@pytest.mark.parametrize("bits", ["w4a8kv8", "w4a16"])
def test_a_model_with_kernels_is_as_near_to_the_exact_one(tmp_path: Path, bits: str) -> None:
    checkpoint = save(tmp_path, "llama-gqa-tied")

    def decoder(device: str, dtype: torch.dtype) -> Any:
        return quantise_model(
            checkpoint,
            parse_method("quarot:rounding=rtn"),
            Bits.parse(bits),
            Context(torch.device(device)),
            calibration=CALIBRATION,
            dtype=dtype,
            execution="int4",
        ).decoder

    exact = decoder("cpu", torch.float64)(IDS)
    model = decoder("cuda", BF16)
    for ids in (IDS, IDS[:1, :8]):
        ops.reset_implementations()
        kernels = model(ids.cuda()).cpu()
        linear = "linear w4a16" if bits == "w4a16" else "linear w4a8"
        assert "triton" in ops.implementations()[linear]
        assert torch.equal(model(ids.cuda()).cpu(), kernels)
        with ops.reference_only():
            reference = model(ids.cuda()).cpu()
        want = exact[: len(ids), : ids.shape[1]]
        assert families.relative(kernels, want) <= 2 * families.relative(reference, want) + 1e-3


def test_the_table_knows_this_gpu_by_name() -> None:
    name = tuning.gpu_name(CUDA)
    assert name == torch.cuda.get_device_name(0)
    table = tuning.read_table()
    if name not in table:
        pytest.skip(f"nothing was tuned on {name}")
    assert table[name]
