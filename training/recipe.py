"""What one training run is: the recipe, the model's shape, the rates and the schedule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from methods.decoder import DecoderConfig
from methods.errors import UserError
from methods.rope import RopeScaling


@dataclass(frozen=True)
class Recipe:
    """The parts of outlier-safe pre-training, each on or off.

    muon: hidden matrices, embedding projections and norms by Muon, embedding and head by Adam; else all by
    Adam. single_scale_norm: norms with one scalar. projections: learned d x d maps behind the embedding and
    in front of the head, absorbed after training.
    """

    muon: bool = False
    single_scale_norm: bool = False
    projections: bool = False


RECIPES = {
    "adam": Recipe(),
    "muon": Recipe(muon=True),
    "muon+ssnorm": Recipe(muon=True, single_scale_norm=True),
    "muon+embproj": Recipe(muon=True, projections=True),
    "osp": Recipe(muon=True, single_scale_norm=True, projections=True),
}


@dataclass(frozen=True)
class Shape:
    """Layers, width, heads (as many for keys and values) and hidden width of a model."""

    layers: int
    width: int
    heads: int
    hidden: int

    def config(self, recipe: Recipe, vocabulary: int, positions: int) -> DecoderConfig:
        if self.width % self.heads or self.width // self.heads % 2:
            raise UserError(f"{self.heads} heads do not part a width of {self.width} evenly")
        return DecoderConfig(
            family="llama",
            vocab_size=vocabulary,
            hidden_size=self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.width // self.heads,
            intermediate_size=self.hidden,
            rms_eps=1e-6,
            rope_theta=10_000.0,
            rope_scaling=RopeScaling(),
            max_positions=positions,
            tied=False,
            single_scale_norm=recipe.single_scale_norm,
            embedding_projections=recipe.projections,
            bos_id=0,
            eos_ids=(0,),
        )


SHAPES = {
    "twin": Shape(layers=3, width=128, heads=2, hidden=384),
    "deep": Shape(layers=24, width=64, heads=2, hidden=192),
    "study": Shape(layers=24, width=256, heads=4, hidden=768),
    "osp-1.4b": Shape(layers=24, width=2048, heads=16, hidden=5504),
}
"""twin: what ships. study: what recipes are compared on, as deep as larger models, since outliers gather over
layers, and a choice of layers for more bits needs some to choose from. deep: as deep, and narrow enough for
a CPU. osp-1.4b: the paper's, for timing."""


@dataclass(frozen=True)
class Rates:
    """Learning rates at the schedule's height. adam: of everything in the recipe adam; muon: of what Muon
    moves; embedding: of embedding and head beside Muon."""

    adam: float = 2e-3
    muon: float = 2e-3
    embedding: float = 2e-3

    def __post_init__(self) -> None:
        for name, rate in dataclasses.asdict(self).items():
            if not 0 < rate < 1:
                raise UserError(f"rate {name}={rate}: give a number between 0 and 1")


@dataclass(frozen=True)
class Settings:
    """Everything that settles a run's numbers, its data aside.

    batch: sequences a step, over all processes. micro: sequences of a process that go through at a time.
    length: tokens of a sequence. The rate climbs over the first `warmup` of the steps and falls to 0 over the
    last `decay` of them, linearly. weight_decay: of matrices alone. clip: of the gradient's norm.
    precision: "bf16" (parameters, updates and the residual stream stay float32) or "fp32". probes, saves:
    how often in a run the model is looked into, and a checkpoint written.
    """

    recipe: str
    steps: int
    shape: Shape = SHAPES["twin"]
    seed: int = 0
    batch: int = 32
    micro: int = 32
    length: int = 1024
    rates: Rates = field(default_factory=Rates)
    warmup: float = 0.05
    decay: float = 0.2
    weight_decay: float = 0.01
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95
    precision: str = "bf16"
    compiled: bool = False
    deterministic: bool = False
    probes: int = 16
    saves: int = 4

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise UserError(f"recipe {self.recipe!r}: choose one of {', '.join(RECIPES)}")
        if self.precision not in ("bf16", "fp32"):
            raise UserError(f"precision {self.precision!r}: choose bf16 or fp32")
        for name in ("steps", "batch", "micro", "length", "probes", "saves"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: give a positive number")
        if self.warmup < 0 or self.decay < 0 or self.warmup + self.decay > 1:
            raise UserError(f"warmup {self.warmup} and decay {self.decay}: give shares that fit into one run")

    @property
    def parts(self) -> Recipe:
        return RECIPES[self.recipe]

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.length

    def height(self, step: int) -> float:
        """The share of the rates that step 0, 1, ... takes: a trapezoid that touches 0 behind the last."""
        climb, fall = self.warmup * self.steps, self.decay * self.steps
        up = (step + 1) / climb if climb > 0 else 1.0
        down = (self.steps - step) / fall if fall > 0 else 1.0
        return min(up, down, 1.0)

    def record(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def settings_of(record: dict[str, Any]) -> Settings:
    """What `Settings.record` wrote."""
    values = dict(record)
    values["shape"] = Shape(**values["shape"])
    values["rates"] = Rates(**values["rates"])
    values["betas"] = tuple(values["betas"])
    return Settings(**values)
