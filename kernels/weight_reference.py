"""The definition of rounding weights in plain torch: the range of each row or group, searched for if wanted,
and GPTQ's walk through a block of columns.

The equations are those of GPTQ and QuaRot's public code: symmetric codes in [-2^(b-1), 2^(b-1) - 1] with
scale max|w| / (2^(b-1) - 1); asymmetric codes in [0, 2^b - 1] over a range that contains zero. Rounding is
half to even, division true division.
"""

import torch
from torch import Tensor

from kernels.reference import over

SHRINK_STEPS, SHRINK_GRID, ERROR_EXPONENT = 80, 100, 2.4
SCALE_FLOOR = 1e-5
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Values searched at a time. CPU: few enough for the cache, enough to keep several cores busy. GPU: enough
that the search is not bound by its launches. Other devices: as on a CPU."""


def code_bounds(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest integer code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def code_dtype(symmetric: bool) -> torch.dtype:
    """Integer dtype that holds every code of 2 to 8 bits."""
    return torch.int8 if symmetric else torch.uint8


def to_codes(values: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Integer codes of `values`, still in its float dtype; scale and zero broadcast against it."""
    minimum, maximum = code_bounds(bits, zero is None)
    codes = torch.round(values / scale)
    if zero is not None:
        codes = codes + zero
    return codes.clamp(minimum, maximum)


def from_codes(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The values that float codes stand for."""
    return codes * scale if zero is None else (codes - zero) * scale


def gptq_block(
    weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    """GPTQ (Frantar et al. 2023, arXiv 2210.17323, algorithm 1) within a block of n columns.

    One column after another is rounded; its error, over the factor's diagonal, times the factor's row is
    subtracted from the columns behind it:

        q_i = round(w_i / s_i) + z_i, clamped    e_i = (w_i - s_i (q_i - z_i)) / U_ii
        w_j -= U_ij e_i for j > i

    weight: [rows, n], float32 or float64, left as it is. factor: U [n, n] in weight's dtype, of which the
    upper triangle counts. scale, zero: [rows, n] in weight's dtype, zero whole numbers; None for symmetric
    codes. Returns the codes [rows, n], int8 or uint8, and the errors e [rows, n], which times the factor's
    rows beyond the block are to be subtracted from the columns beyond.

    Whether U_ij e_i is rounded before it is subtracted is torch's choice. It moves w_j by half a unit in the
    last place of the product at most.
    """
    # Columns as rows: each step then reads and writes contiguous memory.
    block = weight.T.clone(memory_format=torch.contiguous_format)
    scales = scale.T.contiguous()
    zeros = None if zero is None else zero.T.contiguous()
    codes = torch.empty_like(block, dtype=code_dtype(zero is None))
    errors = torch.empty_like(block)
    for i in range(len(block)):
        its_zero = None if zeros is None else zeros[i]
        rounded = to_codes(block[i], scales[i], its_zero, bits)
        codes[i] = rounded
        errors[i] = (block[i] - from_codes(rounded, scales[i], its_zero)) / factor[i, i]
        block[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return codes.T, errors.T


def find_range(rows: Tensor, bits: int, symmetric: bool, search: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and zero-point (None if symmetric), each [n, 1], of rows [n, width].

    `search` shrinks the range in 80 steps of 1 % and keeps, per row, the one with the least
    Σ|ŵ - w|^2.4. A row of zeros gets a harmless range. No gradient flows through either.
    """
    rows = rows.detach()
    low = rows.amin(1, keepdim=True).clamp(max=0)
    high = rows.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high).clamp(min=SCALE_FLOOR)
        low = -high
    else:
        empty = (low == 0) & (high == 0)
        low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    if not search:
        return _scale_zero(low, high, bits, symmetric)
    step = max(1, _CHUNK.get(rows.device.type, _CHUNK["cpu"]) // rows.shape[1])
    parts = zip(rows.split(step), low.split(step), high.split(step), strict=True)
    found = [_search(*part, bits, symmetric) for part in parts]
    scale = torch.cat([scale for scale, _ in found])
    return scale, None if symmetric else torch.cat([zero for _, zero in found if zero is not None])


def _scale_zero(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    if symmetric:
        return over(high, 2 ** (bits - 1) - 1), None
    scale = over((high - low).clamp(min=SCALE_FLOOR), 2**bits - 1)
    return scale, torch.round(-low / scale)


def _search(
    rows: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    best_scale, best_zero = _scale_zero(low, high, bits, symmetric)
    best_error = torch.full_like(low, torch.inf)
    error = torch.empty_like(rows)
    minimum, maximum = code_bounds(bits, symmetric)
    least, most = rows.aminmax(dim=1, keepdim=True)
    for i in range(SHRINK_STEPS):
        shrink = 1 - i / SHRINK_GRID
        scale, zero = _scale_zero(shrink * low, shrink * high, bits, symmetric)
        # An extreme value is clipped by at least this much from here on: a rounded zero-point moves the range
        # by up to half a step, a scale at its floor lets it move by less than one. Once that alone is no
        # better than the best in every row, nothing can be.
        bottom, top = (from_codes(torch.full_like(scale, end), scale, zero) for end in (minimum, maximum))
        clipped = (torch.maximum(most - top, bottom - least) - scale).clamp_(min=0)
        if bool((clipped.pow_(ERROR_EXPONENT) >= best_error).all()):
            break
        torch.div(rows, scale, out=error).round_()
        if zero is None:
            error.clamp_(minimum, maximum)
        else:
            error.add_(zero).clamp_(minimum, maximum).sub_(zero)
        # |e|^p as exp(p log|e|): several times faster than pow on a CPU.
        error.mul_(scale).sub_(rows).abs_().log_().mul_(ERROR_EXPONENT).exp_()
        total = error.sum(1, keepdim=True)
        better = total < best_error
        best_error = torch.where(better, total, best_error)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero
