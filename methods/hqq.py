"""HQQ, half-quadratic quantisation (Badri and Shaji 2023, mobiusml.github.io/hqq_blog): fractional
zero-points that make few weights err much, found without calibration text.

With the inverse step s = (2^b - 1) / (max - min) of a group fixed and its zero-point z starting at -min s (a
whole number for 4 bits), up to 20 times, p = 0.7, β = 10 growing by 1 % a time:

    codes Q = clamp(round(W s + z))    e = W - (Q - z) / s    E = sign(e) max(0, |e| - |e|^(p-1) / β)
    z = mean over the group of Q - (W - E) s

until the mean |e| of the whole matrix no longer falls; the z of that last step stays, as in the solver of the
published numbers. So a matrix is rounded alone: how long it goes on depends on all of its groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kernels.weight_reference import code_dtype
from methods.bits import LinearSpec
from methods.groups import grouped, held, ungrouped
from methods.linear import QuantisedWeight
from methods.method import Method

STEPS, POWER, BETA, GROWTH = 20, 0.7, 10.0, 1.01
_NO_RANGE, _LARGEST = 1e-4, 2e4
META_BITS, META_GROUP = 8, 128
# Values worked on at a time: few enough for a cache, or enough to fill a GPU.
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 25}


def as_hqq(spec: LinearSpec, axis: int = 1, meta: bool = False) -> LinearSpec:
    """A linear's spec as HQQ rounds it: asymmetric in float zero-points, the range not searched."""
    return replace(spec, symmetric=False, search=False, fractional=True, axis=axis, meta=meta)


def round_hqq(weight: Tensor, spec: LinearSpec) -> QuantisedWeight:
    """Quantise weight [out, in] (kept columns already removed) by `spec`, in float32 or better.

    Groups lie as in methods/groups.py. With `spec.meta` steps and zero-points are themselves quantised, after
    the codes are found: steps in groups of at most 128 of their own, zero-points all together.
    """
    spec = as_hqq(spec, spec.axis, spec.meta)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    shape = (weight.shape[0], weight.shape[1])
    groups = grouped(weight, spec)
    top = 2**spec.bits - 1
    inverse, zero = _range(groups, top)
    if spec.bits == 4:
        zero = zero.round()
    zero = _solve(groups, inverse, zero, top)
    codes = _codes(groups, inverse, zero, top).to(code_dtype(symmetric=False))
    step = 1.0 / inverse
    if spec.meta:
        step, zero = _in_eight_bits(step, META_GROUP), _in_eight_bits(zero, None)
    return QuantisedWeight(
        ungrouped(codes, shape, spec).contiguous(), held(step, shape, spec), held(zero, shape, spec), spec
    )


def _range(groups: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Inverse step and zero-point, each [n, 1], of groups [n, g]."""
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    span = high - low
    inverse = (top / span).masked_fill(span <= _NO_RANGE, 1.0).clamp(max=_LARGEST)
    return inverse, -low * inverse


def _codes(groups: Tensor, inverse: Tensor, zero: Tensor, top: int) -> Tensor:
    return groups.mul(inverse).add_(zero).round_().clamp_(0, top)


def _solve(groups: Tensor, inverse: Tensor, zero: Tensor, top: int) -> Tensor:
    """The zero-points [n, 1] after the half-quadratic steps."""
    beta, best, zero = BETA, math.inf, zero.clone()
    rows = max(1, _CHUNK.get(groups.device.type, _CHUNK["cpu"]) // groups.shape[1])
    parts = list(zip(groups.split(rows), inverse.split(rows), zero.split(rows), strict=True))
    for _ in range(STEPS):
        total = sum(_step(*part, top, beta) for part in parts)
        beta *= GROWTH
        if total >= best:
            break
        best = total
    return zero


def _step(groups: Tensor, inverse: Tensor, zero: Tensor, top: int, beta: float) -> float:
    """One step for some groups: moves `zero` and returns the sum of |e| before it."""
    codes = _codes(groups, inverse, zero, top)
    error = (codes - zero).div_(inverse).neg_().add_(groups)
    size = error.abs()
    # |e|^(p-1) as exp((p - 1) log|e|): several times faster than pow on a CPU.
    shrunk = size.log().mul_(POWER - 1).exp_().div_(-beta).add_(size).clamp_(min=0).mul_(error.sign_())
    zero.copy_(codes.sub_(shrunk.neg_().add_(groups).mul_(inverse)).mean(1, keepdim=True))
    return float(size.sum(dtype=torch.float64))


def _in_eight_bits(values: Tensor, group: int | None) -> Tensor:
    """values [n, 1] rounded to 8 bits between the extremes of each group of values that lie n / group apart
    (None: of all), where that does not divide n of the largest smaller group that does."""
    n = len(values)
    size = n if group is None else next(size for size in range(min(group, n), 0, -1) if n % size == 0)
    groups = values.reshape(size, -1).T
    inverse, zero = _range(groups, 2**META_BITS - 1)
    back = (_codes(groups, inverse, zero, 2**META_BITS - 1) - zero) / inverse
    return back.T.reshape(n, 1)


@dataclass(frozen=True, kw_only=True)
class HQQ(Method):
    """No transform; weights rounded by half-quadratic quantisation, without calibration text. The paper
    preset takes groups along the outputs and quantises scales and zero-points (group_axis=0;meta=true)."""

    name: ClassVar[str] = "hqq"
    paper: ClassVar[str] = "Badri and Shaji 2023, mobiusml.github.io/hqq_blog"
    rounding: str = "hqq"

    def layout(self) -> tuple[int, bool]:
        return hqq_layout(self)


def hqq_layout(method: Method) -> tuple[int, bool]:
    """`Method.layout` of methods whose paper rounded by HQQ along the outputs, with quantised scales."""
    paper = method.preset == "paper"
    axis = method.group_axis if method.group_axis is not None else (0 if paper else 1)
    return axis, method.meta if method.meta is not None else paper
