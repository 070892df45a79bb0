"""The linear layer for few rows of 8- or 4-bit inputs and 4-bit weights, one scale a row. See `few_rows`.
Inputs may have zero-points, then of a row too, or one for all of them.

Byte 16 q + 4 j + b of a piece of 64, held by lane q of four, is element 16 j + 4 q + b of the left operand of
`mma.m16n8k32`. Unpacking is two instructions for four codes of low nibbles and one for four of high ones.
Products and sums are integers, hence the same bits for every choice of tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Unpack

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import tuning
from kernels.compiled import Compilation
from kernels.reference import PackedWeight, Quantised
from kernels.refusals import UnsupportedError
from kernels.triton import few_rows
from kernels.triton.codegen import high_nibbles, low_nibbles, lowered
from kernels.triton.few_rows import (
    fetch_inputs,
    fetch_weights,
    finish,
    flat,
    piece_layout,
    pieces,
    product_layout,
    sum_over_warps,
    tile_layout,
    tokens,
)
from kernels.triton.launching import Launch, by_form
from kernels.triton.operands import Beside, begun, matrix, zero_points, zero_step

PIECE = gl.constexpr(64)
MOST_TOKENS = 32


@dataclass(frozen=True)
class Choice:
    """outputs: weight rows of a program, 16, 32 or 64. warps: 2 to 16, which share K. ahead, x_ahead: pieces
    of each row of the weight and of x that a warp requests before it uses the first. registers: of a thread,
    at most."""

    outputs: int = 16
    warps: int = 4
    ahead: int = 4
    x_ahead: int = 2
    registers: int = 255


def linear(
    x: Quantised,
    w: PackedWeight,
    *,
    choice: Choice | None = None,
    weights_at_rest: bool = False,
    **beside: Unpack[Beside],
) -> Tensor:
    """`reference.linear` for few rows of codes: [..., N] in `dtype`, bit for bit where no channels are kept.

    Where x has zero-points, w needs the sums of its codes. weights_at_rest: no work that is still queued on
    this stream writes w or w_keep. The kernel may then fetch them while the one before it is still running.
    Raises ValueError for operands that `unsupported` names.
    """
    launch = _launch(x, w, choice, weights_at_rest, **beside)
    codes = x.codes
    y = torch.empty((*codes.shape[:-1], w.packed.shape[0]), dtype=beside["dtype"], device=codes.device)
    if launch is not None:
        x_keep, w_keep = beside.get("x_keep"), beside.get("w_keep")
        launch(
            (begun(codes) if codes.is_contiguous() else matrix(codes).contiguous()).view(torch.int8),
            w.packed.view(torch.int8),
            flat(x.scale),
            zero_points(x),
            flat(w.scale),
            None if x.zero is None else flat(w.colsum),
            y,
            None if x_keep is None else matrix(x_keep).contiguous(),
            None if w_keep is None else matrix(w_keep).contiguous(),
            flat(beside.get("bias")),
            flat(beside.get("row_scale")),
        )
    return y


@by_form
def _launch(
    x: Quantised, w: PackedWeight, choice: Choice | None, at_rest: bool, **beside: Unpack[Beside]
) -> Launch | None:
    """None where there are no rows."""
    reason = unsupported(x, w, **beside)
    if reason is not None:
        raise UnsupportedError("the linear for few rows cannot run here:", reason)
    n, k = w.packed.shape[0], w.inputs
    m = x.codes.numel() // k
    if m == 0:
        return None
    device, w_keep = x.codes.device, beside.get("w_keep")
    choice = _fitted(choice or tuning.lookup("linear_few", device, m, n, k, Choice()), k)
    return Launch(
        _kernel,
        (triton.cdiv(m, tokens(m, MOST_TOKENS)), triton.cdiv(n, choice.outputs)),
        (m, n, zero_step(x)),
        _constants(m, k, 0 if w_keep is None else w_keep.shape[1], choice, _lowered(x)),
        _options(choice, at_rest),
        device,
    )


def unsupported(x: Tensor | Quantised, w: PackedWeight, **beside: Unpack[Beside]) -> str | None:
    """Why these operands cannot run here, in a phrase; None where they can."""
    if isinstance(x, Tensor):
        return "floating-point inputs"
    return few_rows.unsupported(x, w, **beside)


def candidates(rows: int, outputs: int, inputs: int) -> list[Choice]:
    """What the tuner tries."""
    tiles = (
        *((16, 4, 8, 4), (16, 8, 8, 4), (16, 4, 4, 2), (16, 8, 4, 4), (32, 4, 8, 1), (32, 4, 4, 2)),
        *((32, 8, 4, 2), (64, 4, 4, 1)),
    )
    found = [
        _fitted(Choice(*tile, registers), inputs)
        for tile in tiles
        for registers in (255, 128)
        if tile[1] * PIECE.value <= inputs // 2 and tile[0] * tokens(rows, MOST_TOKENS) <= 1024
    ]
    return list(dict.fromkeys(found))


def compilations() -> Iterator[Compilation]:
    for rows, inputs, keep in ((1, 4096, 0), (16, 4096, 0), (16, 14336, 64), (32, 14336, 0), (64, 14336, 0)):
        name = f"{rows} rows, K {inputs}, {keep} kept"
        yield compilation(name, rows, 4096, inputs, Choice(), keep=keep)
    for rows, inputs, bits in ((1, 4096, 4), (1, 4096, 8), (16, 14336, 8)):
        name = f"{rows} rows, K {inputs}, zero-points of {bits} bits"
        yield compilation(name, rows, 4096, inputs, Choice(), zero_bits=bits)


def compilation(
    name: str,
    rows: int,
    outputs: int,
    inputs: int,
    choice: Choice,
    *,
    keep: int = 0,
    zero_bits: int | None = None,
) -> Compilation:
    """The launch of a product of that size, with results in bfloat16. zero_bits: of inputs with zero-points,
    whose rows are scaled."""
    choice = _fitted(choice, inputs)
    kept, zeros = ("x_keep_ptr", "w_keep_ptr"), {"x_zero_ptr": "*fp32", "w_sum_ptr": "*i32"}
    none = ("bias_ptr", *(() if keep else kept), *(() if zero_bits else ("row_scale_ptr", *zeros)))
    return Compilation(
        f"linear_few {name}",
        _kernel,
        {
            **dict.fromkeys(("x_ptr", "w_ptr"), "*i8"),
            **dict.fromkeys(("x_scale_ptr", "w_scale_ptr"), "*fp32"),
            **dict.fromkeys(("y_ptr", *(kept if keep else ())), "*bf16"),
            **({**zeros, "row_scale_ptr": "*fp32"} if zero_bits else {}),
            **dict.fromkeys(("rows", "outputs", "zero_step"), "i32"),
        },
        {**dict.fromkeys(none), **_constants(rows, inputs, keep, choice, zero_bits == 8)},
        _options(choice, True),
        expect=("IMMA.16832.S8.S8", "LDG.E.128"),
    )


def _lowered(x: Quantised) -> bool:
    """Whether codes are moved down for a product of int8. Narrower unsigned ones are int8 as they are."""
    return x.zero is not None and x.bits == 8


def _constants(rows: int, inputs: int, keep: int, choice: Choice, lowered: bool) -> dict[str, int]:
    return {
        "HALF": inputs // 2,
        "OUTPUTS": choice.outputs,
        "TOKENS": tokens(rows, MOST_TOKENS),
        "WARPS": choice.warps,
        "AHEAD": choice.ahead,
        "X_AHEAD": choice.x_ahead,
        "KEEP": keep,
        "LOWERED": lowered,
    }


def _options(choice: Choice, at_rest: bool) -> dict[str, int | bool]:
    options = {"num_warps": choice.warps, "maxnreg": choice.registers}
    return {**options, "launch_pdl": at_rest, "enable_fp_fusion": False}


def _fitted(choice: Choice, inputs: int) -> Choice:
    """The choice, with no more pieces ahead than there are."""
    most = pieces(inputs, PIECE.value, choice.warps)
    return replace(choice, ahead=min(choice.ahead, most), x_ahead=min(choice.x_ahead, most))


@gluon.jit
def _left(codes, layout: gl.constexpr):
    """Codes [warp, row, 64] as the left operand, in the order of this file's head."""
    WARPS: gl.constexpr = codes.type.shape[0]
    ROWS: gl.constexpr = codes.type.shape[1]
    a = gl.permute(codes.reshape([WARPS, ROWS, 4, 4, 4]), [0, 1, 3, 2, 4])
    return gl.convert_layout(a.reshape([WARPS, ROWS, 64]), layout, assert_trivial=True)


@gluon.jit
def _right(codes, layout: gl.constexpr, LOWERED: gl.constexpr):
    """x [warp, token, 64] as the right operand [warp, 64, token], in the same order, less 128 if LOWERED."""
    if LOWERED:
        codes = lowered(codes)
    WARPS: gl.constexpr = codes.type.shape[0]
    TOKENS: gl.constexpr = codes.type.shape[1]
    b = gl.permute(codes.reshape([WARPS, TOKENS, 4, 4, 4]), [0, 3, 2, 4, 1])
    return gl.convert_layout(b.reshape([WARPS, 64, TOKENS]), layout, assert_trivial=True)


@gluon.jit
def _centred(sums, zero, w_sum, LOWERED: gl.constexpr):
    """16 times the products of weights and of what inputs are apart from their zero-points, in float32: from
    16 times those of codes, int32 [OUTPUTS, TOKENS]. In float64 it is exact for any whole zero-point."""
    zero = zero.to(gl.float64)
    if LOWERED:
        zero -= 128.0
    return (sums.to(gl.float64) - (16.0 * zero)[None, :] * w_sum.to(gl.float64)[:, None]).to(gl.float32)


@gluon.jit(do_not_specialize=("rows", "outputs", "zero_step"))
def _kernel(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    x_zero_ptr,
    w_scale_ptr,
    w_sum_ptr,
    y_ptr,
    x_keep_ptr,
    w_keep_ptr,
    bias_ptr,
    row_scale_ptr,
    rows,
    outputs,
    zero_step,
    HALF: gl.constexpr,
    OUTPUTS: gl.constexpr,
    TOKENS: gl.constexpr,
    WARPS: gl.constexpr,
    AHEAD: gl.constexpr,
    X_AHEAD: gl.constexpr,
    KEEP: gl.constexpr,
    LOWERED: gl.constexpr,
):
    product: gl.constexpr = product_layout(WARPS)
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product, k_width=4)
    right: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=product, k_width=4)
    piece: gl.constexpr = piece_layout(WARPS)
    tile: gl.constexpr = tile_layout(WARPS)
    ROUND: gl.constexpr = WARPS * PIECE
    STEPS: gl.constexpr = (HALF + ROUND - 1) // ROUND

    gdc_launch_dependents()
    # Programs that read the same weights are neighbours.
    start = gl.program_id(1) * OUTPUTS
    begin = gl.program_id(0) * TOKENS
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, piece)))[:, None, None]
    byte = gl.arange(0, PIECE, layout=gl.SliceLayout(0, gl.SliceLayout(1, piece)))[None, None, :]
    row = gl.arange(0, OUTPUTS, layout=gl.SliceLayout(0, gl.SliceLayout(2, piece)))[None, :, None]
    token = begin + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, gl.SliceLayout(2, piece)))[None, :, None]
    first = warp * PIECE + byte
    # Rows behind the last read the last again: their results are not stored.
    w_row = w_ptr + gl.minimum(start + row, outputs - 1) * HALF + first
    x_row = x_ptr + token * (2 * HALF) + first
    n = start + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, tile))
    m = begin + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, tile))

    weights = ()
    for step in gl.static_range(AHEAD):
        weights = weights + (fetch_weights(w_row, first, step, ROUND, HALF),)
    w_scale = gl.load(w_scale_ptr + n, mask=n < outputs, other=0.0)
    if x_zero_ptr is not None:
        w_sum = gl.load(w_sum_ptr + n, mask=n < outputs, other=0)
    # All above is at rest; what follows may come from the kernel before this one.
    gdc_wait()
    inputs = ()
    for step in gl.static_range(X_AHEAD):
        inputs = inputs + (fetch_inputs(x_row, first, token < rows, step, ROUND, HALF),)
    x_scale = gl.load(x_scale_ptr + m, mask=m < rows, other=0.0)
    if x_zero_ptr is not None:
        zero = gl.load(x_zero_ptr + m * zero_step, mask=m < rows, other=0.0)
    # Two sums, as a product waits for the one before it in its sum.
    low_sum = gl.zeros([WARPS, OUTPUTS, TOKENS], gl.int32, layout=product)
    high_sum = gl.zeros([WARPS, OUTPUTS, TOKENS], gl.int32, layout=product)
    for step in gl.static_range(STEPS):
        if step + X_AHEAD < STEPS:
            inputs = inputs + (fetch_inputs(x_row, first, token < rows, step + X_AHEAD, ROUND, HALF),)
        if step + AHEAD < STEPS:
            weights = weights + (fetch_weights(w_row, first, step + AHEAD, ROUND, HALF),)
        low = _left(low_nibbles(weights[step]), left)
        low_sum = mma_v2(low, _right(inputs[step][0], right, LOWERED), low_sum)
        high = _left(high_nibbles(weights[step]), left)
        high_sum = mma_v2(high, _right(inputs[step][1], right, LOWERED), high_sum)

    sums = sum_over_warps(low_sum + high_sum, tile)
    x_scale += x_scale - x_scale  # an infinite scale becomes NaN
    if x_zero_ptr is not None:
        products = _centred(sums, zero, w_sum, LOWERED)
    else:
        products = sums.to(gl.float32)
    # The codes were 16 times too large: exact, as a scale divided by 16 might not be.
    y = products * 0.0625 * w_scale[:, None] * x_scale[None, :]
    if KEEP:
        y += _kept(
            x_keep_ptr, w_keep_ptr, start, begin, rows, outputs, OUTPUTS, TOKENS, WARPS, KEEP, product, tile
        )
    finish(y, n, m, y_ptr, bias_ptr, row_scale_ptr, rows, outputs)


@gluon.jit
def _kept(
    x_ptr,
    w_ptr,
    start,
    begin,
    rows,
    outputs,
    OUTPUTS: gl.constexpr,
    TOKENS: gl.constexpr,
    WARPS: gl.constexpr,
    KEEP: gl.constexpr,
    product: gl.constexpr,
    tile: gl.constexpr,
):
    """The product of the kept channels, float32 [OUTPUTS, TOKENS] laid out as `tile`: 16 channels a warp."""
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product, k_width=2)
    right: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=product, k_width=2)
    warp_l = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, left)))[:, None, None]
    warp_r = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, right)))[:, None, None]
    channel_l = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, left)))[None, None, :]
    channel_r = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, right)))[None, :, None]
    row = gl.arange(0, OUTPUTS, layout=gl.SliceLayout(0, gl.SliceLayout(2, left)))[None, :, None]
    token = begin + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, gl.SliceLayout(1, right)))[None, None, :]
    row = gl.minimum(start + row, outputs - 1)
    total = gl.zeros([WARPS, OUTPUTS, TOKENS], gl.float32, layout=product)
    for kept in gl.static_range(0, KEEP, 16 * WARPS):
        k_l = kept + warp_l * 16 + channel_l
        k_r = kept + warp_r * 16 + channel_r
        a = gl.load(w_ptr + row * KEEP + k_l, mask=k_l < KEEP, other=0.0)
        b = gl.load(x_ptr + token * KEEP + k_r, mask=(k_r < KEEP) & (token < rows), other=0.0)
        total = mma_v2(a, b, total)
    return sum_over_warps(total, tile)
