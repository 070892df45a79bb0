"""The linears for few rows on a GPU: integer ones bit for bit, 16-bit ones against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.reference import PackedWeight, Quantised, pack_weight
from tests.equality import same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytest.importorskip("triton", reason="needs triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """What the allocator hands out next is NaN: an element that is not written shows."""
    for size in (2**12, 2**16, 2**20, 2**24):
        torch.full((size,), float("nan"), device="cuda")
    torch.cuda.synchronize()


def few():  # type: ignore[no-untyped-def]
    from kernels.triton import linear_few

    return linear_few


def a16():  # type: ignore[no-untyped-def]
    from kernels.triton import linear_a16

    return linear_a16


def integers(m: int, n: int, k: int, seed: int = 0, bits: int = 8) -> tuple[Quantised, PackedWeight]:
    """Codes of the whole range; scales over many magnitudes."""
    g = torch.Generator().manual_seed(seed + 1000 * m + 10 * n + k)
    top = 2 ** (bits - 1)
    x = torch.randint(-top, top, (m, k), generator=g, dtype=torch.int8)
    w = torch.randint(-8, 8, (n, k), generator=g, dtype=torch.int8)
    x[:, 0], w[:, 0] = -top, -8
    x_scale = torch.exp(3 * torch.randn(m, 1, generator=g))
    w_scale = torch.exp(3 * torch.randn(n, 1, generator=g))
    return Quantised(x, x_scale, None, None, bits), pack_weight(w, w_scale, None, 4, colsum=True)


def shifted(x: Quantised, zero: Tensor) -> Quantised:
    """The same codes, unsigned, beside a zero-point."""
    codes = (x.codes.int() + 2 ** (x.bits - 1)).to(torch.uint8)
    return Quantised(codes, x.scale, zero.expand(x.scale.shape), None, x.bits)


def cuda_x(x: Quantised) -> Quantised:
    zero = None if x.zero is None else x.zero.cuda()
    return Quantised(x.codes.cuda(), x.scale.cuda(), zero, x.group, x.bits)


def cuda_w(w: PackedWeight) -> PackedWeight:
    zero = None if w.zero is None else w.zero.cuda()
    sums = None if w.colsum is None else w.colsum.cuda()
    return PackedWeight(w.packed.cuda(), w.scale.cuda(), zero, w.bits, w.inputs, w.signed, w.axis, sums)


@pytest.mark.parametrize("k", [32, 64, 96, 288, 576, 1536, 4096, 14336])
@pytest.mark.parametrize("n", [1, 8, 100, 129, 576])
def test_integer_linear_is_the_reference_bit_for_bit(n: int, k: int) -> None:
    for m in (1, 2, 7, 8, 9, 16, 31, 64):
        for bits, dtype in ((8, torch.bfloat16), (4, torch.float32)):
            x, w = integers(m, n, k, bits=bits)
            y = few().linear(cuda_x(x), cuda_w(w), dtype=dtype)
            assert same(y, reference.linear(x, w, dtype=dtype)), (m, bits)


@pytest.mark.parametrize("k", [32, 288, 4096, 14336])
@pytest.mark.parametrize("n", [8, 129])
def test_zero_points_are_taken_bit_for_bit(n: int, k: int) -> None:
    """One of all rows, in the codes and far from them, and one of each; with scales of rows behind."""
    for m in (1, 2, 9, 16, 33):
        for bits, dtype in ((8, torch.bfloat16), (4, torch.float32), (3, torch.float16)):
            x, w = integers(m, n, k, bits=bits)
            top, row_scale = 2**bits - 1, torch.rand(m, 1) + 0.5
            each = torch.randint(top + 1, (m, 1)).float()
            for zero in (torch.tensor(0.0), torch.tensor([top / 3]).round(), torch.tensor(1e6), each):
                q = shifted(x, zero)
                y = few().linear(cuda_x(q), cuda_w(w), row_scale=row_scale.cuda(), dtype=dtype)
                assert same(y, reference.linear(q, w, row_scale=row_scale, dtype=dtype)), (m, bits, zero)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 300, 4096), (5, 129, 576), (16, 192, 14336), (33, 64, 1536)])
def test_every_choice_gives_the_same_bits(m: int, n: int, k: int) -> None:
    x, w = integers(m, n, k)
    want = reference.linear(x, w, dtype=torch.float32)
    choices = few().candidates(m, n, k)
    assert choices
    for choice in choices:
        for at_rest in (False, True):
            y = few().linear(
                cuda_x(x), cuda_w(w), dtype=torch.float32, choice=choice, weights_at_rest=at_rest
            )
            assert same(y, want), choice
        q = shifted(x, torch.tensor([100.0]))
        y = few().linear(cuda_x(q), cuda_w(w), dtype=torch.float32, choice=choice)
        assert same(y, reference.linear(q, w, dtype=torch.float32)), choice


def test_rows_that_are_zero_infinite_or_not_numbers_keep_to_themselves() -> None:
    x, w = integers(16, 100, 576)
    x.codes[2] = 0
    x.scale[3], x.scale[4], x.scale[5] = float("nan"), float("inf"), 1e30
    w.scale[7], w.scale[8], w.scale[9] = 1e30, float("nan"), 1.1e-38
    y = few().linear(cuda_x(x), cuda_w(w), dtype=torch.bfloat16)
    assert same(y, reference.linear(x, w, dtype=torch.bfloat16))
    assert bool(y[3].isnan().all()) and bool(y[4].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_and_row_scale_come_in_the_order_of_the_reference(dtype: torch.dtype) -> None:
    x, w = integers(9, 130, 288)
    bias, row_scale = torch.randn(130).to(dtype), torch.rand(9, 1) + 0.5
    y = few().linear(cuda_x(x), cuda_w(w), bias=bias.cuda(), row_scale=row_scale.cuda(), dtype=dtype)
    assert same(y, reference.linear(x, w, bias=bias, row_scale=row_scale, dtype=dtype))


@pytest.mark.parametrize("keep", [16, 48, 64, 256])
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16])
def test_kept_channels_are_added_in_float32(keep: int, kept: torch.dtype) -> None:
    for m, n, k in ((1, 100, 576), (13, 129, 4096), (40, 32, 96)):
        x, w = integers(m, n, k, seed=keep)
        x = Quantised(x.codes, x.scale.clamp(1e-3, 1e-2), None, None, 8)
        x_keep, w_keep = torch.randn(m, keep).to(kept), torch.randn(n, keep).to(kept)
        y = few().linear(
            cuda_x(x), cuda_w(w), x_keep=x_keep.cuda(), w_keep=w_keep.cuda(), dtype=torch.float32
        )
        integer = reference.linear(x, w, dtype=torch.float32).double()
        want = integer + x_keep.double() @ w_keep.double().T
        largest = integer.abs() + x_keep.double().abs() @ w_keep.double().abs().T
        assert bool(((y.cpu().double() - want).abs() <= largest * 2e-6).all())


def test_shapes_devices_and_graphs() -> None:
    x, w = integers(6, 100, 96)
    x, w = cuda_x(x), cuda_w(w)
    want = few().linear(x, w, dtype=torch.bfloat16)
    batch = Quantised(x.codes.view(2, 3, 96), x.scale.view(2, 3, 1), None, None, 8)
    assert torch.equal(few().linear(batch, w, dtype=torch.bfloat16), want.view(2, 3, 100))
    none = Quantised(x.codes[:0], x.scale[:0], None, None, 8)
    assert few().linear(none, w, dtype=torch.bfloat16).shape == (0, 100)
    wide = torch.randint(-8, 8, (6, 128), dtype=torch.int8, device="cuda")
    gaps = Quantised(wide[:, :96], x.scale, None, None, 8)
    tight = Quantised(wide[:, :96].contiguous(), x.scale, None, None, 8)
    assert torch.equal(
        few().linear(gaps, w, dtype=torch.float32), few().linear(tight, w, dtype=torch.float32)
    )
    shifted = Quantised(wide[:, 1:97], x.scale, None, None, 8)
    tight = Quantised(wide[:, 1:97].clone(), x.scale, None, None, 8)
    assert torch.equal(
        few().linear(shifted, w, dtype=torch.float32), few().linear(tight, w, dtype=torch.float32)
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [
            few().linear(x, w, dtype=torch.bfloat16, weights_at_rest=rest) for rest in (False, True, True)
        ]
    for _ in range(3):
        for y in found:
            y.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(y, want) for y in found)


def test_a_chain_of_early_launches_sees_what_came_before() -> None:
    """Each linear's codes are made by the kernel in front of it, which may still run when it starts."""
    x, w = integers(1, 4096, 4096)
    w = cuda_w(PackedWeight(w.packed, torch.full((4096, 1), 1e-3), None, 4, 4096, True))

    def chain(at_rest: bool) -> Tensor:
        codes, scale = x.codes.cuda(), torch.ones(1, 1, device="cuda")
        for _ in range(10):
            y = few().linear(
                Quantised(codes, scale, None, None, 8), w, dtype=torch.float32, weights_at_rest=at_rest
            )
            codes = (y * (127 / y.abs().max())).round().to(torch.int8)
        return y

    want = chain(False)
    assert bool(want.abs().max() > 0)
    for _ in range(5):
        assert torch.equal(chain(True), want)


def floats(
    m: int, n: int, k: int, group: int, zeros: str, dtype: torch.dtype
) -> tuple[Tensor, PackedWeight, Tensor]:
    """x, a weight, and the weight's values in float64."""
    g = torch.Generator().manual_seed(m + 10 * n + k + group)
    x = torch.randn(m, k, generator=g).to(dtype)
    x[:, : min(k, 3)] *= 50
    groups = k // group
    scale = torch.exp(torch.randn(n, groups, generator=g)) * 0.01
    if zeros == "none":
        codes = torch.randint(-8, 8, (n, k), generator=g, dtype=torch.int8)
        zero = None
    else:
        codes = torch.randint(0, 16, (n, k), generator=g).to(torch.uint8)
        zero = torch.randint(-20, 36, (n, groups), generator=g).float()
        if zeros == "fractional":
            zero += torch.rand(n, groups, generator=g)
    w = pack_weight(codes, scale, zero, 4)
    values = codes.double().unflatten(1, (groups, group))
    values = (values - (0 if zero is None else zero.double().unsqueeze(-1))) * scale.double().unsqueeze(-1)
    return x, w, values.flatten(1)


def assert_close(y: Tensor, x: Tensor, values: Tensor, dtype: torch.dtype) -> None:
    """Within one rounding to `dtype` and float32's error for sums of products of 136 times their size."""
    want = x.double() @ values.T
    size = x.double().abs() @ values.abs().T
    bound = want.abs() * torch.finfo(dtype).eps + size * 2e-5
    y = y.cpu().double()
    assert bool(y.isfinite().all())
    assert bool(((y - want).abs() <= bound).all()), float(((y - want).abs() / bound).max())


@pytest.mark.parametrize("zeros", ["none", "whole", "fractional"])
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(129, 576, 576), (100, 96, 96), (64, 1024, 128), (100, 4096, 128), (300, 4096, 4096), (40, 14336, 128),
     (48, 1536, 64), (33, 512, 256)],
)  # fmt: skip
def test_16_bit_linear_against_float64(n: int, k: int, group: int, zeros: str) -> None:
    for m in (1, 3, 8, 16, 33, 64):
        for dtype in (torch.bfloat16, torch.float16):
            x, w, values = floats(m, n, k, group, zeros, dtype)
            y = a16().linear(x.cuda(), cuda_w(w), dtype=torch.float32)
            assert_close(y, x, values, torch.float32)
            again = a16().linear(x.cuda(), cuda_w(w), dtype=torch.float32, weights_at_rest=True)
            assert torch.equal(y, again)


@pytest.mark.parametrize("share", range(4))
@pytest.mark.parametrize(("m", "n", "k"), [(1, 300, 4096), (5, 129, 1024), (16, 192, 14336), (33, 64, 1536)])
def test_every_choice_of_the_16_bit_linear(m: int, n: int, k: int, share: int) -> None:
    """A quarter of the choices a test, so that several processes compile them."""
    for zeros in ("none", "fractional"):
        x, w, values = floats(m, n, k, 128, zeros, torch.bfloat16)
        for choice in a16().candidates(m, n, k)[share::4]:
            y = a16().linear(x.cuda(), cuda_w(w), dtype=torch.bfloat16, choice=choice)
            assert_close(y, x, values, torch.bfloat16)


HELD_SHAPES = (
    *((1, 300, 4096, 128), (5, 129, 1024, 128), (16, 192, 14336, 128), (9, 4100, 1536, 64)),
    *((16, 33, 576, 576), (13, 7, 96, 96), (8, 40, 14336, 14336), (16, 2200, 4096, 256)),
)


def held(rows: int) -> list[Any]:
    """Every choice that holds x in registers, of any shape."""
    found = [c for k in (4096, 14336) for c in a16().candidates(rows, 4096, k) if c.held]
    # Also few warps, one block ahead, and slices of a few bytes, of which even short rows have several.
    Choice = a16().Choice
    found += [Choice(warps=4, ahead=1, registers=128, piece=64, held=1), Choice(warps=4, ahead=3, held=2)]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("number", range(10))
def test_every_choice_that_holds_x(number: int) -> None:
    """Each at some of the shapes, so that every choice and every shape has its turns."""
    for turn in range(3):
        m, n, k, group = HELD_SHAPES[(number + 3 * turn) % len(HELD_SHAPES)]
        if number >= len(held(m)):
            continue
        choice = held(m)[number]
        zeros = ("none", "fractional")[(number + turn) % 2]
        x, w, values = floats(m, n, k, group, zeros, torch.bfloat16)
        x_gpu, w_gpu = x.cuda(), cuda_w(w)
        y = a16().linear(x_gpu, w_gpu, dtype=torch.float32, choice=choice, weights_at_rest=True)
        assert_close(y, x, values, torch.float32)
        for _ in range(3):  # with the counters that the first one left
            again = a16().linear(x_gpu, w_gpu, dtype=torch.float32, choice=choice, weights_at_rest=True)
            assert torch.equal(y, again), choice


def test_no_choice_that_holds_x_is_left_out() -> None:
    assert max(len(held(rows)) for rows in (8, 16)) <= 10


@pytest.mark.parametrize(("n", "k", "group"), [(100, 512, 128), (112, 14336, 128), (100, 4096, 4096)])
def test_held_float16_bias_row_scale_and_bad_rows(n: int, k: int, group: int) -> None:
    x, w, values = floats(6, n, k, group, "whole", torch.float16)
    bias, row_scale = torch.randn(n).half(), torch.rand(6, 1) + 0.5
    x_bad = x.clone()
    x_bad[2, 5], x_bad[4, k - 7] = float("nan"), float("inf")
    want = (x.double() @ values.T + bias.double()) * row_scale.double()
    size = (x.double().abs() @ values.abs().T + bias.double().abs()) * row_scale.double()
    for choice in held(6)[::5]:
        others = {"bias": bias.cuda(), "row_scale": row_scale.cuda(), "choice": choice}
        y = a16().linear(x.cuda(), cuda_w(w), dtype=torch.float32, **others)
        assert bool(((y.cpu().double() - want).abs() <= 2e-5 * size + 1e-6 * want.abs()).all()), choice
        bad = a16().linear(x_bad.cuda(), cuda_w(w), dtype=torch.float32, **others)
        assert not bool(bad[2].isfinite().any()) and not bool(bad[4].isfinite().any())
        rest = [0, 1, 3, 5]
        assert torch.equal(bad[rest], y[rest]), choice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_held_codes_stand_where_they_belong(dtype: torch.dtype) -> None:
    """One input at a time, over all of K: each code stands alone in the result."""
    k = 1152
    codes = (torch.arange(33)[:, None] * 5 + torch.arange(k) * 3 + torch.arange(k) // 16) % 16 - 8
    w = cuda_w(pack_weight(codes.to(torch.int8), torch.ones(33, 1), None, 4))
    for choice in held(16)[::4]:
        for first in range(0, k, 16):
            x = torch.zeros(16, k, dtype=dtype)
            x[range(16), range(first, first + 16)] = 1
            y = a16().linear(x.cuda(), w, dtype=torch.float32, choice=choice).cpu()
            assert torch.equal(y, codes.T[first : first + 16].float()), (choice, first)


@pytest.mark.parametrize("number", range(10))
def test_held_in_graphs_and_chains(number: int) -> None:
    """Replayed many times, the counters of arrivals and the partial sums in use again and again, each launch
    right behind one that makes its inputs."""
    if number >= len(held(16)):
        pytest.skip("there is no such choice")
    choice = held(16)[number]
    x, w, _ = floats(16, 4096, 4096, 128, "none", torch.bfloat16)
    x_gpu, w_gpu = (x / 100).cuda(), cuda_w(w)

    def chain(at_rest: bool) -> Tensor:
        y = x_gpu
        for _ in range(6):
            for _ in range(3):
                y = a16().linear(y, w_gpu, dtype=torch.bfloat16, choice=choice, weights_at_rest=at_rest)
            y = y / y.float().abs().max().bfloat16()
        return y

    want = chain(False)
    assert bool(want.isfinite().all()) and bool(want.abs().max() > 0)
    assert torch.equal(chain(True), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(True)
    for _ in range(5):
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, want)


def test_every_code_of_a_nibble_is_read_as_it_is() -> None:
    """One input at a time, so that each code stands alone in the result."""
    for dtype in (torch.bfloat16, torch.float16):
        codes = (torch.arange(16)[:, None] + torch.arange(64)) % 16 - 8
        w = pack_weight(codes.to(torch.int8), torch.ones(16, 1), None, 4)
        x = torch.eye(64).to(dtype)
        assert torch.equal(a16().linear(x.cuda(), cuda_w(w), dtype=torch.float32).cpu(), codes.T.float())
        q = Quantised(torch.eye(64).to(torch.int8), torch.ones(64, 1), None, None, 8)
        assert torch.equal(few().linear(cuda_x(q), cuda_w(w), dtype=torch.float32).cpu(), codes.T.float())


def test_bias_row_scale_and_bad_rows_of_the_16_bit_linear() -> None:
    x, w, values = floats(6, 100, 512, 128, "whole", torch.bfloat16)
    bias, row_scale = torch.randn(100).bfloat16(), torch.rand(6, 1) + 0.5
    y = a16().linear(x.cuda(), cuda_w(w), bias=bias.cuda(), row_scale=row_scale.cuda(), dtype=torch.float32)
    want = (x.double() @ values.T + bias.double()) * row_scale.double()
    assert bool(((y.cpu().double() - want).abs() <= 1e-4 * want.abs().max()).all())
    clean = a16().linear(x.cuda(), cuda_w(w), dtype=torch.float32)
    x[2, 5], x[4, 7] = float("nan"), float("inf")
    y = a16().linear(x.cuda(), cuda_w(w), dtype=torch.float32)
    assert not bool(y[2].isfinite().any()) and not bool(y[4].isfinite().any())
    others = [0, 1, 3, 5]
    assert torch.equal(y[others], clean[others])


def test_refusals_name_the_reason() -> None:
    x, w = integers(2, 8, 48)
    with pytest.raises(ValueError, match="K = 48 is no multiple of 32"):
        few().linear(cuda_x(x), cuda_w(w), dtype=torch.float32)
    x, w = integers(65, 8, 64)
    with pytest.raises(ValueError, match="65 rows"):
        few().linear(cuda_x(x), cuda_w(w), dtype=torch.float32)
    y = torch.randn(2, 64, device="cuda")
    with pytest.raises(ValueError, match=r"inputs in torch\.float32"):
        a16().linear(y, cuda_w(w), dtype=torch.float32)
