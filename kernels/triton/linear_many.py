"""The W4A4 and W4A8 linear for many rows, for Hopper: persistent, fed by TMA, specialised by warps.

It computes Yᵀ = W Xᵀ in tiles of `block_outputs` by `block_tokens`. The weight is on the left because wgmma
takes its left operand from registers, where the nibbles are unpacked; so packed bytes go from memory to
shared memory to registers once and are never written back. One warp copies: a slot of the ring in shared
memory holds a tile of packed bytes and the two tiles of x that meet its low and its high nibbles. Two groups
of four warps multiply, each its own half of the outputs; they pass the ring independently, so that one
multiplies while the other unpacks, or scales and stores its results. Of a tile of 64 outputs each takes every
other step instead, and their sums meet in shared memory.

Tiles are dealt to programs in rounds, one tile a program. The tiles of the last, incomplete round can be
split along K among all programs (stream-K): the integer partial sums go through global memory, the last
program to arrive adds them up. Integers have one sum in any order, so every choice gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels import tuning
from kernels.compiled import Compilation, launch
from kernels.reference import PackedWeight, Quantised
from kernels.refusals import UnsupportedError
from kernels.triton import operands
from kernels.triton.launching import Launch, Tiles, by_form
from kernels.triton.linear_many_choices import (
    PAIR_REGISTERS,
    Choice,
    Plan,
    candidates,
    deepest,
    default,
    plan,
)
from kernels.triton.linear_many_kernel import KEEP_TILE, linear_many_kernel
from kernels.triton.operands import Beside, begun, matrix, zero_points, zero_step
from kernels.triton.workspace import nowhere, processors, workspace

__all__ = ["Choice", "Plan", "candidates", "compilations", "default", "linear", "plan", "unsupported"]


def linear(
    x: Quantised,
    w: PackedWeight,
    *,
    choice: Choice | None = None,
    weights_at_rest: bool = False,
    **beside: Unpack[Beside],
) -> Tensor:
    """`reference.linear` for quantised x: [..., N] in `dtype` (bfloat16, float16 or float32).

    x: codes [..., K] with one scale a row, and perhaps one zero-point. w: symmetric 4-bit codes [N, K], one
    scale a row.
    x_keep [..., keep], w_keep [N, keep]: both bfloat16 or both float16, keep a multiple of 16. row_scale:
    [..., 1]. bias: [N]. choice: None takes the table's. weights_at_rest: no work that is still queued on this
    stream writes w, w_keep or bias; the kernel may then fetch weights while the one before it is running.
    Where x has zero-points, w needs the sums of its codes, and a row whose zero-point is no whole number from
    0 to 255 becomes NaN: int32 might not hold its products.
    Without kept channels the result is that of the reference bit for bit. Raises ValueError where
    `unsupported` says why.
    """
    made = _made(x, w, choice, weights_at_rest, **beside)
    device = x.codes.device
    y = torch.empty((*x.codes.shape[:-1], w.packed.shape[0]), dtype=beside["dtype"], device=device)
    if made is not None:
        launch, cut, shared = made
        # Tiles that no programs share leave nothing behind.
        partials, arrivals = (workspace if shared else nowhere)(device)
        launch(*cut.pointers(begun(_signed(x)), x, w, y, partials, arrivals, **beside))
    return y


@by_form
def _made(
    x: Quantised, w: PackedWeight, choice: Choice | None, at_rest: bool, **beside: Unpack[Beside]
) -> tuple[Launch, Cut, bool] | None:
    """The launch, what cuts its operands, and whether programs share tiles; None where there are no rows."""
    reason = unsupported(x, w, **beside) or _no_gpu(x.codes)
    if reason is not None:
        raise UnsupportedError("the linear for many rows cannot run here:", reason)
    outputs, inputs, device = w.packed.shape[0], w.inputs, x.codes.device
    codes = matrix(_signed(x))
    rows, available = codes.shape[0], processors(device)
    if rows == 0:
        return None
    if choice is None:
        first = default(rows, outputs, inputs, available)
        choice = tuning.lookup("linear_many", device, rows, outputs, inputs, first)
    if not choice.fits():
        raise ValueError(f"no kernel can be built with {choice}")
    dealt = plan(rows, outputs, inputs, choice, available)
    cut = Cut(codes, w, choice, at_rest, **beside)
    launch = Launch(
        linear_many_kernel,
        (dealt.programs,),
        _numbers(rows, w, beside.get("w_keep"), zero_step(x), dealt, choice),
        _constants(dealt, choice, _lowered(x)),
        _options(choice, at_rest),
        device,
    )
    return launch, cut, dealt.sharers != dealt.rest


def unsupported(x: Tensor | Quantised, w: PackedWeight, **beside: Unpack[Beside]) -> str | None:
    """Why this kernel cannot compute `linear` of these operands, in a phrase; None where it can.

    Shapes that fit nothing are refused like those that only this kernel does not take. The device is not
    looked at.
    """
    if isinstance(x, Tensor):
        return "floating-point inputs"
    return operands.unsupported(x, w, **beside)


def compilations() -> Iterator[Compilation]:
    """The kernel for its kinds of operands and for its sizes of tiles."""
    prefill, narrow = Choice(), Choice(64, 64, 64, 6, pair=True, prefetch=True)
    yield _compilation("bf16 256x128", prefill)
    yield _compilation("bf16 128x128 split", deepest(128, 128, True, 8), rows=1000)
    yield _compilation("bf16 128x64 split", deepest(128, 64, True, 8), rows=64)
    yield _compilation("bf16 128x64 split pair", Choice(128, 64, 64, 6, True, pair=True), rows=64)
    yield _compilation("bf16 256x64 split", deepest(256, 64, True, 8), rows=64)
    yield _compilation("bf16 64x64", replace(deepest(64, 64, False, 8), prefetch=True), rows=64)
    yield _compilation("bf16 64x64 pair", narrow, rows=64)
    yield _compilation("bf16 64x64x128", Choice(64, 64, 128, 6), rows=64)
    yield _compilation("bf16 64x128 split", deepest(64, 128, True, 8), rows=128)
    yield _compilation("fp16 kept channels, bias, row scale", prefill, torch.float16, keep=64, extras=True)
    kept = "fp16 64x64 pair, kept channels, bias, row scale"
    yield _compilation(kept, narrow, torch.float16, rows=64, keep=64, extras=True)
    large, small = deepest(128, 128, True, 8), deepest(64, 64, True, 8)
    yield _compilation("fp32 128x128 split, bias, row scale", large, torch.float32, rows=1000, extras=True)
    yield _compilation("fp32 64x64 split, bias, row scale", small, torch.float32, rows=33, extras=True)
    yield _compilation("bf16 256x128, zero-points of 4 bits", prefill, zero_bits=4)
    yield _compilation("bf16 256x128, zero-points of 8 bits, row scale", prefill, extras=True, zero_bits=8)
    split = "fp16 128x128 split, kept channels, zero-points of 8 bits"
    yield _compilation(split, large, torch.float16, rows=1000, keep=64, zero_bits=8)
    yield _compilation("fp32 64x64 split, zero-points", small, torch.float32, rows=33, zero_bits=4)
    yield _compilation("bf16 64x64 pair, zero-points", narrow, rows=64, extras=True, zero_bits=4)


def _compilation(
    name: str,
    choice: Choice,
    dtype: torch.dtype = torch.bfloat16,
    *,
    rows: int = 4096,
    keep: int = 0,
    extras: bool = False,
    zero_bits: int | None = None,
) -> Compilation:
    """The launch of a product of 4096 inputs and 6144 outputs. zero_bits: of inputs with zero-points."""
    inputs, outputs = 4096, 6144

    def of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    packed, sums = of(outputs, inputs // 2, dtype=torch.uint8), of(outputs, 1, dtype=torch.int32)
    w = PackedWeight(packed, of(outputs, 1), None, 4, inputs, True, colsum=sums)
    dealt = plan(rows, outputs, inputs, choice, 132)
    beside: Beside = {
        "x_keep": of(rows, keep, dtype=dtype) if keep else None,
        "w_keep": of(outputs, keep, dtype=dtype) if keep else None,
        "row_scale": of(rows, 1) if extras else None,
        "bias": of(outputs, dtype=dtype) if extras else None,
        "dtype": dtype,
    }
    codes, y = of(rows, inputs, dtype=torch.int8), of(rows, outputs, dtype=dtype)
    x = Quantised(codes, of(rows, 1), of(1, 1).expand(rows, 1) if zero_bits else None, None, zero_bits or 8)
    partials, arrivals = of(2**20, dtype=torch.int32), of(512, dtype=torch.int32)
    cut = Cut(codes, w, choice, True, **beside)
    return launch(
        name,
        linear_many_kernel,
        *cut.pointers(codes, x, w, y, partials, arrivals, **beside),
        *_numbers(rows, w, beside["w_keep"], zero_step(x), dealt, choice),
        **_constants(dealt, choice, _lowered(x)),
        **_options(choice, True),
        expect=(f"IGMMA.64x{choice.block_tokens}x32.S8.S8", "LDSM", "UTMALDG"),
    )


class Cut:
    """How operands of one form are cut into tiles, for the kernel's copies."""

    def __init__(
        self, codes: Tensor, w: PackedWeight, choice: Choice, at_rest: bool, **beside: Unpack[Beside]
    ) -> None:
        rows, outputs, dtype = codes.shape[0], w.packed.shape[0], beside["dtype"]
        part = max(choice.block_outputs // 2, 64)
        bytes_ = gl.NVMMASharedLayout(choice.block_bytes, 8)
        self.prefetch = choice.prefetch and at_rest
        self.w = Tiles(w.packed.view(torch.int8), [choice.block_outputs, choice.block_bytes], bytes_)
        self.x = Tiles(codes, [choice.block_tokens, choice.block_bytes], bytes_)
        self.y: Tiles | None = None
        self.kept: tuple[Tiles, Tiles] | None = None
        if dtype.itemsize == 2 and outputs % 8 == 0:
            y = torch.empty((rows, outputs), dtype=dtype, device=codes.device)
            self.y = Tiles(y, [choice.block_tokens, part], gl.NVMMASharedLayout(128, 16))
        x_keep, w_keep = beside.get("x_keep"), beside.get("w_keep")
        if x_keep is not None and w_keep is not None:
            kept = gl.NVMMASharedLayout(64, 16)
            self.kept = (
                Tiles(matrix(w_keep), [part, KEEP_TILE.value], kept),
                Tiles(matrix(x_keep), [choice.block_tokens, KEEP_TILE.value], kept),
            )

    def pointers(
        self,
        codes: Tensor,
        x: Quantised,
        w: PackedWeight,
        y: Tensor,
        partials: Tensor,
        arrivals: Tensor,
        **beside: Unpack[Beside],
    ) -> tuple[Tensor | TensorDescriptor | None, ...]:
        """The kernel's arguments in front of its numbers. codes: those of x, signed, as `operands.matrix`
        gives them, or memory that begins there."""
        packed, wk_desc, xk_desc = w.packed.view(torch.int8), None, None
        x_keep, w_keep = beside.get("x_keep"), beside.get("w_keep")
        if self.kept is not None and x_keep is not None and w_keep is not None:
            wk_desc, xk_desc = self.kept[0].of(matrix(w_keep)), self.kept[1].of(matrix(x_keep))
        bias, row_scale = beside.get("bias"), beside.get("row_scale")
        return (
            packed if self.prefetch else None,
            self.w.of(packed),
            self.x.of(codes),
            None if self.y is None else self.y.of(y),
            wk_desc,
            xk_desc,
            y,
            w.scale.contiguous(),
            None if x.zero is None or w.colsum is None else w.colsum.contiguous(),
            x.scale.contiguous(),
            zero_points(x),
            None if bias is None else bias.contiguous(),
            None if row_scale is None else row_scale.contiguous(),
            partials,
            arrivals,
        )


def _numbers(
    rows: int, w: PackedWeight, w_keep: Tensor | None, step: int, dealt: Plan, choice: Choice
) -> tuple[int, ...]:
    outputs, half = w.packed.shape
    keep = 0 if w_keep is None else w_keep.shape[-1]
    return rows, outputs, half, keep, step, dealt.steps, dealt.full, dealt.rest, dealt.sharers, choice.group


def _constants(dealt: Plan, choice: Choice, lowered: bool) -> dict[str, Any]:
    split, registers = dealt.sharers > dealt.rest, PAIR_REGISTERS[0] if choice.pair else 240
    return {"STAGES": choice.stages, "SPLIT": split, "REGISTERS": registers, "LOWERED": lowered}


def _lowered(x: Quantised) -> bool:
    """Whether codes are moved down for a product of int8. Narrower unsigned ones are int8 as they are."""
    return x.zero is not None and x.bits == 8


def _signed(x: Quantised) -> Tensor:
    """The codes as int8; those of 8 bits with zero-points moved down by 128, in a pass over their bytes: what
    the tensor cores read comes from memory by copies that change nothing."""
    return (x.codes ^ 128 if _lowered(x) else x.codes).view(torch.int8)


def _options(choice: Choice, at_rest: bool) -> dict[str, Any]:
    registers = PAIR_REGISTERS[1] if choice.pair else None
    return {"num_warps": 4, "maxnreg": registers, "launch_pdl": at_rest, "enable_fp_fusion": False}


def _no_gpu(x: Tensor) -> str | None:
    if not x.is_cuda:
        return f"tensors on {x.device}"
    major, minor = torch.cuda.get_device_capability(x.device)
    return None if (major, minor) == (9, 0) else f"a GPU of compute capability {major}.{minor}, not 9.0"
