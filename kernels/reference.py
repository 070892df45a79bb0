"""The definition of every int4 operation in plain torch. Each kernel is tested against this file.

Here: quantisers, and the linear layer on packed weights. What runs in front of a linear (RMSNorm, the gate
of an MLP, Hadamard) is in `pass_reference`, and the packed KV cache in `kv_reference`; the layout of packed
codes is in `packing`, integer products in `integer`, Hadamard matrices in `hadamard`.

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

A result that its dtype cannot hold, such as a linear's float16 output above 65504, is ±Inf, alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Required, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.integer import centred_dtype, centred_matmul
from kernels.packing import pack, unpack

# Codes that are unpacked at once, and results that are computed at once: what a core's cache holds.
_SCRATCH = 2**20
_TILE = 2**17


@dataclass(frozen=True)
class Quantised:
    """A quantised tensor. With G groups in a row of n (G = 1 without groups):

    codes: [..., n], int8 when symmetric, uint8 when asymmetric (8 bits then reach 255).
    scale: [..., G], float32 or float64.
    zero: [..., G] in scale's dtype, whole numbers; None when symmetric.
    group: values that share a scale, None for the whole row.
    bits: the width of the codes.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group: int | None
    bits: int


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
        bits,
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


class Quantiser(TypedDict, total=False):
    """The arguments of `quantise` behind its input."""

    bits: Required[int]
    symmetric: Required[bool]
    clip: float
    group: int | None
    scale: Tensor | None
    zero: Tensor | None


def fields_alone(value: Any) -> dict[str, object]:
    """The state of a dataclass's copies, without what kernels keep beside its fields: it depends on where the
    tensors lie."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


@dataclass(frozen=True)
class PackedWeight:
    """A rounded weight [N, K] in packed codes: value = (code - zero) * scale.

    packed: uint8 [N, packed_width(K, bits)], see `packing`. inputs: K. signed: whether the codes, and with
    them `zero`, count from 0 (unsigned) or are two's complement.
    scale, zero: [N, G], one for each of G groups of consecutive inputs (axis 1), or [P, K] (axis 0): output n
    has row n mod P, as HQQ lays such groups.
    zero is None for symmetric codes and may be fractional. In memory a group's values for all outputs follow
    each other: what neighbouring outputs need is then one piece, and one access of a GPU.
    colsum: int32 [N, G], the sum of the codes of each group as they are stored (signed), or None.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    inputs: int
    signed: bool
    axis: int = 1
    colsum: Tensor | None = None

    def __post_init__(self) -> None:
        # Wherever a weight comes from, a file too: copied once, and as it is from then on.
        if self.axis == 1:
            for name in ("scale", "zero"):
                value = getattr(self, name)
                if value is not None and not value.t().is_contiguous():
                    object.__setattr__(self, name, value.t().contiguous().t())

    def __getstate__(self) -> dict[str, object]:
        return fields_alone(self)

    @property
    def group(self) -> int:
        """Consecutive inputs (axis 1), or outputs P apart (axis 0), that share a scale."""
        return (self.packed.shape[0] if self.axis == 0 else self.inputs) // self.scale.shape[self.axis]


def pack_weight(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, axis: int = 1, *, colsum: bool = False
) -> PackedWeight:
    """Pack a weight's codes [N, K], int8 or uint8, with the scale and zero of `PackedWeight`.

    colsum: also keep the sums of the codes, which inputs with zero-points need (else they are summed at
    every use). Raises ValueError for codes out of range and shapes that do not fit.
    """
    _check_groups(codes, scale, zero, axis)
    packed = pack(codes, bits)
    sums = None
    if colsum and axis == 1:
        stored = unpack(packed, bits, codes.shape[1])
        sums = stored.unflatten(1, (scale.shape[1], -1)).sum(-1, dtype=torch.int32)
    return PackedWeight(packed, scale, zero, bits, codes.shape[1], codes.dtype == torch.int8, axis, sums)


def dequantise_weight(w: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [N, K] that w stands for, computed in the dtype of its scale and returned in `dtype` (None:
    that of the scale)."""
    weight = torch.empty(w.packed.shape[0], w.inputs, dtype=dtype or w.scale.dtype, device=w.scale.device)
    for rows in _weight_rows(w, _TILE):
        codes = unpack(w.packed[rows], w.bits, w.inputs, signed=w.signed)
        groups = rows if w.axis == 1 else slice(None)
        between = 2 if w.axis == 1 else 0  # [rows, G, group], or [rows / P, P, K]
        scale = w.scale[groups].unsqueeze(between)
        part = weight[rows]
        values = part if part.dtype == scale.dtype else torch.empty_like(part, dtype=scale.dtype)
        grouped = values.copy_(codes)
        grouped = grouped.unflatten(w.axis, (scale.shape[1], -1) if w.axis == 1 else (-1, scale.shape[1]))
        if w.zero is not None:
            grouped.sub_(w.zero[groups].unsqueeze(between))
        grouped.mul_(scale)
        if values is not part:
            part.copy_(values)
    return weight


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x weightᵀ + bias, in x's dtype: x [..., K], weight [N, K], bias [N], none of them quantised."""
    return F.linear(x, weight, bias)


def linear(
    x: Tensor | Quantised,
    w: PackedWeight,
    *,
    x_keep: Tensor | None = None,
    w_keep: Tensor | None = None,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """y = (x wᵀ + x_keep w_keepᵀ + bias) * row_scale: [..., N] in `dtype`.

    x: [..., K], floating point or quantised. x_keep [..., keep] and w_keep [N, keep]: channels in full
    precision, which stand before the others. row_scale: [..., 1]. bias: [N].

    Floating-point x (weight-only): one float product with [w_keep | dequantised w], in x's dtype.

    Quantised x: with D_g the integer product of the codes over a run g of K_g inputs that share all scales,

        E_g = D_g - z_x Σw - z_w Σx + K_g z_x z_w        y = Σ_g s_x (s_w E_g)

    E_g is exact, in int32 or, where zero-points are large, in float64 up to 2^53; fractional zero-points are
    multiplied in float64. It is rounded to the wider of the scales' dtypes once, and the rest is computed in
    that dtype, in the order written, s_x last (after the sum where a row has one). So without kept channels a
    row of y does not depend, to the bit, on which other rows stand beside it. A row of x, or a group of it,
    whose scale is not finite makes its row of y NaN.
    Raises ValueError for axis-0 groups, for shapes that do not fit, and where D_g could leave int32.
    """
    channels = (x if isinstance(x, Tensor) else x.codes).shape[-1]
    if channels != w.inputs:
        raise ValueError(f"an input of {channels} channels for a weight of {w.inputs}")
    if (x_keep is None) != (w_keep is None):
        raise ValueError("kept channels need both their inputs and their weights")
    if isinstance(x, Tensor):
        weight = dequantise_weight(w, x.dtype)
        if x_keep is not None and w_keep is not None:
            x, weight = torch.cat((x_keep, x), dim=-1), torch.cat((w_keep, weight), dim=1)
        y = F.linear(x, weight, bias)
    else:
        y = _integer_linear(x, w)
        if x_keep is not None and w_keep is not None:
            y = y + F.linear(x_keep.to(y.dtype), w_keep.to(y.dtype))
        if bias is not None:
            y = y + bias
    if row_scale is not None:
        y = y * row_scale
    return y.to(dtype)


def shared_run(x: Quantised, w: PackedWeight) -> int:
    """The number of consecutive inputs whose integer product is formed at once: K where neither has groups.

    Raises ValueError for axis-0 groups, whose scales change from input to input.
    """
    if w.axis == 0:
        raise ValueError("axis-0 groups cannot run with quantised inputs")
    return math.gcd(w.inputs // x.scale.shape[-1], w.group)


def _integer_linear(x: Quantised, w: PackedWeight) -> Tensor:
    """The product of quantised x [..., K] and w: [..., N] in the wider of the scales' dtypes.

    It is computed in tiles, whose intermediate results stay in the cache; no value depends on them.
    """
    run = shared_run(x, w)
    dtype = torch.promote_types(x.scale.dtype, w.scale.dtype)
    groups = x.scale.shape[-1]
    a, s_x = x.codes.reshape(-1, w.inputs), x.scale.reshape(-1, groups).to(dtype)
    s_x = s_x + (s_x - s_x)  # an infinite scale becomes NaN
    z_x = z_w = None
    if x.zero is not None:
        a, z_x = _signed(a, x.bits), x.zero.reshape(-1, groups).to(torch.float64) - 2 ** (x.bits - 1)
    if w.zero is not None:
        z_w = w.zero.to(torch.float64) - (0 if w.signed else 2 ** (w.bits - 1))
    exact = centred_dtype(run, x.bits, w.bits, z_x, z_w)
    z_x, z_w = (None if zero is None else zero.to(exact) for zero in (z_x, z_w))
    y = torch.empty(a.shape[0], w.packed.shape[0], dtype=dtype, device=a.device)
    for outputs in _weight_rows(w, _SCRATCH):
        b = unpack(w.packed[outputs], w.bits, w.inputs)
        s_w = w.scale[outputs].to(dtype)
        step = max(_TILE // b.shape[0], 16)
        for start in range(0, a.shape[0], step):
            tokens = slice(start, start + step)
            total: Tensor | None = None
            for first in range(0, w.inputs, run):
                part = slice(first, first + run)
                g_x, g_w = first * groups // w.inputs, first // w.group
                term = centred_matmul(
                    a[tokens, part],
                    b[:, part],
                    a_bits=x.bits,
                    b_bits=w.bits,
                    a_zero=None if z_x is None else z_x[tokens, g_x],
                    b_zero=None if z_w is None else z_w[outputs, g_w],
                    b_sum=w.colsum[outputs, g_w] if w.colsum is not None and run == w.group else None,
                )
                term = term.to(dtype).mul_(s_w[:, g_w])
                if groups > 1:
                    term.mul_(s_x[tokens, g_x, None])
                total = term if total is None else total.add_(term)
            assert total is not None
            y[tokens, outputs] = total.mul_(s_x[tokens]) if groups == 1 else total
    return y.view(*x.codes.shape[:-1], y.shape[1])


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes moved down by 2^(b-1), as int8."""
    top = 2 ** (bits - 1)
    return (codes ^ top).view(torch.int8) if bits == 8 else codes.view(torch.int8) - top


def _weight_rows(w: PackedWeight, codes: int) -> Iterator[slice]:
    """Runs of outputs of about as many codes as given; of axis-0 groups, of whole rounds of their scales."""
    rows, step = w.packed.shape[0], max(codes // w.inputs, 1)
    if w.axis == 0:
        step = -(-step // w.scale.shape[0]) * w.scale.shape[0]
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _check_groups(codes: Tensor, scale: Tensor, zero: Tensor | None, axis: int) -> None:
    if axis not in (0, 1):
        raise ValueError(f"groups run along axis 0 or 1, got {axis}")
    fits = codes.dim() == 2 and scale.dim() == 2 and scale.shape[1 - axis] == codes.shape[1 - axis]
    if not fits or not codes.numel() or not scale.numel() or codes.shape[axis] % scale.shape[axis]:
        raise ValueError(f"scales {tuple(scale.shape)} do not fit a weight {tuple(codes.shape)}, axis {axis}")
    if zero is not None and (zero.shape != scale.shape or zero.dtype != scale.dtype):
        raise ValueError(
            f"zero-points {zero.dtype} {tuple(zero.shape)} do not fit scales {tuple(scale.shape)}"
        )
    if (zero is None) == (codes.dtype == torch.uint8):
        raise ValueError("unsigned codes have zero-points, signed codes have none")


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
        measured, point = _asymmetric_scale(low * clip, high * clip, bits)
        # A scale of few bits, near the smallest numbers, can put the zero-point outside the codes.
        return measured, point.clamp(0, 2**bits - 1) if group is None else point
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
    scale = over(largest, 2 ** (bits - 1) - 1)
    return scale.masked_fill(scale == 0, 1.0)


def _asymmetric_scale(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    levels = 2**bits - 1
    single = low == high
    low = torch.where(single, low.clamp(max=0.0), low)
    high = torch.where(single, high.clamp(min=0.0), high)
    scale = over(high - low, levels)
    empty = scale == 0
    scale = scale.masked_fill(empty, 2.0 / levels)
    return scale, torch.round(-low.masked_fill(empty, -1.0) / scale)


def over(x: Tensor, levels: int) -> Tensor:
    """x / levels, rounded once on every device: by a Python number, CUDA multiplies by the reciprocal."""
    return x / torch.full((), levels, dtype=x.dtype, device=x.device)


def _round(grouped: Tensor, bits: int, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The codes of `grouped` as floating-point numbers, in a new tensor."""
    codes = (grouped / scale).round_()
    if zero is None:
        return codes.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.add_(zero).clamp_(0, 2**bits - 1)
