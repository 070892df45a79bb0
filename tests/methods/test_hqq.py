"""HQQ: the numbers of its public implementation, its equations in float64, groups of any shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.reference import dequantise_weight, pack_weight
from methods.bits import Bits, LinearSpec
from methods.errors import UserError
from methods.hqq import as_hqq, round_hqq
from methods.method import Context
from methods.pipeline import quantise
from methods.registry import parse_method
from methods.rounding import Rounder
from methods.rtn import round_to_nearest
from tests.methods.small_checkpoint import save


def weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = 0.02 * torch.randn(*shape, generator=generator, dtype=dtype)
    values[0, 0], values[1, 3] = 0.3, -0.2
    return values


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("axis", [0, 1])
def test_equals_the_published_implementation(golden: Path, bits: int, group: int, axis: int) -> None:
    numbers = np.load(golden / "hqq.npz")
    expected = torch.from_numpy(numbers[f"bits{bits}_group{group}_axis{axis}"])
    found = round_hqq(torch.from_numpy(numbers["weight"]), LinearSpec(bits, group, axis))
    torch.testing.assert_close(found.dequantise(), expected, rtol=0, atol=1e-6)


def by_hand(w: np.ndarray, bits: int, group: int, axis: int, meta: bool) -> np.ndarray:
    """The equations of methods/hqq.py in float64 numpy, groups laid out [g, n] or [n, g]."""
    x = w.reshape(group, -1) if axis == 0 else w.reshape(-1, group)
    top = 2**bits - 1
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    s = np.minimum(np.where(high - low <= 1e-4, 1.0, top / np.maximum(high - low, 1e-30)), 2e4)
    z = -low * s
    z = np.round(z) if bits == 4 else z
    beta, best = 10.0, 1e4
    for _ in range(20):
        q = np.clip(np.round(x * s + z), 0, top)
        error = x - (q - z) / s
        with np.errstate(divide="ignore"):
            kept = np.sign(error) * np.maximum(0, np.abs(error) - np.abs(error) ** -0.3 / beta)
        z = (q - (x - kept) * s).mean(axis, keepdims=True)
        beta *= 1.01
        current = np.abs(error).mean()
        if current >= best:
            break
        best = current
    q = np.clip(np.round(x * s + z), 0, top)
    step = 1 / s
    if meta:
        step, z = in_eight_bits(step.reshape(128, -1), 0).reshape(step.shape), in_eight_bits(z, None)
    return ((q - z) * step).reshape(w.shape)


def in_eight_bits(values: np.ndarray, axis: int | None) -> np.ndarray:
    low, high = values.min(axis=axis, keepdims=True), values.max(axis=axis, keepdims=True)
    s = np.minimum(np.where(high - low <= 1e-4, 1.0, 255 / np.maximum(high - low, 1e-30)), 2e4)
    return (np.clip(np.round(values * s - low * s), 0, 255) + low * s) / s


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "axis"), [(32, 0), (64, 1), (128, 0), (128, 1)])
@pytest.mark.parametrize("meta", [False, True])
def test_equations_in_float64(bits: int, group: int, axis: int, meta: bool) -> None:
    """576 inputs in groups of 128: groups run on into the next output (axis 1) and columns wrap (axis 0)."""
    w = weight(256, 576, seed=bits, dtype=torch.float64)
    found = round_hqq(w, as_hqq(LinearSpec(bits, group), axis, meta))
    expected = by_hand(w.numpy(), bits, group, axis, meta)
    np.testing.assert_allclose(found.dequantise().numpy(), expected, rtol=0, atol=1e-12)


@given(
    bits=st.integers(2, 8),
    shape=st.sampled_from([(16, 24), (24, 16), (48, 80), (6, 64)]),
    group=st.sampled_from([None, 8, 16, 32, 64, 128]),
    axis=st.sampled_from([0, 1]),
    meta=st.booleans(),
    rounder=st.sampled_from([round_hqq, round_to_nearest]),
    seed=st.integers(0, 99),
)
def test_packed_codes_stand_for_the_same_weight(
    bits: int, shape: tuple[int, int], group: int | None, axis: int, meta: bool, rounder: Rounder, seed: int
) -> None:
    """Whatever the group, as long as it divides the number of weights: to the bit."""
    spec = as_hqq(LinearSpec(bits, group), axis, meta)
    w = weight(*shape, seed=seed)
    found = rounder(w, spec)
    packed = pack_weight(found.codes, found.scale, found.zero, bits, axis)
    assert torch.equal(dequantise_weight(packed), found.dequantise())
    groups = shape[0] * shape[1] // (group or shape[axis])
    assert found.zero is not None
    assert len(torch.stack((found.scale, found.zero)).flatten(1).unique(dim=1).T) <= groups
    if not meta:
        assert float((found.dequantise() - w).abs().max()) <= 2 * float(found.scale.max())


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.06), (3, 0.03), (4, 0.03)])
def test_errs_less_than_rounding_to_nearest(bits: int, gain: float) -> None:
    """Against min-max ranges, on weights of a few outliers, as its authors claim."""
    generator = torch.Generator().manual_seed(1)
    w = 0.02 * torch.randn(256, 576, generator=generator)
    w.view(-1)[torch.randperm(w.numel(), generator=generator)[:50]] *= 12
    spec = as_hqq(LinearSpec(bits, 64))

    def error(rounded: torch.Tensor) -> float:
        return float((rounded - w).square().mean())

    hqq, rtn = (error(rounder(w, spec).dequantise()) for rounder in (round_hqq, round_to_nearest))
    assert hqq < (1 - gain) * rtn


def test_constant_groups_survive() -> None:
    w = torch.zeros(4, 64)
    w[1] = 0.5
    w[2, :] = -1e-3
    for axis in (0, 1):
        back = round_hqq(w, LinearSpec(4, 16, axis)).dequantise()
        assert back.isfinite().all()
        if axis == 1:
            torch.testing.assert_close(back, w, rtol=0, atol=0.5)


def test_hqq_behind_any_transform(tmp_path: Path) -> None:
    """In codes, with quantised activations, and refused where axis 0 meets them."""
    checkpoint = save(tmp_path, "llama-biases")
    for method, bits in (
        ("hqq", "w3a16g16"),
        ("quarot:rounding=hqq", "w4a4kv4"),
        ("hqq:group_axis=0", "w4a16g16"),
    ):
        result = quantise(checkpoint, parse_method(method), Bits.parse(bits), Context(), execution="int4")
        ids = torch.arange(12)[None]
        simulated = quantise(checkpoint, parse_method(method), Bits.parse(bits), Context())
        torch.testing.assert_close(result.decoder(ids), simulated.decoder(ids), rtol=0, atol=2e-3)
        spec = simulated.plan.linears["layers.0.mlp.down_proj"]
        assert spec.fractional and not spec.symmetric and spec.axis == (0 if "axis" in method else 1)
    with pytest.raises(UserError, match="axis-0 groups cannot run"):
        quantise(checkpoint, parse_method("hqq:group_axis=0"), Bits.parse("w4a8"), Context())
    with pytest.raises(UserError, match="meta=true with rounding rtn"):
        quantise(checkpoint, parse_method("rtn:meta=true"), Bits.parse("w4a16"), Context())
    with pytest.raises(UserError, match="group_axis 2"):
        parse_method("hqq:group_axis=2")
    assert parse_method("hqq:preset=paper").parts[0].layout() == (0, True)
    assert parse_method("hqq:preset=paper;group_axis=1;meta=false").parts[0].layout() == (1, False)
