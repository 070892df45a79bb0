"""Hadamard matrices and their transform against exact integer arithmetic, scipy and the literature."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.hadamard import (
    hadamard_factors,
    hadamard_matrix,
    hadamard_transform,
    is_known_order,
    largest_known_divisor,
)

# Every width of the supported families (head dims, hidden and intermediate sizes) and the K of its matrix.
CORES = {
    **dict.fromkeys([64, 128, 256, 1024, 2048, 4096, 8192], 1),
    **dict.fromkeys([1536, 3072, 12288], 12),
    **dict.fromkeys([2560, 5120], 20),
    **dict.fromkeys([896, 3584, 14336, 28672], 28),
    **dict.fromkeys([576, 1152, 9216], 36),
    **dict.fromkeys([5632, 11264], 44),
    53248: 52,
    960: 60,
    17408: 68,
    **dict.fromkeys([4864, 9728], 76),
    25600: 100,
    **dict.fromkeys([13824, 27648], 108),
    8960: 140,
    18944: 148,
    11008: 344,
    29568: 924,
}
SMALL = sorted(n for n in CORES if n <= 2048)
ASYMMETRIC = [12, 20, 28, 44, 60, 192, 344, 1536]


def rows(count: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("n", [n for n in range(1, 513) if is_known_order(n)])
def test_every_small_matrix_is_hadamard(n: int) -> None:
    h = hadamard_matrix(n)
    assert h.shape == (n, n) and h.dtype == torch.float64
    assert torch.equal(h.abs(), torch.ones(n, n, dtype=torch.float64))
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))  # whole numbers: exact in float64


@pytest.mark.parametrize("n", [2**m for m in range(12)])
def test_powers_of_two_equal_scipy(n: int) -> None:
    assert np.array_equal(hadamard_matrix(n).numpy(), scipy.linalg.hadamard(n))


@pytest.mark.parametrize("q", [11, 19, 43, 59, 67, 107, 139])
def test_paley_one_over_a_prime_field_equals_the_legendre_symbol(q: int) -> None:
    def legendre(a: int) -> int:  # Euler's criterion
        return 0 if a % q == 0 else (1 if pow(a, (q - 1) // 2, q) == 1 else -1)

    h = hadamard_matrix(q + 1)
    assert torch.equal(h[0], torch.ones(q + 1, dtype=torch.float64))
    # Numbering the field by its own elements: entry (i, j) off the diagonal is χ(j - i).
    want = torch.tensor([[legendre(j - i) for j in range(q)] for i in range(q)], dtype=torch.float64)
    assert torch.equal(h[1:, 1:], want + torch.eye(q, dtype=torch.float64))


@pytest.mark.parametrize("n", [20, 28, 36, 52, 76, 100, 148])
def test_orders_over_prime_powers_and_both_paley_forms(n: int) -> None:
    # 27, 25 and 49 are prime powers behind 28, 52 and 100; a wrong field would not give an orthogonal matrix.
    h = hadamard_matrix(n)
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))
    assert torch.equal(h, h.T) == (n in {36, 52, 76, 100, 148})  # Paley II is symmetric, Paley I is not


def test_known_orders_are_those_of_the_literature() -> None:
    # Multiples of 4 that Sylvester's and Paley's constructions and their products leave out (OEIS A046116).
    unknown = [n for n in range(4, 300, 4) if not is_known_order(n)]
    assert unknown == [92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292]
    assert not any(is_known_order(n) for n in range(-4, 1000) if n < 1 or (n > 2 and n % 4))


@pytest.mark.parametrize(("n", "k"), CORES.items())
def test_widths_of_the_supported_families(n: int, k: int) -> None:
    assert hadamard_factors(n) == (k, n // k)
    power = n // k
    assert power & (power - 1) == 0
    core = hadamard_matrix(k)
    assert torch.equal(core @ core.T, k * torch.eye(k, dtype=torch.float64))
    x = rows(3, n)
    y = hadamard_transform(x)
    assert relative_error(y.norm(dim=1), x.norm(dim=1)) < 1e-12
    assert relative_error(hadamard_transform(y, inverse=True), x) < 1e-12
    assert relative_error(hadamard_transform(hadamard_transform(x, inverse=True)), x) < 1e-12
    # The layout, without the dense matrix: K on the slow index, Sylvester's on the fast one.
    i, j, a, b = k // 2, k - 1, power // 2, power - 1
    unit = torch.zeros(1, n, dtype=torch.float64)
    unit[0, i * power + a] = 1.0
    want = core[i, j] * (-1) ** (a & b).bit_count() / math.sqrt(n)
    assert hadamard_transform(unit)[0, j * power + b] == pytest.approx(float(want), rel=1e-12)


def test_k_is_the_smallest_known() -> None:
    for n in (n for n in range(1, 3000) if is_known_order(n)):
        k, power = hadamard_factors(n)
        smaller = [n // 2**m for m in range(n.bit_length()) if n % 2**m == 0 and n // 2**m < k]
        assert k * power == n and not any(is_known_order(s) for s in smaller)


@pytest.mark.parametrize("n", SMALL)
def test_transform_equals_the_dense_matrix(n: int) -> None:
    x, h = rows(5, n), hadamard_matrix(n) / math.sqrt(n)
    assert relative_error(h @ h.T, torch.eye(n, dtype=torch.float64)) < 1e-12
    assert relative_error(hadamard_transform(x), x @ h) < 1e-12
    assert relative_error(hadamard_transform(x, inverse=True), x @ h.T) < 1e-12


@pytest.mark.parametrize("n", ASYMMETRIC)
def test_orientation(n: int) -> None:
    x, weight = rows(4, n), rows(7, n, seed=1)
    want = x @ weight.T
    assert not torch.equal(hadamard_matrix(n), hadamard_matrix(n).T)
    assert relative_error(hadamard_transform(x) @ hadamard_transform(weight).T, want) < 1e-12
    # The test would notice a transposed merge.
    assert relative_error(hadamard_transform(x) @ hadamard_transform(weight, inverse=True).T, want) > 0.1


@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    n=st.sampled_from([1, 2, 4, 12, 24, 40, 64, 96, 128, 144, 512]),
    copies=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    inverse=st.booleans(),
    transposed=st.booleans(),
)
def test_any_shape_dtype_and_stride(
    lead: list[int], n: int, copies: int, dtype: torch.dtype, inverse: bool, transposed: bool
) -> None:
    shape = (*lead, n * copies)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
    if transposed:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    before = x.clone()
    y = hadamard_transform(x, block=n, inverse=inverse)
    assert y.shape == shape and y.dtype == dtype and torch.equal(x, before)
    h = torch.block_diag(*[hadamard_matrix(n) / math.sqrt(n)] * copies)
    want = x.double() @ (h.T if inverse else h)
    # Half types are rounded once, from float32: half a unit in the last place of the result, and no more.
    unit = (
        max(torch.finfo(dtype).eps / 2, 4 * torch.finfo(torch.float64).eps)
        if dtype != torch.float32
        else 2e-6
    )
    bound = (
        unit * want.abs() + 2e-6 * (dtype != torch.float64) * x.double().norm(dim=-1, keepdim=True) + 1e-13
    )
    assert ((y.double() - want).abs() <= bound).all()


def test_float16_sums_do_not_overflow() -> None:
    x = torch.full((1, 14336), 300.0, dtype=torch.float16)  # the unscaled sum is 4.3 million
    y = hadamard_transform(x)
    assert torch.isfinite(y).all()
    assert relative_error(y.double(), hadamard_transform(x.double())) < 1e-3


def test_gradients_and_inference_mode() -> None:
    with torch.inference_mode():  # fills the cache of factors for this size
        hadamard_transform(rows(2, 24))
    x = rows(2, 24).requires_grad_()
    assert torch.autograd.gradcheck(hadamard_transform, (x,))
    h = hadamard_matrix(24) / math.sqrt(24)
    hadamard_transform(x).sum().backward()
    assert x.grad is not None
    assert relative_error(x.grad, torch.ones(2, 24, dtype=torch.float64) @ h.T) < 1e-12


def test_result_is_new_and_matrices_are_not_shared() -> None:
    x = torch.ones(2, 1)
    y = hadamard_transform(x)
    y.zero_()
    assert torch.equal(x, torch.ones(2, 1))
    hadamard_matrix(12).zero_()
    assert hadamard_matrix(12).abs().min() == 1


@given(st.integers(1, 40000))
@settings(max_examples=200)
def test_largest_known_divisor(n: int) -> None:
    b = largest_known_divisor(n)
    assert n % b == 0 and is_known_order(b)
    assert not any(n % c == 0 and is_known_order(c) for c in range(b + 1, n + 1))


def test_fallback_blocks() -> None:
    # Head counts without a matrix, ChatGLM's 13696 = 428 · 32, and sizes that need none.
    assert {n: largest_known_divisor(n) for n in (9, 14, 3, 15, 40, 13696, 14336)} == {
        9: 1, 14: 2, 3: 1, 15: 1, 40: 40, 13696: 128, 14336: 14336,
    }  # fmt: skip


@pytest.mark.parametrize("n", [0, -4, 3, 9, 14, 172, 13696])
def test_unknown_order_is_named(n: int) -> None:
    with pytest.raises(ValueError, match=str(n)):
        hadamard_matrix(n)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        hadamard_transform(torch.ones(2, 10), block=4)
    with pytest.raises(ValueError, match="do not divide"):
        hadamard_transform(torch.ones(2, 8), block=0)
    with pytest.raises(ValueError, match="order 3 "):
        hadamard_transform(torch.ones(2, 9), block=3)
    with pytest.raises(ValueError, match="int64"):
        hadamard_transform(torch.ones(2, 8, dtype=torch.int64))
