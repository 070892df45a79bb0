"""QUAD (Hu et al. 2025, arXiv 2503.19353): what is large in the residual stream stays in full precision.

The stream is widened by its r principal directions (methods/decomposition.py): x Q = [x P | x (I - PPᵀ)].
The first r channels of what q, k, v, gate and up read, and the columns of their weights that meet them, are
kept in full precision; the rest, from which the outliers are gone, is quantised, and so are the r outputs
that o_proj and down_proj gain. Behind Q each part is rotated by itself, Q · blockdiag(R_r, R_d). R_d is
QuaRot's R1 of the same seed, and all else is QuaRot's: with rank 0 nothing more remains. Norms go on dividing
by the original width. GPTQ's Hessian is that of the quantised channels; kept columns neither give nor take
compensation.

With `tune`, kept columns and all weight scales then descend on the next-token loss of the quantised network
(methods/tuning.py), the paper's parameter-efficient tuning.

Departures: the quantisers are the defaults that all methods here share; the published code also subtracts the
mean of every row of the embedding, which changes the function of an RMSNorm model and is left out (`centred`
puts it in); it tunes on Alpaca, here that is the calibration text, for which `--calibration` takes any other,
an instruction set written out as text too.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kernels.hadamard import is_known_order
from methods import tuning
from methods.bits import Bits, LinearSpec, QuantiserSettings
from methods.decoder import Block, Decoder, RMSNorm
from methods.decomposition import principal_directions, second_moment, widening
from methods.descent import Schedule, Snapshots
from methods.device import device_name
from methods.errors import UserError
from methods.learned_rotations import ROUNDING_SEQUENCES
from methods.method import Artifact, Context, Method, Plan
from methods.orthogonal import orthogonalise
from methods.quarot import hadamard_notes, online_hadamards
from methods.transforms import (
    READERS,
    WRITERS,
    Rotations,
    absorb_projections,
    hadamard_rows,
    randomised_hadamard,
    rotate,
    untie,
)

DECOMPOSED = (32, 512)
"""Calibration sequences, and tokens of each, that the decomposition reads at most: the paper's."""
HELD_OUT = 8
"""Sequences, at most, that tuning does not read and that the loss is measured on before and after."""


@dataclass(frozen=True, kw_only=True)
class QUAD(Method):
    """The stream's principal directions in full precision beside a quantised rest; kept columns and scales
    tuned after rounding, if asked.

    rank: of the part in full precision; effective bits say what it costs. normalised: directions of
    normalised tokens, another method. centred: subtract the mean of every row of the embedding, as the
    published code does, which changes the function. a8: at least 8 bits at the inputs of o_proj and down_proj
    (the paper's W4A4/A8). online: as in QuaRot. sequences: how many calibration sequences decomposition and
    rounding read (None: all, with `tune` half). tune: descend on those behind them. steps, batch, window,
    rate: of that; a step sees `batch` windows of `window` tokens (None: the preset's).

    On the default model's tuning text (6 windows of 512 tokens, seed 0), ranks 0, 4, 8, 16, 32 and 64 give
    3.675, 3.525, 3.482, 3.462, 3.442 and 3.431 nats per token at w16a4kv4, and 5.04, 3.94, 3.93, 3.91, 3.84
    and 3.71 at w4a4kv4 rounded to nearest: the first few directions bring most of it, at 0.02 bits a weight
    each. 16 is the least that the GPU's kernels take, which want multiples of it. Behind that rounding, 30
    steps of tuning at rates of 3e-5, 1e-4 and 2e-4 bring 3.88 (rank 16, 6 windows of 256 tokens) to 3.45,
    3.38 and 3.52; at 1e-4 with ten times the rate for kept columns, to 3.99. By GPTQ (8 windows of 512)
    QuaRot has 3.935, these defaults 3.642, and tuned (100 steps of 256 tokens) 3.344.
    """

    name: ClassVar[str] = "quad"
    paper: ClassVar[str] = "Hu et al. 2025, arXiv 2503.19353"
    needs: ClassVar[tuple[str, ...]] = ("calibration",)
    random: ClassVar[bool] = True
    seams: ClassVar[frozenset[str]] = frozenset(
        {"residual", "value", "query_key", "attention_output", "hidden"}
    )
    rounding: str = "gptq"
    rank: int = 16
    normalised: bool = False
    centred: bool = False
    a8: bool = False
    online: bool = True
    sequences: int | None = None
    tune: bool = False
    steps: int | None = None
    batch: int | None = None
    window: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise UserError(f"quad: rank {self.rank}: give 0 or more")
        for option, least in (("sequences", 1), ("steps", 1), ("batch", 1), ("window", 2)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise UserError(f"quad: {option} {value}: give at least {least}")
        if self.rate is not None and not (self.rate > 0 and math.isfinite(self.rate)):
            raise UserError(f"quad: rate {self.rate:g}: give a positive number")
        idle = [name for name in ("steps", "batch", "window", "rate") if getattr(self, name) is not None]
        if idle and not self.tune:
            raise UserError(f"quad: {idle[0]} without tune=true has nothing to act on")

    @property
    def tunes(self) -> bool:
        return self.tune

    @property
    def recipe(self) -> tuple[int, int, int, float]:
        """Steps, batch, window and rate of tuning."""
        preset = (400, 128, 1024, 1e-5) if self.preset == "paper" else (100, 1, 256, 1e-4)
        steps, batch, window, rate = preset
        return self.steps or steps, self.batch or batch, self.window or window, self.rate or rate

    def calibration_shape(self) -> tuple[int, int]:
        """The paper rounds with 128 sequences of 2048 tokens; it tunes on 51 thousand texts, each seen once,
        for which stand as many tokens of calibration text."""
        if self.preset != "paper":
            return super().calibration_shape()
        length = self.length or 2048
        steps, batch, window, _ = self.recipe
        tuned = -(-steps * batch * window // length) + HELD_OUT if self.tune else 0
        return self.samples or (self.sequences or ROUNDING_SEQUENCES) + tuned, length

    def rounding_tokens(self, calibration: Tensor) -> Tensor:
        if self.sequences is not None:
            return calibration[: self.sequences]
        if not self.tune:
            return calibration
        return calibration[: ROUNDING_SEQUENCES if self.preset == "paper" else calibration.shape[0] // 2]

    def learn(self, model: Decoder, calibration: Tensor | None, ctx: Context) -> Artifact:
        assert calibration is not None
        width = model.config.hidden_size
        if self.rank > width:
            raise UserError(f"quad: rank {self.rank}: the stream has {width} channels")
        started = time.perf_counter()
        samples, length = DECOMPOSED
        ids = self.rounding_tokens(calibration)[:samples, :length]
        moment = torch.eye(width, dtype=torch.float64)  # of rank 0 nothing is asked
        if self.rank:
            moment = second_moment(model, ids, ctx, normalised=self.normalised, centred=self.centred)
        directions, share = principal_directions(moment, self.rank)
        meta = {
            "seed": ctx.seed,
            "tokens": {"passed": ids.numel() if self.rank else 0},
            "share": share,
            "measured": {
                "device": device_name(ctx.device),
                "capture_seconds": time.perf_counter() - started,
            },
        }
        return Artifact({"directions": directions}, meta)

    def transform(self, model: Decoder, artifact: Artifact) -> Decoder:
        width = model.config.hidden_size
        if self.centred:
            untie(model)
            absorb_projections(model)
            centre(model)
        head = hadamard_rows(torch.eye(model.config.head_dim, dtype=torch.float64))
        rotations = Rotations(
            residual=widened_basis(artifact.tensors["directions"], artifact.meta["seed"]),
            values=[head] * model.config.layers,
            **(online_hadamards(model) if self.online else {}),
        )
        model = rotate(model, rotations)
        widen(model, width)
        for block in model.layers:
            assert isinstance(block, Block)
            for linear in (*block.self_attn.readers, *block.mlp.readers):
                linear.keep = self.rank
        return model

    def plan(
        self, model: Decoder, bits: Bits, settings: QuantiserSettings, artifact: Artifact, base: Plan
    ) -> Plan:
        def own(name: str, spec: LinearSpec) -> LinearSpec:
            if name.endswith(READERS):
                return replace(spec, keep=self.rank)
            if self.a8 and name.endswith(WRITERS) and spec.activation is not None:
                return replace(spec, activation=settings.activation(max(8, spec.activation.bits)))
            return spec

        return replace(base, linears={name: own(name, spec) for name, spec in base.linears.items()})

    def tune_rounded(
        self, model: Decoder, calibration: Tensor, ctx: Context, snapshots: Snapshots | None
    ) -> Artifact:
        steps, batch, window, rate = self.recipe
        ids = calibration[self.rounding_tokens(calibration).shape[0] :]
        held_out = min(HELD_OUT, max(1, len(ids) // 10))
        if len(ids) <= held_out:
            raise UserError(
                f"quad: tuning needs 2 calibration sequences or more beside those of rounding, not {len(ids)}"
            )
        window = min(window, ids.shape[1])
        return tuning.tune(
            model,
            tuning.pieces(ids[:-held_out], window),
            tuning.pieces(ids[-held_out:], window),
            Schedule(steps, {tuning.KEPT: rate, tuning.SCALE: rate}),
            batch,
            ctx,
            snapshots,
        )

    def adjust(self, model: Decoder, artifact: Artifact) -> None:
        tuning.adjust(model, artifact.tensors)

    def notes(self, model: Decoder) -> list[str]:
        mean = (
            "the embedding's mean is subtracted, as the published code does: before quantisation the model "
            "is another one already than the float baseline"
            if self.centred
            else "the embedding's mean is not subtracted, as the published code does: it changes the function"
        )
        width = model.config.hidden_size
        cost = (
            f"the residual stream is widened from {width} to {width + self.rank} channels; effective bits "
            "count what that adds, per weight and channel of the model as it was"
        )
        return [mean, *([cost] if self.rank else []), *hadamard_notes(model, self.online)]


def widened_basis(directions: Tensor, seed: int) -> Tensor:
    """Q · blockdiag(R_r, R_d), float64 [d, d + r], of P [d, r]: R_d is QuaRot's R1 of this seed, R_r another
    random Hadamard matrix or, where none of order r is known, a random orthogonal one."""
    width, rank = directions.shape
    parts = widening(directions.to(torch.float64)).split((rank, width), dim=1)
    generator = torch.Generator().manual_seed(seed)
    other = int(torch.randint(2**31, (), generator=generator))  # not the signs that R_d begins with
    if not rank or is_known_order(rank):
        small = randomised_hadamard(rank, other) if rank else torch.empty(0, 0, dtype=torch.float64)
    else:
        small = orthogonalise(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    return torch.cat((parts[0] @ small, parts[1] @ randomised_hadamard(width, seed)), dim=1)


def widen(model: Decoder, divisor: int) -> None:
    """Say that the stream has the width of the embedding now, and have its norms divide by `divisor`."""
    model.config = replace(model.config, hidden_size=model.embed_tokens.shape[1], norm_divisor=divisor)
    norms: list[RMSNorm] = [model.norm]
    for block in model.layers:
        assert isinstance(block, Block)
        norms += [block.input_layernorm, block.post_attention_layernorm]
    for norm in norms:
        norm.divisor = divisor


def centre(model: Decoder) -> None:
    """Subtract from every row of the embedding its mean over channels, which changes the function."""
    parts = [part.to(torch.float64) for part in model.embed_tokens.split(4096)]
    rows = [(part - part.mean(-1, keepdim=True)).to(model.dtype) for part in parts]
    model.embed_tokens = torch.nn.Parameter(torch.cat(rows), requires_grad=False)
