"""The linear layer on packed weights: all combinations of operands against float64 and Python integers."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import integer, reference
from kernels.reference import (
    PackedWeight,
    Quantised,
    dequantise_weight,
    linear,
    pack_weight,
    quantise,
)

NAN, INF = float("nan"), float("inf")
FLOAT32_STEP = 2.0**-23


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Case:
    """One linear and its input. Group sizes are in channels; None is the whole row."""

    tokens: int
    outputs: int
    inputs: int
    w_bits: int = 4
    a_bits: int = 4
    w_symmetric: bool = True
    a_symmetric: bool = True
    w_group: int | None = None
    a_group: int | None = None
    fractional: bool = False
    colsum: bool = False
    keep: int = 0
    bias: bool = False
    row_scale: bool = False
    seed: int = 0

    def weight_codes(self) -> Quantised:
        w = random(self.outputs, self.inputs, seed=self.seed) + 0.2
        q = quantise(w, self.w_bits, symmetric=self.w_symmetric, group=self.w_group)
        if q.zero is not None and self.fractional:
            q = replace(q, zero=q.zero + 0.37)
        return q

    def weight(self) -> PackedWeight:
        q = self.weight_codes()
        return pack_weight(q.codes, q.scale, q.zero, q.bits, colsum=self.colsum)

    def x(self) -> Quantised:
        x = random(self.tokens, self.inputs, seed=self.seed + 1) * 3 - 0.4
        return quantise(x, self.a_bits, symmetric=self.a_symmetric, group=self.a_group, clip=0.9)

    def operands(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self.keep:
            found["x_keep"] = random(self.tokens, self.keep, seed=self.seed + 2)
            found["w_keep"] = random(self.outputs, self.keep, seed=self.seed + 3)
        if self.bias:
            found["bias"] = random(self.outputs, seed=self.seed + 4)
        if self.row_scale:
            found["row_scale"] = random(self.tokens, 1, seed=self.seed + 5).abs() + 0.1
        return found

    def run(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return linear(self.x(), self.weight(), **self.operands(), dtype=dtype)


def values(q: Quantised) -> np.ndarray:
    """What codes stand for, in float64."""
    width = q.codes.shape[-1] // q.scale.shape[-1]
    codes = q.codes.numpy().astype(np.float64)
    zero = 0.0 if q.zero is None else q.zero.double().numpy().repeat(width, -1)
    return (codes - zero) * q.scale.double().numpy().repeat(width, -1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    inputs = draw(st.sampled_from([1, 2, 7, 8, 24, 40, 65]))
    divisors = [None, *(g for g in range(1, inputs + 1) if inputs % g == 0 and g > 1)]
    return Case(
        tokens=draw(st.sampled_from([0, 1, 2, 5])),
        outputs=draw(st.sampled_from([1, 2, 9])),
        inputs=inputs,
        w_bits=draw(st.integers(2, 8)),
        a_bits=draw(st.integers(2, 8)),
        w_symmetric=draw(st.booleans()),
        a_symmetric=draw(st.booleans()),
        w_group=draw(st.sampled_from(divisors)),
        a_group=draw(st.sampled_from(divisors)),
        fractional=draw(st.booleans()),
        colsum=draw(st.booleans()),
        keep=draw(st.sampled_from([0, 3])),
        bias=draw(st.booleans()),
        row_scale=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@given(cases())
def test_quantised_inputs_against_float64(case: Case) -> None:
    x, w, rest = values(case.x()), values(case.weight_codes()), case.operands()
    want, size = x @ w.T, abs(x) @ abs(w).T
    parts = {name: part.double().numpy() for name, part in rest.items()}
    if case.keep:
        want, size = (
            want + parts["x_keep"] @ parts["w_keep"].T,
            size + abs(parts["x_keep"]) @ abs(parts["w_keep"]).T,
        )
    if case.bias:
        want, size = want + parts["bias"], size + abs(parts["bias"])
    if case.row_scale:
        want, size = want * parts["row_scale"], size * parts["row_scale"]
    got = case.run()
    assert got.shape == (case.tokens, case.outputs) and got.dtype == torch.float32
    # Three roundings for each sum of a group, one for each addition, two behind them.
    terms = case.inputs // (case.w_group or case.inputs) * (case.inputs // (case.a_group or case.inputs))
    assert (abs(got.double().numpy() - want) <= (terms + case.keep + 6) * FLOAT32_STEP * size).all()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(case.run(dtype), got.to(dtype))


@given(cases())
def test_the_integer_part_is_exact(case: Case) -> None:
    """To the bit: Python integers, then the float operations in the order that the docstring states."""
    case = replace(case, fractional=False, keep=0, bias=False, row_scale=False)
    x, w = case.x(), case.weight_codes()
    got = case.run()
    x_width, w_width = (case.inputs // q.scale.shape[-1] for q in (x, w))
    run = int(np.gcd(x_width, w_width))
    x_codes, w_codes = (
        q.codes.long() - (0 if q.zero is None else q.zero.long().repeat_interleave(width, -1))
        for q, width in ((x, x_width), (w, w_width))
    )
    for m, n in itertools.product(range(case.tokens), range(case.outputs)):
        total = np.float32(0)
        for start in range(0, case.inputs, run):
            exact = sum(
                a * b
                for a, b in zip(
                    x_codes[m, start : start + run].tolist(),
                    w_codes[n, start : start + run].tolist(),
                    strict=True,
                )
            )
            term = np.float32(exact) * np.float32(w.scale[n, start // w_width].item())
            if x.scale.shape[-1] > 1:
                term = term * np.float32(x.scale[m, start // x_width].item())
            total = total + term
        if x.scale.shape[-1] == 1:
            total = total * np.float32(x.scale[m, 0].item())
        assert got[m, n].item() == total


@pytest.mark.parametrize("extremes", itertools.product((-128, 127), (-128, 127)))
@pytest.mark.parametrize("inputs", [1024, 1025, 8191])
def test_all_extreme_codes(extremes: tuple[int, int], inputs: int) -> None:
    a, b = extremes
    x = Quantised(torch.full((2, inputs), a, dtype=torch.int8), torch.ones(2, 1), None, None, 8)
    w = pack_weight(torch.full((3, inputs), b, dtype=torch.int8), torch.ones(3, 1), None, 8)
    assert linear(x, w, dtype=torch.float64).tolist() == [[float(np.float32(a * b * inputs))] * 3] * 2
    unsigned = Quantised(
        torch.full((2, inputs), a + 128, dtype=torch.uint8),
        torch.ones(2, 1),
        torch.full((2, 1), 128.0),
        None,
        8,
    )
    assert torch.equal(linear(unsigned, w, dtype=torch.float32), linear(x, w, dtype=torch.float32))


def test_sums_that_could_leave_int32_are_refused() -> None:
    x = Quantised(torch.ones(1, 131072, dtype=torch.int8), torch.ones(1, 1), None, None, 8)
    w = pack_weight(torch.ones(1, 131072, dtype=torch.int8), torch.ones(1, 1), None, 8)
    with pytest.raises(ValueError, match="can overflow int32"):
        linear(x, w, dtype=torch.float32)
    grouped = replace(w, scale=torch.ones(1, 2))
    assert linear(x, grouped, dtype=torch.float32).item() == 131072


@pytest.mark.parametrize("route", ["float32 matmul", "float64 matmul"])
def test_results_do_not_depend_on_the_route(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(
        5, 9, 40, w_bits=4, a_bits=8, a_symmetric=False, w_symmetric=False, w_group=8, fractional=True
    )
    want = case.run()
    monkeypatch.setattr(integer, "route", lambda *_: route)
    assert torch.equal(case.run(), want)


@pytest.mark.parametrize("fractional", [True, False])
@pytest.mark.parametrize("groups", [(None, None), (8, None), (8, 4), (4, 20)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_results_do_not_depend_on_the_other_rows(
    symmetric: bool, groups: tuple[int | None, int | None], fractional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(
        35, 21, 40, 4, 4, symmetric, symmetric, *groups, fractional=fractional, bias=True, row_scale=True
    )
    x, w, rest = case.x(), case.weight(), case.operands()
    row_scale = rest.pop("row_scale")
    whole = linear(x, w, row_scale=row_scale, **rest, dtype=torch.float32)
    for i in range(case.tokens):
        row = replace(x, codes=x.codes[i], scale=x.scale[i], zero=None if x.zero is None else x.zero[i])
        alone = linear(row, w, row_scale=row_scale[i], **rest, dtype=torch.float32)
        assert alone.shape == (21,) and torch.equal(alone, whole[i])
    dequantised = dequantise_weight(w)
    monkeypatch.setattr(reference, "_SCRATCH", 200)
    monkeypatch.setattr(reference, "_TILE", 60)  # several tiles of outputs and of tokens
    assert torch.equal(linear(x, w, row_scale=row_scale, **rest, dtype=torch.float32), whole)
    assert torch.equal(dequantise_weight(w), dequantised)


@pytest.mark.parametrize("a_bits", [4, 8])
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 3e38])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "grouped", "static", "static asymmetric"])
@pytest.mark.parametrize("w_symmetric", [True, False])
def test_a_poisoned_row_touches_no_other(a_bits: int, bad: float, kind: str, w_symmetric: bool) -> None:
    case = Case(4, 5, 24, w_symmetric=w_symmetric, fractional=not w_symmetric)
    options: dict[str, Any] = {"symmetric": "asymmetric" not in kind}
    if kind == "grouped":
        options["group"] = 8
    if "static" in kind:
        options["scale"] = torch.tensor(0.3)
        options["zero"] = torch.tensor(5.0) if "asymmetric" in kind else None
    x = random(4, 24, seed=3)
    clean = linear(quantise(x, a_bits, **options), case.weight(), dtype=torch.float16)
    x[2, 3], x[2, 4] = bad, -3e38 if bad == 3e38 else bad
    got = linear(quantise(x, a_bits, **options), case.weight(), dtype=torch.float16)
    others = [0, 1, 3]
    assert torch.equal(got[others], clean[others])
    if np.isnan(bad) or (not np.isfinite(bad) and "static" not in kind):
        assert got[2].isnan().all()
    elif "static" in kind:
        assert got[2].isfinite().all()  # a static range saturates
    else:  # symmetric ranges of 6e38 hold it; asymmetric ones overflow
        assert got[2].isnan().all() if kind == "asymmetric" else not got[2].isnan().all()


@pytest.mark.parametrize("scale", [NAN, INF])
@pytest.mark.parametrize("group", [None, 8])
def test_codes_mean_nothing_under_a_scale_that_is_not_finite(scale: float, group: int | None) -> None:
    case = Case(3, 5, 24, a_group=group)
    x, clean = case.x(), case.run()
    x.scale[1, 0] = scale
    got = linear(x, case.weight(), dtype=torch.float32)
    assert got[1].isnan().all() and torch.equal(got[[0, 2]], clean[[0, 2]])


def test_poisoned_operands_touch_only_their_own() -> None:
    case = Case(4, 5, 24, keep=3, bias=True, row_scale=True)
    clean = case.run()
    rest = case.operands()
    rest["x_keep"][1, 0], rest["row_scale"][2, 0], rest["bias"][3] = NAN, INF, NAN
    got = linear(case.x(), case.weight(), **rest, dtype=torch.float32)
    assert got[1].isnan().all() and not got[2].isfinite().any() and got[:, 3].isnan().all()
    columns = [0, 1, 2, 4]
    assert torch.equal(got[[0, 3]][:, columns], clean[[0, 3]][:, columns])
    w = case.weight()
    w.scale[2] = NAN
    got = linear(case.x(), w, **case.operands(), dtype=torch.float32)
    assert got[:, 2].isnan().all() and torch.equal(got[:, [0, 1, 3, 4]], clean[:, [0, 1, 3, 4]])


def test_zero_rows_and_weights_give_zeros() -> None:
    for symmetric in (True, False):
        w = Case(1, 5, 24, w_symmetric=False, fractional=True).weight()
        x = quantise(torch.zeros(3, 24), 4, symmetric=symmetric)
        assert (linear(x, w, dtype=torch.float32) == 0).all()
        q = quantise(torch.zeros(5, 24), 4, symmetric=symmetric, group=8)
        zero_weight = pack_weight(q.codes, q.scale, q.zero, 4)
        assert (linear(Case(3, 5, 24).x(), zero_weight, dtype=torch.float32) == 0).all()


def test_a_result_beyond_float16_is_infinite_alone() -> None:
    case = Case(3, 4, 24)
    w = case.weight()
    w.scale[1] *= 1e6
    wide, narrow = (linear(case.x(), w, dtype=dtype) for dtype in (torch.float32, torch.float16))
    assert (wide[:, 1].abs() > 65504).all() and narrow[:, 1].isinf().all()
    assert torch.equal(narrow, wide.to(torch.float16)) and narrow[:, [0, 2, 3]].isfinite().all()


def test_scales_whose_product_underflows() -> None:
    """s_w E is formed first, so tiny scales of both sides lose nothing that the result could hold."""
    x = Quantised(torch.full((1, 4096), 7, dtype=torch.int8), torch.full((1, 1), 1e-23), None, None, 4)
    w = pack_weight(torch.full((1, 4096), 7, dtype=torch.int8), torch.full((1, 1), 1e-23), None, 4)
    exact = 49 * 4096 * float(x.scale) * float(w.scale)
    smallest = 2.0**-149
    assert linear(x, w, dtype=torch.float32).item() == pytest.approx(exact, abs=smallest)
    assert float(x.scale) * float(w.scale) < smallest / 2 < exact


@pytest.mark.parametrize("zero", [2.0**24, -(2.0**31), 1e12])
def test_large_zero_points_stay_exact(zero: float) -> None:
    """Groups far from 0 have zero-points far outside the codes."""
    x = Quantised(
        torch.arange(16, dtype=torch.uint8)[None],
        torch.ones(1, 1, dtype=torch.float64),
        torch.full((1, 1), zero, dtype=torch.float64),
        None,
        4,
    )
    codes = torch.tensor([[1, -1] * 8, [7] * 16], dtype=torch.int8)
    w = pack_weight(codes, torch.ones(2, 1, dtype=torch.float64), None, 4)
    assert linear(x, w, dtype=torch.float64).tolist() == [[-8.0, 7 * (120 - 16 * zero)]]


def test_float64_has_no_float32_step() -> None:
    w64, x64 = random(5, 24, seed=0, dtype=torch.float64), random(3, 24, seed=1, dtype=torch.float64)
    qw, qx = quantise(w64, 4, symmetric=True), quantise(x64, 4, symmetric=False)
    packed = pack_weight(qw.codes, qw.scale, qw.zero, 4)
    got = linear(qx, packed, dtype=torch.float64)
    np.testing.assert_allclose(got.numpy(), values(qx) @ values(qw).T, rtol=1e-14, atol=1e-14)


def test_strides_leading_axes_and_inference_mode() -> None:
    case = Case(6, 5, 24, a_symmetric=False, colsum=True, keep=3)
    want = case.run()
    x, w, rest = case.x(), case.weight(), case.operands()
    assert x.zero is not None
    with torch.inference_mode():
        turned = Quantised(
            x.codes.t().contiguous().t(), x.scale.expand(6, 3)[:, 1:2], x.zero.repeat(1, 2)[:, ::2], None, 4
        )
        gaps = replace(w, packed=torch.stack((w.packed, w.packed), -1)[..., 0])
        rest["x_keep"] = rest["x_keep"].t().contiguous().t()
        assert torch.equal(linear(turned, gaps, **rest, dtype=torch.float32), want)
    shaped = Quantised(x.codes.view(2, 3, 24), x.scale.view(2, 3, 1), x.zero.view(2, 3, 1), None, 4)
    rest["x_keep"] = rest["x_keep"].view(2, 3, 3)
    assert torch.equal(linear(shaped, w, **rest, dtype=torch.float32), want.view(2, 3, 5))
    plain = linear(random(6, 24, seed=0).t().contiguous().t(), w, dtype=torch.float32)
    torch.testing.assert_close(plain, random(6, 24, seed=0) @ dequantise_weight(w).t())


def test_bad_arguments() -> None:
    codes, scale = torch.zeros(6, 8, dtype=torch.int8), torch.ones(6, 2)
    w = pack_weight(codes, scale, None, 4)
    x = quantise(torch.ones(1, 8), 4, symmetric=True)
    axis_0 = pack_weight(codes, torch.ones(2, 8), None, 4, 0)
    bad: list[tuple[Any, PackedWeight, dict[str, Tensor], str]] = [
        (x, axis_0, {}, "axis-0 groups cannot run with quantised inputs"),
        (quantise(torch.ones(1, 4), 4, symmetric=True), w, {}, "4 channels for a weight of 8"),
        (torch.ones(1, 16), w, {}, "16 channels for a weight of 8"),
        (x, w, {"x_keep": torch.ones(1, 2)}, "both their inputs and their weights"),
        (torch.ones(1, 8), w, {"w_keep": torch.ones(6, 2)}, "both their inputs and their weights"),
    ]
    for given_x, weight, operands, message in bad:
        with pytest.raises(ValueError, match=message):
            linear(given_x, weight, **operands, dtype=torch.float32)
