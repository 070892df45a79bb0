"""The linear layer for few rows of 8- or 4-bit inputs and 4-bit weights, where the weights are the traffic.

A program computes `outputs` rows of the weight against all rows of x (at most 64 of them), and its warps
share K among themselves: each warp reads its own pieces of 64 bytes of every row straight into registers, in
16-byte loads that are already the left operand of `mma.m16n8k32`, and multiplies them by the same pieces of
x: by input k where the low nibbles are, and by input k + K/2 where the high ones are. Nothing passes through
shared memory but the sums over warps at the end. The order of K within a piece is free, as long as both
operands have it, so four lanes hold 16 bytes each of a piece as they come. Unpacking is two instructions for
four codes of low nibbles and one for four of high ones, and a program has all its loads in flight at once.

Products and sums are integers, hence the same bits for every choice of tile.
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
from kernels.triton.codegen import high_nibbles, low_nibbles

MAX_ROWS = 64
"""Rows of x, above which `linear_many` is meant."""


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
    x_keep: Tensor | None = None,
    w_keep: Tensor | None = None,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
    choice: Choice | None = None,
    weights_at_rest: bool = False,
) -> Tensor:
    """`reference.linear` for at most 64 rows: [..., N] in `dtype`, bit for bit where no channels are kept.

    weights_at_rest: no work that is still queued on this stream writes w, w_keep or bias. The kernel may then
    fetch them while the kernel before it is still running.
    Raises ValueError for operands that `unsupported` names.
    """
    reason = unsupported(x, w, x_keep=x_keep, w_keep=w_keep, row_scale=row_scale, bias=bias, dtype=dtype)
    if reason is not None:
        raise ValueError(f"linear of few rows: {reason}")
    n, k = w.packed.shape[0], w.inputs
    codes = x.codes.reshape(-1, k).contiguous()
    m = codes.shape[0]
    y = torch.empty(m, n, dtype=dtype, device=codes.device)
    if m:
        choice = choice or tuning.lookup("linear_few", codes.device, m, n, k, Choice())
        keep = 0 if x_keep is None else x_keep.shape[-1]
        kept = None if x_keep is None else x_keep.reshape(m, keep).contiguous()
        tokens = _tokens(m)
        _kernel[(triton.cdiv(n, choice.outputs),)](
            codes,
            w.packed.view(torch.int8),
            x.scale.reshape(m).contiguous(),
            w.scale.reshape(n),
            y,
            kept,
            w_keep,
            bias,
            None if row_scale is None else row_scale.reshape(m).contiguous(),
            m,
            n,
            HALF=k // 2,
            OUTPUTS=choice.outputs,
            TOKENS=tokens,
            WARPS=choice.warps,
            AHEAD=_fitted(choice, k).ahead,
            X_AHEAD=_fitted(choice, k).x_ahead,
            KEEP=keep,
            num_warps=choice.warps,
            maxnreg=choice.registers,
            launch_pdl=weights_at_rest,
            enable_fp_fusion=False,
        )
    return y.view(*x.codes.shape[:-1], n)


def unsupported(
    x: Quantised,
    w: PackedWeight,
    *,
    x_keep: Tensor | None = None,
    w_keep: Tensor | None = None,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
) -> str | None:
    """Why these operands cannot run here, in a phrase; None where they can."""
    n, k = w.packed.shape[0], w.inputs
    if x.codes.shape[-1] != k:
        return f"an input of {x.codes.shape[-1]} channels for a weight of {k}"
    if w.bits != 4:
        return f"{w.bits}-bit weights"
    if w.axis != 1 or w.scale.shape[1] != 1:
        return "groups of weights with quantised inputs"
    if w.zero is not None or x.zero is not None:
        return "zero-points with quantised inputs"
    if x.scale.shape[-1] != 1:
        return "groups of inputs"
    if x.scale.dtype != torch.float32 or w.scale.dtype != torch.float32:
        return f"scales of {x.scale.dtype} and {w.scale.dtype}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"results of {dtype}"
    if k % 32:
        return f"K = {k} is no multiple of 32"
    if k > 65536 or n * k // 2 >= 2**31:
        return f"a weight of {n} x {k}"
    if x.codes.numel() // k > MAX_ROWS:
        return f"{x.codes.numel() // k} rows, more than {MAX_ROWS}"
    if (x_keep is None) != (w_keep is None):
        return "kept channels without their weights, or the reverse"
    if x_keep is not None and w_keep is not None:
        if x_keep.dtype != w_keep.dtype or x_keep.dtype not in (torch.bfloat16, torch.float16):
            return f"kept channels of {x_keep.dtype} and {w_keep.dtype}"
        if w_keep.shape != (n, x_keep.shape[-1]):
            return f"kept weights {tuple(w_keep.shape)} for {x_keep.shape[-1]} kept channels"
        if x_keep.shape[-1] % 2 or not w_keep.is_contiguous():
            return "an odd number of kept channels, or kept weights with gaps"
    return None


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
        if tile[1] * 64 <= inputs // 2 and tile[0] * rows <= 2048
    ]
    return list(dict.fromkeys(found))


def compilations() -> Iterator[Compilation]:
    for rows, inputs, keep, tile in (
        (1, 4096, 0, 16),
        (16, 4096, 0, 32),
        (16, 14336, 64, 16),
        (64, 576, 0, 32),
    ):
        choice = Choice(tile)
        yield Compilation(
            f"linear_few {rows} rows, K {inputs}, {keep} kept",
            _kernel,
            {
                **dict.fromkeys(("x_ptr", "w_ptr"), "*i8"),
                **dict.fromkeys(("x_scale_ptr", "w_scale_ptr"), "*fp32"),
                "y_ptr": "*bf16",
                **(dict.fromkeys(("x_keep_ptr", "w_keep_ptr"), "*bf16") if keep else {}),
                "rows": "i32",
                "outputs": "i32",
            },
            {
                **({} if keep else {"x_keep_ptr": None, "w_keep_ptr": None}),
                "bias_ptr": None,
                "row_scale_ptr": None,
                "HALF": inputs // 2,
                "OUTPUTS": tile,
                "TOKENS": _tokens(rows),
                "WARPS": choice.warps,
                "AHEAD": _fitted(choice, inputs).ahead,
                "X_AHEAD": _fitted(choice, inputs).x_ahead,
                "KEEP": keep,
            },
            {
                "num_warps": choice.warps,
                "maxnreg": choice.registers,
                "launch_pdl": True,
                "enable_fp_fusion": False,
            },
            expect=("IMMA.16832.S8.S8", "LDG.E.128"),
        )


def _tokens(rows: int) -> int:
    return max(8, triton.next_power_of_2(rows))


def _fitted(choice: Choice, inputs: int) -> Choice:
    """The choice, with no more pieces ahead than there are."""
    pieces = -(-inputs // 2 // (64 * choice.warps))
    return replace(choice, ahead=min(choice.ahead, pieces), x_ahead=min(choice.x_ahead, pieces))


@gluon.jit
def sum_over_warps(parts, tile: gl.constexpr):
    """The sums of [warp, row, token] over warps, laid out as `tile`, where a thread has all warps' parts.
    They go through shared memory once, and are added in the order of the warps."""
    swizzle: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    shared = gl.allocate_shared_memory(parts.dtype, parts.shape, swizzle, parts)
    return gl.sum(shared.load(tile.parent), axis=0)


@gluon.jit
def _piece(
    pointer,
    rows,
    first,
    stride: gl.constexpr,
    HALF: gl.constexpr,
    STEP: gl.constexpr,
    mask,
    cache: gl.constexpr,
):
    """Piece STEP of every row: the bytes at `first` behind those of the pieces before; zeros beyond HALF."""
    ROUND: gl.constexpr = first.type.shape[0] * 64
    offset = STEP * ROUND + first
    if (STEP + 1) * ROUND > HALF:
        inside = offset < HALF
        mask = inside if mask is None else mask & inside
    if mask is None:
        return gl.load(pointer + rows * stride + offset, cache_modifier=cache)
    else:
        return gl.load(pointer + rows * stride + offset, mask=mask, other=0, cache_modifier=cache)


@gluon.jit
def _both_halves(pointer, token, first, HALF: gl.constexpr, STEP: gl.constexpr, rows):
    """The inputs that meet the low and the high nibbles of piece STEP. They stay in the first cache, past
    which weights go: programs on one multiprocessor read the same inputs."""
    low = _piece(pointer, token, first, 2 * HALF, HALF, STEP, token < rows, "")
    return low, _piece(pointer + HALF, token, first, 2 * HALF, HALF, STEP, token < rows, "")


@gluon.jit
def _left(codes, layout: gl.constexpr):
    """Codes [warp, row, 64] as the left operand: byte 16 q + 4 j + b, held by lane q of four, is element
    16 j + 4 q + b."""
    WARPS: gl.constexpr = codes.type.shape[0]
    ROWS: gl.constexpr = codes.type.shape[1]
    a = gl.permute(codes.reshape([WARPS, ROWS, 4, 4, 4]), [0, 1, 3, 2, 4])
    return gl.convert_layout(a.reshape([WARPS, ROWS, 64]), layout, assert_trivial=True)


@gluon.jit
def _right(codes, layout: gl.constexpr):
    """x [warp, token, 64] as the right operand [warp, 64, token], in the order of `_left`."""
    WARPS: gl.constexpr = codes.type.shape[0]
    TOKENS: gl.constexpr = codes.type.shape[1]
    b = gl.permute(codes.reshape([WARPS, TOKENS, 4, 4, 4]), [0, 3, 2, 4, 1])
    return gl.convert_layout(b.reshape([WARPS, 64, TOKENS]), layout, assert_trivial=True)


@gluon.jit(do_not_specialize=("rows", "outputs"))
def _kernel(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    y_ptr,
    x_keep_ptr,
    w_keep_ptr,
    bias_ptr,
    row_scale_ptr,
    rows,
    outputs,
    HALF: gl.constexpr,
    OUTPUTS: gl.constexpr,
    TOKENS: gl.constexpr,
    WARPS: gl.constexpr,
    AHEAD: gl.constexpr,
    X_AHEAD: gl.constexpr,
    KEEP: gl.constexpr,
):
    product: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8]
    )
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product, k_width=4)
    right: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=product, k_width=4)
    # [warp, row, byte]: 16 bytes a thread, four lanes along the bytes, eight along the rows.
    pieces: gl.constexpr = gl.BlockedLayout([1, 1, 16], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])
    tile: gl.constexpr = gl.SliceLayout(
        0, gl.BlockedLayout([WARPS, 1, 1], [1, 16, 2], [1, 1, WARPS], [1, 2, 0])
    )
    STEPS: gl.constexpr = (HALF + WARPS * 64 - 1) // (WARPS * 64)

    gdc_launch_dependents()
    start = gl.program_id(0) * OUTPUTS
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, pieces)))[:, None, None]
    byte = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(1, pieces)))[None, None, :]
    row = gl.arange(0, OUTPUTS, layout=gl.SliceLayout(0, gl.SliceLayout(2, pieces)))[None, :, None]
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, gl.SliceLayout(2, pieces)))[None, :, None]
    first = warp * 64 + byte
    # Rows behind the last read the last again: their results are not stored.
    row = gl.minimum(start + row, outputs - 1)
    n = start + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, tile))
    m = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, tile))

    weights = ()
    for step in gl.static_range(AHEAD):
        weights = weights + (_piece(w_ptr, row, first, HALF, HALF, step, None, ".cg"),)
    w_scale = gl.load(w_scale_ptr + n, mask=n < outputs, other=0.0) * 0.0625
    # All above is at rest; what follows may come from the kernel before this one.
    gdc_wait()
    inputs = ()
    for step in gl.static_range(X_AHEAD):
        inputs = inputs + (_both_halves(x_ptr, token, first, HALF, step, rows),)
    x_scale = gl.load(x_scale_ptr + m, mask=m < rows, other=0.0)
    # Two sums, as a product waits for the one before it in its sum.
    low_sum = gl.zeros([WARPS, OUTPUTS, TOKENS], gl.int32, layout=product)
    high_sum = gl.zeros([WARPS, OUTPUTS, TOKENS], gl.int32, layout=product)
    for step in gl.static_range(STEPS):
        if step + X_AHEAD < STEPS:
            inputs = inputs + (_both_halves(x_ptr, token, first, HALF, step + X_AHEAD, rows),)
        if step + AHEAD < STEPS:
            weights = weights + (_piece(w_ptr, row, first, HALF, HALF, step + AHEAD, None, ".cg"),)
        low = _left(low_nibbles(weights[step]), left)
        low_sum = mma_v2(low, _right(inputs[step][0], right), low_sum)
        high = _left(high_nibbles(weights[step]), left)
        high_sum = mma_v2(high, _right(inputs[step][1], right), high_sum)

    sums = sum_over_warps(low_sum + high_sum, tile)
    x_scale += x_scale - x_scale  # an infinite scale becomes NaN
    y = sums.to(gl.float32) * w_scale[:, None] * x_scale[None, :]
    if KEEP:
        y += _kept(x_keep_ptr, w_keep_ptr, start, rows, outputs, OUTPUTS, TOKENS, WARPS, KEEP, product, tile)
    if bias_ptr is not None:
        y += gl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(gl.float32)[:, None]
    if row_scale_ptr is not None:
        y *= gl.load(row_scale_ptr + m, mask=m < rows, other=0.0).to(gl.float32)[None, :]
    place = y_ptr + m[None, :].to(gl.int64) * outputs + n[:, None]
    gl.store(place, y.to(y_ptr.dtype.element_ty), mask=(m < rows)[None, :] & (n < outputs)[:, None])


@gluon.jit
def _kept(
    x_ptr,
    w_ptr,
    start,
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
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, gl.SliceLayout(1, right)))[None, None, :]
    row = gl.minimum(start + row, outputs - 1)
    total = gl.zeros([WARPS, OUTPUTS, TOKENS], gl.float32, layout=product)
    for begin in gl.static_range(0, KEEP, 16 * WARPS):
        k_l = begin + warp_l * 16 + channel_l
        k_r = begin + warp_r * 16 + channel_r
        a = gl.load(w_ptr + row * KEEP + k_l, mask=k_l < KEEP, other=0.0)
        b = gl.load(x_ptr + token * KEEP + k_r, mask=(k_r < KEEP) & (token < rows), other=0.0)
        total = mma_v2(a, b, total)
    return sum_over_warps(total, tile)
