"""RoPE, the online Hadamard transform, and writing to the KV cache, in one pass over the projections.

A program takes some heads of some tokens, all of them queries, keys or values, as the two halves of their
rows: RoPE pairs channel i with i + D/2, the first step of the transform does, and rows of 4 bits keep the two
in one byte. With H_D = H_2 ⊗ H_{D/2}, a row (a, b) becomes (a H + b H, a H - b H) / √D, where a H and b H are
products on tensor cores with a matrix of ±1 that a program makes for itself. For 16-bit inputs all terms are
exact; float32 is taken in three bfloat16 terms that hold all its 24 bits.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.compiled import Compilation, divisible
from kernels.kv_reference import PackedRows, Rows, kv_rows
from kernels.triton.kv_dequantise import tensors_of, unsupported_rows
from kernels.triton.launching import Launch, by_form
from kernels.triton.operands import unsupported_together
from kernels.triton.quantise import DTYPES, check
from kernels.triton.rounding import (
    codes,
    larger,
    largest,
    narrow,
    rounding,
    scale_and_zero,
    smaller,
    smallest,
    widen,
)  # fmt: skip

HEAD_DIMS = (64, 128)
ROWS = 16
"""Rows of a program: the least that a product takes."""


@triton.jit
def _times_signs(x, signs):  # type: ignore[no-untyped-def]
    """float32 x H, where x holds numbers of 16 bits, or of 24 in three terms."""
    if signs.dtype == x.dtype:
        return tl.dot(x, signs)
    else:
        first = narrow(x, tl.bfloat16)
        rest = x - widen(first)
        second = narrow(rest, tl.bfloat16)
        third = narrow(rest - widen(second), tl.bfloat16)
        return tl.dot(first, signs, tl.dot(second, signs, tl.dot(third, signs)))


@triton.jit
def _turned(a, b, c, d, dtype: tl.constexpr, MINUS: tl.constexpr):  # type: ignore[no-untyped-def]
    """a b - c d, or their sum, every result rounded to the dtype, as it is then held in float32."""
    left = widen(narrow(widen(a) * widen(b), dtype))
    right = widen(narrow(widen(c) * widen(d), dtype))
    if MINUS:
        return narrow(left - right, dtype)
    else:
        return narrow(left + right, dtype)


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    low, high, row, channel, inside, rows, scales, zeros, given_scale, given_zero, clip,
    HALF: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, STATIC: tl.constexpr,
    CLAMP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The two halves of rows as codes, or as they are. row: their numbers among all rows. scales: of rows, or
    a static range's flags; given_scale and given_zero: that range."""
    if BITS == 16:
        place = rows + row * (2 * HALF) + channel
        tl.store(place, low, inside)
        tl.store(place + HALF, high, inside)
    else:
        a, b = widen(low), widen(high)
        bottom = tl.zeros((low.shape[0], 1), tl.float32)
        fixed_scale, fixed_zero = bottom, bottom
        if STATIC:
            fixed_scale += tl.load(given_scale).to(tl.float32)
            if not SYMMETRIC:
                fixed_zero += tl.load(given_zero).to(tl.float32)
        if SYMMETRIC or STATIC:
            top = larger(largest(tl.abs(a), 1), largest(tl.abs(b), 1))
        else:
            bottom = smaller(smallest(a, 1), smallest(b, 1))
            top = larger(largest(a, 1), largest(b, 1))
        scale, zero = scale_and_zero(bottom, top, clip, fixed_scale, fixed_zero, BITS, SYMMETRIC, STATIC)
        recipe = rounding(scale, zero, BITS, SYMMETRIC)
        first = codes(low, recipe, SYMMETRIC, CLAMP, WIDE)
        second = codes(high, recipe, SYMMETRIC, CLAMP, WIDE)
        if not SYMMETRIC:
            first = first ^ (1 << (BITS - 1))
            second = second ^ (1 << (BITS - 1))
        if BITS == 4:
            byte = (first & 15) | (second << 4)
            tl.store(rows + row * HALF + channel, byte.to(tl.uint8), inside)
        else:
            tl.store(rows + row * (2 * HALF) + channel, first.to(tl.uint8), inside)
            tl.store(rows + row * (2 * HALF) + HALF + channel, second.to(tl.uint8), inside)
        one = row + tl.zeros((low.shape[0], 1), tl.int32)
        known = inside & (channel == 0)
        there = tl.max(known.to(tl.int32), 1, keep_dims=True) > 0
        if STATIC:
            tl.store(scales + one, (scale != scale).to(tl.uint8), there)
        else:
            tl.store(scales + one, scale, there)
            if not SYMMETRIC:
                tl.store(zeros + one, tl.where(zero == zero, zero, 0.0).to(tl.int32).to(tl.uint8), there)


@triton.jit(do_not_specialize=("tokens", "count", "start"))
def _rope_append(  # type: ignore[no-untyped-def]
    query, key, value, cos, sin, out,
    keys, key_scales, key_zeros, key_scale, key_zero,
    values, value_scales, value_zeros, value_scale, value_zero,
    start, tokens, count, capacity, query_heads, heads,
    query_batch, query_token, query_head, key_batch, key_token, key_head,
    value_batch, value_token, value_head, angle_batch, angle_token, clip, norm,
    HALF: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr, HADAMARD: tl.constexpr,
    BITS: tl.constexpr, KEY_SYMMETRIC: tl.constexpr, VALUE_SYMMETRIC: tl.constexpr,
    KEY_STATIC: tl.constexpr, VALUE_STATIC: tl.constexpr, KEY_CLAMP: tl.constexpr, VALUE_CLAMP: tl.constexpr,
    ON_DEVICE: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """TOGETHER heads, of as many of the batch's tokens as fill ROWS. count: tokens of a sequence."""
    dtype: tl.constexpr = query.dtype.element_ty
    WIDE: tl.constexpr = dtype == tl.float32
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()
    number = tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, HALF)[None, :]
    token = tl.program_id(0) * (ROWS // TOGETHER) + number // TOGETHER
    batch = (token // count).to(tl.int64)
    position = token % count
    first = tl.program_id(1) * TOGETHER
    inside = (token < tokens) & (channel >= 0)
    if ON_DEVICE:
        begin = tl.load(start)
    else:
        begin = start
    if first < query_heads + heads:
        if first < query_heads:
            head = first + number % TOGETHER
            source = query + batch * query_batch + position.to(tl.int64) * query_token + head * query_head
        else:
            head = first - query_heads + number % TOGETHER
            source = key + batch * key_batch + position.to(tl.int64) * key_token + head * key_head
        a = tl.load(source + channel, inside, other=0.0)
        b = tl.load(source + HALF + channel, inside, other=0.0)
        angle = batch * angle_batch + position.to(tl.int64) * angle_token + channel
        c = tl.load(cos + angle, inside, other=0.0)
        s = tl.load(sin + angle, inside, other=0.0)
        low = _turned(a, c, b, s, dtype, True)
        high = _turned(b, c, a, s, dtype, False)
        if HADAMARD:
            i = tl.arange(0, HALF)[:, None] & tl.arange(0, HALF)[None, :]
            i = i ^ (i >> 4)
            i = i ^ (i >> 2)
            i = (i ^ (i >> 1)) & 1
            if WIDE:
                signs = (1 - 2 * i).to(tl.float32).to(tl.bfloat16)
            else:
                signs = (1 - 2 * i).to(tl.float32).to(dtype)
            x = _times_signs(low, signs)
            y = _times_signs(high, signs)
            low = narrow((x + y) * norm, dtype)
            high = narrow((x - y) * norm, dtype)
        if first < query_heads:
            place = out + ((batch * query_heads + head) * count + position) * (2 * HALF) + channel
            tl.store(place, low, inside)
            tl.store(place + HALF, high, inside)
        else:
            row = (batch * heads + head) * capacity + begin + position
            _write(
                low, high, row, channel, inside, keys, key_scales, key_zeros, key_scale, key_zero, clip,
                HALF, BITS, KEY_SYMMETRIC, KEY_STATIC, KEY_CLAMP, WIDE,
            )  # fmt: skip
    else:
        head = first - query_heads - heads + number % TOGETHER
        source = value + batch * value_batch + position.to(tl.int64) * value_token + head * value_head
        a = tl.load(source + channel, inside, other=0.0)
        b = tl.load(source + HALF + channel, inside, other=0.0)
        row = (batch * heads + head) * capacity + begin + position
        _write(
            a, b, row, channel, inside, values, value_scales, value_zeros, value_scale, value_zero, clip,
            HALF, BITS, VALUE_SYMMETRIC, VALUE_STATIC, VALUE_CLAMP, WIDE,
        )  # fmt: skip


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
    overlapped: bool = False,
) -> Tensor:
    """`kv_reference.rope_append` on the GPU, in one launch.

    bfloat16, float16 or float32. RoPE, codes, scales and zero-points are the reference's to the bit, where
    there is no Hadamard transform; that is the reference's up to rounding in float32. overlapped: as in
    `quantise`. Raises ValueError, naming what does not fit, where `unsupported` does.
    """
    first = start if isinstance(start, Tensor) else 0  # one launch serves all numbers
    launch = _launch(query, key, value, cos, sin, keys, values, first, hadamard, clip, overlapped)
    batch, count, heads, width = query.shape
    for rows in (keys, values):
        check(_unsupported_start(rows, start, count))
    out = torch.empty((batch, heads, count, width), dtype=query.dtype, device=query.device)
    if launch is not None:
        launch(query, key, value, cos, sin, out, *_operands(keys, out), *_operands(values, out), start)
    return out


@by_form
def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Rows,
    values: Rows,
    start: int | Tensor,
    hadamard: bool,
    clip: float,
    overlapped: bool,
) -> Launch | None:
    """None where there is nothing to append."""
    check(unsupported(query, key, value, cos, sin, keys, values, start, hadamard=hadamard, clip=clip))
    batch, count, query_heads, width = query.shape
    if not query.numel():
        return None
    heads = key.shape[2]
    together = _together(query_heads, heads)
    room = (keys if isinstance(keys, Tensor) else keys.codes).shape[2]
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    angle = (0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(2))
    constants = _constants(query.dtype, width, together, keys, values, hadamard, clip, overlapped)
    return Launch(
        _rope_append,
        (triton.cdiv(batch * count, ROWS // together), (query_heads + 2 * heads) // together),
        (batch * count, count, room, query_heads, heads, *strides, *angle, clip, width**-0.5),
        {**constants, "ON_DEVICE": isinstance(start, Tensor)},
        {"num_warps": 4, "enable_fp_fusion": False, "launch_pdl": overlapped},
        query.device,
    )


def unsupported(
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
) -> str | None:
    """Why these operands cannot run here, in a phrase; None where they can."""
    given = (query, key, value, cos, sin)
    reason = unsupported_together(*given, *tensors_of(keys), *tensors_of(values))
    if reason is not None:
        return reason
    if not query.is_cuda and not triton.knobs.runtime.interpret:
        return f"a tensor on the {query.device.type.upper()}"
    if query.dtype not in DTYPES or any(x.dtype != query.dtype for x in given):
        return f"inputs in {', '.join(dict.fromkeys(str(x.dtype) for x in given))}"
    if any(x.dim() != 4 or x.stride(-1) != 1 for x in given):
        return "inputs of other than four dimensions, or whose channels are no neighbours"
    batch, count, _, width = query.shape
    heads = key.shape[2]
    if width not in HEAD_DIMS:
        return f"heads of {width} channels"
    if key.shape != (batch, count, heads, width) or value.shape != key.shape:
        return f"keys {list(key.shape)} and values {list(value.shape)} for queries {list(query.shape)}"
    if cos.shape != sin.shape or cos.stride() != sin.stride() or cos.shape[0] not in (1, batch):
        return f"angles {list(cos.shape)} and {list(sin.shape)} for queries {list(query.shape)}"
    if cos.shape[1:] != (1, count, width // 2):
        return f"angles {list(cos.shape)} for queries {list(query.shape)}"
    if _bits(keys) != _bits(values):
        return f"keys of {_bits(keys)} and values of {_bits(values)} bits"
    if not 0.0 < clip <= 1.0:
        return f"a clip ratio of {clip}, outside (0, 1]"
    for rows in (keys, values):
        reason = _unsupported_room(rows, query, heads, start, clip)
        if reason is not None:
            return reason
    if isinstance(start, Tensor) and (start.dtype != torch.int64 or start.dim()):
        return f"a start in {start.dtype} {list(start.shape)}"
    if isinstance(start, Tensor) and start.device != query.device:
        return f"a start on {start.device} for queries on {query.device}"
    return None


def _unsupported_room(rows: Rows, query: Tensor, heads: int, start: int | Tensor, clip: float) -> str | None:
    batch, count, _, width = query.shape
    held = rows if isinstance(rows, Tensor) else rows.codes
    if isinstance(rows, Tensor):
        if rows.dtype != query.dtype or not rows.is_contiguous():
            return f"rows in {rows.dtype}, or not contiguous, for inputs in {query.dtype}"
    else:
        reason = unsupported_rows(rows)
        if reason is not None:
            return reason
        if rows.poisoned is not None and clip != 1.0:
            return "a clip ratio with a static range"
    wide = held.shape[3] if isinstance(rows, Tensor) else rows.width
    if held.shape[:2] != (batch, heads) or wide != width:
        return f"rows {list(held.shape)} of {wide} for {batch} x {heads} heads of {width}"
    return _unsupported_start(rows, start, count)


def _unsupported_start(rows: Rows, start: int | Tensor, count: int) -> str | None:
    room = (rows if isinstance(rows, Tensor) else rows.codes).shape[2]
    if isinstance(start, int) and not 0 <= start <= room - count:
        return f"{count} positions at {start} in room for {room}"
    return None


def _bits(rows: Rows) -> int:
    return rows.bits if isinstance(rows, PackedRows) else 16


def _together(query_heads: int, heads: int) -> int:
    """Heads of a program: a power of two up to 8 that divides both numbers, so that none has two kinds."""
    together = 1
    while together < 8 and query_heads % (2 * together) == heads % (2 * together) == 0:
        together *= 2
    return together


def _operands(rows: Rows, none: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows, scales or flags, zero-points, and a static scale and zero-point; `none` for what is absent."""
    if isinstance(rows, Tensor):
        return rows, none, none, none, none
    zero = none if rows.zero is None else rows.zero
    if rows.poisoned is None:
        return rows.codes, rows.scale, zero, none, none
    return rows.codes, rows.poisoned.view(torch.uint8), none, rows.scale, zero


def _constants(
    dtype: torch.dtype, width: int, together: int, keys: Rows, values: Rows, hadamard: bool, clip: float,
    overlapped: bool,
) -> dict[str, Any]:  # fmt: skip
    found: dict[str, Any] = {
        "HALF": width // 2, "TOGETHER": together, "ROWS": ROWS, "HADAMARD": hadamard, "BITS": _bits(keys),
        "OVERLAPPED": overlapped,
    }  # fmt: skip
    for name, rows in (("KEY", keys), ("VALUE", values)):
        static = isinstance(rows, PackedRows) and rows.poisoned is not None
        symmetric = not isinstance(rows, PackedRows) or rows.zero is None
        # As in `quantise`: the codes of a plain dynamic range need no clamping.
        clamp = static or not symmetric or clip != 1.0 or dtype == torch.float32
        found |= {f"{name}_SYMMETRIC": symmetric, f"{name}_STATIC": static, f"{name}_CLAMP": clamp}
    return found


def compilations() -> Iterator[Compilation]:
    """What stands for this kernel in the compile tests."""
    strides = [
        f"{who}_{what}" for who in ("query", "key", "value") for what in ("batch", "token", "head")
    ] + ["angle_batch", "angle_token", "capacity"]
    for name, bits, width, dtype, hadamard in (
        ("kv4, D 128, Hadamard", 4, 128, torch.bfloat16, True),
        ("kv4, D 64, Hadamard", 4, 64, torch.bfloat16, True),
        ("kv8, D 128", 8, 128, torch.bfloat16, False),
        ("bf16, D 128", 16, 128, torch.bfloat16, False),
        ("kv4, D 128, Hadamard, float32", 4, 128, torch.float32, True),
    ):
        kind = f"*{DTYPES[dtype]}"
        packed = bits < 16
        types = dict.fromkeys(("query", "key", "value", "cos", "sin", "out"), kind)
        for who in ("key", "value"):
            types |= {
                f"{who}s": "*u8" if packed else kind, f"{who}_scales": "*fp32" if packed else kind,
                f"{who}_zeros": "*u8" if packed else kind, f"{who}_scale": kind, f"{who}_zero": kind,
            }  # fmt: skip
        types |= dict.fromkeys(("tokens", "count", "query_heads", "heads", *strides), "i32")
        types |= {"start": "*i64", "clip": "fp32", "norm": "fp32"}
        rows: Rows = kv_rows(1, 1, 1, width, bits, symmetric=False) if packed else torch.empty(1, 1, 1, width)
        constants = _constants(dtype, width, 8, rows, rows, hadamard, 1.0, True) | {"ON_DEVICE": True}
        yield Compilation(
            f"kv_append {name}", _rope_append, types, constants,
            {"num_warps": 4, "enable_fp_fusion": False, "launch_pdl": True},
            divisible(_rope_append, types, *strides), ("LDG.E",),
        )  # fmt: skip
