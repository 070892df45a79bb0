"""What quantising each matrix does to what its layer computes, and how heavy the tails of its weights are.

Activation sensitivity (Zhang et al. 2025, arXiv 2503.06518, as its published code computes it): layer by
layer, on inputs that come from the full-precision model alone, the mean squared error of a part's output when
that part's weights are rounded (by HQQ to 4 bits in groups of 64, or fewer where 64 does not divide them).

    part       rounded together    output compared
    attn_in    q, k, v             of attention, behind o_proj
    attn_out   o_proj              of o_proj
    mlp_gate   gate, up            of the MLP, behind down_proj
    mlp_down   down_proj           of down_proj

No part is compared on an output that another part's rounded weights take part in, so their order does not
matter, and each part's weights are put back before the next is measured. The paper's text has another
reading, the squared error over the sum of |output|; both are measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from methods.bits import LinearSpec
from methods.decoder import Block, Decoder
from methods.hqq import as_hqq, round_hqq
from methods.linear import Linear
from methods.method import Context
from methods.rounding import SITES, Rounder
from methods.rtn import round_to_nearest

PARTS = dict(zip(("attn_in", "attn_out", "mlp_gate", "mlp_down"), SITES, strict=True))
READINGS = ("mse", "normalised")
QUANTISERS = ("hqq", "rtn")
_VALUES = 1 << 24  # of a matrix, taken to float64 at a time

Layers = dict[str, list[float]]
"""One value a layer, by matrix ("self_attn.q_proj") or part."""


def measuring(quantiser: str, axis: int = 1, meta: bool = False) -> tuple[Rounder, LinearSpec]:
    """How weights are rounded to see what that does: by hqq or rtn, to 4 bits in groups of 64."""
    spec = as_hqq(LinearSpec(4, group=64), axis, meta)
    return (round_hqq, spec) if quantiser == "hqq" else (round_to_nearest, replace(spec, meta=False))


@dataclass
class _Error:
    """Sums over everything that a part has put out."""

    squares: float = 0.0
    magnitude: float = 0.0
    values: int = 0

    def add(self, exact: Tensor, rounded: Tensor) -> None:
        self.squares += float((rounded - exact).to(torch.float64).square().sum())
        self.magnitude += float(exact.to(torch.float64).abs().sum())
        self.values += exact.numel()

    def readings(self) -> tuple[float, float]:
        return self.squares / self.values, self.squares / max(self.magnitude, 1e-300)


@torch.no_grad()
def activation_sensitivity(
    model: Decoder, calibration: Tensor, ctx: Context, *, rounder: Rounder, spec: LinearSpec
) -> dict[str, Layers]:
    """{"mse" and "normalised": {part: a value for each layer}} on calibration tokens [samples, length].

    One block at a time on `ctx.device`; beside the model, memory holds one block's rounded weights and the
    hidden states of the calibration tokens. The model is left as it is.
    """
    found: dict[str, Layers] = {reading: {part: [] for part in PARTS} for reading in READINGS}
    states = model.batches(calibration, ctx.device)
    for index, block in model.stream_blocks(ctx.device):
        rounded = {
            name: rounder(weight=linear.weight, spec=_fitting(linear, spec))
            .dequantise()
            .to(linear.weight.dtype)
            for name, linear in block.linears()
        }
        errors = {part: _Error() for part in PARTS}
        for number, state in enumerate(states):
            with _watched(block) as calls:
                states[number] = model.through(block, state)
            for part, module in (("attn_in", block.self_attn), ("mlp_gate", block.mlp)):
                args, kwargs, exact = calls[module]
                with _weights(block, {name: rounded[name] for name in PARTS[part]}):
                    errors[part].add(exact, module(*args, **kwargs))
            for part, module, linear in (
                ("attn_out", block.self_attn, block.self_attn.o_proj),
                ("mlp_down", block.mlp, block.mlp.down_proj),
            ):
                exact, x = calls[module][2], calls[linear]
                errors[part].add(exact, exact + x @ (rounded[PARTS[part][0]] - linear.weight).T)
        for part, error in errors.items():
            for reading, value in zip(READINGS, error.readings(), strict=True):
                found[reading][part].append(value)
        ctx.report("activation sensitivity", index + 1, model.config.layers)
    return found


def _fitting(linear: Linear, spec: LinearSpec) -> LinearSpec:
    """The spec with the largest group, up to its own, that divides the linear's weights."""
    count = math.prod(linear.shape)
    size = spec.group or count
    return replace(spec, group=next(group for group in range(size, 0, -1) if count % group == 0))


@contextmanager
def _watched(block: Block) -> Iterator[dict[nn.Module, Any]]:
    """What a pass shows: of attention and MLP (arguments, keyword arguments, output), of the linears at their
    ends the input that they multiply."""
    calls: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        calls[module] = args, kwargs, output

    linears = (block.self_attn.o_proj, block.mlp.down_proj)
    hooks = [part.register_forward_hook(keep, with_kwargs=True) for part in (block.self_attn, block.mlp)]
    for linear in linears:
        linear.observer = lambda x, linear=linear: calls.__setitem__(linear, x)
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
        for linear in linears:
            linear.observer = None


@contextmanager
def _weights(block: Block, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights for some linears, which get their own back."""
    linears = {name: linear for name, linear in block.linears() if name in weights}
    own = {name: linear.weight for name, linear in linears.items()}
    try:
        for name, linear in linears.items():
            linear.set_weight(weights[name])
        yield
    finally:
        for name, linear in linears.items():
            linear.weight = own[name]


def of_matrices(parts: Layers, *, own_output: bool) -> Layers:
    """The value of each matrix from those of the parts: its part's.

    own_output: whether o_proj has that of attn_out; else it has attn_in's, as in the published code where
    o_proj and v_proj differ in shape (grouped queries).
    """
    return {
        name: list(parts[part if part != "attn_out" or own_output else "attn_in"])
        for part, names in PARTS.items()
        for name in names
    }


def grouped_queries(model: Decoder) -> bool:
    """Whether v_proj and o_proj differ in shape: o_proj then goes by the sensitivity of q, k and v."""
    shapes = {name: linear.shape for name, linear in model.linears()}
    return shapes["layers.0.self_attn.v_proj"] != shapes["layers.0.self_attn.o_proj"]


@torch.no_grad()
def weight_kurtosis(model: Decoder, ctx: Context) -> Layers:
    """Pearson kurtosis (4th standardised moment, 3 for a Gaussian; biased) of every matrix's weights, in
    float64, one block at a time on `ctx.device`."""
    found: Layers = {name: [] for names in PARTS.values() for name in names}
    for index, block in model.stream_blocks(ctx.device):
        for name, linear in block.linears():
            found[name].append(pearson_kurtosis(linear.weight))
        ctx.report("kurtosis of weights", index + 1, model.config.layers)
    return found


def pearson_kurtosis(weight: Tensor) -> float:
    """Of all values of a tensor, a piece at a time; NaN where they are all the same."""
    pieces = weight.flatten().split(_VALUES)
    count = weight.numel()
    mean = sum(float(piece.to(torch.float64).sum()) for piece in pieces) / count
    second = fourth = 0.0
    for piece in pieces:
        squares = (piece.to(torch.float64) - mean).square_()
        second += float(squares.sum())
        fourth += float(squares.square_().sum())
    return fourth / count / (second / count) ** 2 if second else float("nan")


def steps(values: Sequence[float], *, ratio: bool) -> list[float]:
    """From each layer to the next: quotient or difference; NaN where the quotient is by nothing."""
    pairs = itertools.pairwise(values)
    if ratio:
        return [after / before if before > 0 else math.nan for before, after in pairs]
    return [after - before for before, after in pairs]


def aligned(first: Sequence[float], second: Sequence[float]) -> tuple[list[float], list[float]]:
    """Two models' values at the same relative depths: those of the one with more layers are read, by linear
    interpolation, at the places of the other."""
    if len(first) > len(second):
        return aligned(second, first)[::-1]
    if len(first) < 2 or len(first) == len(second):
        return list(first), list(second)[: len(first)]
    values = torch.tensor(second, dtype=torch.float64)
    places = torch.linspace(0, len(second) - 1, len(first), dtype=torch.float64)
    low = places.floor().long().clamp(max=len(second) - 2)
    return list(first), torch.lerp(values[low], values[low + 1], places - low).tolist()


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's correlation of values of equal number; NaN for fewer than three, or where all are alike."""
    if len(first) < 3:
        return math.nan
    return float(torch.corrcoef(torch.stack([_ranks(torch.tensor(x)) for x in (first, second)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Places in ascending order, equal values sharing their mean place."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(torch.float64)
    return (last - (counts - 1) / 2)[inverse]
