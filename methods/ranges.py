"""Static ranges: one scale and zero-point per tensor, from the extreme values seen in calibration.

Measured on the transformed and rounded model while its activations, keys and values are not quantised, one
block at a time, so that beside the model memory holds one block on the device and the hidden states of the
calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.reference import quantise
from methods.bits import ActivationSpec, KVSpec
from methods.decoder import Block, Decoder
from methods.errors import UserError
from methods.linear import Linear
from methods.method import Artifact, Context, Plan
from methods.rounding import SITES


class Collector(Protocol):
    """Sees all values of one site, then gives it a range."""

    def add(self, x: Tensor) -> None: ...

    def range(self, name: str, spec: ActivationSpec | KVSpec) -> tuple[Tensor, Tensor | None]: ...


@dataclass
class Extremes:
    """The smallest and largest value of all tensors added so far; NaN once one of them held a NaN."""

    low: Tensor | None = None
    high: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """x: any shape."""
        low, high = x.amin(), x.amax()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def range(self, name: str, spec: ActivationSpec | KVSpec) -> tuple[Tensor, Tensor | None]:
        """Scale and zero-point (None where symmetric), scalars in float32 or float64 on the CPU: those that
        the dynamic quantiser gives to a row with these extremes, its clip ratio included."""
        if self.low is None or self.high is None:
            raise UserError(f"the static range of {name} needs calibration tokens")
        row = torch.stack((self.low, self.high)).cpu()
        if not row.isfinite().all():
            raise UserError(f"no static range holds {name}: it is not finite on the calibration tokens")
        found = quantise(row, spec.bits, symmetric=spec.symmetric, clip=spec.clip)
        return found.scale.squeeze(0), None if found.zero is None else found.zero.squeeze(0)


@torch.no_grad()
def min_max_ranges(model: Decoder, plan: Plan, calibration: Tensor, ctx: Context) -> Artifact:
    """Ranges from extremes; see `static_ranges`."""
    return static_ranges(model, plan, calibration, ctx, Extremes)


@torch.no_grad()
def static_ranges(
    model: Decoder, plan: Plan, calibration: Tensor, ctx: Context, collector: Callable[[], Collector]
) -> Artifact:
    """Ranges of everything static in the plan, named as `Method.ranges` says, each by a collector of its own.

    calibration: token ids [samples, length]. Linears that read one input by one quantiser get the very same
    tensors, so that their input is quantised once. The model's activation quantisers must be off.
    """
    tensors: dict[str, Tensor] = {}
    states = model.batches(calibration, ctx.device)
    for index, block in model.stream_blocks(ctx.device):
        prefix = f"layers.{index}."
        inputs = _watch_inputs(block, prefix, plan, collector)
        keys, values = collector(), collector()
        if plan.kv is not None and plan.kv.static:

            def observe(
                key: Tensor, value: Tensor, keys: Collector = keys, values: Collector = values
            ) -> None:
                keys.add(key)
                values.add(value)

            block.self_attn.kv_observer = observe
        try:
            states = [model.through(block, state) for state in states]
        finally:
            block.self_attn.kv_observer = None
            for _, linear in block.linears():
                linear.observer = None
        for names, spec, extremes in inputs:
            scale, zero = extremes.range(f"the input of {names[0]}", spec)
            for name in names:
                _put(tensors, f"{name}.input", scale, zero)
        if plan.kv is not None and plan.kv.static:
            for letter, what, extremes in (("k", "keys", keys), ("v", "values", values)):
                found = extremes.range(f"the {what} of layer {index}", plan.kv)
                _put(tensors, f"{prefix}self_attn.{letter}", *found)
        ctx.report("static ranges", index + 1, model.config.layers)
    return Artifact(tensors)


def set_ranges(model: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Give static ranges, named as in `Method.ranges`, to the model's linears and attentions, on its device.

    Call it once the model is where it stays: tensors that are one object here are one object there. Raises
    UserError for a name of nothing, and for a zero-point that is no code: such a range does not contain 0.
    """
    moved = {id(tensor): tensor.to(model.device) for tensor in tensors.values()}
    owners: dict[str, torch.nn.Module] = dict(model.named_modules())
    for name, tensor in tensors.items():
        owner, _, buffer = name.rpartition(".")
        if buffer not in getattr(owners.get(owner), "_buffers", {}):
            raise UserError(f"unknown static range {name!r}")
        bits = _bits_of(owners[owner])
        if buffer.endswith("zero") and bits is not None and float(tensor) not in range(2**bits):
            raise UserError(
                f"static range {name} = {float(tensor):g}: give a whole number from 0 to {2**bits - 1}, "
                "of a range that contains 0"
            )
        setattr(owners[owner], buffer, moved[id(tensor)])


def _bits_of(owner: torch.nn.Module) -> int | None:
    """The width of what this quantises by a static range."""
    spec = owner.activation if isinstance(owner, Linear) else getattr(owner, "kv", None)
    return spec.bits if isinstance(spec, ActivationSpec | KVSpec) else None


def _watch_inputs(
    block: Block, prefix: str, plan: Plan, collector: Callable[[], Collector]
) -> list[tuple[list[str], ActivationSpec, Collector]]:
    """Observe the inputs with static quantisers; linears of one input, spec and kept columns together."""
    named: dict[str, Linear] = dict(block.linears())
    found: list[tuple[list[str], ActivationSpec, Collector]] = []
    for site in SITES:
        together: dict[tuple[ActivationSpec, int], list[str]] = {}
        for name in site:
            spec = plan.linears.get(prefix + name)
            if spec is not None and spec.activation is not None and spec.activation.static:
                together.setdefault((spec.activation, spec.keep), []).append(name)
        for (activation, keep), names in together.items():
            extremes = collector()

            def observe(x: Tensor, extremes: Collector = extremes, keep: int = keep) -> None:
                extremes.add(x[..., keep:])

            named[names[0]].observer = observe
            found.append(([prefix + name for name in names], activation, extremes))
    return found


def _put(tensors: dict[str, Tensor], stem: str, scale: Tensor, zero: Tensor | None) -> None:
    tensors[f"{stem}_scale"] = scale
    if zero is not None:
        tensors[f"{stem}_zero"] = zero
