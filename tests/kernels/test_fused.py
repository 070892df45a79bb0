"""RMSNorm and Hadamard followed by quantising, to the bit what the decoder's modules and `quantise` do."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import pass_reference
from kernels.hadamard import hadamard_matrix, is_known_order, largest_known_divisor
from kernels.pass_reference import (
    gated,
    hadamard,
    hadamard_quantise,
    online_hadamard,
    rmsnorm,
    rmsnorm_quantise,
)
from kernels.reference import Quantiser, dequantise, fake_quantise, quantise
from methods.decoder import RMSNorm
from methods.linear import OnlineHadamard
from tests.equality import same, same_codes

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


QUANTISERS: st.SearchStrategy[Quantiser] = st.builds(
    lambda bits, symmetric, clip, group, static: {
        "bits": bits,
        "symmetric": symmetric,
        "clip": 1.0 if static else clip,
        "group": group,
        "scale": torch.tensor(0.25) if static else None,
        "zero": torch.tensor(2.0) if static and not symmetric else None,
    },
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([1.0, 0.9]),
    st.sampled_from([None, 4]),
    st.booleans(),
)


@given(
    QUANTISERS,
    st.sampled_from(DTYPES),
    st.sampled_from([(3, 16), (1, 2, 24), (0, 8), (8,)]),
    st.sampled_from([None, 7, 12]),
    st.sampled_from([None, "full", "single"]),
    st.booleans(),
    st.sampled_from([0, 4]),
    st.booleans(),
)
def test_rmsnorm_equals_the_module_and_the_quantiser(
    quantiser: Quantiser,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    divisor: int | None,
    gain: str | None,
    scaled: bool,
    keep: int,
    strided: bool,
) -> None:
    module = RMSNorm(shape[-1], 1e-5, gain == "single", divisor)
    if gain is None:
        module.weight = None
    else:
        assert module.weight is not None
        module.weight = torch.nn.Parameter(random(*module.weight.shape, seed=1, dtype=dtype), False)
    x = random(*shape, dtype=dtype) * 3
    if strided:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    wide = torch.promote_types(dtype, torch.float32)
    row_scale = random(*shape[:-1], 1, seed=2, dtype=wide).abs() + 0.5 if scaled else None
    norm: dict[str, Any] = {"eps": 1e-5, "divisor": divisor, "gain": module.weight, "row_scale": row_scale}
    stream, kept, q, rms, scale = rmsnorm_quantise(x, **norm, keep=keep, **quantiser)
    want_rms = module.rms(x, row_scale)
    if row_scale is None:
        assert stream is x and scale is None
        y = module(x)
    else:
        assert same(stream, (x / want_rms).to(dtype)) and same(scale, row_scale / want_rms)
        y = module.apply_gain(stream)
    assert rms.dtype == wide and torch.equal(rms, want_rms)
    assert same(kept, y[..., :keep] if keep else None)
    assert same_codes(q, quantise(y[..., keep:], **quantiser))
    floats = rmsnorm(x, **norm)
    assert same(floats.stream, stream) and same(floats.normalised, y) and same(floats.rms, rms)
    assert same(floats.row_scale, scale) and (floats.stream is x) == (not scaled)
    # What the simulated path multiplies is the same.
    assert torch.equal(dequantise(q).to(dtype), fake_quantise(y[..., keep:], **quantiser))


def test_rmsnorm_against_float64() -> None:
    x, gain, scale = random(5, 24), random(24, seed=1), random(5, 1, seed=2).abs()
    stream, kept, q, rms, scaled = rmsnorm_quantise(
        x, eps=0.1, divisor=16, gain=gain, row_scale=scale, keep=8, bits=8, symmetric=True
    )
    wide = x.double()
    want = (wide.square().sum(-1, keepdim=True) / 16 + 0.1 * scale.double() ** 2).sqrt()
    torch.testing.assert_close(rms, want.float())
    assert kept is not None and scaled is not None
    torch.testing.assert_close(stream, (wide / want).float())
    torch.testing.assert_close(scaled, (scale.double() / want).float())
    torch.testing.assert_close(kept, (wide / want * gain)[:, :8].float())
    error = (dequantise(q) - (wide / want * gain)[:, 8:]).abs()
    assert (error <= 0.5001 * q.scale).all()


def test_rmsnorm_of_zero_and_poisoned_rows() -> None:
    x = random(4, 16)
    options: dict[str, Any] = {"eps": 1e-6, "keep": 4, "bits": 4, "symmetric": True}
    clean = rmsnorm_quantise(x, **options)
    for bad in (NAN, INF, -INF, 3e38):  # the last one's square overflows, so that its row becomes 0
        x[1, 9] = bad
        x[2] = 0.0
        _, kept, q, rms, _ = rmsnorm_quantise(x, **options)
        assert kept is not None and clean.kept is not None
        for i in (0, 3):
            assert torch.equal(kept[i], clean.kept[i]) and torch.equal(rms[i], clean.rms[i])
            assert torch.equal(q.codes[i], clean.codes.codes[i])
            assert torch.equal(q.scale[i], clean.codes.scale[i])
        assert (q.codes[2] == 0).all() and (kept[2] == 0).all() and rms[2] == pytest.approx(1e-3)
        values = dequantise(q)[1]
        assert (values == 0).all() if bad == 3e38 else values.isnan().all()


@given(st.integers(1, 6), st.floats(1e-3, 10.0), st.integers(0, 9))
def test_a_scaled_stream_is_the_plain_one_times_its_scale(layers: int, eps: float, seed: int) -> None:
    """Norms of it are those of the plain stream, however many branches have been added: in float64, by steps
    that know of no scale."""
    plain = random(3, 8, seed=seed, dtype=torch.float64)
    base, scale, branch = plain, torch.ones(3, 1, dtype=torch.float64), None
    for layer in range(layers):
        matrix = random(8, 8, seed=10 * seed + layer, dtype=torch.float64)
        found = rmsnorm(base, add=branch, eps=eps, row_scale=scale)
        want = plain / (plain.square().mean(-1, keepdim=True) + eps).sqrt()
        torch.testing.assert_close(found.normalised, want, rtol=1e-10, atol=1e-12)
        assert found.row_scale is not None
        base, scale = found.stream, found.row_scale
        plain = plain + want @ matrix
        branch = found.normalised @ matrix * scale
        torch.testing.assert_close(base + branch, scale * plain, rtol=1e-10, atol=1e-12)


@given(QUANTISERS, st.sampled_from(DTYPES), st.booleans(), st.sampled_from([0, 4]))
def test_a_sum_is_rounded_and_then_normalised(
    quantiser: Quantiser, dtype: torch.dtype, gain: bool, keep: int
) -> None:
    """As a decoder's layers do it one after another, whose stream stays in its dtype."""
    x, add = random(2, 3, 48, dtype=dtype).chunk(2, dim=-1)
    norm: dict[str, Any] = {"eps": 1e-5, "gain": random(24, seed=3, dtype=dtype) if gain else None}
    wide = torch.promote_types(dtype, torch.float32)
    stream = (x.to(wide) + add.to(wide)).to(dtype)
    found = rmsnorm_quantise(x, add=add, **norm, keep=keep, **quantiser)
    want = rmsnorm_quantise(stream, **norm, keep=keep, **quantiser)
    assert same(found.stream, stream) and same(found.rms, want.rms) and same(found.kept, want.kept)
    assert same_codes(found.codes, want.codes)
    floats = rmsnorm(x, add=add, **norm)
    assert same(floats.stream, stream) and same(floats.normalised, rmsnorm(stream, **norm).normalised)


@given(QUANTISERS, st.sampled_from(DTYPES), st.sampled_from([0, 4]))
def test_a_gate_goes_before_the_pass(quantiser: Quantiser, dtype: torch.dtype, keep: int) -> None:
    gate, up = random(2, 3, 48, dtype=dtype).chunk(2, dim=-1)
    y = torch.nn.functional.silu(gate) * up
    assert same(gated(gate, up), y)
    bits, rest = quantiser["bits"], {k: v for k, v in quantiser.items() if k != "bits"}
    found = pass_reference.quantise(up, bits, gate=gate, **rest)  # type: ignore[arg-type]
    assert same_codes(found, quantise(y, **quantiser))
    assert same(hadamard(up, gate=gate, size=12), online_hadamard(y, 12))
    kept, q = hadamard_quantise(up, gate=gate, size=4, inner=3, keep=keep, **quantiser)
    want_kept, want = hadamard_quantise(y, size=4, inner=3, keep=keep, **quantiser)
    assert same(kept, want_kept) and same_codes(q, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gate_against_float64(dtype: torch.dtype) -> None:
    """Every 16-bit number as a gate: silu and the product are each rounded once."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    gate = gate[gate.isfinite() & (gate > -88)]
    up = random(len(gate), dtype=dtype)
    silu = (gate.double() * torch.sigmoid(gate.double())).to(dtype)
    want = (silu.double() * up.double()).to(dtype)
    differing = (gated(gate, up) != want).double().mean()
    assert differing < 1e-4  # where float32's silu lies at a middle
    one = torch.ones(())
    assert gated(one * float("inf"), one).isinf() and gated(one * -float("inf"), one).isnan()
    assert gated(one * -200, one) == 0


@pytest.mark.parametrize("size", [n for n in range(1, 201) if is_known_order(n)])
def test_hadamard_of_every_size(size: int) -> None:
    x = random(3, 2 * size, seed=size)
    module = OnlineHadamard(size)
    assert torch.equal(online_hadamard(x, size), module(x))
    want = (x.double().view(3, 2, size) @ hadamard_matrix(size)).flatten(1) / size**0.5
    torch.testing.assert_close(online_hadamard(x, size).double(), want, rtol=1e-5, atol=1e-5)
    kept, q = hadamard_quantise(x, size=size, bits=4, symmetric=True, clip=0.9)
    assert kept is None and same_codes(q, quantise(module(x), 4, symmetric=True, clip=0.9))


@pytest.mark.parametrize("width", [7, 14, 92, 172, 107 * 4, 576])
def test_hadamard_in_blocks_where_the_whole_is_unknown(width: int) -> None:
    x = random(2, width)
    size = largest_known_divisor(width)
    _, q = hadamard_quantise(x, size=size, bits=8, symmetric=False)
    assert same_codes(q, quantise(OnlineHadamard(size)(x), 8, symmetric=False))
    with pytest.raises(ValueError, match="no Hadamard matrix of order 92"):
        hadamard_quantise(random(1, 92), size=92, bits=4, symmetric=True)


@given(
    QUANTISERS,
    st.sampled_from(DTYPES),
    st.sampled_from([1, 2, 4, 12]),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([0, 4]),
    st.booleans(),
)
def test_hadamard_equals_the_module_and_the_quantiser(
    quantiser: Quantiser, dtype: torch.dtype, size: int, inner: int, keep: int, strided: bool
) -> None:
    x = random(2, 3, 8 * size * inner, dtype=dtype)
    if strided:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    y = OnlineHadamard(size, inner)(x)
    kept, q = hadamard_quantise(x, size=size, inner=inner, keep=keep, **quantiser)
    assert torch.equal(online_hadamard(x, size, inner), y)
    assert same(kept, y[..., :keep] if keep else None)
    assert same_codes(q, quantise(y[..., keep:], **quantiser))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_hadamard_of_zero_and_poisoned_rows(bad: float) -> None:
    x = random(4, 16)
    _, clean = hadamard_quantise(x, size=16, bits=4, symmetric=False)
    x[1, 9], x[2] = bad, 0.0
    _, q = hadamard_quantise(x, size=16, bits=4, symmetric=False)
    values = dequantise(q)
    assert torch.equal(values[[0, 3]], dequantise(clean)[[0, 3]])
    assert values[1].isnan().all() and (values[2] == 0).all()


def test_inference_mode() -> None:
    x = random(2, 24)
    want = rmsnorm_quantise(x, eps=1e-5, bits=4, symmetric=True).codes
    turned = hadamard_quantise(x, size=24, bits=4, symmetric=True)[1]
    with torch.inference_mode():
        assert same_codes(rmsnorm_quantise(x, eps=1e-5, bits=4, symmetric=True).codes, want)
        assert same_codes(hadamard_quantise(x, size=24, bits=4, symmetric=True)[1], turned)
