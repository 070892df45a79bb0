"""The definition of the packed KV cache's operations in plain torch: beside `reference`, its second part.

Keys (after RoPE and any online rotation) and values of one layer are quantised row by row, a row being one
head's vector at one position, and packed along it (see `packing`). A dynamic range has a scale and,
asymmetric, a zero-point for each row; the zero-point of a whole row is itself a code. A static range is one
scalar scale and zero-point for all rows. A NaN or infinity in a row makes that row NaN throughout, as in
`reference`; a static scale cannot carry this, so a flag for each row does.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packing import pack_unchecked, packed_width, unpack
from kernels.reference import quantise


@dataclass(frozen=True)
class PackedRows:
    """Room for S positions of the keys, or the values, of one layer.

    codes: uint8 [B, H, S, packed_width(width, bits)]. bits: the width of a code. width: the head dimension D.
    Dynamic: scale float32 or float64 [B, H, S], zero uint8 [B, H, S] (None: symmetric), poisoned None.
    Static: scale and zero scalars (zero None: symmetric), poisoned bool [B, H, S], true for NaN rows.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    width: int
    poisoned: Tensor | None = None


def kv_rows(
    batch: int,
    heads: int,
    capacity: int,
    width: int,
    bits: int,
    *,
    symmetric: bool,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PackedRows:
    """Empty room for `capacity` positions. scale, zero: a static range, each of one element, kept in the
    dtype it has. dtype: that of dynamic scales, float64 for a float64 model and float32 for others."""
    shape = (batch, heads, capacity)
    codes = torch.empty(*shape, packed_width(width, bits), dtype=torch.uint8, device=device)
    if scale is None:
        if zero is not None:
            raise ValueError("a static zero-point needs a static scale")
        points = None if symmetric else torch.empty(shape, dtype=torch.uint8, device=device)
        return PackedRows(codes, torch.empty(shape, dtype=dtype, device=device), points, bits, width)
    if symmetric != (zero is None):
        raise ValueError("a static zero-point is needed for asymmetric codes, and only for them")
    zero = None if zero is None else zero.reshape(()).to(device)
    poisoned = torch.empty(shape, dtype=torch.bool, device=device)
    return PackedRows(codes, scale.reshape(()).to(device), zero, bits, width, poisoned)


def kv_resize(rows: PackedRows, length: int, capacity: int) -> PackedRows:
    """A copy of the first `length` positions in new room for `capacity`. ValueError where they do not fit."""
    if not 0 <= length <= min(capacity, rows.codes.shape[2]):
        raise ValueError(f"{length} of {rows.codes.shape[2]} positions do not fit room for {capacity}")

    def copied(part: Tensor | None) -> Tensor | None:
        if part is None or part.dim() == 0:
            return part
        batch, heads, _, *rest = part.shape
        new = torch.empty(batch, heads, capacity, *rest, dtype=part.dtype, device=part.device)
        new[:, :, :length] = part[:, :, :length]
        return new

    codes, scale = copied(rows.codes), copied(rows.scale)
    assert codes is not None and scale is not None
    return PackedRows(codes, scale, copied(rows.zero), rows.bits, rows.width, copied(rows.poisoned))


def kv_append(rows: PackedRows, x: Tensor, start: int, *, clip: float = 1.0) -> None:
    """Quantise and pack x [B, H, T, D], and write it at positions start to start + T, in place.

    clip: the clip ratio of a dynamic range. Raises ValueError where x does not fit.
    """
    batch, heads, capacity, _ = rows.codes.shape
    length = x.shape[2] if x.dim() == 4 else 0
    if x.shape != (batch, heads, length, rows.width) or not 0 <= start <= capacity - length:
        raise ValueError(
            f"rows {tuple(x.shape)} at {start} do not fit {(batch, heads, capacity, rows.width)}"
        )
    static = rows.scale.dim() == 0
    q = quantise(
        x,
        rows.bits,
        symmetric=rows.zero is None,
        clip=clip,
        scale=rows.scale if static else None,
        zero=rows.zero if static else None,
    )
    if not static and q.scale.dtype != rows.scale.dtype:
        raise ValueError(f"scales of {q.scale.dtype} do not fit room for {rows.scale.dtype}")
    stop = start + length
    rows.codes[:, :, start:stop] = pack_unchecked(q.codes, rows.bits)
    if rows.poisoned is not None:
        rows.poisoned[:, :, start:stop] = q.scale.squeeze(-1).isnan()
        return
    rows.scale[:, :, start:stop] = q.scale.squeeze(-1)
    if rows.zero is not None and q.zero is not None:
        rows.zero[:, :, start:stop] = q.zero.squeeze(-1).nan_to_num(nan=0.0).to(torch.uint8)


def kv_dequantise(rows: PackedRows, length: int, dtype: torch.dtype) -> Tensor:
    """The first `length` positions as [B, H, length, D] in `dtype`: what `fake_quantise` made of them, but
    for the sign of a zero."""
    if length > rows.codes.shape[2]:
        raise ValueError(f"{length} positions are asked for, of {rows.codes.shape[2]}")
    codes = unpack(rows.codes[:, :, :length], rows.bits, rows.width, signed=rows.zero is None)
    if rows.poisoned is not None:  # static
        wide = torch.promote_types(dtype, torch.float32)
        scale = rows.scale.to(wide).expand(codes.shape[:-1])
        scale = scale.masked_fill(rows.poisoned[:, :, :length], float("nan"))
        zero = None if rows.zero is None else rows.zero.to(wide)
    else:
        scale = rows.scale[:, :, :length]
        zero = None if rows.zero is None else rows.zero[:, :, :length, None].to(scale.dtype)
    values = codes.to(scale.dtype)
    if zero is not None:
        values -= zero
    return values.mul_(scale[..., None]).to(dtype)


def kv_attention(
    query: Tensor, keys: PackedRows, values: PackedRows, length: int, *, mask: Tensor | None = None
) -> Tensor:
    """Attention of query [B, Hq, T, D] to the first `length` positions: [B, Hq, T, D] in query's dtype.

    Query heads of one group are consecutive. mask: bool [B or 1, 1, T, length], true where a query may look;
    None is causal from the first position for T > 1, and everything for T = 1. A NaN row can make all
    queries of its head and sequence NaN, also those that may not look at it (0 times NaN), and no others.
    """
    return F.scaled_dot_product_attention(
        query,
        kv_dequantise(keys, length, query.dtype),
        kv_dequantise(values, length, query.dtype),
        attn_mask=mask,
        is_causal=mask is None and query.shape[2] > 1,
        enable_gqa=query.shape[1] != keys.codes.shape[1],
    )
