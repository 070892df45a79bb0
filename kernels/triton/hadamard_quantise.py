"""The online Hadamard transform, behind the gate of an MLP and in front of a quantiser, in one pass: one read
of x and of its gate, one write of the codes.

H of the order `size` is had_A ⊗ H_J ⊗ H_B: a row is J tiles [A, B], and the transform is three steps.

    slow    had_Aᵀ X_j on tensor cores. Entries are ± a power of two, so for 16-bit x all products are exact.
    middle  Butterflies between the tiles, in float32.
    fast    X_j H_B on tensor cores. X_j is float32 now and stays in registers as the left operand, in two
            bfloat16 terms that hold 17 bits of it: far less is lost than the final rounding takes.

So no intermediate result passes through shared memory, and an element costs A + 2 B multiplications of the
tensor cores and some twenty instructions. float32 x is taken in three terms, all 24 bits, in both products.
Orders up to 128 need the fast product alone (exact for 16-bit x), and where the transform mixes channels that
lie `inner` apart, there is none.

A program runs over several rows. The matrices stay in shared memory; the next row is fetched meanwhile.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Unpack, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import tuning
from kernels.compiled import Compilation
from kernels.reference import Quantised, Quantiser
from kernels.triton.hadamard_plan import matrices, plan, shape_constants, unsupported_transform
from kernels.triton.hadamard_tiles import apart, butterfly, halves, ordered, prefetched, terms
from kernels.triton.launching import Launch, by_form
from kernels.triton.quantise import (
    DTYPES,
    Results,
    check,
    compilation,
    constants,
    rows_of,
    unsupported_beside,
    unsupported_input,
    unsupported_quantiser,
)  # fmt: skip
from kernels.triton.rounding import (
    codes,
    gated,
    larger,
    largest,
    largest_magnitude,
    narrow,
    rounding,
    scale_and_zero,
    smaller,
    smallest,
    widen,
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """programs: on a multiprocessor. stages: rows in shared memory, those being fetched included; with 1, the
    next row waits in registers, or in the L2 cache. Where one is 0, the size of a row decides (see `Plan`).
    height: rows of a tile at most."""

    programs: int = 0
    stages: int = 0
    height: int = 128


@triton.jit
def _hadamard(  # type: ignore[no-untyped-def]
    x, gate, slow, fast, out, scales, zeros, given_scale, given_zero, kept,
    rows, n, keep, stride, gate_stride, scale_step, zero_step, clip, norm,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, STATIC: tl.constexpr, CLAMP: tl.constexpr,
    GATE: tl.constexpr, QUANTISE: tl.constexpr, KEEP: tl.constexpr, NORM: tl.constexpr,
    BLOCKS: tl.constexpr, A: tl.constexpr, J: tl.constexpr, B: tl.constexpr,
    A_PAD: tl.constexpr, B_PAD: tl.constexpr, SLOW: tl.constexpr, FAST: tl.constexpr,
    STAGES: tl.constexpr, LINES: tl.constexpr, AHEAD: tl.constexpr, JOINED: tl.constexpr,
    ORDERED: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Tile t = block * J + j holds the channels (t / J) A J B + a J B + (t % J) B + b."""
    WIDE: tl.constexpr = x.dtype.element_ty == tl.float32
    PADDED: tl.constexpr = A != A_PAD or B != B_PAD
    a, b = tl.arange(0, A_PAD)[:, None], tl.arange(0, B_PAD)[None, :]
    inside = (a < A) & (b < B)
    place = a * (J * B) + b
    side = tl.arange(0, JOINED * B_PAD)[None, :]
    inside_joined = (a < A) & (side < JOINED * B)
    place_joined = a * (J * B) + side
    one = tl.zeros((1, 1), tl.int32)
    if SLOW:
        left = tl.load(slow + a * A_PAD + tl.arange(0, A_PAD)[None, :])
    if FAST:
        right = tl.load(fast + tl.arange(0, B_PAD)[:, None] * B_PAD + b)
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()
    if AHEAD:
        # Two numbers in one: the loop would carry each of them in a register of its own. In three dimensions:
        # else the compiler would let a thread take as many neighbours of these as of the codes.
        pair = tl.arange(0, JOINED)[None, :, None] * (B // 2) + tl.arange(0, B_PAD // 2)[None, None, :]
        place_pairs = tl.arange(0, A_PAD)[:, None, None] * (J * B // 2) + pair
        inside_pairs = (place_pairs < A * J * B // 2) & (pair < JOINED * B // 2)
        x_pairs = x.to(tl.pointer_type(tl.int32), bitcast=True)
        start = tl.cast(tl.program_id(0), tl.int64)
        fetched = tl.load(x_pairs + start * (stride // 2) + place_pairs, inside_pairs, other=0)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        start = tl.cast(row, tl.int64)
        if LINES:
            # Into the L2 cache, a line a thread: the copy to shared memory starts when this row is done.
            ahead = tl.cast(tl.minimum(row + (2 if AHEAD else 1) * tl.num_programs(0), rows - 1), tl.int64)
            line = tl.minimum(tl.arange(0, LINES) * (1024 // x.dtype.element_ty.primitive_bitwidth), n - 1)
            prefetched(x + ahead * stride + line)
            if GATE:
                prefetched(gate + ahead * gate_stride + line)
        tiles = ()
        for t in tl.static_range(0, BLOCKS * J, JOINED):
            if AHEAD:
                z = apart(fetched, x.dtype.element_ty)
            else:
                there = t // J * (A * J * B) + t % J * B + place_joined
                z = tl.load(x + start * stride + there, inside_joined, other=0.0)
                if GATE:
                    factor = tl.load(gate + start * gate_stride + there, inside_joined, other=0.0)
                    z = gated(factor, z)
            if SLOW:
                if WIDE:
                    parts = terms(z, 3)
                    z = tl.dot(left, parts[0], tl.dot(left, parts[1], tl.dot(left, parts[2])))
                else:
                    z = tl.dot(left, z)
            pieces = (z,)
            for level in tl.static_range(4):
                if (1 << level) < JOINED:
                    cut = ()
                    for p in tl.static_range(1 << level):
                        cut = cut + halves(pieces[p])  # type: ignore[assignment]
                    pieces = cut
            tiles = tiles + pieces  # type: ignore[assignment]
        for level in tl.static_range(4):
            if (1 << level) < J:
                mixed = ()
                for t in tl.static_range(BLOCKS * J):
                    mixed = mixed + (  # type: ignore[assignment]
                        butterfly(
                            tiles[t],
                            tiles[t ^ (1 << level)],
                            t & (1 << level) != 0,
                            norm,
                            NORM and (2 << level) == J,
                        ),
                    )
                tiles = mixed
        done = ()
        high = tl.zeros((A_PAD, 1), tl.float32)
        low = tl.zeros((A_PAD, 1), tl.float32)
        for t in tl.static_range(BLOCKS * J):
            y = tiles[t]  # type: ignore[var-annotated]
            channel = t // J * (A * J * B) + t % J * B + place
            if FAST:
                if WIDE:
                    parts = terms(y, 3)
                    y = tl.dot(parts[0], right, tl.dot(parts[1], right, tl.dot(parts[2], right)))
                elif SLOW:
                    parts = terms(y, 2)
                    y = tl.dot(parts[0], right, tl.dot(parts[1], right))
                else:
                    y = tl.dot(y, right)
            if NORM and J == 1:
                y = y * norm
            y = narrow(y, x.dtype.element_ty)
            done = done + (y,)  # type: ignore[assignment]
            if QUANTISE:
                # Padding is 0, or NaN where the row has no finite scale anyway: neither needs a mask. Unless
                # what makes it NaN lies in a kept block, or is an infinity that a static range clamps.
                counted = y
                if KEEP or (STATIC and PADDED):
                    counted = tl.where(inside & (channel >= keep), ordered(y, ORDERED), 0.0)
                if SYMMETRIC or STATIC:
                    high = larger(high, largest_magnitude(counted))
                else:
                    wide = widen(counted)
                    low, high = smaller(low, smallest(wide, 1)), larger(high, largest(wide, 1))
        if AHEAD:
            following = tl.cast(tl.minimum(row + tl.num_programs(0), rows - 1), tl.int64)
            fetched = tl.load(x_pairs + following * (stride // 2) + place_pairs, inside_pairs, other=0)
        if QUANTISE:
            fixed_scale = tl.zeros((1, 1), tl.float32)
            fixed_zero = fixed_scale
            if STATIC:
                fixed_scale = tl.load(given_scale + start * scale_step + one)
                if not SYMMETRIC:
                    fixed_zero = tl.load(given_zero + start * zero_step + one)
            top, bottom = largest(high, 0), smallest(low, 0)
            scale, zero = scale_and_zero(bottom, top, clip, fixed_scale, fixed_zero, BITS, SYMMETRIC, STATIC)
            recipe = rounding(scale, zero, BITS, SYMMETRIC)
            tl.store(scales + start + one, scale)
            if not SYMMETRIC and not STATIC:
                tl.store(zeros + start + one, zero)
        for t in tl.static_range(BLOCKS * J):
            y = done[t]
            channel = t // J * (A * J * B) + t % J * B + place
            byte = y  # type: ignore[var-annotated]
            if QUANTISE:
                byte = codes(y, recipe, SYMMETRIC, CLAMP, WIDE).to(out.dtype.element_ty)
            byte = ordered(byte, ORDERED)
            if KEEP:
                tl.store(kept + start * keep + channel, ordered(y, ORDERED), inside & (channel < keep))
                tl.store(out + start * (n - keep) + (channel - keep), byte, inside & (channel >= keep))
            else:
                tl.store(out + start * n + channel, byte, inside)


def hadamard_quantise(
    x: Tensor,
    *,
    gate: Tensor | None = None,
    size: int,
    inner: int = 1,
    keep: int = 0,
    choice: Choice | None = None,
    overlapped: bool = False,
    **quantiser: Unpack[Quantiser],
) -> tuple[Tensor | None, Quantised]:
    """`pass_reference.hadamard_quantise` on the GPU.

    x, gate: [..., n], bfloat16, float16 or float32. The transform is the reference's up to rounding in
    float32, of a product as `rounding.gated` has it; the codes are those of the transform. choice and
    overlapped as in `quantise`. The first call for a size copies its matrices to the GPU, which a CUDA graph
    cannot record. Raises ValueError, naming what does not fit, where `unsupported` does.
    """
    made = _launch(x, gate, size, inner, keep, True, choice, overlapped, **quantiser)
    leading, n = x.shape[:-1], x.shape[-1]
    q = Results(leading, n - keep, x.device, quantiser)
    kept = x.new_empty(*leading, keep) if keep else None
    _run(made, x, gate, (*q.pointers(), q.scale if kept is None else kept))
    return kept, q.quantised()


def hadamard(
    x: Tensor,
    *,
    gate: Tensor | None = None,
    size: int,
    inner: int = 1,
    choice: Choice | None = None,
    overlapped: bool = False,
) -> Tensor:
    """`pass_reference.hadamard` on the GPU: x [..., n] transformed, in its dtype. Otherwise as
    `hadamard_quantise`."""
    made = _launch(x, gate, size, inner, 0, False, choice, overlapped)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run(made, x, gate, (y,) * 6)
    return y


def unsupported(
    x: Tensor, *, gate: Tensor | None = None, size: int, inner: int = 1, keep: int = 0, **quantiser: Any
) -> str | None:
    """Why `hadamard_quantise`, or without a quantiser `hadamard`, cannot run here, in a phrase, or None."""
    reason = unsupported_input(x, keep, gate) or unsupported_beside(x, "gate", gate)
    reason = reason or unsupported_transform(x.shape[-1], size, inner, x.dtype)
    if reason is None and quantiser:
        reason = unsupported_quantiser(x, x.shape[-1] - keep, **quantiser)
    return reason


Made = tuple[Launch, Tensor, Tensor]
"""A launch, and the slow and the fast matrix that it reads."""


def _run(made: Made | None, x: Tensor, gate: Tensor | None, operands: tuple[Tensor, ...]) -> None:
    if made is not None:
        launch, slow, fast = made
        rows = rows_of(x)
        launch(rows, rows if gate is None else rows_of(gate), slow, fast, *operands)


@by_form
def _launch(
    x: Tensor,
    gate: Tensor | None,
    size: int,
    inner: int,
    keep: int,
    quantised: bool,
    choice: Choice | None,
    overlapped: bool,
    **quantiser: Any,
) -> Made | None:
    """quantiser: of `hadamard_quantise`, empty for `hadamard`. None where there are no rows."""
    check(unsupported(x, gate=gate, size=size, inner=inner, keep=keep, **quantiser))
    rows = rows_of(x)
    gates = rows if gate is None else rows_of(gate)
    m, n = rows.shape
    if not m:
        return None
    numbers: tuple[int, int, float] = (0, 0, 1.0)
    coded = constants(8, True, False, 1.0, x.dtype)
    if quantised:
        q = Results(x.shape[:-1], n - keep, x.device, cast("Quantiser", quantiser))
        numbers, coded = q.numbers(), q.constants(x.dtype)
    choice = choice or tuning.lookup("hadamard_quantise", x.device, m, n, size, Choice())
    cut = plan(n, size, inner, choice.height)
    if cut is None or not cut.fits:
        raise ValueError(f"tiles of at most {choice.height} rows do not hold rows of {n} in blocks of {size}")
    slow, fast, norm = matrices(size, cut, x.dtype, x.device)
    # Where more than codes is stored, or a gate is read, there are no registers to keep the next row in.
    aligned = rows.stride(0) % 2 == 0 and rows.data_ptr() % 4 == 0
    paired = aligned and quantised and not keep and gate is None
    programs = choice.programs or cut.programs
    launch = Launch(
        _hadamard,
        (min(m, _multiprocessors(x.device) * programs),),
        (m, n, keep, rows.stride(0), gates.stride(0), *numbers, norm),
        {**coded, **shape_constants(cut, n, norm, choice.stages or cut.stages, x.dtype, paired),
         "GATE": gate is not None, "QUANTISE": quantised, "KEEP": keep > 0, "OVERLAPPED": overlapped},
        {**cut.options(programs), "enable_fp_fusion": False, "launch_pdl": overlapped},
        x.device,
    )  # fmt: skip
    return launch, slow, fast


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def compilations() -> Iterator[Compilation]:
    """What stands for this kernel in the compile tests."""
    cases = [
        ("bf16-4096", torch.bfloat16, 4096, 4096, 1, 0, True, 1.0),
        ("bf16-14336-gate", torch.bfloat16, 14336, 14336, 1, 0, True, 1.0),
        ("bf16-14336-gate-clip", torch.bfloat16, 14336, 14336, 1, 0, True, 0.9),
        ("bf16-14336-gate-keep", torch.bfloat16, 14336, 14336, 1, 64, True, 1.0),
        ("bf16-8192-gate", torch.bfloat16, 8192, 8192, 1, 0, True, 1.0),
        ("bf16-18944-gate", torch.bfloat16, 18944, 18944, 1, 0, True, 1.0),
        ("bf16-8192-gate-transform-alone", torch.bfloat16, 8192, 8192, 1, 0, False, 1.0),
        ("fp32-8192-gate", torch.float32, 8192, 8192, 1, 0, True, 1.0),
        ("bf16-4096-32x128", torch.bfloat16, 4096, 32, 128, 0, True, 1.0),
        ("bf16-4096-keep-clip", torch.bfloat16, 4096, 4096, 1, 64, True, 0.9),
        ("bf16-4096-transform-alone", torch.bfloat16, 4096, 4096, 1, 0, False, 1.0),
        ("bf16-14336", torch.bfloat16, 14336, 14336, 1, 0, True, 1.0),
        ("bf16-14336-clip", torch.bfloat16, 14336, 14336, 1, 0, True, 0.9),
        ("bf16-8192", torch.bfloat16, 8192, 8192, 1, 0, True, 1.0),
        ("bf16-14336-gate-blocks-of-2048", torch.bfloat16, 14336, 2048, 1, 0, True, 1.0),
        ("bf16-13696-blocks-of-128", torch.bfloat16, 13696, 128, 1, 0, True, 1.0),
        ("fp16-1536", torch.float16, 1536, 1536, 1, 0, True, 1.0),
        ("fp32-4096", torch.float32, 4096, 4096, 1, 0, True, 1.0),
    ]
    for name, dtype, n, size, inner, keep, quantised, clip in cases:
        gate = "-gate" in name
        cut = plan(n, size, inner)
        assert cut is not None
        pointer = f"*{DTYPES[dtype]}"
        narrow = "*bf16" if dtype == torch.float32 else pointer
        norm = 2.0 ** math.ceil(math.log2(size) / 2) / math.sqrt(size)
        yield compilation(
            f"hadamard-quantise-{name}",
            _hadamard,
            {"x": pointer, "gate": pointer, "kept": pointer, "norm": "fp32"}
            | {"out": "*i8" if quantised else pointer}
            | {"slow": narrow, "fast": "*bf16" if cut.slow else narrow},
            constants(4, True, False, clip, dtype)
            | shape_constants(cut, n, norm, cut.stages, dtype, quantised and not keep and not gate)
            | {"GATE": gate, "QUANTISE": quantised, "KEEP": keep > 0, "OVERLAPPED": False},
            cut.options(cut.programs),
            ("HGMMA",) if cut.padded[0] >= 64 else ("HMMA",),
        )
