"""SensiBoost and KurtBoost (Zhang et al. 2025, arXiv 2503.06518): more bits for matrices that stand out.

Per matrix type (q_proj, ..., down_proj), a value of every layer - activation sensitivity, or the kurtosis of
the weights - and its step from layer to layer, d_i = s_{i+1} / s_i or k_{i+1} - k_i. With mean and standard
deviation of the steps, 5 % cut off at each end, layer i + 1 stands out where |d_i - mean| > 3 deviations:
after a sharp drop as well as after a rise, and never layer 0. What stands out goes `stop` rungs up a ladder
of bits and groups, the rest stays as it is. That choosing beats not choosing is what `choice=random` tests:
as many matrices of each type, drawn from those that do not stand out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.bits import Bits, QuantiserSettings
from methods.decoder import Decoder
from methods.errors import UserError
from methods.hqq import META_BITS, META_GROUP, hqq_layout
from methods.method import Artifact, Context, Method, Plan, choose
from methods.sensitivity import (
    QUANTISERS,
    READINGS,
    Layers,
    activation_sensitivity,
    grouped_queries,
    measuring,
    of_matrices,
    steps,
    weight_kurtosis,
)

TRIMMED = 0.05
LADDER = tuple((bits, group) for bits in (2, 3, 4, 8) for group in (128, 64, 32))
"""Bits and group of each rung, in ascending order of `nominal_bits`."""


def nominal_bits(bits: int, group: int | None) -> float:
    """Bits per weight by the authors' formula: scale and zero-point in 8 bits, and 32 bits more for 128 of
    them. Without groups, of a whole row, scales count for nothing."""
    return bits if group is None else bits + (2 * META_BITS + 32 / META_GROUP) / group


def promoted(bits: int, group: int | None, stop: int) -> tuple[int, int | None]:
    """Bits and group `stop` rungs up the ladder, at most its last; what is no rung starts from its place
    between two. What lies above the ladder stays."""
    above = [rung for rung in LADDER if nominal_bits(*rung) > nominal_bits(bits, group)]
    return above[min(stop, len(above)) - 1] if above and stop else (bits, group)


@dataclass(frozen=True)
class Outlier:
    """A layer that stands out, by `z` standard deviations of the steps."""

    layer: int
    z: float


def outliers(values: Sequence[float], *, ratio: bool, threshold: float = 3.0) -> list[Outlier]:
    """Layers whose step stands out, the farthest first. Steps that are not finite count for nothing; none
    stands out where the trimmed steps are all the same."""
    found = steps(values, ratio=ratio)
    known = sorted(step for step in found if math.isfinite(step))
    cut = int(TRIMMED * len(known))
    trimmed = torch.tensor(known[cut : len(known) - cut], dtype=torch.float64)
    if len(trimmed) < 2:
        return []
    mean, deviation = float(trimmed.mean()), float(trimmed.std())
    if not deviation > 0:
        return []
    scores = [(abs(step - mean) / deviation, layer) for layer, step in enumerate(found, start=1)]
    standing = [(z, layer) for z, layer in scores if math.isfinite(z) and z > threshold]
    return [Outlier(layer, z) for z, layer in sorted(standing, key=lambda pair: -pair[0])]


def drawn(layers: int, taken: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    """`count` of the layers that are not `taken`, the last left out as in the authors' control, ascending;
    all of them where there are fewer."""
    rest = [layer for layer in range(layers - 1) if layer not in taken]
    order = torch.randperm(len(rest), generator=generator)[:count]
    return sorted(rest[place] for place in order.tolist())


@dataclass(frozen=True, kw_only=True)
class Boost(Method):
    """What SensiBoost and KurtBoost share: from values to more bits for some matrices."""

    paper: ClassVar[str] = "Zhang et al. 2025, arXiv 2503.06518"
    after_learning: ClassVar[tuple[str, ...]] = ("stop", "top", "choice", "threshold")
    ratio: ClassVar[bool]
    rounding: str = "hqq"
    stop: int = 2
    top: int = 0
    choice: str = "outliers"
    threshold: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("choice", self.choice, ("outliers", "random"))
        if self.stop < 1:
            raise UserError(f"{self.name}: stop {self.stop}: give the rungs to go up, 2 or 3 in the paper")
        if self.top < 0:
            raise UserError(f"{self.name}: top {self.top}: give how many layers of a matrix type, 0 for all")
        if not self.threshold > 0:
            raise UserError(f"{self.name}: threshold {self.threshold}: give a number above 0, 3 in the paper")

    @property
    def draws(self) -> bool:
        return self.choice == "random"

    def layout(self) -> tuple[int, bool]:
        return hqq_layout(self)

    def values(self, artifact: Artifact) -> Layers:
        """What the layers are compared by."""
        raise NotImplementedError

    def outliers(self, artifact: Artifact) -> dict[str, list[Outlier]]:
        """By matrix type, the layers that stand out, before `top`."""
        return {
            name: outliers(layers, ratio=self.ratio, threshold=self.threshold)
            for name, layers in self.values(artifact).items()
        }

    def boosted(self, artifact: Artifact) -> dict[str, list[int]]:
        """By matrix type, the layers that get more bits, ascending; matrices without any are left out."""
        found = self.outliers(artifact)
        chosen = {name: sorted(o.layer for o in some[: self.top or None]) for name, some in found.items()}
        if self.draws:
            generator = torch.Generator().manual_seed(artifact.meta["seed"])
            for name, values in self.values(artifact).items():
                taken = [outlier.layer for outlier in found[name]]
                chosen[name] = drawn(len(values), taken, len(chosen[name]), generator)
        return {name: layers for name, layers in chosen.items() if layers}

    def findings(self, artifact: Artifact) -> list[str]:
        boosted = self.boosted(artifact)
        count = sum(map(len, boosted.values()))
        if not count:
            return ["no layer stands out, so nothing is boosted: this is the method's base"]
        stands = self.outliers(artifact).items()
        far = {(name, one.layer): f"{one.layer} (z {one.z:.1f})" for name, some in stands for one in some}
        where = ", ".join(
            " ".join([_leaf(name), *(far.get((name, layer), str(layer)) for layer in layers)])
            for name, layers in boosted.items()
        )
        how = f"drawn at random with seed {artifact.meta['seed']}" if self.draws else "that stand out"
        return [f"{count} matrices {how} are {self.stop} rungs up the ladder; layers: {where}"]

    def plan(
        self, model: Decoder, bits: Bits, settings: QuantiserSettings, artifact: Artifact, base: Plan
    ) -> Plan:
        specs = dict(base.linears)
        for name, layers in self.boosted(artifact).items():
            for layer in layers:
                full = f"layers.{layer}.{name}"
                spec = specs[full]
                if spec.bits < 16:
                    rung = promoted(spec.bits, spec.group, self.stop)
                    specs[full] = replace(spec, bits=rung[0], group=rung[1])
        return replace(base, linears=specs)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2].removesuffix("_proj")


def _artifact(method: Boost, ctx: Context, started: float, meta: dict[str, Any]) -> Artifact:
    seed = {"seed": ctx.seed} if method.draws else {}
    return Artifact(meta={**meta, **seed, "measured": {"learn_seconds": time.perf_counter() - started}})


@dataclass(frozen=True, kw_only=True)
class SensiBoost(Boost):
    """More bits for matrices that matter to what their layer computes, much more or less than those a layer
    before: `stop` rungs up the ladder for the `top` layers (0: all) of each type whose step in activation
    sensitivity stands out by more than `threshold` deviations, or with choice=random for as many others.
    `score`: mse or normalised; `quantiser` of the measurement: hqq or rtn; `own_output` has o_proj go by its
    own sensitivity in models with grouped queries, too."""

    name: ClassVar[str] = "sensiboost"
    needs: ClassVar[tuple[str, ...]] = ("calibration",)
    after_learning: ClassVar[tuple[str, ...]] = (*Boost.after_learning, "score", "own_output")
    ratio: ClassVar[bool] = True
    score: str = "mse"
    quantiser: str = "hqq"
    own_output: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("score", self.score, READINGS)
        choose("quantiser", self.quantiser, QUANTISERS)

    def calibration_shape(self) -> tuple[int, int]:
        samples, _ = super().calibration_shape()
        return samples, self.length or 512

    def learn(self, model: Decoder, calibration: Tensor | None, ctx: Context) -> Artifact:
        if calibration is None:
            raise UserError(f"{self.name} needs calibration tokens")
        started = time.perf_counter()
        rounder, spec = measuring(self.quantiser, *self.layout())
        readings = activation_sensitivity(model, calibration, ctx, rounder=rounder, spec=spec)
        grouped = grouped_queries(model)
        meta = {"readings": readings, "grouped_queries": grouped, "tokens": calibration.numel()}
        return _artifact(self, ctx, started, meta)

    def values(self, artifact: Artifact) -> Layers:
        own_output = self.own_output or not artifact.meta["grouped_queries"]
        return of_matrices(artifact.meta["readings"][self.score], own_output=own_output)


@dataclass(frozen=True, kw_only=True)
class KurtBoost(Boost):
    """More bits for matrices whose weights have much heavier or lighter tails than those a layer before:
    `stop` rungs up the ladder for the `top` layers (0: all) of each type whose step in kurtosis stands out by
    more than `threshold` deviations, or with choice=random for as many others."""

    name: ClassVar[str] = "kurtboost"
    ratio: ClassVar[bool] = False

    def learn(self, model: Decoder, calibration: Tensor | None, ctx: Context) -> Artifact:
        started = time.perf_counter()
        return _artifact(self, ctx, started, {"kurtosis": weight_kurtosis(model, ctx)})

    def values(self, artifact: Artifact) -> Layers:
        found: Layers = artifact.meta["kurtosis"]
        return found
