"""The linear layer for few rows of 16-bit inputs and 4-bit weights, with or without groups. See `few_rows`.

Rows are taken 16 at a time, a launch each. There are two kernels: one reads x beside the weights, piece by
piece, for each block of outputs (`linear_a16_streamed`); the other holds x in registers and goes through many
blocks (`linear_a16_held`). In both, codes are multiplied as they are; the scale of a group meets the float32
sum of its products, which is one multiplication for a whole piece of the row. A zero-point z meets the sum of
the inputs, as Σ (q - z) x = Σ q x - z Σ x; the second sum is one in float32, so z need not be a number that
16 bits hold.

The reference rounds each dequantised weight to x's dtype, these kernels do not: they are the more exact ones.
Where weights have zero-points, an infinity in a row of x makes that row NaN, where the reference may have
±Inf.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Unpack

import torch
import triton
from torch import Tensor

from kernels import tuning
from kernels.compiled import Compilation
from kernels.reference import PackedWeight, Quantised
from kernels.refusals import UnsupportedError
from kernels.triton import few_rows
from kernels.triton.few_rows import flat, pieces, tokens
from kernels.triton.launching import Launch, by_form
from kernels.triton.linear_a16_held import held_kernel
from kernels.triton.linear_a16_streamed import streamed_kernel
from kernels.triton.operands import Beside, matrix
from kernels.triton.workspace import nowhere, processors, words, workspace

MOST_TOKENS = 16
REGISTERS = 65536
"""Of a multiprocessor."""
PROCESSORS = 132
"""Of the GPUs that the kernels are tuned for."""


@dataclass(frozen=True)
class Choice:
    """outputs, warps, ahead, x_ahead, registers: as in `linear_few`. piece: bytes of a piece, 64 or 128; in
    any case within a group of weights.

    held: where it is not 0, pieces whose x a warp holds in registers; `ahead` then counts blocks of 16
    outputs, and `outputs` and `x_ahead` mean nothing."""

    outputs: int = 16
    warps: int = 8
    ahead: int = 2
    x_ahead: int = 1
    registers: int = 255
    piece: int = 128
    held: int = 0

    def fits(self) -> bool:
        """Whether a kernel can be built with it. With less than 128 registers, or fewer warps, more programs
        that hold x would run at once than there are counters for."""
        return (
            self.outputs in (16, 32, 64)
            and self.warps in (4, 8, 16)
            and self.ahead >= 1
            and self.x_ahead >= 1
            and 128 <= self.registers <= 255
            and self.piece in (64, 128)
            and self.held >= 0
        )


def linear(
    x: Tensor,
    w: PackedWeight,
    *,
    choice: Choice | None = None,
    weights_at_rest: bool = False,
    **beside: Unpack[Beside],
) -> Tensor:
    """`reference.linear` for few rows of bfloat16 or float16: [..., N] in `dtype`.

    Accumulates in float32, always in the same order for one choice. weights_at_rest: as in `linear_few`.
    Raises ValueError for operands that `unsupported` names.
    """
    _check(x, w, **beside)
    n, values = w.packed.shape[0], matrix(x).contiguous()
    m = values.shape[0]
    y = torch.empty((*x.shape[:-1], n), dtype=beside["dtype"], device=values.device)
    bias, scales = flat(beside.get("bias")), flat(beside.get("row_scale"))
    packed = w.packed.view(torch.int8), w.packed.view(torch.int32)
    for begin in range(0, m, MOST_TOKENS):
        rows = slice(begin, begin + MOST_TOKENS)
        part, results, scale = values[rows], y.view(m, n)[rows], None if scales is None else scales[rows]
        launch, slices = _launch(part, w, results, bias, scale, choice, weights_at_rest)
        shared: tuple[Tensor, ...] = ()
        if slices:
            partials, arrivals = (workspace if slices > 1 else nowhere)(x.device)
            shared = partials.view(torch.float32), arrivals
        launch(part, packed[slices > 0], w.scale, w.zero, results, bias, scale, *shared)
    return y


@by_form
def _check(x: Tensor, w: PackedWeight, **beside: Unpack[Beside]) -> None:
    reason = unsupported(x, w, **beside)
    if reason is not None:
        raise UnsupportedError("the linear for few 16-bit rows cannot run here:", reason)


@by_form
def _launch(
    x: Tensor,
    w: PackedWeight,
    y: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    choice: Choice | None,
    at_rest: bool,
) -> tuple[Launch, int]:
    """For up to MOST_TOKENS rows, x [m, K] and y [m, N] without gaps; and how many programs share a row of
    the weight, 0 for the kernel that holds no x."""
    (m, k), n = x.shape, y.shape[1]
    choice = choice or tuning.lookup("linear_a16", x.device, m, n, k, Choice())
    if not choice.fits():
        raise ValueError(f"the linear for few 16-bit rows cannot be built with {choice}")
    choice = _fitted(choice, m, n, k, w.group, processors(x.device))
    constants = _constants(m, n, k, w.group, w.scale.stride(1), 0 if w.signed else 8, choice)
    options = _options(choice, at_rest)
    if choice.held:
        slices, teams = _dealt(choice, n, k, processors(x.device))
        return Launch(held_kernel, (slices * teams,), (m, n), constants, options, x.device), slices
    grid = (triton.cdiv(m, tokens(m, MOST_TOKENS)), triton.cdiv(n, choice.outputs))
    return Launch(streamed_kernel, grid, (m, n), constants, options, x.device), 0


def unsupported(x: Tensor | Quantised, w: PackedWeight, **beside: Unpack[Beside]) -> str | None:
    """Why these operands cannot run here, in a phrase; None where they can."""
    if isinstance(x, Quantised):
        return "quantised inputs"
    reason = few_rows.unsupported(x, w, **beside)
    if reason is not None:
        return reason
    if beside.get("x_keep") is not None:
        return "kept channels beside 16-bit inputs"
    if not takes_groups(w):
        return f"groups of {w.group}: multiples of 64 that divide K / 2 = {w.inputs // 2} are needed"
    return None


def takes_groups(w: PackedWeight) -> bool:
    """Whether pieces of a row lie within groups of the weight."""
    return w.scale.shape[1] == 1 or not (w.group % 64 or w.inputs // 2 % w.group)


def candidates(rows: int, outputs: int, inputs: int) -> list[Choice]:
    """What the tuner tries, for groups of 128."""
    if rows <= 8:
        tiles = [
            (16, 4, 2, 1, 255, 128),
            (16, 4, 2, 1, 128, 128),
            (16, 4, 4, 1, 255, 128),
            (16, 8, 2, 1, 255, 128),
        ]
        tiles += [
            (16, 8, 2, 1, 128, 128),
            (32, 4, 2, 1, 255, 128),
            (32, 8, 2, 1, 128, 128),
            (32, 8, 2, 2, 128, 64),
        ]
    else:
        tiles = [
            (16, 4, 2, 1, 255, 128),
            (16, 8, 1, 1, 128, 128),
            (16, 8, 2, 1, 128, 64),
            (32, 4, 2, 1, 255, 128),
        ]
        tiles += [
            (32, 8, 1, 1, 128, 64),
            (32, 8, 2, 1, 128, 64),
            (32, 8, 2, 1, 255, 64),
            (32, 4, 2, 1, 255, 64),
        ]
        tiles += [
            (64, 8, 1, 1, 255, 64),
            (64, 8, 2, 1, 255, 64),
            (64, 4, 1, 1, 255, 64),
            (16, 8, 1, 1, 255, 64),
        ]
    # Warps, blocks ahead, registers, bytes of a piece, pieces held.
    if rows <= 8:
        held = [(16, 2, 128, 128, 1), (16, 1, 128, 128, 1), (8, 2, 128, 128, 1), (8, 2, 255, 128, 2)]
        held += [(16, 3, 128, 128, 1), (16, 3, 128, 64, 1), (8, 3, 255, 128, 2), (4, 2, 255, 128, 2)]
    else:
        held = [(16, 1, 128, 128, 1), (16, 2, 128, 128, 1), (8, 1, 128, 128, 1), (8, 2, 128, 128, 1)]
        held += [(8, 1, 255, 128, 2), (8, 2, 255, 128, 2), (4, 2, 128, 128, 1), (16, 3, 128, 64, 1)]
    fitting = [
        Choice(*tile)
        for tile in tiles
        if tile[1] * tile[5] <= inputs // 2 and tile[0] * tokens(rows, MOST_TOKENS) <= 1024
    ]
    if rows <= MOST_TOKENS:
        fitting += [
            Choice(warps=warps, ahead=ahead, registers=registers, piece=piece, held=pieces_held)
            for warps, ahead, registers, piece, pieces_held in held
            if warps * piece <= inputs // 2
        ]
    return list(dict.fromkeys(_fitted(choice, rows, outputs, inputs, 128) for choice in fitting))


def compilations() -> Iterator[Compilation]:
    held, half = Choice(warps=16, registers=128, ahead=1, held=1), Choice(ahead=2, held=2)
    small = replace(held, ahead=3, piece=64)
    for rows, inputs, group, zero, choice in (
        (1, 4096, 128, False, Choice()),
        (16, 4096, 128, False, Choice()),
        (16, 4096, 128, True, Choice()),
        (16, 576, 576, True, Choice()),
        (16, 14336, 128, False, Choice()),
        (9, 4096, 4096, False, Choice()),
        (1, 4096, 128, False, replace(held, ahead=2)),
        (16, 4096, 128, False, held),
        (16, 4096, 128, False, half),
        (16, 4096, 128, True, replace(half, ahead=1)),
        (16, 4096, 4096, True, small),
        (16, 576, 576, True, replace(half, ahead=1)),
        (16, 14336, 128, False, small),
    ):
        name = f"{rows} rows, K {inputs}, groups of {group}{', zero-points' if zero else ''}"
        if choice.held:
            name += f", {choice.held} held by each of {choice.warps} warps"
        yield compilation(name, rows, 4096, inputs, choice, group=group, zero=zero)


def compilation(
    name: str,
    rows: int,
    outputs: int,
    inputs: int,
    choice: Choice,
    *,
    group: int | None = None,
    zero: bool = False,
) -> Compilation:
    """The launch of a product of that size, inputs and results in bfloat16."""
    group = group or inputs
    choice = _fitted(choice, rows, outputs, inputs, group)
    none = ("bias_ptr", "row_scale_ptr", *(() if zero else ("zero_ptr",)))
    shared = {"partials": "*fp32", "arrivals": "*i32"} if choice.held else {}
    return Compilation(
        f"linear_a16 {name}",
        held_kernel if choice.held else streamed_kernel,
        {
            "w_ptr": "*i32" if choice.held else "*i8",
            **dict.fromkeys(("x_ptr", "y_ptr"), "*bf16"),
            **dict.fromkeys(("scale_ptr", *(("zero_ptr",) if zero else ())), "*fp32"),
            **shared,
            **dict.fromkeys(("rows", "outputs"), "i32"),
        },
        {
            **dict.fromkeys(none),
            **_constants(rows, outputs, inputs, group, outputs, 8 if zero else 0, choice),
        },
        _options(choice, True),
        expect=("HMMA.16816.F32.BF16", "LDG.E.128.STRONG.GPU"),  # past the first cache: weights
    )


def _constants(
    rows: int, outputs: int, inputs: int, group: int, stride: int, offset: int, choice: Choice
) -> dict[str, int]:
    own: dict[str, int] = {"OUTPUTS": choice.outputs, "X_AHEAD": choice.x_ahead}
    if choice.held:
        own = {"STEPS": choice.held, "SLICES": _slices(choice, inputs), "EVEN": outputs % 16 == 0}
    return {
        "HALF": inputs // 2,
        "STRIDE": stride,
        "GROUP": group,
        "ZERO_OFFSET": offset,
        "TOKENS": tokens(rows, MOST_TOKENS),
        "WARPS": choice.warps,
        "AHEAD": choice.ahead,
        "PIECE": choice.piece,
        **own,
    }


def _options(choice: Choice, at_rest: bool) -> dict[str, int | bool]:
    return {"num_warps": choice.warps, "maxnreg": choice.registers, "launch_pdl": at_rest}


def _fitted(
    choice: Choice, rows: int, outputs: int, inputs: int, group: int, available: int = PROCESSORS
) -> Choice:
    """The choice, with pieces that lie within groups, no more of them held or ahead than there are, and none
    held for many rows or where partial sums take more than the working memory. available:
    multiprocessors."""
    piece = choice.piece if group == inputs or group % choice.piece == 0 else 64
    most = pieces(inputs, piece, choice.warps)
    held = replace(choice, piece=piece, held=min(choice.held, most), outputs=16, x_ahead=1)
    slices = _slices(held, inputs) if held.held else 0
    sums = slices * triton.cdiv(outputs, 16) * 16 * tokens(rows, MOST_TOKENS)
    if slices and rows <= MOST_TOKENS and (slices == 1 or sums <= words(available)):
        return held
    few = min(choice.ahead, most), min(choice.x_ahead, most)
    return replace(choice, piece=piece, ahead=few[0], x_ahead=few[1], held=0)


def _slices(choice: Choice, inputs: int) -> int:
    """Programs that share a row of the weight."""
    return pieces(inputs, choice.piece * choice.held, choice.warps)


def _dealt(choice: Choice, outputs: int, inputs: int, available: int) -> tuple[int, int]:
    """(slices, teams of as many programs): what that many multiprocessors hold at once, by registers."""
    programs = available * max(REGISTERS // (choice.registers * choice.warps * 32), 1)
    slices = _slices(choice, inputs)
    return slices, max(min(programs // slices, triton.cdiv(outputs, 16)), 1)
