"""The kernel of `linear_a16` that reads pieces of x beside those of the weight. See `few_rows`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton.few_rows import (
    fetch,
    fetch_inputs,
    fetch_weights,
    finish,
    piece_layout,
    product_layout,
    sum_over_warps,
    tile_layout,
)
from kernels.triton.linear_a16_operands import as_right, high_codes, low_codes


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


@gluon.jit(do_not_specialize=("rows", "outputs"))
def streamed_kernel(
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
        x_low = as_right(inputs[step][0], right)
        x_high = as_right(inputs[step][1], right)
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
            low = low_codes(weights[step][block], x_ptr, left)
            high = high_codes(weights[step][block], x_ptr, left)
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
