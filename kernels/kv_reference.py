"""The definition of the packed KV cache's operations in plain torch: beside `reference`, its second part.

Keys (after RoPE and any online rotation) and values of one layer are quantised row by row, a row being one
head's vector at one position, and packed along it (see `packing`). A dynamic range has a scale and,
asymmetric, a zero-point for each row; the zero-point of a whole row is itself a code. A static range is one
scalar scale and zero-point for all rows. A NaN or infinity in a row makes that row NaN throughout, as in
`reference`; a static scale cannot carry this, so a flag for each row does.

Rows of floats, which a cache without codes holds, go through the same operations: `rope_append` writes them,
`kv_attention` reads them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packing import pack_unchecked, packed_width, unpack
from kernels.pass_reference import online_hadamard
from kernels.reference import fields_alone, quantise


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

    def __getstate__(self) -> dict[str, object]:
        return fields_alone(self)


Rows = PackedRows | Tensor
"""Room for S positions of the keys, or the values, of one layer: as codes, or as floats [B, H, S, D]."""


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: the pairs (i, i + D/2) of x [B, H, T, D] rotated by the angles of cos and
    sin [B or 1, 1, T, D/2]. Every product, and their sum, is rounded to the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Rows,
    values: Rows,
    start: int | Tensor,
    *,
    hadamard: bool = False,
    clip: float = 1.0,
) -> Tensor:
    """What stands between the projections and attention: RoPE of queries and keys, the online Hadamard
    transform of their D channels, and writing keys and values to the rows at positions start to start + T.

    query: [B, T, Hq, D]; key, value: [B, T, H, D], in any strides; cos, sin: as in `rotate`. start: an int,
    or an int64 of no dimension on the device of the rows, whose value no one checks on a GPU. clip: the clip
    ratio of a dynamic range. Returns the queries [B, Hq, T, D], contiguous. Raises ValueError where
    something does not fit.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    if hadamard:
        query, key = (online_hadamard(x, x.shape[-1]) for x in (query, key))
    for rows, x in ((keys, key), (values, value)):
        if isinstance(rows, PackedRows):
            kv_append(rows, x, start, clip=clip)
        else:
            _check_fit(tuple(rows.shape), x, start)
            _write(rows, start, x)
    return query.contiguous()


def kv_append(rows: PackedRows, x: Tensor, start: int | Tensor, *, clip: float = 1.0) -> None:
    """Quantise and pack x [B, H, T, D], and write it at positions start to start + T, in place.

    start, clip: as in `rope_append`. Raises ValueError where x does not fit.
    """
    _check_fit((*rows.codes.shape[:3], rows.width), x, start)
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
    _write(rows.codes, start, pack_unchecked(q.codes, rows.bits))
    if rows.poisoned is not None:
        _write(rows.poisoned, start, q.scale.squeeze(-1).isnan())
        return
    _write(rows.scale, start, q.scale.squeeze(-1))
    if rows.zero is not None and q.zero is not None:
        _write(rows.zero, start, q.zero.squeeze(-1).nan_to_num(nan=0.0).to(torch.uint8))


def _check_fit(room: tuple[int, ...], x: Tensor, start: int | Tensor) -> None:
    """Raises ValueError where x [B, H, T, D] cannot be written at `start` of rows [B, H, S, D]."""
    batch, heads, capacity, width = room
    length = x.shape[2] if x.dim() == 4 else 0
    first = int(start) if isinstance(start, int) or start.device.type == "cpu" else 0
    if x.shape != (batch, heads, length, width) or not 0 <= first <= capacity - length:
        raise ValueError(f"rows {tuple(x.shape)} at {first} do not fit {room}")


def _write(part: Tensor, start: int | Tensor, x: Tensor) -> None:
    """part[:, :, start : start + T] = x [B, H, T, ...], where the GPU knows `start` alone, too."""
    length = x.shape[2]
    if isinstance(start, Tensor):
        part.index_copy_(2, start + torch.arange(length, device=part.device), x.to(part.dtype))
    else:
        part[:, :, start : start + length] = x


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
    query: Tensor, keys: Rows, values: Rows, length: int | Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Attention of query [B, Hq, T, D] to the first `length` positions: [B, Hq, T, D] in query's dtype.

    Query heads of one group are consecutive. mask: bool [B or 1, 1, T, length], true where a query may look;
    None is causal from the first position for T > 1, and everything for T = 1. length: an int, or an int64 of
    no dimension on the device of the rows; then T is 1, and a mask has as many positions as the rows have
    room for. A NaN row can make all queries of its head and sequence NaN, also those that may not look at it
    (0 times NaN), and no others. Raises ValueError for T > 1 with a length on the device.
    """
    if isinstance(length, Tensor):
        if query.shape[2] != 1:
            raise ValueError(f"a length on the device for {query.shape[2]} positions, not for one")
        if length.device.type != "cpu":
            return _attention_within(query, keys, values, length, mask)
        length = int(length)
        mask = None if mask is None else mask[..., :length]
    key, value = (
        kv_dequantise(rows, length, query.dtype) if isinstance(rows, PackedRows) else rows[:, :, :length]
        for rows in (keys, values)
    )
    return dense_attention(query, key, value, mask)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of query [B, Hq, T, D] to key and value [B, H, S, D], mask as in `kv_attention`."""
    group = query.shape[1] // key.shape[1]
    if mask is not None and group > 1 and query.is_cuda and query.shape[2] > 1:
        # PyTorch's fused kernels take groups of heads or a mask: with both it would form all the scores.
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        group = 1
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and query.shape[2] > 1,
        enable_gqa=group > 1,
    )


def _attention_within(query: Tensor, keys: Rows, values: Rows, length: Tensor, mask: Tensor | None) -> Tensor:
    """`kv_attention` to all the room there is, of which what lies beyond `length` is not seen."""
    room = (keys if isinstance(keys, Tensor) else keys.codes).shape[2]
    held = torch.arange(room, device=query.device) < length
    key, value = (
        (kv_dequantise(rows, room, query.dtype) if isinstance(rows, PackedRows) else rows).masked_fill(
            ~held[:, None], 0.0
        )
        for rows in (keys, values)
    )
    return dense_attention(query, key, value, held[None, None, None] if mask is None else mask & held)
