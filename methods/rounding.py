"""Rounding weights, block by block: the named stage between a method's transform and its evaluation.

GPTQ sees each block's inputs as the blocks before it, already rounded, produce them; activations are not
quantised while rounding. Beside the model, memory holds one block's Hessians and the hidden states of the
calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from methods.bits import LinearSpec
from methods.decoder import Block, Decoder, State
from methods.errors import UserError
from methods.gptq import Hessian, solve
from methods.groups import runs_on
from methods.hqq import as_hqq, round_hqq
from methods.linear import Linear, QuantisedWeight
from methods.method import Context, Plan
from methods.rtn import round_to_nearest

Rounder = Callable[..., QuantisedWeight]
"""Rounds weight [out, in - keep] by a LinearSpec, given as `weight` and `spec`."""

# Linears that read the same input, in the order in which GPTQ rounds them.
SITES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class RoundingError:
    """Relative error ‖Ŵ - W‖ / ‖W‖ (Frobenius) of one rounded linear."""

    linear: str
    relative_error: float


def for_rounding(plan: Plan, rounding: str, axis: int, meta: bool) -> Plan:
    """The plan as `rounding` carries it out: for hqq asymmetric with fractional zero-points, and groups along
    the axis asked for."""
    if meta and rounding != "hqq":
        raise UserError(f"meta=true with rounding {rounding}: only hqq quantises scales and zero-points")
    specs = plan.linears
    if rounding == "hqq":
        specs = {name: as_hqq(spec, axis, meta) if spec.bits < 16 else spec for name, spec in specs.items()}
    elif axis == 0:
        specs = {name: replace(spec, axis=0) if spec.bits < 16 else spec for name, spec in specs.items()}
    return replace(plan, linears=specs)


def rounding_notes(model: Decoder, plan: Plan) -> list[str]:
    """What weight groups and zero-points are, where that is not what the shared settings say."""
    notes = []
    if any(spec.fractional for spec in plan.linears.values()):
        notes.append(
            "hqq: asymmetric with fractional zero-points, no range search, whatever the shared setting"
        )
    running = [
        name
        for name, linear in model.linears()
        if (spec := plan.linears.get(name)) is not None
        and spec.bits < 16
        and runs_on((linear.shape[0], linear.shape[1] - spec.keep), spec)
    ]
    if not running:
        return notes
    return [
        *notes,
        f"groups of {len(running)} linears do not divide their inputs and run on into the next output "
        f"({running[0]}, ...); packed, their scales are held once for every output that they touch",
    ]


@torch.no_grad()
def round_weights(
    model: Decoder,
    specs: dict[str, LinearSpec],
    rounding: str,
    ctx: Context,
    *,
    calibration: Tensor | None = None,
    damp: float = 0.01,
    act_order: bool = False,
) -> list[RoundingError]:
    """Round every linear that `specs` names with fewer than 16 bits, in place.

    calibration: token ids [samples, length], needed by gptq. Returns each rounded linear's weight error.
    """
    strangers = sorted(specs.keys() - dict(model.linears()).keys())
    if strangers:
        raise UserError(f"unknown linears in the plan: {', '.join(strangers[:3])}")
    errors: list[RoundingError] = []
    states: list[State] = []
    if rounding == "gptq":
        if calibration is None:
            raise UserError("gptq needs calibration tokens")
        states = model.batches(calibration, ctx.device)
    for index, block in model.stream_blocks(ctx.device):
        named = dict(block.linears())
        for site in SITES:
            chosen = {
                name: specs[f"layers.{index}.{name}"] for name in site if f"layers.{index}.{name}" in specs
            }
            chosen = {name: spec for name, spec in chosen.items() if spec.bits < 16}
            if not chosen:
                continue
            if rounding == "gptq":
                keep = {spec.keep for spec in chosen.values()}
                if len(keep) != 1:
                    raise UserError("linears that read one input must keep the same columns")
                hessian = _hessian(model, block, named[site[0]], states, keep.pop())
                rounder: Rounder = partial(solve, hessian=hessian, damp=damp, act_order=act_order)
            else:
                rounder = round_hqq if rounding == "hqq" else round_to_nearest
            together = rounding != "hqq"  # HQQ looks at a whole matrix when it decides where to stop
            for name, error in _round_site(
                {name: named[name] for name in chosen}, chosen, rounder, together
            ).items():
                errors.append(RoundingError(f"layers.{index}.{name}", error))
        if rounding == "gptq":
            states = [model.through(block, state) for state in states]
        ctx.report(f"{rounding} rounding", index + 1, model.config.layers)
    return errors


def _round_site(
    linears: dict[str, Linear],
    specs: dict[str, LinearSpec],
    rounder: Rounder,
    together: bool,
) -> dict[str, float]:
    """Round linears of one input; where they may be, those of equal spec together, as rows of one matrix."""
    errors: dict[str, float] = {}
    for spec in dict.fromkeys(specs.values()):
        names = [name for name in linears if specs[name] == spec]
        weights = [linears[name].weight[:, spec.keep :] for name in names]
        apart = spec.axis == 0 or not together
        if apart or any(runs_on((weight.shape[0], weight.shape[1]), spec) for weight in weights):
            parts = [rounder(weight=weight, spec=spec) for weight in weights]
        else:
            parts = _split(
                rounder(weight=torch.cat(weights), spec=spec), [weight.shape[0] for weight in weights]
            )
        for name, weight, part in zip(names, weights, parts, strict=True):
            difference = part.dequantise().to(weight.dtype) - weight
            errors[name] = float(difference.norm() / weight.norm().clamp(min=1e-30))
            linears[name].round_to(part)
    return errors


def _split(quantised: QuantisedWeight, rows: list[int]) -> list[QuantisedWeight]:
    zeros = [None] * len(rows) if quantised.zero is None else quantised.zero.split(rows)
    return [
        QuantisedWeight(codes, scale, zero, quantised.spec)
        for codes, scale, zero in zip(
            quantised.codes.split(rows), quantised.scale.split(rows), zeros, strict=True
        )
    ]


class _Captured(BaseException):
    """Ends a block's forward once the input it was run for has been seen."""


def _hessian(model: Decoder, block: Block, linear: Linear, states: list[State], keep: int) -> Tensor:
    hessian = Hessian()

    def observe(x: Tensor) -> None:
        hessian.add(x[..., keep:])
        raise _Captured

    linear.observer = observe
    try:
        for state in states:
            try:
                model.through(block, state)
            except _Captured:
                continue
    finally:
        linear.observer = None
    assert hessian.matrix is not None
    return hessian.matrix
