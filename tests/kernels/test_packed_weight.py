"""Packed weights: what they stand for, and the linear layer on floating-point inputs (weight-only)."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.packing import pack
from kernels.reference import dequantise, dequantise_weight, linear, pack_weight, quantise
from methods.bits import LinearSpec
from methods.linear import Linear, QuantisedWeight


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from([(None, 1), (8, 1), (3, 0), (None, 0)]),
    st.integers(2, 8),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 5]),
)
def test_weight_only_equals_the_simulated_linear(
    dtype: torch.dtype,
    groups: tuple[int | None, int],
    bits: int,
    symmetric: bool,
    bias: bool,
    scaled: bool,
    keep: int,
) -> None:
    group, axis = groups
    module = Linear(24 + keep, 9, bias=bias)
    module.set_weight(random(9, 24 + keep, seed=bits, dtype=dtype))
    if bias:
        module.bias = torch.nn.Parameter(random(9, seed=1, dtype=dtype), requires_grad=False)
    full = module.weight[:, keep:]
    source = full if axis == 1 else full.t()
    q = quantise(source, bits, symmetric=symmetric, group=group)
    zero = None if q.zero is None else q.zero + 0.3
    parts = [None if part is None else (part if axis == 1 else part.t()) for part in (q.codes, q.scale, zero)]
    assert parts[0] is not None and parts[1] is not None
    spec = LinearSpec(bits, group, axis, symmetric, keep=keep)
    quantised = QuantisedWeight(parts[0], parts[1], parts[2], spec)
    module.round_to(quantised)
    packed = pack_weight(parts[0], parts[1], parts[2], bits, axis)
    assert packed.group == (group or (24 if axis == 1 else 9))
    assert torch.equal(dequantise_weight(packed), quantised.dequantise())
    assert torch.equal(dequantise_weight(packed, dtype), quantised.dequantise().to(dtype))
    x = random(2, 3, 24 + keep, seed=2, dtype=dtype)
    row_scale = random(2, 3, 1, seed=3) if scaled else None
    got = linear(
        x[..., keep:],
        packed,
        x_keep=x[..., :keep] if keep else None,
        w_keep=module.weight[:, :keep] if keep else None,
        bias=module.bias,
        row_scale=row_scale,
        dtype=dtype,
    )
    assert got.dtype == dtype and torch.equal(got, module.apply_to(x, row_scale))


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_are_dequantised_in_any_pieces(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = random(12, 12, seed=0)
    q = quantise(w, 4, symmetric=False, group=4)
    zero = q.zero
    assert zero is not None
    packed = pack_weight(q.codes, q.scale if axis else q.scale.t(), zero if axis else zero.t(), 4, axis)
    whole = dequantise_weight(packed)
    for size in (1, 13, 60, 144):
        monkeypatch.setattr(reference, "_TILE", size)
        assert torch.equal(dequantise_weight(packed), whole)
    assert axis == 0 or torch.equal(whole, dequantise(q))


def test_sums_of_columns_are_those_of_the_stored_codes() -> None:
    q = quantise(random(5, 24, seed=0) + 0.2, 4, symmetric=False, group=8)
    packed = pack_weight(q.codes, q.scale, q.zero, 4, colsum=True)
    assert packed.colsum is not None and packed.colsum.dtype == torch.int32
    assert torch.equal(packed.colsum.long(), (q.codes.long() - 8).view(5, 3, 8).sum(-1))
    assert pack_weight(q.codes, q.scale, q.zero, 4).colsum is None
    assert torch.equal(packed.packed, pack(q.codes, 4)) and not packed.signed


def test_bad_arguments() -> None:
    codes, scale = torch.zeros(6, 8, dtype=torch.int8), torch.ones(6, 2)
    unsigned, zero = codes.to(torch.uint8), torch.ones(6, 2)
    bad_weights: list[tuple[tuple[Any, ...], str]] = [
        ((codes, torch.ones(6, 3), None, 4), "do not fit a weight"),
        ((codes, torch.ones(5, 2), None, 4), "do not fit a weight"),
        ((codes, torch.ones(6), None, 4), "do not fit a weight"),
        ((codes[0], scale, None, 4), "do not fit a weight"),
        ((codes[:, :0], torch.ones(6, 0), None, 4), "do not fit a weight"),
        ((codes, torch.ones(4, 8), None, 4, 0), "do not fit a weight"),
        ((codes, scale, None, 4, 2), "axis 0 or 1"),
        ((unsigned, scale, torch.ones(6, 1), 4), "do not fit scales"),
        ((unsigned, scale, zero.double(), 4), "do not fit scales"),
        ((unsigned, scale, None, 4), "unsigned codes have zero-points"),
        ((codes, scale, zero, 4), "signed codes have none"),
        ((codes + 8, scale, None, 4), "lie in"),
        ((codes.int(), scale, None, 4), "int8 or uint8"),
    ]
    for arguments, message in bad_weights:
        with pytest.raises(ValueError, match=message):
            pack_weight(*arguments)
