"""The definition of the passes in front of linears in plain torch: the second part of `reference`.

A pass reads rows once and writes rows, or codes, once. It may begin with what brings its input about (a sum
with the branch that was computed last, the gate of an MLP), and it may end with the quantiser of `reference`.
Sums, products and silu are rounded to the dtype of x each, as torch rounds them where they stand alone; all
else is computed in float32 at least.
"""

from typing import NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.hadamard import hadamard_transform
from kernels.reference import Quantised, Quantiser


class Normed(NamedTuple):
    """What `rmsnorm` returns. stream, normalised: [..., n] in x's dtype. rms, row_scale: [..., 1], float32 at
    least; row_scale is None where none was given."""

    stream: Tensor
    normalised: Tensor
    rms: Tensor
    row_scale: Tensor | None


class Normalised(NamedTuple):
    """What `rmsnorm_quantise` returns: stream, rms and row_scale as in `Normed`; of the normalised rows the
    first `keep` channels (None for keep = 0), and the codes of the others."""

    stream: Tensor
    kept: Tensor | None
    codes: Quantised
    rms: Tensor
    row_scale: Tensor | None


def rmsnorm(
    x: Tensor,
    *,
    add: Tensor | None = None,
    eps: float,
    divisor: int | None = None,
    gain: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Normed:
    """RMSNorm of x [..., n], or of its sum with `add`, and the stream that goes on.

        total = x + add, rounded to x's dtype       rms = sqrt(Σ total² / divisor + eps S²)
        y = total / rms, rounded to x's dtype       normalised = y times gain

    stream = total, x itself without `add`; where rows are scaled (row_scale: S [..., 1], 1 by default)
    stream = y, with the scale S / rms. So a stream that begins with S = 1, and to which what a branch gives
    is added times the new S, is S times the plain one throughout, and its norms are the plain one's (the
    residual scaling of FPTQuant, van Breugel et al., ICML 2026).

    add: [..., n]. divisor: n by default. gain: [n] or [1].
    """
    total = x if add is None else (x + add).to(x.dtype)
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    floor: float | Tensor = eps if row_scale is None else eps * row_scale.square()
    rms = (wide.square().sum(-1, keepdim=True) / (divisor or x.shape[-1]) + floor).sqrt()
    y = (total / rms).to(x.dtype)
    normalised = y if gain is None else y * gain
    if row_scale is None:
        return Normed(total, normalised, rms, None)
    return Normed(y, normalised, rms, row_scale / rms)


def rmsnorm_quantise(
    x: Tensor,
    *,
    add: Tensor | None = None,
    eps: float,
    divisor: int | None = None,
    gain: Tensor | None = None,
    row_scale: Tensor | None = None,
    keep: int = 0,
    **quantiser: Unpack[Quantiser],
) -> Normalised:
    """`rmsnorm`, its first `keep` channels returned as they are, the others quantised."""
    stream, y, rms, scale = rmsnorm(x, add=add, eps=eps, divisor=divisor, gain=gain, row_scale=row_scale)
    return Normalised(stream, *_split(y, keep, quantiser), rms, scale)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for gate and up [..., n], silu and product each rounded to their dtype."""
    return F.silu(gate) * up


def quantise(
    x: Tensor, bits: int, *, gate: Tensor | None = None, symmetric: bool, clip: float = 1.0,
    group: int | None = None, scale: Tensor | None = None, zero: Tensor | None = None,
) -> Quantised:  # fmt: skip
    """`reference.quantise` of x, or of `gated(gate, x)`."""
    return reference.quantise(
        _gated(x, gate), bits, symmetric=symmetric, clip=clip, group=group, scale=scale, zero=zero
    )


def hadamard(x: Tensor, *, gate: Tensor | None = None, size: int, inner: int = 1) -> Tensor:
    """`online_hadamard` of x, or of `gated(gate, x)`."""
    return online_hadamard(_gated(x, gate), size, inner)


def hadamard_quantise(
    x: Tensor,
    *,
    gate: Tensor | None = None,
    size: int,
    inner: int = 1,
    keep: int = 0,
    **quantiser: Unpack[Quantiser],
) -> tuple[Tensor | None, Quantised]:
    """`hadamard` of x [..., n], its first `keep` channels returned, the others quantised.

    size, inner: as in `online_hadamard`. Returns y[..., :keep] (None for keep = 0) and
    `reference.quantise(y[..., keep:], ...)`.
    """
    return _split(hadamard(x, gate=gate, size=size, inner=inner), keep, quantiser)


def online_hadamard(x: Tensor, size: int, inner: int = 1, inverse: bool = False) -> Tensor:
    """x [..., n] with n = blocks * size * inner, every block viewed [size, inner] and multiplied by the
    orthonormal Hadamard matrix along `size`. Computed in float32 at least, rounded to x's dtype once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = wide.unflatten(-1, (-1, size, inner))
    if inner == 1:
        out = hadamard_transform(parts.squeeze(-1), inverse=inverse).unsqueeze(-1)
    else:
        out = hadamard_transform(parts.transpose(-1, -2), inverse=inverse).transpose(-1, -2)
    return out.flatten(-3).to(x.dtype)


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else gated(gate, x)


def _split(y: Tensor, keep: int, quantiser: Quantiser) -> tuple[Tensor | None, Quantised]:
    kept, rest = (y[..., :keep], y[..., keep:]) if keep else (None, y)
    return kept, reference.quantise(rest, **quantiser)
