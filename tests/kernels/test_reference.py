"""The quantisers against the official code's numbers, torch's own fake quantisation and exact arithmetic."""

import itertools
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.reference import Quantised, dequantise, fake_quantise, quantise
from tests.equality import same

NAN, INF = float("nan"), float("inf")
GOLDEN = [
    (bits, symmetric, clip, group)
    for bits in (4, 8)
    for symmetric, low in ((True, 0.9), (False, 0.95))
    for clip, group in ((1.0, None), (low, None), (low, 32))
]


@pytest.mark.parametrize(("bits", "symmetric", "clip", "group"), GOLDEN)
def test_equals_the_official_quantiser(
    golden: Path, bits: int, symmetric: bool, clip: float, group: int | None
) -> None:
    arrays = np.load(golden / "gptq_rtn_act.npz")
    want = arrays[f"act_b{bits}_{'sym' if symmetric else 'asym'}_clip{clip}_g{group or -1}"]
    got = fake_quantise(torch.from_numpy(arrays["act"]), bits, symmetric=symmetric, clip=clip, group=group)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_torch_fake_quantisation(bits: int, symmetric: bool) -> None:
    x = torch.randn(64, 200, generator=torch.Generator().manual_seed(bits)) + 0.5
    q = quantise(x, bits, symmetric=symmetric, clip=0.9)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    zero = torch.zeros(64) if q.zero is None else q.zero[:, 0]
    want = torch.fake_quantize_per_channel_affine(x, q.scale[:, 0], zero.int(), 0, low, high)
    torch.testing.assert_close(dequantise(q), want, rtol=1e-6, atol=1e-6)
    if symmetric:
        want_scale = 0.9 * x.abs().amax(1) / (2 ** (bits - 1) - 1)
    else:
        want_scale = 0.9 * (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)) / (2**bits - 1)
    torch.testing.assert_close(q.scale[:, 0], want_scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_rounding_is_exact_half_to_even(bits: int) -> None:
    # Scale exactly 1: every quarter step of the range, each in a row with the extreme that sets the scale.
    top = 2 ** (bits - 1) - 1
    for quarters in range(-4 * top, 4 * top + 1):
        value = Fraction(quarters, 4)
        for scale in (1.0, 0.5, 1024.0):
            q = quantise(torch.tensor([top, float(value)]) * scale, bits, symmetric=True)
            assert q.scale.item() == scale
            assert q.codes.tolist() == [top, round(value)]  # Fraction rounds half to even, exactly


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_asymmetric_rounding_is_exact(bits: int) -> None:
    levels = 2**bits - 1
    for zero in range(levels + 1):  # every range [-zero, levels - zero] of scale 1, every half step in it
        for halves in range(-2 * zero, 2 * (levels - zero) + 1):
            value = Fraction(halves, 2)
            x = torch.tensor([-zero, levels - zero, float(value)])
            q = quantise(x, bits, symmetric=False)
            assert q.zero is not None and (q.scale.item(), q.zero.item()) == (1.0, zero)
            assert q.codes.tolist() == [0, levels, min(max(round(value) + zero, 0), levels)]


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_survives(bits: int) -> None:
    signed = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    q = quantise(signed * 0.25, bits, symmetric=True, scale=torch.tensor(0.25))
    assert q.codes.dtype == torch.int8 and torch.equal(q.codes, signed.to(torch.int8))
    assert torch.equal(dequantise(q), signed * 0.25)
    unsigned = torch.arange(2**bits)
    for zero in range(2**bits):
        x = (unsigned - zero) * 0.25
        q = quantise(x, bits, symmetric=False)
        assert q.codes.dtype == torch.uint8 and torch.equal(q.codes, unsigned.to(torch.uint8))
        assert torch.equal(dequantise(q), x)


def test_clip_saturates_both_ends() -> None:
    q = quantise(torch.tensor([-8.0, 10.0, 1.0]), 4, symmetric=True, clip=0.7)
    assert q.scale.item() == pytest.approx(1.0) and q.codes.tolist() == [-8, 7, 1]
    q = quantise(torch.tensor([-10.0, 20.0, 1.0]), 4, symmetric=False, clip=0.5)
    assert q.scale.item() == pytest.approx(1.0) and q.codes.tolist() == [0, 15, 6]


def test_row_ranges_contain_zero_and_group_ranges_need_not() -> None:
    x = torch.tensor([[4.0, 4.5, 5.0, 7.75]])
    row = quantise(x, 4, symmetric=False)
    assert row.zero is not None and row.zero.item() == 0 and row.scale.item() == pytest.approx(7.75 / 15)
    group = quantise(x, 4, symmetric=False, group=4)
    assert group.zero is not None and group.zero.item() == -16 and group.scale.item() == 0.25
    assert group.codes.tolist() == [[0, 2, 4, 15]] and torch.equal(dequantise(group), x)


FLOATS = st.one_of(
    st.floats(-1e4, 1e4, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-38, 3e38, -3e38, 65504.0, 500.0, 1e-6, 0.5, 2.5]),
)


@dataclass(frozen=True)
class Settings:
    bits: int
    symmetric: bool
    clip: float
    group: int | None

    def quantise(self, x: torch.Tensor) -> Quantised:
        return quantise(x, self.bits, symmetric=self.symmetric, clip=self.clip, group=self.group)

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        return fake_quantise(x, self.bits, symmetric=self.symmetric, clip=self.clip, group=self.group)


SETTINGS = st.builds(
    Settings,
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    clip=st.sampled_from([1.0, 0.95, 0.9, 0.5]),
    group=st.sampled_from([None, 1, 2, 4]),
)


@st.composite
def tensors(draw: st.DrawFn, elements: st.SearchStrategy[float] = FLOATS) -> torch.Tensor:
    shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), 4 * draw(st.integers(1, 4)))
    size = int(np.prod(shape))
    values = draw(st.lists(elements, min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


@given(tensors(st.one_of(FLOATS, st.sampled_from([NAN, INF, -INF]))), SETTINGS, st.booleans())
def test_fake_equals_quantise_then_dequantise(x: torch.Tensor, how: Settings, strided: bool) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        values = x.to(dtype)
        if strided:
            values = values.transpose(0, -1).contiguous().transpose(0, -1)
        before = values.clone()
        q, fake = how.quantise(values), how.fake(values)
        assert same(fake, dequantise(q).to(dtype))
        assert same(values, before)
        assert q.scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # A static range that was measured on the same tensor gives the same numbers.
        static = fake_quantise(
            values, how.bits, symmetric=how.symmetric, group=how.group, scale=q.scale, zero=q.zero
        )
        assert same(fake, static)


@given(tensors(st.floats(-1e4, 1e4, width=32)), SETTINGS)
def test_error_and_code_bounds(x: torch.Tensor, how: Settings) -> None:
    how = replace(how, clip=1.0)
    q = how.quantise(x)
    low = -(2 ** (how.bits - 1)) if how.symmetric else 0
    high = low + 2**how.bits - 1
    assert low <= q.codes.min() and q.codes.max() <= high
    # Inside the range the error is half a step; the ends of an asymmetric one lose half a step to z's
    # rounding.
    step = q.scale.repeat_interleave(x.shape[-1] // q.scale.shape[-1], -1)
    error = (dequantise(q) - x).abs()
    assert (error <= step * (0.5 if how.symmetric else 1.0) * (1 + 1e-9) + 1e-9 * x.abs() + 1e-300).all()
    if q.zero is not None and how.group is None:
        assert (q.zero >= 0).all() and (q.zero <= high).all()  # so that 0 is representable, exactly


@given(tensors(st.floats(-1e4, 1e4, width=32)), SETTINGS)
def test_rows_and_groups_are_independent(x: torch.Tensor, how: Settings) -> None:
    whole = how.fake(x)
    rows = x.reshape(-1, x.shape[-1])
    assert torch.equal(whole.reshape(rows.shape), torch.stack([how.fake(row) for row in rows]))
    if how.group is not None and how.symmetric:
        cut = replace(how, group=None).fake(x.reshape(-1, how.group))
        assert torch.equal(whole, cut.reshape(x.shape))


@given(tensors(st.floats(-1e4, 1e4, width=32)), st.integers(2, 8), st.sampled_from([0.25, 2.0, 1024.0]))
def test_symmetries(x: torch.Tensor, bits: int, power: float) -> None:
    codes = quantise(x, bits, symmetric=True).codes
    assert torch.equal(quantise(-x, bits, symmetric=True).codes, -codes)
    for symmetric in (True, False):
        plain, scaled = quantise(x, bits, symmetric=symmetric), quantise(x * power, bits, symmetric=symmetric)
        alive = (x != 0).any(-1) & (x.abs().amax(-1) > 1e-300)
        assert torch.equal(plain.codes[alive], scaled.codes[alive])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [None, 4])
def test_rows_without_a_range(bits: int, group: int | None) -> None:
    x = torch.zeros(2, 8)
    x[1] = torch.arange(-4, 4)
    q = quantise(x, bits, symmetric=True, group=group)
    assert (q.scale[0] == 1).all() and (q.codes[0] == 0).all()
    q = quantise(x, bits, symmetric=False, group=group)
    assert (q.scale[0] == 2 / (2**bits - 1)).all() and (dequantise(q)[0] == 0).all()
    for symmetric, value in itertools.product((True, False), (1e-45, -1e-45)):  # the smallest float32
        tiny = fake_quantise(torch.full((1, 8), value), bits, symmetric=symmetric, group=group)
        scale_underflows = bits > 2 or not symmetric
        assert (tiny == (0.0 if scale_underflows else value)).all()


@pytest.mark.parametrize("value", [3.0, -3.0, 1e-3, -7e4])
def test_a_constant_group_keeps_its_value(value: float) -> None:
    x = torch.full((1, 8), value)
    for group in (None, 4, 8):
        torch.testing.assert_close(fake_quantise(x, 4, symmetric=False, group=group), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("group", [None, 4])
def test_nan_and_infinity_stay_in_their_row(symmetric: bool, bad: float, group: int | None) -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    clean = fake_quantise(x, 4, symmetric=symmetric, group=group)
    x[1, 2] = bad
    got = fake_quantise(x, 4, symmetric=symmetric, group=group)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert got[1, : group or 8].isnan().all()
    if group:
        assert torch.equal(got[1, group:], clean[1, group:])
    q = quantise(x, 4, symmetric=symmetric, group=group)
    assert not torch.isfinite(q.scale[1, 0]) and same(dequantise(q), got)
    if q.zero is not None:
        whole_row = fake_quantise(torch.full((1, 8), bad), 4, symmetric=False, group=group)
        assert whole_row.isnan().all()


def test_static_ranges() -> None:
    x = torch.tensor([[0.4, -0.6, 9.0, -9.0], [INF, -INF, 1.0, 0.0], [NAN, 1.0, 0.0, 0.0]])
    q = quantise(x, 4, symmetric=True, scale=torch.tensor(0.5))
    assert q.scale.shape == (3, 1)
    assert q.codes[:2].tolist() == [[1, -1, 7, -8], [7, -8, 2, 0]]
    assert dequantise(q)[2].isnan().all()
    q = quantise(x[:2], 4, symmetric=False, scale=torch.tensor([0.5]), zero=torch.tensor([3]))
    assert q.codes.tolist() == [[4, 2, 15, 0], [15, 0, 5, 3]]
    per_group = quantise(x[:1], 4, symmetric=True, group=2, scale=torch.tensor([0.2, 2.0]))
    assert per_group.codes.tolist() == [[2, -3, 4, -4]] and per_group.scale.shape == (1, 2)


def test_half_types_keep_float32_scales() -> None:
    x = torch.full((1, 4), 6e-8, dtype=torch.float16)  # the smallest float16: its scale would underflow
    q = quantise(x, 4, symmetric=True)
    assert q.scale.dtype == torch.float32 and q.codes.tolist() == [[7] * 4]
    assert torch.equal(fake_quantise(x, 4, symmetric=True), x)
    wide = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)  # hi - lo overflows float16
    assert torch.isfinite(fake_quantise(wide, 8, symmetric=False)).all()


def test_shapes_and_gradients() -> None:
    assert fake_quantise(torch.zeros(0, 8), 4, symmetric=False, group=4).shape == (0, 8)
    q = quantise(torch.zeros(2, 3, 8), 4, symmetric=False, group=4)
    assert isinstance(q, Quantised) and q.codes.shape == (2, 3, 8) and q.group == 4
    assert q.scale.shape == (2, 3, 2) and q.zero is not None and q.zero.shape == (2, 3, 2)
    assert quantise(torch.zeros(8), 4, symmetric=True).scale.shape == (1,)
    x = torch.randn(4, 8, requires_grad=True)
    fake_quantise(x, 4, symmetric=False).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "2 to 8, got 1"),
        ({"bits": 9}, "2 to 8, got 9"),
        ({"clip": 0.0}, "clip"),
        ({"clip": 1.5}, "clip"),
        ({"group": 3}, "groups of 3"),
        ({"group": 0}, "groups of 0"),
        ({"zero": torch.zeros(1)}, "static scale"),
        ({"scale": torch.ones(1)}, "zero-point"),
        ({"scale": torch.ones(1), "zero": torch.zeros(1), "symmetric": True}, "zero-point"),
        ({"scale": torch.ones(1), "zero": torch.zeros(1), "clip": 0.9}, "clip ratio is part"),
        ({"x": torch.ones(2, 8, dtype=torch.int8)}, "int8"),
        ({"x": torch.ones(2, 0)}, "0 values"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.ones(2, 8), "bits": 4, "symmetric": False, **options}
    for function in (quantise, fake_quantise):
        with pytest.raises(ValueError, match=message):
            function(**arguments)
