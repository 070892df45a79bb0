"""What a model looks like inside while it is trained: excess kurtosis of the residual stream by layer, and
how the inputs of linears spread, those of down_proj apart, since they stay hard where the stream is easy."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import ops
from methods.decoder import Block, Decoder
from methods.kurtosis import BINS, REACH, excess_by_layer, histogram, spread

SITES = {"attention": "self_attn.q_proj", "mlp": "mlp.gate_proj", "down_proj": "mlp.down_proj"}


@torch.no_grad()
def describe(model: Decoder, ids: Tensor, histograms: bool = False) -> dict[str, Any]:
    """Measured on ids [B, T] as JSON.

    excess: of the published definition, mean over tokens, at the embedding and behind every layer; `alone`
    without context. sites: by name in `SITES`, per layer: kurtosis per token (3 is Gaussian), largest value
    over the root mean square, and the largest value of all. histograms: counts of x/rms, layers together, by
    site.
    """
    with ops.reference_only():
        found: dict[str, Any] = {
            "excess": excess_by_layer(model, ids),
            "alone": excess_by_layer(model, ids, alone=True),
            **_sites(model, ids, histograms),
        }
    return found


def _sites(model: Decoder, ids: Tensor, histograms: bool) -> dict[str, Any]:
    sites: dict[str, list[dict[str, float]]] = {name: [] for name in SITES}
    counts = {name: torch.zeros(BINS, dtype=torch.int64) for name in SITES}

    def observe(x: Tensor, site: str) -> None:
        here = spread(x)
        largest = float(x.abs().max())
        sites[site].append(
            {"kurtosis": here.kurtosis, "peak": here.peak, "snr": here.snr, "largest": largest}
        )
        if histograms:
            counts[site] += histogram(x)

    state = model.embed(ids)
    for block in model.layers:
        assert isinstance(block, Block)
        watched = {name: block.get_submodule(path) for name, path in SITES.items()}
        for name, linear in watched.items():
            linear.observer = partial(observe, site=name)  # type: ignore[assignment]
        try:
            state = model.through(block, state)
        finally:
            for linear in watched.values():
                linear.observer = None  # type: ignore[assignment]
    if not histograms:
        return {"sites": sites}
    drawn = {name: {"reach": REACH, "counts": counts[name].tolist()} for name in SITES}
    return {"sites": sites, "histograms": drawn}
