"""Attention to the rows of a KV cache: one query position by a kernel of its own, several by PyTorch's.

One position (decoding) reads every row once and does little else: `kv_decode` splits the context over all
multiprocessors, and a second, small kernel adds the splits up, always in the same order. Where the length
lies on the device, the grid depends on the room of the rows, and every split takes an equal share of the
actual length, so that a CUDA graph serves all lengths. For several positions (a prompt) the rows are
dequantised, once, for PyTorch's attention.

Against attention in float64 to the dequantised rows in float32, the error is no more than 1.5 times that of
PyTorch's attention to them in the query's dtype; of less than 64 positions, a quarter of that dtype's epsilon
besides (tests/gpu/test_kv_on_cuda.py).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import kv_reference
from kernels.compiled import Compilation, divisible
from kernels.kv_reference import PackedRows, Rows
from kernels.triton import kv_dequantise
from kernels.triton.kv_decode import QUERIES, attend, combine
from kernels.triton.launching import MOST, Launch, by_form
from kernels.triton.operands import unsupported_together
from kernels.triton.quantise import check

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
HEAD_DIMS = (64, 128)
MOST_SPLITS = 64
COMBINING = {"num_warps": 4, "launch_pdl": True}
# Programs of four warps, 32 positions each, that a multiprocessor's registers hold, by bits and head
# dimension. float16 queries take more of them beside codes.
PROGRAMS = {(4, 64): 4, (8, 64): 4, (4, 128): 3, (8, 128): 2}
PROGRAMS_FLOAT16 = {**PROGRAMS, (4, 128): 2}


@dataclass(frozen=True)
class Choice:
    """positions: of a step of a warp, 16, 32 or 64. warps: of a program. programs: on a multiprocessor, for
    which the context is split."""

    positions: int = 32
    warps: int = 4
    programs: int = 2


def kv_attention(
    query: Tensor,
    keys: Rows,
    values: Rows,
    length: int | Tensor,
    *,
    mask: Tensor | None = None,
    choice: Choice | None = None,
    overlapped: bool = False,
) -> Tensor:
    """`kv_reference.kv_attention` on the GPU, in bfloat16 or float16.

    length: an int64 of no dimension on the device needs a single query position. The same operands give the
    same bits. One position beside codes takes scales of up to 2^32, and bfloat16 queries of up to 2^60.
    choice: None takes the default for these rows. overlapped: as in `quantise`. Raises ValueError, naming
    what does not fit, where `unsupported` does.
    """
    if query.shape[2] > 1:
        _check_prompt(query, keys, values, length)
        assert isinstance(keys, PackedRows) and isinstance(values, PackedRows) and isinstance(length, int)
        key, value = (
            kv_dequantise.kv_dequantise(rows, length, query.dtype, overlapped=overlapped)
            for rows in (keys, values)
        )
        return kv_reference.dense_attention(query, key, value, mask)
    first = length if isinstance(length, Tensor) else 1  # what is found serves all numbers
    made = _made(query, keys, values, first, mask, choice, overlapped)
    check(_unsupported_length(keys, length, mask))
    batch, heads, _, width = query.shape
    pairs, group, room = made.pairs, heads * batch // made.pairs, _held(keys).shape[2]
    given = length if isinstance(length, int) else room
    splits = splits_of(given, pairs, made.choice, _multiprocessors(query.device))
    partial = torch.empty(pairs, splits, group, width, dtype=torch.float32, device=query.device)
    stats = torch.empty(pairs, splits, 2, QUERIES, dtype=torch.float32, device=query.device)
    out = torch.empty(batch, heads, 1, width, dtype=query.dtype, device=query.device)
    k, v = _operands(keys, stats, made.aligned), _operands(values, stats, made.aligned)
    seen = stats if mask is None else mask.view(torch.uint8)
    attending, combining = made.launches(splits)
    attending(query, *k, *v, seen, partial, stats, length)
    combining(partial, stats, out)
    return out


@dataclass(frozen=True)
class Made:
    """What operands of one form have in common, but for their length. pairs: of a sequence and a head of its
    keys. aligned: as in `_operands`. launches: of `attend` and of `combine`, by the number of splits."""

    pairs: int
    choice: Choice
    aligned: bool
    launches: Callable[[int], tuple[Launch, Launch]]


@by_form
def _made(
    query: Tensor,
    keys: Rows,
    values: Rows,
    length: int | Tensor,
    mask: Tensor | None,
    choice: Choice | None,
    overlapped: bool,
) -> Made:
    check(unsupported(query, keys, values, length, mask=mask))
    batch, heads, _, width = query.shape
    pairs, held, device = _pairs(keys), _held(keys).shape[1], query.device
    bits = keys.bits if isinstance(keys, PackedRows) else 16
    picked = choice or default(bits, width, query.dtype)
    room, group = _held(keys).shape[2], heads // held
    aligned = room % 4 == 0 and picked.positions % 32 == 0
    step = 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)
    k, v = (_words(rows).stride() for rows in (keys, values))
    strides = (query.stride(0), query.stride(1), *k[:2], *v[:2])
    constants = {"KEY_ROW": k[2], "VALUE_ROW": v[2]} | _constants(
        query.dtype, held, group, width, bits, _symmetric(keys), _static(keys), mask is not None,
        isinstance(length, Tensor), aligned, picked, overlapped,
    )  # fmt: skip
    options = {"num_warps": picked.warps, "launch_pdl": overlapped}

    @cache
    def launches(splits: int) -> tuple[Launch, Launch]:
        numbers = (room, splits, step, *strides, width**-0.5 * math.log2(math.e))
        summands = {"GROUP": group, "D": width, "SPLITS": triton.next_power_of_2(splits)}
        return (
            Launch(attend, (splits, pairs), numbers, constants, options, device),
            # Launched while the splits are still computed, and waits for them.
            Launch(combine, (batch * heads,), (splits,), summands, COMBINING, device),
        )

    return Made(pairs, picked, aligned, launches)


@by_form
def _check_prompt(query: Tensor, keys: Rows, values: Rows, length: int | Tensor) -> None:
    check(unsupported(query, keys, values, length))


def unsupported(
    query: Tensor, keys: Rows, values: Rows, length: int | Tensor, *, mask: Tensor | None = None
) -> str | None:
    """Why these operands cannot run here, in a phrase; None where they can."""
    tensors = kv_dequantise.tensors_of
    reason = unsupported_together(query, *tensors(keys), *tensors(values))
    if reason is not None:
        return reason
    if query.dtype not in DTYPES:
        return f"{query.dtype} queries"
    if query.dim() != 4 or query.stride(-1) != 1:
        return f"queries {list(query.shape)} whose channels are no neighbours"
    batch, heads, count, width = query.shape
    if count != 1:
        return _unsupported_prompt(query, keys, values, length)
    if width not in HEAD_DIMS:
        return f"heads of {width} channels"
    for rows in (keys, values):
        reason = _unsupported_rows(rows, query)
        if reason is not None:
            return reason
    if isinstance(keys, PackedRows) != isinstance(values, PackedRows):
        return "packed keys or values beside others"
    if isinstance(keys, PackedRows) and isinstance(values, PackedRows):
        if keys.bits != values.bits or _static(keys) != _static(values):
            return "keys and values quantised in different ways"
        if _symmetric(keys) != _symmetric(values):
            return "zero-points of keys or values alone"
    held = _held(keys)
    if held.shape[:3] != _held(values).shape[:3] or heads % held.shape[1]:
        return f"keys {list(held.shape)} and values {list(_held(values).shape)} for {heads} heads"
    if heads // held.shape[1] > QUERIES:
        return f"{heads // held.shape[1]} query heads to a key (up to {QUERIES} fit)"
    if held.shape[0] * held.shape[1] > 65535:
        return f"{held.shape[0] * held.shape[1]} heads of a batch"
    if isinstance(length, Tensor):
        if length.dtype != torch.int64 or length.dim():
            return f"a length in {length.dtype} {list(length.shape)}"
        if length.device != query.device:
            return f"a length on {length.device} for queries on {query.device}"
    if mask is not None:
        if mask.device != query.device:
            return f"a mask on {mask.device} for queries on {query.device}"
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.stride(-1) != 1:
            return f"a mask in {mask.dtype} {list(mask.shape)}"
        if mask.shape[0] not in (1, batch) or mask.shape[1:3] != (1, 1):
            return f"a mask {list(mask.shape)} for {batch} sequences"
    return _unsupported_length(keys, length, mask)


def _unsupported_length(rows: Rows, length: int | Tensor, mask: Tensor | None) -> str | None:
    """What can be refused at one length, and not at another."""
    room = _held(rows).shape[2]
    if isinstance(length, int) and not 0 < length <= room:
        return f"{length} of {room} positions"
    seen = length if isinstance(length, int) else room
    if mask is not None and mask.shape[3] < seen:
        return f"a mask {list(mask.shape)} for {seen} positions"
    return None


def _unsupported_prompt(query: Tensor, keys: Rows, values: Rows, length: int | Tensor) -> str | None:
    """`unsupported` for several query positions."""
    if isinstance(length, Tensor):
        return f"a length on the device for {query.shape[2]} positions"
    for rows in (keys, values):
        if not isinstance(rows, PackedRows):
            return "several positions of floats, which PyTorch attends to"
        reason = kv_dequantise.unsupported(rows, length, query.dtype)
        if reason is not None:
            return reason
    return None


def _unsupported_rows(rows: Rows, query: Tensor) -> str | None:
    width = query.shape[3]
    if isinstance(rows, Tensor):
        if rows.dtype != query.dtype:
            return f"rows in {rows.dtype} for queries in {query.dtype}"
        if rows.dim() != 4 or rows.shape[0] != query.shape[0] or rows.shape[3] != width:
            return f"rows {list(rows.shape)} for queries {list(query.shape)}"
        if rows.stride(3) != 1 or any(step % 8 for step in rows.stride()[:3]) or rows.data_ptr() % 16:
            return "rows that do not begin at multiples of 16 bytes"
        return None
    reason = kv_dequantise.unsupported_rows(rows)
    if reason is not None:
        return reason
    if rows.width != width or rows.codes.shape[0] != query.shape[0]:
        return f"rows {list(rows.codes.shape)} of {rows.width} for queries {list(query.shape)}"
    return None


def default(bits: int, width: int, dtype: torch.dtype) -> Choice:
    """As many bytes on their way, and as many programs, as registers hold. dtype: of the queries."""
    programs = PROGRAMS_FLOAT16 if dtype == torch.float16 else PROGRAMS
    return Choice(positions=16 if bits == 16 else 32, programs=programs.get((bits, width), 2))


@lru_cache(maxsize=MOST)
def splits_of(length: int, pairs: int, choice: Choice, multiprocessors: int) -> int:
    """Into how many parts of equal length the context is cut: those for which a program's steps, times the
    rounds in which all programs run, are fewest, a program counting one and a half steps besides."""
    slots = multiprocessors * choice.programs
    steps = triton.cdiv(length, choice.positions * choice.warps)

    def cost(splits: int) -> tuple[float, int]:
        return triton.cdiv(splits * pairs, slots) * (triton.cdiv(steps, splits) + 1.5), splits

    return min(range(1, min(max(steps, 1), MOST_SPLITS) + 1), key=cost)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _held(rows: Rows) -> Tensor:
    return rows if isinstance(rows, Tensor) else rows.codes


def _pairs(rows: Rows) -> int:
    return _held(rows).shape[0] * _held(rows).shape[1]


def _symmetric(rows: Rows) -> bool:
    return not isinstance(rows, PackedRows) or rows.zero is None


def _static(rows: Rows) -> bool:
    return isinstance(rows, PackedRows) and rows.poisoned is not None


def _words(rows: Rows) -> Tensor:
    return _held(rows).view(torch.int32)


def _operands(rows: Rows, none: Tensor, aligned: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words, scales or flags, zero-points, and the static scale; `none` stands for what is not touched.
    aligned: what each position has one byte of comes in words of four."""
    words = _words(rows)
    if isinstance(rows, Tensor):
        return words, none, none, none
    of_bytes = torch.int32 if aligned else torch.uint8
    if rows.poisoned is None:
        return words, rows.scale, none if rows.zero is None else rows.zero.view(of_bytes), none
    zero = none if rows.zero is None else rows.zero.to(torch.float32)
    return words, rows.poisoned.view(of_bytes), zero, rows.scale.to(torch.float32)


def _constants(
    dtype: torch.dtype,
    heads: int,
    group: int,
    width: int,
    bits: int,
    symmetric: bool,
    static: bool,
    masked: bool,
    on_device: bool,
    aligned: bool,
    choice: Choice,
    overlapped: bool,
) -> dict[str, Any]:
    return {
        "HEADS": heads, "GROUP": group, "D": width, "BITS": bits, "SYMMETRIC": symmetric, "STATIC": static,
        "MASKED": masked, "ON_DEVICE": on_device, "ALIGNED": aligned, "N": choice.positions,
        "WARPS": choice.warps, "TERMS": 2 if dtype == torch.float16 and bits < 16 else 1,
        "OVERLAPPED": overlapped,
    }  # fmt: skip


def compilations() -> Iterator[Compilation]:
    """What stands for these kernels in the compile tests."""
    plain: dict[str, Any] = {"symmetric": False, "static": False, "masked": False, "dtype": torch.bfloat16}
    for name, bits, width, more in (
        ("kv4, D 128", 4, 128, {}),
        ("kv4, D 64", 4, 64, {}),
        ("kv8, D 128", 8, 128, {}),
        ("kv8, D 64", 8, 64, {}),
        ("bf16, D 128", 16, 128, {"symmetric": True}),
        ("bf16, D 64", 16, 64, {"symmetric": True}),
        ("kv4, D 128, float16", 4, 128, {"dtype": torch.float16}),
        ("kv4, D 64, float16", 4, 64, {"dtype": torch.float16}),
        ("kv8, D 64, float16", 8, 64, {"dtype": torch.float16}),
        ("kv8, D 128, static, symmetric, mask", 8, 128, {"static": True, "symmetric": True, "masked": True}),
        ("kv4, D 128, static", 4, 128, {"static": True}),
    ):
        yield _compilation(name, bits, width, **{**plain, **more})
    yield Compilation(
        "kv_attention combine", combine,
        {"partial": "*fp32", "stats": "*fp32", "out": "*bf16", "splits": "i32"},
        {"GROUP": 4, "D": 128, "SPLITS": 64}, COMBINING, expect=("LDG.E.128",),
    )  # fmt: skip


def _compilation(
    name: str, bits: int, width: int, *, symmetric: bool, static: bool, masked: bool, dtype: torch.dtype
) -> Compilation:
    strides = [f"{who}_{what}" for who in ("key", "value") for what in ("batch", "head")]
    strides += ["query_batch", "query_head", "capacity"]
    position, number = ("*i32", "*fp32") if static else ("*fp32", "*i32")
    types = {
        "query": f"*{DTYPES[dtype]}",
        **dict.fromkeys(("keys", "values"), "*i32"),
        **dict.fromkeys(("key_scale", "value_scale"), position),
        **dict.fromkeys(("key_zero", "value_zero"), number),
        **dict.fromkeys(("key_fixed", "value_fixed", "partial", "stats"), "*fp32"),
        "mask": "*u8",
        "length": "*i64",
        **dict.fromkeys((*strides, "splits", "mask_stride"), "i32"),
        "factor": "fp32",
    }
    choice = default(bits, width, dtype)
    row = width * bits // 32
    constants = {"KEY_ROW": row, "VALUE_ROW": row} | _constants(
        dtype, 8, 4, width, bits, symmetric, static, masked, True, choice.positions % 32 == 0, choice, True
    )
    return Compilation(
        f"kv_attention {name}", attend, types, constants, {"num_warps": choice.warps, "launch_pdl": True},
        divisible(attend, types, *strides),
        ("HMMA.16816.F32.BF16" if dtype == torch.bfloat16 else "HMMA.16816.F32", "LDG.E.128"),
    )  # fmt: skip
