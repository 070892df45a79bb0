"""The linear layer for many rows of 16-bit inputs: the weight is dequantised by one kernel, and multiplied by
one dense product (cuBLAS).

The dequantised weight is that of the reference to the bit: (code - zero) * scale in float32, rounded to x's
dtype once. It is written at every call, to 2 N K bytes that PyTorch's caching allocator lends for as long as
the call takes: 235 MB for Llama-3-8B's gate_up. With thousands of rows that costs little beside the product,
with a hundred as much and more.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Unpack

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.compiled import Compilation, divisible
from kernels.reference import PackedWeight, Quantised
from kernels.refusals import UnsupportedError
from kernels.triton.launching import Launch, by_form
from kernels.triton.operands import HALVES, Beside, unsupported_linear

# Packed bytes of a row that a program takes, at most, and at least where rows have groups.
_LONGEST, _SHORTEST = 256, 16


@dataclass(frozen=True)
class Choice:
    """packed: bytes of the weight that a program takes. warps: of a program."""

    packed: int = 4096
    warps: int = 4


def linear(
    x: Tensor,
    w: PackedWeight,
    *,
    choice: Choice | None = None,
    weights_at_rest: bool = False,
    **beside: Unpack[Beside],
) -> Tensor:
    """`reference.linear` of bfloat16 or float16 x: [..., N] in `dtype`, with as many bits the same as the
    dense product of this GPU gives.

    Takes 2 N K bytes of memory while it runs. weights_at_rest: changes nothing. Raises ValueError for
    operands that `unsupported` names.
    """
    _check(x, w, **beside)
    x_keep, w_keep, row_scale = beside.get("x_keep"), beside.get("w_keep"), beside.get("row_scale")
    weight = dequantise(w, x.dtype, choice=choice)
    if x_keep is not None and w_keep is not None:
        x, weight = torch.cat((x_keep, x), dim=-1), torch.cat((w_keep, weight), dim=1)
    y = F.linear(x, weight, beside.get("bias"))
    if row_scale is not None:
        y = y * row_scale
    return y.to(beside["dtype"])


@by_form
def _check(x: Tensor, w: PackedWeight, **beside: Unpack[Beside]) -> None:
    reason = unsupported(x, w, **beside)
    if reason is not None:
        raise UnsupportedError("the linear of a dequantised weight cannot run here:", reason)


def dequantise(w: PackedWeight, dtype: torch.dtype, *, choice: Choice | None = None) -> Tensor:
    """`reference.dequantise_weight` into bfloat16 or float16, bit for bit: [N, K].

    w: as `unsupported` takes it.
    """
    launch = _launch(w, dtype, choice or Choice())
    weight = torch.empty((w.packed.shape[0], w.inputs), dtype=dtype, device=w.packed.device)
    if launch is not None:
        launch(w.packed, w.scale, w.zero, weight)
    return weight


@by_form
def _launch(w: PackedWeight, dtype: torch.dtype, choice: Choice) -> Launch | None:
    """Into a weight of `dtype`; None where there are no outputs."""
    n, half = w.packed.shape
    if n == 0:
        return None
    constants = _constants(w.inputs, w.group, w.signed, choice)
    grid = (triton.cdiv(half, constants["PIECE"]), triton.cdiv(n, constants["ROWS"]))
    numbers, options = (n, w.scale.stride(1)), {"num_warps": choice.warps}
    return Launch(dequantise_weight, grid, numbers, constants, options, w.packed.device)


def unsupported(x: Tensor | Quantised, w: PackedWeight, **beside: Unpack[Beside]) -> str | None:
    """Why these operands cannot run here, in a phrase; None where they can."""
    x_keep, w_keep, bias = beside.get("x_keep"), beside.get("w_keep"), beside.get("bias")
    if isinstance(x, Quantised):
        return "quantised inputs"
    if w.bits != 4:
        return f"{w.bits}-bit weights"
    if w.axis == 0:
        return "groups along axis 0"
    if x.dtype not in HALVES:
        return f"inputs in {x.dtype}"
    reason = unsupported_linear(x, w, x_keep, w_keep, beside.get("row_scale"), bias)
    if reason is not None:
        return reason
    if w.scale.dtype != torch.float32:
        return "scales that are not float32"
    if w.zero is not None and (w.zero.dtype != torch.float32 or w.zero.shape != w.scale.shape):
        return f"zero-points {tuple(w.zero.shape)} in {w.zero.dtype}"
    if x.shape[-1] != w.inputs:
        return f"an input of {x.shape[-1]} channels for a weight of {w.inputs}"
    if w.inputs % 32:
        return f"K = {w.inputs} is no multiple of 32"
    if w.scale.shape[0] != w.packed.shape[0]:
        return f"scales {tuple(w.scale.shape)} for {w.packed.shape[0]} outputs"
    if not w.packed.is_contiguous() or w.packed.data_ptr() % 16:
        return "a packed weight that is not contiguous and aligned to 16 bytes"
    if w.scale.shape[1] > 1 and _piece(w.inputs, w.group) < _SHORTEST:
        return f"groups of {w.group} for K / 2 = {w.inputs // 2}: both must be multiples of {_SHORTEST}"
    if (x_keep is None) != (w_keep is None):
        return "kept channels without both their inputs and their weights"
    if any(kept is not None and kept.dtype != x.dtype for kept in (x_keep, w_keep)):
        return f"kept channels that are not in {x.dtype}"
    if bias is not None and bias.dtype != x.dtype:
        return f"bias in {bias.dtype}"
    return None


def compilations() -> Iterator[Compilation]:
    for inputs, group, zero, kind in (
        (4096, 128, False, "bf16"),
        (14336, 14336, False, "bf16"),
        (4096, 64, True, "fp16"),
        (576, 64, True, "bf16"),
    ):
        name = f"{kind}, K {inputs}, groups of {group}{', zero-points' if zero else ''}"
        yield _compilation(name, inputs, group, zero, kind)


def _compilation(name: str, inputs: int, group: int, zero: bool, kind: str) -> Compilation:
    signature = {"packed": "*u8", "scale": "*fp32", "weight": f"*{kind}", "outputs": "i32", "stride": "i32"}
    if zero:
        signature["zero"] = "*fp32"
    constants: dict[str, Any] = {} if zero else {"zero": None}
    constants |= _constants(inputs, group, not zero, Choice())
    return Compilation(
        name,
        dequantise_weight,
        signature,
        constants,
        {"num_warps": Choice().warps},
        attrs=divisible(dequantise_weight, signature),
        expect=("LDG.E.128", "STG.E.128"),
    )


def _piece(inputs: int, group: int) -> int:
    """Bytes of a row that a program can take so that both halves of it lie within groups each."""
    if group == inputs:
        return min(triton.next_power_of_2(inputs // 2), _LONGEST)
    common = math.gcd(group, inputs // 2)
    return min(common & -common, _LONGEST)


def _constants(inputs: int, group: int, signed: bool, choice: Choice) -> dict[str, int]:
    piece = _piece(inputs, group)
    return {
        "HALF": inputs // 2,
        "GROUP": group,
        "OFFSET": 0 if signed else 8,
        "PIECE": piece,
        "ROWS": max(choice.packed // piece, 1),
    }


@triton.jit
def _values(codes, pointer, zero, group, inside, row, stride, to):  # type: ignore[no-untyped-def]
    """(code - zero) * scale of codes [row, byte] in one group, as the reference rounds them."""
    at = group * stride + row
    values = codes.to(tl.float32)
    if zero is not None:
        values -= tl.load(zero + at, inside, other=0.0)
    values *= tl.load(pointer + at, inside, other=0.0)
    return values.to(to)


@triton.jit(do_not_specialize=("outputs", "stride"))
def dequantise_weight(  # type: ignore[no-untyped-def]
    packed, scale, zero, weight, outputs, stride, HALF: tl.constexpr, GROUP: tl.constexpr,
    OFFSET: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0) * PIECE
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    byte = first + tl.arange(0, PIECE)[None, :]
    some = row < outputs
    inside = some & (byte < HALF)
    both = tl.load(packed + row.to(tl.int64) * HALF + byte, inside, other=0).to(tl.int32)
    # Codes are stored as two's complement, and so less by OFFSET where they count from 0.
    low = ((both & 15) ^ 8) - (8 - OFFSET)
    high = ((both >> 4) ^ 8) - (8 - OFFSET)
    to = weight + row.to(tl.int64) * (2 * HALF) + byte
    kind = weight.dtype.element_ty
    values = _values(low, scale, zero, first // GROUP, some, row, stride, kind)
    tl.store(to, values, inside)
    values = _values(high, scale, zero, (HALF + first) // GROUP, some, row, stride, kind)
    tl.store(to + HALF, values, inside)
