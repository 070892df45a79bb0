"""What `kernels.bench` times: every operation of the int4 layer beside what it competes with.

Activations are random and stay the same; weights and caches take turns among copies, as the layers of a model
do, so that small ones do not time a cache of the processor.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ops
from kernels.hadamard import hadamard_transform, largest_known_divisor
from kernels.integer import int_mm
from kernels.kv_reference import PackedRows, kv_append, kv_rows
from kernels.reference import PackedWeight, pack_weight
from kernels.timing import nbytes

Operand = TypeVar("Operand", Tensor, PackedWeight, tuple[Tensor, Tensor], tuple[PackedRows, PackedRows])

ROTATED_BYTES, MOST_COPIES = 1 << 26, 64
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """The widths of a decoder. Linears that read the same input are one here, as a fast decoder has them."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) by name."""
        attention = self.heads * self.head_dim
        return {
            "qkv": (attention + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o": (self.hidden, attention),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


SHAPES = {
    "smollm2-135m": Shape(hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64),
    "llama-3-8b": Shape(hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128),
}


@dataclass(frozen=True)
class Run:
    """One way to do an operation. operands: what a call reads, and what it writes in place; its result counts
    besides. multiply_adds: of one call, by type."""

    call: Callable[[int], object]
    operands: tuple[object, ...]
    multiply_adds: dict[torch.dtype, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Contest:
    """An operation at one shape; every run is compared with the first."""

    operation: str
    tokens: int
    runs: dict[str, Run]


def linears(shape: Shape, tokens: int, context: int, device: torch.device) -> Iterator[Contest]:
    """Linears from packed weights with a scale per output channel, and 16-, 8- or 4-bit inputs."""
    for name, (outputs, inputs) in shape.linears().items():
        yield _linear(f"linear {name}", outputs, inputs, tokens, device)


def _linear(operation: str, n: int, k: int, tokens: int, device: torch.device) -> Contest:
    x = torch.randn(tokens, k, device=device)
    a8, a4 = (ops.quantise(x, bits, symmetric=True) for bits in (8, 4))
    narrow = x.bfloat16()
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device)
    packed = _copies(pack_weight(codes, torch.full((n, 1), 0.01, device=device), None, 4))
    integers, floats = _copies(codes), _copies(codes.to(torch.float32))
    halves = _copies(codes.to(torch.bfloat16))
    count = tokens * n * k
    float32, int8 = {torch.float32: count}, {torch.int8: count}

    def linear(operand: Any) -> Callable[[PackedWeight], Tensor]:
        return lambda w: ops.linear(operand, w, dtype=torch.float32)

    return Contest(
        operation,
        tokens,
        {
            "float32": Run(_each(floats, lambda w: F.linear(x, w)), (x, floats[0]), float32),
            "bfloat16": Run(
                _each(halves, lambda w: F.linear(narrow, w)), (narrow, halves[0]), {torch.bfloat16: count}
            ),
            "torch._int_mm alone": Run(
                _each(integers, lambda w: int_mm(a4.codes, w)), (a4.codes, codes), int8
            ),
            "w4a16": Run(_each(packed, linear(x)), (x, packed[0]), float32),
            "w4a8": Run(_each(packed, linear(a8)), (a8, packed[0]), int8),
            "w4a4": Run(_each(packed, linear(a4)), (a4, packed[0]), int8),
        },
    )


def norms(shape: Shape, tokens: int, context: int, device: torch.device) -> Iterator[Contest]:
    """RMSNorm and the quantiser of a token, apart and fused."""
    x = torch.randn(tokens, shape.hidden, device=device)
    yield Contest(
        "RMSNorm, quantise",
        tokens,
        {
            "clone": Run(lambda _: x.clone(), (x,)),
            "F.rms_norm": Run(lambda _: F.rms_norm(x, (shape.hidden,), None, EPS), (x,)),
            "quantise a4": Run(lambda _: ops.quantise(x, 4, symmetric=True), (x,)),
            "rmsnorm_quantise a4": Run(
                lambda _: ops.rmsnorm_quantise(x, eps=EPS, bits=4, symmetric=True)[1:], (x,)
            ),
        },
    )


def hadamards(shape: Shape, tokens: int, context: int, device: torch.device) -> Iterator[Contest]:
    """The online Hadamard of the MLP, alone and fused with the quantiser. Its floor is that of its bytes."""
    x = torch.randn(tokens, shape.intermediate, device=device)
    size = largest_known_divisor(shape.intermediate)
    yield Contest(
        "Hadamard",
        tokens,
        {
            "clone": Run(lambda _: x.clone(), (x,)),
            "hadamard_transform": Run(lambda _: hadamard_transform(x, size), (x,)),
            "hadamard_quantise a4": Run(
                lambda _: ops.hadamard_quantise(x, size=size, bits=4, symmetric=True), (x,)
            ),
        },
    )


def appends(shape: Shape, tokens: int, context: int, device: torch.device) -> Iterator[Contest]:
    """Writing keys (or values) into the cache, as floats and as 4-bit codes."""
    x = torch.randn(1, shape.kv_heads, tokens, shape.head_dim, device=device)
    buffer = torch.empty_like(x)
    rows = _rows(x)
    yield Contest(
        "KV cache, append",
        tokens,
        {
            "copy": Run(lambda _: buffer.copy_(x), (x,)),  # the result is the buffer
            "kv_append kv4": Run(lambda _: ops.kv_append(rows, x, 0), (x, rows)),
        },
    )


def attention(shape: Shape, tokens: int, context: int, device: torch.device) -> Iterator[Contest]:
    """Attention of one token to a cache of `context` positions; the same for any `tokens`."""
    query = torch.randn(1, shape.heads, 1, shape.head_dim, device=device)
    keys, values = (torch.randn(1, shape.kv_heads, context, shape.head_dim, device=device) for _ in range(2))
    floats = _copies((keys, values))
    halves = _copies((keys.bfloat16(), values.bfloat16()))
    packed = _copies((_rows(keys), _rows(values)))
    narrow = query.bfloat16()
    count = 2 * query.numel() * context

    def attend(q: Tensor) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
        grouped = shape.heads != shape.kv_heads
        return lambda kv: F.scaled_dot_product_attention(q, *kv, enable_gqa=grouped)

    yield Contest(
        f"attention to {context}",
        1,
        {
            "float32": Run(_each(floats, attend(query)), (query, floats[0]), {torch.float32: count}),
            "bfloat16": Run(_each(halves, attend(narrow)), (narrow, halves[0]), {torch.bfloat16: count}),
            "kv_attention kv4": Run(
                _each(packed, lambda kv: ops.kv_attention(query, *kv, context)),
                (query, packed[0]),
                {torch.float32: count},
            ),
        },
    )


OPERATIONS = {
    "linear": linears,
    "norm": norms,
    "hadamard": hadamards,
    "append": appends,
    "attention": attention,
}
"""Contests of each kind, made one at a time, as their operands are large."""


def _rows(x: Tensor) -> PackedRows:
    """x [B, H, T, D] as packed rows of 4 bits."""
    batch, heads, length, width = x.shape
    rows = kv_rows(batch, heads, length, width, 4, symmetric=False, device=x.device)
    kv_append(rows, x, 0)
    return rows


def _copies(operand: Operand) -> list[Operand]:
    """Enough copies of an operand to push each other out of a processor's own caches."""
    count = min(MOST_COPIES, max(1, -(-ROTATED_BYTES // nbytes(operand))))
    copies: list[Operand] = [operand]
    copies += [copy.deepcopy(operand) for _ in range(count - 1)]
    return copies


def _each(operands: Sequence[Operand], call: Callable[[Operand], object]) -> Callable[[int], object]:
    """A run that takes the operands in turn."""
    return lambda number: call(operands[number % len(operands)])
