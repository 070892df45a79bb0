"""Decode attention on the device: one query position against the rows of a cache, split over the context.

A program takes a run of positions of one KV head, and with them all query heads of its group, so that a row
is read and unpacked once. Its warps take N positions each in every step and have nothing to do with each
other until the end. Rows go from memory straight into registers, as left operands of `mma.m16n8k16`, whose
right operands have room for 8 queries:

    scores [N, queries] = K Qᵀ     four lanes share a key, as they share a row of the left operand. The order
                                   of D is free as long as both have it: 16 bytes as they come
    out [D, queries] += Vᵀ P       eight lanes share a value. The scores, turned by `movmatrix` within each
                                   8 x 8 of them, are the right operand if lane q of four holds the values of
                                   the positions 2 q and 2 q + 1 of each eight

The order of positions within N is free, too: row 8 t + g of the scores is position T g + t (T = N / 8), so
that a lane's positions are neighbours, and their scales one load. Queries beyond those of the group are
zeros.

Codes are multiplied as whole numbers u, no less than 0, in the shape of the 16-bit floats whose bits they
are: u times the smallest float. Unpacking is a mask then and nothing else; the other operand is scaled by a
power of two so that the products are as far from the ends of float32 as can be. The scale of a key multiplies
its row of scores, and that of a value its row of P, before P is rounded. Zero-points meet the sum over a
query and the sums over P as it was rounded. Softmax is computed in base 2 and float32. What a split leaves is
its largest score, the sum of its exponentials and its unscaled result; `combine` adds the splits up.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton.kv_operands import (
    left_keys,
    left_values,
    narrow,
    right_queries,
    right_weights,
    widen,
)
from kernels.triton.kv_ranges import (
    four_layout,
    range_of_rows,
    row_words,
    run_layout,
    scales_of_rows,
    zeros_of_rows,
)

QUERIES = 16
"""Query heads of a group that a program holds."""


@gluon.constexpr_function
def product_layout(warps):
    """[warp, position or channel, query], every warp with its own."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def row_layout(warps, chunk):
    """[warp, query or position, element]: `chunk` neighbours a thread, four lanes along a row."""
    return gl.BlockedLayout([1, 1, chunk], [1, 8, 4], [warps, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def _powers(first, past):
    return [1 << i for i in range(20) if first <= 1 << i < past]


@gluon.constexpr_function
def value_layout(warps, positions, row, chunk):
    """[warp, position, element]: four lanes along the positions, a run of them each, eight along a row."""
    run = positions // 4
    registers = [[0, 0, x] for x in _powers(1, chunk)] + [[0, x, 0] for x in _powers(1, run)]
    registers += [[0, 0, x] for x in _powers(8 * chunk, row)]
    lanes = [[0, run, 0], [0, 2 * run, 0], [0, 0, chunk], [0, 0, 2 * chunk], [0, 0, 4 * chunk]]
    waves = [[x, 0, 0] for x in _powers(1, warps)]
    return gl.DistributedLinearLayout(registers, lanes, waves, [], [warps, positions, row])


@gluon.constexpr_function
def lane_layout(warps):
    """[warp, row of eight, query]: what a lane adds up of the rows of scores that it holds."""
    return gl.BlockedLayout([1, 1, 2], [1, 8, 4], [warps, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def tile_layout(warps):
    """[channel, query], of which a thread can hold all warps' parts."""
    return gl.SliceLayout(0, gl.BlockedLayout([warps, 1, 1], [1, 4, 8], [1, warps, 1], [2, 1, 0]))


@gluon.jit
def _position(row, N: gl.constexpr):
    """The position of a row of scores."""
    return row % 8 * (N // 8) + row // 8


@gluon.jit
def _lanes(rows, layout: gl.constexpr):
    """The sum of the rows of scores [warp, position, query] that a lane holds, in `lane_layout`."""
    W: gl.constexpr = rows.type.shape[0]
    N: gl.constexpr = rows.type.shape[1]
    Q: gl.constexpr = rows.type.shape[2]
    return gl.convert_layout(gl.sum(rows.reshape([W, N // 8, 8, Q]), axis=1), layout, assert_trivial=True)


@gluon.jit
def _shared(parts):
    """[warp, channel, query] in shared memory, whence a thread gets all warps' parts of what it adds up."""
    swizzle: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    return gl.allocate_shared_memory(parts.dtype, parts.shape, swizzle, parts)


@gluon.jit(do_not_specialize=("splits", "length"))
def attend(
    query, keys, key_scale, key_zero, key_fixed, values, value_scale, value_zero, value_fixed, mask,
    partial, stats,
    length, capacity, splits, mask_stride, query_batch, query_head, key_batch, key_head,
    value_batch, value_head, factor,
    KEY_ROW: gl.constexpr, VALUE_ROW: gl.constexpr,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr,
    SYMMETRIC: gl.constexpr, STATIC: gl.constexpr, MASKED: gl.constexpr, ON_DEVICE: gl.constexpr,
    ALIGNED: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr, TERMS: gl.constexpr,
    OVERLAPPED: gl.constexpr,
):  # fmt: skip
    """One run of positions of one KV head.

    keys, values: rows in words of 32 bits, which their strides count, KEY_ROW and VALUE_ROW from one position
    to the next. key_scale, value_scale: float32, of each position; a static range's flags as bytes. key_zero,
    value_zero: bytes, of each position; a static range's one zero-point in float32. ALIGNED: there is room
    for whole fours of positions, and bytes come in words. key_fixed, value_fixed: a static range's scale.
    length: of the rows held, or where it is kept. mask: bytes, 1 where a position is seen. factor: of scores,
    for exponentials of base 2. partial: float32 [pairs, splits, GROUP, D]; stats: float32
    [pairs, splits, 2, 16], the largest score and the sum of exponentials.
    """
    dtype: gl.constexpr = query.dtype.element_ty
    Q: gl.constexpr = 8 if GROUP <= 8 else 16
    HALVES: gl.constexpr = 2 if BITS == 4 else 1
    ROW: gl.constexpr = D // HALVES
    # Rows come in words of 32 bits, at most four neighbours of them to each of four, or eight, lanes.
    WORDS: gl.constexpr = D * BITS // 32
    EACH: gl.constexpr = ROW // WORDS
    CHUNK: gl.constexpr = 4 if WORDS >= 16 else WORDS // 4
    SPAN: gl.constexpr = 4 if WORDS >= 32 else WORDS // 8
    FOURS: gl.constexpr = N // 4 if ALIGNED else 8
    CODES: gl.constexpr = BITS < 16
    # A symmetric range has its zero-point in the middle.
    MIDDLE: gl.constexpr = 1 << (BITS - 1)
    FIXED: gl.constexpr = STATIC or SYMMETRIC or not CODES
    # float16 does not hold probabilities times scales: they are two bfloat16 numbers there.
    P_TYPE: gl.constexpr = gl.bfloat16 if CODES else dtype
    # What the operands beside codes are multiplied by, the smallest floats that codes count (2^-133, or
    # 2^-24 in float16), and with them what sums of products are to be multiplied by.
    SCALED: gl.constexpr = 2.0**66 if CODES else 1.0
    Q_SCALED: gl.constexpr = 1.0 if dtype == gl.float16 else SCALED
    UNIT: gl.constexpr = 2.0**67 if CODES else 1.0
    Q_UNIT: gl.constexpr = 2.0**24 if CODES and dtype == gl.float16 else UNIT
    product: gl.constexpr = product_layout(WARPS)
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product, k_width=2)
    right: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=product, k_width=2)
    rows: gl.constexpr = row_layout(WARPS, CHUNK)
    query_rows: gl.constexpr = row_layout(WARPS, CHUNK * EACH)
    spans: gl.constexpr = value_layout(WARPS, N, WORDS, SPAN)
    runs: gl.constexpr = run_layout(WARPS, N)
    fours: gl.constexpr = gl.SliceLayout(2, four_layout(WARPS, FOURS * 4))
    lanes: gl.constexpr = lane_layout(WARPS)
    tile: gl.constexpr = tile_layout(WARPS)

    if OVERLAPPED:
        gdc_wait()
    pair = gl.program_id(1)
    batch = (pair // HEADS).to(gl.int64)
    head = pair % HEADS
    if ON_DEVICE:
        held = gl.load(length).to(gl.int32)
    else:
        held = length
    share = gl.cdiv(gl.cdiv(held, splits), N) * N
    begin = gl.program_id(0) * share
    stop = gl.minimum(begin + share, held)
    steps = gl.cdiv(gl.maximum(stop - begin, 0), WARPS * N)

    # Where this program's rows are.
    k_word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, gl.SliceLayout(1, rows)))[None, None, :]
    k_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, rows)))[:, None, None]
    k_row = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(2, rows)))[None, :, None]
    k_at = begin + k_warp * N + _position(k_row, N)
    v_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, spans)))[:, None, None]
    v_run = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(2, spans)))[None, :, None]
    v_at = begin + v_warp * N + v_run
    v_word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, gl.SliceLayout(1, spans)))[None, None, :]
    s_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, product)))[:, None, None]
    s_row = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(2, product)))[None, :, None]
    s_at = begin + s_warp * N + _position(s_row, N)
    r_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, runs))[:, None]
    r_at = begin + r_warp * N + gl.arange(0, N, layout=gl.SliceLayout(0, runs))[None, :]
    f_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, fours))[:, None]
    f_at = begin + f_warp * N + gl.arange(0, FOURS, layout=gl.SliceLayout(0, fours))[None, :] * 4
    key_base = keys + batch * key_batch + head.to(gl.int64) * key_head
    value_base = values + batch * value_batch + head.to(gl.int64) * value_head
    number = pair.to(gl.int64) * capacity
    if CODES:
        flags = number // 4 if STATIC and ALIGNED else number
        key_scale += flags
        value_scale += flags
    if not FIXED:
        points = number // 4 if ALIGNED else number
        key_zero += points
        value_zero += points

    k_rows = key_base + k_at.to(gl.int64) * KEY_ROW + k_word
    v_rows = value_base + v_at.to(gl.int64) * VALUE_ROW + v_word
    k_next = row_words(k_rows, k_at, stop, CODES, ALIGNED)
    if CODES:
        k_scale, k_zero = range_of_rows(key_scale, key_zero, r_at, f_at, stop, STATIC, FIXED, ALIGNED)
    v_next = row_words(v_rows, v_at, stop, CODES, ALIGNED)
    if CODES:
        v_scale, v_zero = range_of_rows(value_scale, value_zero, r_at, f_at, stop, STATIC, FIXED, ALIGNED)
    k_fixed = 1.0
    v_fixed = 1.0
    k_middle = MIDDLE * 1.0
    v_middle = MIDDLE * 1.0
    if STATIC:
        k_fixed = gl.load(key_fixed)
        v_fixed = gl.load(value_fixed)
        if not SYMMETRIC:
            k_middle = gl.load(key_zero)
            v_middle = gl.load(value_zero)

    # Queries, by the halves of their rows; codes of the second half are 16 times as large.
    q_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, query_rows)))[:, None, None]
    q_head = gl.arange(0, Q, layout=gl.SliceLayout(0, gl.SliceLayout(2, query_rows)))[None, :, None]
    element = gl.arange(0, ROW, layout=gl.SliceLayout(0, gl.SliceLayout(1, query_rows)))[None, None, :]
    q_base = query + batch * query_batch + (head * GROUP + q_head) * query_head + element + 0 * q_warp
    q_parts = ()
    q_sum = gl.zeros([WARPS, Q], gl.float32, layout=gl.SliceLayout(2, query_rows))
    for half in gl.static_range(HALVES):
        part = gl.load(q_base + half * ROW, mask=(q_head < GROUP) & (q_warp >= 0), other=0.0)
        if CODES:
            wide = part.to(gl.float32)
            q_sum += gl.sum(wide, axis=2)
            part = narrow(wide * (Q_SCALED / 16**half), dtype)
        q_parts = q_parts + (right_queries(part, CHUNK * EACH, CODES, right),)
    q_sum = gl.expand_dims(gl.convert_layout(q_sum * (1.0 / Q_UNIT), gl.SliceLayout(1, product)), 1)

    largest = gl.full([WARPS, Q], float("-inf"), gl.float32, layout=gl.SliceLayout(1, product))
    total = gl.zeros([WARPS, 8, Q], gl.float32, layout=lanes)
    offset = gl.zeros([WARPS, 8, Q], gl.float32, layout=lanes)
    nothing = gl.zeros([WARPS, ROW, Q], gl.float32, layout=product)
    found = (nothing,)
    if HALVES == 2:
        found = (nothing, nothing)
    for step in range(steps):
        ahead = (step + 1) * (WARPS * N)
        scores = gl.zeros([WARPS, N, Q], gl.float32, layout=product)
        keys_now = left_keys(k_next, CHUNK, BITS, dtype, left)
        for half in gl.static_range(HALVES):
            scores = mma_v2(keys_now[half], q_parts[half], scores)
        if CODES:
            scores = scores - zeros_of_rows(k_zero, k_middle, FIXED, ALIGNED, product) * q_sum
            scores = scores * (scales_of_rows(k_scale, k_fixed, STATIC, ALIGNED, product) * (factor * Q_UNIT))
            k_scale, k_zero = range_of_rows(
                key_scale, key_zero, r_at + ahead, f_at + ahead, stop, STATIC, FIXED, ALIGNED
            )
        else:
            scores = scores * factor
        k_rows += WARPS * N * KEY_ROW
        k_next = row_words(k_rows, k_at + ahead, stop, CODES, ALIGNED)
        place = s_at + step * (WARPS * N)
        inside = place < stop
        if MASKED:
            inside = inside & (gl.load(mask + batch * mask_stride + place, mask=inside, other=0) != 0)
        scores = gl.where(inside, scores, float("-inf"))

        higher = gl.maximum(largest, gl.max(scores, axis=1))
        base = gl.where(higher == float("-inf"), 0.0, higher)
        p = gl.exp2(scores - gl.expand_dims(base, 1))
        shrink = gl.expand_dims(gl.exp2(largest - base), 1)
        lane_shrink = gl.convert_layout(shrink, lanes, assert_trivial=True)
        total = total * lane_shrink + _lanes(p, lanes)
        largest = higher
        if CODES:
            scale = scales_of_rows(v_scale, v_fixed, STATIC, ALIGNED, product)
            p = p * gl.where(inside, scale * SCALED, 0.0)
        terms = (narrow(p, P_TYPE),)
        if TERMS == 2:
            terms = terms + (narrow(p - widen(terms[0]), P_TYPE),)
        if CODES:
            rounded = widen(terms[0])
            if TERMS == 2:
                rounded = rounded + widen(terms[1])  # type: ignore[misc]
            weighted = rounded * zeros_of_rows(v_zero, v_middle, FIXED, ALIGNED, product)
            offset = offset * lane_shrink + _lanes(weighted, lanes)
            v_scale, v_zero = range_of_rows(
                value_scale, value_zero, r_at + ahead, f_at + ahead, stop, STATIC, FIXED, ALIGNED
            )
        values_now = left_values(v_next, SPAN, BITS, P_TYPE, left)
        sums = ()
        for half in gl.static_range(HALVES):
            grown = found[half] * shrink
            for term in gl.static_range(TERMS):
                grown = mma_v2(values_now[half], right_weights(terms[term], right), grown)
            sums = sums + (grown,)
        found = sums
        v_rows += WARPS * N * VALUE_ROW
        v_next = row_words(v_rows, v_at + ahead, stop, CODES, ALIGNED)

    # `combine` is launched while multiprocessors empty, so that its programs go to all of them.
    gdc_launch_dependents()
    # The warps' parts, brought to the largest score of all.
    highest = gl.max(largest, axis=0)
    base = gl.where(highest == float("-inf"), 0.0, highest)
    weight = gl.exp2(largest - gl.expand_dims(base, 0))
    lane_total = gl.convert_layout(gl.sum(total, axis=1), gl.SliceLayout(1, product))
    whole = gl.sum(lane_total * weight, axis=0)
    split = pair.to(gl.int64) * splits + gl.program_id(0)
    lane = gl.arange(0, Q, layout=gl.SliceLayout(0, gl.SliceLayout(1, product)))
    gl.store(stats + split * 32 + lane, highest)
    gl.store(stats + split * 32 + 16 + lane, whole)
    row = gl.arange(0, Q, layout=gl.SliceLayout(0, tile))[None, :]
    column = gl.arange(0, ROW, layout=gl.SliceLayout(1, tile))[:, None]
    TAKEN: gl.constexpr = SPAN * EACH
    channel = column // (8 * TAKEN) * (8 * TAKEN) + column % 8 * TAKEN + column % (8 * TAKEN) // 8
    lane_offset = gl.expand_dims(gl.convert_layout(gl.sum(offset, axis=1), gl.SliceLayout(1, product)), 1)
    parts = ()
    for half in gl.static_range(HALVES):
        part = found[half] * (UNIT / 16**half)
        if CODES:
            part = part - lane_offset * (1.0 / SCALED)
        parts = parts + (_shared(part * gl.expand_dims(weight, 1)),)
    for half in gl.static_range(HALVES):
        y = gl.sum(parts[half].load(tile.parent), axis=0)  # type: ignore[misc]
        place = partial + split * (GROUP * D) + row * D + (half * ROW + channel)  # type: ignore[unreachable]
        gl.store(place, y, mask=row < GROUP)


@triton.jit(do_not_specialize=("splits",))
def combine(  # type: ignore[no-untyped-def]
    partial, stats, out, splits,
    GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The result of one query head from those of all splits, added in their order."""
    gdc_wait()
    gdc_launch_dependents()
    head = tl.program_id(0).to(tl.int64)
    pair = head // GROUP
    member = head % GROUP
    number = tl.arange(0, SPLITS)
    channel = tl.arange(0, D)[None, :]
    there = pair * splits + number
    highest = tl.load(stats + there * 32 + member, number < splits, other=float("-inf"))
    total = tl.load(stats + there * 32 + 16 + member, number < splits, other=0.0)
    parts = tl.load(
        partial + there[:, None] * (GROUP * D) + member * D + channel, (number < splits)[:, None], other=0.0
    )
    base = tl.max(highest, 0)
    base = tl.where(base == float("-inf"), 0.0, base)
    weight = tl.exp2(highest - base)
    whole = tl.sum(total * weight, 0)
    # A query that may look nowhere has no weights: its result is 0.
    y = tl.sum(parts * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + head * D + tl.arange(0, D), y.to(out.dtype.element_ty))
