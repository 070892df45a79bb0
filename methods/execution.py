"""Int4 execution: from a decoder that simulates quantisation to one that runs on packed codes.

A simulated decoder holds floats that stand for codes. `pack_decoder` drops them: every rounded linear keeps
its packed codes alone, inputs enter it as codes, and keys and values are held and attended to as codes. The
operations are those of kernels/ops.py, which counts what ran. The graph, the transforms and the quantisers
are the same in both, so the results differ by the order of floating-point sums alone; harness/parity.py
measures by how much.

`merge_projections` serves either execution: linears that read one input alike become one, which is one
matrix product, and one launch on a GPU, in the place of two or three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.reference import PackedWeight
from methods.decoder import MERGED, Block, Decoder
from methods.linear import Linear, OnlineHadamard

EXECUTIONS = ("simulate", "int4")


def pack_decoder(model: Decoder) -> list[str]:
    """Switch a decoder whose quantisers are set to int4 execution, in place, one linear at a time.

    Returns notes on what stays in floating point although the decoder is quantised.
    """
    floats: list[str] = []
    for name, linear in model.linears():
        if linear.quantised is not None:
            linear.pack()
        elif linear.packed is None and linear.activation is not None:
            floats.append(name)
    for block in model.layers:
        assert isinstance(block, Block)
        block.self_attn.packed = block.self_attn.kv is not None
    for module in model.modules():
        if isinstance(module, OnlineHadamard):
            module.packed = True
    model.execution = "int4"
    if not floats:
        return []
    return [
        f"{len(floats)} linears have 16-bit weights and no integer product: their quantised inputs are "
        f"simulated ({floats[0]}, ...)"
    ]


def merge_projections(model: Decoder) -> list[str]:
    """Make q, k and v one linear (`qkv_proj`) and gate and up one (`gate_up_proj`) wherever they read their
    input alike and have one form, in place; the last step before a decoder runs, since from then on its
    linears have other names and it cannot be written or rounded.

    Weights, codes and scales are those of the parts to the bit, and so are integer products; floating-point
    ones are, as far as the library sums a matrix of more rows in the same order. Returns notes on what stays
    apart.
    """
    apart: dict[str, list[str]] = {}
    for index, block in enumerate(model.layers):
        assert isinstance(block, Block)
        for half, name in ((block.self_attn, "qkv_proj"), (block.mlp, "gate_up_proj")):
            if getattr(half, name) is not None:
                continue
            one = _merged([getattr(half, part) for part in MERGED[name]])
            if isinstance(one, str):
                apart.setdefault(f"{' and '.join(MERGED[name])}: {one}", []).append(str(index))
                continue
            for part in MERGED[name]:
                delattr(half, part)
            setattr(half, name, one)
    return [f"layers {', '.join(layers)}: not merged, {reason}" for reason, layers in apart.items()]


def _merged(parts: Sequence[Linear]) -> Linear | str:
    """One linear whose outputs are those of all `parts`, one behind the other; or why there is none, in a
    phrase. Its weight is a copy of theirs, to the bit.

    Merged are linears that read one input alike (`shares_input_with`, or by equal static ranges), all plain
    or all packed in one form, with groups along the inputs, and all or none with a bias.
    """
    first = parts[0]
    if any(part.observer is not None or part.code_observer is not None for part in parts):
        return "somebody watches an input"
    if any(not _alike(part, first) for part in parts):
        return "inputs are quantised differently"
    if any(part.quantised is not None for part in parts):
        return "rounded weights are not packed"
    if len({(part.bias is None, part.kept is None) for part in parts}) > 1:
        return "not all have a bias, or kept columns"
    packs = [part.packed for part in parts if part.packed is not None]
    if len({_form(packed) for packed in packs}) > 1:
        return "weights are quantised differently"
    if any(packed.axis == 0 for packed in packs):
        return "groups of weights run along the outputs"
    outputs, inputs = sum(part.shape[0] for part in parts), first.shape[1]
    with torch.device("meta"):
        one = Linear(inputs, outputs)
    one.activation, one.keep = first.activation, first.keep
    one.input_scale, one.input_zero = first.input_scale, first.input_zero
    if packs:
        one.set_weight(first.weight)  # empty; what it says is the dtype
        kept = None if first.kept is None else _stacked([part.kept for part in parts])
        one.take_packed(_stacked_codes(packs), kept)
    else:
        one.set_weight(_stacked([part.weight for part in parts]))
    if first.bias is not None:
        one.bias = nn.Parameter(_stacked([part.bias for part in parts]), requires_grad=False)
    return one.train(first.training)


def _alike(one: Linear, other: Linear) -> bool:
    """Whether both quantise one input to the same numbers, by static ranges of equal values too."""

    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    return (
        (one.activation, one.keep, one.packed is None, one.weight.dtype)
        == (other.activation, other.keep, other.packed is None, other.weight.dtype)
        and same(one.input_scale, other.input_scale)
        and same(one.input_zero, other.input_zero)
    )


def _form(w: PackedWeight) -> tuple[object, ...]:
    """What codes of several outputs must share to lie in one weight."""
    return w.bits, w.inputs, w.signed, w.axis, w.group, w.scale.dtype, w.zero is None, w.colsum is None


def _stacked(parts: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([part.detach() for part in parts if part is not None])


def _stacked_codes(parts: Sequence[PackedWeight]) -> PackedWeight:
    """The outputs of several weights, one behind the other."""
    first = parts[0]
    return replace(
        first,
        packed=_stacked([w.packed for w in parts]),
        scale=_stacked([w.scale for w in parts]),
        zero=None if first.zero is None else _stacked([w.zero for w in parts]),
        colsum=None if first.colsum is None else _stacked([w.colsum for w in parts]),
    )
