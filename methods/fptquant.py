"""FPTQuant (van Breugel et al., ICML 2026): function-preserving transforms, static ranges, a float teacher.

Four transforms merge into the weights, among them an invertible one per value head and a scaled rotation of
query and key in front of RoPE; a block-diagonal Hadamard matrix in front of down_proj and a per-token scale
of the residual stream run online (methods/function_preserving.py). Activations and KV cache have one
asymmetric range per tensor. Two stages learn:

1. local, without data: the transforms, from the L_4 norm of merged weights (methods/weight_norms.py);
2. end to end: transforms and ranges, from the Jensen-Shannon divergence to the float model on calibration
   text (methods/student.py), the ranges starting where their L_p error is least (methods/range_search.py).

Choices where the paper's text leaves one. Adam; the rate of stage 2 rises over a tenth of the steps and falls
by a cosine. Ranges that were learned at `learn_bits` serve cells of these widths; at other widths the
transforms are the same and ranges of least L_p error are found on the rounded model. p of the ranges is 2.
Weight ranges are not learned: stage 2 leaves weights in 16 bit and GPTQ rounds them, as behind the other
rotations; learn_bits=w4a4kv4 with rounding=rtn rounds them to nearest while it learns, too. A value
transform's condition number is bounded by construction. The first tokens of a sequence are treated like all
others. The per-token scale does not change what linears read: it serves residuals in half precision, and at
full precision its ablation shows nothing but rounding.
"""

from __future__ import annotations

import copy
import hashlib
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.bits import Bits, QuantiserSettings
from methods.decoder import Decoder
from methods.descent import Schedule, Snapshots, descend
from methods.device import device_name, float32_products, placed
from methods.errors import UserError
from methods.function_preserving import Switches, apply, condition_numbers, initial
from methods.method import Artifact, Context, Method, Plan, default_plan
from methods.static import least_error_ranges, static_plan
from methods.student import (
    SITES,
    Student,
    best_shares,
    divergence,
    learned_ranges,
    range_parameters,
    teacher_states,
)
from methods.weight_norms import weight_loss

_WEIGHT_NORM = 4.0
_RANGE_TOKENS = 16384  # calibration tokens that the ranges start from
_KV_SITES = ("key", "value")
_PROBED = 4  # sequences on which the divergence is measured before and after

# steps of the local stage, share of channels a step of it sees; steps, sequences and tokens of the other
_PRESETS = {"quick": (40, 8, 60, 1, 256), "paper": (200, 1, 512, 8, 1024)}


@dataclass(frozen=True, kw_only=True)
class FPTQuant(Method):
    """Mergeable invertible transforms and static ranges, learned from the float model's predictions.

    pre_rope, value, up_down, residual, hadamard, tokens: which transforms there are. static: one learned
    range per tensor, else the grid's dynamic quantisers (learned for those of default settings). local_steps,
    steps: of both stages (None: the preset's, 0: without); batch, window: sequences and their tokens in a
    step of the second. local_rate, rate, range_rate: largest steps of Adam (rate 0: the second stage learns
    ranges alone). learn_bits: what the network is quantised to while it learns. range_norm: p of the ranges.
    condition: the largest condition number of a value transform.

    On a GPU the second stage multiplies in TensorFloat-32.
    """

    name: ClassVar[str] = "fptquant"
    paper: ClassVar[str] = "van Breugel et al., FPTQuant, ICML 2026"
    needs: ClassVar[tuple[str, ...]] = ("calibration", "gradients")
    random: ClassVar[bool] = True
    seams: ClassVar[frozenset[str]] = frozenset(
        {"residual", "value", "before_rope", "up_down", "hidden", "residual_scale"}
    )
    rounding: str = "gptq"
    pre_rope: bool = True
    value: bool = True
    up_down: bool = True
    residual: bool = True
    hadamard: bool = True
    tokens: bool = True
    static: bool = True
    learn_bits: str = "w16a4kv4"
    local_steps: int | None = None
    steps: int | None = None
    batch: int | None = None
    window: int | None = None
    local_rate: float = 0.03
    rate: float = 0.02
    range_rate: float = 0.02
    range_norm: float = 2.0
    condition: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learned_at.quantises_activations:
            raise UserError(f"fptquant: learn_bits {self.learn_bits}: give quantised activations")
        for option, least in (("local_steps", 0), ("steps", 0), ("batch", 1), ("window", 2)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise UserError(f"fptquant: {option} {value}: give at least {least}")
        for option in ("local_rate", "range_rate", "range_norm"):
            if not getattr(self, option) > 0:
                raise UserError(f"fptquant: {option} {getattr(self, option):g}: give a positive number")
        if not self.rate >= 0:
            raise UserError(
                f"fptquant: rate {self.rate:g}: give a positive number, or 0 to learn ranges alone"
            )
        if not self.condition > 1:
            raise UserError(f"fptquant: condition {self.condition:g}: give a number above 1")

    @property
    def switches(self) -> Switches:
        return Switches(self.pre_rope, self.value, self.up_down, self.residual, self.hadamard, self.tokens)

    @property
    def learned_at(self) -> Bits:
        return Bits.parse(self.learn_bits)

    def _preset(self) -> tuple[int, int, int, int, int]:
        """Local steps, one in how many channels each sees, steps, batch, window."""
        local, share, steps, batch, window = _PRESETS[self.preset]
        return (
            local if self.local_steps is None else self.local_steps,
            share,
            steps if self.steps is None else self.steps,
            self.batch or batch,
            self.window or window,
        )

    # Learning

    def learn(self, model: Decoder, calibration: Tensor | None, ctx: Context) -> Artifact:
        assert calibration is not None
        dtype = torch.promote_types(model.dtype, torch.float32)
        parameters = initial(model.config, self.switches, ctx.seed)
        parameters = {name: tensor.to(ctx.device, dtype) for name, tensor in parameters.items()}
        meta: dict[str, Any] = {}
        begun = time.perf_counter()
        about = None if ctx.cache is None else self._about(model, calibration, ctx)
        snapshots: list[Snapshots] = []
        with placed(model, ctx.device):
            student = self._student(model)
            for stage, run in (("local", self._local), ("end to end", self._end_to_end)):
                kept = None
                if about is not None and ctx.cache is not None:
                    path = ctx.cache / f"fptquant-{_digest(about)[:24]}-{stage.replace(' ', '-')}.safetensors"
                    kept = Snapshots(path, {**about, "stage": stage})
                    snapshots.append(kept)
                parameters, meta[stage] = run(student, parameters, calibration, ctx, kept)
        for kept in snapshots:
            kept.remove()
        measured = {"device": device_name(ctx.device), "learn_seconds": time.perf_counter() - begun}
        condition = condition_numbers(parameters, self.condition)
        meta["condition"] = float(condition.amax()) if condition.numel() else None
        tensors = {name: tensor.to("cpu", torch.float32) for name, tensor in parameters.items()}
        return Artifact(tensors, {**meta, "measured": measured})

    def _student(self, model: Decoder) -> Student:
        bits = self.learned_at
        plan = self._quantisers(default_plan(model, bits, QuantiserSettings()))
        activation = next(iter(plan.linears.values())).activation
        return Student(model, self.hadamard, self.condition, activation, plan.kv)

    def _local(
        self,
        student: Student,
        parameters: dict[str, Tensor],
        calibration: Tensor,
        ctx: Context,
        snapshots: Snapshots | None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        steps, share, *_ = self._preset()
        columns = -(-student.model.config.hidden_size // share)

        def objective(step: int, parameters: dict[str, Tensor]) -> float:
            generator = torch.Generator().manual_seed(_mixed(ctx.seed, step))
            return weight_loss(student, parameters, norm=_WEIGHT_NORM, columns=columns, generator=generator)

        found, losses = descend(
            parameters,
            objective,
            Schedule(steps, _rates(student.model, self.local_rate)),
            snapshots=snapshots,
            report=lambda done, total, loss: ctx.report(f"local stage, loss {loss:.4f}", done, total),
        )
        return found, {"loss": losses}

    def _end_to_end(
        self,
        student: Student,
        parameters: dict[str, Tensor],
        calibration: Tensor,
        ctx: Context,
        snapshots: Snapshots | None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        *_, steps, batch, window = self._preset()
        if steps == 0:
            return parameters, {"loss": []}
        model, bits = student.model, self.learned_at
        ids = calibration[:, :window].contiguous()
        if self.static:
            parameters = {**parameters, **self._first_ranges(model, parameters, calibration, ctx)}
        if bits.quantises_weights:
            shares = best_shares(student, parameters, bits.weight)
            student = replace(student, weight_bits=bits.weight, shares=shares)
        taught = teacher_states(model, ids).cpu()
        order = _shuffled(len(ids), steps * batch, ctx.seed)

        def loss_of(rows: Tensor, parameters: dict[str, Tensor]) -> Tensor:
            return divergence(student, ids[rows].to(model.device), taught[rows].to(model.device), parameters)

        precision = "high" if ctx.device.type == "cuda" else "highest"

        def objective(step: int, parameters: dict[str, Tensor]) -> float:
            with float32_products(precision):
                loss = loss_of(order[step * batch : (step + 1) * batch], parameters)
                loss.backward()
            return float(loss.detach())

        def measure(parameters: dict[str, Tensor]) -> float:
            rows = torch.arange(min(_PROBED, len(ids)))
            with torch.no_grad():
                return sum(float(loss_of(row[None], parameters)) for row in rows) / len(rows)

        found, losses = descend(
            parameters,
            objective,
            Schedule(steps, _rates(model, self.rate, self.range_rate)),
            snapshots=snapshots,
            report=lambda done, total, loss: ctx.report(f"end to end, divergence {loss:.4f}", done, total),
        )
        return found, {
            "loss": losses,
            "before": measure(parameters),
            "after": measure(found),
            "sequences": min(_PROBED, len(ids)),
            "tokens": steps * batch * ids.shape[1],
            "different": min(steps * batch, len(ids)) * ids.shape[1],
        }

    def _first_ranges(
        self, model: Decoder, parameters: dict[str, Tensor], calibration: Tensor, ctx: Context
    ) -> dict[str, Tensor]:
        """Range parameters of least L_p error on the transformed float model."""
        changed = apply(copy.deepcopy(model), parameters, self.switches, self.condition)
        bits = self.learned_at
        plan = self._quantisers(default_plan(changed, bits, QuantiserSettings()))
        rows = max(1, _RANGE_TOKENS // calibration.shape[1])
        ranges = least_error_ranges(changed, plan, calibration[:rows], ctx, self.range_norm)
        found = range_parameters(ranges, model.config.layers, self._range_bits(bits))
        like = next(iter(parameters.values()), model.embed_tokens)
        return {name: tensor.to(like) for name, tensor in found.items()}

    def _range_bits(self, bits: Bits) -> dict[str, int]:
        """Width of every site that is quantised at `bits`."""
        widths = {site: bits.kv if site in _KV_SITES else bits.activation for site in SITES}
        return {site: width for site, width in widths.items() if width < 16}

    def learning_options(self) -> dict[str, Any]:
        """What learning depends on of this method's options."""
        local, share, steps, batch, window = self._preset()
        names = ("static", "learn_bits", "local_rate", "rate", "range_rate", "range_norm", "condition")
        return {
            **asdict(self.switches),
            **{name: getattr(self, name) for name in names},
            "stages": [local, share, steps, batch, window],
        }

    def _about(self, model: Decoder, calibration: Tensor, ctx: Context) -> dict[str, Any]:
        """What a half-finished learning must agree in to be continued."""
        weights = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            weights.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return {
            "options": self.learning_options(),
            "model": weights.hexdigest(),
            "dtype": str(model.dtype),
            "device": ctx.device.type,
            "calibration": hashlib.sha256(calibration.cpu().numpy().tobytes()).hexdigest(),
            "shape": list(calibration.shape),
            "seed": ctx.seed,
        }

    # Using what was learned

    def transform(self, model: Decoder, artifact: Artifact) -> Decoder:
        return apply(model, artifact.tensors, self.switches, self.condition)

    def plan(
        self, model: Decoder, bits: Bits, settings: QuantiserSettings, artifact: Artifact, base: Plan
    ) -> Plan:
        """Static quantisers, and the ranges that were learned at these widths."""
        plan = self._quantisers(base)
        if not self.static or "range.low" not in artifact.tensors:
            return plan
        here, learned = self._range_bits(bits), self._range_bits(self.learned_at)
        same = {site: width for site, width in here.items() if learned.get(site) == width}
        return replace(plan, known=learned_ranges(artifact.tensors, same))

    def _quantisers(self, base: Plan) -> Plan:
        return static_plan(base) if self.static else base

    def ranges(self, model: Decoder, plan: Plan, calibration: Tensor, ctx: Context) -> Artifact:
        """The learned ranges; those that the plan lacks have the least L_p error on calibration tokens."""
        return Artifact(least_error_ranges(model, plan, calibration, ctx, self.range_norm))

    def notes(self, model: Decoder) -> list[str]:
        found = []
        if self.static:
            found.append(
                "activations and KV cache: one static asymmetric range per tensor, whatever the grid's "
                f"quantiser; learned at {self.learn_bits}, elsewhere of least L_{self.range_norm:g} error"
            )
        if self.pre_rope and model.config.qk_norm:
            found.append(
                "query and key are normalised per head: the pre-RoPE transform scales and cannot rotate"
            )
        return found


def _rates(model: Decoder, rate: float, ranges: float = 0.0) -> dict[str, float]:
    """Steps of Adam: `rate` for angles and logarithms of scales, rate/√n for the entries of a skew-symmetric
    n x n matrix, which all together turn a vector √n times as far."""
    config = model.config
    return {
        "residual.skew": rate / config.hidden_size**0.5,
        "value": rate / config.head_dim**0.5,
        "value.spread": rate,
        "pre_rope": rate,
        "hidden": rate,
        "range": ranges,
    }


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()


def _mixed(seed: int, step: int) -> int:
    """A seed of its own for every step."""
    return (seed * 1_000_003 + step) % 2**63


def _shuffled(rows: int, count: int, seed: int) -> Tensor:
    """`count` row numbers: all rows in one random order after another."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(rows, generator=generator) for _ in range(-(-count // rows))]
    return torch.cat(rounds)[:count]
