"""Whether a checkpoint's weights already lie on a 4-bit lattice, as those of a dequantised file do.

Quantising such weights again on the same lattice loses nothing, so weight-only scores in small groups along
the input say nothing about the method.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from methods.checkpoint import Checkpoint

GROUP, LEVELS = 32, 16
_EXACT = 1e-6  # float32 rounding of min + step * code stays below; a Gaussian weight is at 0.07
_ROWS = 64  # sampled per linear
_FEW = 0.01


def measure(checkpoint: Checkpoint) -> dict[str, float] | None:
    """{"group": 32, "levels": 16, "fraction": share of linears on the lattice}, or None where hardly one is.

    A linear is on it when asymmetric 4-bit quantisation in groups of 32 along the input gives its weights
    back to a relative error below 1e-6; 64 of its rows are looked at.
    """
    return summary(tensor for name, tensor in checkpoint.tensors().items() if name.endswith("_proj.weight"))


def summary(weights: Iterable[Tensor]) -> dict[str, float] | None:
    """`measure` for weights [out, in]."""
    exact = [relative_error(weight) < _EXACT for weight in weights]
    fraction = sum(exact) / len(exact)
    return {"group": GROUP, "levels": LEVELS, "fraction": fraction} if fraction >= _FEW else None


def relative_error(weight: Tensor) -> float:
    """‖Ŵ - W‖ / ‖W‖ of weight [out, in] on 16 levels between the ends of each group of 32 inputs.

    The lattice may have any offset, unlike codes with a whole zero-point. inf where 32 does not divide the
    width.
    """
    rows, width = weight.shape
    if width % GROUP:
        return torch.inf
    sample = torch.linspace(0, rows - 1, min(rows, _ROWS)).round().long()
    groups = weight[sample].to(torch.float64).unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / (LEVELS - 1)
    rounded = low + step * ((groups - low) / step.masked_fill(step == 0, 1)).round()
    return float((rounded - groups).norm() / groups.norm().clamp(min=1e-30))
