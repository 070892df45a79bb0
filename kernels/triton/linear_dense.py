"""The linear layer for few rows of 16-bit inputs and weights that are not quantised. See `few_rows`.

A program computes 16 to 64 outputs, and its warps share K, where outputs are few too: what 16 rows of a
weight have in flight is enough for a multiprocessor, and programs that all run at once share the memory's
bandwidth evenly, whether or not each multiprocessor has as many of them. So sums go through shared memory
alone, and always in one order.

Input 32 t + 8 q + 4 s + 2 h + d of a piece, held by lane q of four, is element 8 h + 2 q + d of the operands
of product 2 t + s (`mma.m16n8k16`): what a lane reads in 16 bytes is an operand as it comes.
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
from kernels.refusals import UnsupportedError
from kernels.triton.few_rows import (
    MAX_INPUTS,
    fetch,
    fetch_weights,
    finish,
    flat,
    product_layout,
    sum_over_warps,
    tile_layout,
    tokens,
)
from kernels.triton.launching import Launch, by_form
from kernels.triton.operands import HALVES, begun, unsupported_together

PIECE = gl.constexpr(64)
MOST_TOKENS = 16
LONG = 8192
"""Inputs up to which the first cache can hold 16 rows of x."""
ALIGNED = 8
"""Numbers of 16 bytes, which a lane reads at once."""


@dataclass(frozen=True)
class Choice:
    """outputs: weight rows of a program, 16, 32 or 64. warps: 4 to 16, which share K. ahead, x_ahead: pieces
    of 64 inputs of each row of the weight and of x that a warp requests before it uses the first. registers:
    of a thread, at most."""

    outputs: int = 16
    warps: int = 8
    ahead: int = 4
    x_ahead: int = 1
    registers: int = 128


def dense(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    choice: Choice | None = None,
    overlapped: bool = False,
) -> Tensor:
    """`reference.dense` for up to MOST_TOKENS rows of bfloat16 or float16: [..., N] in x's dtype.

    Accumulates in float32, always in the same order for one choice, and rounds once, behind the bias.
    overlapped: the kernel starts before the one in front has ended and fetches weights meanwhile; no work
    that is still queued on this stream may write them.
    Raises ValueError for operands that `unsupported` names.
    """
    rows = begun(x.contiguous())
    launch = _launch(rows, weight, bias, choice, overlapped)
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    if launch is not None:
        launch(rows, weight, y, flat(bias))
    return y


@by_form
def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, choice: Choice | None, overlapped: bool
) -> Launch | None:
    """For an x that begins at a multiple of 16 bytes, as its rows do. None where there are no rows."""
    reason = unsupported(x, weight, bias)
    if reason is not None:
        raise UnsupportedError("the linear for few rows of unquantised weights cannot run here:", reason)
    n, k = weight.shape
    m = x.numel() // k
    if m == 0:
        return None
    choice = choice or tuning.lookup("linear_dense", x.device, m, n, k, default(m, n, k))
    choice = _fitted(choice, k)
    constants, options = _constants(m, k, choice), _options(choice, overlapped)
    return Launch(dense_kernel, (triton.cdiv(n, choice.outputs),), (m, n), constants, options, x.device)


def unsupported(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why these operands of `reference.dense` cannot run here, in a phrase; None where they can. Shapes that
    fit nothing are refused like those that only the kernel does not take."""
    if x.dtype not in HALVES:
        return f"inputs in {x.dtype}"
    if weight.dtype != x.dtype:
        return f"a weight in {weight.dtype} for inputs in {x.dtype}"
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return f"inputs {tuple(x.shape)} for a weight {tuple(weight.shape)}"
    outputs, inputs = weight.shape
    if x.numel() > MOST_TOKENS * inputs:
        return f"more than {MOST_TOKENS} rows"
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (outputs,)):
        return f"a bias {tuple(bias.shape)} in {bias.dtype}"
    if (together := unsupported_together(x, weight, bias)) is not None:
        return together
    if not 0 < inputs <= MAX_INPUTS or not 0 < weight.numel() < 2**31:
        return f"a weight of {outputs} x {inputs}"
    if inputs % ALIGNED:
        return f"K = {inputs} is no multiple of {ALIGNED}"
    if not weight.is_contiguous() or weight.data_ptr() % 16:
        return "a weight that is not contiguous and aligned to 16 bytes"
    return None


def default(rows: int, outputs: int, inputs: int) -> Choice:
    """The choice where none has been measured: 16 warps a multiprocessor that request four pieces of 2 KiB
    each, 128 KiB. With more than 8 rows x takes registers, which leaves 12 warps; and with many inputs also
    more bytes than the first cache holds, so that a program should use them for more of the weight."""
    if rows <= 8:
        return Choice()
    return Choice(16, 4, 4, 2, 168) if inputs <= LONG else Choice(32, 8, 4, 1, 255)


def candidates(rows: int, outputs: int, inputs: int) -> list[Choice]:
    """What the tuner tries. With many inputs what is unrolled grows, and some choices would spill."""
    if rows <= 8:
        tiles = [
            *((16, 4, 4, 1, 128), (16, 4, 6, 2, 168), (16, 4, 8, 2, 255), (16, 8, 2, 1, 80)),
            *((16, 8, 3, 2, 128), (16, 8, 4, 1, 128), (16, 8, 4, 2, 128), (16, 8, 8, 2, 255)),
            *((16, 16, 2, 1, 64), (16, 16, 4, 1, 128), (32, 4, 3, 1, 168), (32, 8, 2, 1, 128)),
            (32, 8, 4, 1, 255),
        ]
        short = [(64, 4, 2, 1, 255)]
    else:
        tiles = [
            *((16, 4, 4, 2, 168), (16, 4, 6, 2, 255), (16, 8, 4, 2, 168), (16, 8, 6, 2, 255)),
            *((32, 4, 4, 1, 255), (32, 8, 1, 1, 128), (32, 8, 3, 1, 216), (32, 8, 4, 1, 255)),
            (64, 8, 2, 1, 255),
        ]
        short = [(16, 8, 2, 1, 128), (16, 8, 3, 1, 128), (16, 16, 2, 1, 128), (16, 16, 3, 1, 128)]
        short += [(32, 4, 2, 1, 168), (32, 8, 2, 1, 168), (64, 4, 2, 1, 255)]
    if inputs <= LONG:
        tiles += short
    found = [_fitted(default(rows, outputs, inputs), inputs)]
    found += [_fitted(Choice(*tile), inputs) for tile in tiles if tile[1] * PIECE.value <= inputs]
    return list(dict.fromkeys(found))


def compilations() -> Iterator[Compilation]:
    for rows, inputs in ((1, 4096), (16, 4096), (1, 14336), (16, 14336), (1, 576), (9, 3584)):
        choice = default(rows, 4096, inputs)
        yield compilation(f"{rows} rows, K {inputs}", rows, 4096, inputs, choice)


def compilation(name: str, rows: int, outputs: int, inputs: int, choice: Choice) -> Compilation:
    """The launch of a product of that size in bfloat16."""
    return Compilation(
        f"linear_dense {name}",
        dense_kernel,
        {**dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), "*bf16"), **dict.fromkeys(("rows", "outputs"), "i32")},
        {"bias_ptr": None, **_constants(rows, inputs, _fitted(choice, inputs))},
        _options(choice, True),
        expect=("HMMA.16816.F32.BF16", "LDG.E.128.STRONG.GPU"),  # past the first cache: weights
    )


def _constants(rows: int, inputs: int, choice: Choice) -> dict[str, int]:
    return {
        "INPUTS": inputs,
        "OUTPUTS": choice.outputs,
        "TOKENS": tokens(rows, MOST_TOKENS),
        "WARPS": choice.warps,
        "AHEAD": choice.ahead,
        "X_AHEAD": choice.x_ahead,
    }


def _options(choice: Choice, overlapped: bool) -> dict[str, int | bool]:
    return {"num_warps": choice.warps, "maxnreg": choice.registers, "launch_pdl": overlapped}


def _fitted(choice: Choice, inputs: int) -> Choice:
    """The choice, with no more pieces ahead than there are."""
    most = triton.cdiv(inputs, PIECE.value * choice.warps)
    return replace(choice, ahead=min(choice.ahead, most), x_ahead=min(choice.x_ahead, most))


@gluon.constexpr_function
def _piece_layout(warps):
    """Pieces [warp, row, input]: 8 a thread, four lanes along the inputs, eight along the rows."""
    return gl.BlockedLayout([1, 1, 8], [1, 8, 4], [warps, 1, 1], [2, 1, 0])


@gluon.jit
def _inputs(row, first, mask, step: gl.constexpr, ROUND: gl.constexpr, INPUTS: gl.constexpr):
    """A piece of each row of x, which stays in the first cache for the multiprocessor's other programs."""
    return fetch(row + step * ROUND, first, mask, step, ROUND, INPUTS, "")


@gluon.jit
def _left(values, layout: gl.constexpr):
    """A piece of weights [warp, row, 64] as the left operand, in the order of this file's head."""
    WARPS: gl.constexpr = values.type.shape[0]
    ROWS: gl.constexpr = values.type.shape[1]
    a = gl.permute(values.reshape([WARPS, ROWS, 2, 4, 2, 2, 2]), [0, 1, 2, 4, 5, 3, 6])
    return gl.convert_layout(a.reshape([WARPS, ROWS, 64]), layout, assert_trivial=True)


@gluon.jit
def _right(values, layout: gl.constexpr):
    """A piece of x [warp, token, 64] as the right operand [warp, 64, token], in the same order."""
    WARPS: gl.constexpr = values.type.shape[0]
    TOKENS: gl.constexpr = values.type.shape[1]
    b = gl.permute(values.reshape([WARPS, TOKENS, 2, 4, 2, 2, 2]), [0, 2, 4, 5, 3, 6, 1])
    return gl.convert_layout(b.reshape([WARPS, 64, TOKENS]), layout, assert_trivial=True)


@gluon.jit(do_not_specialize=("rows", "outputs"))
def dense_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    bias_ptr,
    rows,
    outputs,
    INPUTS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    TOKENS: gl.constexpr,
    WARPS: gl.constexpr,
    AHEAD: gl.constexpr,
    X_AHEAD: gl.constexpr,
):
    product: gl.constexpr = product_layout(WARPS)
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product, k_width=2)
    right: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=product, k_width=2)
    piece: gl.constexpr = _piece_layout(WARPS)
    tile: gl.constexpr = tile_layout(WARPS)
    ROUND: gl.constexpr = WARPS * PIECE
    STEPS: gl.constexpr = (INPUTS + ROUND - 1) // ROUND

    gdc_launch_dependents()
    start = gl.program_id(0) * OUTPUTS
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, piece)))[:, None, None]
    inner = gl.arange(0, PIECE, layout=gl.SliceLayout(0, gl.SliceLayout(1, piece)))[None, None, :]
    row = gl.arange(0, OUTPUTS, layout=gl.SliceLayout(0, gl.SliceLayout(2, piece)))[None, :, None]
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, gl.SliceLayout(2, piece)))[None, :, None]
    first = warp * PIECE + inner
    # Rows behind the last read the last again: their results are not stored.
    w_row = w_ptr + (gl.minimum(start + row, outputs - 1) * INPUTS + first)
    x_row = x_ptr + (token * INPUTS + first)
    n = start + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, tile))
    m = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, tile))

    weights = ()
    for step in gl.static_range(AHEAD):
        weights = weights + (fetch_weights(w_row, first, step, ROUND, INPUTS),)
    # All above is at rest; what follows may come from the kernel before this one.
    gdc_wait()
    inputs = ()
    for step in gl.static_range(X_AHEAD):
        inputs = inputs + (_inputs(x_row, first, token < rows, step, ROUND, INPUTS),)
    total = gl.zeros([WARPS, OUTPUTS, TOKENS], gl.float32, layout=product)
    for step in gl.static_range(STEPS):
        if step + X_AHEAD < STEPS:
            inputs = inputs + (_inputs(x_row, first, token < rows, step + X_AHEAD, ROUND, INPUTS),)
        if step + AHEAD < STEPS:
            weights = weights + (fetch_weights(w_row, first, step + AHEAD, ROUND, INPUTS),)
        total = mma_v2(_left(weights[step], left), _right(inputs[step], right), total)
    finish(sum_over_warps(total, tile), n, m, y_ptr, bias_ptr, None, rows, outputs)
