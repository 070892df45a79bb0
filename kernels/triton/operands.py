"""What kernels ask of their operands, above all the linears', before anything is launched."""

from typing import Required, TypedDict

import torch
from torch import Tensor

from kernels.reference import PackedWeight, Quantised

MAX_KEEP = 256
RESULTS = (torch.bfloat16, torch.float16, torch.float32)
HALVES = (torch.bfloat16, torch.float16)


class Beside(TypedDict, total=False):
    """The arguments of `reference.linear` beside x and w."""

    x_keep: Tensor | None
    w_keep: Tensor | None
    row_scale: Tensor | None
    bias: Tensor | None
    dtype: Required[torch.dtype]


def unsupported(
    x: Tensor | Quantised,
    w: PackedWeight,
    *,
    x_keep: Tensor | None = None,
    w_keep: Tensor | None = None,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
) -> str | None:
    """Why no linear's kernel takes these operands of `reference.linear`, in a phrase; None where one may.

    Shapes that fit nothing are refused like those that only kernels do not take. Which device it is, is not
    looked at.
    """
    outputs, inputs = w.packed.shape[0], w.inputs
    given = x if isinstance(x, Tensor) else x.codes
    if w.bits != 4:
        return f"{w.bits}-bit weights"
    if w.axis == 0:
        return "groups along axis 0"
    reason = _unsupported_floats(x, w) if isinstance(x, Tensor) else _unsupported_codes(x, w)
    reason = reason or unsupported_linear(x, w, x_keep, w_keep, row_scale, bias)
    if reason is not None:
        return reason
    if w.scale.dtype != torch.float32:
        return "scales that are not float32"
    if dtype not in RESULTS:
        return f"{dtype} results"
    if inputs % 32:
        return f"K = {inputs} is no multiple of 32"
    if given.shape[-1] != inputs:
        return f"an input of {given.shape[-1]} channels for a weight of {inputs}"
    if w.scale.shape[0] != outputs:
        return f"scales {tuple(w.scale.shape)} for {outputs} outputs"
    if not w.packed.is_contiguous() or w.packed.data_ptr() % 16:
        return "a packed weight that is not contiguous and aligned to 16 bytes"
    rows = given.numel() // inputs
    if not isinstance(x, Tensor) and x.scale.numel() != rows:
        return f"input scales {tuple(x.scale.shape)} for {rows} rows"
    return _unsupported_extras(x_keep, w_keep, row_scale, bias, rows, outputs)


def unsupported_linear(x: Tensor | Quantised, w: PackedWeight, *beside: Tensor | None) -> str | None:
    """`unsupported_together` of what a linear is given."""
    inputs = (x,) if isinstance(x, Tensor) else (x.codes, x.scale, x.zero)
    return unsupported_together(*inputs, w.packed, w.scale, w.zero, w.colsum, *beside)


def unsupported_together(*given: Tensor | None) -> str | None:
    """Why no kernel takes these operands together, or None: none has gradients, or reads another device."""
    there = [operand for operand in given if operand is not None]
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in there):
        return "inputs that need gradients"
    if any(operand.device != there[0].device for operand in there):
        return "operands on several devices"
    return None


def _unsupported_codes(x: Quantised, w: PackedWeight) -> str | None:
    if w.zero is not None or not w.signed:
        return "weights with zero-points"
    if w.scale.shape[1] != 1:
        return "groups of weights"
    if x.scale.shape[-1] != 1:
        return "groups of inputs"
    if x.codes.dtype != (torch.int8 if x.zero is None else torch.uint8):
        return f"{x.codes.dtype} inputs {'without' if x.zero is None else 'with'} zero-points"
    if x.zero is not None:
        if w.colsum is None or w.colsum.shape != w.scale.shape or w.colsum.dtype != torch.int32:
            return "inputs with zero-points and a weight without the sums of its codes"
        if x.zero.shape != x.scale.shape or x.zero.dtype != torch.float32:
            return f"zero-points {tuple(x.zero.shape)} in {x.zero.dtype}"
    if x.scale.dtype != torch.float32:
        return "scales that are not float32"
    # 16 times a code of 4 bits, times a code of x.bits, or times how far 8 bits are from a zero-point.
    if w.inputs << (x.bits + 6 if x.zero is None else 15) >= 2**31:
        return f"K = {w.inputs} could leave 32-bit integers"
    return None


def _unsupported_floats(x: Tensor, w: PackedWeight) -> str | None:
    if x.dtype not in HALVES:
        return f"inputs in {x.dtype}"
    if w.zero is not None and (w.zero.dtype != torch.float32 or w.zero.shape != w.scale.shape):
        return f"zero-points {tuple(w.zero.shape)} in {w.zero.dtype}"
    return None


def _unsupported_extras(
    x_keep: Tensor | None,
    w_keep: Tensor | None,
    row_scale: Tensor | None,
    bias: Tensor | None,
    rows: int,
    outputs: int,
) -> str | None:
    if (x_keep is None) != (w_keep is None):
        return "kept channels without both their inputs and their weights"
    if x_keep is not None and w_keep is not None:
        keep = w_keep.shape[-1]
        if x_keep.dtype != w_keep.dtype or x_keep.dtype not in HALVES:
            return f"kept channels in {x_keep.dtype} and {w_keep.dtype}"
        if keep % 16 or not 0 < keep <= MAX_KEEP:
            return f"{keep} kept channels, no multiple of 16 up to {MAX_KEEP}"
        if x_keep.shape[-1] != keep or x_keep.numel() != rows * keep or w_keep.shape != (outputs, keep):
            return f"kept channels {tuple(x_keep.shape)} and {tuple(w_keep.shape)} that do not fit"
    for name, operand, size in (("row_scale", row_scale, rows), ("bias", bias, outputs)):
        if operand is not None and operand.dtype not in RESULTS:
            return f"{name} in {operand.dtype}"
        if operand is not None and operand.numel() != size:
            return f"{name} {tuple(operand.shape)} that does not fit"
    return None


def matrix(x: Tensor) -> Tensor:
    """x [..., n] as rows [-1, n] that begin at multiples of 16 bytes, for copies of 16 bytes and for TMA.
    Copied only if it must be."""
    rows = x.reshape(-1, x.shape[-1])
    apart = rows.stride(0) * x.element_size()
    if rows.stride(1) != 1 or rows.stride(0) < rows.shape[1] or apart % 16:
        rows = rows.contiguous()
    return rows.clone(memory_format=torch.contiguous_format) if rows.data_ptr() % 16 else rows


def zero_points(x: Quantised) -> Tensor | None:
    """The zero-points of x's rows from which they begin, `zero_step` apart."""
    if x.zero is None or not zero_step(x):
        return x.zero
    return x.zero.reshape(-1).contiguous()


def zero_step(x: Quantised) -> int:
    """From the zero-point of a row to the next one's: 0 where all of them are one number, as a static range
    has it. No copy of it is made."""
    zero = x.zero
    if zero is None or all(n == 1 or step == 0 for n, step in zip(zero.shape, zero.stride(), strict=True)):
        return 0
    return 1


def begun(x: Tensor) -> Tensor:
    """A tensor that begins where `matrix(x)` does, found faster where no copy is needed."""
    whole = x.is_contiguous() and (x.shape[-1] * x.element_size()) % 16 == 0 == x.data_ptr() % 16
    return x if whole else matrix(x)
