"""SpinQuant (Liu et al. 2024, arXiv 2405.16406): rotations learned from the loss of the quantised network.

R1 and the R2 of every layer descend, by Cayley SGD, on the next-token cross-entropy of the network with
quantised activations and KV cache and weights in 16 bit, the authors' advice where GPTQ follows. R3 on query
and key and R4 before down_proj are exact Hadamard transforms that run online; nothing mixes heads before
o_proj. Learned once at `learn_bits`, the rotations serve every bit-width.

"Lite": the quick preset sees far fewer tokens than the paper's 800 sequences of 2048; the record says how
many. As in the published recipe, one norm clips the gradients of all rotations together: R1's dominates it,
so that each R2 moves little. Departures: the quantisers are the defaults that all methods here share
(symmetric activations, clip 0.9, one scale per token also before o_proj), and the mean of the embedding is
not subtracted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.bits import Bits
from methods.decoder import Decoder
from methods.device import device_name, float32_products, peak_memory, placed
from methods.errors import UserError
from methods.kurtail import KurTail
from methods.learned_rotations import ROUNDING_SEQUENCES, Pair, apply, kept, pair_of, quarot_pair
from methods.linear import OnlineHadamard
from methods.method import Artifact, Context, Method, choose
from methods.orthogonal import Recipe, minimise
from methods.quarot import hadamard_notes
from methods.straight_through import Simulation, next_token_loss
from methods.transforms import block_size, randomised_hadamard

STARTS = ("hadamard", "kurtail")
PAPER_TOKENS = 800 * 2048
_PROBED = 4  # sequences on which the loss is measured before and after
_AT_ONCE = 8192  # tokens that pass the network together, as far as sequences are whole


@dataclass(frozen=True, kw_only=True)
class SpinQuant(Method):
    """Rotations learned from the cross-entropy of the quantised network, by Cayley SGD.

    steps, batch: None is the preset's (a step sees `batch` sequences); window: tokens of each (None: the
    preset's, at most the calibration's length). rate: of the first step, from which `schedule`
    goes down to 0. clip: the joint gradient's largest norm (none: unclipped). learn_bits: what the network is
    quantised to while learning. start: randomised "hadamard" matrices, or the rotations that "kurtail" learns
    from the same tokens. values: whether R2 is learned, else QuaRot's. online: whether R3 and R4 run.

    On a GPU the network that it learns through multiplies in TensorFloat-32.
    """

    name: ClassVar[str] = "spinquant"
    paper: ClassVar[str] = "Liu et al. 2024, arXiv 2405.16406"
    needs: ClassVar[tuple[str, ...]] = ("calibration", "gradients")
    random: ClassVar[bool] = True
    seams: ClassVar[frozenset[str]] = frozenset({"residual", "value", "query_key", "hidden"})
    rounding: str = "gptq"
    learn_bits: str = "w16a4kv4"
    start: str = "hadamard"
    steps: int | None = None
    batch: int | None = None
    window: int | None = None
    rate: float = 1.5
    schedule: str = "cosine"
    clip: float | None = 1.0
    values: bool = True
    online: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("start", self.start, STARTS)
        bits = Bits.parse(self.learn_bits)
        if not bits.quantises_activations:
            raise UserError(
                f"spinquant: learn_bits {bits}: without quantised activations the loss does not depend on R1"
            )
        for option, least in (("batch", 1), ("window", 2)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise UserError(f"spinquant: {option} {value}: give at least {least}")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"spinquant: clip {self.clip:g}: give a positive norm, or none")
        _ = self.recipe  # checks its options

    @property
    def recipe(self) -> Recipe:
        steps = self.steps if self.steps is not None else 100
        return Recipe("sgd", steps, self.rate, self.schedule, clip=self.clip)

    def calibration_shape(self) -> tuple[int, int]:
        """The paper learns from 800 sequences of 2048 tokens, each seen once."""
        samples, length = (800, 2048) if self.preset == "paper" else super().calibration_shape()
        return self.samples or samples, self.length or length

    def rounding_tokens(self, calibration: Tensor) -> Tensor:
        return calibration[:ROUNDING_SEQUENCES] if self.preset == "paper" else calibration

    def learn(self, model: Decoder, calibration: Tensor | None, ctx: Context) -> Artifact:
        assert calibration is not None
        paper = self.preset == "paper"
        batch = self.batch or (8 if paper else 1)
        ids = calibration[:, : self.window or (2048 if paper else 256)].contiguous()
        started = time.perf_counter()
        first, origin = self._start(model, calibration, ctx)
        begun = time.perf_counter()
        dtype = torch.promote_types(model.dtype, torch.float32)
        simulation = Simulation.of(Bits.parse(self.learn_bits), *self._online(model))
        order = _shuffled(ids.shape[0], self.recipe.steps * batch, ctx.seed)
        at_once = max(1, _AT_ONCE // ids.shape[1])

        def loss_of(rows: Tensor, pair: list[Tensor]) -> Tensor:
            residual, values = (matrix.to(model.dtype) for matrix in pair)
            return next_token_loss(model, rows.to(model.device), residual, values, simulation)

        # The network's products, not those of the step in R: the published code has bfloat16 here.
        precision = "high" if ctx.device.type == "cuda" else "highest"

        def objective(step: int, matrices: list[Tensor]) -> float:
            fixed = [] if self.values else [first.values.to(matrices[0])]
            total = 0.0
            with float32_products(precision):
                for rows in ids[order[step * batch : (step + 1) * batch]].split(at_once):
                    loss = loss_of(rows, [*matrices, *fixed]) * (len(rows) / batch)
                    loss.backward()
                    total += float(loss.detach())
            return total

        def measure(pair: Pair) -> float:
            at = [matrix.to(model.device, dtype) for matrix in (pair.residual, pair.values)]
            with torch.no_grad():
                return sum(float(loss_of(row[None], at)) for row in ids[:_PROBED]) / len(ids[:_PROBED])

        starts = [first.residual, *([first.values] if self.values else [])]
        with peak_memory(ctx.device) as peak, placed(model, ctx.device):
            before = measure(first)
            found, log = minimise(
                starts,
                objective,
                self.recipe,
                seed=ctx.seed,
                device=ctx.device,
                dtype=dtype,
                report=lambda done, total: ctx.report("learning rotations", done, total),
            )
            pair = Pair(found[0], found[1] if self.values else first.values)
            after = measure(pair)
            taken = peak()
        measured = origin.pop("measured", {})
        meta = {
            **({"start": origin} if origin else {}),
            "tokens": {
                "seen": len(order) * ids.shape[1],
                "different": len(set(order.tolist())) * ids.shape[1],
                "paper": PAPER_TOKENS,
            },
            "loss": {"before": before, "after": after, "sequences": len(ids[:_PROBED])},
            "log": {"R1 and R2" if self.values else "R1": log.record()},
            "measured": {
                "device": device_name(ctx.device),
                **{f"start_{fact}": measured[fact] for fact in measured if fact.endswith("_seconds")},
                "start_seconds": begun - started,
                "learn_seconds": time.perf_counter() - begun,
                "learn_peak_bytes": taken,
            },
        }
        return kept(pair, meta)

    def _start(self, model: Decoder, calibration: Tensor, ctx: Context) -> tuple[Pair, dict[str, Any]]:
        """Where learning begins, and what KurTail says of it."""
        if self.start == "kurtail":
            found = KurTail(preset=self.preset, values=self.values).learn(model, calibration, ctx)
            return pair_of(found), dict(found.meta)
        pair = quarot_pair(model, ctx.seed)
        if not self.values:
            return pair, {}
        size = model.config.head_dim
        seeds = torch.randint(
            2**31, (model.config.layers,), generator=torch.Generator().manual_seed(ctx.seed)
        )
        values = torch.stack([randomised_hadamard(size, int(seed)) for seed in seeds])
        return Pair(pair.residual, values), {}

    def _online(self, model: Decoder) -> tuple[OnlineHadamard | None, OnlineHadamard | None]:
        """R3 and R4."""
        if not self.online:
            return None, None
        config = model.config
        return (
            OnlineHadamard(block_size(config.head_dim)),
            OnlineHadamard(block_size(config.intermediate_size)),
        )

    def transform(self, model: Decoder, artifact: Artifact) -> Decoder:
        query_key, hidden = self._online(model)
        return apply(model, artifact, {"query_key": query_key, "hidden": hidden})

    def notes(self, model: Decoder) -> list[str]:
        notes = [note for note in hadamard_notes(model, self.online) if "(heads)" not in note]
        return ["the embedding's mean is not subtracted, as the published code does", *notes]


def _shuffled(rows: int, count: int, seed: int) -> Tensor:
    """`count` row numbers: all rows in one random order after another."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(rows, generator=generator) for _ in range(-(-count // rows))]
    return torch.cat(rounds)[:count]
