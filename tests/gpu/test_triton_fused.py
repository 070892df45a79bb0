"""The fused quantising kernels on a GPU: codes, scales and zero-points of the reference bit for bit, RMSNorm
and Hadamard against float64.

A kernel is compiled anew for every width, dtype and way to quantise, which takes longer than to run it. So
these go around together, each with another, and do not multiply.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import pass_reference, reference
from kernels.reference import Quantised, Quantiser
from tests.equality import same, same_codes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytest.importorskip("triton", reason="needs triton")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Half the distance of neighbouring numbers, in units of the number.
HALF_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
BF16, FP16, FP32 = DTYPES
WIDTHS = [
    *[(1, FP32, 4), (64, BF16, 8), (100, BF16, 2), (100, FP16, 3), (129, FP16, 4)],
    *[(1536, FP32, 8), (4096, BF16, 4), (5000, FP16, 8), (14336, BF16, 4), (32768, FP32, 4)],
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """What the allocator hands out next is NaN, or the code -1: an element that is not written shows."""
    for size in (2**12, 2**16, 2**20, 2**24):
        torch.full((size,), -1, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hard_rows(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Twelve rows: plain, zero, outlier, tiny, NaN, Inf, halves (ties), the smallest and largest numbers."""
    x = random(12, n, dtype=torch.float64, seed=seed + n) * 3
    x[1], x[2, n // 3] = 0.0, 1e4
    x[3] *= 1e-6
    x[4, n // 2], x[5, -1], x[6, 0] = float("nan"), float("inf"), -float("inf")
    x[7] = torch.randint(-14, 15, (n,), generator=torch.Generator().manual_seed(seed)) / 2
    x[7, 0] = -7.0
    x[8] = x[7] * torch.finfo(dtype).smallest_normal / 16
    x[9] = x[7] / 8 * torch.finfo(dtype).max
    x[10, 1:] = 0.0
    x[11] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the least subnormal
    return x.to(dtype)


def on_cpu(y: Tensor, quantiser: Quantiser) -> Quantised:
    """The reference's codes of y, on the CPU."""
    static: dict[str, Any] = {
        key: value.cpu() if isinstance(value, Tensor) else value for key, value in quantiser.items()
    }
    return reference.quantise(y.cpu(), **static)


QUANTISERS: list[dict[str, Any]] = [
    {"symmetric": True},
    {"symmetric": True, "clip": 0.9},
    {"symmetric": True, "clip": 0.1},
    {"symmetric": False},
    {"symmetric": False, "clip": 0.8},
]


@pytest.mark.parametrize(("n", "dtype", "bits"), WIDTHS)
def test_codes_are_the_reference_s(n: int, dtype: torch.dtype, bits: int) -> None:
    from kernels.triton.quantise import quantise

    x = hard_rows(n, dtype)
    for quantiser in QUANTISERS:
        found = quantise(x.cuda(), bits, **quantiser)
        assert same_codes(found, reference.quantise(x, bits, **quantiser)), quantiser


@pytest.mark.parametrize(("dtype", "bits"), [(BF16, 4), (FP16, 8)])
def test_static_ranges(dtype: torch.dtype, bits: int) -> None:
    from kernels.triton.quantise import quantise

    x = hard_rows(1000, dtype)
    each = random(12, 1, seed=5).abs() + 0.01
    ranges: list[dict[str, Any]] = [
        {"scale": torch.tensor(0.3)},
        {"scale": torch.tensor([0.02])},
        {"scale": each},
        {"scale": torch.tensor(0.3), "zero": torch.tensor(3.0)},
        {"scale": each, "zero": (each * 3).round()},
        {"scale": torch.tensor(1e-42)},
        {"scale": torch.tensor(0.0)},
    ]
    for static in ranges:
        quantiser: Any = {"bits": bits, "symmetric": "zero" not in static, **static}
        there: Any = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in quantiser.items()}
        assert same_codes(quantise(x.cuda(), **there), reference.quantise(x, **quantiser)), quantiser


@pytest.mark.parametrize(("dtype", "every"), [(BF16, (4, 8)), (FP16, (4,))])
def test_ties_round_as_true_division_does(dtype: torch.dtype, every: tuple[int, ...]) -> None:
    """Rows of few distinct significands under many maxima: quotients lie on and beside the halves."""
    from kernels.triton.quantise import quantise

    top = torch.arange(1, 2049, dtype=torch.float64)[:, None]
    x = (torch.linspace(-1, 1, 449, dtype=torch.float64)[None, :] * top).to(dtype)
    x[:, 0] = top[:, 0].to(dtype)
    for bits in every:
        for clip in (1.0, 0.9, 0.77):
            found = quantise(x.cuda(), bits, symmetric=True, clip=clip)
            assert same_codes(found, reference.quantise(x, bits, symmetric=True, clip=clip)), (bits, clip)


@pytest.mark.parametrize("shape", [(0, 8), (8,), (1, 4096), (2, 3, 33), (65, 4096), (1000, 20)])
def test_shapes_and_strides(shape: tuple[int, ...]) -> None:
    from kernels.triton.quantise import quantise

    x = random(*shape, dtype=torch.bfloat16)
    assert same_codes(quantise(x.cuda(), 4, symmetric=True), reference.quantise(x, 4, symmetric=True))
    if shape in ((2, 3, 33), (1000, 20)):
        there = x.cuda()
        for view, here in (
            (there[..., 1:], x[..., 1:]),
            (there[::2, ..., :-2], x[::2, ..., :-2]),
            (there.transpose(0, -1), x.transpose(0, -1)),
            (there[:1].expand(3, *shape[1:]), x[:1].expand(3, *shape[1:])),
        ):
            assert same_codes(quantise(view, 4, symmetric=True), reference.quantise(here, 4, symmetric=True))


@pytest.mark.parametrize(
    ("n", "dtype", "turn"),
    [(64, FP16, 0), (100, BF16, 1), (1536, FP32, 2), (4096, BF16, 3), (5000, FP16, 4), (14336, BF16, 5)],
)
def test_rmsnorm(n: int, dtype: torch.dtype, turn: int) -> None:
    from kernels.triton.rmsnorm_quantise import rmsnorm, rmsnorm_quantise

    x = hard_rows(n, dtype)
    x[6] = random(n, dtype=dtype)  # of the infinite rows one is enough
    gain, row_scale = random(n, seed=3, dtype=dtype), random(12, 1, seed=4).abs()
    cases: list[dict[str, Any]] = [
        {},
        {"gain": gain},
        {"gain": gain, "keep": 64 if n > 64 else 3},
        {"gain": gain[:1], "row_scale": row_scale, "divisor": n - 5},
        {"keep": 5},
        {"add": random(12, 2 * n, seed=6, dtype=dtype)[:, n:], "keep": 5},
        {"add": hard_rows(n, dtype, seed=7).roll(1, 0), "gain": gain, "row_scale": row_scale},
        {"add": random(12, n, seed=8, dtype=dtype), "row_scale": row_scale},
    ]
    quantisers: list[Any] = [
        {"bits": 4, "symmetric": True},
        {"bits": 8, "symmetric": True, "clip": 0.9},
        {"bits": 4, "symmetric": False, "scale": torch.tensor(0.2), "zero": torch.tensor(6.0)},
    ]
    for step in range(4):
        case, quantiser = cases[(turn + 3 * step) % 8], quantisers[(turn + step) % 3]
        given: Any = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in quantiser.items()}
        there: Any = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in case.items()}
        floats: Any = {k: v for k, v in there.items() if k != "keep"}
        want = pass_reference.rmsnorm_quantise(x, eps=1e-5, **case, **quantiser)
        floor = 1e-5 * (row_scale.double() ** 2 if "row_scale" in case else 1.0)
        total = x + case["add"] if "add" in case else x
        exact = (total.double().square().sum(-1, keepdim=True) / case.get("divisor", n) + floor).sqrt()
        stream, kept, q, rms, scale = rmsnorm_quantise(x.cuda(), eps=1e-5, **there, **given)
        normed = rmsnorm(x.cuda(), eps=1e-5, **floats)
        for goes_on, root, new in ((stream, rms, scale), (normed.stream, normed.rms, normed.row_scale)):
            if "row_scale" in case:
                assert same(goes_on, (total / root.cpu()).to(dtype)), case
                assert same(new, row_scale / root.cpu()), case
            else:
                assert same(goes_on, total) and new is None, case
        ordinary = torch.tensor([0, 1, 2, 3, 6, 7, 10])
        ordinary = ordinary[exact[ordinary, 0].isfinite() & (exact[ordinary, 0] < 1e18)]
        for root in (rms, normed.rms):
            torch.testing.assert_close(root.cpu()[ordinary], exact[ordinary].float(), rtol=1e-6, atol=0.0)
        # Given the rms, everything else is the reference's to the bit.
        y, z = ((total / root.cpu()).to(dtype) for root in (rms, normed.rms))
        y, z = (part * case["gain"] if "gain" in case else part for part in (y, z))
        keep = case.get("keep", 0)
        assert same(kept, y[:, :keep] if keep else None), case
        assert same_codes(q, on_cpu(y[:, keep:], quantiser)), (case, quantiser)
        assert same(normed.normalised, z), case
        # The reference's own rms differs in its last bits at most, and so do few codes.
        # Row 7 is all ties, which any other rms breaks.
        apart = (q.codes.cpu().int() - want.codes.codes.int()).abs()[ordinary]
        few = apart[ordinary != 7]
        assert apart.max() <= 1 and (few > 0).sum() <= max(5e-3 * few.numel(), 2), (case, quantiser)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_gate(dtype: torch.dtype) -> None:
    """All 16-bit numbers: silu is torch's but for few last bits, and so is its product with a number."""
    from kernels.triton.gated import gated

    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    for up in (torch.ones_like(gate), random(64, 1024, dtype=dtype)):
        as_the_reference(gated(gate.cuda(), up.cuda()).cpu(), gate, up, few=2e-3)


GATED: list[tuple[int, int, int, torch.dtype, int, dict[str, Any]]] = [
    *[(100, 20, 5, BF16, 0, QUANTISERS[0]), (128, 128, 1, FP16, 5, QUANTISERS[3])],
    *[(576, 576, 1, BF16, 64, QUANTISERS[1]), (1536, 1536, 1, FP32, 0, QUANTISERS[0])],
    *[(4096, 32, 128, BF16, 0, QUANTISERS[0]), (8192, 8192, 1, BF16, 0, QUANTISERS[0])],
    *[(14336, 14336, 1, BF16, 0, QUANTISERS[0]), (14336, 14336, 1, FP16, 64, QUANTISERS[1])],
    *[(18944, 18944, 1, BF16, 0, QUANTISERS[3]), (8192, 8192, 1, FP32, 0, QUANTISERS[0])],
]


@pytest.mark.parametrize(("n", "size", "inner", "dtype", "keep", "how"), GATED)
def test_a_gate(n: int, size: int, inner: int, dtype: torch.dtype, keep: int, how: dict[str, Any]) -> None:
    """The halves of merged rows. All passes form one product, and what follows is theirs without a gate."""
    from kernels.triton.gated import gated
    from kernels.triton.hadamard_quantise import hadamard, hadamard_quantise
    from kernels.triton.quantise import quantise

    hard, plain = hard_rows(n, dtype), random(12, n, seed=n, dtype=dtype)
    every: Any = {"bits": 8 if keep else 4, **how}
    for gate, up in ((hard, plain), (plain, hard)):
        gates, ups = torch.cat((gate, up), dim=1).cuda().chunk(2, dim=1)
        y = gated(gates, ups)
        as_the_reference(y.cpu(), gate, up)
        assert same_codes(quantise(ups, gate=gates, **every), on_cpu(y, every))
        shape: dict[str, Any] = {"size": size, "inner": inner}
        assert same(hadamard(ups, gate=gates, **shape), hadamard(y, **shape))
        kept, q = hadamard_quantise(ups, gate=gates, keep=keep, **shape, **every)
        want_kept, want = hadamard_quantise(y, keep=keep, **shape, **every)
        assert same(kept, want_kept) and same_codes(q, want)
    # Many rows, of which a program takes several, and rows between multiples of four bytes.
    both = random(300, 2 * n + 1, seed=1, dtype=dtype).cuda()
    for gates, ups in (both[:, 1:].chunk(2, dim=1), both[:, :-1].chunk(2, dim=1)):
        y = gated(gates, ups)
        as_the_reference(y.cpu(), gates.cpu(), ups.cpu())
        assert same_codes(quantise(ups, gate=gates, **every), quantise(y, **every))
        found, want = (
            hadamard_quantise(x, gate=g, size=size, inner=inner, **every)[1]
            for x, g in ((ups, gates), (y, None))
        )
        assert same_codes(found, want)


def as_the_reference(y: Tensor, gate: Tensor, up: Tensor, few: float = 5e-3) -> None:
    """Infinities and NaN where torch has them. The others within two roundings of the true product, and few
    of 16 bits different from torch's."""
    want = pass_reference.gated(gate, up)
    finite = want.isfinite() & y.isfinite()
    # Beside the largest number, a rounding decides what is finite.
    assert int((want.isfinite() != y.isfinite()).sum()) <= 1
    assert same(y[want.isnan()], want[want.isnan()]) and torch.equal(want.isnan(), y.isnan())
    found, torchs, gate, up = (t[finite].double() for t in (y, want, gate, up))
    exact = gate * torch.sigmoid(gate) * up
    about = torch.finfo(y.dtype)
    lost = 2.0**-22 * (4 + gate.abs()) + 1.005 * about.eps
    tiny = about.smallest_normal * about.eps * (1.01 + up.abs())
    # Beyond -88 float32's exponential ends.
    assert bool(((found - exact).abs() <= lost * exact.abs() + tiny).where(gate > -88, True).all())
    if y.dtype != FP32:
        assert int((found != torchs).sum()) <= max(few * found.numel(), 2)


# n, size, inner, dtype, kept channels, quantiser
TRANSFORMS: list[tuple[int, int, int, torch.dtype, int, dict[str, Any]]] = [
    *[(2, 2, 1, FP32, 1, QUANTISERS[0]), (28, 28, 1, FP16, 14, QUANTISERS[3])],
    *[(128, 128, 1, BF16, 64, QUANTISERS[1]), (256, 256, 1, FP16, 0, QUANTISERS[1])],
    *[(512, 512, 1, FP32, 1, QUANTISERS[3]), (576, 576, 1, BF16, 64, QUANTISERS[0])],
    *[(1536, 1536, 1, FP16, 1, QUANTISERS[0]), (4096, 4096, 1, BF16, 64, QUANTISERS[3])],
    *[(8192, 8192, 1, FP16, 0, QUANTISERS[3]), (12288, 12288, 1, FP32, 0, QUANTISERS[1])],
    *[(14336, 14336, 1, FP16, 0, QUANTISERS[0]), (16384, 16384, 1, BF16, 0, QUANTISERS[3])],
    *[(18944, 18944, 1, BF16, 0, QUANTISERS[1]), (28672, 28672, 1, BF16, 1, QUANTISERS[1])],
    *[(32768, 32768, 1, BF16, 0, QUANTISERS[0]), (3072, 64, 16, BF16, 0, QUANTISERS[3])],
    *[(3584, 28, 128, BF16, 64, QUANTISERS[1]), (864, 24, 36, BF16, 0, QUANTISERS[0])],
    *[(4096, 512, 4, FP16, 1, QUANTISERS[1]), (396, 132, 1, BF16, 0, QUANTISERS[0])],
    *[(8192, 1024, 1, BF16, 0, QUANTISERS[0]), (13696, 128, 1, BF16, 0, QUANTISERS[3])],
]


@pytest.mark.parametrize(("n", "size", "inner", "dtype", "keep", "how"), TRANSFORMS)
def test_hadamard(n: int, size: int, inner: int, dtype: torch.dtype, keep: int, how: dict[str, Any]) -> None:
    from kernels.triton.hadamard_quantise import hadamard, hadamard_quantise

    x = random(9, n, seed=n, dtype=dtype)
    x[1] = 0.0
    x[2, n // 2] = 300.0
    y = hadamard(x.cuda(), size=size, inner=inner).cpu()
    exact = pass_reference.online_hadamard(x.double(), size, inner)
    own = (pass_reference.online_hadamard(x, size, inner).double() - exact).abs()
    error = (y.double() - exact).abs()
    # The result's own rounding, and of the largest number in the row what two terms of 17 bits lose, or in
    # float32 the sums.
    lost = (2.0**-19 if dtype == torch.float32 else 2.0**-17) * exact.abs().amax(-1, keepdim=True)
    assert bool((error <= HALF_UNIT[dtype] * exact.abs() + lost).all())
    if dtype != torch.float32:
        assert float(error.max()) <= 1.125 * float(own.max())
    every: Any = {"bits": 8 if keep == 64 else 4, **how}
    kept, q = hadamard_quantise(x.cuda(), size=size, inner=inner, keep=keep, **every)
    # The codes are exactly those of the transform alone.
    assert same(kept, y[:, :keep] if keep else None)
    assert same_codes(q, on_cpu(y[:, keep:], every))
    if how["symmetric"]:  # a zero-point beside another moves all codes of a row
        want = pass_reference.hadamard_quantise(x, size=size, inner=inner, keep=keep, **every)[1]
        apart = (q.codes.cpu().int() - want.codes.int()).abs()
        share = 5e-3 if keep != 64 else 3e-2
        assert apart.max() <= 1 and int((apart > 0).sum()) <= max(share * apart.numel(), 2)


CHOICES: list[tuple[int, torch.dtype, dict[str, int]]] = [
    *[(14336, BF16, {}), (14336, BF16, {"stages": 2}), (14336, BF16, {"height": 64, "programs": 3})],
    *[(4096, BF16, {"programs": 5, "stages": 1}), (8192, FP16, {"stages": 3}), (4096, FP32, {})],
]


@pytest.mark.parametrize(("n", "dtype", "fields"), CHOICES)
def test_choices_of_hadamard(n: int, dtype: torch.dtype, fields: dict[str, int]) -> None:
    """Each is as close to float64 as another, its codes are its transform's, and NaN stays in its row."""
    from kernels.triton.hadamard_quantise import Choice, hadamard, hadamard_quantise

    choice = Choice(**fields)
    x = random(700, n, seed=n, dtype=dtype)
    x[1] = 0.0
    x[3, 5], x[600, n - 1] = float("nan"), float("inf")
    rows = x.cuda()
    y = hadamard(rows, size=n, choice=choice).cpu()
    good = torch.ones(len(x), dtype=torch.bool)
    good[[3, 600]] = False
    exact = pass_reference.online_hadamard(x[good][:20].double(), n)
    lost = (2.0**-19 if dtype == torch.float32 else 2.0**-17) * exact.abs().amax(-1, keepdim=True)
    assert bool(((y[good][:20].double() - exact).abs() <= HALF_UNIT[dtype] * exact.abs() + lost).all())
    assert bool(y[good].isfinite().all()) and not bool(y[[3, 600]].isfinite().any())
    # Also rows that start between multiples of four bytes: another way to read, and the same numbers.
    for view in (rows, torch.cat([x[:, :1], x], dim=1).cuda()[:, 1:]):
        q = hadamard_quantise(view, size=n, choice=choice, bits=4, symmetric=True)[1]
        assert same_codes(q, reference.quantise(y, 4, symmetric=True))
    small = rows[:20] * 1e-38  # bfloat16 and float32 are subnormal here, and so is the scale
    q = hadamard_quantise(small, size=n, choice=choice, bits=4, symmetric=True)[1]
    assert same_codes(q, on_cpu(hadamard(small, size=n, choice=choice), {"bits": 4, "symmetric": True}))
    if fields.get("stages"):
        return
    static: Any = {"bits": 4, "symmetric": True, "scale": torch.tensor(1e-30)}
    there = {**static, "scale": static["scale"].cuda()}
    q = hadamard_quantise(rows[:20] * 1e-30, size=n, choice=choice, **there)[1]
    assert same_codes(q, on_cpu(hadamard(rows[:20] * 1e-30, size=n, choice=choice), static))


@pytest.mark.parametrize(
    ("n", "size", "inner", "dtype"),
    [(14336, 14336, 1, BF16), (4096, 32, 128, BF16), (4096, 4096, 1, FP32)],
)
def test_poisoned_rows_stay_alone(n: int, size: int, inner: int, dtype: torch.dtype) -> None:
    from kernels.triton.hadamard_quantise import hadamard_quantise

    x = random(8, n, dtype=dtype)
    clean = hadamard_quantise(x.cuda(), size=size, inner=inner, bits=4, symmetric=True)[1]
    x[2, 77], x[5, n - 1], x[6, 0] = float("nan"), float("inf"), -float("inf")
    q = hadamard_quantise(x.cuda(), size=size, inner=inner, bits=4, symmetric=True)[1]
    bad = torch.tensor([2, 5, 6])
    assert not q.scale.cpu()[bad].isfinite().any()
    assert not q.codes.cpu()[bad].any()
    good = torch.tensor([0, 1, 3, 4, 7])
    assert torch.equal(q.codes.cpu()[good], clean.codes.cpu()[good])
    assert torch.equal(q.scale.cpu()[good], clean.scale.cpu()[good])


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("rows", [1, 2049])
def test_two_runs_and_a_graph_give_the_same_bits(rows: int, overlapped: bool) -> None:
    """Also where each launch may begin before the one in front of it, which writes its input, has ended."""
    from kernels.triton.gated import gated
    from kernels.triton.hadamard_quantise import hadamard_quantise
    from kernels.triton.quantise import quantise
    from kernels.triton.rmsnorm_quantise import rmsnorm, rmsnorm_quantise

    x = random(rows, 4096, dtype=torch.bfloat16).cuda()
    gain = random(4096, seed=3, dtype=torch.bfloat16).cuda()
    source = x.clone()
    quantiser: Any = {"bits": 4, "symmetric": True}

    def run() -> list[Tensor]:
        torch.mul(source, 1.0, out=x)
        parts = (
            hadamard_quantise(x, size=4096, overlapped=overlapped, **quantiser)[1],
            rmsnorm_quantise(x, eps=1e-5, overlapped=overlapped, **quantiser).codes,
            quantise(x, overlapped=overlapped, **quantiser),
        )
        # Each reads what the one in front of it writes.
        normed = rmsnorm(x, add=x, eps=1e-5, gain=gain, overlapped=overlapped)
        y = gated(normed.normalised, normed.stream, overlapped=overlapped)
        summed = rmsnorm_quantise(normed.stream, add=y, eps=1e-5, overlapped=overlapped, **quantiser)
        more = (
            summed.codes,
            hadamard_quantise(y, gate=summed.stream, size=4096, overlapped=overlapped, **quantiser)[1],
            quantise(summed.stream, gate=y, overlapped=overlapped, **quantiser),
        )
        codes = [tensor for q in (*parts, *more) for tensor in (q.codes, q.scale)]
        return [*codes, normed.stream, normed.normalised, y, summed.stream, summed.rms]

    first = [tensor.clone() for tensor in run()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        x.zero_()
        for tensor in captured:
            tensor.fill_(-1)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_rows_far_into_memory() -> None:
    """Offsets beyond 2^31 elements."""
    from kernels.triton.hadamard_quantise import hadamard_quantise
    from kernels.triton.quantise import quantise

    n = 14336
    rows = 2**31 // n + 3
    x = torch.zeros(rows, n, dtype=torch.bfloat16, device="cuda")
    x[-1] = random(n, dtype=torch.bfloat16).cuda()
    q = quantise(x, 4, symmetric=True)
    assert same(q.codes[-1], reference.quantise(x[-1].cpu(), 4, symmetric=True).codes)
    h = hadamard_quantise(x, size=n, bits=4, symmetric=True)[1]
    assert same(h.codes[-1], hadamard_quantise(x[-2:], size=n, bits=4, symmetric=True)[1].codes[-1])
