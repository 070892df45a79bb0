"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): rounding column by column, each column's error
compensated in the columns that follow by the inverse Hessian of the layer's squared output error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.bits import LinearSpec
from methods.errors import UserError
from methods.groups import grouped, held, held_shape, runs_on
from methods.linear import QuantisedWeight
from methods.method import Method
from methods.quantisers import find_range, from_codes, pack_dtype, to_codes

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
    scales, zeros = _group_ranges(weight, spec) if static else ([], [])
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
    group_of = (order // group).tolist()  # asked for at once: on a GPU every answer is waited for

    codes = torch.empty_like(weight)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        # Columns as rows: each step then reads and writes contiguous memory.
        block = weight[:, start:stop].T.contiguous()
        errors = torch.empty_like(block)
        local = factor[start:stop, start:stop]
        for i in range(stop - start):
            column = start + i
            if not static and column % group == 0:
                scale, zero = find_range(
                    weight[:, column : column + group], spec.bits, spec.symmetric, spec.search
                )
                scales.append(scale)
                zeros.append(zero)
            which = group_of[column]
            scale, zero = scales[which][:, 0], zeros[which]
            zero = None if zero is None else zero[:, 0]
            rounded = to_codes(block[i], scale, zero, spec.bits)
            codes[:, column] = rounded
            errors[i] = (block[i] - from_codes(rounded, scale, zero)) / local[i, i]
            block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        weight[:, stop:].addmm_(errors.T, factor[start:stop, stop:], alpha=-1)
    if act_order:
        codes = codes[:, order.argsort()]
    return QuantisedWeight(
        codes.to(pack_dtype(spec.symmetric)),
        torch.cat(scales, dim=1),
        None if spec.symmetric else torch.cat([zero for zero in zeros if zero is not None], dim=1),
        spec,
    )


def _group_ranges(weight: Tensor, spec: LinearSpec) -> tuple[list[Tensor], list[Tensor | None]]:
    """Scales and zero-points of every run of columns, each [out, 1]."""
    shape = (weight.shape[0], weight.shape[1])
    found = find_range(grouped(weight, spec), spec.bits, spec.symmetric, spec.search)
    scale, zero = (None if part is None else held(part, shape, spec) for part in found)
    assert scale is not None
    scales = list(scale.split(1, dim=1))
    return scales, [None] * len(scales) if zero is None else list(zero.split(1, dim=1))


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
