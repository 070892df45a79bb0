"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split pairing, with Llama-3 scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling: kind "default", "linear" or "llama3" (Llama 3.1's piecewise rule)."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("default", "linear", "llama3"):
            raise UserError(f"RoPE scaling {self.kind!r} is not supported: default, linear and llama3 are")


def inverse_frequencies(theta: float, head_dim: int, scaling: RopeScaling) -> Tensor:
    """Angular step of each pair (i, i + head_dim/2), float64 [head_dim/2]."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / frequencies
        # 0 at wavelengths beyond original/low (slowed by factor), 1 below original/high (kept).
        smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        smooth = smooth.clamp(0, 1)
        return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    return frequencies


def cos_sin(inverse: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [B, 1, T, head_dim/2] in `dtype`; angles are formed in float64, so that late
    positions lose nothing."""
    angles = positions.to(torch.float64)[:, None, :, None] * inverse.to(positions.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)
