"""What the linears for few rows share: how warps read, add up and store.

The weights are the traffic, so a program computes some rows of the weight against all rows of x (up to 16 or
32 of them), and its warps share K among themselves: in each step a warp reads one *piece* of 64 or 128 packed
bytes of every row straight into registers, in 16-byte loads that already are the left operand of an `mma`,
and multiplies them by the same pieces of x: by input k where the low nibbles are, by input k + K/2 where the
high ones are. Nothing passes through shared memory but the sums over warps at the end. The order of K within
a piece is free, as long as both operands have it, so four lanes hold 16 bytes each of a piece as they come.

Everything is unrolled over steps. A program requests `ahead` pieces of its weights first of all; where its
launch says that weights are at rest, it does so while the kernel before it is still running.
"""

from typing import Unpack

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.reference import PackedWeight, Quantised
from kernels.triton import operands
from kernels.triton.operands import Beside

MAX_ROWS = 64
"""Rows of x that the kernels can hold; `kernels.ops` sends them fewer."""
MAX_INPUTS = 32768


def unsupported(x: Tensor | Quantised, w: PackedWeight, **beside: Unpack[Beside]) -> str | None:
    """`operands.unsupported`, and what these kernels cannot hold."""
    reason = operands.unsupported(x, w, **beside)
    if reason is not None:
        return reason
    rows = (x if isinstance(x, Tensor) else x.codes).numel() // w.inputs
    if rows > MAX_ROWS:
        return f"{rows} rows, more than {MAX_ROWS}"
    if w.inputs > MAX_INPUTS or w.packed.numel() >= 2**31:
        return f"a weight of {w.packed.shape[0]} x {w.inputs}"
    return None


def tokens(rows: int, most: int) -> int:
    """Rows of x that a program takes: all of them, up to as many as its registers hold."""
    return min(max(8, triton.next_power_of_2(rows)), most)


def pieces(inputs: int, piece: int, warps: int) -> int:
    """Steps in which that many warps get through a row."""
    return -(-inputs // 2 // (piece * warps))


def flat(x: Tensor | None) -> Tensor | None:
    """A vector without gaps."""
    return None if x is None else x.reshape(-1).contiguous()


@gluon.constexpr_function
def product_layout(warps):
    """Sums [warp, row, token], every warp with its own."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def piece_layout(warps):
    """Pieces [warp, row, byte or input]: 16 a thread, four lanes along the bytes, eight along the rows."""
    return gl.BlockedLayout([1, 1, 16], [1, 8, 4], [warps, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def tile_layout(warps):
    """Results [row, token], of which a thread can hold all warps' parts."""
    return gl.SliceLayout(0, gl.BlockedLayout([warps, 1, 1], [1, 16, 2], [1, 1, warps], [1, 2, 0]))


@gluon.jit
def fetch(
    pointer,
    first,
    mask,
    step: gl.constexpr,
    ROUND: gl.constexpr,
    HALF: gl.constexpr,
    cache: gl.constexpr,
):
    """What `pointer` points to where `mask` holds and `step * ROUND + first` lies before HALF, else zeros."""
    if (step + 1) * ROUND > HALF:
        inside = step * ROUND + first < HALF
        mask = inside if mask is None else mask & inside
    if mask is None:
        return gl.load(pointer, cache_modifier=cache)
    else:
        return gl.load(pointer, mask=mask, other=0, cache_modifier=cache)


@gluon.jit
def fetch_weights(row, first, step: gl.constexpr, ROUND: gl.constexpr, HALF: gl.constexpr):
    """A piece of each row. It goes past the first cache, where x stays for the multiprocessor's other
    programs, which read the same."""
    return fetch(row + step * ROUND, first, None, step, ROUND, HALF, ".cg")


@gluon.jit
def fetch_inputs(row, first, mask, step: gl.constexpr, ROUND: gl.constexpr, HALF: gl.constexpr):
    """The inputs that meet the low and the high nibbles of a piece."""
    low = fetch(row + step * ROUND, first, mask, step, ROUND, HALF, "")
    return low, fetch(row + HALF + step * ROUND, first, mask, step, ROUND, HALF, "")


@gluon.jit
def sum_over_warps(parts, tile: gl.constexpr):
    """The sums of [warp, row, token] over warps, laid out as `tile`. They go through shared memory once, and
    are added in the order of the warps."""
    swizzle: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    shared = gl.allocate_shared_memory(parts.dtype, parts.shape, swizzle, parts)
    return gl.sum(shared.load(tile.parent), axis=0)


@gluon.jit
def finish(y, n, m, y_ptr, bias_ptr, row_scale_ptr, rows, outputs):
    """Add the bias, scale the rows, round once and store y, float32 [n, m]."""
    if bias_ptr is not None:
        y += gl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(gl.float32)[:, None]
    if row_scale_ptr is not None:
        y *= gl.load(row_scale_ptr + m, mask=m < rows, other=0.0).to(gl.float32)[None, :]
    place = y_ptr + m[None, :].to(gl.int64) * outputs + n[:, None]
    gl.store(place, y.to(y_ptr.dtype.element_ty), mask=(m < rows)[None, :] & (n < outputs)[:, None])
