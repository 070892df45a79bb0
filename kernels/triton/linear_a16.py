"""The linear layer for few rows of 16-bit inputs and 4-bit weights, with or without groups. See `few_rows`.

Byte 16 q + 4 j + 2 c + d of 64, held by lane q of four, is element 16 j + 8 c + 2 q + d of the left operand
of `mma.m16n8k16`. A nibble becomes a number without conversion: byte 0x43 above byte u = code + 8 is bfloat16
for 128 + u (0x64 and 1024 for float16), and one packed subtraction leaves the code, exactly. Codes are
multiplied as they are; the scale of a group meets the float32 sum of its products, which is one
multiplication for a whole piece of the row. A zero-point z meets the sum of the inputs, as
Σ (q - z) x = Σ q x - z Σ x; the second sum is a product with ones, so z need not be a number that 16 bits
hold.

The reference rounds each dequantised weight to x's dtype, this kernel does not: it is the more exact one.
Where weights have zero-points, an infinity in a row of x makes that row NaN, where the reference may have
±Inf.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

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
from kernels.triton import few_rows
from kernels.triton.few_rows import (
    fetch,
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
from kernels.triton.operands import matrix

MOST_TOKENS = 16


@dataclass(frozen=True)
class Choice:
    """outputs, warps, ahead, x_ahead, registers: as in `linear_few`. piece: bytes of a piece, 64 or 128; in
    any case within a group of weights."""

    outputs: int = 16
    warps: int = 8
    ahead: int = 2
    x_ahead: int = 1
    registers: int = 255
    piece: int = 128


def linear(
    x: Tensor,
    w: PackedWeight,
    *,
    x_keep: Tensor | None = None,
    w_keep: Tensor | None = None,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
    choice: Choice | None = None,
    weights_at_rest: bool = False,
) -> Tensor:
    """`reference.linear` for few rows of bfloat16 or float16: [..., N] in `dtype`.

    Accumulates in float32, always in the same order for one choice. weights_at_rest: as in `linear_few`.
    Raises ValueError for operands that `unsupported` names.
    """
    reason = unsupported(x, w, x_keep=x_keep, w_keep=w_keep, row_scale=row_scale, bias=bias, dtype=dtype)
    if reason is not None:
        raise ValueError(f"the linear for few 16-bit rows cannot run here: {reason}")
    n, k = w.packed.shape[0], w.inputs
    values = matrix(x).contiguous()
    m = values.shape[0]
    y = torch.empty(*x.shape[:-1], n, dtype=dtype, device=values.device)
    if m == 0:
        return y
    choice = choice or tuning.lookup("linear_a16", values.device, m, n, k, Choice())
    choice = _fitted(choice, k, w.group)
    with torch.cuda.device_of(values):
        _kernel[(triton.cdiv(m, tokens(m, MOST_TOKENS)), triton.cdiv(n, choice.outputs))](
            values,
            w.packed.view(torch.int8),
            w.scale,
            w.zero,
            y,
            flat(bias),
            flat(row_scale),
            m,
            n,
            **_constants(m, k, w.group, w.scale.stride(1), 0 if w.signed else 8, choice),
            **_options(choice, weights_at_rest),
        )
    return y


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
    """Why these operands cannot run here, in a phrase; None where they can."""
    if isinstance(x, Quantised):
        return "quantised inputs"
    reason = few_rows.unsupported(x, w, x_keep, w_keep, row_scale, bias, dtype)
    if reason is not None:
        return reason
    if x_keep is not None:
        return "kept channels beside 16-bit inputs"
    half = w.inputs // 2
    if w.scale.shape[1] > 1 and (w.group % 64 or half % w.group):
        return f"groups of {w.group}: multiples of 64 that divide K / 2 = {half} are needed"
    return None


def candidates(rows: int, outputs: int, inputs: int) -> list[Choice]:
    """What the tuner tries, for groups of 128."""
    if rows <= 8:
        tiles = [
            (16, 4, 2, 1, 255, 128),
            (16, 4, 2, 1, 128, 128),
            (16, 4, 4, 1, 255, 128),
            (16, 8, 2, 1, 255, 128),
        ]
        tiles += [
            (16, 8, 2, 1, 128, 128),
            (32, 4, 2, 1, 255, 128),
            (32, 8, 2, 1, 128, 128),
            (32, 8, 2, 2, 128, 64),
        ]
    else:
        tiles = [
            (16, 4, 2, 1, 255, 128),
            (16, 8, 1, 1, 128, 128),
            (16, 8, 2, 1, 128, 64),
            (32, 4, 2, 1, 255, 128),
        ]
        tiles += [
            (32, 8, 1, 1, 128, 64),
            (32, 8, 2, 1, 128, 64),
            (32, 8, 2, 1, 255, 64),
            (32, 4, 2, 1, 255, 64),
        ]
        tiles += [
            (64, 8, 1, 1, 255, 64),
            (64, 8, 2, 1, 255, 64),
            (64, 4, 1, 1, 255, 64),
            (16, 8, 1, 1, 255, 64),
        ]
    fitting = [
        tile
        for tile in tiles
        if tile[1] * tile[5] <= inputs // 2 and tile[0] * tokens(rows, MOST_TOKENS) <= 1024
    ]
    return list(dict.fromkeys(_fitted(Choice(*tile), inputs, 128) for tile in fitting))


def compilations() -> Iterator[Compilation]:
    for rows, inputs, group, zero in (
        (1, 4096, 128, False),
        (16, 4096, 128, False),
        (16, 4096, 128, True),
        (16, 576, 576, True),
        (16, 14336, 128, False),
        (64, 4096, 4096, False),
    ):
        name = f"{rows} rows, K {inputs}, groups of {group}{', zero-points' if zero else ''}"
        yield compilation(name, rows, 4096, inputs, Choice(), group=group, zero=zero)


def compilation(
    name: str,
    rows: int,
    outputs: int,
    inputs: int,
    choice: Choice,
    *,
    group: int | None = None,
    zero: bool = False,
) -> Compilation:
    """The launch of a product of that size, inputs and results in bfloat16."""
    group = group or inputs
    choice = _fitted(choice, inputs, group)
    none = ("bias_ptr", "row_scale_ptr", *(() if zero else ("zero_ptr",)))
    return Compilation(
        f"linear_a16 {name}",
        _kernel,
        {
            "w_ptr": "*i8",
            **dict.fromkeys(("x_ptr", "y_ptr"), "*bf16"),
            **dict.fromkeys(("scale_ptr", *(("zero_ptr",) if zero else ())), "*fp32"),
            **dict.fromkeys(("rows", "outputs"), "i32"),
        },
        {**dict.fromkeys(none), **_constants(rows, inputs, group, outputs, 8 if zero else 0, choice)},
        _options(choice, True),
        expect=("HMMA.16816.F32.BF16", "LDG.E.128"),
    )


def _constants(
    rows: int, inputs: int, group: int, stride: int, offset: int, choice: Choice
) -> dict[str, int]:
    return {
        "HALF": inputs // 2,
        "STRIDE": stride,
        "GROUP": group,
        "ZERO_OFFSET": offset,
        "OUTPUTS": choice.outputs,
        "TOKENS": tokens(rows, MOST_TOKENS),
        "WARPS": choice.warps,
        "AHEAD": choice.ahead,
        "X_AHEAD": choice.x_ahead,
        "PIECE": choice.piece,
    }


def _options(choice: Choice, at_rest: bool) -> dict[str, int | bool]:
    return {"num_warps": choice.warps, "maxnreg": choice.registers, "launch_pdl": at_rest}


def _fitted(choice: Choice, inputs: int, group: int) -> Choice:
    """The choice, with pieces that lie within groups and no more of them ahead than there are."""
    piece = choice.piece if group == inputs or group % choice.piece == 0 else 64
    most = pieces(inputs, piece, choice.warps)
    return replace(choice, piece=piece, ahead=min(choice.ahead, most), x_ahead=min(choice.x_ahead, most))


def _assembly(shift: str, top: str, offset: str, pair: str) -> gl.constexpr:
    """Four nibbles, each with its top bit flipped and `top` above it, less the offset in each half word."""
    return gl.constexpr(
        f"""{{
        .reg .b32 t, u, v;
        mov.b32 t, $2; {shift}
        lop3.b32 t, t, 0x0f0f0f0f, 0x08080808, 0x6a;
        prmt.b32 u, t, {top}, 0x4140;
        prmt.b32 v, t, {top}, 0x4342;
        mov.b32 t, {offset};
        sub.{pair} $0, u, t;
        sub.{pair} $1, v, t;
        }}"""
    )


_LOW_BFLOAT16 = _assembly("", "0x43434343", "0x43084308", "bf16x2")
_HIGH_BFLOAT16 = _assembly("shr.b32 t, t, 4;", "0x43434343", "0x43084308", "bf16x2")
_LOW_FLOAT16 = _assembly("", "0x64646464", "0x64086408", "f16x2")
_HIGH_FLOAT16 = _assembly("shr.b32 t, t, 4;", "0x64646464", "0x64086408", "f16x2")


@gluon.jit
def _codes(packed, BFLOAT16: gl.constexpr, FLOAT16: gl.constexpr, like):
    """The codes of one nibble of each byte, in the type that `like` points to, laid out as `packed`."""
    if like.dtype.element_ty == gl.bfloat16:
        return gl.inline_asm_elementwise(
            BFLOAT16, "=r,=r,r", [packed], dtype=gl.bfloat16, is_pure=True, pack=4
        )
    else:
        return gl.inline_asm_elementwise(FLOAT16, "=r,=r,r", [packed], dtype=gl.float16, is_pure=True, pack=4)


@gluon.jit
def _weights(rows, first, step: gl.constexpr, ROUND: gl.constexpr, HALF: gl.constexpr):
    """A piece of each block of rows."""
    found = ()
    for block in gl.static_range(len(rows)):
        found = found + (fetch_weights(rows[block], first, step, ROUND, HALF),)
    return found


@gluon.jit
def _per_group(
    pointer,
    rows,
    place,
    STRIDE: gl.constexpr,
    step: gl.constexpr,
    ROUND: gl.constexpr,
    HALF: gl.constexpr,
    GROUP: gl.constexpr,
):
    """What each group of weights has one of, for the low and the high half of a piece of each block of rows,
    [warp, row, 1]. STRIDE: from one group to the next."""
    found = ()
    for block in gl.static_range(len(rows)):
        group = pointer + rows[block] + (step * ROUND + place) // GROUP * STRIDE
        low = fetch(group, place, None, step, ROUND, HALF, "")
        found = found + ((low, fetch(group + HALF // GROUP * STRIDE, place, None, step, ROUND, HALF, "")),)
    return found


@gluon.jit
def _left(codes, layout: gl.constexpr):
    """Codes [warp, row, piece] as the left operand, in the order of this file's head."""
    WARPS: gl.constexpr = codes.type.shape[0]
    ROWS: gl.constexpr = codes.type.shape[1]
    PIECE: gl.constexpr = codes.type.shape[2]
    a = gl.permute(codes.reshape([WARPS, ROWS, PIECE // 64, 4, 4, 2, 2]), [0, 1, 2, 4, 5, 3, 6])
    return gl.convert_layout(a.reshape([WARPS, ROWS, PIECE]), layout, assert_trivial=True)


@gluon.jit
def _right(values, layout: gl.constexpr):
    """x [warp, token, piece] as the right operand [warp, piece, token], in the same order."""
    WARPS: gl.constexpr = values.type.shape[0]
    TOKENS: gl.constexpr = values.type.shape[1]
    PIECE: gl.constexpr = values.type.shape[2]
    b = gl.permute(values.reshape([WARPS, TOKENS, PIECE // 64, 4, 4, 2, 2]), [0, 2, 4, 5, 3, 6, 1])
    return gl.convert_layout(b.reshape([WARPS, PIECE, TOKENS]), layout, assert_trivial=True)


@gluon.jit(do_not_specialize=("rows", "outputs"))
def _kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    y_ptr,
    bias_ptr,
    row_scale_ptr,
    rows,
    outputs,
    HALF: gl.constexpr,
    STRIDE: gl.constexpr,
    GROUP: gl.constexpr,
    ZERO_OFFSET: gl.constexpr,
    OUTPUTS: gl.constexpr,
    TOKENS: gl.constexpr,
    WARPS: gl.constexpr,
    AHEAD: gl.constexpr,
    X_AHEAD: gl.constexpr,
    PIECE: gl.constexpr,
):
    product: gl.constexpr = product_layout(WARPS)
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product, k_width=2)
    right: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=product, k_width=2)
    piece: gl.constexpr = piece_layout(WARPS)
    tile: gl.constexpr = tile_layout(WARPS)
    ROUND: gl.constexpr = WARPS * PIECE
    STEPS: gl.constexpr = (HALF + ROUND - 1) // ROUND
    GROUPS: gl.constexpr = 2 * HALF // GROUP
    BLOCKS: gl.constexpr = OUTPUTS // 16

    gdc_launch_dependents()
    # Programs that read the same weights are neighbours.
    start = gl.program_id(1) * OUTPUTS
    begin = gl.program_id(0) * TOKENS
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, piece)))[:, None, None]
    byte = gl.arange(0, PIECE, layout=gl.SliceLayout(0, gl.SliceLayout(1, piece)))[None, None, :]
    row = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, piece)))[None, :, None]
    token = begin + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, gl.SliceLayout(2, piece)))[None, :, None]
    first = warp * PIECE + byte
    x_row = x_ptr + token * (2 * HALF) + first
    # The same places as the product has them, for what each group of weights has one of.
    place = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, product)))[:, None, None] * PIECE
    row_of = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, product)))[None, :, None]
    w_rows = ()
    s_rows = ()
    for block in gl.static_range(BLOCKS):
        # Rows behind the last read the last again: their results are not stored.
        w_rows = w_rows + (w_ptr + gl.minimum(start + 16 * block + row, outputs - 1) * HALF + first,)
        s_rows = s_rows + (gl.minimum(start + 16 * block + row_of, outputs - 1),)

    weights = ()
    scales = ()
    for step in gl.static_range(AHEAD):
        weights = weights + (_weights(w_rows, first, step, ROUND, HALF),)
        if GROUPS > 1:
            scales = scales + (_per_group(scale_ptr, s_rows, place, STRIDE, step, ROUND, HALF, GROUP),)
    # All above is at rest; what follows may come from the kernel before this one.
    gdc_wait()
    inputs = ()
    for step in gl.static_range(X_AHEAD):
        inputs = inputs + (fetch_inputs(x_row, first, token < rows, step, ROUND, HALF),)
    nothing = gl.zeros([WARPS, 16, TOKENS], gl.float32, layout=product)
    ones = gl.full([WARPS, 16, PIECE], 1.0, x_ptr.dtype.element_ty, layout=left)
    x_sum = nothing
    totals = ()
    for _ in gl.static_range(BLOCKS):
        totals = totals + (nothing,)
    for step in gl.static_range(STEPS):
        if step + X_AHEAD < STEPS:
            inputs = inputs + (fetch_inputs(x_row, first, token < rows, step + X_AHEAD, ROUND, HALF),)
        if step + AHEAD < STEPS:
            weights = weights + (_weights(w_rows, first, step + AHEAD, ROUND, HALF),)
            if GROUPS > 1:
                scales = scales + (
                    _per_group(scale_ptr, s_rows, place, STRIDE, step + AHEAD, ROUND, HALF, GROUP),
                )
        x_low = _right(inputs[step][0], right)
        x_high = _right(inputs[step][1], right)
        if zero_ptr is not None:
            if GROUPS == 1:
                x_sum = mma_v2(ones, x_high, mma_v2(ones, x_low, x_sum))
            else:
                x_sum_low = mma_v2(ones, x_low, nothing)
                x_sum_high = mma_v2(ones, x_high, nothing)
                zeros = _per_group(zero_ptr, s_rows, place, STRIDE, step, ROUND, HALF, GROUP)
        # Sixteen rows after the other, so that few registers hold unpacked codes.
        sums = ()
        for block in gl.static_range(BLOCKS):
            low = _left(_codes(weights[step][block], _LOW_BFLOAT16, _LOW_FLOAT16, x_ptr), left)
            high = _left(_codes(weights[step][block], _HIGH_BFLOAT16, _HIGH_FLOAT16, x_ptr), left)
            if GROUPS == 1:
                sums = sums + (mma_v2(high, x_high, mma_v2(low, x_low, totals[block])),)
            else:
                sum_low = mma_v2(low, x_low, nothing)
                sum_high = mma_v2(high, x_high, nothing)
                if zero_ptr is not None:
                    sum_low -= (zeros[block][0] - ZERO_OFFSET) * x_sum_low
                    sum_high -= (zeros[block][1] - ZERO_OFFSET) * x_sum_high
                scaled = totals[block] + scales[step][block][0] * sum_low
                sums = sums + (scaled + scales[step][block][1] * sum_high,)
        totals = sums

    m = begin + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, tile))
    for block in gl.static_range(BLOCKS):
        n = start + 16 * block + gl.arange(0, 16, layout=gl.SliceLayout(1, tile))
        y = sum_over_warps(totals[block], tile)
        if GROUPS == 1:
            if zero_ptr is not None:
                zero = gl.load(zero_ptr + n, mask=n < outputs, other=0.0) - ZERO_OFFSET
                y -= zero[:, None] * sum_over_warps(x_sum, tile)
            y *= gl.load(scale_ptr + n, mask=n < outputs, other=0.0)[:, None]
        finish(y, n, m, y_ptr, bias_ptr, row_scale_ptr, rows, outputs)
