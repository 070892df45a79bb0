"""Decode attention on the device: one query position against the rows of a cache, split over the context.

A program takes a run of positions of one KV head, and with them all query heads of its group, so that a row
is read and unpacked once. Its warps take N positions each in every step and have nothing to do with each
other until the end. Rows go from memory straight into registers, as operands of `mma.m16n8k16`:

    scores [16 queries, N] = Q Kᵀ    four lanes share a key, as they share a row of the right operand. The
                                     order of D is free as long as both have it: 16 bytes as they come
    out [16 queries, D] += P V       the scores are the left operand as they lie (as in FlashAttention-2), if
                                     lane q of four holds the values of the positions whose scores it holds

The order of positions within N is free, too: column 8 t + 2 q + e of the scores is position 2 T q + 2 t + e
(T = N / 8), so that a lane's positions are neighbours, and their scales one load. Queries beyond those of the
group are zeros.

Codes are multiplied as whole numbers, which 16 bits hold. The scale of a key multiplies its column of scores,
and that of a value its column of P, before P is rounded. Zero-points meet the sum over a query and the sums
over P as it was rounded. Softmax is computed in base 2 and float32. What a split leaves is its largest
score, the sum of its exponentials and its unscaled result; `combine` adds the splits up.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton.kv_operands import left_operand, narrow, right_keys, right_values, widen

QUERIES = 16
"""Query heads of a group that a program holds."""


@gluon.constexpr_function
def product_layout(warps):
    """[warp, query, column], every warp with its own."""
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
def run_layout(warps, positions):
    """[warp, position], of which a lane holds the run that `value_layout` gives it."""
    return gl.SliceLayout(1, gl.BlockedLayout([1, 1, positions // 4], [1, 8, 4], [warps, 1, 1], [2, 1, 0]))


@gluon.constexpr_function
def tile_layout(warps):
    """[query, column], of which a thread can hold all warps' parts."""
    return gl.SliceLayout(0, gl.BlockedLayout([warps, 1, 1], [1, 4, 8], [1, warps, 1], [2, 1, 0]))


@gluon.jit
def _columns(run, layout: gl.constexpr):
    """What each position has one of, [warp, position] in `run_layout`, for the columns of scores."""
    W: gl.constexpr = run.type.shape[0]
    N: gl.constexpr = run.type.shape[1]
    c = gl.permute(run.reshape([W, 4, N // 8, 2]), [0, 2, 1, 3]).reshape([W, N])
    return gl.expand_dims(gl.convert_layout(c, gl.SliceLayout(1, layout), assert_trivial=True), 1)


@gluon.jit
def _position(column, N: gl.constexpr):
    """The position of a column of scores."""
    return (column % 8) // 2 * (N // 4) + column // 8 * 2 + column % 2


@gluon.jit
def _scale(found, fixed, STATIC: gl.constexpr):
    """Scales of positions; NaN where they are not finite, or where a static range's flag is set."""
    if STATIC:
        return gl.where(found != 0, float("nan"), fixed)
    else:
        return found * 0.0 + found


@gluon.jit
def _zero(found, fixed, MIDDLE: gl.constexpr, SYMMETRIC: gl.constexpr, STATIC: gl.constexpr):
    """Zero-points of positions, counted as stored codes are."""
    if SYMMETRIC:
        return 0.0
    elif STATIC:
        return fixed - MIDDLE
    else:
        return found.to(gl.float32) - MIDDLE


@gluon.jit
def _near(at, stop, RUN: gl.constexpr, ALIGNED: gl.constexpr):
    """Which positions are loaded. ALIGNED: there is room for whole runs, so that a run is one access; what is
    beyond `stop` in it does not count."""
    if ALIGNED:
        return at // RUN * RUN < stop
    else:
        return at < stop


@gluon.jit
def _over_warps(parts, tile: gl.constexpr):
    """[warp, query, column] through shared memory, so that a thread holds all warps' parts of what it has."""
    swizzle: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    shared = gl.allocate_shared_memory(parts.dtype, parts.shape, swizzle, parts)
    return gl.sum(shared.load(tile.parent), axis=0)


@gluon.jit(do_not_specialize=("splits", "length"))
def attend(
    query, keys, key_scale, key_zero, key_fixed, values, value_scale, value_zero, value_fixed, mask,
    partial, stats,
    length, capacity, splits, mask_stride, query_batch, query_head, key_batch, key_head, key_row,
    value_batch, value_head, value_row, factor,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr,
    SYMMETRIC: gl.constexpr, STATIC: gl.constexpr, MASKED: gl.constexpr, ON_DEVICE: gl.constexpr,
    ALIGNED: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr, TERMS: gl.constexpr,
    OVERLAPPED: gl.constexpr,
):  # fmt: skip
    """One run of positions of one KV head.

    keys, values: rows in words of 32 bits, which their strides count. key_scale, value_scale: float32, of
    each position; a static range's flags as bytes. key_zero, value_zero: bytes, of each position; a static
    range's one zero-point in float32. key_fixed, value_fixed: a static range's scale. length: of the rows
    held, or where it is kept. mask: bytes, 1 where a position is seen. factor: of scores, for exponentials of
    base 2. partial: float32 [pairs, splits, GROUP, D]; stats: float32 [pairs, splits, 2, 16], the largest
    score and the sum of exponentials.
    """
    dtype: gl.constexpr = query.dtype.element_ty
    Q: gl.constexpr = 16
    HALVES: gl.constexpr = 2 if BITS == 4 else 1
    ROW: gl.constexpr = D // HALVES
    # Rows come in words of 32 bits, at most four neighbours of them to each of four, or eight, lanes.
    WORDS: gl.constexpr = D * BITS // 32
    EACH: gl.constexpr = ROW // WORDS
    CHUNK: gl.constexpr = 4 if WORDS >= 16 else WORDS // 4
    SPAN: gl.constexpr = 4 if WORDS >= 32 else WORDS // 8
    RUN: gl.constexpr = N // 4
    MIDDLE: gl.constexpr = 1 << (BITS - 1)
    # float16 does not hold probabilities times scales: they are two bfloat16 numbers there.
    P_TYPE: gl.constexpr = gl.bfloat16 if BITS < 16 else dtype
    product: gl.constexpr = product_layout(WARPS)
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product, k_width=2)
    right: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=product, k_width=2)
    rows: gl.constexpr = row_layout(WARPS, CHUNK)
    query_rows: gl.constexpr = row_layout(WARPS, CHUNK * EACH)
    spans: gl.constexpr = value_layout(WARPS, N, WORDS, SPAN)
    runs: gl.constexpr = run_layout(WARPS, N)
    tile: gl.constexpr = tile_layout(WARPS)

    if OVERLAPPED:
        gdc_wait()
    gdc_launch_dependents()
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

    # Queries, by the halves of their rows.
    q_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, query_rows)))[:, None, None]
    q_head = gl.arange(0, Q, layout=gl.SliceLayout(0, gl.SliceLayout(2, query_rows)))[None, :, None]
    element = gl.arange(0, ROW, layout=gl.SliceLayout(0, gl.SliceLayout(1, query_rows)))[None, None, :]
    q_base = query + batch * query_batch + (head * GROUP + q_head) * query_head + element + 0 * q_warp
    q_parts = ()
    q_sum = gl.zeros([WARPS, Q], gl.float32, layout=gl.SliceLayout(2, product))
    for half in gl.static_range(HALVES):
        part = gl.load(q_base + half * ROW, mask=(q_head < GROUP) & (q_warp >= 0), other=0.0)
        if BITS < 16 and not SYMMETRIC:
            q_sum += gl.convert_layout(gl.sum(part.to(gl.float32), axis=2), gl.SliceLayout(2, product))
        q_parts = q_parts + (left_operand(part, CHUNK * EACH, BITS < 16, left),)
    q_sum = gl.expand_dims(q_sum, 2)

    # Where this program's rows are.
    k_word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, gl.SliceLayout(1, rows)))[None, None, :]
    k_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, rows)))[:, None, None]
    k_column = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(2, rows)))[None, :, None]
    k_at = begin + k_warp * N + _position(k_column, N)
    v_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, spans)))[:, None, None]
    v_run = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(2, spans)))[None, :, None]
    v_at = begin + v_warp * N + v_run
    v_word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, gl.SliceLayout(1, spans)))[None, None, :]
    s_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, product)))[:, None, None]
    s_column = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(1, product)))[None, None, :]
    s_at = begin + s_warp * N + _position(s_column, N)
    r_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, runs))[:, None]
    r_at = begin + r_warp * N + gl.arange(0, N, layout=gl.SliceLayout(0, runs))[None, :]
    key_base = keys + batch * key_batch + head.to(gl.int64) * key_head
    value_base = values + batch * value_batch + head.to(gl.int64) * value_head
    number = pair.to(gl.int64) * capacity
    k_fixed = 1.0
    v_fixed = 1.0
    k_middle = 0.0
    v_middle = 0.0
    if STATIC:
        k_fixed = gl.load(key_fixed)
        v_fixed = gl.load(value_fixed)
        if not SYMMETRIC:
            k_middle = gl.load(key_zero)
            v_middle = gl.load(value_zero)

    k_next = gl.load(key_base + k_at * key_row + k_word, mask=k_at < stop, other=0)
    v_next = gl.load(value_base + v_at * value_row + v_word, mask=v_at < stop, other=0)
    if BITS < 16:
        near = _near(r_at, stop, RUN, ALIGNED)
        k_scale = gl.load(key_scale + number + r_at, mask=near, other=0)
        v_scale = gl.load(value_scale + number + r_at, mask=near, other=0)
        if not SYMMETRIC and not STATIC:
            k_zero = gl.load(key_zero + number + r_at, mask=near, other=0)
            v_zero = gl.load(value_zero + number + r_at, mask=near, other=0)
        else:
            k_zero = k_scale
            v_zero = v_scale

    largest = gl.full([WARPS, Q], float("-inf"), gl.float32, layout=gl.SliceLayout(2, product))
    total = gl.zeros([WARPS, Q], gl.float32, layout=gl.SliceLayout(2, product))
    offset = gl.zeros([WARPS, Q], gl.float32, layout=gl.SliceLayout(2, product))
    nothing = gl.zeros([WARPS, Q, ROW], gl.float32, layout=product)
    found = (nothing,)
    if HALVES == 2:
        found = (nothing, nothing)
    for step in range(steps):
        ahead = (step + 1) * (WARPS * N)
        scores = gl.zeros([WARPS, Q, N], gl.float32, layout=product)
        keys_now = right_keys(k_next, CHUNK, BITS, dtype, right)
        for half in gl.static_range(HALVES):
            scores = mma_v2(q_parts[half], keys_now[half], scores)
        if BITS < 16:
            if not SYMMETRIC:
                middle = _zero(_columns(k_zero, product), k_middle, MIDDLE, SYMMETRIC, STATIC)
                scores = scores - middle * q_sum
            scores = scores * (_scale(_columns(k_scale, product), k_fixed, STATIC) * factor)
            near = _near(r_at + ahead, stop, RUN, ALIGNED)
            k_scale = gl.load(key_scale + number + r_at + ahead, mask=near, other=0)
            if not SYMMETRIC and not STATIC:
                k_zero = gl.load(key_zero + number + r_at + ahead, mask=near, other=0)
            else:
                k_zero = k_scale
        else:
            scores = scores * factor
        k_next = gl.load(key_base + (k_at + ahead) * key_row + k_word, mask=k_at + ahead < stop, other=0)
        place = s_at + step * (WARPS * N)
        inside = place < stop
        if MASKED:
            inside = inside & (gl.load(mask + batch * mask_stride + place, mask=inside, other=0) != 0)
        scores = gl.where(inside, scores, float("-inf"))

        higher = gl.maximum(largest, gl.max(scores, axis=2))
        base = gl.where(higher == float("-inf"), 0.0, higher)
        p = gl.exp2(scores - gl.expand_dims(base, 2))
        shrink = gl.exp2(largest - base)
        total = total * shrink + gl.sum(p, axis=2)
        largest = higher
        if BITS < 16:
            p = gl.where(inside, p * _scale(_columns(v_scale, product), v_fixed, STATIC), 0.0)
        terms = (narrow(p, P_TYPE),)
        if TERMS == 2:
            terms = terms + (narrow(p - widen(terms[0]), P_TYPE),)
        if BITS < 16 and not SYMMETRIC:
            rounded = widen(terms[0])
            if TERMS == 2:
                rounded = rounded + widen(terms[1])  # type: ignore[misc]
            middle = _zero(_columns(v_zero, product), v_middle, MIDDLE, SYMMETRIC, STATIC)
            offset = offset * shrink + gl.sum(rounded * middle, axis=2)
        if BITS < 16:
            near = _near(r_at + ahead, stop, RUN, ALIGNED)
            v_scale = gl.load(value_scale + number + r_at + ahead, mask=near, other=0)
            if not SYMMETRIC and not STATIC:
                v_zero = gl.load(value_zero + number + r_at + ahead, mask=near, other=0)
            else:
                v_zero = v_scale
        values_now = right_values(v_next, SPAN, BITS, P_TYPE, right)
        sums = ()
        for half in gl.static_range(HALVES):
            grown = found[half] * gl.expand_dims(shrink, 2)
            for term in gl.static_range(TERMS):
                grown = mma_v2(
                    gl.convert_layout(terms[term], left, assert_trivial=True), values_now[half], grown
                )
            sums = sums + (grown,)
        found = sums
        v_next = gl.load(value_base + (v_at + ahead) * value_row + v_word, mask=v_at + ahead < stop, other=0)

    # The warps' parts, brought to the largest score of all.
    highest = gl.max(largest, axis=0)
    base = gl.where(highest == float("-inf"), 0.0, highest)
    weight = gl.exp2(largest - gl.expand_dims(base, 0))
    total = gl.sum(total * weight, axis=0)
    split = pair.to(gl.int64) * splits + gl.program_id(0)
    lane = gl.arange(0, Q, layout=gl.SliceLayout(0, gl.SliceLayout(2, product)))
    gl.store(stats + split * (2 * Q) + lane, highest)
    gl.store(stats + split * (2 * Q) + Q + lane, total)
    row = gl.arange(0, Q, layout=gl.SliceLayout(1, tile))[:, None]
    column = gl.arange(0, ROW, layout=gl.SliceLayout(0, tile))[None, :]
    TAKEN: gl.constexpr = SPAN * EACH
    channel = column // (8 * TAKEN) * (8 * TAKEN) + column % 8 * TAKEN + column % (8 * TAKEN) // 8
    for half in gl.static_range(HALVES):
        part = found[half]
        if BITS < 16 and not SYMMETRIC:
            part = part - gl.expand_dims(offset, 2)
        y = _over_warps(part * gl.expand_dims(weight, 2), tile)
        place = partial + split * (GROUP * D) + row * D + (half * ROW + channel)
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
