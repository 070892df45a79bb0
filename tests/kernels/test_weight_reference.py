"""GPTQ's walk through a block against single numbers in float64. tests/methods/test_quantisers.py tests whole
matrices, and ranges, against brute force and published code's numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import weight_reference


def operands(rows: int, n: int, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """weight, factor, scale and zero in float64; every column has its own range, which is not wide enough."""
    generator = torch.Generator().manual_seed(rows + n)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factor = random(n, n).triu(1) / n**0.5 + torch.diag(random(n).abs() + 0.5)
    scale = (random(rows, n).abs() + 0.5) * 3 / 2**bits
    zero = None if symmetric else torch.randint(0, 2**bits, (rows, n), generator=generator).double()
    return random(rows, n), factor, scale, zero


def one_by_one(
    weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, bits: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Codes and errors, in Python's own numbers."""
    u, codes, errors = factor.tolist(), [], []
    for w, s, z in zip(
        weight.tolist(),
        scale.tolist(),
        torch.zeros_like(scale).tolist() if zero is None else zero.tolist(),
        strict=True,
    ):
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if zero is None else (0, 2**bits - 1)
        q, e = [0] * len(w), [0.0] * len(w)
        for i in range(len(w)):
            q[i] = min(max(round(w[i] / s[i]) + int(z[i]), low), high)
            e[i] = (w[i] - s[i] * (q[i] - z[i])) / u[i][i]
            for j in range(i + 1, len(w)):
                w[j] -= u[i][j] * e[i]
        codes.append(q)
        errors.append(e)
    return codes, errors


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "n", "bits"), [(5, 40, 4), (1, 16, 3), (9, 128, 8), (4, 1, 2)])
def test_a_block_is_that_of_single_numbers(rows: int, n: int, bits: int, symmetric: bool) -> None:
    given = operands(rows, n, bits, symmetric)
    before = given[0].clone()
    for weight in (given[0], given[0].T.contiguous().T):
        codes, errors = weight_reference.gptq_block(weight, *given[1:], bits)
        want_codes, want_errors = one_by_one(*given, bits)
        assert codes.dtype == (torch.int8 if symmetric else torch.uint8)
        assert codes.tolist() == want_codes
        assert torch.equal(given[0], before)
        want = torch.tensor(want_errors, dtype=torch.float64)
        torch.testing.assert_close(errors, want, rtol=1e-10, atol=1e-12)


def test_halves_go_to_the_even_code() -> None:
    halves = torch.arange(-6.5, 7.0, 1.0)[None]
    scale, factor = torch.ones_like(halves), torch.eye(halves.shape[1])
    codes, _ = weight_reference.gptq_block(halves, factor, scale, None, 4)
    assert codes.tolist() == [[-6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6]]


def test_what_lies_below_the_diagonal_does_not_count() -> None:
    weight, factor, scale, zero = operands(3, 20, 4, False)
    below = factor + torch.full_like(factor, float("nan")).tril(-1)
    for got, want in zip(
        weight_reference.gptq_block(weight, below, scale, zero, 4),
        weight_reference.gptq_block(weight, factor, scale, zero, 4),
        strict=True,
    ):
        assert torch.equal(got, want)
