"""The ranges of a weight's rows or groups: one read of the weight, whose rows stay in registers while all
shrunk ranges are tried."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.compiled import Compilation, divisible
from kernels.triton.launching import Launch, by_form
from kernels.triton.quantise import LARGEST_ROW, check, rows_of, warps
from kernels.triton.rounding import dequantised, larger, largest, nearest, smaller, smallest
from kernels.weight_reference import ERROR_EXPONENT, SCALE_FLOOR, SHRINK_GRID, SHRINK_STEPS


@dataclass(frozen=True)
class Choice:
    """elements: values that a thread holds. tile: values that a program takes, of several rows where they are
    short."""

    elements: int = 16
    tile: int = 1024


@triton.jit
def _find_range(  # type: ignore[no-untyped-def]
    x, scales, zeros, rows, n, stride,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, STEPS: tl.constexpr, GRID: tl.constexpr,
    EXPONENT: tl.constexpr, FLOOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    start = row.to(tl.int64)
    inside = (row < rows) & (column < n)
    held = tl.load(x + start * stride + column, inside, other=0.0)
    low, high = smaller(smallest(held, 1), 0.0), larger(largest(held, 1), 0.0)
    extreme = larger(0.0 - low, high)
    if SYMMETRIC:
        high = larger(larger(0.0 - low, high), FLOOR)
        low = 0.0 - high
    else:
        empty = (low == 0.0) & (high == 0.0)
        low, high = tl.where(empty, -1.0, low), tl.where(empty, 1.0, high)
    best_scale, best_zero = _scale_and_zero(low, high, BITS, SYMMETRIC, FLOOR)
    best = tl.full((ROWS, 1), float("inf"), tl.float32)
    i = 0
    while i < STEPS:
        shrink = 1.0 - tl.cast(i, tl.float64) / GRID  # shares are rounded once, as Python's are
        share = shrink.to(tl.float32)
        scale, zero = _scale_and_zero(low * share, high * share, BITS, SYMMETRIC, FLOOR)
        # What is clipped by now (the reference says why): no row can find a better range further on.
        if SYMMETRIC:
            clipped = extreme - high * share - scale
        else:
            top = (((1 << BITS) - 1) - zero) * scale
            clipped = larger(high - top, 0.0 - zero * scale - low) - scale
        lost = (_power(larger(clipped, 0.0), EXPONENT) >= best) | (row >= rows)
        whole = nearest(held, scale, zero, BITS, SYMMETRIC)
        error = tl.abs(dequantised(whole, scale, zero, SYMMETRIC) - held)
        total = tl.sum(tl.where(inside, _power(error, EXPONENT), 0.0), 1, keep_dims=True)
        better = total < best
        best = tl.where(better, total, best)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
        i = tl.where(tl.sum(lost.to(tl.int32)) == ROWS, STEPS, i + 1)
    tl.store(scales + start, best_scale, row < rows)
    if not SYMMETRIC:
        tl.store(zeros + start, best_zero, row < rows)


@triton.jit
def _scale_and_zero(low, high, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, FLOOR: tl.constexpr):  # type: ignore[no-untyped-def]
    if SYMMETRIC:
        return tl.div_rn(high, ((1 << (BITS - 1)) - 1) * 1.0), tl.zeros_like(high)
    else:
        scale = tl.div_rn(larger(high - low, FLOOR), ((1 << BITS) - 1) * 1.0)
        return scale, nearest(0.0 - low, scale, tl.zeros_like(scale), BITS, SYMMETRIC)


@triton.jit
def _power(x, EXPONENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """x^EXPONENT, by the hardware's logarithm and exponential."""
    return tl.exp(tl.log(x) * EXPONENT)


def find_range(
    rows: Tensor,
    bits: int,
    symmetric: bool,
    search: bool,
    *,
    choice: Choice | None = None,
    overlapped: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`weight_reference.find_range` on the GPU. Its scales and zero-points are the reference's to the bit;
    but the errors by which the search chooses among them are rounded otherwise, so of two that are worth the
    same to 2^-16 it may take the other one.

    rows: [n, width], float32, width up to 32768. overlapped as in `quantise`.
    Raises ValueError, naming what does not fit, where `unsupported` does.
    """
    launch = _launch(rows, bits, symmetric, search, choice, overlapped)
    scale = torch.empty(rows.shape[0], 1, dtype=rows.dtype, device=rows.device)
    zero = None if symmetric else torch.empty_like(scale)
    if launch is not None:
        launch(rows_of(rows), scale, scale if zero is None else zero)
    return scale, zero


@by_form
def _launch(
    rows: Tensor, bits: int, symmetric: bool, search: bool, choice: Choice | None, overlapped: bool
) -> Launch | None:
    """None where there are no rows."""
    check(unsupported(rows, bits, symmetric, search))
    m, n = rows.shape
    if not m:
        return None
    constants, options = _constants(n, bits, symmetric, search, choice or Choice())
    return Launch(
        _find_range,
        (triton.cdiv(m, constants["ROWS"]),),
        (m, n, rows_of(rows).stride(0)),
        {**constants, "OVERLAPPED": overlapped},
        {**options, "launch_pdl": overlapped},
        rows.device,
    )


def _constants(
    n: int, bits: int, symmetric: bool, search: bool, choice: Choice
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel's constants but OVERLAPPED, and the options of the compiler."""
    block = max(triton.next_power_of_2(n), 16)
    many = max(choice.tile // block, 1)
    constants = {
        "BITS": bits, "SYMMETRIC": symmetric, "STEPS": SHRINK_STEPS if search else 0, "GRID": SHRINK_GRID,
        "EXPONENT": ERROR_EXPONENT, "FLOOR": SCALE_FLOOR, "ROWS": many, "BLOCK": block,
    }  # fmt: skip
    return constants, {"num_warps": warps(many * block, choice.elements), "enable_fp_fusion": False}


def unsupported(rows: Tensor, bits: int, symmetric: bool, search: bool) -> str | None:
    """Why `find_range` cannot run here, in a phrase, or None."""
    if torch.is_grad_enabled() and rows.requires_grad:
        return "inputs that need gradients"
    if not rows.is_cuda and not triton.knobs.runtime.interpret:
        return f"a tensor on the {rows.device.type.upper()}"
    if rows.dtype != torch.float32:
        return f"{rows.dtype} weights"
    if rows.dim() != 2 or not 0 < rows.shape[1] <= LARGEST_ROW:
        return f"weights {list(rows.shape)} (rows of 1 to {LARGEST_ROW} values fit)"
    return None if 2 <= bits <= 8 else f"{bits} bits (2 to 8 are defined)"


def compilations() -> Iterator[Compilation]:
    """What stands for this kernel in the compile tests."""
    for name, n, symmetric, search in (
        ("w4-128", 128, True, True),
        ("w4-128-asymmetric", 128, False, True),
        ("w4-4096", 4096, True, True),
        ("w4-14336", 14336, True, True),
        ("w4-4096-asymmetric", 4096, False, True),
        ("w4-4096-no-search", 4096, True, False),
    ):
        constants, options = _constants(n, 4, symmetric, search, Choice())
        signature = dict.fromkeys(("x", "scales", "zeros"), "*fp32") | dict.fromkeys(
            ("rows", "n", "stride"), "i32"
        )
        yield Compilation(
            f"find_range-{name}",
            _find_range,
            signature,
            {**constants, "OVERLAPPED": False},
            options,
            divisible(_find_range, signature, "n", "stride"),
            ("LDG.E.128",),
        )
