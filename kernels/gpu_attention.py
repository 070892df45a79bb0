"""The KV cache's operations that `kernels.bench` times on a GPU: decode attention to rows of 4 bits, 8 bits
and bf16, beside PyTorch's attention to the same bf16 rows by every backend that takes it; writing to the
cache, and dequantising it, beside copies of as many bytes.

A contest of attention is one batch of sequences, its `rows` are the positions held. PyTorch's backends also
get the queries with the heads of a group as if they were positions, which spares them the rows that are read
once for each head. What our kernels return is compared with the reference before it is timed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import gpu_passes, kv_reference
from kernels.contests import Shape
from kernels.gpu_contests import FEW_ROWS, GpuContest, Made, kernel
from kernels.kv_reference import PackedRows, Rows
from kernels.targets import TORCH_ATTENTION
from kernels.timing import nbytes, sets_needed

CONTEXTS = (1024, 8192, 32768)
ATTENTION = ("batch 1", "batch 8", "heads of 64, batch 1", "heads of 64, batch 8")
APPENDED = ("kv4, Hadamard", "kv8", "bf16")
DEQUANTISED = ("kv4", "kv8")
WRONG = 0.02
"""A relative error above which a result is not that of attention to these rows."""
# Choices beside the default: positions of a step, warps, programs on a multiprocessor.
OTHERS = {4: ((32, 8, 1), (32, 4, 2), (64, 4, 2)), 8: ((32, 8, 1), (32, 4, 1)), 16: ((16, 8, 1), (16, 2, 4))}
BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "cuDNN": "CUDNN_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
"""PyTorch's names of its backends, by those in `kernels.targets.TORCH_ATTENTION`."""


@dataclass(frozen=True)
class Sets:
    """Operands that take turns. keys and values: one of each for every set."""

    keys: Sequence[Rows]
    values: Sequence[Rows]


def attention(
    layer: str, shape: Shape, contexts: Sequence[int], by: Sequence[str], l2: int, device: torch.device
) -> Iterator[GpuContest]:
    """Decode attention of one batch at every context. layer: one of ATTENTION."""
    batch = int(layer.rsplit(" ", 1)[1])
    width = 64 if layer.startswith("heads of 64") else shape.head_dim
    for context in contexts:
        query = torch.randn(batch, shape.heads, 1, width, dtype=torch.bfloat16, device=device)
        length = torch.tensor(context, device=device)
        sets: dict[int, Sets] = {}

        def made(bits: int, sets: dict[int, Sets] = sets, context: int = context) -> Sets:
            if bits not in sets:
                rows = partial(random_rows, batch, shape.kv_heads, context, width, bits, device)
                first = Sets([rows()], [rows()])
                count = sets_needed(2 * nbytes(first.keys[0]), l2)
                more = [[rows() for _ in range(count - 1)] for _ in range(2)]
                sets[bits] = Sets([*first.keys, *more[0]], [*first.values, *more[1]])
            return sets[bits]

        entrants: dict[str, tuple[str, Callable[[], Made]]] = {}
        for bits, name in ((16, "ours bf16"), (8, "ours kv8"), (4, "ours kv4")):
            if "ours" in by:
                ours = partial(_ours, made, bits, query, length)
                entrants[name] = ("ours", ours)
                entrants[f"{name}, overlapped"] = ("ours", partial(ours, overlapped=True))
                for other in OTHERS[bits]:
                    entrants[f"{name}, {' x '.join(map(str, other))}"] = ("ours", partial(ours, choice=other))
        if "torch" in by:
            for label, names in TORCH_ATTENTION.items():
                for name, folded in zip(names, (False, True), strict=True):
                    entrants[name] = ("torch", partial(_torch, made, query, BACKENDS[label], folded))
        yield GpuContest("kv_attention", layer, context, shape.heads * width, width, entrants)


def random_rows(batch: int, heads: int, context: int, width: int, bits: int, device: torch.device) -> Rows:
    """Rows of any codes, with scales and zero-points for each; or floats."""
    if bits == 16:
        return torch.randn(batch, heads, context, width, dtype=torch.bfloat16, device=device)
    rows = kv_reference.kv_rows(batch, heads, context, width, bits, symmetric=False, device=device)
    assert rows.zero is not None
    rows.codes.random_(0, 256)
    rows.scale.uniform_(0.5, 1.5).mul_(4 / 2**bits)
    middle = 2 ** (bits - 1)
    rows.zero.random_(middle - middle // 4, middle + middle // 4)
    return rows


def _ours(
    made: Callable[[int], Sets],
    bits: int,
    query: Tensor,
    length: Tensor,
    overlapped: bool = False,
    choice: tuple[int, int, int] | None = None,
) -> Made:
    sets = made(bits)
    chosen = None if choice is None else kernel("kv_attention", "Choice")(*choice)

    def call(number: int) -> Tensor:
        result: Tensor = kernel("kv_attention")(
            query, sets.keys[number], sets.values[number], length, overlapped=overlapped, choice=chosen
        )
        return result

    return _attending(call, sets, query, exact=True)


def _torch(made: Callable[[int], Sets], query: Tensor, backend: str, folded: bool) -> Made:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    sets, chosen = made(16), getattr(SDPBackend, backend)
    heads = sets.keys[0].shape[1] if isinstance(sets.keys[0], Tensor) else 0
    asked = query.view(query.shape[0], heads, -1, query.shape[3]) if folded else query

    def call(number: int) -> Tensor:
        with sdpa_kernel(chosen):
            keys: Any = sets.keys[number]
            values: Any = sets.values[number]
            out = F.scaled_dot_product_attention(asked, keys, values, enable_gqa=not folded)
        return out.reshape(query.shape)

    return _attending(call, sets, query, exact=False)


def _attending(call: Callable[[int], Tensor], sets: Sets, query: Tensor, exact: bool) -> Made:
    """Raises ArithmeticError where the first sequence's result is not the reference's."""
    first = query[:1].float()
    context = _held(sets.keys[0]).shape[2]
    key, value = (_floats(rows[0], context) for rows in (sets.keys, sets.values))
    want = kv_reference.dense_attention(first, key, value, None)
    error = float((call(0)[:1].float() - want).norm() / want.norm())
    if not error < WRONG:
        raise ArithmeticError(f"its result is wrong: a relative error of {error:.2g}")
    moved = nbytes(sets.keys[0]) + nbytes(sets.values[0])
    calls = [partial(call, number) for number in range(len(sets.keys))]
    products = {torch.bfloat16: 2 * query.numel() * context}
    return Made(calls, moved + 2 * query.nbytes, len(calls) * moved, products, error, exact)


def _held(rows: Rows) -> Tensor:
    return rows if isinstance(rows, Tensor) else rows.codes


def _floats(rows: Rows, context: int) -> Tensor:
    """Those of the first sequence."""
    if isinstance(rows, Tensor):
        return rows[:1].float()
    zero = None if rows.zero is None else rows.zero[:1]
    one = replace(rows, codes=rows.codes[:1], scale=rows.scale[:1], zero=zero)
    return kv_reference.kv_dequantise(one, context, torch.float32)


def appending(
    layer: str, shape: Shape, rows: Sequence[int], by: Sequence[str], l2: int, device: torch.device
) -> Iterator[GpuContest]:
    """RoPE, the Hadamard transform where `layer`, one of APPENDED, says so, and writing to the cache: of one
    token of `rows` sequences, or of a prompt of as many tokens."""
    bits = {"kv4, Hadamard": 4, "kv8": 8, "bf16": 16}[layer]
    heads, width = shape.heads + 2 * shape.kv_heads, shape.head_dim
    for count in rows:
        batch, tokens = (count, 1) if count <= FEW_ROWS else (1, count)
        held = partial(random_rows, batch, shape.kv_heads, tokens, width, bits, device)
        written = 2 * nbytes(held()) + 2 * count * shape.heads * width
        moved = 2 * count * heads * width + written
        sets = sets_needed(moved, l2)
        entrants: dict[str, tuple[str, Callable[[], Made]]] = {
            "copy of the same bytes": ("torch", partial(gpu_passes._copying, moved // 2, sets, device))
        }
        if "ours" in by:
            given = (batch, tokens, shape, bits == 4, held, moved, sets, device)
            entrants["ours"] = ("ours", partial(_appending, *given))
        entrants["kernel over the same bytes"] = (
            "torch", partial(gpu_passes._streaming, moved // 2, sets, device)
        )  # fmt: skip
        yield GpuContest("rope_append", layer, count, heads * width, width, entrants)


def _appending(
    batch: int, tokens: int, shape: Shape, hadamard: bool, held: Callable[[], Rows], moved: int, sets: int,
    device: torch.device,
) -> Made:  # fmt: skip
    width, counts = shape.head_dim, (shape.heads, shape.kv_heads, shape.kv_heads)
    merged = torch.randn(sets, batch, tokens, sum(counts), width, dtype=torch.bfloat16, device=device)
    angles = torch.rand(1, 1, tokens, width // 2, device=device)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    room = [(held(), held()) for _ in range(sets)]
    start = torch.zeros((), dtype=torch.int64, device=device)

    def call(number: int) -> Any:
        heads = merged[number].split(counts, dim=2)
        out = kernel("kv_append", "rope_append")(*heads, cos, sin, *room[number], start, hadamard=hadamard)
        return out, *room[number]

    out, *ours = call(0)
    wanted = (held(), held())
    reference: Any = kv_reference.rope_append
    want = reference(*merged[0].split(counts, dim=2), cos, sin, *wanted, start, hadamard=hadamard)
    for found, other in ((out, want), *zip(ours, wanted, strict=True)):
        a, b = (
            kv_reference.kv_dequantise(x, tokens, torch.float32) if isinstance(x, PackedRows) else x.float()
            for x in (found, other)
        )
        if not float((a - b).norm()) < WRONG * float(b.norm()):
            raise ArithmeticError("its result is wrong: it is not the reference's")
    return Made([partial(call, number) for number in range(sets)], moved, sets * moved, {}, exact=True)


def dequantising(
    layer: str, shape: Shape, contexts: Sequence[int], by: Sequence[str], l2: int, device: torch.device
) -> Iterator[GpuContest]:
    """The rows of a sequence as bf16. layer: one of DEQUANTISED."""
    bits, width = int(layer[2:]), shape.head_dim
    for context in contexts:
        rows = partial(random_rows, 1, shape.kv_heads, context, width, bits, device)
        moved = nbytes(rows()) + 2 * shape.kv_heads * context * width
        sets = sets_needed(moved, l2)
        entrants: dict[str, tuple[str, Callable[[], Made]]] = {
            "copy of the same bytes": ("torch", partial(gpu_passes._copying, moved // 2, sets, device))
        }
        if "ours" in by:
            entrants["ours"] = ("ours", partial(_dequantising, rows, context, moved, sets))
        entrants["kernel over the same bytes"] = (
            "torch", partial(gpu_passes._streaming, moved // 2, sets, device)
        )  # fmt: skip
        yield GpuContest("kv_dequantise", layer, context, shape.kv_heads * width, width, entrants)


def _dequantising(rows: Callable[[], Rows], context: int, moved: int, sets: int) -> Made:
    held = [rows() for _ in range(sets)]
    calls = [partial(kernel("kv_dequantise"), each, context, torch.bfloat16) for each in held]
    assert isinstance(held[0], PackedRows)
    if not torch.equal(calls[0](), kv_reference.kv_dequantise(held[0], context, torch.bfloat16)):
        raise ArithmeticError("its result is wrong: it is not the reference's")
    return Made(calls, moved, sets * moved, {}, exact=True)
