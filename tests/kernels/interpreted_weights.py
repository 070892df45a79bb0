"""The kernels that round weights, as Triton interprets them, beside the reference and loops over columns in
numpy: a program of its own, because a process either compiles or interprets.
tests/kernels/test_triton_weights.py runs it with TRITON_INTERPRET=1.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernels import weight_reference
from kernels.triton import find_range as range_module
from kernels.triton import gptq_block as block_module
from tests.equality import same
from tests.kernels.interpreted_fused import complete_the_interpreter, fused, random

Block = tuple[Tensor, Tensor, Tensor, Tensor | None]

TIE = 2.0**-16
"""Errors of two ranges that are this close, relatively, are worth the same."""


def block(rows: int, n: int, bits: int, symmetric: bool, group: int, seed: int = 0) -> Block:
    """weight, factor, scale and zero of a block as GPTQ meets them, with groups of columns."""
    weight = random(rows, n, seed=seed)
    inputs = random(3 * n, n, seed=seed + 1, dtype=torch.float64) @ random(n, n, seed=2, dtype=torch.float64)
    hessian = inputs.T @ inputs / len(inputs)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    scale, zero = weight_reference.find_range(weight.reshape(-1, group), bits, symmetric, False)
    spread = [None if t is None else t.view(rows, -1).repeat_interleave(group, 1) for t in (scale, zero)]
    assert spread[0] is not None
    return weight, factor, spread[0], spread[1]


def once(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c - a b in float32, rounded once."""
    return fused(-a.astype(np.float64), b.astype(np.float64), c.astype(np.float64)).astype(np.float32)


def plainly(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c - a b in the numbers' own precision."""
    return c - a * b


def walked(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    minus: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    dtype: type = np.float64,
) -> tuple[Tensor, Tensor]:
    """Codes and errors, looking back: a column meets the errors of those before it when its turn has come."""
    w: np.ndarray = weight.numpy().astype(dtype)
    u: np.ndarray = factor.numpy().astype(dtype)
    s: np.ndarray = scale.numpy().astype(dtype)
    z = np.zeros_like(s) if zero is None else zero.numpy().astype(dtype)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if zero is None else (0, 2**bits - 1)
    codes, errors = np.zeros_like(w), np.zeros_like(w)
    for j in range(w.shape[1]):
        column = w[:, j]
        for i in range(j):
            column = minus(errors[:, i], np.broadcast_to(u[i, j], column.shape), column)
        codes[:, j] = np.clip(np.rint(column / s[:, j]) + z[:, j], low, high)
        errors[:, j] = (column - (codes[:, j] - z[:, j]) * s[:, j]) / u[j, j]
    kind = torch.int8 if zero is None else torch.uint8
    return torch.from_numpy(codes).to(kind), torch.from_numpy(errors)


BLOCKS = [  # rows, n, bits, symmetric, group
    (16, 128, 4, True, 128),
    (6, 128, 4, False, 32),
    (5, 64, 3, True, 16),
    (9, 40, 8, False, 40),
    (3, 2, 2, True, 2),
    (1, 1, 4, False, 1),
    (3, 200, 4, True, 8),
]


def interpret_gptq_block() -> None:
    for rows, n, bits, symmetric, group in BLOCKS:
        operands = block(rows, n, bits, symmetric, group)
        before = [None if t is None else t.clone() for t in operands]
        codes, errors = block_module.gptq_block(*operands, bits)
        for has, had in zip(operands, before, strict=True):
            assert same(has, had)
        where = (rows, n, bits, symmetric, group)
        want = walked(*operands, bits, once, np.float32)
        assert same(codes, want[0]) and same(errors, want[1]), where
        # Whoever rounds products before they are subtracted, or computes in float64, hardly differs.
        few = block_module.Choice(rows=2)
        assert n == 128 or same(block_module.gptq_block(*operands, bits, choice=few)[1], errors)
        others = (weight_reference.gptq_block(*operands, bits)[0], walked(*operands, bits, plainly)[0])
        for other in others:
            assert float((codes != other).double().mean()) <= 2e-3, where


def interpret_operands() -> None:
    """Views of larger matrices, a factor in columns, one scale for a whole row, none of it contiguous."""
    weight, factor, scale, zero = block(12, 64, 4, False, 64)
    assert zero is not None
    codes, errors = block_module.gptq_block(weight, factor, scale, zero, 4)
    wide = torch.full((12, 200), float("nan"))
    wide[:, 70:134] = weight
    views = (
        wide[:, 70:134],
        factor.T.contiguous().T,
        scale[:, :1].expand(12, 64),
        zero.T.contiguous().T,
    )
    found = block_module.gptq_block(*views, 4)
    assert same(found[0], codes) and same(found[1], errors)
    below = factor + torch.full_like(factor, float("nan")).tril(-1)  # what lies below does not count
    found = block_module.gptq_block(weight, below, scale, zero, 4)
    assert same(found[0], codes) and same(found[1], errors)
    none = block_module.gptq_block(weight[:0], factor, scale[:0], None, 4)
    assert none[0].shape == none[1].shape == (0, 64) and none[0].dtype == torch.int8


def interpret_ties() -> None:
    """Halves go to the even code, on both sides of zero, also behind a zero-point; without neighbours."""
    halves = torch.arange(-9.5, 10.0, 1.0)[None].expand(3, -1) * torch.tensor([[1.0], [2.0], [0.25]])
    scale = torch.tensor([[1.0], [2.0], [0.25]]).expand(halves.shape)
    factor = torch.eye(halves.shape[1])
    for zero in (None, torch.full_like(halves, 8.0)):
        codes, errors = block_module.gptq_block(halves, factor, scale, zero, 4)
        even = 2 * torch.floor((halves / scale + 0.5) / 2)
        whole = (even if zero is None else even + 8).clamp(*((-8, 7) if zero is None else (0, 15)))
        assert torch.equal(codes.float(), whole)
        assert torch.equal(errors, halves - (whole if zero is None else whole - 8) * scale)


def interpret_poison() -> None:
    """Rows that are not finite, or far beyond their range, leave the others alone."""
    weight, factor, scale, _ = block(6, 33, 4, True, 33)
    codes, errors = block_module.gptq_block(weight, factor, scale, None, 4)
    weight[1, 3], weight[2, 0], weight[3] = float("nan"), float("inf"), 1e30
    found = block_module.gptq_block(weight, factor, scale, None, 4)
    want = weight_reference.gptq_block(weight, factor, scale, None, 4)
    rest = [0, 4, 5]
    assert same(found[0][rest], codes[rest]) and same(found[1][rest], errors[rest])
    assert torch.equal(found[1].isfinite(), want[1].isfinite())
    assert same(found[1][1, :3], errors[1, :3]) and bool(found[1][1, 3:].isnan().all())


def as_good(rows: Tensor, bits: int, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Σ|ŵ - w|^2.4 of each row under this range, in float64."""
    wide, s = rows.double(), scale.double()
    z = None if zero is None else zero.double()
    values = weight_reference.from_codes(weight_reference.to_codes(wide, s, z, bits), s, z)
    return (values - wide).abs().pow(2.4).sum(1)


def same_ranges(
    rows: Tensor, bits: int, symmetric: bool, search: bool, found: tuple[Tensor, Tensor | None]
) -> int:
    """How many ranges are not the reference's; each of those is worth as much."""
    scale, zero = found
    want_scale, want_zero = weight_reference.find_range(rows, bits, symmetric, search)
    assert scale.shape == want_scale.shape and scale.dtype == want_scale.dtype and (zero is None) == symmetric
    other = (scale != want_scale)[:, 0]
    if zero is not None and want_zero is not None:
        other |= (zero != want_zero)[:, 0]
    ours, theirs = (as_good(rows[other], bits, s[other], None if z is None else z[other])
                    for s, z in ((scale, zero), (want_scale, want_zero)))  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=TIE, atol=0)
    return int(other.sum())


def hard_weights(rows: int, n: int) -> Tensor:
    """Plain; zero; of one sign; with an outlier; tiny; halves of one step."""
    x = random(rows, n, seed=n)
    x[1], x[2], x[3, 0], x[4] = 0.0, x[2].abs(), 40.0, x[4] * 1e-8
    x[5] = (x[5] * 4).round() / 2
    return x


def interpret_find_range() -> None:
    for n, bits in ((32, 4), (100, 3), (128, 4), (576, 8), (3, 2), (1024, 8)):
        rows = hard_weights(12, n)
        for symmetric in (True, False):
            for search in (True, False):
                found = range_module.find_range(rows, bits, symmetric, search)
                other = same_ranges(rows, bits, symmetric, search, found)
                assert other <= (1 if search else 0), (n, bits, symmetric)
    wide = torch.full((12, 200), float("nan"))
    rows = hard_weights(12, 100)
    wide[:, 50:150] = rows
    view = range_module.find_range(wide[:, 50:150], 4, True, True)
    assert same(view[0], range_module.find_range(rows, 4, True, True)[0])
    assert range_module.find_range(rows[:0], 4, False, True)[0].shape == (0, 1)


if __name__ == "__main__":
    complete_the_interpreter()
    interpret_gptq_block()
    interpret_operands()
    interpret_ties()
    interpret_poison()
    print("gptq_block")
    interpret_find_range()
    print("find_range")
