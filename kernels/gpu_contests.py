"""What `kernels.bench` times on a GPU: this project's Triton kernels, what is installed beside them, bf16
cuBLAS.

All contestants of a linear start from one random bf16 weight, quantise it in their own format, and their
results are compared with its product before they are timed. Weights rotate through as many copies as push
each other out of L2. From more than FEW_ROWS rows on, inputs and results rotate with them; a few rows come
from the kernel before and are in L2 in real use, too.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ops, reference
from kernels.contests import EPS
from kernels.peers import BASELINE, PEERS, Contestant, Linear, group_of, unchanged
from kernels.reference import PackedWeight, pack_weight
from kernels.timing import nbytes, sets_needed

ROWS = (1, 4, 16, 64, 1024, 4096, 8192)
FEW_ROWS = 64
COMPARED_ROWS = 32
WRONG = 0.5
"""A relative error above which a result is no product of this weight in 4 bits (which is about 0.2)."""


@dataclass(frozen=True)
class Made:
    """A contestant with its operands: one call for each set of them. bytes: what a call must move, once each.
    rotated: bytes that a pass over all sets touches. error: relative, against the bf16 weight's product, None
    where the result is none."""

    calls: Sequence[Callable[[], Any]]
    bytes: int
    rotated: int
    multiply_adds: dict[torch.dtype, int]
    error: float | None = None


class NotPreparedError(Exception):
    """A contestant whose weight could not be made; what was raised, in one line."""


def one_line(error: BaseException) -> str:
    """The type of an error and the first line of what it says."""
    said = str(error).strip().splitlines()
    if isinstance(error, NotPreparedError):
        return said[0]
    return f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__


@dataclass(frozen=True)
class GpuContest:
    """One operation at one shape. entrants: by name, the package and what makes the contestant ready, in the
    order of their turns; all are compared with the first. making raises where a contestant cannot run."""

    operation: str
    layer: str
    rows: int
    outputs: int
    inputs: int
    entrants: dict[str, tuple[str, Callable[[], Made]]]


def ours(
    bits: int, *, inside: bool = False, at_rest: bool = False, few_rows: int = ops.FEW_ROWS
) -> Callable[[Tensor, int], Linear]:
    """The integer linear. inside: a call begins with the quantiser of bf16 inputs. at_rest: a kernel may
    fetch weights before the kernel in front has ended."""

    def prepare(w: Tensor, l2: int) -> Linear:
        q = reference.quantise(w, 4, symmetric=True)
        weights = _copies(pack_weight(q.codes, q.scale, None, 4), l2)

        def call(x: Any, number: int) -> Tensor:
            if inside:
                x = _kernel("quantise")(x, bits, symmetric=True, overlapped=at_rest)
            linear = _kernel("linear_few" if x.codes.shape[0] <= few_rows else "linear_many", "linear")
            return linear(x, weights[number], dtype=torch.bfloat16, weights_at_rest=at_rest)

        inputs = unchanged if inside else partial(reference.quantise, bits=bits, symmetric=True)
        return Linear(call, len(weights), nbytes(weights[0]), inputs, torch.int8)

    return prepare


def ours_a16(at_rest: bool) -> Callable[[Tensor, int], Linear]:
    """The weight-only linear in groups."""

    def prepare(w: Tensor, l2: int) -> Linear:
        q = reference.quantise(w, 4, symmetric=True, group=group_of(w.shape[1]))
        weights = _copies(pack_weight(q.codes, q.scale, None, 4), l2)

        def call(x: Tensor, number: int) -> Tensor:
            linear = _kernel("linear_a16", "linear")
            return linear(x, weights[number], dtype=torch.bfloat16, weights_at_rest=at_rest)

        return Linear(call, len(weights), nbytes(weights[0]))

    return prepare


def _few(rows: int) -> bool:
    return rows <= FEW_ROWS


def _between(rows: int) -> bool:
    return ops.FEW_ROWS < rows <= FEW_ROWS


def _many(rows: int) -> bool:
    return rows > FEW_ROWS


OURS = {
    "w4a8": (
        Contestant("ours w4a8", "ours", ours(8)),
        Contestant("ours w4a8, weights at rest", "ours", ours(8, at_rest=True), _few),
        Contestant("ours w4a8, few-row kernel", "ours", ours(8, at_rest=True, few_rows=FEW_ROWS), _between),
        Contestant("ours w4a8 + quantise", "ours", ours(8, inside=True, at_rest=True)),
        Contestant("ours w4a4", "ours", ours(4), _many),
        Contestant("ours w4a4 + quantise", "ours", ours(4, inside=True), _many),
    ),
    "w4a16": (
        Contestant("ours w4a16", "ours", ours_a16(False)),
        Contestant("ours w4a16, weights at rest", "ours", ours_a16(True), _few),
    ),
}
LINEARS = {kind: (BASELINE, *OURS[kind], *PEERS[kind]) for kind in OURS}


def linears(
    kind: str,
    layer: str,
    n: int,
    k: int,
    rows: Sequence[int],
    by: Sequence[str],
    l2: int,
    device: torch.device,
) -> Iterator[GpuContest]:
    """The contests of one weight [n, k] at every number of rows; its formats are made once. by: the packages
    that take part beside cuBLAS in bf16. l2: bytes of the cache."""
    w = torch.randn(n, k, dtype=torch.bfloat16, device=device) / k**0.5
    prepared: dict[str, Linear | str] = {}
    taking_part = [each for each in LINEARS[kind] if each is BASELINE or each.by in by]
    for contestant in taking_part:
        if any(contestant.rows(count) for count in rows):
            try:
                prepared[contestant.name] = contestant.prepare(w, l2)
            except Exception as error:  # noqa: BLE001 - other people's code; the row says what it raised
                prepared[contestant.name] = one_line(error)  # the error itself would hold every weight
    for count in rows:
        inputs: list[Tensor] = []

        def made(name: str, count: int = count, inputs: list[Tensor] = inputs) -> Made:
            linear = prepared[name]
            if isinstance(linear, str):
                raise NotPreparedError(linear)
            return _made(linear, w, count, inputs, l2)

        group = f" g{group_of(k)}" if kind == "w4a16" else ""
        yield GpuContest(
            f"linear {kind}{group}",
            layer,
            count,
            n,
            k,
            {each.name: (each.by, partial(made, each.name)) for each in taking_part if each.rows(count)},
        )


def _made(linear: Linear, w: Tensor, rows: int, inputs: list[Tensor], l2: int) -> Made:
    n, k = w.shape
    moving = 2 * rows * (k + n) if rows > FEW_ROWS else 0
    sets = min(linear.copies, sets_needed(linear.weight_bytes + moving, l2))
    while len(inputs) < (sets if moving else 1):
        inputs.append(torch.randn(rows, k, dtype=w.dtype, device=w.device))
    ready = [linear.inputs(x) for x in inputs[: sets if moving else 1]]
    calls = [partial(linear.call, ready[number % len(ready)], number) for number in range(sets)]
    result = calls[0]()
    error = None
    if linear.compared:
        expected = F.linear(inputs[0][:COMPARED_ROWS], w).float()
        error = float((result[:COMPARED_ROWS].float() - expected).norm() / expected.norm())
        if not error < WRONG:
            raise ArithmeticError(f"its result is wrong: a relative error of {error:.2g}")
    return Made(
        calls,
        linear.weight_bytes + nbytes(ready[0]) + nbytes(result),
        sets * (linear.weight_bytes + moving),
        {linear.dtype: rows * n * k},
        error,
    )


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
    """A pass over rows of n values in bf16 beside a copy of as many bytes as it reads and writes. inner: as
    in `reference.online_hadamard`."""
    size = n // inner
    ways: dict[str, dict[str, tuple[str, Callable[[Tensor], Any]]]] = {
        "quantise": {
            "ours a4": ("ours", lambda x: _kernel("quantise")(x, 4, symmetric=True)),
            "ours a8": ("ours", lambda x: _kernel("quantise")(x, 8, symmetric=True)),
            "humming a8": ("humming", lambda x: _humming_input(x, None)),
        },
        "rmsnorm + quantise": {
            "ours a4": (
                "ours",
                lambda x: _kernel("rmsnorm_quantise")(x, eps=EPS, bits=4, symmetric=True),
            ),
            "F.rms_norm": ("torch", lambda x: F.rms_norm(x, (n,), None, EPS)),
        },
        "hadamard + quantise": {
            "ours a4": (
                "ours",
                lambda x: _kernel("hadamard_quantise")(x, size=size, inner=inner, bits=4, symmetric=True),
            ),
        },
    }
    if inner == 1:
        ways["hadamard + quantise"] |= {
            "humming a8": ("humming", lambda x: _humming_input(x, n)),
            "fast_hadamard_transform": (
                "fast-hadamard-transform",
                lambda x: importlib.import_module("fast_hadamard_transform").hadamard_transform(x, n**-0.5),
            ),
        }
    for count in rows:
        # bf16 in; codes and a float32 scale for each row out; RMSNorm also returns its rms.
        moved = count * (3 * n + (8 if operation == "rmsnorm + quantise" else 4))
        sets = sets_needed(moved, l2)
        entrants: dict[str, tuple[str, Callable[[], Made]]] = {
            "copy of the same bytes": ("torch", partial(_copying, moved // 2, sets, device))
        }
        for name, (package, way) in ways[operation].items():
            if package in by:
                entrants[name] = (package, partial(_passing, way, count, n, sets, device))
        entrants["kernel over the same bytes"] = ("torch", partial(_streaming, moved // 2, sets, device))
        yield GpuContest(operation, layer, count, n, n, entrants)


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


def _passing(way: Callable[[Tensor], Any], rows: int, n: int, sets: int, device: torch.device) -> Made:
    x = torch.randn(sets, rows, n, dtype=torch.bfloat16, device=device)
    calls = [partial(way, x[number]) for number in range(sets)]
    moved = x[0].nbytes + nbytes(calls[0]())
    return Made(calls, moved, sets * moved, {})


def _humming_input(x: Tensor, hadamard: int | None) -> Any:
    return importlib.import_module("humming.ops").process_input(
        x, quant_mode="dynamic_token", quant_dtype="int8", hadamard_block_size=hadamard
    )


def _kernel(operation: str, function: str | None = None) -> Callable[..., Any]:
    """A kernel by name, imported when it is called: this module must load where Triton is not."""
    return getattr(importlib.import_module(f"kernels.triton.{operation}"), function or operation)


def _copies(w: PackedWeight, l2: int) -> list[PackedWeight]:
    return [
        replace(w, packed=w.packed.clone(), scale=w.scale.clone()) for _ in range(sets_needed(nbytes(w), l2))
    ]
