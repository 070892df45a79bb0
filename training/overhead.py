"""How long a step takes by each recipe: the pass forward and back, and the optimisers' part of it.

The optimisers' part does not grow with the batch, so its share of a step is given for several batches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from methods.decoder import Decoder
from training.model import STD, NextToken
from training.recipe import Settings
from training.trainer import optimisers

BATCHES = (1 << 15, 1 << 19, 1 << 22)
"""Tokens a step; the last is the paper's."""


def time_step(
    settings: Settings, vocabulary: int, device: torch.device, *, repeats: int = 5, warm: int = 2
) -> dict[str, Any]:
    """Seconds of forward and backward of one micro-batch and of the optimisers, medians of `repeats`, on
    random tokens; the most memory that was taken, in bytes (0 on the CPU)."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model = _random_model(settings, vocabulary, device)
    objective = NextToken(model, settings.precision, settings.compiled)
    moved = optimisers(model, settings)
    ids = torch.randint(vocabulary, (settings.micro, settings.length + 1), device=device)
    found: dict[str, list[float]] = {"pass": [], "update": []}

    def timed(what: str, action: Callable[[], object]) -> None:
        if cuda:
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        action()
        if cuda:
            torch.cuda.synchronize(device)
        found[what].append(time.perf_counter() - begun)

    def forward_and_back() -> None:
        objective(ids).backward()

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimiser in moved:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    for _ in range(warm + repeats):
        timed("pass", forward_and_back)
        timed("update", update)
    forward, updating = (statistics.median(found[what][warm:]) for what in ("pass", "update"))
    tokens = settings.micro * settings.length
    state = sum(
        value.nbytes for one in moved for entry in one.state.values() for value in entry.values()
    )  # every entry is a tensor
    return {
        "recipe": settings.recipe,
        "parameters": sum(p.numel() for p in model.parameters()),
        "micro_tokens": tokens,
        "pass_seconds": forward,
        "update_seconds": updating,
        "seconds": {str(batch): forward * batch / tokens + updating for batch in BATCHES},
        "state_bytes": state,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else 0,
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
