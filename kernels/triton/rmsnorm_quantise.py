"""RMSNorm and quantising in one pass: one read of x, one write of the codes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Unpack

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import tuning
from kernels.compiled import Compilation
from kernels.reference import Quantised, Quantiser
from kernels.triton.quantise import (
    DTYPES,
    Results,
    check,
    compilation,
    constants,
    rows_of,
    unsupported_input,
    unsupported_quantiser,
    warps,
)  # fmt: skip
from kernels.triton.rounding import (
    codes,
    largest,
    narrow,
    quotient,
    rounding,
    scale_and_zero,
    smallest,
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """elements: values that a thread holds, where rows are many. few: the same for at most 64 rows."""

    elements: int = 32
    few: int = 8


@triton.jit
def _rmsnorm_quantise(  # type: ignore[no-untyped-def]
    x, gain, row_scale, out, scales, zeros, given_scale, given_zero, kept, roots,
    rows, n, keep, stride, scale_step, zero_step, clip, eps, divisor,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, STATIC: tl.constexpr, CLAMP: tl.constexpr,
    GAIN: tl.constexpr, ROW_SCALE: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """GAIN: 0 for none, 1 for one number, 2 for one a channel."""
    column = tl.arange(0, BLOCK)[None, :]
    one = tl.zeros((1, 1), tl.int32)
    row = tl.program_id(0)
    start = row.to(tl.int64)
    if OVERLAPPED:
        gdc_wait()
    raw = tl.load(x + start * stride + column, column < n, other=0.0)
    floor = tl.full((1, 1), eps, tl.float32)
    if ROW_SCALE:
        outer = tl.load(row_scale + start + one)
        floor = outer * outer * floor
    if OVERLAPPED:
        gdc_launch_dependents()
    WIDE: tl.constexpr = raw.dtype == tl.float32
    y = raw.to(tl.float32)
    mean = tl.div_rn(tl.sum(y * y, 1, keep_dims=True), divisor)
    rms = tl.sqrt_rn(mean + floor)
    if WIDE:
        y = tl.div_rn(y, rms)
    else:
        # An infinite rms makes 0 of every number; the corrections of the quotient would be NaN.
        endless = rms == float("inf")
        y = quotient(y, tl.where(endless, 0.0, rms), tl.where(endless, 0.0, tl.div_rn(1.0, rms)))
    shown = narrow(y, raw.dtype)
    # Read as late as this, it takes no registers from x; all rows but the first find it in a cache.
    if GAIN == 1:
        weight = tl.load(gain + one).to(tl.float32)
    if GAIN == 2:
        weight = tl.load(gain + column, column < n, other=0.0).to(tl.float32)
    if GAIN:
        shown = narrow(shown.to(tl.float32) * weight, raw.dtype)
    # Channels that are kept do not count; those behind the row are 0, or NaN where all of the row is.
    y = shown.to(tl.float32)
    if KEEP:
        y = tl.where(column >= keep, y, 0.0)
        tl.store(kept + start * keep + column, shown, column < keep)
    low = tl.zeros((1, 1), tl.float32)
    fixed_scale, fixed_zero = low, low
    if STATIC:
        fixed_scale = tl.load(given_scale + start * scale_step + one)
        if not SYMMETRIC:
            fixed_zero = tl.load(given_zero + start * zero_step + one)
    if SYMMETRIC or STATIC:
        high = largest(tl.abs(y), 1)
    else:
        low, high = smallest(y, 1), largest(y, 1)
    scale, zero = scale_and_zero(low, high, clip, fixed_scale, fixed_zero, BITS, SYMMETRIC, STATIC)
    byte = codes(y, rounding(scale, zero, BITS, SYMMETRIC), SYMMETRIC, CLAMP, WIDE)
    byte = byte.to(out.dtype.element_ty)
    if KEEP:
        tl.store(out + start * (n - keep) + (column - keep), byte, (column >= keep) & (column < n))
    else:
        tl.store(out + start * n + column, byte, column < n)
    tl.store(scales + start + one, scale)
    tl.store(roots + start + one, rms)
    if not SYMMETRIC and not STATIC:
        tl.store(zeros + start + one, zero)


def rmsnorm_quantise(
    x: Tensor,
    *,
    eps: float,
    divisor: int | None = None,
    gain: Tensor | None = None,
    row_scale: Tensor | None = None,
    keep: int = 0,
    choice: Choice | None = None,
    overlapped: bool = False,
    **quantiser: Unpack[Quantiser],
) -> tuple[Tensor | None, Quantised, Tensor]:
    """`reference.rmsnorm_quantise` on the GPU.

    x: [..., n], bfloat16, float16 or float32, n up to 32768; gain in its dtype, row_scale in float32. The rms
    is the reference's up to the order of its sum; what follows from it is the same to the bit. choice and
    overlapped as in `quantise`. Raises ValueError, naming what does not fit, where `unsupported` does.
    """
    check(unsupported(x, eps=eps, divisor=divisor, gain=gain, row_scale=row_scale, keep=keep, **quantiser))
    rows = rows_of(x)
    m, n = rows.shape
    leading = x.shape[:-1]
    q = Results(leading, n - keep, x.device, quantiser)
    rms = torch.empty_like(q.scale)
    kept = x.new_empty(*leading, keep) if keep else None
    if m:
        choice = choice or tuning.lookup("rmsnorm_quantise", x.device, m, n, n, Choice())
        block = max(triton.next_power_of_2(n), 32)
        outer = rms if row_scale is None else row_scale.expand(rms.shape).contiguous()
        with torch.cuda.device_of(x):
            _rmsnorm_quantise[(m,)](
                rows, rows if gain is None else gain.contiguous(), outer, *q.pointers(),
                rows if kept is None else kept, rms, m, n, keep, rows.stride(0), *q.numbers(),
                eps, float(divisor or n), **q.constants(x.dtype),
                GAIN=0 if gain is None else 1 if gain.numel() == 1 else 2,
                ROW_SCALE=row_scale is not None, KEEP=keep > 0, BLOCK=block, OVERLAPPED=overlapped,
                num_warps=warps(block, choice.elements if m > 64 else choice.few),
                enable_fp_fusion=False, launch_pdl=overlapped,
            )  # fmt: skip
    return kept, q.quantised(), rms


def unsupported(
    x: Tensor,
    *,
    eps: float,
    divisor: int | None = None,
    gain: Tensor | None = None,
    row_scale: Tensor | None = None,
    keep: int = 0,
    **quantiser: Unpack[Quantiser],
) -> str | None:
    """Why `rmsnorm_quantise` cannot run here, in a phrase, or None."""
    reason = unsupported_input(x, keep, gain, row_scale)
    if reason is not None:
        return reason
    n = x.shape[-1]
    if gain is not None and gain.dtype != x.dtype:
        return f"a {gain.dtype} gain for {x.dtype} inputs"
    if gain is not None and tuple(gain.shape) not in ((n,), (1,)):
        return f"a gain {list(gain.shape)} for {n} channels"
    if row_scale is not None and row_scale.dtype != torch.float32:
        return f"a {row_scale.dtype} scale of rows"
    if row_scale is not None and row_scale.shape != (*x.shape[:-1], 1):
        return f"a scale of rows {list(row_scale.shape)} for an input {list(x.shape)}"
    if any(t is not None and t.device != x.device for t in (gain, row_scale)):
        return "operands on several devices"
    return unsupported_quantiser(x, n - keep, **quantiser)


def compilations() -> Iterator[Compilation]:
    """What stands for this kernel in the compile tests."""
    cases = [
        ("bf16-4096", torch.bfloat16, 4096, 0, 0, 1.0),
        ("bf16-4096-gain-keep-clip", torch.bfloat16, 4096, 2, 64, 0.9),
        ("bf16-14336", torch.bfloat16, 14336, 2, 0, 1.0),
        ("fp32-4096", torch.float32, 4096, 2, 0, 1.0),
    ]
    for name, dtype, n, gain, keep, clip in cases:
        block = triton.next_power_of_2(n)
        pointer = f"*{DTYPES[dtype]}"
        yield compilation(
            f"rmsnorm-quantise-{name}",
            _rmsnorm_quantise,
            {"x": pointer, "gain": pointer, "kept": pointer, "row_scale": "*fp32", "roots": "*fp32"}
            | {"eps": "fp32", "divisor": "fp32"},
            constants(4, True, False, clip, dtype)
            | {"GAIN": gain, "ROW_SCALE": False, "KEEP": keep > 0, "BLOCK": block, "OVERLAPPED": False},
            {"num_warps": warps(block, Choice().elements)},
            ("LDG.E.128", "STG.E.128"),
        )
