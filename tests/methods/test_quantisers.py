"""Weight quantisers, RTN and GPTQ against published code's numbers, brute force and first principles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.reference import fake_quantise
from kernels.weight_reference import find_range
from methods.bits import LinearSpec
from methods.errors import UserError
from methods.gptq import Hessian, inverse_factor, solve
from methods.linear import QuantisedWeight
from methods.rtn import round_to_nearest

# The keys of gptq_rtn_act.npz; a key that the file has and this list lacks fails test_every_key_is_used.
WEIGHTS = [
    "rtn_w4_sym_clip",
    "rtn_w4_sym",
    "rtn_w4_asym",
    "rtn_w3_sym_clip",
    "rtn_w4_sym_clip_actorder",
    "gptq_w4_sym_clip",
    "gptq_w4_sym",
    "gptq_w4_asym",
    "gptq_w3_sym_clip",
    "gptq_w4_sym_g64",
    "gptq_w4_sym_clip_actorder",
]
ACTIVATIONS = [
    f"act_b{bits}_{kind}_clip{clip}_g{group}"
    for bits in (4, 8)
    for kind, clip, group in [
        ("sym", 1.0, -1),
        ("sym", 0.9, -1),
        ("asym", 1.0, -1),
        ("asym", 0.95, -1),
        ("sym", 0.9, 32),
        ("asym", 0.95, 32),
    ]
]


@pytest.fixture(scope="module")
def numbers(golden: Path) -> Any:
    file = golden / "gptq_rtn_act.npz"
    if not file.is_file():
        pytest.skip("no gptq_rtn_act.npz beside this checkout (../shared/golden)")
    return np.load(file)


def tensor(numbers: Any, key: str) -> Tensor:
    return torch.from_numpy(numbers[key]).float()


def output_error(rounded: Tensor, weight: Tensor, inputs: Tensor) -> float:
    """‖X(Ŵ - W)ᵀ‖ / ‖XWᵀ‖."""
    return float((inputs @ (rounded - weight).T).norm() / (inputs @ weight.T).norm())


def test_every_key_is_used(numbers: Any) -> None:
    assert set(numbers.files) == {"weight", "inputs", "act", *WEIGHTS, *ACTIVATIONS}


def spec_of(key: str) -> LinearSpec:
    _, bits, kind, *rest = key.split("_")
    return LinearSpec(
        int(bits[1:]), group=64 if "g64" in rest else None, symmetric=kind == "sym", search="clip" in rest
    )


@pytest.mark.parametrize("key", [key for key in WEIGHTS if key.startswith("rtn")])
def test_rtn_equals_the_published_code(numbers: Any, key: str) -> None:
    got = round_to_nearest(tensor(numbers, "weight"), spec_of(key)).dequantise()
    torch.testing.assert_close(got, tensor(numbers, key), rtol=0, atol=1e-5)


@pytest.mark.parametrize("key", [key for key in WEIGHTS if key.startswith("gptq")])
def test_gptq_equals_the_published_code(numbers: Any, key: str) -> None:
    weight, inputs, want = (tensor(numbers, name) for name in ("weight", "inputs", key))
    hessian = Hessian()
    for batch in inputs.split(128):
        hessian.add(batch)
    assert hessian.matrix is not None
    result = solve(weight, hessian.matrix, spec_of(key), damp=0.01, act_order="actorder" in key)
    got = result.dequantise()
    step = result.scale.repeat_interleave(weight.shape[1] // result.scale.shape[1], 1)
    # Equal codes on equal scales; half a step apart is another code.
    assert float(((got - want).abs() < 0.5 * step).float().mean()) >= 0.995
    assert output_error(got, weight, inputs) == pytest.approx(output_error(want, weight, inputs), rel=0.01)
    assert torch.all(got[:, 50] == 0)  # the dead channel


@pytest.mark.parametrize("key", ACTIVATIONS)
def test_activations_equal_the_published_code(numbers: Any, key: str) -> None:
    _, bits, kind, clip, group = key.split("_")
    got = fake_quantise(
        tensor(numbers, "act"),
        int(bits[1:]),
        symmetric=kind == "sym",
        clip=float(clip[4:]),
        group=None if group == "g-1" else int(group[1:]),
    )
    torch.testing.assert_close(got, tensor(numbers, key), rtol=1e-5, atol=1e-5)


# Ranges


def brute_force_range(row: np.ndarray, bits: int, symmetric: bool) -> tuple[float, float, float]:
    """(error, scale, zero) of the best of the 80 shrunk ranges, one value at a time in float64."""
    best = (np.inf, 0.0, 0.0)
    for i in range(80):
        share = 1 - i / 100
        high, low = share * max(row.max(), 0), share * min(row.min(), 0)
        if symmetric:
            scale, zero = max(high, -low) / (2 ** (bits - 1) - 1), 0.0
            codes = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        else:
            scale, codes = (high - low) / (2**bits - 1), (0, 2**bits - 1)
            zero = np.round(-low / scale)
        error = 0.0
        for value in row:
            code = min(max(np.round(value / scale) + zero, codes[0]), codes[1])
            error += abs(scale * (code - zero) - value) ** 2.4
        if error < best[0]:
            best = (error, scale, zero)
    return best


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_searched_ranges_equal_brute_force(bits: int, symmetric: bool) -> None:
    rows = torch.randn(6, 40, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    rows[0] += 1.0
    rows[1] = rows[1].abs()
    rows[2, 3] = 30.0
    scale, zero = find_range(rows, bits, symmetric, search=True)
    for index, row in enumerate(rows.numpy()):
        _, want_scale, want_zero = brute_force_range(row, bits, symmetric)
        assert float(scale[index]) == pytest.approx(want_scale, rel=1e-12)
        assert (0.0 if zero is None else float(zero[index])) == want_zero


def test_search_in_chunks_equals_search_of_single_rows() -> None:
    rows = torch.randn(70, 2048, generator=torch.Generator().manual_seed(0))  # more than one chunk
    scale, zero = find_range(rows, 4, symmetric=False, search=True)
    assert zero is not None
    for index in (0, 31, 32, 69):
        one_scale, one_zero = find_range(rows[index : index + 1], 4, symmetric=False, search=True)
        assert one_zero is not None
        assert torch.equal(one_scale[0], scale[index])
        assert torch.equal(one_zero[0], zero[index])


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    search=st.booleans(),
    group=st.sampled_from([None, 8, 16]),
    axis=st.sampled_from([0, 1]),
    shape=st.sampled_from([(16, 32), (32, 16), (48, 64)]),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_rtn_properties(
    bits: int,
    symmetric: bool,
    search: bool,
    group: int | None,
    axis: int,
    shape: tuple[int, int],
    seed: int,
    scale: float,
) -> None:
    """Codes in range; without search no error above half a step (symmetric) or one (zero-point rounded
    too); a second rounding by the same codes changes nothing; scaling by a power of two commutes."""
    weight = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spec = LinearSpec(bits, group=group, axis=axis, symmetric=symmetric, search=search)
    result = round_to_nearest(weight, spec)
    size = shape[axis]
    count = size // (group or size)
    assert result.codes.shape == shape
    assert result.scale.shape == ((shape[0], count) if axis == 1 else (count, shape[1]))
    assert (result.zero is None) == symmetric
    codes = result.codes.long()
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    assert int(codes.min()) >= low
    assert int(codes.max()) <= high
    back = result.dequantise()
    assert back.dtype == torch.float64
    if not search:
        apart = result.scale.repeat(size // count, 1)
        step = result.scale.repeat_interleave(size // count, 1) if axis else apart
        assert torch.all((back - weight).abs() <= (0.5 if symmetric else 1.0) * step * (1 + 1e-9))
    assert torch.equal(round_to_nearest(4 * weight, spec).codes, result.codes)


def test_axis_0_takes_outputs_that_are_apart() -> None:
    """Groups of 16 of 32 outputs: every second output, as axis 1 of the re-ordered transpose."""
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    order = torch.cat((torch.arange(0, 32, 2), torch.arange(1, 32, 2)))
    zero_axis = round_to_nearest(weight, LinearSpec(4, group=16, axis=0, symmetric=False)).dequantise()
    one_axis = round_to_nearest(weight[order].T.contiguous(), LinearSpec(4, group=16, symmetric=False))
    assert torch.equal(zero_axis[order], one_axis.dequantise().T)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
def test_rows_without_a_range(symmetric: bool, search: bool) -> None:
    weight = torch.zeros(4, 16)
    weight[1] = 0.3
    weight[2] = -0.3
    weight[3, 5] = 1e-20
    back = round_to_nearest(weight, LinearSpec(4, symmetric=symmetric, search=search)).dequantise()
    torch.testing.assert_close(back, weight, rtol=0.15 if symmetric else 1e-5, atol=1e-6)
    assert torch.all(back[0] == 0)


@pytest.mark.parametrize("group", [32, 64, 96])
@pytest.mark.parametrize("act_order", [False, True])
def test_groups_that_run_on_into_the_next_row(group: int, act_order: bool) -> None:
    """The weights of a matrix in one row: GPTQ without correlations rounds them as RTN does, to the bit."""
    weight = torch.randn(8, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spec = LinearSpec(4, group=group, symmetric=False)
    found = round_to_nearest(weight, spec)
    row = round_to_nearest(weight.view(1, -1), spec)
    assert torch.equal(found.dequantise(), row.dequantise().view(8, 48))
    assert found.scale.shape == (8, 48 // math.gcd(48, group))
    identity = torch.eye(48, dtype=torch.float64)
    solved = solve(weight, identity, spec, damp=0.01, act_order=act_order)
    assert torch.equal(solved.codes, found.codes)
    assert torch.equal(solved.dequantise(), found.dequantise())


def test_group_sizes_that_do_not_fit_are_refused() -> None:
    weight = torch.randn(4, 48)
    with pytest.raises(UserError, match="group size 40 does not divide the 192 weights of a 4 x 48 matrix"):
        round_to_nearest(weight, LinearSpec(4, group=40))
    with pytest.raises(UserError, match="group size 40 does not divide the 192 weights of a 4 x 48 matrix"):
        solve(weight, torch.eye(48), LinearSpec(4, group=40), damp=0.01, act_order=False)
    with pytest.raises(UserError, match="axis 1"):
        solve(weight, torch.eye(48), LinearSpec(4, axis=0), damp=0.01, act_order=False)


# GPTQ


def correlated(tokens: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs [tokens, width] whose channels share directions and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    size = torch.rand(width, generator=generator, dtype=torch.float64) * 3 + 0.1
    noise = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return ((noise @ (mix + 0.3 * torch.eye(width, dtype=torch.float64))) * size).to(dtype)


def hessian_of(inputs: Tensor) -> Tensor:
    hessian = Hessian()
    hessian.add(inputs)
    assert hessian.matrix is not None
    return hessian.matrix


def test_hessian_is_the_definition_however_it_is_streamed() -> None:
    inputs = correlated(96, 24, 0)
    want = 2 * inputs.T @ inputs / 96
    for sizes in ([96], [1, 95], [32, 32, 32], [50, 7, 39]):
        hessian = Hessian()
        for part in inputs.split(sizes):
            hessian.add(part)
        assert hessian.matrix is not None
        assert hessian.rows == 96
        assert hessian.matrix.dtype == torch.float64
        torch.testing.assert_close(hessian.matrix, want, rtol=1e-12, atol=1e-12)
    assert torch.allclose(hessian_of(inputs.view(4, 24, 24)), want)
    for dtype in (torch.float32, torch.bfloat16):
        assert hessian_of(inputs.to(dtype)).dtype == torch.float32


def optimal_brain_rounding(
    weight: Tensor, hessian: Tensor, damp: float, scale: Tensor, order: Tensor
) -> Tensor:
    """Codes by GPTQ's definition: after each column the inverse Hessian of what is left is formed anew."""
    weight = weight.clone()
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    codes = torch.empty_like(weight)
    left = order.tolist()
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        column = left[0]
        codes[:, column] = (weight[:, column] / scale).round().clamp(-8, 7)
        error = (weight[:, column] - codes[:, column] * scale) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0]
        left.pop(0)
    return codes


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_equals_its_definition(act_order: bool) -> None:
    """150 columns: more than one block, so that errors must cross its border."""
    weight = torch.randn(6, 150, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hessian = hessian_of(correlated(400, 150, 2))
    got = solve(weight, hessian, LinearSpec(4, search=False), damp=0.01, act_order=act_order)
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(150)
    want = optimal_brain_rounding(weight, hessian, 0.01, weight.abs().amax(1) / 7, order)
    assert got.scale.dtype == torch.float64
    assert torch.equal(got.codes.double(), want)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [None, 8, 64, 128, 192, 384])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_beats_rtn_on_its_own_measure(symmetric: bool, group: int | None, act_order: bool) -> None:
    """Groups within, across (192) and beyond (384) the blocks of 128 columns."""
    weight = torch.randn(40, 384, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs = correlated(1000, 384, 4)
    spec = LinearSpec(4, group=group, symmetric=symmetric)
    result = solve(weight, hessian_of(inputs), spec, damp=0.01, act_order=act_order)
    nearest = round_to_nearest(weight, spec)
    assert result.scale.shape == nearest.scale.shape
    assert output_error(result.dequantise(), weight, inputs) < 0.9 * output_error(
        nearest.dequantise(), weight, inputs
    )


def test_gptq_with_uncorrelated_inputs_is_rtn() -> None:
    weight = torch.randn(8, 160, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for group in (None, 32):
        spec = LinearSpec(4, group=group, symmetric=False)
        result = solve(weight, 2 * torch.eye(160, dtype=torch.float64), spec, damp=0.01, act_order=False)
        assert torch.equal(result.codes, round_to_nearest(weight, spec).codes)


def test_dead_channels() -> None:
    """Weights of inputs that are always zero become zero and disturb nothing."""
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(6), dtype=torch.float64).clamp(-2, 2)
    inputs = correlated(200, 40, 7)
    dead = torch.tensor([0, 13, 39])
    inputs[:, dead] = 0
    alive = [i for i in range(40) if i not in dead.tolist()]
    weight[:, 1] = 3.0  # the range does not hang on a dead channel
    for act_order in (False, True):
        spec = LinearSpec(4, search=False)
        rounded = solve(weight, hessian_of(inputs), spec, damp=0.01, act_order=act_order).dequantise()
        assert torch.all(rounded[:, dead] == 0)
        alone = solve(weight[:, alive], hessian_of(inputs[:, alive]), spec, damp=1e-9, act_order=act_order)
        exact = solve(weight, hessian_of(inputs), spec, damp=1e-9, act_order=act_order).dequantise()
        assert torch.equal(exact[:, alive], alone.dequantise())


def test_inverse_factor() -> None:
    hessian = hessian_of(correlated(300, 60, 8))
    before = hessian.clone()
    factor = inverse_factor(hessian, 0.01)
    assert torch.equal(hessian, before)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(60, dtype=torch.float64)
    torch.testing.assert_close(
        factor.T @ factor @ damped, torch.eye(60, dtype=torch.float64), rtol=0, atol=1e-9
    )
    assert torch.equal(factor, factor.triu())


def test_few_calibration_tokens_are_enough() -> None:
    """Fewer tokens than channels leave the Hessian singular; the damping makes up for it."""
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(9))
    inputs = correlated(40, 256, 10, torch.float32)
    result = solve(weight, hessian_of(inputs), LinearSpec(4), damp=0.01, act_order=False).dequantise()
    assert result.isfinite().all()
    nearest = round_to_nearest(weight, LinearSpec(4)).dequantise()
    assert output_error(result, weight, inputs) < output_error(nearest, weight, inputs)


def test_hessians_that_are_not_finite_are_refused() -> None:
    hessian = torch.eye(16)
    hessian[3, 3] = float("nan")
    with pytest.raises(UserError, match="Hessian"):
        solve(torch.randn(4, 16), hessian, LinearSpec(4), damp=0.01, act_order=False)


def test_codes_hold_every_width() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(11))
    for bits in range(2, 9):
        for symmetric, dtype in ((True, torch.int8), (False, torch.uint8)):
            result: QuantisedWeight = round_to_nearest(
                weight, LinearSpec(bits, symmetric=symmetric, search=False)
            )
            assert result.codes.dtype == dtype
            error = float((result.dequantise() - weight).norm() / weight.norm())
            assert error < 1.6 * 2.0 ** (1 - bits)
