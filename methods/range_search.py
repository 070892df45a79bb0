"""Static ranges of least L_p error: min over (low, high) of mean |x - Q(x)|^p, from a histogram.

Activations have a few values far beyond all others, which a range of extremes would serve alone. Values are
collected in bins of equal width in sign(x) log(1 + |x|/ε), half a per cent wide wherever |x| is far above ε,
so that one pass over any number of tokens holds them at every scale; a bin stands for the mean of its values.
The search tries a grid of shares of both extremes, then finer ones around the best.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from methods.bits import ActivationSpec, KVSpec
from methods.errors import UserError

_EPS, _WIDTH, _SIDE = 1e-3, 0.005, 8192  # the last bin begins at ε e^41, far beyond any activation
_LEAST, _SHARES, _FINER, _ROUNDS = 1e-3, 24, 9, 3  # of the search: smallest share, steps, later steps, rounds
_TOGETHER = 64  # ranges tried at a time


class Histogram:
    """Collects values of one site; has the methods of `methods.ranges.Extremes`. `norm`: the p of L_p."""

    def __init__(self, norm: float) -> None:
        self.norm = norm
        self.counts = torch.zeros(2 * _SIDE, dtype=torch.float64)
        self.sums = torch.zeros(2 * _SIDE, dtype=torch.float64)
        self.low, self.high = math.inf, -math.inf
        self.dtype = torch.float32

    def add(self, x: Tensor) -> None:
        """x: any shape."""
        flat = x.detach().flatten()
        self.dtype = torch.promote_types(flat.dtype, torch.float32)
        low, high = float(flat.amin()), float(flat.amax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        if not (math.isfinite(low) and math.isfinite(high)):
            self.low = math.nan  # min and max pass a NaN over
            return
        place = (flat.abs() / _EPS).log1p().div(_WIDTH).long().clamp_(max=_SIDE - 1)
        place = torch.where(flat < 0, _SIDE - 1 - place, _SIDE + place)
        self.counts += torch.bincount(place, minlength=2 * _SIDE).cpu()
        self.sums += torch.bincount(place, weights=flat.to(torch.float64), minlength=2 * _SIDE).cpu()

    def range(self, name: str, spec: ActivationSpec | KVSpec) -> tuple[Tensor, Tensor | None]:
        """Scale and zero-point (None where symmetric), scalars in float32 or float64 on the CPU."""
        if self.low == math.inf:
            raise UserError(f"the static range of {name} needs calibration tokens")
        if math.isnan(self.low):
            raise UserError(f"no static range holds {name}: it is not finite on the calibration tokens")
        seen = self.counts > 0
        values, weights = self.sums[seen] / self.counts[seen], self.counts[seen]
        low, high = best_range(
            values,
            weights,
            (min(self.low, 0.0), max(self.high, 0.0)),
            bits=spec.bits,
            symmetric=spec.symmetric,
            norm=self.norm,
        )
        ends = torch.tensor((low, high), dtype=torch.float64)
        scale, zero = scale_and_zero(ends[0], ends[1], spec.bits, spec.symmetric)
        return scale.to(self.dtype), None if zero is None else zero.to(self.dtype)


def best_range(
    values: Tensor, weights: Tensor, extremes: tuple[float, float], *, bits: int, symmetric: bool, norm: float
) -> tuple[float, float]:
    """Low (at most 0) and high (at least 0) of least Σ weights |values - Q(values)|^norm; values and weights:
    float64 [n]. All-zero values get [-1, 1]."""
    if extremes == (0.0, 0.0):
        return -1.0, 1.0
    if symmetric:
        extreme = max(-extremes[0], extremes[1])
        extremes = (-extreme, extreme)
    ends = torch.tensor(extremes, dtype=torch.float64)
    shares = torch.logspace(math.log10(_LEAST), 0, _SHARES, dtype=torch.float64)
    low, high = ends
    for _ in range(_ROUNDS):
        lows, highs = ((end * shares).clamp(*ends) for end in (low, high))
        if not symmetric:
            lows, highs = lows.repeat_interleave(len(highs)), highs.repeat(len(lows))
        errors = torch.cat(
            [
                _errors(values, weights, some[0], some[1], bits, symmetric, norm)
                for some in zip(lows.split(_TOGETHER), highs.split(_TOGETHER), strict=True)
            ]
        )
        best = int(errors.argmin())
        low, high = lows[best], highs[best]
        # Next, between the neighbours of what was best.
        ratio = shares[1] / shares[0]
        shares = torch.logspace(-1, 1, _FINER, dtype=torch.float64) ** torch.log10(ratio)
    return float(low), float(high)


def _errors(
    values: Tensor, weights: Tensor, lows: Tensor, highs: Tensor, bits: int, symmetric: bool, norm: float
) -> Tensor:
    """The weighted L_p error to the power p under each of the ranges, [ranges]."""
    scale, zero = scale_and_zero(lows[:, None], highs[:, None], bits, symmetric)
    bottom, top = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if zero is None else (0, 2**bits - 1)
    shift = torch.zeros_like(scale) if zero is None else zero
    codes = (values / scale).round_().add_(shift).clamp_(bottom, top).sub_(shift)
    return codes.mul_(scale).sub_(values).abs_().pow_(norm) @ weights


def scale_and_zero(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """As kernels/reference.py has them, in the dtype of the ends: symmetric of the larger end, else with a
    whole zero-point."""
    if symmetric:
        return torch.maximum(-low, high) / (2 ** (bits - 1) - 1), None
    scale = (high - low) / (2**bits - 1)
    return scale, (-low / scale).round()
