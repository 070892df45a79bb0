"""The operations that methods call, each run by the implementation that fits and counted by its name.

Signatures and results are those of `reference` and `kv_reference`, the one implementation so far. What cannot
run raises; nothing is replaced silently. Names carry the widths: "linear w4a16", "kv_attention kv4".
"""

from collections import Counter
from typing import Unpack

import torch
from torch import Tensor

from kernels import integer, kv_reference, reference
from kernels.kv_reference import PackedRows
from kernels.reference import PackedWeight, Quantised, Quantiser

_counts: dict[str, Counter[str]] = {}


def implementations() -> dict[str, dict[str, int]]:
    """Which implementation ran each operation, and how often, since the last reset."""
    return {name: dict(counts) for name, counts in sorted(_counts.items())}


def reset_implementations() -> None:
    """Start counting anew."""
    _counts.clear()


def quantise(
    x: Tensor,
    bits: int,
    *,
    symmetric: bool,
    clip: float = 1.0,
    group: int | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> Quantised:
    """`reference.quantise`."""
    q = reference.quantise(x, bits, symmetric=symmetric, clip=clip, group=group, scale=scale, zero=zero)
    _count(f"quantise a{bits}")
    return q


def linear(
    x: Tensor | Quantised,
    w: PackedWeight,
    *,
    x_keep: Tensor | None = None,
    w_keep: Tensor | None = None,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.linear`; the implementation says by which routes its integer products were formed."""
    before = integer.routes_taken.copy()
    y = reference.linear(x, w, x_keep=x_keep, w_keep=w_keep, row_scale=row_scale, bias=bias, dtype=dtype)
    taken = " and ".join(sorted(integer.routes_taken - before))
    inputs = 16 if isinstance(x, Tensor) else x.bits
    _count(f"linear w{w.bits}a{inputs}", f"reference ({taken})" if taken else "reference")
    return y


def rmsnorm_quantise(
    x: Tensor,
    *,
    eps: float,
    divisor: int | None = None,
    gain: Tensor | None = None,
    row_scale: Tensor | None = None,
    keep: int = 0,
    **quantiser: Unpack[Quantiser],
) -> tuple[Tensor | None, Quantised, Tensor]:
    """`reference.rmsnorm_quantise`."""
    result = reference.rmsnorm_quantise(
        x, eps=eps, divisor=divisor, gain=gain, row_scale=row_scale, keep=keep, **quantiser
    )
    _count(f"rmsnorm_quantise a{quantiser['bits']}")
    return result


def hadamard(x: Tensor, *, size: int, inner: int = 1) -> Tensor:
    """`reference.online_hadamard`: the transform alone."""
    y = reference.online_hadamard(x, size, inner)
    _count("hadamard")
    return y


def hadamard_quantise(
    x: Tensor, *, size: int, inner: int = 1, keep: int = 0, **quantiser: Unpack[Quantiser]
) -> tuple[Tensor | None, Quantised]:
    """`reference.hadamard_quantise`."""
    result = reference.hadamard_quantise(x, size=size, inner=inner, keep=keep, **quantiser)
    _count(f"hadamard_quantise a{quantiser['bits']}")
    return result


def kv_append(rows: PackedRows, x: Tensor, start: int, *, clip: float = 1.0) -> None:
    """`kv_reference.kv_append`."""
    kv_reference.kv_append(rows, x, start, clip=clip)
    _count(f"kv_append kv{rows.bits}")


def kv_attention(
    query: Tensor, keys: PackedRows, values: PackedRows, length: int, *, mask: Tensor | None = None
) -> Tensor:
    """`kv_reference.kv_attention`."""
    out = kv_reference.kv_attention(query, keys, values, length, mask=mask)
    _count(f"kv_attention kv{keys.bits}")
    return out


def _count(name: str, implementation: str = "reference") -> None:
    _counts.setdefault(name, Counter())[implementation] += 1
