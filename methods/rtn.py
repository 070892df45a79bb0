"""RTN: round to nearest, the baseline that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels import ops
from kernels.weight_reference import code_dtype, to_codes
from methods.bits import LinearSpec
from methods.errors import UserError
from methods.linear import QuantisedWeight
from methods.method import Method


def round_to_nearest(weight: Tensor, spec: LinearSpec) -> QuantisedWeight:
    """Quantise weight [out, in] (kept columns already removed) by `spec`, in float32 or better."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    along = weight if spec.axis == 1 else weight.T
    rows, width = along.shape
    group = spec.group or width
    if width % group:
        raise UserError(f"group size {group} does not divide the {width} channels it runs along")
    groups = along.reshape(-1, group)
    scale, zero = ops.find_range(groups, spec.bits, spec.symmetric, spec.search)
    codes = to_codes(groups, scale, zero, spec.bits).to(code_dtype(spec.symmetric)).reshape(rows, width)
    scale = scale.reshape(rows, -1)
    zero = None if zero is None else zero.reshape(rows, -1)
    if spec.axis == 0:
        codes, scale, zero = codes.T.contiguous(), scale.T, None if zero is None else zero.T
    return QuantisedWeight(codes, scale, zero, spec)


@dataclass(frozen=True, kw_only=True)
class RTN(Method):
    """No transform; weights rounded to nearest within a searched range."""

    name: ClassVar[str] = "rtn"
    paper: ClassVar[str] = "round to nearest, the standard baseline"
    rounding: str = "rtn"
