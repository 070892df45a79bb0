"""One asymmetric range per tensor for activations and KV cache, of least L_p error on calibration text.

Alone it is round-to-nearest with static ranges; behind another method (`quarot+static`) it makes that method
static, so that what a method gains and what its quantisers cost can be told apart in one grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from methods.bits import ActivationSpec, Bits, KVSpec, QuantiserSettings
from methods.decoder import Decoder
from methods.errors import UserError
from methods.method import Artifact, Context, Method, Plan
from methods.range_search import Histogram
from methods.ranges import static_ranges


def static_plan(base: Plan) -> Plan:
    """`base` with static asymmetric quantisers of activations and KV cache, of the same widths."""
    linears = {
        name: spec
        if spec.activation is None
        else replace(spec, activation=ActivationSpec(spec.activation.bits, symmetric=False, static=True))
        for name, spec in base.linears.items()
    }
    kv = None if base.kv is None else KVSpec(base.kv.bits, symmetric=False, static=True)
    return replace(base, linears=linears, kv=kv)


def least_error_ranges(
    model: Decoder, plan: Plan, calibration: Tensor, ctx: Context, norm: float
) -> dict[str, Tensor]:
    """Ranges of least L_norm error of everything static in the plan, but for those that it knows already."""
    needed = {
        f"{name}.input_scale"
        for name, spec in plan.linears.items()
        if spec.activation is not None and spec.activation.static
    }
    if plan.kv is not None and plan.kv.static:
        layers = range(model.config.layers)
        needed |= {f"layers.{layer}.self_attn.{part}_scale" for layer in layers for part in "kv"}
    if needed <= plan.known.keys():
        return dict(plan.known)
    found = static_ranges(model, plan, calibration, ctx, lambda: Histogram(norm)).tensors
    return {**found, **plan.known}


@dataclass(frozen=True, kw_only=True)
class Static(Method):
    """No transform; static asymmetric ranges, one per tensor, of least L_p error. norm: that p."""

    name: ClassVar[str] = "static"
    paper: ClassVar[str] = "RTN with L_p ranges, a baseline of van Breugel et al., FPTQuant, ICML 2026"
    needs: ClassVar[tuple[str, ...]] = ("calibration",)
    norm: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.norm > 0:
            raise UserError(f"static: norm {self.norm:g}: give a positive number")

    def plan(
        self, model: Decoder, bits: Bits, settings: QuantiserSettings, artifact: Artifact, base: Plan
    ) -> Plan:
        return static_plan(base)

    def ranges(self, model: Decoder, plan: Plan, calibration: Tensor, ctx: Context) -> Artifact:
        return Artifact(least_error_ranges(model, plan, calibration, ctx, self.norm))

    def notes(self, model: Decoder) -> list[str]:
        return [
            "activations and KV cache: one static asymmetric range per tensor, whatever the grid's quantiser"
        ]
