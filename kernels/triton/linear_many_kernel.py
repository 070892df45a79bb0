"""The kernel of `linear_many`: how a program finds its work, and what its warps do with it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton.codegen import high_nibbles, low_nibbles

# Channels of a kept tile.
KEEP_TILE = gl.constexpr(32)
# Numbers of which one compilation serves all.
_NUMBERS = ("half", "keep", "zero_step", "steps", "full", "rest", "sharers", "group")


@gluon.jit
def share(sharer, total, sharers):  # type: ignore[no-untyped-def]
    """The first step of a sharer, of all steps of the last round."""
    return sharer * total // sharers


@gluon.jit
def sharer_of(step, total, sharers):  # type: ignore[no-untyped-def]
    """The sharer that does a step: the last one whose share begins at or before it."""
    return ((step + 1) * sharers - 1) // total


@gluon.jit
def work(i, program, programs, full, rest, sharers, steps):  # type: ignore[no-untyped-def]
    """The i-th piece of a program's work: tile, first step, number of steps. Pieces `full` and `full` + 1 are
    its share of the last round, which touches at most two tiles; either may be empty."""
    tile = program + i * programs
    first = 0
    count = steps
    if i >= full:
        start = 0
        stop = 0
        if program < sharers:
            start = share(program, rest * steps, sharers)
            stop = share(program + 1, rest * steps, sharers)
        border = min((start // steps + 1) * steps, stop)
        if i > full:
            start = border
        else:
            stop = border
        tile = full * programs + start // steps
        first = start % steps
        count = stop - start
    return tile, first, count


@gluon.jit
def place(tile, tiles_m, tiles_n, group):  # type: ignore[no-untyped-def]
    """(token tile, output tile): through `group` output tiles side by side, then the next token tile."""
    band = tile // (group * tiles_m)
    within = tile % (group * tiles_m)
    width = min(tiles_n - band * group, group)
    return within // width, band * group + within % width


@gluon.jit
def _copy(  # type: ignore[no-untyped-def]
    w_desc, x_desc, w_ring, low_ring, high_ring, ready, free, tokens, outputs, half, steps, full, rest,
    sharers, group
):  # fmt: skip
    """The warp that fills the ring.

    Step n of its work goes to slot n % STAGES in round n // STAGES: it waits until the slot has been freed
    n // STAGES times, the last of which ended phase n // STAGES - 1 of `free`. In round 0 that is the phase
    before the first, which counts as ended. No x is read before the kernel in front has ended.
    """
    STAGES: gl.constexpr = w_ring.shape[0]
    OUTPUTS: gl.constexpr = w_ring.shape[1]
    BYTES: gl.constexpr = w_ring.shape[2]
    TOKENS: gl.constexpr = low_ring.shape[1]
    program, programs = gl.program_id(0), gl.num_programs(0)
    tiles_m, tiles_n = gl.cdiv(tokens, TOKENS), gl.cdiv(outputs, OUTPUTS)
    n = 0
    early = 0
    # First of all, the weights alone of the first piece's first round; then everything.
    for turn in range(full + 3):
        tile, first, count = work(max(turn - 1, 0), program, programs, full, rest, sharers, steps)
        m_tile, n_tile = place(tile, tiles_m, tiles_n, group)
        if turn == 0:
            count = min(count, STAGES)
        for step in range(first, first + count):
            slot = n % STAGES
            bar = ready.index(slot)
            # Behind the last byte of a row of W are zeros, so it does not matter what x has there.
            at = step * BYTES
            if n >= early:
                mbarrier.wait(free.index(slot), ((n // STAGES) & 1) ^ 1)
                mbarrier.expect(bar, (OUTPUTS + 2 * TOKENS) * BYTES)
                tma.async_copy_global_to_shared(w_desc, [n_tile * OUTPUTS, at], bar, w_ring.index(slot))
            if turn > 0:
                row = m_tile * TOKENS
                tma.async_copy_global_to_shared(x_desc, [row, at], bar, low_ring.index(slot))
                tma.async_copy_global_to_shared(x_desc, [row, half + at], bar, high_ring.index(slot))
            n += 1
        if turn == 0:
            gdc_wait()
            early = n
            n = 0


@gluon.jit
def _begin(  # type: ignore[no-untyped-def]
    acc, n, ROW: gl.constexpr, ROWS: gl.constexpr, LEFT: gl.constexpr, w_ring, low_ring, high_ring, ready
):  # fmt: skip
    """Start the two products of a step, that of the low and that of the high nibbles, once its slot is ready.

    Step n of the work of four warps is in slot n % STAGES, ready when phase n // STAGES of `ready` has ended.
    """
    STAGES: gl.constexpr = w_ring.shape[0]
    slot = n % STAGES
    mbarrier.wait(ready.index(slot), (n // STAGES) & 1)
    packed = w_ring.index(slot).slice(ROW, ROWS, 0).load(LEFT)
    low = low_nibbles(packed)
    acc = warpgroup_mma(low, low_ring.index(slot).permute((1, 0)), acc, is_async=True)
    high = high_nibbles(packed)
    return warpgroup_mma(high, high_ring.index(slot).permute((1, 0)), acc, is_async=True)


@gluon.jit
def _scales(w_scale, x_scale, output, token, outputs, tokens):  # type: ignore[no-untyped-def]
    s_w = gl.load(w_scale + output, output < outputs, 0.0)
    s_x = gl.load(x_scale + token, token < tokens, 0.0)
    return s_w, s_x + (s_x - s_x)


@gluon.jit
def _offset(zero, LOWERED: gl.constexpr):  # type: ignore[no-untyped-def]
    """16 times a zero-point as int32, less 128 where the codes are LOWERED by that; and 0, or NaN for one
    that is no code, which int32 may not hold."""
    whole = zero.to(gl.int32)
    known = (zero >= 0.0) & (zero <= 255.0) & (whole.to(gl.float32) == zero)
    return 16 * (whole - 128 if LOWERED else whole), gl.where(known, 0.0, float("nan"))


@gluon.jit
def _sum_of_groups(acc, nth, PART: gl.constexpr, sums, given, taken):  # type: ignore[no-untyped-def]
    """The sum of the two groups' tiles, for the first group; through shared memory, for the nth time.

    `given` ends a phase when the second group has written, `taken` when the first has read. Before the second
    writes for the nth time, phase nth - 1 of `taken` must have ended; the one before phase 0 counts as ended.
    """
    if PART == 1:
        mbarrier.wait(taken, (nth & 1) ^ 1)
        sums.store(acc)
        gl.thread_barrier()
        mbarrier.arrive(given)
    else:
        mbarrier.wait(given, nth & 1)
        acc += sums.load(acc.type.layout)
        gl.thread_barrier()
        mbarrier.arrive(taken)
    return acc


@gluon.jit
def _sum_of_sharers(  # type: ignore[no-untyped-def]
    acc, row, column, at, second, PART: gl.constexpr, PARTS: gl.constexpr, partials, arrivals, rest, steps,
    sharers, REGISTERS: gl.constexpr
):  # fmt: skip
    """Leave this share of split tile `at` for others. (Sum, whether this share was the last and has the sum.)

    The last adds up what the others have left, so that nobody waits for a program that may not have started
    yet. A part of the tile for everybody to add up would need such waiting. Adding into one place in memory
    takes as many trips (write, arrival, read); it spares reads, one share's bytes for all but one of the
    others, but pays with zeros to be written, and with wrong sums after a launch that was cut short.
    """
    ROWS: gl.constexpr = acc.shape[0]
    TOKENS: gl.constexpr = acc.shape[1]
    # As many shares are read at once as there are registers for beside the sum, and what else is alive.
    TILES: gl.constexpr = (REGISTERS - 16) * 128 // (ROWS * TOKENS)
    AT_ONCE: gl.constexpr = 3 if TILES > 3 else TILES - 1 if TILES > 2 else 1
    program = gl.program_id(0)
    # A share's first piece is in slot 0 of its program, a piece of the tile after it in slot 1.
    # Its values are ordered by thread, then by register: threads write side by side, and the
    # addresses of one thread differ by constants.
    thread = ((row & 48) << 1 | (row & 7) << 2)[:, None] | (column >> 1 & 3)[None, :]
    register = ((row >> 3 & 1) << 1 | (row >> 6) * (TOKENS // 2))[:, None]
    register |= (column & 1 | column >> 3 << 2)[None, :]
    offset = register << 7 | thread
    gl.store(partials + ((program * 2 + second) * PARTS + PART) * (ROWS * TOKENS) + offset, acc)
    total = rest * steps
    begin = sharer_of(at * steps, total, sharers)
    others = sharer_of(at * steps + steps - 1, total, sharers) - begin
    gl.thread_barrier()
    arrived = gl.atomic_add(arrivals + at * 2 + PART, 1, sem="acq_rel", scope="gpu")
    last = arrived == others
    if last:
        for other in range(0, others, AT_ONCE):
            parts = ()
            for ahead in gl.static_range(AT_ONCE):
                sharer = begin + other + ahead
                sharer += (sharer >= program).to(gl.int32)
                later = (share(sharer, total, sharers) // steps != at).to(gl.int32)
                theirs = partials + ((sharer * 2 + later) * PARTS + PART) * (ROWS * TOKENS) + offset
                inside = gl.full([ROWS, TOKENS], other + ahead < others, gl.int1, acc.type.layout)
                parts = parts + (gl.load(theirs, inside, 0, cache_modifier=".cg"),)
            for ahead in gl.static_range(AT_ONCE):
                acc += parts[ahead]
        gl.atomic_xchg(arrivals + at * 2 + PART, 0, sem="relaxed", scope="gpu")
    return acc, last


@gluon.jit
def _to_cache(w, row, outputs, first, last, half, ROWS: gl.constexpr):  # type: ignore[no-untyped-def]
    """Have the second cache fetch bytes `first` to `last` of ROWS packed rows, which four warps share."""
    thread = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    for some in gl.static_range(0, ROWS // 4, 32):
        nth = some + thread % 32
        mine = row + thread // 32 * (ROWS // 4) + nth
        inside = (nth < ROWS // 4) & (mine < outputs)
        # Addresses and lengths are multiples of 16 bytes, as rows and steps are.
        gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; "
            "mov.u32 $0, 0; }",
            "=r,l,r",
            [w + (mine.to(gl.int64) * half + first), gl.where(inside, min(last, half) - first, 0)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )


@gluon.jit
def _multiply(  # type: ignore[no-untyped-def]
    PART: gl.constexpr, w, w_ring, low_ring, high_ring, ready, free, sums, given, taken, stage, kept, y_desc,
    wk_desc, xk_desc, y, w_scale, w_sum, x_scale, x_zero, bias, row_scale, partials, arrivals, tokens,
    outputs, half, keep, zero_step, steps, full, rest, sharers, group, SPLIT: gl.constexpr,
    REGISTERS: gl.constexpr, LOWERED: gl.constexpr
):  # fmt: skip
    """Four warps, the first group (PART 0) or the second: each computes half of the outputs of every tile, or
    all 64 of them in every other step."""
    STAGES: gl.constexpr = w_ring.shape[0]
    OUTPUTS: gl.constexpr = w_ring.shape[1]
    TOKENS: gl.constexpr = low_ring.shape[1]
    PARTS: gl.constexpr = 1 if OUTPUTS == 64 else 2
    EVERY: gl.constexpr = 2 if OUTPUTS == 64 else 1
    ROWS: gl.constexpr = OUTPUTS // PARTS
    ROW: gl.constexpr = PART * (OUTPUTS - ROWS)
    FINISHES: gl.constexpr = PART < PARTS
    DIVIDED: gl.constexpr = SPLIT and FINISHES
    # A small tile can leave registers for the scales, so that they need not be waited for at the end.
    ROOM: gl.constexpr = REGISTERS > 200 or (y_desc is not None and x_zero is None)
    SMALL: gl.constexpr = ROWS * TOKENS <= 64 * 64 and ROOM
    EARLY: gl.constexpr = SMALL and FINISHES
    # Accumulators of the integer and of the 16-bit product lie alike in registers.
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 32])
    ACC16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 4)
    program, programs = gl.program_id(0), gl.num_programs(0)
    tiles_m, tiles_n = gl.cdiv(tokens, TOKENS), gl.cdiv(outputs, OUTPUTS)
    n = 0
    done = 0
    kept_tiles = 0
    if w is not None and PART == 1:
        # What of the first piece's weights does not fit into the ring.
        BYTES: gl.constexpr = w_ring.shape[2]
        tile, first, count = work(0, program, programs, full, rest, sharers, steps)
        _m_tile, n_tile = place(tile, tiles_m, tiles_n, group)
        begin, end = (first + STAGES) * BYTES, (first + count) * BYTES
        _to_cache(w, n_tile * OUTPUTS, outputs, begin, end, half, OUTPUTS)
    gdc_wait()
    for i in range(full + 2):
        tile, _first, count = work(i, program, programs, full, rest, sharers, steps)
        if count > 0:
            row = gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
            column = gl.arange(0, TOKENS, gl.SliceLayout(0, ACC))
            if EARLY:
                m_tile, n_tile = place(tile, tiles_m, tiles_n, group)
                output, token = n_tile * OUTPUTS + ROW + row, m_tile * TOKENS + column
                s_w, s_x = _scales(w_scale, x_scale, output, token, outputs, tokens)
            acc = gl.zeros([ROWS, TOKENS], gl.int32, ACC)
            mine = count
            if EVERY == 2:
                after = n + count
                # There is an even number of slots, so a group keeps to its own: the fill that it waits for
                # follows one that it has seen, as a barrier that tells even and odd phases apart demands.
                n += (n ^ PART) & 1
                mine = (after - n + 1) // 2
            # Two steps are in flight at once. No product is left pending over the end of an iteration: the
            # assembler would then run all of them one by one.
            for _ in range(mine // 2):
                acc = _begin(acc, n, ROW, ROWS, LEFT, w_ring, low_ring, high_ring, ready)
                acc = _begin(acc, n + EVERY, ROW, ROWS, LEFT, w_ring, low_ring, high_ring, ready)
                acc = warpgroup_mma_wait(2, [acc])
                mbarrier.arrive(free.index(n % STAGES))
                acc = warpgroup_mma_wait(0, [acc])
                mbarrier.arrive(free.index((n + EVERY) % STAGES))
                n += 2 * EVERY
            if mine % 2 != 0:
                acc = _begin(acc, n, ROW, ROWS, LEFT, w_ring, low_ring, high_ring, ready)
                acc = warpgroup_mma_wait(0, [acc])
                mbarrier.arrive(free.index(n % STAGES))
                n += 1

            if EVERY == 2:
                n = after
                acc = _sum_of_groups(acc, done, PART, sums, given, taken)
                done += 1
            complete = count == steps
            if DIVIDED and count < steps:
                at = tile - full * programs
                acc, complete = _sum_of_sharers(
                    acc, row, column, at, i - full, PART, PARTS, partials, arrivals, rest, steps, sharers,
                    REGISTERS
                )  # fmt: skip
            if complete and FINISHES:
                m_tile, n_tile = place(tile, tiles_m, tiles_n, group)
                n_first = n_tile * OUTPUTS + ROW
                m_first = m_tile * TOKENS
                output, token = n_first + row, m_first + column
                if not EARLY:
                    s_w, s_x = _scales(w_scale, x_scale, output, token, outputs, tokens)
                if x_zero is not None:
                    # What the codes count from, times the weights: below 2^31, as the sums are.
                    z_x, unknown = _offset(gl.load(x_zero + token * zero_step, token < tokens, 0.0), LOWERED)
                    acc -= gl.load(w_sum + output, output < outputs, 0)[:, None] * z_x[None, :]
                    s_x += unknown
                # The codes were 16 times too large: exact, as a scale divided by 16 might not be.
                values = acc.to(gl.float32) * 0.0625 * s_w[:, None] * s_x[None, :]
                if wk_desc is not None:
                    values = gl.convert_layout(values, ACC16, assert_trivial=True)
                    SIDE: gl.constexpr = ROWS if ROWS > TOKENS else TOKENS
                    KEPT: gl.constexpr = gl.NVMMASharedLayout(64, 16)
                    both = stage._reinterpret(wk_desc.dtype, [2, SIDE, KEEP_TILE], KEPT)
                    tma.store_wait(0)
                    gl.thread_barrier()
                    for channel in range(0, keep, KEEP_TILE):
                        mbarrier.expect(kept, (ROWS + TOKENS) * KEEP_TILE * 2)
                        wk = both.index(0).slice(0, ROWS, 0)
                        xk = both.index(1).slice(0, TOKENS, 0)
                        tma.async_copy_global_to_shared(wk_desc, [n_first, channel], kept, wk)
                        tma.async_copy_global_to_shared(xk_desc, [m_first, channel], kept, xk)
                        mbarrier.wait(kept, kept_tiles & 1)
                        kept_tiles += 1
                        values = warpgroup_mma(wk, xk.permute((1, 0)), values)
                        gl.thread_barrier()
                    values = gl.convert_layout(values, ACC, assert_trivial=True)
                if bias is not None:
                    values += gl.load(bias + output, output < outputs, 0.0).to(gl.float32)[:, None]
                if row_scale is not None:
                    values *= gl.load(row_scale + token, token < tokens, 0.0).to(gl.float32)[None, :]
                rounded = values.to(y.dtype.element_ty)
                if y_desc is not None:
                    tma.store_wait(0)
                    gl.thread_barrier()
                    tile_out = stage._reinterpret(y.dtype.element_ty, [TOKENS, ROWS], y_desc.layout)
                    tile_out.permute((1, 0)).store(rounded)
                    fence_async_shared()
                    gl.thread_barrier()
                    tma.async_copy_shared_to_global(y_desc, [m_first, n_first], tile_out)
                else:
                    start = y + (token.to(gl.int64) * outputs + n_first)
                    inside = (token < tokens)[None, :] & (output < outputs)[:, None]
                    gl.store(start[None, :] + row[:, None], rounded, inside)
    if y_desc is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=_NUMBERS)
def linear_many_kernel(  # type: ignore[no-untyped-def]
    w, w_desc, x_desc, y_desc, wk_desc, xk_desc, y, w_scale, w_sum, x_scale, x_zero, bias, row_scale,
    partials, arrivals, tokens, outputs, half, keep, zero_step, steps, full, rest, sharers, group,
    STAGES: gl.constexpr, SPLIT: gl.constexpr, REGISTERS: gl.constexpr, LOWERED: gl.constexpr
):  # fmt: skip
    OUTPUTS: gl.constexpr = w_desc.block_type.shape[0]
    BYTES: gl.constexpr = w_desc.block_type.shape[1]
    TOKENS: gl.constexpr = x_desc.block_type.shape[0]
    PARTS: gl.constexpr = 1 if OUTPUTS == 64 else 2
    # Eight rows of a group's accumulator, four threads by two numbers each, in different banks.
    SUMS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    OUT: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    gdc_launch_dependents()
    w_ring = gl.allocate_shared_memory(gl.int8, [STAGES, OUTPUTS, BYTES], w_desc.layout)
    low_ring = gl.allocate_shared_memory(gl.int8, [STAGES, TOKENS, BYTES], x_desc.layout)
    high_ring = gl.allocate_shared_memory(gl.int8, [STAGES, TOKENS, BYTES], x_desc.layout)
    stages = gl.allocate_shared_memory(gl.bfloat16, [PARTS, TOKENS, OUTPUTS // PARTS], OUT)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kept = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    given = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    if PARTS == 2:
        sums = stages.index(0)  # not used
    else:
        sums = gl.allocate_shared_memory(gl.int32, [OUTPUTS, TOKENS], SUMS)
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=PARTS)
    mbarrier.init(kept.index(0), count=1)
    mbarrier.init(kept.index(1), count=1)
    mbarrier.init(given, count=1)
    mbarrier.init(taken, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (0, w, w_ring, low_ring, high_ring, ready, free, sums, given, taken, stages.index(0),
                         kept.index(0), y_desc, wk_desc, xk_desc, y, w_scale, w_sum, x_scale, x_zero, bias,
                         row_scale, partials, arrivals, tokens, outputs, half, keep, zero_step, steps, full,
                         rest, sharers, group, SPLIT, REGISTERS, LOWERED)),
            (_multiply, (1, w, w_ring, low_ring, high_ring, ready, free, sums, given, taken,
                         stages.index(PARTS - 1), kept.index(1), y_desc, wk_desc, xk_desc, y, w_scale,
                         w_sum, x_scale, x_zero, bias, row_scale, partials, arrivals, tokens, outputs, half,
                         keep, zero_step, steps, full, rest, sharers, group, SPLIT, REGISTERS, LOWERED)),
            (_copy, (w_desc, x_desc, w_ring, low_ring, high_ring, ready, free, tokens, outputs, half, steps,
                     full, rest, sharers, group)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
