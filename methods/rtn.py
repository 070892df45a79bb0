"""RTN: round to nearest, the baseline that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels import ops
from kernels.weight_reference import code_dtype, to_codes
from methods.bits import LinearSpec
from methods.groups import grouped, held, ungrouped
from methods.linear import QuantisedWeight
from methods.method import Method


def round_to_nearest(weight: Tensor, spec: LinearSpec) -> QuantisedWeight:
    """Quantise weight [out, in] (kept columns already removed) by `spec`, in float32 or better."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    shape = (weight.shape[0], weight.shape[1])
    groups = grouped(weight, spec)
    scale, zero = ops.find_range(groups, spec.bits, spec.symmetric, spec.search)
    codes = to_codes(groups, scale, zero, spec.bits).to(code_dtype(spec.symmetric))
    return QuantisedWeight(
        ungrouped(codes, shape, spec).contiguous(),
        held(scale, shape, spec),
        None if zero is None else held(zero, shape, spec),
        spec,
    )


@dataclass(frozen=True, kw_only=True)
class RTN(Method):
    """No transform; weights rounded to nearest within a searched range."""

    name: ClassVar[str] = "rtn"
    paper: ClassVar[str] = "round to nearest, the standard baseline"
    rounding: str = "rtn"
