"""The kernel of `linear_a16` that holds x in registers, for up to 16 rows.

A program stays on its multiprocessor and goes through blocks of 16 outputs. Each of its warps has its own
pieces of K, in both halves, whose x it reads once, as the right operand of `mma`; then only weights come from
memory, those of the next blocks before the current one is multiplied. The sums over warps go through shared
memory once a block.

Where K is more than a program's warps hold, `slices` programs share a block, each with its slice of K. They
leave partial sums in memory and count how many have done all their blocks; the last one adds the slices up,
in their order, so that results do not depend on which it is.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton.few_rows import piece_layout, product_layout, sum_over_warps, tile_layout
from kernels.triton.linear_a16_operands import as_right, high_codes, low_codes


@gluon.constexpr_function
def _final_layout(warps, tokens):
    """Results [row of some blocks, token], a number a thread as long as there are threads."""
    across = min(warps, tokens // 2)
    return gl.BlockedLayout([1, 1], [16, 2], [warps // across, across], [0, 1])


@gluon.jit
def _read(pointer, place, LAST: gl.constexpr, cache: gl.constexpr):
    """What `pointer` points to, zeros where `place` does not lie before LAST (None: everywhere)."""
    if LAST is None:
        return gl.load(pointer, cache_modifier=cache)
    else:
        return gl.load(pointer, mask=place < LAST, other=0, cache_modifier=cache)


@gluon.constexpr_function
def _word_layout(warps):
    """Pieces [warp, row, word], as `piece_layout` has their bytes."""
    return gl.BlockedLayout([1, 1, 4], [1, 8, 4], [warps, 1, 1], [2, 1, 0])


@gluon.jit
def _bytes(words, layout: gl.constexpr):
    """The bytes of words [warp, row, word] as they come in memory, laid out as `layout`.

    A loop keeps words: bytes that live from one iteration to the next would be kept one a register.
    """
    WARPS: gl.constexpr = words.type.shape[0]
    ROWS: gl.constexpr = words.type.shape[1]
    WORDS: gl.constexpr = words.type.shape[2]
    # Of four words, all bytes of word j become those that the four words have in tensor j.
    b = gl.inline_asm_elementwise(
        "mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;",
        "=r,=r,=r,=r,r,r,r,r",
        [words],
        dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )
    mixed = gl.join(gl.join(b[0], b[2]), gl.join(b[1], b[3])).reshape([WARPS, ROWS, WORDS // 4, 4, 4])
    ordered = gl.permute(mixed, [0, 1, 2, 4, 3]).reshape([WARPS, ROWS, 4 * WORDS])
    return gl.convert_layout(ordered, layout, assert_trivial=True)


@gluon.jit
def _words(
    w_ptr,
    block,
    row,
    word,
    outputs,
    HALF: gl.constexpr,
    ROUND: gl.constexpr,
    STEPS: gl.constexpr,
    LAST: gl.constexpr,
    EVEN: gl.constexpr,
):
    """A warp's pieces of the 16 rows of a block. Rows behind the last read the last again: their results are
    not stored. EVEN: there are none. Weights go past the first cache."""
    if EVEN:
        w_row = w_ptr + block * (4 * HALF) + (row.to(gl.int64) * (HALF // 4) + word)
    else:
        w_row = w_ptr + (gl.minimum(block * 16 + row, outputs - 1) * (HALF // 4) + word)
    found = ()
    for step in gl.static_range(STEPS):
        # In words, so that the compiler sees that four of them lie on the same side of the end.
        at = step * (ROUND // 4) + word
        found = found + (_read(w_row + step * (ROUND // 4), at, None if LAST is None else LAST // 4, ".cg"),)
    return found


@gluon.jit
def _per_group(
    pointer,
    block,
    row,
    place,
    outputs,
    HALF: gl.constexpr,
    STRIDE: gl.constexpr,
    GROUP: gl.constexpr,
    ROUND: gl.constexpr,
    STEPS: gl.constexpr,
    LAST: gl.constexpr,
    EVEN: gl.constexpr,
):
    """What the groups of a warp's pieces have one of: low, high for each piece. Nothing for rows that have
    one, and for no pointer."""
    found = ()
    if GROUP < 2 * HALF and pointer is not None:
        if EVEN:
            s_row = pointer + block * 16 + row.to(gl.int64)
        else:
            s_row = pointer + gl.minimum(block * 16 + row, outputs - 1)
        for step in gl.static_range(STEPS):
            at = step * ROUND + place
            group = s_row + at // GROUP * STRIDE
            found = found + (_read(group, at, LAST, ""), _read(group + HALF // GROUP * STRIDE, at, LAST, ""))
    return found


@gluon.jit
def _sum_of_inputs(values, layout: gl.constexpr):
    """The sums of x [warp, token, piece] over the piece: [warp, 1, token], in float32."""
    sums = gl.sum(values.to(gl.float32), axis=2)
    return gl.convert_layout(sums, gl.SliceLayout(1, layout)).expand_dims(1)


@gluon.jit
def _finished(y, n, m, bias_ptr, bias, row_scale_ptr, row_scale, y_ptr, rows, outputs):
    """Add the bias, scale the rows, round once and store y, float32 [n, m]."""
    if bias_ptr is not None:
        y += bias[:, None]
    if row_scale_ptr is not None:
        y *= row_scale[None, :]
    to = y_ptr + m[None, :].to(gl.int64) * outputs + n[:, None]
    gl.store(to, y.to(y_ptr.dtype.element_ty), mask=(m < rows)[None, :] & (n < outputs)[:, None])


@gluon.jit
def _vector(pointer, at, size):
    """Numbers as float32, zeros behind the last; nothing of use for None."""
    if pointer is None:
        return 0.0
    else:
        return gl.load(pointer + at, mask=at < size, other=0.0).to(gl.float32)


@gluon.jit
def _products(
    words,
    scales,
    zeros,
    x,
    x_sums,
    x_ptr,
    zero_ptr,
    block,
    row_of,
    outputs,
    HALF: gl.constexpr,
    GROUP: gl.constexpr,
    ZERO_OFFSET: gl.constexpr,
    TOKENS: gl.constexpr,
    WARPS: gl.constexpr,
    STEPS: gl.constexpr,
):
    """Each warp's sums [warp, row, token] of a block; not scaled where a row has one scale."""
    product: gl.constexpr = product_layout(WARPS)
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product, k_width=2)
    piece: gl.constexpr = piece_layout(WARPS)
    nothing = gl.zeros([WARPS, 16, TOKENS], gl.float32, layout=product)
    total = nothing
    for step in gl.static_range(STEPS):
        packed = _bytes(words[step], piece)
        if GROUP == 2 * HALF:
            total = mma_v2(low_codes(packed, x_ptr, left), x[2 * step], total)
            total = mma_v2(high_codes(packed, x_ptr, left), x[2 * step + 1], total)
        else:
            low = mma_v2(low_codes(packed, x_ptr, left), x[2 * step], nothing)
            if zero_ptr is not None:
                low -= (zeros[2 * step] - ZERO_OFFSET) * x_sums[2 * step]
            total += scales[2 * step] * low
            high = mma_v2(high_codes(packed, x_ptr, left), x[2 * step + 1], nothing)
            if zero_ptr is not None:
                high -= (zeros[2 * step + 1] - ZERO_OFFSET) * x_sums[2 * step + 1]
            total += scales[2 * step + 1] * high
    if GROUP == 2 * HALF and zero_ptr is not None:
        zero = gl.load(zero_ptr + gl.minimum(block * 16 + row_of, outputs - 1)) - ZERO_OFFSET
        x_sum = x_sums[0]
        for part in gl.static_range(1, 2 * STEPS):
            x_sum += x_sums[part]
        total -= zero * x_sum
    return total


@gluon.jit
def _leave(
    total,
    block,
    share,
    scale_ptr,
    bias_ptr,
    row_scale_ptr,
    row_scale,
    partials,
    y_ptr,
    rows,
    outputs,
    SCALED: gl.constexpr,
    SLICES: gl.constexpr,
    TOKENS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Add up the sums of the warps; store the results, or the partial sums where the block is shared.
    SCALED: whether the row's one scale is still to be applied."""
    tile: gl.constexpr = tile_layout(WARPS)
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, tile))
    m = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, tile))
    n = block * 16 + row
    bias = _vector(bias_ptr if SLICES == 1 else None, n, outputs)
    if SCALED:
        scale = _vector(scale_ptr, n, outputs)
    y = sum_over_warps(total, tile)
    if SCALED:
        y *= scale[:, None]
    if SLICES == 1:
        _finished(y, n, m, bias_ptr, bias, row_scale_ptr, row_scale, y_ptr, rows, outputs)
    else:
        part = partials + ((block * SLICES + share) * TOKENS + m)[None, :] * 16
        gl.store(part + row[:, None], y)


@gluon.jit
def _add_slices(
    partials,
    y_ptr,
    bias_ptr,
    row_scale_ptr,
    rows,
    outputs,
    team,
    teams,
    SLICES: gl.constexpr,
    TOKENS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Add up what all slices of a team's blocks have left, and store it: some blocks at a time, so that many
    reads are on their way together."""
    layout: gl.constexpr = _final_layout(WARPS, TOKENS)
    SOME: gl.constexpr = WARPS * 128 // TOKENS  # four numbers a thread
    some = gl.arange(0, SOME, layout=gl.SliceLayout(1, layout))
    m = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, layout))
    row_scale = _vector(row_scale_ptr, m, rows)
    for begin in range(team, gl.cdiv(outputs, 16), SOME // 16 * teams):
        block = begin + some // 16 * teams
        n = block * 16 + some % 16
        bias = _vector(bias_ptr, n, outputs)
        inside = (n < outputs)[:, None] & (m < rows)[None, :]
        part = partials + (block * (SLICES * TOKENS * 16) + some % 16)[:, None] + m[None, :] * 16
        parts = ()
        for nth in gl.static_range(SLICES):
            one = gl.load(part + nth * (TOKENS * 16), mask=inside, other=0.0, cache_modifier=".cg")
            parts = parts + (one,)
        y = parts[0]  # type: ignore[misc]
        for nth in gl.static_range(1, SLICES):
            y += parts[nth]
        _finished(y, n, m, bias_ptr, bias, row_scale_ptr, row_scale, y_ptr, rows, outputs)


@gluon.jit(do_not_specialize=("rows", "outputs"))
def held_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    y_ptr,
    bias_ptr,
    row_scale_ptr,
    partials,
    arrivals,
    rows,
    outputs,
    HALF: gl.constexpr,
    STRIDE: gl.constexpr,
    GROUP: gl.constexpr,
    ZERO_OFFSET: gl.constexpr,
    TOKENS: gl.constexpr,
    WARPS: gl.constexpr,
    AHEAD: gl.constexpr,
    PIECE: gl.constexpr,
    STEPS: gl.constexpr,
    SLICES: gl.constexpr,
    EVEN: gl.constexpr,
):
    product: gl.constexpr = product_layout(WARPS)
    right: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=product, k_width=2)
    piece: gl.constexpr = piece_layout(WARPS)
    whole: gl.constexpr = _word_layout(WARPS)
    tile: gl.constexpr = tile_layout(WARPS)
    ROUND: gl.constexpr = WARPS * PIECE
    LAST: gl.constexpr = None if SLICES * STEPS * ROUND == HALF else HALF

    gdc_launch_dependents()
    share = gl.program_id(0) % SLICES
    team = gl.program_id(0) // SLICES
    teams = gl.num_programs(0) // SLICES
    blocks = gl.cdiv(outputs, 16)
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, piece)))[:, None, None]
    inner = gl.arange(0, PIECE, layout=gl.SliceLayout(0, gl.SliceLayout(1, piece)))[None, None, :]
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, gl.SliceLayout(2, piece)))[None, :, None]
    byte = share * (STEPS * ROUND) + warp * PIECE + inner
    warp_w = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, whole)))[:, None, None]
    inner_w = gl.arange(0, PIECE // 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, whole)))[None, None, :]
    row_w = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, whole)))[None, :, None]
    word = share * (STEPS * ROUND // 4) + warp_w * (PIECE // 4) + inner_w
    # The same places as words, and as the product has them, for what each group of weights has one of.
    warp_of = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, product)))[:, None, None]
    place = share * (STEPS * ROUND) + warp_of * PIECE
    row_of = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, product)))[None, :, None]
    m = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, tile))

    queue = ()
    for ahead in gl.static_range(AHEAD):
        # A block behind the last is read as the last, and not used.
        block = gl.minimum(team + ahead * teams, blocks - 1)
        queue = queue + (_words(w_ptr, block, row_w, word, outputs, HALF, ROUND, STEPS, LAST, EVEN),)
    scales = _per_group(
        scale_ptr, team, row_of, place, outputs, HALF, STRIDE, GROUP, ROUND, STEPS, LAST, EVEN
    )
    zeros = _per_group(zero_ptr, team, row_of, place, outputs, HALF, STRIDE, GROUP, ROUND, STEPS, LAST, EVEN)
    # All above is at rest; what follows may come from the kernel before this one.
    gdc_wait()
    x_row = x_ptr + token * (2 * HALF) + byte
    x = ()
    x_sums = ()
    for step in gl.static_range(STEPS):
        inside = token < rows
        if LAST is not None:
            inside = inside & (step * ROUND + byte < HALF)
        x_low = gl.load(x_row + step * ROUND, mask=inside, other=0.0)
        x_high = gl.load(x_row + (HALF + step * ROUND), mask=inside, other=0.0)
        x = x + (as_right(x_low, right), as_right(x_high, right))
        if zero_ptr is not None:
            x_sums = x_sums + (_sum_of_inputs(x_low, product), _sum_of_inputs(x_high, product))
    row_scale = _vector(row_scale_ptr, m, rows)

    # A block's registers take the one AHEAD of it as soon as it is multiplied, while its sums are added up.
    # Every block has its own branch, so that the assembler does not multiply two before it fetches a third.
    for first in range(team, blocks, AHEAD * teams):
        later = ()
        for nth in gl.static_range(AHEAD):
            block = first + nth * teams
            words = queue[nth]  # type: ignore[var-annotated]
            if block < blocks:
                total = _products(
                    words, scales, zeros, x, x_sums, x_ptr, zero_ptr, block, row_of, outputs, HALF, GROUP,
                    ZERO_OFFSET, TOKENS, WARPS, STEPS,
                )  # fmt: skip
                if block + AHEAD * teams < blocks:
                    words = _words(
                        w_ptr, block + AHEAD * teams, row_w, word, outputs, HALF, ROUND, STEPS, LAST, EVEN
                    )
                if block + teams < blocks:
                    scales = _per_group(
                        scale_ptr, block + teams, row_of, place, outputs, HALF, STRIDE, GROUP, ROUND, STEPS,
                        LAST, EVEN,
                    )  # fmt: skip
                    zeros = _per_group(
                        zero_ptr, block + teams, row_of, place, outputs, HALF, STRIDE, GROUP, ROUND, STEPS,
                        LAST, EVEN,
                    )  # fmt: skip
                _leave(
                    total, block, share, scale_ptr, bias_ptr, row_scale_ptr, row_scale, partials, y_ptr,
                    rows, outputs, GROUP == 2 * HALF, SLICES, TOKENS, WARPS,
                )  # fmt: skip
            later = later + (words,)
        queue = later

    if SLICES > 1:
        gl.thread_barrier()
        arrived = gl.atomic_add(arrivals + team, 1, sem="acq_rel", scope="gpu")
        if arrived == SLICES - 1:
            _add_slices(
                partials, y_ptr, bias_ptr, row_scale_ptr, rows, outputs, team, teams, SLICES, TOKENS, WARPS
            )
            gl.atomic_xchg(arrivals + team, 0, sem="relaxed", scope="gpu")
