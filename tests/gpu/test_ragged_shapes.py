"""One call of each kernel, and variant of it, on shapes that end inside every tile: few enough that a memory
checker gets through them,

    compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_ragged_shapes.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import ops, reference
from kernels.reference import pack_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytest.importorskip("triton", reason="needs triton")


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to("cuda", dtype)


@pytest.mark.parametrize("rows", [1, 9, 31, 33, 65, 129, 200])
@pytest.mark.parametrize(
    ("outputs", "inputs", "keep"), [(1, 32, 0), (100, 96, 0), (129, 288, 16), (131, 608, 0)]
)
def test_linears(rows: int, outputs: int, inputs: int, keep: int) -> None:
    x, weight = random(rows, inputs), random(outputs, inputs)
    q = reference.quantise(weight, 4, symmetric=True)
    w = pack_weight(q.codes, q.scale, None, 4)
    kept: dict[str, Any] = {}
    if keep:
        kept = {"x_keep": random(rows, keep), "w_keep": random(outputs, keep)}
    bias, row_scale = random(outputs), random(rows, 1, dtype=torch.float32)
    ops.reset_implementations()
    for at_rest in (False, True):
        for bits, dtype in ((8, torch.bfloat16), (4, torch.float32)):
            codes = ops.quantise(x, bits, symmetric=True)
            if at_rest:
                with ops.weights_at_rest():
                    y = ops.linear(codes, w, **kept, bias=bias, row_scale=row_scale, dtype=dtype)
            else:
                y = ops.linear(codes, w, **kept, dtype=dtype)
            assert bool(y.isfinite().all())
            if not at_rest and not keep:
                with ops.reference_only():
                    assert torch.equal(y, ops.linear(codes, w, dtype=dtype))
    assert bool(ops.linear(x, w, **kept, bias=bias, dtype=torch.bfloat16).isfinite().all())
    for operation, found in ops.implementations().items():
        others = {name for name in found if not name.startswith("reference (asked for")}
        assert others == {"triton"}, (operation, found)


@pytest.mark.parametrize("rows", [1, 9, 16])
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(1, 32, 32), (129, 608, 608), (2201, 1280, 128)])
def test_linears_that_hold_their_inputs(rows: int, outputs: int, inputs: int, group: int) -> None:
    from kernels.triton import linear_a16

    x, weight = random(rows, inputs), random(outputs, inputs)
    for symmetric in (True, False):
        q = reference.quantise(weight, 4, symmetric=symmetric, group=group)
        w = pack_weight(q.codes, q.scale, q.zero, 4)
        for warps, piece, ahead in ((16, 128, 2), (4, 64, 3)):
            choice = linear_a16.Choice(warps=warps, ahead=ahead, registers=128, piece=piece, held=1)
            for at_rest in (False, True):
                y = linear_a16.linear(
                    x, w, bias=random(outputs), dtype=torch.bfloat16, choice=choice, weights_at_rest=at_rest
                )
                assert bool(y.isfinite().all())


@pytest.mark.parametrize("rows", [1, 3, 130])
@pytest.mark.parametrize(("n", "size", "inner"), [(32, 32, 1), (576, 576, 1), (864, 24, 36), (1536, 1536, 1)])
def test_passes(rows: int, n: int, size: int, inner: int) -> None:
    x = random(rows, n)
    ops.reset_implementations()
    for keep in (0, 5):
        for symmetric in (True, False):
            quantiser: Any = {"bits": 4, "symmetric": symmetric}
            q = ops.rmsnorm_quantise(x, add=x, eps=1e-5, gain=x[0], keep=keep, **quantiser).codes
            assert bool(q.scale.isfinite().all())
            for gate in (None, x):
                _, q = ops.hadamard_quantise(x, gate=gate, size=size, inner=inner, keep=keep, **quantiser)
                assert bool(q.scale.isfinite().all())
    assert bool(ops.hadamard(x, gate=x, size=size, inner=inner).isfinite().all())
    assert bool(ops.rmsnorm(x, add=x, eps=1e-5, gain=x[0]).normalised.isfinite().all())
    assert bool(ops.gated(x, x).isfinite().all())
    ran = ops.implementations()
    assert all(set(found) == {"triton"} for found in ran.values()), ran
