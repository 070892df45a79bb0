"""Packed rows of a KV cache as floats: one read of the codes, one write."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.compiled import Compilation, divisible
from kernels.kv_reference import PackedRows, Rows
from kernels.triton.launching import Launch, by_form
from kernels.triton.operands import unsupported_together
from kernels.triton.quantise import DTYPES, check
from kernels.triton.rounding import narrow

POSITIONS = 64


@triton.jit(do_not_specialize=("length",))
def _dequantise(  # type: ignore[no-untyped-def]
    codes, scales, zeros, fixed, out, length, capacity,
    D: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, STATIC: tl.constexpr,
    POSITIONS: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """scales: of each position, or a static range's flags, whose scale is `fixed`; zeros likewise, or one."""
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()
    BYTES: tl.constexpr = D * BITS // 8
    pair = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    byte = tl.arange(0, BYTES)[None, :]
    inside = position < length
    held = pair * capacity + position
    found = tl.load(codes + held * BYTES + byte, inside, other=0).to(tl.int32)
    scale = tl.load(scales + held, inside, other=0)
    if STATIC:
        scale = tl.where(scale != 0, float("nan"), tl.load(fixed))
    middle = tl.zeros((POSITIONS, 1), tl.float32)
    if not SYMMETRIC and STATIC:
        middle += tl.load(zeros)
    elif not SYMMETRIC:
        middle += tl.load(zeros + held, inside, other=0).to(tl.float32)
    FIRST: tl.constexpr = 0 if SYMMETRIC else 1 << (BITS - 1)
    place = out + (pair * length + position) * D + byte
    if BITS == 8:
        value = ((found + FIRST).to(tl.float32) - middle) * scale
        tl.store(place, narrow(value, out.dtype.element_ty), inside)
    else:
        low = ((((found << 28) >> 28) + FIRST).to(tl.float32) - middle) * scale
        high = (((found >> 4) + FIRST).to(tl.float32) - middle) * scale
        tl.store(place, narrow(low, out.dtype.element_ty), inside)
        tl.store(place + BYTES, narrow(high, out.dtype.element_ty), inside)


def kv_dequantise(rows: PackedRows, length: int, dtype: torch.dtype, *, overlapped: bool = False) -> Tensor:
    """`kv_reference.kv_dequantise` on the GPU, to the bit. overlapped: as in `quantise`. Raises ValueError,
    naming what does not fit, where `unsupported` does."""
    launch = _launch(rows, length, dtype, overlapped)
    batch, heads = rows.codes.shape[:2]
    out = torch.empty((batch, heads, length, rows.width), dtype=dtype, device=rows.codes.device)
    if launch is not None:
        static = rows.poisoned is not None
        scales = rows.scale if rows.poisoned is None else rows.poisoned.view(torch.uint8)
        fixed = rows.scale.to(torch.float32) if static else rows.scale
        zero = fixed
        if rows.zero is not None:
            zero = rows.zero.to(torch.float32) if static else rows.zero
        launch(rows.codes.view(torch.int8), scales, zero, fixed, out)
    return out


@by_form
def _launch(rows: PackedRows, length: int, dtype: torch.dtype, overlapped: bool) -> Launch | None:
    """None where nothing is asked for."""
    check(unsupported(rows, length, dtype))
    batch, heads, capacity, _ = rows.codes.shape
    if not batch * heads * length:
        return None
    return Launch(
        _dequantise,
        (triton.cdiv(length, POSITIONS), batch * heads),
        (length, capacity),
        {"D": rows.width, "BITS": rows.bits, "SYMMETRIC": rows.zero is None,
         "STATIC": rows.poisoned is not None, "POSITIONS": POSITIONS, "OVERLAPPED": overlapped},
        {"num_warps": 4, "enable_fp_fusion": False, "launch_pdl": overlapped},
        rows.codes.device,
    )  # fmt: skip


def unsupported(rows: PackedRows, length: int, dtype: torch.dtype) -> str | None:
    """Why these rows cannot be dequantised here, in a phrase; None where they can."""
    reason = unsupported_together(*tensors_of(rows))
    if reason is not None:
        return reason
    if dtype not in DTYPES:
        return f"{dtype} results"
    if not 0 <= length <= rows.codes.shape[2]:
        return f"{length} of {rows.codes.shape[2]} positions"
    if rows.codes.shape[0] * rows.codes.shape[1] > 65535:
        return f"{rows.codes.shape[0] * rows.codes.shape[1]} heads of a batch"
    return unsupported_rows(rows)


def tensors_of(rows: Rows) -> tuple[Tensor | None, ...]:
    return (rows,) if isinstance(rows, Tensor) else (rows.codes, rows.scale, rows.zero, rows.poisoned)


def unsupported_rows(rows: PackedRows) -> str | None:
    """Why no kernel takes these rows, in a phrase; None where one may."""
    if not rows.codes.is_cuda and not triton.knobs.runtime.interpret:
        return f"rows on the {rows.codes.device.type.upper()}"
    if rows.bits not in (4, 8):
        return f"rows of {rows.bits} bits"
    if rows.width not in (64, 128):
        return f"heads of {rows.width} channels"
    if rows.scale.dtype != torch.float32:
        return f"scales in {rows.scale.dtype}"
    if not rows.codes.is_contiguous() or rows.codes.data_ptr() % 16:
        return "rows that are not contiguous and aligned to 16 bytes"
    return None


def compilations() -> Iterator[Compilation]:
    """What stands for this kernel in the compile tests."""
    types = {
        "codes": "*i8", "scales": "*fp32", "zeros": "*u8", "fixed": "*fp32", "out": "*bf16",
        "length": "i32", "capacity": "i32",
    }  # fmt: skip
    for bits, width in ((4, 128), (4, 64), (8, 128)):
        yield Compilation(
            f"kv_dequantise kv{bits}, D {width}", _dequantise, types,
            {
                "D": width, "BITS": bits, "SYMMETRIC": False, "STATIC": False, "POSITIONS": POSITIONS,
                "OVERLAPPED": False,
            },
            {"num_warps": 4, "enable_fp_fusion": False}, divisible(_dequantise, types, "capacity"),
            ("LDG.E.128", "STG.E.128"),
        )  # fmt: skip
