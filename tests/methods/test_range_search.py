"""Ranges of least L_p error: against a search over the values themselves by scipy."""

from __future__ import annotations

import math

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.reference import fake_quantise
from methods.bits import ActivationSpec
from methods.errors import UserError
from methods.range_search import Histogram


def found(x: Tensor, spec: ActivationSpec, norm: float = 2.0) -> tuple[Tensor, Tensor | None]:
    histogram = Histogram(norm)
    for part in x.split(1000):
        histogram.add(part)
    return histogram.range("x", spec)


def error(x: Tensor, scale: Tensor, zero: Tensor | None, spec: ActivationSpec, norm: float) -> float:
    y = fake_quantise(x[None], spec.bits, symmetric=spec.symmetric, scale=scale, zero=zero)[0]
    return float((x - y).abs().pow(norm).mean())


def sample(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, generator=generator, dtype=torch.float64)
    if kind == "one-sided":
        return x.abs() * 3
    if kind == "shifted":
        return x + 1.5
    if kind == "massive":
        x[:3] = torch.tensor([900.0, -40.0, 700.0])
    return x


# Of L_4 three massive values would be all, and a range that happens to have codes there the best.
@pytest.mark.parametrize(
    ("kind", "norm"),
    [("normal", 2), ("normal", 4), ("one-sided", 2), ("shifted", 2), ("shifted", 4), ("massive", 2)],
)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_no_search_over_the_values_themselves_finds_much_less(kind: str, bits: int, norm: float) -> None:
    x = sample(kind)
    spec = ActivationSpec(bits, symmetric=False, static=True)
    mine = error(x, *found(x, spec, norm), spec, norm)
    top = 2**bits - 1

    def loss(ends: tuple[float, float]) -> float:
        low, high = -abs(ends[0]), abs(ends[1])
        scale = max(high - low, 1e-9) / top
        zero = torch.tensor(-low / scale, dtype=torch.float64).round()
        return error(x, torch.tensor(scale, dtype=torch.float64), zero, spec, norm)

    low, high = float(x.min().clamp(max=0)), float(x.max())
    starts = [(share * low, share * high) for share in (1.0, 0.3, 0.1, 0.03, 0.01, 0.004)]
    options = {"maxfev": 120, "xatol": 1e-4}
    best = min(
        scipy.optimize.minimize(loss, start, method="Nelder-Mead", options=options).fun for start in starts
    )
    assert mine <= 1.1 * best


def test_a_range_of_extremes_is_far_worse_with_massive_values() -> None:
    x = sample("massive")[3:]
    spec = ActivationSpec(4, symmetric=False, static=True)
    scale, zero = found(sample("normal"), spec)
    wide = torch.tensor((900.0 + 40.0) / 15, dtype=torch.float64)
    assert error(x, scale, zero, spec, 2) < 0.1 * error(x, wide, (40 / wide).round(), spec, 2)


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_whatever_is_seen_gets_a_usable_range(values: list[float], bits: int, symmetric: bool) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    scale, zero = found(x, ActivationSpec(bits, symmetric=symmetric, static=True))
    assert scale.dtype == torch.float32
    assert scale.shape == ()
    assert math.isfinite(float(scale))
    assert float(scale) > 0
    assert (zero is None) == symmetric
    if zero is not None:
        assert float(zero) == round(float(zero))
        assert 0 <= float(zero) <= 2**bits - 1


def test_symmetric_by_the_best_of_a_fine_grid() -> None:
    x = sample("normal")
    spec = ActivationSpec(4, symmetric=True, static=True)
    mine = error(x, *found(x, spec), spec, 2)
    grid = [
        error(x, torch.tensor(s, dtype=torch.float64), None, spec, 2)
        for s in torch.linspace(0.1, 0.8, 200).tolist()
    ]
    assert mine <= 1.03 * min(grid)


def test_refusals() -> None:
    spec = ActivationSpec(4, symmetric=False, static=True)
    with pytest.raises(UserError, match="static range of x needs calibration tokens"):
        Histogram(2.0).range("x", spec)
    for bad in (math.nan, math.inf):
        histogram = Histogram(2.0)
        histogram.add(torch.tensor([1.0, bad]))
        histogram.add(torch.tensor([1.0, 2.0]))
        with pytest.raises(UserError, match="not finite"):
            histogram.range("x", spec)
