"""From a checkpoint to a quantised decoder: learn, transform, plan, round, find ranges, set the quantisers,
tune.

`a+b` composes methods: their transforms run in order, then their plans, then one rounding.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from methods import artifacts
from methods.bits import Bits, QuantiserSettings
from methods.checkpoint import Checkpoint
from methods.decoder import Block, Decoder
from methods.descent import Snapshots
from methods.errors import UserError
from methods.execution import EXECUTIONS, pack_decoder
from methods.kurtosis import SiteKurtosis, block_input_kurtosis
from methods.method import PLAIN_LAYOUT, Artifact, Context, Method, Plan, default_plan
from methods.ranges import set_ranges
from methods.rounding import RoundingError, for_rounding, round_weights, rounding_notes


@dataclass(frozen=True)
class Pipeline:
    """One or more methods and the rounding that follows them; `spec` is what the user wrote."""

    spec: str
    parts: tuple[Method, ...]

    def __post_init__(self) -> None:
        taken: dict[str, str] = {}
        for part in self.parts:
            for seam in sorted(part.seams):
                if seam in taken:
                    raise UserError(
                        f"{self.spec}: {taken[seam]} and {part.name} both transform the {seam} seam"
                    )
                taken[seam] = part.name

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    @property
    def is_float(self) -> bool:
        return self.name == "float"

    @cached_property
    def lead(self) -> Method:
        """The part whose rounding and calibration options hold: the last with a rounding of its own,
        since composing names the refinement last; a plain `rtn` default does not overrule `gptq`. What is
        written on any part holds for all."""
        return next((part for part in reversed(self.parts) if part.rounding != "rtn"), self.parts[-1])

    @property
    def rounding(self) -> str:
        return self.lead.rounding

    @property
    def needs_calibration(self) -> bool:
        """Whether learning or rounding reads calibration tokens; `calibrates` counts static ranges too."""
        return self.rounding == "gptq" or any("calibration" in part.needs for part in self.parts)

    @property
    def uses_seed(self) -> bool:
        """Whether another seed gives another model, static ranges aside (`seeded` counts them)."""
        return self.needs_calibration or any(part.draws for part in self.parts)

    def calibrates(self, bits: Bits, settings: QuantiserSettings) -> bool:
        """Whether any stage reads calibration tokens at these bits and settings."""
        return self.needs_calibration or settings.static(bits)

    def seeded(self, bits: Bits, settings: QuantiserSettings) -> bool:
        """Whether another seed gives another model at these bits and settings."""
        return self.uses_seed or settings.static(bits)

    def calibration_shape(self, samples: int | None, length: int | None) -> tuple[int, int]:
        """Calibration sequences and tokens each: the lead's own options, else (but for paper presets) those
        given, else the preset's."""
        preset = self.lead.calibration_shape()
        if self.lead.preset == "paper":
            return preset
        own = (self.lead.samples, self.lead.length)
        first, second = (
            next(value for value in choice if value is not None)
            for choice in zip(own, (samples, length), preset, strict=True)
        )
        return first, second

    @property
    def ranger(self) -> Method:
        """The part that finds static ranges: the last with a way of its own, else any."""
        own = [part for part in self.parts if type(part).ranges is not Method.ranges]
        return own[-1] if own else self.lead


@dataclass
class Quantised:
    """A decoder ready to evaluate, and what making it took."""

    decoder: Decoder
    plan: Plan
    notes: list[str] = field(default_factory=list)
    rounding_errors: list[RoundingError] = field(default_factory=list)
    kurtosis: list[SiteKurtosis] = field(default_factory=list)
    learned: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the methods of the pipeline that learn say about how (`Artifact.meta`), by name."""
    seconds: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def quantise(
    checkpoint: Checkpoint,
    pipeline: Pipeline,
    bits: Bits,
    ctx: Context,
    *,
    settings: QuantiserSettings | None = None,
    calibration: Tensor | None = None,
    probe: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    execution: str = "simulate",
) -> Quantised:
    """Run all stages on a fresh copy of the checkpoint. calibration: token ids [samples, length]; on
    `probe`, ids [B, T], the kurtosis of block inputs is measured between transform and rounding.
    execution: "simulate" leaves floats that stand for codes, "int4" packs them (methods/execution.py)."""
    if execution not in EXECUTIONS:
        raise UserError(f"execution {execution!r}: choose one of {', '.join(EXECUTIONS)}")
    settings = settings or QuantiserSettings()
    if pipeline.is_float != bits.is_float:
        raise UserError(
            f"{pipeline.spec} at {bits}: float goes with w16a16, every other method with fewer bits"
        )
    if pipeline.needs_calibration and calibration is None:
        raise UserError(f"{pipeline.spec} needs calibration tokens")
    if settings.static(bits) and calibration is None:
        raise UserError(f"{pipeline.spec} at {bits}: static ranges need calibration tokens")
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[stage] = seconds.get(stage, 0.0) + now - started
        started = now

    model = checkpoint.load(dtype)
    for part in pipeline.parts:
        part.require(model)
    lap("load")
    learned: list[Artifact] = []
    notes: list[str] = []
    for part in pipeline.parts:
        learned.append(_learn(checkpoint, pipeline.parts[: len(learned) + 1], model, calibration, ctx))
        lap("learn")
        notes += [*part.notes(model), *part.findings(learned[-1])]
        model = part.transform(model, learned[-1])
        lap("transform")
    kurtosis = [] if probe is None else block_input_kurtosis(model, probe, ctx.device)
    lap("probe")
    plan = default_plan(model, bits, settings)
    for part, artifact in zip(pipeline.parts, learned, strict=True):
        plan = part.plan(model, bits, settings, artifact, plan)
    plan = for_rounding(plan, pipeline.rounding, *pipeline.lead.layout())
    notes += rounding_notes(model, plan)
    if plan.static and calibration is None:
        raise UserError(f"{pipeline.spec} plans static ranges and needs calibration tokens for them")
    tokens = None if calibration is None else pipeline.lead.rounding_tokens(calibration)
    errors: list[RoundingError] = []
    if bits.quantises_weights:
        lead = pipeline.lead
        errors = round_weights(
            model,
            plan.linears,
            pipeline.rounding,
            ctx,
            calibration=tokens,
            damp=lead.damp,
            act_order=lead.act_order,
        )
    lap("round")
    ranges = Artifact()
    if plan.static and tokens is not None:
        ranges = pipeline.ranger.ranges(model, plan, tokens, ctx)
        lap("ranges")
    set_quantisers(model, plan)
    facts = {part.name: found.meta for part, found in zip(pipeline.parts, learned, strict=True) if found.meta}
    for part in pipeline.parts:
        if part.tunes:
            set_ranges(model, ranges.tensors)
            tuned = _tune(checkpoint, pipeline, part, model, bits, settings, calibration, ctx)
            part.adjust(model, tuned)
            facts[part.name] = _with_tuning(facts.get(part.name, {}), tuned.meta)
            lap("tune")
    if execution == "int4":
        notes += pack_decoder(model)  # at home: the device never holds the floats of the whole model
        lap("pack")
    model = model.to(ctx.device)
    set_ranges(model, ranges.tensors)
    return Quantised(model, plan, notes, errors, kurtosis, facts, seconds)


def _learn(
    checkpoint: Checkpoint,
    parts: tuple[Method, ...],
    model: Decoder,
    calibration: Tensor | None,
    ctx: Context,
) -> Artifact:
    """What the last of `parts` learns from the model that those before it have transformed."""
    method = parts[-1]
    # A method sees the tokens only if it says so: what it stores is named by what it says it needs.
    tokens = calibration if "calibration" in method.needs else None

    def learner() -> Artifact:
        with torch.enable_grad():
            return method.learn(model, tokens, ctx)

    return artifacts.learn(
        parts,
        learner,
        ctx,
        model_sha256=checkpoint.sha256,
        dtype=model.dtype,
        calibration=calibration,
    )


def describe_tuning(
    checkpoint: Checkpoint,
    pipeline: Pipeline,
    part: Method,
    bits: Bits,
    settings: QuantiserSettings,
    dtype: torch.dtype,
    calibration: Tensor,
    ctx: Context,
) -> dict[str, Any]:
    """What `artifacts.describe` says of that which `part` tunes: the rounding belongs to it."""
    lead = pipeline.lead
    # What is plain enters no key, so that keys outlive new options.
    layout = {} if lead.layout() == PLAIN_LAYOUT else {"layout": list(lead.layout())}
    planning = {
        part.name: {option: getattr(part, option) for option in part.after_learning}
        for part in pipeline.parts
        if part.after_learning
    }
    rounded = {
        "tuned by": part.name,
        "bits": str(bits),
        "quantiser": asdict(settings),
        **{option: getattr(lead, option) for option in ("rounding", "damp", "act_order")},
        **layout,
        **({"planned by": planning} if planning else {}),
    }
    return artifacts.describe(
        pipeline.parts,
        ctx,
        model_sha256=checkpoint.sha256,
        dtype=dtype,
        calibration=calibration,
        rounded=rounded,
    )


def _tune(
    checkpoint: Checkpoint,
    pipeline: Pipeline,
    part: Method,
    model: Decoder,
    bits: Bits,
    settings: QuantiserSettings,
    calibration: Tensor | None,
    ctx: Context,
) -> Artifact:
    """What `part` finds to change in the rounded model."""
    if not bits.quantises_weights or calibration is None:
        raise UserError(f"{pipeline.spec} at {bits}: tuning needs quantised weights and calibration tokens")
    about = describe_tuning(checkpoint, pipeline, part, bits, settings, model.dtype, calibration, ctx)
    snapshots = None
    if ctx.cache is not None:
        snapshots = Snapshots(ctx.cache / f"{artifacts.key_of(about)}.unfinished.safetensors", about)

    def tuner() -> Artifact:
        with torch.enable_grad():
            return part.tune_rounded(model, calibration, ctx, snapshots)

    found = artifacts.kept(about, tuner, ctx)
    if snapshots is not None:
        snapshots.remove()
    return found


def _with_tuning(facts: dict[str, Any], tuning: dict[str, Any]) -> dict[str, Any]:
    """What a method says of how it learned, with what it says of tuning."""
    measured = {**facts.get("measured", {}), **tuning.get("measured", {})}
    said = {key: value for key, value in tuning.items() if key != "measured"}
    return {**facts, "tuning": said, **({"measured": measured} if measured else {})}


def set_quantisers(model: Decoder, plan: Plan) -> None:
    """Switch on the quantisers of linear inputs and of the KV cache."""
    if model.merged:
        raise ValueError("a plan names linears that this decoder has merged: set quantisers before")
    for name, linear in model.linears():
        spec = plan.linears.get(name)
        linear.activation = spec.activation if spec is not None else None
        linear.keep = spec.keep if spec is not None else 0  # also where the weight stays in 16 bit
    for block in model.layers:
        assert isinstance(block, Block)
        block.self_attn.kv = plan.kv
        if plan.kv is None:
            # It serves the cache alone and leaves the scores as they are.
            block.self_attn.rotation = None
