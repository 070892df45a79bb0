"""Weight quantisers: range, optionally searched, and integer codes, per output channel or group.

The equations are those of GPTQ and QuaRot's public code: symmetric codes in [-2^(b-1), 2^(b-1) - 1] with
scale max|w| / (2^(b-1) - 1); asymmetric codes in [0, 2^b - 1] over a range that contains zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHRINK_STEPS, SHRINK_GRID, ERROR_EXPONENT = 80, 100, 2.4
_SCALE_FLOOR = 1e-5
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Values searched at a time. CPU: few enough for the cache, enough to keep several cores busy. GPU: enough
that the search is not bound by its launches. Other devices: as on a CPU."""


def code_bounds(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest integer code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def find_range(rows: Tensor, bits: int, symmetric: bool, search: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and zero-point (None if symmetric), each [n, 1], of rows [n, width].

    `search` shrinks the range in 80 steps of 1 % and keeps, per row, the one with the least
    Σ|ŵ - w|^2.4. A row of zeros gets a harmless range.
    """
    low = rows.amin(1, keepdim=True).clamp(max=0)
    high = rows.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high).clamp(min=_SCALE_FLOOR)
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
        return high / (2 ** (bits - 1) - 1), None
    scale = (high - low).clamp(min=_SCALE_FLOOR) / (2**bits - 1)
    return scale, torch.round(-low / scale)


def _search(
    rows: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    best_scale, best_zero = _scale_zero(low, high, bits, symmetric)
    best_error = torch.full_like(low, torch.inf)
    error = torch.empty_like(rows)
    minimum, maximum = code_bounds(bits, symmetric)
    extreme = torch.maximum(-low, high)
    for i in range(SHRINK_STEPS):
        shrink = 1 - i / SHRINK_GRID
        scale, zero = _scale_zero(shrink * low, shrink * high, bits, symmetric)
        # The most extreme value is clipped by at least this much (a rounded zero-point moves the range by
        # up to half a step); once that alone is worse than the best in every row, so is all that follows.
        clipped = ((1 - shrink) * extreme - scale).clamp_(min=0)
        if bool((clipped.pow_(ERROR_EXPONENT) > best_error).all()):
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


def pack_dtype(symmetric: bool) -> torch.dtype:
    """Integer dtype that holds every code of 2 to 8 bits."""
    return torch.int8 if symmetric else torch.uint8
