"""RMSNorm in one pass, behind a sum and in front of a quantiser: one read of what is summed, one write of the
sum and of the codes, or of the normalised rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Unpack, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import tuning
from kernels.compiled import Compilation
from kernels.pass_reference import Normalised, Normed
from kernels.reference import Quantiser
from kernels.triton.launching import Launch, by_form
from kernels.triton.quantise import (
    DTYPES,
    Results,
    check,
    compilation,
    constants,
    rows_of,
    unsupported_beside,
    unsupported_input,
    unsupported_quantiser,
    warps,
)  # fmt: skip
from kernels.triton.rounding import (
    codes,
    larger,
    largest,
    narrow,
    quotient,
    rounding,
    scale_and_zero,
    smallest,
    widen,
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """elements: values that a thread holds, where rows are many. few: the same for at most FEW rows."""

    elements: int = 32
    few: int = 8


FEW = 64


@triton.jit
def _sum_and_larger(sum_a, peak_a, sum_b, peak_b):  # type: ignore[no-untyped-def]
    return sum_a + sum_b, larger(peak_a, peak_b)


@triton.jit
def _over(x, rms, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x / rms in float32. WIDE: x has more than 11 significant bits."""
    if WIDE:
        return tl.div_rn(x, rms)
    else:
        # An infinite rms makes 0 of every number; the corrections of the quotient would be NaN.
        endless = rms == float("inf")
        return quotient(x, tl.where(endless, 0.0, rms), tl.where(endless, 0.0, tl.div_rn(1.0, rms)))


@triton.jit
def _rmsnorm(  # type: ignore[no-untyped-def]
    x, add, gain, row_scale, stream, out, scales, zeros, given_scale, given_zero, kept, roots, row_scales,
    rows, n, keep, stride, add_stride, scale_step, zero_step, clip, eps, divisor,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, STATIC: tl.constexpr, CLAMP: tl.constexpr,
    QUANTISE: tl.constexpr, ADD: tl.constexpr, GAIN: tl.constexpr, EARLY: tl.constexpr,
    ROW_SCALE: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """GAIN: 0 for none, 1 for one number, 2 for one a channel. EARLY: it is read before all else, at rest."""
    column = tl.arange(0, BLOCK)[None, :]
    one = tl.zeros((1, 1), tl.int32)
    row = tl.program_id(0)
    start = row.to(tl.int64)
    if EARLY:
        weight = _gain(gain, column, n, GAIN)
    if OVERLAPPED:
        gdc_wait()
    raw = tl.load(x + start * stride + column, column < n, other=0.0)
    if ADD:
        branch = tl.load(add + start * add_stride + column, column < n, other=0.0)
    floor = tl.full((1, 1), eps, tl.float32)
    if ROW_SCALE:
        outer = tl.load(row_scale + start + one)
        floor = outer * outer * floor
    if OVERLAPPED:
        gdc_launch_dependents()
    WIDE: tl.constexpr = raw.dtype == tl.float32
    if ADD:
        raw = narrow(widen(raw) + widen(branch), raw.dtype)
        if not ROW_SCALE:
            tl.store(stream + start * n + column, raw, column < n)
    y = raw.to(tl.float32)
    # Without a gain, rounding keeps the order of magnitudes: the largest result is that of the largest input,
    # and one reduction finds both numbers of a row. Channels that are kept do not count.
    ONCE: tl.constexpr = QUANTISE and GAIN == 0 and (SYMMETRIC or STATIC)
    if ONCE:
        size = tl.abs(y)
        if KEEP:
            size = tl.where(column >= keep, size, 0.0)
        total, peak = tl.reduce((y * y, size), 1, _sum_and_larger, keep_dims=True)
    else:
        total = tl.sum(y * y, 1, keep_dims=True)
    rms = tl.sqrt_rn(tl.div_rn(total, divisor) + floor)
    tl.store(roots + start + one, rms)
    shown = narrow(_over(y, rms, WIDE), raw.dtype)
    if ROW_SCALE:
        tl.store(row_scales + start + one, tl.div_rn(outer, rms))
        tl.store(stream + start * n + column, shown, column < n)
    if GAIN:
        if not EARLY:
            # As late as this, it takes no registers from x; all rows but the first find it in a cache.
            weight = _gain(gain, column, n, GAIN)
        shown = narrow(widen(shown) * weight.to(tl.float32), raw.dtype)
    if QUANTISE:
        # Channels behind the row are 0, or NaN where all of the row is.
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
        if ONCE:
            high = _over(peak, rms, WIDE).to(raw.dtype).to(tl.float32)
        elif SYMMETRIC or STATIC:
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
        if not SYMMETRIC and not STATIC:
            tl.store(zeros + start + one, zero)
    else:
        tl.store(out + start * n + column, shown, column < n)


@triton.jit
def _gain(gain, column, n, GAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    if GAIN == 1:
        return tl.load(gain + tl.zeros((1, 1), tl.int32))
    else:
        return tl.load(gain + column, column < n, other=0.0)


def rmsnorm_quantise(
    x: Tensor,
    *,
    add: Tensor | None = None,
    eps: float,
    divisor: int | None = None,
    gain: Tensor | None = None,
    row_scale: Tensor | None = None,
    keep: int = 0,
    choice: Choice | None = None,
    overlapped: bool = False,
    **quantiser: Unpack[Quantiser],
) -> Normalised:
    """`pass_reference.rmsnorm_quantise` on the GPU.

    x, add: [..., n], bfloat16, float16 or float32, n up to 32768; gain in their dtype, row_scale in float32.
    The sum is the reference's to the bit. The rms is the reference's up to the order of its sum; what follows
    from it is the same to the bit. choice and overlapped as in `quantise`; the gain is at rest.
    Raises ValueError, naming what does not fit, where `unsupported` does.
    """
    launch = _launch(x, add, eps, divisor, gain, row_scale, keep, True, choice, overlapped, **quantiser)
    leading, n = x.shape[:-1], x.shape[-1]
    q = Results(leading, n - keep, x.device, quantiser)
    kept = x.new_empty(*leading, keep) if keep else None
    stream, rms, scale = _run(launch, x, add, gain, row_scale, (*q.pointers(), kept))
    return Normalised(stream, kept, q.quantised(), rms, scale)


def rmsnorm(
    x: Tensor,
    *,
    add: Tensor | None = None,
    eps: float,
    divisor: int | None = None,
    gain: Tensor | None = None,
    row_scale: Tensor | None = None,
    choice: Choice | None = None,
    overlapped: bool = False,
) -> Normed:
    """`pass_reference.rmsnorm` on the GPU; otherwise as `rmsnorm_quantise`."""
    launch = _launch(x, add, eps, divisor, gain, row_scale, 0, False, choice, overlapped)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stream, rms, scale = _run(launch, x, add, gain, row_scale, (y,) * 6)
    return Normed(stream, y, rms, scale)


def _run(
    launch: Launch | None,
    x: Tensor,
    add: Tensor | None,
    gain: Tensor | None,
    row_scale: Tensor | None,
    results: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The stream, the rms and the scale of rows that goes on; what `results` names is written."""
    same = add is None and row_scale is None
    stream = x if same else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rms = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    scale = None if row_scale is None else torch.empty_like(rms)
    if launch is not None:
        rows = rows_of(x)
        launch(
            rows,
            rows if add is None else rows_of(add),
            rows if gain is None else gain.contiguous(),
            rms if row_scale is None else row_scale.expand(rms.shape).contiguous(),
            stream,
            *[rows if part is None else part for part in results],
            rms,
            rms if scale is None else scale,
        )
    return stream, rms, scale


@by_form
def _launch(
    x: Tensor,
    add: Tensor | None,
    eps: float,
    divisor: int | None,
    gain: Tensor | None,
    row_scale: Tensor | None,
    keep: int,
    quantised: bool,
    choice: Choice | None,
    overlapped: bool,
    **quantiser: Any,
) -> Launch | None:
    """quantiser: of `rmsnorm_quantise`, empty for `rmsnorm`. None where there are no rows."""
    given: dict[str, Any] = {"add": add, "divisor": divisor, "gain": gain, "row_scale": row_scale}
    check(unsupported(x, eps=eps, **given, keep=keep, **quantiser))
    rows = rows_of(x)
    m, n = rows.shape
    if not m:
        return None
    added = rows if add is None else rows_of(add)
    numbers: tuple[int, int, float] = (0, 0, 1.0)
    coded = constants(8, True, False, 1.0, x.dtype)
    if quantised:
        q = Results(x.shape[:-1], n - keep, x.device, cast("Quantiser", quantiser))
        numbers, coded = q.numbers(), q.constants(x.dtype)
    choice = choice or tuning.lookup("rmsnorm_quantise", x.device, m, n, n, Choice())
    block = max(triton.next_power_of_2(n), 32)
    early = gain is not None and gain.is_contiguous() and m <= FEW  # a copy of it would not be at rest
    return Launch(
        _rmsnorm,
        (m,),
        (m, n, keep, rows.stride(0), added.stride(0), *numbers, eps, float(divisor or n)),
        {**coded, "QUANTISE": quantised, "ADD": add is not None,
         "GAIN": 0 if gain is None else 1 if gain.numel() == 1 else 2, "EARLY": early,
         "ROW_SCALE": row_scale is not None, "KEEP": keep > 0, "BLOCK": block, "OVERLAPPED": overlapped},
        {"num_warps": warps(block, choice.elements if m > FEW else choice.few),
         "enable_fp_fusion": False, "launch_pdl": overlapped},
        x.device,
    )  # fmt: skip


def unsupported(
    x: Tensor,
    *,
    add: Tensor | None = None,
    eps: float,
    divisor: int | None = None,
    gain: Tensor | None = None,
    row_scale: Tensor | None = None,
    keep: int = 0,
    **quantiser: Any,
) -> str | None:
    """Why `rmsnorm_quantise`, or without a quantiser `rmsnorm`, cannot run here, in a phrase, or None."""
    reason = unsupported_input(x, keep, add, gain, row_scale) or unsupported_beside(x, "summand", add)
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
    return unsupported_quantiser(x, n - keep, **quantiser) if quantiser else None


def compilations() -> Iterator[Compilation]:
    """What stands for this kernel in the compile tests."""
    many, few = Choice().elements, Choice().few
    cases = [
        ("bf16-4096", torch.bfloat16, 4096, 0, 0, 1.0, True, False, many, False),
        ("bf16-4096-gain-keep-clip", torch.bfloat16, 4096, 2, 64, 0.9, True, False, many, False),
        ("bf16-14336", torch.bfloat16, 14336, 2, 0, 1.0, True, False, many, False),
        ("fp32-4096", torch.float32, 4096, 2, 0, 1.0, True, False, many, False),
        ("bf16-4096-add", torch.bfloat16, 4096, 0, 0, 1.0, True, True, many, False),
        ("bf16-4096-add-few-rows", torch.bfloat16, 4096, 0, 0, 1.0, True, True, few, False),
        ("fp32-4096-add", torch.float32, 4096, 0, 0, 1.0, True, True, many, False),
        ("bf16-4096-add-floats", torch.bfloat16, 4096, 2, 0, 1.0, False, True, many, False),
        ("bf16-4096-add-floats-few-rows", torch.bfloat16, 4096, 2, 0, 1.0, False, True, few, False),
        ("fp16-8192-floats", torch.float16, 8192, 2, 0, 1.0, False, False, many, False),
        ("bf16-4096-add-scaled-static", torch.bfloat16, 4096, 0, 0, 1.0, True, True, many, True),
        ("bf16-4096-add-scaled-static-few-rows", torch.bfloat16, 4096, 0, 0, 1.0, True, True, few, True),
        ("fp16-4096-add-scaled-floats", torch.float16, 4096, 2, 0, 1.0, False, True, many, True),
    ]
    for name, dtype, n, gain, keep, clip, quantised, add, elements, scaled in cases:
        block = triton.next_power_of_2(n)
        pointer = f"*{DTYPES[dtype]}"
        yield compilation(
            f"rmsnorm-quantise-{name}",
            _rmsnorm,
            dict.fromkeys(("x", "add", "gain", "stream", "kept"), pointer)
            | dict.fromkeys(("row_scale", "roots", "row_scales"), "*fp32")
            | {"eps": "fp32", "divisor": "fp32"}
            | {"out": pointer if not quantised else "*u8" if scaled else "*i8"},
            constants(4, not scaled, scaled, clip, dtype)
            | {"QUANTISE": quantised, "ADD": add, "GAIN": gain, "EARLY": gain > 0 and elements == few}
            | {"ROW_SCALE": scaled, "KEEP": keep > 0, "BLOCK": block, "OVERLAPPED": False},
            {"num_warps": warps(block, elements)},
            ("LDG.E.128", "STG.E.128" if elements == many or not quantised else "STG.E.64"),
        )
