"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): rounding column by column, each column's error
compensated in the columns that follow by the inverse Hessian of the layer's squared output error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.ops import find_range, gptq_block
from kernels.weight_reference import code_dtype
from methods.bits import LinearSpec
from methods.errors import UserError
from methods.groups import grouped, held, held_shape, runs_on
from methods.linear import QuantisedWeight
from methods.method import Method

BLOCK = 128


class Hessian:
    """H = (2/n) Σ x xᵀ over the n input rows seen, float32 (float64 for float64 inputs), [in, in]."""

    def __init__(self) -> None:
        self.matrix: Tensor | None = None
        self.rows = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., in]."""
        x = inputs.reshape(-1, inputs.shape[-1])
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        total = self.rows + x.shape[0]
        if self.matrix is None:
            self.matrix = x.new_zeros(x.shape[1], x.shape[1])
        self.matrix.mul_(self.rows / total).addmm_(x.T, x, alpha=2 / total)
        self.rows = total


def solve(
    weight: Tensor, hessian: Tensor, spec: LinearSpec, *, damp: float, act_order: bool
) -> QuantisedWeight:
    """Round weight [out, in] by `spec` against hessian [in, in].

    damp: share of the mean diagonal that is added to it. act_order: columns in order of falling
    diagonal; with groups, ranges are then taken from the original weights (static groups), since a
    group's channels are no longer neighbours. So they are where groups run on into the next output. Inputs
    that were never active get weight zero.
    """
    if spec.axis != 1:
        raise UserError("GPTQ groups run along the input channels: axis 1")
    weight = weight.to(hessian.dtype).clone()
    shape = (weight.shape[0], weight.shape[1])
    columns = shape[1]
    group = columns // held_shape(shape, spec)[1]
    static = group == columns or act_order or runs_on(shape, spec)
    if static:
        scale, zero = _ranges(weight, spec)
    else:
        scale = weight.new_empty(len(weight), columns // group)
        zero = None if spec.symmetric else torch.empty_like(scale)
    dead = hessian.diagonal() == 0  # zeroed after the ranges are found, as in the published code
    hessian = hessian.clone()
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    order = torch.arange(columns, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        weight, hessian = weight[:, order], hessian[order][:, order]
    factor = inverse_factor(hessian, damp)
    del hessian
    group_of = order // group
    codes = torch.empty_like(weight, dtype=code_dtype(spec.symmetric))
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        if not static:
            # Of all groups that begin in this block. As in the published code, their weights hold the errors
            # of the blocks before it, not those of the columns before them in the same block.
            _enter_ranges(weight, spec, slice(-(-start // group), -(-stop // group)), scale, zero)
        members = group_of[start:stop]
        codes[:, start:stop], errors = gptq_block(
            weight[:, start:stop],
            factor[start:stop, start:stop],
            scale[:, members],
            None if zero is None else zero[:, members],
            spec.bits,
        )
        weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    if act_order:
        codes = codes[:, order.argsort()]
    return QuantisedWeight(codes, scale, zero, spec)


def _ranges(weight: Tensor, spec: LinearSpec) -> tuple[Tensor, Tensor | None]:
    """Scales and zero-points of every run of weight's columns, each [out, runs]."""
    shape = (weight.shape[0], weight.shape[1])
    scale, zero = find_range(grouped(weight, spec), spec.bits, spec.symmetric, spec.search)
    return held(scale, shape, spec), None if zero is None else held(zero, shape, spec)


def _enter_ranges(
    weight: Tensor, spec: LinearSpec, groups: slice, scale: Tensor, zero: Tensor | None
) -> None:
    """Find the ranges of these groups of weight's columns and put them into scale and zero [out, groups]."""
    group = weight.shape[1] // scale.shape[1]
    rows = weight[:, groups.start * group : groups.stop * group].reshape(-1, group)
    found_scale, found_zero = find_range(rows, spec.bits, spec.symmetric, spec.search)
    scale[:, groups] = found_scale.view(len(weight), -1)
    if zero is not None and found_zero is not None:
        zero[:, groups] = found_zero.view(len(weight), -1)


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse, [in, in]; UserError if it is singular."""
    damped = hessian.to(torch.float64, copy=True)  # float32 fails on Hessians of few calibration tokens
    damped.diagonal().add_(damp * damped.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise UserError("GPTQ's Hessian is singular: use more calibration tokens or a larger damp")
    del damped  # these matrices are the largest of all when rounding: hold two at a time
    inverse = torch.cholesky_inverse(lower)
    del lower
    return torch.linalg.cholesky(inverse, upper=True).to(hessian.dtype)


@dataclass(frozen=True, kw_only=True)
class GPTQ(Method):
    """No transform; weights rounded by GPTQ on calibration text."""

    name: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "Frantar et al. 2023, arXiv 2210.17323"
    rounding: str = "gptq"
