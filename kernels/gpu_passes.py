"""The passes in front of linears that `kernels.bench` times on a GPU: the quantiser alone, behind RMSNorm and
behind the online Hadamard transform, with what a decoder puts in front of them (the sum with the last branch,
the gate of an MLP), and the same with floats for results. Each beside a copy of as many bytes as it reads and
writes.

What this project's kernels return is compared with the reference before it is timed.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import pass_reference
from kernels.contests import EPS
from kernels.gpu_contests import FEW_ROWS, GpuContest, Made, kernel
from kernels.timing import nbytes, sets_needed, tensors

# How far a scale, relatively, and how large a share of the codes may be from the reference's. Numbers in bf16
# are rounded twice.
CLOSE, CLOSE_ROUNDED, FEW_CODES = 2.0**-7, 2.0**-6, 0.01

A4: dict[str, Any] = {"bits": 4, "symmetric": True}
A8: dict[str, Any] = {"bits": 8, "symmetric": True}


@dataclass(frozen=True)
class Pass:
    """A pass over rows of n values in bf16.

    operands: tensors [rows, n] that it reads. written: bytes a row. ours: by name, what a call does. wanted:
    what the reference returns for the same operands and bits. others: of other packages, by name.
    halves: whether the operands are halves of one tensor, as one product gives them.
    """

    name: str
    operands: int
    written: int
    ours: dict[str, Callable[..., Any]]
    wanted: Callable[..., Any]
    others: dict[str, tuple[str, Callable[..., Any]]] = field(default_factory=dict)
    halves: bool = False


def fused(
    operation: str,
    layer: str,
    n: int,
    inner: int,
    rows: Sequence[int],
    by: Sequence[str],
    l2: int,
    device: torch.device,
) -> Iterator[GpuContest]:
    """The pass of that name, and those that begin with more, beside copies of as many bytes as they read and
    write. inner: as in `pass_reference.online_hadamard`."""
    for one in _PASSES[operation](layer, n, inner):
        for count in rows:
            moved = count * (2 * n * one.operands + one.written)
            sets = sets_needed(moved, l2)
            entrants: dict[str, tuple[str, Callable[[], Made]]] = {
                "copy of the same bytes": ("torch", partial(_copying, moved // 2, sets, device))
            }
            make = partial(_passing, one, count, n, sets, device)
            if "ours" in by:
                entrants |= {
                    name: ("ours", partial(make, way, 8 if name.startswith("ours a8") else 4))
                    for name, way in one.ours.items()
                    if count <= FEW_ROWS or " a thread" not in name
                }
            entrants |= {
                name: (package, partial(make, way, None))
                for name, (package, way) in one.others.items()
                if package in by
            }
            entrants["kernel over the same bytes"] = ("torch", partial(_streaming, moved // 2, sets, device))
            yield GpuContest(one.name, layer, count, n, n, entrants)


def _quantisers(layer: str, n: int, inner: int) -> Iterator[Pass]:
    run = _kernel("quantise")

    def wanted(bits: int, x: Tensor, gate: Tensor | None = None) -> Any:
        return pass_reference.quantise(x, bits, gate=gate, symmetric=True)

    yield Pass(
        "quantise",
        1,
        n + 4,
        {"ours a4": lambda x: run(x, **A4), "ours a8": lambda x: run(x, **A8)}
        | _with_few("quantise", lambda choice: lambda x: run(x, **A4, choice=choice)),
        wanted,
        {"humming a8": ("humming", lambda x: _humming_input(x, None))},
    )
    if layer == "intermediate":
        yield Pass(
            "gate + quantise",
            2,
            n + 4,
            {"ours a4": lambda x, gate: run(x, gate=gate, **A4)}
            | _with_few("quantise", lambda choice: lambda x, gate: run(x, gate=gate, **A4, choice=choice)),
            wanted,
            halves=True,
        )
        yield Pass(
            "gate",
            2,
            2 * n,
            {"ours": lambda x, gate: _kernel("gated")(gate, x)},
            lambda bits, x, gate: pass_reference.gated(gate, x),
            {"silu, product": ("torch", lambda x, gate: F.silu(gate) * x)},
            halves=True,
        )


def _rmsnorms(layer: str, n: int, inner: int) -> Iterator[Pass]:
    run, floats = _kernel("rmsnorm_quantise"), _kernel("rmsnorm_quantise", "rmsnorm")

    def wanted(bits: int, x: Tensor, add: Tensor | None = None) -> Any:
        found = pass_reference.rmsnorm_quantise(x, add=add, eps=EPS, bits=bits, symmetric=True)
        return found[1:] if add is None else found

    yield Pass(
        "rmsnorm + quantise",
        1,
        n + 8,  # codes, scale, rms
        {"ours a4": lambda x: run(x, eps=EPS, **A4)[1:]}
        | _with_few("rmsnorm_quantise", lambda choice: lambda x: run(x, eps=EPS, **A4, choice=choice)[1:]),
        wanted,
        {"F.rms_norm": ("torch", lambda x: F.rms_norm(x, (n,), None, EPS))},
    )
    yield Pass(
        "sum + rmsnorm + quantise",
        2,
        3 * n + 8,
        {"ours a4": lambda x, add: run(x, add=add, eps=EPS, **A4)}
        | _with_few(
            "rmsnorm_quantise", lambda choice: lambda x, add: run(x, add=add, eps=EPS, **A4, choice=choice)
        ),
        wanted,
    )
    yield Pass(
        "sum + rmsnorm",
        2,
        4 * n + 4,
        {"ours": lambda x, add: floats(x, add=add, eps=EPS)}
        | _with_few(
            "rmsnorm_quantise", lambda choice: lambda x, add: floats(x, add=add, eps=EPS, choice=choice)
        ),
        lambda bits, x, add: pass_reference.rmsnorm(x, add=add, eps=EPS),
        {"sum, F.rms_norm": ("torch", lambda x, add: F.rms_norm(x + add, (n,), None, EPS))},
    )


def _hadamards(layer: str, n: int, inner: int) -> Iterator[Pass]:
    size = n // inner
    run = _kernel("hadamard_quantise")

    def wanted(bits: int, x: Tensor, gate: Tensor | None = None) -> Any:
        return pass_reference.hadamard_quantise(
            x, gate=gate, size=size, inner=inner, bits=bits, symmetric=True
        )

    def transform(x: Tensor) -> Any:
        return importlib.import_module("fast_hadamard_transform").hadamard_transform(x, n**-0.5)

    others: dict[str, tuple[str, Callable[..., Any]]] = {
        "humming a8": ("humming", lambda x: _humming_input(x, n)),
        "fast_hadamard_transform": ("fast-hadamard-transform", transform),
    }
    yield Pass(
        "hadamard + quantise",
        1,
        n + 4,
        {"ours a4": lambda x: run(x, size=size, inner=inner, **A4)},
        wanted,
        others if inner == 1 else {},
    )
    if layer == "intermediate":
        yield Pass(
            "gate + hadamard + quantise",
            2,
            n + 4,
            {
                "ours a4": lambda x, gate: run(x, gate=gate, size=size, inner=inner, **A4),
                "ours a4, gate apart": lambda x, gate: run(
                    _kernel("gated")(gate, x), size=size, inner=inner, **A4
                ),
            },
            wanted,
            halves=True,
        )


_PASSES: dict[str, Callable[[str, int, int], Iterator[Pass]]] = {
    "quantise": _quantisers,
    "rmsnorm + quantise": _rmsnorms,
    "hadamard + quantise": _hadamards,
}


def _kernel(operation: str, function: str | None = None) -> Callable[..., Any]:
    """The kernel, looked up when it is called: it may not be there."""
    return lambda *operands, **keywords: kernel(operation, function)(*operands, **keywords)


def _with_few(operation: str, way: Callable[[Any], Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Ways with another number of values a thread, where rows are few."""

    def with_choice(few: int) -> Callable[..., Any]:
        return lambda *operands: way(kernel(operation, "Choice")(few=few))(*operands)

    return {f"ours, {few} a thread": with_choice(few) for few in (16, 32, 64)}


def _copying(half: int, sets: int, device: torch.device) -> Made:
    width = -(-half // 16) * 16
    sources = torch.randint(-128, 128, (sets, width), dtype=torch.int8, device=device)
    targets = torch.empty_like(sources)
    calls = [partial(targets[number, :half].copy_, sources[number, :half]) for number in range(sets)]
    return Made(calls, 2 * half, 2 * sets * half, {})


def _streaming(half: int, sets: int, device: torch.device) -> Made:
    """A copy may be the driver's own; this is a kernel that reads and writes as much."""
    words = -(-half // 4)
    sources = torch.randint(-(2**31), 2**31, (sets, words), dtype=torch.int32, device=device)
    targets = torch.empty_like(sources)
    calls = [partial(torch.bitwise_not, sources[number], out=targets[number]) for number in range(sets)]
    return Made(calls, 8 * words, 8 * sets * words, {})


def _passing(
    one: Pass,
    rows: int,
    n: int,
    sets: int,
    device: torch.device,
    way: Callable[..., Any],
    bits: int | None,
) -> Made:
    """bits: for what is compared with the reference, None for what is not. Raises ArithmeticError where a row
    is not as the reference says."""
    every = torch.randn(sets, rows, one.operands * n, dtype=torch.bfloat16, device=device)
    parts = every.chunk(one.operands, dim=2)
    if not one.halves:
        parts = tuple(part.contiguous() for part in parts)
    calls = [partial(way, *(part[number] for part in parts)) for number in range(sets)]
    result = calls[0]()
    if bits is not None:
        for row in dict.fromkeys((0, rows - 1)):
            wanted = tensors(one.wanted(bits, *(part[0, row : row + 1].cpu() for part in parts)))
            for found, want in zip(tensors(result), wanted, strict=True):
                _as_the_reference(found[row : row + 1].cpu(), want)
    moved = every[0].nbytes + nbytes(result)
    return Made(calls, moved, sets * moved, {}, exact=bits is not None)


def _as_the_reference(found: Tensor, wanted: Tensor) -> None:
    """Codes may be one apart where sums of another order end on the other side of a half, which is rare."""
    if found.is_floating_point():
        close = CLOSE if found.dtype == torch.float32 else CLOSE_ROUNDED
        same = torch.allclose(found.float(), wanted.float(), rtol=close, atol=0.0)
    else:
        apart = (found.int() - wanted.int()).abs()
        same = int(apart.max()) <= 1 and float((apart > 0).float().mean()) < FEW_CODES
    if not same:
        raise ArithmeticError("its result is wrong: it is not the reference's")


def _humming_input(x: Tensor, hadamard: int | None) -> Any:
    return importlib.import_module("humming.ops").process_input(
        x, quant_mode="dynamic_token", quant_dtype="int8", hadamard_block_size=hadamard
    )
