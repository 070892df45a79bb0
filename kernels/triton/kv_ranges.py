"""What rows of codes have besides codes, one for each position: scales or flags, and zero-points.

A lane holds those of neighbouring positions, which a position's place among the rows of scores is chosen for
(see `kv_decode`). Where there is room for whole fours of positions, four bytes are one word.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def run_layout(warps, positions):
    """[warp, position]: eight runs of neighbours, each held by four lanes."""
    return gl.SliceLayout(2, gl.BlockedLayout([1, positions // 8, 1], [1, 8, 4], [warps, 1, 1], [2, 1, 0]))


@gluon.constexpr_function
def four_layout(warps, positions):
    """[warp, four, position]: `run_layout` by fours."""
    fours = gl.BlockedLayout([1, positions // 32, 4, 1], [1, 8, 1, 4], [warps, 1, 1, 1], [3, 2, 1, 0])
    return gl.SliceLayout(3, fours)


@gluon.jit
def _rows(run, layout: gl.constexpr):
    """What each position has one of, [warp, position] in `run_layout`, for the rows of scores."""
    W: gl.constexpr = run.type.shape[0]
    N: gl.constexpr = run.type.shape[1]
    r = gl.permute(run.reshape([W, 8, N // 8]), [0, 2, 1]).reshape([W, N])
    return gl.expand_dims(gl.convert_layout(r, gl.SliceLayout(2, layout), assert_trivial=True), 2)


@gluon.jit
def scales_of_rows(found, fixed, STATIC: gl.constexpr, ALIGNED: gl.constexpr, layout: gl.constexpr):
    """Scales for the rows of scores; NaN where they are not finite, or where a static range's flag is set."""
    if STATIC:
        return gl.where(_rows(_widened(found, ALIGNED), layout) != 0, float("nan"), fixed)
    else:
        scale = _rows(found, layout)
        return scale * 0.0 + scale


@gluon.jit
def zeros_of_rows(found, fixed, FIXED: gl.constexpr, ALIGNED: gl.constexpr, layout: gl.constexpr):
    """Zero-points for the rows of scores: one for each position, unless one is `fixed` for all."""
    if FIXED:
        return fixed
    else:
        return _rows(_widened(found, ALIGNED), layout)


@gluon.jit
def _near(at, stop, ALIGNED: gl.constexpr):
    """Which positions are loaded. ALIGNED: there is room for whole fours, so that four are one access; what
    is beyond `stop` in them does not count."""
    if ALIGNED:
        return at // 4 * 4 < stop
    else:
        return at < stop


@gluon.jit
def row_words(rows, at, stop, CODES: gl.constexpr, ALIGNED: gl.constexpr):
    """Rows' words. Codes are numbers whatever they are, so that no one need replace those beyond `stop`."""
    if CODES:
        return gl.load(rows, mask=(at & -4 if ALIGNED else at) < stop)
    else:
        return gl.load(rows, mask=at < stop, other=0)


@gluon.jit
def _bytes(base, at, four_at, stop, ALIGNED: gl.constexpr):
    """Of each position one byte, `at` in `run_layout`; ALIGNED: of each four of them a word, at `four_at`."""
    if ALIGNED:
        return gl.load(base + four_at // 4, mask=four_at < stop)
    else:
        return gl.load(base + at, mask=at < stop)


@gluon.jit
def _widened(found, ALIGNED: gl.constexpr):
    """What `_bytes` found in float32, one for each position. Words stay words until here: their loads would
    be waited for where they are cut up."""
    if ALIGNED:
        W: gl.constexpr = found.type.shape[0]
        N: gl.constexpr = found.type.shape[1] * 4
        fours: gl.constexpr = four_layout(W, N)
        byte = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, fours)))[None, None, :]
        return ((gl.expand_dims(found, 2) >> (byte * 8)) & 255).to(gl.float32).reshape([W, N])
    else:
        return found.to(gl.float32)


@gluon.jit
def range_of_rows(
    scale, zero, at, four_at, stop, STATIC: gl.constexpr, FIXED: gl.constexpr, ALIGNED: gl.constexpr
):
    """What each position has of a range: a scale or a flag, and unless zero-points are FIXED one of those."""
    if STATIC:
        scales = _bytes(scale, at, four_at, stop, ALIGNED)
    else:
        scales = gl.load(scale + at, mask=_near(at, stop, ALIGNED))
    if FIXED:
        return scales, scales
    else:
        return scales, _bytes(zero, at, four_at, stop, ALIGNED)
