"""Adam over named tensors that can be stopped and go on: the same numbers with and without the stop.

The state lies in one safetensors file that appears by one rename: parameters, both moments, the step and the
losses so far, under the digest of what is being learned. A file of something else is ignored.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from methods.errors import UserError

_FIRST, _SECOND, _FLOOR = 0.9, 0.99, 1e-8

Objective = Callable[[int, dict[str, Tensor]], float]
"""(step, parameters): adds the loss's gradient to `.grad` of the parameters, returns the loss."""


@dataclass(frozen=True)
class Schedule:
    """How to descend. rates: of the parameters whose names begin so (the longest such beginning counts); 0
    leaves them alone. The rate rises over the first tenth of the steps and falls by a cosine to 0."""

    steps: int
    rates: Mapping[str, float]
    warmup: float = 0.1

    def rate(self, name: str, step: int) -> float:
        """Of a parameter at step 0, 1, ..."""
        begin = max((key for key in self.rates if name.startswith(key)), key=len, default=None)
        if begin is None:
            return 0.0
        rising = max(round(self.warmup * self.steps), 1)
        done = (step + 1 - rising) / max(self.steps - rising + 1, 1)
        share = (step + 1) / rising if step < rising else (1 + math.cos(math.pi * done)) / 2
        return self.rates[begin] * share


@dataclass(frozen=True)
class Snapshots:
    """Where the state is kept, and every how many steps; `about` is what is being learned (JSON)."""

    path: Path
    about: dict[str, Any]
    every: int = 5

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()

    def save(self, tensors: Mapping[str, Tensor], losses: list[float]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.partial")
        facts = {"digest": self.digest, "losses": json.dumps(losses)}
        here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(here, temporary, metadata=facts)
        os.replace(temporary, self.path)

    def load(self) -> tuple[dict[str, Tensor], list[float]] | None:
        """Tensors on the CPU and losses; None where there is no file, or not of this."""
        try:
            with safe_open(self.path, framework="pt") as handle:
                facts = handle.metadata() or {}
                if facts.get("digest") != self.digest:
                    return None
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                return tensors, json.loads(facts["losses"])
        except (OSError, SafetensorError, ValueError, KeyError):
            return None

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def descend(
    start: Mapping[str, Tensor],
    objective: Objective,
    schedule: Schedule,
    *,
    snapshots: Snapshots | None = None,
    report: Callable[[int, int, float], None] | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Descend from `start` (float tensors, left alone); returns the parameters, in the same dtype and
    place, and the loss before each step. report: (steps done, steps, loss). The caller removes the snapshot
    once the result is safe. Raises UserError where the loss is not finite."""
    names = [name for name in start if schedule.rate(name, 0) > 0]
    state = {name: tensor.detach().clone() for name, tensor in start.items()}
    moments = {
        f"{kind} {name}": torch.zeros_like(state[name]) for kind in ("first", "second") for name in names
    }
    losses: list[float] = []
    found = None if snapshots is None else snapshots.load()
    if found is not None:
        tensors, losses = found
        state = {name: tensors[name].to(tensor) for name, tensor in state.items()}
        moments = {name: tensors[name].to(tensor) for name, tensor in moments.items()}
    for step in range(len(losses), schedule.steps):
        leaves = {name: tensor.requires_grad_(name in names) for name, tensor in state.items()}
        loss = objective(step, leaves)
        if not math.isfinite(loss):
            raise UserError(f"learning: the loss is not finite at step {step}: lower the rate")
        losses.append(loss)
        state = {name: tensor.detach() for name, tensor in leaves.items()}
        for name in names:
            gradient = leaves[name].grad
            if gradient is None:
                continue
            first, second = moments[f"first {name}"], moments[f"second {name}"]
            first.lerp_(gradient, 1 - _FIRST)
            second.lerp_(gradient.square(), 1 - _SECOND)
            unbiased = (second / (1 - _SECOND ** (step + 1))).sqrt_().add_(_FLOOR)
            rate = schedule.rate(name, step) / (1 - _FIRST ** (step + 1))
            state[name].addcdiv_(first, unbiased, value=-rate)
        last = step + 1 == schedule.steps
        if snapshots is not None and (last or (step + 1) % snapshots.every == 0):
            snapshots.save({**state, **moments}, losses)
        if report is not None:
            report(step + 1, schedule.steps, loss)
    return {name: tensor.detach() for name, tensor in state.items()}, losses
