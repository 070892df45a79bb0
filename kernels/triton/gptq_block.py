"""GPTQ's walk through a block of columns: every row on its own, in the registers of one warp, so that a step
from one column to the next waits for no other."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.compiled import Compilation, divisible
from kernels.triton.launching import Launch, by_form
from kernels.triton.quantise import check, rows_of
from kernels.triton.rounding import dequantised, nearest
from kernels.weight_reference import code_dtype

WIDEST = 256
"""Columns of a block, eight to a thread."""


@dataclass(frozen=True)
class Choice:
    """rows: of a program, which is one warp. Their steps fill each other's waiting."""

    rows: int = 4


@triton.jit
def _gptq_block(  # type: ignore[no-untyped-def]
    weight, factor, scale, zero, out, errors,
    rows, n, stride, factor_stride, scale_stride, scale_step, zero_stride, zero_step,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    start = row.to(tl.int64)
    inside = (row < rows) & (column < n)
    held = tl.load(weight + start * stride + column, inside, other=0.0)
    scales = scale + start * scale_stride
    zeros = zero + start * zero_stride
    for i in range(n):
        behind = tl.load(factor + i * factor_stride + column, (column > i) & (column < n), other=0.0)
        diagonal = tl.load(factor + i * factor_stride + i)
        its_scale = tl.load(scales + i * scale_step, row < rows, other=1.0)
        its_zero = tl.zeros_like(its_scale)
        if not SYMMETRIC:
            its_zero = tl.load(zeros + i * zero_step, row < rows, other=0.0)
        # One column of a tile in registers: a sum in which all others are 0.
        value = tl.sum(tl.where(column == i, held, 0.0), 1, keep_dims=True)
        whole = nearest(value, its_scale, its_zero, BITS, SYMMETRIC)
        error = tl.div_rn(value - dequantised(whole, its_scale, its_zero, SYMMETRIC), diagonal)
        held = tl.where(column > i, tl.fma(0.0 - error, behind, held), held)
    # Every column is what it was when it was rounded: rounded again, all at once, they are the result.
    its_scale = tl.load(scales + column * scale_step, inside, other=1.0)
    its_zero = tl.zeros_like(its_scale)
    if not SYMMETRIC:
        its_zero = tl.load(zeros + column * zero_step, inside, other=0.0)
    diagonal = tl.load(factor + column * (factor_stride + 1), column < n, other=1.0)
    whole = nearest(held, its_scale, its_zero, BITS, SYMMETRIC)
    error = tl.div_rn(held - dequantised(whole, its_scale, its_zero, SYMMETRIC), diagonal)
    tl.store(out + start * n + column, whole.to(tl.int32).to(out.dtype.element_ty), inside)
    tl.store(errors + start * n + column, error, inside)


def gptq_block(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    *,
    choice: Choice | None = None,
    overlapped: bool = False,
) -> tuple[Tensor, Tensor]:
    """`weight_reference.gptq_block` on the GPU, contiguous: to the bit, where the reference too rounds a
    column's update by a product only once, with its sum.

    All float32, up to 256 columns. overlapped as in `quantise`.
    Raises ValueError, naming what does not fit, where `unsupported` does.
    """
    launch = _launch(weight, factor, scale, zero, bits, choice, overlapped)
    codes = torch.empty(weight.shape, dtype=code_dtype(zero is None), device=weight.device)
    errors = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if launch is not None:
        launch(rows_of(weight), rows_of(factor), scale, scale if zero is None else zero, codes, errors)
    return codes, errors


@by_form
def _launch(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    choice: Choice | None,
    overlapped: bool,
) -> Launch | None:
    """None where there are no rows."""
    check(unsupported(weight, factor, scale, zero, bits))
    m, n = weight.shape
    if not m:
        return None
    choice = choice or Choice()
    strides = scale.stride() + (scale if zero is None else zero).stride()
    return Launch(
        _gptq_block,
        (triton.cdiv(m, choice.rows),),
        (m, n, rows_of(weight).stride(0), rows_of(factor).stride(0), *strides),
        {"BITS": bits, "SYMMETRIC": zero is None, "ROWS": choice.rows,
         "BLOCK": max(triton.next_power_of_2(n), 32), "OVERLAPPED": overlapped},
        {"num_warps": 1, "enable_fp_fusion": False, "launch_pdl": overlapped},
        weight.device,
    )  # fmt: skip


def unsupported(weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> str | None:
    """Why `gptq_block` cannot run here, in a phrase, or None."""
    operands = {"weights": weight, "factor": factor, "scale": scale, "zero-point": zero}
    given = {name: value for name, value in operands.items() if value is not None}
    if torch.is_grad_enabled() and any(value.requires_grad for value in given.values()):
        return "operands that need gradients"
    if not weight.is_cuda and not triton.knobs.runtime.interpret:
        return f"a tensor on the {weight.device.type.upper()}"
    if any(value.device != weight.device for value in given.values()):
        return "operands on several devices"
    for name, value in given.items():
        if value.dtype != torch.float32:
            return f"{value.dtype} {name}"
    if weight.dim() != 2 or not 0 < weight.shape[1] <= WIDEST:
        return f"a block {list(weight.shape)} (of 1 to {WIDEST} columns)"
    n = weight.shape[1]
    for name, value in given.items():
        if value.shape != ((n, n) if name == "factor" else weight.shape):
            return f"a {name} {list(value.shape)} for a block {list(weight.shape)}"
    return None if 2 <= bits <= 8 else f"{bits} bits (2 to 8 are defined)"


def compilations() -> Iterator[Compilation]:
    """What stands for this kernel in the compile tests."""
    for name, symmetric, block in (
        ("w4", True, 128),
        ("w4-asymmetric", False, 128),
        ("w4-64", True, 64),
    ):
        pointers = dict.fromkeys(("weight", "factor", "scale", "zero", "errors"), "*fp32")
        integers = ("rows", "n", "stride", "factor_stride", "scale_stride", "zero_stride")
        signature = pointers | {"out": "*i8" if symmetric else "*u8"} | dict.fromkeys(integers, "i32")
        yield Compilation(
            f"gptq_block-{name}",
            _gptq_block,
            signature,
            {"BITS": 4, "SYMMETRIC": symmetric, "ROWS": Choice().rows, "BLOCK": block, "OVERLAPPED": False,
             "scale_step": 1, "zero_step": 1},
            {"num_warps": 1, "enable_fp_fusion": False},
            divisible(_gptq_block, signature, "n", "stride", "factor_stride", "scale_stride", "zero_stride"),
            ("LDG.E.128", "STG.E.128"),
        )  # fmt: skip
