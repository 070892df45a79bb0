"""KurTail (Akhondzadeh et al. 2025, arXiv 2503.01483): rotations that make activations less heavy-tailed.

R1 brings the kurtosis of stored inputs of all attention and MLP blocks towards 1.8, that of a uniform
distribution; R2 does so for the values of each layer. R3, R4, the transform across heads and rounding are
QuaRot's. Learning needs no model: beside the sample, memory holds one block.

The paper's abstract says what is minimised and that memory is that of one layer. How exactly was not to be
had, so it is an option here: kurtosis of each token along the hidden axis, which is what a per-token
quantiser sees; steps, rate and rule. Both rotations start at QuaRot's of the same seed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.capture import sample_blocks
from methods.decoder import Decoder
from methods.device import device_name, peak_memory
from methods.errors import UserError
from methods.learned_rotations import ROUNDING_SEQUENCES, Pair, apply, kept, quarot_pair, site_spreads
from methods.method import Artifact, Context, Method, choose
from methods.orthogonal import Log, Objective, Recipe, minimise
from methods.quarot import hadamard_notes, online_hadamards

UNIFORM = 1.8
AXES = ("token", "channel", "tensor")
DISTANCES = ("absolute", "squared")


@dataclass(frozen=True, kw_only=True)
class KurTail(Method):
    """Rotations that bring the kurtosis of block inputs near 1.8, learned one block in memory at a time.

    sequences: how many calibration sequences it learns from (None: all). tokens: rows kept of each site;
    batch: how many of them a step sees; steps: of Cayley Adam, whose rate goes down to 0 linearly (tokens,
    steps: None is the preset's). axis: kurtosis over the channels of a "token", the tokens of a "channel", or
    a whole "tensor". distance: |kurtosis - 1.8|, "absolute" or "squared". values: whether R2 is learned, else
    QuaRot's. online: as in QuaRot.

    On the default model's tuning text, mean kurtosis of block inputs is 2.68 under QuaRot's R1 of seed 0.
    With 2048 rows and batches of 64, 100 steps at a constant rate of 3 or 6 bring it to 2.09 or 2.05, 300
    linear ones to 2.06 or 2.02; half the rows and half the batch, the defaults, to 2.03.
    """

    name: ClassVar[str] = "kurtail"
    paper: ClassVar[str] = "Akhondzadeh et al. 2025, arXiv 2503.01483"
    needs: ClassVar[tuple[str, ...]] = ("calibration", "gradients")
    random: ClassVar[bool] = True
    seams: ClassVar[frozenset[str]] = frozenset(
        {"residual", "value", "query_key", "attention_output", "hidden"}
    )
    rounding: str = "gptq"
    steps: int | None = None
    batch: int = 32
    rate: float = 6.0
    sequences: int | None = None
    tokens: int | None = None
    axis: str = "token"
    distance: str = "absolute"
    values: bool = True
    online: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("axis", self.axis, AXES)
        choose("distance", self.distance, DISTANCES)
        for option in ("sequences", "tokens", "batch"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UserError(f"kurtail: {option} {value}: give a positive number")
        _ = self.recipe  # checks its options

    @property
    def recipe(self) -> Recipe:
        steps = self.steps if self.steps is not None else 100 if self.preset == "paper" else 300
        return Recipe("adam", steps, self.rate, "linear", momentum=0.9)

    def calibration_shape(self) -> tuple[int, int]:
        """The paper learns from 512 sequences of 2048 tokens."""
        samples, length = (512, 2048) if self.preset == "paper" else super().calibration_shape()
        return self.samples or samples, self.length or length

    def rounding_tokens(self, calibration: Tensor) -> Tensor:
        return calibration[:ROUNDING_SEQUENCES] if self.preset == "paper" else calibration

    def learn(self, model: Decoder, calibration: Tensor | None, ctx: Context) -> Artifact:
        assert calibration is not None
        clock = [time.perf_counter()]
        calibration = calibration[: self.sequences]
        rows = self.tokens or (8192 if self.preset == "paper" else 1024)
        sample = sample_blocks(model, calibration, rows, ctx)
        clock.append(time.perf_counter())
        start = quarot_pair(model, ctx.seed)
        dtype = torch.promote_types(model.dtype, torch.float32)
        with peak_memory(ctx.device) as peak:
            residual, log = self._minimise("R1", sample.inputs, start.residual, dtype, ctx)
            logs = {"R1": log.record()}
            values = start.values
            if self.values:
                values, log = self._minimise("R2", sample.values.flatten(1, 2), values, dtype, ctx)
                logs["R2"] = log.record()
            taken = peak()
        clock.append(time.perf_counter())
        pair = Pair(residual, values)
        meta = {
            "sequences": calibration.shape[0],
            "tokens": {"passed": calibration.numel(), "kept": sample.inputs.shape[1]},
            "log": logs,
            "sites": site_spreads(sample, {"none": None, "start": start, "learned": pair}, ctx.device),
            "measured": {
                "device": device_name(ctx.device),
                "capture_seconds": clock[1] - clock[0],
                "learn_seconds": clock[2] - clock[1],
                "learn_peak_bytes": taken,
                "sample_bytes": sample.inputs.nbytes + sample.values.nbytes,
            },
        }
        return kept(pair, meta)

    def _minimise(
        self, name: str, rows: Tensor, start: Tensor, dtype: torch.dtype, ctx: Context
    ) -> tuple[Tensor, Log]:
        objective = kurtosis_objective(rows, self.batch, self.axis, self.distance, ctx.seed)
        (found,), log = minimise(
            [start],
            objective,
            self.recipe,
            seed=ctx.seed,
            device=ctx.device,
            dtype=dtype,
            report=lambda done, total: ctx.report(f"learning {name}", done, total),
        )
        return found, log

    def transform(self, model: Decoder, artifact: Artifact) -> Decoder:
        return apply(model, artifact, online_hadamards(model) if self.online else {})

    def notes(self, model: Decoder) -> list[str]:
        return hadamard_notes(model, self.online)


def kurtosis_objective(rows: Tensor, batch: int, axis: str, distance: str, seed: int) -> Objective:
    """Distance to `UNIFORM` of the kurtosis of rows times the matrix, mean over sites.

    rows: [sites, rows, n], any dtype; the matrix is [n, n], or [sites, n, n], which learns each site's from
    that site alone. Every step draws `batch` rows anew by a generator of its own. Moments are those of the
    population, in the matrix's dtype, 1e-5 added to the variance.
    """
    generator = torch.Generator().manual_seed(seed)
    dims = {"token": (-1,), "channel": (-2,), "tensor": (-2, -1)}[axis]

    def objective(step: int, matrices: list[Tensor]) -> float:
        (matrix,) = matrices
        places = torch.randint(rows.shape[1], (batch,), generator=generator)
        x = rows[:, places].to(matrix) @ matrix
        x = x - x.mean(dims, keepdim=True)
        variance = x.square().mean(dims) + 1e-5
        excess = x.square().square().mean(dims) / variance.square() - UNIFORM
        loss = (excess.abs() if distance == "absolute" else excess.square()).mean()
        loss.backward()
        return float(loss.detach())

    return objective
