"""What a method is: a frozen dataclass of options that supplies any of five stages.

learn → transform → plan → (ranges) → (tune) run in this order; rounding is a separate, named stage between
plan and ranges. What a method leaves out has the default given here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from methods.bits import Bits, KVSpec, LinearSpec, QuantiserSettings
from methods.decoder import Decoder
from methods.errors import UserError

if TYPE_CHECKING:
    from methods.descent import Snapshots

ROUNDINGS = ("rtn", "gptq", "hqq")
PLAIN_LAYOUT = (1, False)
"""Weight groups along the inputs, scales and zero-points not quantised: see `Method.layout`."""


@dataclass(frozen=True)
class Artifact:
    """What a method has learned: tensors and JSON-able facts about how (keys of objects are text)."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """Where and how a stage runs. `progress(stage, done, total)` may be called as work advances.

    `cache`: the folder in which learned artifacts are kept and shared (None: they are not kept).
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    progress: Callable[[str, int, int], None] | None = None
    cache: Path | None = None

    def report(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)


@dataclass(frozen=True)
class Plan:
    """Quantiser of every linear (by its full name) and of the KV cache; `known`: static ranges, named as in
    `Method.ranges`, that a method has learned."""

    linears: dict[str, LinearSpec]
    kv: KVSpec | None
    known: dict[str, Tensor] = field(default_factory=dict)

    @property
    def static(self) -> bool:
        """Whether any linear's input or the KV cache has a static range."""
        activations = (spec.activation for spec in self.linears.values())
        return any(spec is not None and spec.static for spec in (*activations, self.kv))


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods; its fields are the options that every method has.

    preset: "quick" (minutes on two CPU cores) or "paper" (what the paper did). rounding: how weights
    are rounded after the transform. samples, length: calibration sequences and their tokens (None:
    the preset's). damp, act_order: GPTQ's. group_axis: weight groups along the inputs (1) or the
    outputs (0; rtn and hqq in weight-only settings); meta: scales and zero-points in 8 bits (hqq); None: the
    preset's.
    """

    preset: str = "quick"
    rounding: str = "rtn"
    samples: int | None = None
    length: int | None = None
    damp: float = 0.01
    act_order: bool = False
    group_axis: int | None = None
    meta: bool | None = None

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    """What it takes beyond a checkpoint: "calibration", "gradients", "a special checkpoint"."""
    random: ClassVar[bool] = False
    """Whether its learn stage draws random numbers, calibration text aside."""
    after_learning: ClassVar[tuple[str, ...]] = ()
    """Options of its own that act only once it has learned: whatever they are, what is learned is shared."""
    seams: ClassVar[frozenset[str]] = frozenset()
    """Seams of the decoder that it transforms; two methods on one seam do not compose."""

    def __post_init__(self) -> None:
        choose("preset", self.preset, ("quick", "paper"))
        choose("rounding", self.rounding, ROUNDINGS)
        for option in ("samples", "length"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UserError(f"{self.name}: {option} {value}: give a positive number")
        if not 0 < self.damp < 1:
            raise UserError(f"{self.name}: damp {self.damp}: give a share between 0 and 1")
        if self.group_axis not in (None, 0, 1):
            raise UserError(
                f"{self.name}: group_axis {self.group_axis}: give 1 (input channels) or 0 (output channels)"
            )

    def require(self, model: Decoder) -> None:
        """Raise NotApplicableError, with the reason, where a checkpoint's float model is none that this
        method is for. Called before anything else; must not change the model."""

    def learn(self, model: Decoder, calibration: Tensor | None, ctx: Context) -> Artifact:
        """Learn from the float model and calibration tokens [samples, length]; must not change the model.

        calibration: None unless `needs` names it. The artifact may be stored and shared: it may depend on
        nothing but the model, the options, the calibration tokens and, where `random`, `ctx.seed`.
        """
        return Artifact()

    def transform(self, model: Decoder, artifact: Artifact) -> Decoder:
        """A function-preserving change of the decoder, merged in float64. Takes the model over: it may
        change it in place, block by block, so that one block's memory suffices."""
        return model

    def plan(
        self, model: Decoder, bits: Bits, settings: QuantiserSettings, artifact: Artifact, base: Plan
    ) -> Plan:
        """Bits, group, symmetry and kept columns of each linear; `base` is the plan so far."""
        return base

    def ranges(self, model: Decoder, plan: Plan, calibration: Tensor, ctx: Context) -> Artifact:
        """Static ranges of the transformed and rounded model: for each linear with a static activation
        `<linear>.input_scale` and `.input_zero`, for a static KV cache `layers.N.self_attn.k_scale`,
        `k_zero`, `v_scale` and `v_zero`, scalars each, no zero where symmetric. By default the smallest
        and largest value on the calibration tokens; called only where the plan has something static.
        """
        from methods.ranges import min_max_ranges

        return min_max_ranges(model, plan, calibration, ctx)

    @property
    def tunes(self) -> bool:
        """Whether, with these options, it tunes the rounded model: the stages `tune_rounded` and `adjust`."""
        return False

    def tune_rounded(
        self, model: Decoder, calibration: Tensor, ctx: Context, snapshots: Snapshots | None
    ) -> Artifact:
        """Learn from the rounded model, its quantisers set and simulated, and all calibration tokens
        [samples, length]; must not change it. `snapshots`: where the state is kept, so that what is cut off
        goes on. The artifact may depend on what that of `learn` may, on bits, quantisers and rounding."""
        return Artifact()

    def adjust(self, model: Decoder, artifact: Artifact) -> None:
        """Change the rounded model, in place, as `tune_rounded` has learned."""

    def notes(self, model: Decoder) -> list[str]:
        """Departures from the paper on this model that a reader of the result must know."""
        return []

    def rounding_tokens(self, calibration: Tensor) -> Tensor:
        """The calibration tokens that rounding and static ranges read: [samples, length], by default all."""
        return calibration

    def findings(self, artifact: Artifact) -> list[str]:
        """What this method has learned that a reader of the result must know."""
        return []

    @property
    def draws(self) -> bool:
        """Whether its learn stage draws random numbers with these options."""
        return self.random

    def layout(self) -> tuple[int, bool]:
        """The axis of weight groups, and whether scales and zero-points are quantised: by default along the
        inputs, and not."""
        return 1 if self.group_axis is None else self.group_axis, bool(self.meta)

    def calibration_shape(self) -> tuple[int, int]:
        """Sequences and tokens each for calibration: the options, else the preset's."""
        samples, length = (128, 2048) if self.preset == "paper" else (32, 512)
        return self.samples or samples, self.length or length


def choose(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UserError unless an option's value is one of these."""
    if value not in choices:
        raise UserError(f"{option} {value!r}: choose one of {', '.join(choices)}")


def default_plan(model: Decoder, bits: Bits, settings: QuantiserSettings) -> Plan:
    """The same quantiser for every linear; lm_head and embedding stay as they are."""
    return Plan({name: settings.linear(bits) for name, _ in model.linears()}, settings.kv(bits))
