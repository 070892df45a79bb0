"""The definition of every int4 operation in plain torch. Each kernel is tested against this file.

Quantisers, as in QuaRot and SpinQuant (arXiv 2404.00456 and 2405.16406). A *row* is the last axis of a
tensor: one token's activations, one output channel's weights, one head's key. Each row, or each group of it,
has its own scale s and, asymmetric, its own zero-point z. With clip ratio c and b bits:

    symmetric    s = c max|x| / (2^(b-1) - 1)                 x̂ = s q
                 q = clamp(round(x / s), -2^(b-1), 2^(b-1) - 1)
    asymmetric   s = (hi - lo) / (2^b - 1), z = round(-lo / s)    x̂ = s (q - z)
                 q = clamp(round(x / s) + z, 0, 2^b - 1)

Rounding is half to even. hi = c max(x) and lo = c min(x). Over whole rows the range is first made to contain
0, so that z is a code; over groups it is not, as in the official code, and z may lie outside the codes. Three
cases need a rule:

* No range: an all-zero row (or one so small that s underflows) has s = 1, asymmetric s = 2 / (2^b - 1) as if
  the range were [-1, 1], and dequantises to zeros. A group of one repeated value has its range extended to 0.
* NaN and Inf: a NaN in a row (or group) makes it NaN throughout, and so does ±Inf, or a range that overflows,
  where the range is dynamic: no finite scale holds it. The scale carries this, the codes mean nothing there,
  and no other row notices. Under a static range ±Inf saturates.
* float16 and bfloat16 are computed in float32 and their scales stay float32, because s underflows in float16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quantised:
    """A quantised tensor. With G groups in a row of n (G = 1 without groups):

    codes: [..., n], int8 when symmetric, uint8 when asymmetric (8 bits then reach 255).
    scale: [..., G], float32 or float64.
    zero: [..., G] in scale's dtype, whole numbers; None when symmetric.
    group: values that share a scale, None for the whole row.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group: int | None


def quantise(
    x: Tensor,
    bits: int,
    *,
    symmetric: bool,
    clip: float = 1.0,
    group: int | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> Quantised:
    """Round x [..., n] to `bits` (2 to 8) by the equations above.

    clip: the share of each row's range that is kept, in (0, 1]. group: a divisor of n.
    scale, zero: a static range, broadcastable to [..., G]; zero exactly when asymmetric, and no clip then.
    Raises ValueError for a dtype, bits, group, clip or static range that does not fit.
    """
    grouped = _grouped(x, bits, clip, group)
    scale, zero = _scale_and_zero(grouped, bits, symmetric, clip, group, scale, zero)
    codes = _round(grouped, bits, scale, zero).nan_to_num_(nan=0.0).flatten(-2)
    return Quantised(
        codes.to(torch.int8 if zero is None else torch.uint8),
        scale.squeeze(-1),
        None if zero is None else zero.squeeze(-1),
        group,
    )


def dequantise(q: Quantised) -> Tensor:
    """The values that q stands for: [..., n] in the dtype of its scale."""
    values = q.codes.to(q.scale.dtype).unflatten(-1, (q.scale.shape[-1], -1))
    if q.zero is not None:
        values -= q.zero.unsqueeze(-1)
    return (values * q.scale.unsqueeze(-1)).flatten(-2)


def fake_quantise(
    x: Tensor,
    bits: int,
    *,
    symmetric: bool,
    clip: float = 1.0,
    group: int | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> Tensor:
    """`dequantise(quantise(x, ...))` in x's dtype, without integer tensors: the simulated path.

    The same numbers exactly, but for the sign of a zero; float16 and bfloat16 are rounded once at the end.
    """
    grouped = _grouped(x, bits, clip, group)
    scale, zero = _scale_and_zero(grouped, bits, symmetric, clip, group, scale, zero)
    values = _round(grouped, bits, scale, zero)
    if zero is not None:
        values.sub_(zero)
    return values.mul_(scale).flatten(-2).to(x.dtype)


def _grouped(x: Tensor, bits: int, clip: float, group: int | None) -> Tensor:
    """x as [..., G, n / G] in the dtype of the arithmetic, its arguments checked."""
    if not x.is_floating_point():
        raise ValueError(f"only floating-point tensors are quantised, got {x.dtype}")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if not 0.0 < clip <= 1.0:
        raise ValueError(f"the clip ratio must lie in (0, 1], got {clip}")
    n = x.shape[-1]
    if n == 0 or (group is not None and (group < 1 or n % group)):
        raise ValueError(
            f"a row of {n} values cannot be quantised in groups of {n if group is None else group}"
        )
    wide = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    size = n if group is None else group
    return wide.unflatten(-1, (n // size, size))


def _scale_and_zero(
    grouped: Tensor,
    bits: int,
    symmetric: bool,
    clip: float,
    group: int | None,
    scale: Tensor | None,
    zero: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero-point [..., G, 1] of `grouped` [..., G, g]: measured, or the static ones."""
    if scale is None:
        if zero is not None:
            raise ValueError("a static zero-point needs a static scale")
        # max and min apart are several times faster on a CPU than aminmax or the maximum of |x|.
        high, low = grouped.amax(-1, keepdim=True), grouped.amin(-1, keepdim=True)
        if symmetric:
            return _symmetric_scale(torch.maximum(high, -low) * clip, bits), None
        if group is None:
            high, low = high.clamp(min=0.0), low.clamp(max=0.0)
        return _asymmetric_scale(low * clip, high * clip, bits)
    if clip != 1.0:
        raise ValueError("a clip ratio is part of a static range; give it when the range is measured")
    if symmetric != (zero is None):
        raise ValueError("a static zero-point is needed for asymmetric codes, and only for them")
    shape = grouped.shape[:-1]
    scale = scale.to(grouped.dtype).expand(shape).unsqueeze(-1)
    poisoned = grouped.amax(-1, keepdim=True).isnan()
    scale = scale.masked_fill(poisoned, float("nan"))
    return scale, None if zero is None else zero.to(grouped.dtype).expand(shape).unsqueeze(-1)


def _symmetric_scale(largest: Tensor, bits: int) -> Tensor:
    scale = largest / (2 ** (bits - 1) - 1)
    return scale.masked_fill(scale == 0, 1.0)


def _asymmetric_scale(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    levels = 2**bits - 1
    single = low == high
    low = torch.where(single, low.clamp(max=0.0), low)
    high = torch.where(single, high.clamp(min=0.0), high)
    scale = (high - low) / levels
    empty = scale == 0
    scale = scale.masked_fill(empty, 2.0 / levels)
    return scale, torch.round(-low.masked_fill(empty, -1.0) / scale)


def _round(grouped: Tensor, bits: int, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The codes of `grouped` as floating-point numbers, in a new tensor."""
    codes = (grouped / scale).round_()
    if zero is None:
        return codes.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.add_(zero).clamp_(0, 2**bits - 1)
