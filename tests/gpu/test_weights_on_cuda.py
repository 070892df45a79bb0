"""Rounding weights on a GPU: the kernels against loops in numpy and the reference on the CPU, and
whole matrices by GPTQ against the reference on the same GPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import ops, weight_reference
from methods.bits import LinearSpec
from methods.gptq import Hessian, solve
from methods.linear import QuantisedWeight
from tests.equality import same
from tests.kernels.interpreted_fused import random

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytest.importorskip("triton", reason="needs triton")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What the allocator hands out next is NaN; the account is empty."""
    for size in (2**12, 2**16, 2**20, 2**24):
        torch.full((size,), -1, dtype=torch.int32, device="cuda")
    ops.reset_implementations()
    yield
    ops.reset_implementations()


@pytest.mark.parametrize("turn", range(7))
def test_a_block_is_the_one_of_plain_loops(turn: int) -> None:
    from kernels.triton.gptq_block import gptq_block
    from tests.kernels.interpreted_weights import BLOCKS, block, once, walked

    rows, n, bits, symmetric, group = BLOCKS[turn]
    operands = block(40 * rows + 3, n, bits, symmetric, group)
    there = [None if t is None else t.cuda() for t in operands]
    weight, factor, scale, zero = there
    assert weight is not None and factor is not None and scale is not None
    torch.cuda.set_sync_debug_mode("error")  # an answer that is waited for raises
    try:
        codes, errors = gptq_block(weight, factor, scale, zero, bits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = walked(*operands, bits, once, np.float32)
    assert same(codes, want[0]) and same(errors, want[1])
    assert same(weight, operands[0])


def test_views() -> None:
    """Columns of a larger matrix, a factor in columns, one scale for a whole row."""
    from kernels.triton.gptq_block import gptq_block
    from tests.kernels.interpreted_weights import block

    weight, factor, scale, zero = (None if t is None else t.cuda() for t in block(301, 128, 4, False, 128))
    assert weight is not None and factor is not None and scale is not None and zero is not None
    codes, errors = gptq_block(weight, factor, scale, zero, 4)
    wide = torch.full((301, 577), float("nan"), device="cuda")
    for place in (128, 129):
        wide[:, place : place + 128] = weight
        found = gptq_block(
            wide[:, place : place + 128],
            factor.T.contiguous().T,
            scale[:, :1].expand(301, 128),
            zero.T.contiguous().T,
            4,
        )
        assert same(found[0], codes) and same(found[1], errors)


@pytest.mark.parametrize(
    ("n", "bits"), [(8, 4), (32, 4), (128, 3), (100, 2), (576, 4), (4096, 4), (14336, 8), (32768, 4)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_are_the_reference_s(n: int, bits: int, symmetric: bool) -> None:
    from kernels.triton.find_range import find_range
    from tests.kernels.interpreted_weights import hard_weights, same_ranges

    rows = hard_weights(min(1000, 2**20 // n), n)
    there = rows.cuda()
    for search in (True, False):
        torch.cuda.set_sync_debug_mode("error")
        try:
            scale, zero = find_range(there, bits, symmetric, search)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = scale.cpu(), None if zero is None else zero.cpu()
        assert same_ranges(rows, bits, symmetric, search, found) <= (0.01 * len(rows) if search else 0)


def layer(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """A weight and inputs whose channels share directions and differ in size."""
    mix = random(inputs, inputs, seed=1) / inputs**0.5 + 0.3 * torch.eye(inputs)
    size = torch.rand(inputs, generator=torch.Generator().manual_seed(2)) * 3 + 0.1
    return random(outputs, inputs, seed=3).cuda(), ((random(4096, inputs, seed=4) @ mix) * size).cuda()


def output_error(q: QuantisedWeight, weight: Tensor, inputs: Tensor) -> float:
    return float((inputs.double() @ (q.dequantise() - weight).double().T).norm())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [None, 32, 64, 128, 192])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_the_reference_s(symmetric: bool, group: int | None, act_order: bool) -> None:
    """But for ties: of quotients that are rounded, and of ranges, which move a whole group."""
    weight, inputs = layer(768, 1152)
    hessian = Hessian()
    hessian.add(inputs)
    assert hessian.matrix is not None
    for search in (False, True):
        spec = LinearSpec(4, group=group, symmetric=symmetric, search=search)
        ops.reset_implementations()
        found = solve(weight, hessian.matrix, spec, damp=0.01, act_order=act_order)
        ran = {name for counts in ops.implementations().values() for name in counts}
        assert ran == {"triton"}
        with ops.reference_only():
            want = solve(weight, hessian.matrix, spec, damp=0.01, act_order=act_order)
        equal = float((found.codes == want.codes).double().mean())
        assert equal >= (0.99 if search else 0.999), equal
        assert output_error(found, weight, inputs) <= 1.001 * output_error(want, weight, inputs)


def test_float64_takes_the_reference() -> None:
    weight, inputs = layer(8, 160)
    hessian = Hessian()
    hessian.add(inputs.double())
    assert hessian.matrix is not None
    found = solve(weight.double(), hessian.matrix, LinearSpec(4), damp=0.01, act_order=False)
    assert ops.implementations() == {
        "find_range w4": {"reference (torch.float64 weights)": 1},
        "gptq_block w4": {"reference (torch.float64 weights)": 2},
    }
    here = solve(weight.double().cpu(), hessian.matrix.cpu(), LinearSpec(4), damp=0.01, act_order=False)
    assert float((found.codes.cpu() == here.codes).double().mean()) == 1.0
    assert found.codes.dtype == weight_reference.code_dtype(True)
