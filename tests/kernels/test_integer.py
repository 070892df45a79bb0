"""Integer products against 64-bit integers, whichever route computes them."""

import itertools
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import integer
from kernels.integer import (
    ROUTES,
    centred_dtype,
    centred_matmul,
    int_matmul,
    is_exact,
    padded_for_cuda,
    route,
    row_sums,
)

CPU = torch.device("cpu")
SHAPES = [(0, 3, 8), (1, 1, 1), (4, 3, 1), (1, 5, 7), (3, 1, 64), (16, 8, 33), (17, 9, 257), (2, 4, 0)]
# Reads of a module's private name are kept to this one place.
PROBE = "_int_mm_is_exact"


def exact(a: Tensor, b: Tensor) -> Tensor:
    return a.long() @ b.long().t()


def ends(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    low, high = ends(bits)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (rows, columns), generator=generator).to(torch.int8)


@pytest.mark.parametrize(("a_bits", "b_bits"), [(2, 2), (4, 4), (3, 8), (8, 4), (4, 8), (8, 8)])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_route_is_exact(a_bits: int, b_bits: int, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    operands = [
        (torch.full((m, k), x, dtype=torch.int8), torch.full((n, k), y, dtype=torch.int8))
        for x, y in itertools.product(ends(a_bits), ends(b_bits))
    ]
    operands.append((codes(m, k, a_bits), codes(n, k, b_bits, seed=1)))
    names = [name for name in ROUTES if name != "torch._int_mm" or route(k, a_bits, b_bits, CPU) == name]
    for a, b in operands:
        want = exact(a, b)
        for product in (*(ROUTES[name] for name in names), None):
            got = product(a, b) if product else int_matmul(a, b, a_bits=a_bits, b_bits=b_bits)
            assert got.dtype == torch.int32 and got.shape == (m, n)
            assert torch.equal(got.long(), want)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_products_stay_exact_at_any_float32_precision(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        a, b = codes(40, 1024, 8), codes(30, 1024, 8, seed=1)
        assert torch.equal(ROUTES["float32 matmul"](a, b).long(), exact(a, b))
    finally:
        torch.set_float32_matmul_precision(before)


def test_four_bits_have_integer_products_on_every_cpu() -> None:
    for k in (1, 7, 576):
        assert route(k, 4, 4, CPU) == route(k, 8, 4, CPU) == "torch._int_mm"


def test_routes_end_where_they_stop_being_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, PROBE, lambda *_: False)
    assert route(1024, 8, 8, CPU) == "float32 matmul"  # sums of at most 2^24
    assert route(1025, 8, 8, CPU) == "float64 matmul"
    assert route(1024, 8, 8, torch.device("cuda")) == "float64 matmul"  # float32 may mean TF32 there
    for k in (1024, 1025, 2049):
        a, b = torch.full((2, k), -128, dtype=torch.int8), torch.full((3, k), -128, dtype=torch.int8)
        a[1, ::2] = 127
        assert torch.equal(int_matmul(a, b, a_bits=8, b_bits=8).long(), exact(a, b))
    monkeypatch.setattr(integer, PROBE, lambda *_: True)
    assert route(1025, 8, 8, CPU) == "torch._int_mm"


def test_sums_that_could_leave_int32_are_refused() -> None:
    a, b = torch.full((1, 131071), -128, dtype=torch.int8), torch.full((2, 131071), -128, dtype=torch.int8)
    for product in (lambda a, b: int_matmul(a, b, a_bits=8, b_bits=8), ROUTES["float64 matmul"]):
        assert product(a, b).tolist() == [[131071 * 2**14] * 2]
    with pytest.raises(ValueError, match="131072 products of 8 by 8 bits can overflow int32"):
        int_matmul(*torch.zeros(2, 1, 131072, dtype=torch.int8), a_bits=8, b_bits=8)
    assert route(131072, 8, 7, CPU) in ROUTES


def saturating(a: Tensor, b: Tensor) -> Tensor:
    """What x86 without VNNI computes: a is moved to unsigned bytes, pairs of products are added in saturating
    16-bit arithmetic, and the move is taken back."""
    unsigned = torch.nn.functional.pad(a.int() + 128, (0, a.shape[1] % 2))
    weights = torch.nn.functional.pad(b.int(), (0, b.shape[1] % 2))
    products = unsigned[:, None] * weights[None]
    pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
    return (pairs.sum(-1) - 128 * b.int().sum(-1)).to(torch.int32)


def rounding(a: Tensor, b: Tensor) -> Tensor:
    return (a.bfloat16() @ b.bfloat16().t()).to(torch.int32)


def wrong_for_one_row(a: Tensor, b: Tensor) -> Tensor:
    return exact(a, b).to(torch.int32) + (a.shape[0] == 1)


def wide(a: Tensor, b: Tensor) -> Tensor:
    return exact(a, b)


def missing(a: Tensor, b: Tensor) -> Tensor:
    raise NotImplementedError("no such product on this device")


@pytest.mark.parametrize(
    ("product", "narrow", "full"),
    [
        (saturating, True, False),
        (rounding, False, False),
        (wrong_for_one_row, False, False),
        (wide, False, False),
        (missing, False, False),
        (ROUTES["float32 matmul"], True, True),
        (ROUTES["float64 matmul"], True, True),
    ],
)
def test_the_probe_tells_exact_products(
    product: Callable[[Tensor, Tensor], Tensor], narrow: bool, full: bool
) -> None:
    assert is_exact(product, CPU, 8, 4) is narrow
    assert is_exact(product, CPU, 8, 8) is full


def test_an_inexact_product_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: saturating(a, b.t()))
    getattr(integer, PROBE).cache_clear()
    try:
        a, b = torch.full((3, 64), 127, dtype=torch.int8), torch.full((5, 64), 127, dtype=torch.int8)
        assert not torch.equal(integer.int_mm(a, b).long(), exact(a, b))
        assert route(64, 8, 8, CPU) == "float32 matmul" and route(64, 8, 4, CPU) == "torch._int_mm"
        assert torch.equal(int_matmul(a, b, a_bits=8, b_bits=8).long(), exact(a, b))
    finally:
        getattr(integer, PROBE).cache_clear()


@pytest.mark.parametrize("shape", [(0, 8, 8), (1, 3, 5), (16, 16, 16), (17, 9, 24), (40, 33, 31)])
def test_padding_for_cuda(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = codes(m, k, 8), codes(n, k, 8, seed=1)
    wider_a, wider_b = padded_for_cuda(a, b)
    assert wider_a.shape[0] > 16 and wider_a.shape[1] % 8 == 0 and wider_b.shape[0] % 8 == 0
    assert torch.equal(exact(wider_a, wider_b)[:m, :n], exact(a, b))


def layouts(matrix: Tensor) -> list[Tensor]:
    """The same matrix in memory of every kind: strides of a dimension of one element are arbitrary."""
    rows, columns = matrix.shape
    wide = torch.cat((matrix + 1, matrix, matrix + 2), dim=1)
    kinds = [
        matrix,
        wide[:, columns : 2 * columns],
        matrix.repeat_interleave(2, dim=0)[::2],
        matrix.t().contiguous().t(),
        matrix.repeat_interleave(2, dim=1)[:, ::2],
    ]
    if rows == 1:
        kinds += [matrix.as_strided((1, columns), (stride, 1)) for stride in (0, 1)]
    if columns == 1:
        kinds += [matrix.as_strided((rows, 1), (1, stride)) for stride in (0, 5)]
    return kinds


@pytest.mark.parametrize("m", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 33])
def test_memory_layouts(m: int, n: int, k: int) -> None:
    a, b = codes(m, k, 8), codes(n, k, 8, seed=1)
    want = exact(a, b)
    for left, right in itertools.product(layouts(a), layouts(b)):
        assert torch.equal(left, a) and torch.equal(right, b)
        got = int_matmul(left, right, a_bits=8, b_bits=8)
        assert torch.equal(got.long(), want)
    alone = [int_matmul(row[None], b, a_bits=8, b_bits=8) for row in a]
    assert torch.equal(torch.cat(alone).long(), want) if alone else want.shape == (0, n)


@pytest.mark.parametrize("bits", range(2, 9))
def test_row_sums(bits: int) -> None:
    rows = torch.cat(
        (codes(5, 77, bits), *(torch.full((1, 77), end, dtype=torch.int8) for end in ends(bits)))
    )
    sums = row_sums(rows, bits)
    assert sums.dtype == torch.int32 and torch.equal(sums.long(), rows.long().sum(1))


ZEROS = st.one_of(
    st.none(),
    st.lists(st.integers(-300, 300), min_size=3, max_size=3),
    st.lists(st.sampled_from([0, 15, -(2**20), 2**22, 10**6]), min_size=3, max_size=3),
)


@given(ZEROS, ZEROS, st.integers(1, 40), st.sampled_from([(8, 8), (4, 4), (8, 2)]), st.booleans())
def test_zero_points_are_taken_off_exactly(
    a_zero: list[int] | None, b_zero: list[int] | None, k: int, widths: tuple[int, int], summed: bool
) -> None:
    a_bits, b_bits = widths
    a, b = codes(3, k, a_bits), codes(3, k, b_bits, seed=1)
    a[0], b[0], b[1] = ends(a_bits)[0], ends(b_bits)[0], ends(b_bits)[1]
    zeros = [None if z is None else torch.tensor(z, dtype=torch.float64) for z in (a_zero, b_zero)]
    dtype = centred_dtype(k, a_bits, b_bits, *zeros)
    left, right = (None if z is None else z.to(dtype) for z in zeros)
    got = centred_matmul(
        a,
        b,
        a_bits=a_bits,
        b_bits=b_bits,
        a_zero=left,
        b_zero=right,
        b_sum=b.sum(1, dtype=torch.int32) if summed else None,
    )
    plain = a_zero is None and b_zero is None
    assert got.dtype == (torch.int32 if plain else dtype)
    for i, j in itertools.product(range(3), range(3)):
        want = sum(
            (x - (a_zero[i] if a_zero else 0)) * (y - (b_zero[j] if b_zero else 0))
            for x, y in zip(a[i].tolist(), b[j].tolist(), strict=True)
        )
        assert int(got[i, j]) == want


def test_the_dtype_of_a_correction() -> None:
    def chosen(k: int, a_zero: float | None, b_zero: float | None) -> torch.dtype:
        zeros = [None if z is None else torch.tensor([0.0, z], dtype=torch.float64) for z in (a_zero, b_zero)]
        return centred_dtype(k, 8, 8, *zeros)

    assert chosen(100, None, None) == chosen(100, 127.0, -128.0) == torch.int32
    assert chosen(2**31 // (256 * 256), 128.0, 128.0) == torch.float64  # a term of 2^31
    assert chosen(2**31 // (256 * 256) - 1, 128.0, 128.0) == torch.int32
    assert chosen(1, 2.0**31, None) == torch.float64
    for odd in (0.5, float("nan"), float("inf")):
        assert chosen(100, odd, None) == chosen(100, None, odd) == torch.float64
    empty = torch.empty(0, dtype=torch.float64)
    assert centred_dtype(8, 8, 8, empty, None) == torch.int32


def test_fractional_zero_points() -> None:
    a, b = codes(4, 50, 8), codes(3, 50, 4, seed=1)
    zero = torch.tensor([7.3, -0.25, 1e-3], dtype=torch.float64)
    got = centred_matmul(a, b, a_bits=8, b_bits=4, b_zero=zero)
    for i, j in itertools.product(range(4), range(3)):
        exact_zero = Fraction(zero[j].item())
        want = sum(x * (y - exact_zero) for x, y in zip(a[i].tolist(), b[j].tolist(), strict=True))
        assert float(abs(Fraction(got[i, j].item()) - want)) <= 1e-15 * 50 * 128 * 16


def test_bad_arguments() -> None:
    good = torch.zeros(2, 8, dtype=torch.int8)
    for a, b in ((good.int(), good), (good, good.to(torch.uint8))):
        with pytest.raises(ValueError, match="int8 matrices"):
            int_matmul(a, b, a_bits=4, b_bits=4)
    for a, b in ((good[0], good), (good, good[None]), (good, good[:, :4])):
        with pytest.raises(ValueError, match="are needed"):
            int_matmul(a, b, a_bits=4, b_bits=4)
