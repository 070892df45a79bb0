"""Weights dequantised on a GPU, and their linear, against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels import ops, reference
from kernels.reference import PackedWeight, pack_weight
from tests.equality import same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytest.importorskip("triton", reason="needs triton")


def weight(n: int, k: int, group: int, zeros: bool) -> PackedWeight:
    """All codes; scales over many magnitudes, some that overflow, vanish or are no numbers."""
    g = torch.Generator().manual_seed(n + k + group)
    scale = torch.exp(4 * torch.randn(n, k // group, generator=g))
    scale[0, 0], scale[n // 2, -1], scale[n - 1, 0] = 6e4, 1e-41, float("nan")
    codes = torch.randint(-8, 8, (n, k), generator=g, dtype=torch.int8)
    if not zeros:
        return pack_weight(codes, scale, None, 4)
    return pack_weight((codes + 8).to(torch.uint8), scale, torch.randn(scale.shape, generator=g) * 8, 4)


def on_gpu(w: PackedWeight) -> PackedWeight:
    zero = None if w.zero is None else w.zero.cuda()
    return replace(w, packed=w.packed.cuda(), scale=w.scale.cuda(), zero=zero)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(1, 32, 32), (5, 96, 16), (129, 576, 64), (100, 1056, 1056), (4096, 4096, 128), (33, 14336, 14336),
     (20000, 512, 32)],
)  # fmt: skip
def test_dequantised_weights_are_the_references_bit_for_bit(n: int, k: int, group: int, zeros: bool) -> None:
    from kernels.triton import dequantise

    w = weight(n, k, group, zeros)
    for dtype in (torch.bfloat16, torch.float16):
        torch.full((n * k,), float("nan"), dtype=dtype, device="cuda")  # what is lent next is NaN
        assert same(dequantise.dequantise(on_gpu(w), dtype), reference.dequantise_weight(w, dtype))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_linear_is_the_references_on_the_same_gpu(dtype: torch.dtype, zeros: bool) -> None:
    """The same weight in the same dense product: the same bits. Of few rows, those with groups that their own
    kernel does not take."""
    g = torch.Generator().manual_seed(1)
    few = ((1, 520, 1024, 32, 0), (7, 264, 576, 64, 0), (33, 100, 96, 16, 0))
    for rows, n, k, group, keep in (*few, (65, 520, 1024, 128, 0), (300, 264, 576, 64, 16)):
        w = weight(n, k, group, zeros)
        w = on_gpu(replace(w, scale=w.scale.nan_to_num(1.0).clamp(0.01, 0.1)))
        x = torch.randn(rows, k, generator=g).to(dtype).cuda()
        others: dict[str, Any] = {
            "bias": torch.randn(n, generator=g).to(dtype).cuda(),
            "row_scale": torch.rand(rows, 1, generator=g).cuda(),
        }
        if keep:
            others["x_keep"] = torch.randn(rows, keep, generator=g).to(dtype).cuda()
            others["w_keep"] = torch.randn(n, keep, generator=g).to(dtype).cuda()
        for keywords in ({}, others):
            for result in (dtype, torch.float32):
                ops.reset_implementations()
                y = ops.linear(x, w, dtype=result, **keywords)
                assert ops.implementations() == {"linear w4a16": {"triton": 1}}
                with ops.reference_only():
                    assert same(y, ops.linear(x, w, dtype=result, **keywords))


def test_it_can_be_captured() -> None:
    w = on_gpu(weight(264, 512, 32, False))  # which the kernel for few rows does not take
    w = replace(w, scale=w.scale.nan_to_num(1.0).clamp(0.01, 0.1))
    x = torch.randn(40, 512, device="cuda").bfloat16()
    want = ops.linear(x, w, dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), ops.weights_at_rest():
        found = ops.linear(x, w, dtype=torch.bfloat16)
    found.fill_(float("nan"))
    graph.replay()
    assert torch.equal(found, want)
