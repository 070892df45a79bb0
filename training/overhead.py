"""How long a step takes by each recipe: the pass forward and back, and the optimisers' part of it.

The optimisers' part does not grow with the batch, so its share of a step is given for several batches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from methods.decoder import Decoder
from training.model import STD, NextToken
from training.recipe import Settings
from training.trainer import optimisers

BATCHES = (1 << 15, 1 << 19, 1 << 22)
"""Tokens a step; the last is the paper's."""


@dataclass
class _Timed:
    """A recipe's model and optimisers, what has been timed of them (seconds), and the most memory that they
    took beside what the other recipes keep (bytes; 0 on the CPU)."""

    settings: Settings
    model: Decoder
    objective: nn.Module
    optimisers: list[torch.optim.Optimizer]
    passes: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def state_bytes(self) -> int:
        """Of the optimisers, whose entries are all tensors."""
        return sum(
            value.nbytes
            for one in self.optimisers
            for entry in one.state.values()
            for value in entry.values()
        )

    def forward_and_back(self, ids: Tensor) -> None:
        self.objective(ids).backward()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for optimiser in self.optimisers:
            optimiser.step()
        self.forget()

    def forget(self) -> None:
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)


def time_steps(
    every: Sequence[Settings], vocabulary: int, device: torch.device, *, repeats: int = 5, warm: int = 2
) -> list[dict[str, Any]]:
    """Seconds of forward and backward of one micro-batch and of the optimisers for each of `every`, medians
    of `repeats`, on random tokens; the most memory that was taken, in bytes (0 on the CPU).

    The recipes take turns, first with passes, then with updates, so that what warms the device or slows it
    is shared by all.
    """
    timed = []
    for settings in every:
        model = _random_model(settings, vocabulary, device)
        objective = NextToken(model, settings.precision, settings.compiled)
        timed.append(_Timed(settings, model, objective, optimisers(model, settings)))
    for _ in range(warm):
        for one in timed:
            one.forward_and_back(_tokens(one, vocabulary, device))
            one.update()
    for _ in range(repeats):
        for one in timed:
            ids = _tokens(one, vocabulary, device)
            one.passes.append(_measured(one, partial(one.forward_and_back, ids), device))
            one.forget()
    for _ in range(repeats):
        for one in timed:
            one.forward_and_back(_tokens(one, vocabulary, device))
            one.updates.append(_measured(one, one.update, device))
    return [_record(one) for one in timed]


def _measured(one: _Timed, action: Callable[[], object], device: torch.device) -> float:
    """Seconds of an action; the memory that it takes is counted in `one.peak`."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        own = sum(p.nbytes + (0 if p.grad is None else p.grad.nbytes) for p in one.model.parameters())
        others = torch.cuda.memory_allocated(device) - own - one.state_bytes
    begun = time.perf_counter()
    action()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begun
    if cuda:
        one.peak = max(one.peak, torch.cuda.max_memory_allocated(device) - others)
    return seconds


def _tokens(one: _Timed, vocabulary: int, device: torch.device) -> Tensor:
    return torch.randint(vocabulary, (one.settings.micro, one.settings.length + 1), device=device)


def _record(one: _Timed) -> dict[str, Any]:
    forward, updating = statistics.median(one.passes), statistics.median(one.updates)
    tokens = one.settings.micro * one.settings.length
    return {
        "recipe": one.settings.recipe,
        "parameters": sum(p.numel() for p in one.model.parameters()),
        "micro_tokens": tokens,
        "pass_seconds": forward,
        "update_seconds": updating,
        "seconds": {str(batch): forward * batch / tokens + updating for batch in BATCHES},
        "passes": one.passes,
        "updates": one.updates,
        "state_bytes": one.state_bytes,
        "peak_bytes": one.peak,
    }


def _random_model(settings: Settings, vocabulary: int, device: torch.device) -> Decoder:
    """Weights drawn where they will be: a start that nobody trains from."""
    config = settings.shape.config(settings.parts, vocabulary, settings.length)
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device=device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, float(parameter.ndim < 2), STD)
        parameter.requires_grad_(True)
    return model.train()
