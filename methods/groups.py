"""How the weights of a matrix fall into groups that share a scale, and how their scales are held.

As in HQQ (Badri and Shaji 2023, mobiusml.github.io/hqq_blog), a matrix [out, in] is one row of out · in
weights, output by output, of which groups of g are taken

    axis 1   next to each other: consecutive inputs, running on into the next output where g does not divide
             the inputs
    axis 0   out · in / g apart: where g divides the outputs, the same input of every (out/g)-th output

so that only out · in has to be a multiple of g. Scales are held in the shape in which a product can read them
([out, in / run] or [period, in], see `held_shape`), where those of a group that spans several runs, or of a
column that wraps around, stand more than once: bytes that a formula of b bits and g weights does not count.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from methods.bits import LinearSpec
from methods.errors import UserError


def group_of(shape: tuple[int, int], spec: LinearSpec) -> int:
    """Weights that share a scale in a matrix of this shape, (out, in) without kept columns.

    Raises UserError where the group size does not divide the number of weights.
    """
    outputs, inputs = shape
    group = spec.group or (inputs if spec.axis == 1 else outputs)
    if outputs * inputs % group:
        raise UserError(
            f"group size {group} does not divide the {outputs * inputs} weights of a {outputs} x {inputs} "
            "matrix"
        )
    return group


def held_shape(shape: tuple[int, int], spec: LinearSpec) -> tuple[int, int]:
    """Shape of the scales as they are held: [out, in / run], where a run is the largest number of consecutive
    inputs that lie in one group in every output; for axis 0 [period, in], output n has row n mod period."""
    outputs, inputs = shape
    group = group_of(shape, spec)
    if spec.axis == 1:
        return outputs, inputs // math.gcd(inputs, group)
    apart = outputs * inputs // group
    return math.lcm(apart, inputs) // inputs, inputs


def grouped(weight: Tensor, spec: LinearSpec) -> Tensor:
    """The groups of weight [out, in], one a row: [n, group]."""
    outputs, inputs = weight.shape
    group = group_of((outputs, inputs), spec)
    return weight.reshape(-1, group) if spec.axis == 1 else weight.reshape(group, -1).T.contiguous()


def ungrouped(groups: Tensor, shape: tuple[int, int], spec: LinearSpec) -> Tensor:
    """`grouped` undone: [out, in]."""
    return (groups if spec.axis == 1 else groups.T).reshape(shape)


def held(per_group: Tensor, shape: tuple[int, int], spec: LinearSpec) -> Tensor:
    """One value a group, [n, 1], in the order of `grouped`, as [rows, columns] of `held_shape`."""
    rows, columns = held_shape(shape, spec)
    device = per_group.device
    if spec.axis == 1:
        places = torch.arange(rows * columns, device=device) // (rows * columns // len(per_group))
    else:
        places = torch.arange(rows * columns, device=device) % len(per_group)
    return per_group.flatten()[places].view(rows, columns)


def runs_on(shape: tuple[int, int], spec: LinearSpec) -> bool:
    """Whether groups run on from one output into the next, which no format for other readers can say."""
    return spec.axis == 1 and bool(shape[1] % group_of(shape, spec))
