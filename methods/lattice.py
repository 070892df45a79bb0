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
_ON = 0.99  # share of a linear's groups with few enough levels; rounding may split a level in two
_ROWS = 64  # sampled per linear
_FEW = 0.01


def measure(checkpoint: Checkpoint) -> dict[str, float] | None:
    """{"group": 32, "levels": 16, "fraction": share of linears on the lattice}, or None where hardly one is.

    A linear is on it when nearly all its groups of 32 along the input hold at most 16 distinct values,
    whatever the 4-bit format they came from; 64 of its rows are looked at.
    """
    return summary(tensor for name, tensor in checkpoint.tensors().items() if name.endswith("_proj.weight"))


def summary(weights: Iterable[Tensor]) -> dict[str, float] | None:
    """`measure` for weights [out, in]."""
    exact = [few_levels(weight) >= _ON for weight in weights]
    fraction = sum(exact) / len(exact)
    return {"group": GROUP, "levels": LEVELS, "fraction": fraction} if fraction >= _FEW else None


def few_levels(weight: Tensor) -> float:
    """Share of the groups of 32 inputs of weight [out, in] with at most 16 distinct values; 0 where 32 does
    not divide the width."""
    rows, width = weight.shape
    if width % GROUP:
        return 0.0
    sample = torch.linspace(0, rows - 1, min(rows, _ROWS)).round().long()
    ordered = weight[sample].to(torch.float32).unflatten(1, (-1, GROUP)).sort(-1).values
    distinct = 1 + (ordered.diff(dim=-1) > 0).sum(-1)
    return float((distinct <= LEVELS).double().mean())
