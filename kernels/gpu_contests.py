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

from kernels import ops, reference, tuning
from kernels.peers import BASELINE, PEERS, Contestant, Linear, copies, group_of, unchanged
from kernels.reference import PackedWeight, pack_weight
from kernels.timing import COMPARED_ROWS, nbytes, sets_needed

ROWS = (1, 4, 16, 64, 1024, 4096, 8192)
FEW_ROWS = 64
WRONG = 0.5
"""A relative error above which a result is no product of this weight in 4 bits (which is about 0.2)."""


@dataclass(frozen=True)
class Made:
    """A contestant with its operands: one call for each set of them. bytes: what a call must move, once each.
    rotated: bytes that a pass over all sets touches. error: relative, against the bf16 weight's product, None
    where the result is none. exact: whether the same operands give the same bits each time."""

    calls: Sequence[Callable[[], Any]]
    bytes: int
    rotated: int
    multiply_adds: dict[torch.dtype, int]
    error: float | None = None
    exact: bool = False


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
    bits: int,
    *,
    inside: bool = False,
    at_rest: bool = False,
    few_rows: int = ops.FEW_ROWS,
    tuned: bool = True,
) -> Callable[[Tensor, int], Linear]:
    """The integer linear. inside: a call begins with the quantiser of bf16 inputs. at_rest: a kernel may
    fetch weights before the kernel in front has ended. tuned: by the table, else as a shape that it lacks."""

    def prepare(w: Tensor, l2: int) -> Linear:
        n, k = w.shape
        q = reference.quantise(w, 4, symmetric=True)
        weights = _copies(pack_weight(q.codes, q.scale, None, 4), l2)

        def call(x: Any, number: int) -> Tensor:
            if inside:
                x = kernel("quantise")(x, bits, symmetric=True, overlapped=at_rest)
            rows = x.codes.shape[0]
            name = "linear_few" if rows <= few_rows else "linear_many"
            choice = None if tuned else tuning.untuned(name, rows, n, k)
            return kernel(name, "linear")(
                x, weights[number], dtype=torch.bfloat16, weights_at_rest=at_rest, choice=choice
            )

        inputs = unchanged if inside else partial(reference.quantise, bits=bits, symmetric=True)
        return Linear(call, len(weights), nbytes(weights[0]), inputs, torch.int8, exact=True)

    return prepare


def ours_a16(at_rest: bool = False, tuned: bool = True) -> Callable[[Tensor, int], Linear]:
    """The weight-only linear in groups."""

    def prepare(w: Tensor, l2: int) -> Linear:
        n, k = w.shape
        q = reference.quantise(w, 4, symmetric=True, group=group_of(k))
        weights = _copies(pack_weight(q.codes, q.scale, None, 4), l2)

        def call(x: Tensor, number: int) -> Tensor:
            name = "linear_a16" if x.shape[0] <= ops.FEW_A16_ROWS else "dequantise"
            choice = None if tuned else tuning.untuned(name, x.shape[0], n, k)
            return kernel(name, "linear")(
                x, weights[number], dtype=torch.bfloat16, weights_at_rest=at_rest, choice=choice
            )

        return Linear(call, len(weights), nbytes(weights[0]))

    return prepare


def ours_dense(at_rest: bool = False, tuned: bool = True) -> Callable[[Tensor, int], Linear]:
    """The linear of the bf16 weight itself."""

    def prepare(w: Tensor, l2: int) -> Linear:
        weights = copies([w], l2)

        def call(x: Tensor, number: int) -> Tensor:
            choice = None if tuned else tuning.untuned("linear_dense", x.shape[0], *w.shape)
            return kernel("linear_dense", "dense")(x, weights[number][0], overlapped=at_rest, choice=choice)

        return Linear(call, len(weights), w.nbytes, exact=True)

    return prepare


def _read_once(rows: int) -> bool:
    return rows <= ops.FEW_ROWS


def _few(rows: int) -> bool:
    return rows <= FEW_ROWS


def _between(rows: int) -> bool:
    return ops.FEW_ROWS < rows <= FEW_ROWS


def _many(rows: int) -> bool:
    return rows > FEW_ROWS


QUANTISED_AT_REST = Contestant(
    "ours w4a8 + quantise, weights at rest", "ours", ours(8, inside=True, at_rest=True)
)
QUANTISED_PLAIN = Contestant("ours w4a8 + quantise, plain", "ours", ours(8, inside=True))
OURS = {
    "w4a8": (
        Contestant("ours w4a8", "ours", ours(8)),
        Contestant("ours w4a8, weights at rest", "ours", ours(8, at_rest=True), _few),
        Contestant("ours w4a8, few-row kernel", "ours", ours(8, at_rest=True, few_rows=FEW_ROWS), _between),
        Contestant("ours w4a8, default choice", "ours", ours(8, tuned=False)),
        QUANTISED_AT_REST,
        QUANTISED_PLAIN,
        Contestant("ours w4a4", "ours", ours(4), _many),
        Contestant(
            "ours w4a4 + quantise, weights at rest", "ours", ours(4, inside=True, at_rest=True), _many
        ),
        Contestant("ours w4a4 + quantise, plain", "ours", ours(4, inside=True), _many),
    ),
    "w4a16": (
        Contestant("ours w4a16", "ours", ours_a16()),
        Contestant("ours w4a16, weights at rest", "ours", ours_a16(at_rest=True), _few),
        Contestant("ours w4a16, default choice", "ours", ours_a16(tuned=False), _few),
    ),
    "bf16": (
        Contestant("ours bf16", "ours", ours_dense(), _read_once),
        Contestant("ours bf16, weights at rest", "ours", ours_dense(at_rest=True), _read_once),
        Contestant("ours bf16, default choice", "ours", ours_dense(tuned=False), _read_once),
    ),
}
LINEARS = {kind: (BASELINE, *OURS[kind], *PEERS.get(kind, ())) for kind in OURS}
CHAIN = (
    BASELINE,
    QUANTISED_AT_REST,
    QUANTISED_PLAIN,
    *(each for each in PEERS["w4a8"] if each.name == "humming w4a8 + quantise"),
)
"""What takes bf16 and returns it, so that one can follow the other."""


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
        error = _relative(result, F.linear(inputs[0][:COMPARED_ROWS], w))
    return Made(
        calls,
        linear.weight_bytes + nbytes(ready[0]) + nbytes(result),
        sets * (linear.weight_bytes + moving),
        {linear.dtype: rows * n * k},
        error,
        linear.exact,
    )


def chains(
    layer: str,
    weights: Sequence[tuple[int, int]],
    rows: Sequence[int],
    by: Sequence[str],
    l2: int,
    device: torch.device,
) -> Iterator[GpuContest]:
    """Linears in a row as a decoder runs them, each in front of the next: quantise, linear, quantise, linear.

    weights: (outputs, inputs), where the outputs of one are the inputs of the next. Few rows alone: with many
    the launches no longer matter.
    """
    rows = [count for count in rows if _few(count)]
    if not rows:
        return
    made = [torch.randn(n, k, dtype=torch.bfloat16, device=device) / k**0.5 for n, k in weights]
    prepared: dict[str, list[Linear] | str] = {}
    taking_part = [each for each in CHAIN if each is BASELINE or each.by in by]
    for contestant in taking_part:
        try:
            prepared[contestant.name] = [contestant.prepare(w, l2) for w in made]
        except Exception as error:  # noqa: BLE001 - other people's code; the row says what it raised
            prepared[contestant.name] = one_line(error)
    for count in rows:
        x = torch.randn(count, weights[0][1], dtype=torch.bfloat16, device=device)

        def ready(name: str, x: Tensor = x) -> Made:
            found = prepared[name]
            if isinstance(found, str):
                raise NotPreparedError(found)
            return _chained(found, made, x, l2)

        entrants: dict[str, tuple[str, Callable[[], Made]]] = {}
        for each in taking_part:
            entrants[each.name] = (each.by, partial(ready, each.name))
        yield GpuContest("chain w4a8", layer, count, weights[-1][0], weights[0][1], entrants)


def _chained(chain: Sequence[Linear], weights: Sequence[Tensor], x: Tensor, l2: int) -> Made:
    moved = sum(
        linear.weight_bytes + 2 * len(x) * sum(w.shape) for linear, w in zip(chain, weights, strict=True)
    )
    sets = min(sets_needed(moved, l2), *(linear.copies for linear in chain))

    def call(number: int) -> Tensor:
        y = x
        for linear in chain:
            y = linear.call(y, number)
        return y

    expected = x
    for w in weights:
        expected = F.linear(expected, w)
    error = _relative(call(0), expected)
    operations = {chain[0].dtype: len(x) * sum(w.numel() for w in weights)}
    exact = all(linear.exact for linear in chain)
    return Made(
        [partial(call, number) for number in range(sets)], moved, sets * moved, operations, error, exact
    )


def _relative(result: Tensor, expected: Tensor) -> float:
    """How far a result is from the bf16 weight's, of the first rows. Raises ArithmeticError where it cannot
    be one of the same weight in 4 bits."""
    want = expected[:COMPARED_ROWS].float()
    error = float((result[:COMPARED_ROWS].float() - want).norm() / want.norm())
    if not error < WRONG:
        raise ArithmeticError(f"its result is wrong: a relative error of {error:.2g}")
    return error


def kernel(operation: str, function: str | None = None) -> Callable[..., Any]:
    """A kernel by name, imported when it is called: this module must load where Triton is not."""
    return getattr(importlib.import_module(f"kernels.triton.{operation}"), function or operation)


def _copies(w: PackedWeight, l2: int) -> list[PackedWeight]:
    return [
        replace(w, packed=w.packed.clone(), scale=w.scale.clone()) for _ in range(sets_needed(nbytes(w), l2))
    ]
