"""Per-token kurtosis of what the linears of each block read: how far activations are from outlier-free.

kurtosis = E[((x - mean)/std)⁴] over the channels of one token (population moments; 1.8 is uniform, 3
Gaussian), averaged over tokens. Measured at the inputs of q_proj (site "attention") and gate_proj ("mlp").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.decoder import Decoder


@dataclass(frozen=True)
class SiteKurtosis:
    """Mean kurtosis per token at one site of one layer."""

    layer: int
    site: str
    value: float


def token_kurtosis(x: Tensor) -> Tensor:
    """Kurtosis of each row of x [..., width], float64 [...]."""
    x = x.to(torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    return centred.pow(4).mean(-1) / variance.square().clamp(min=1e-30)


@torch.no_grad()
def block_input_kurtosis(
    model: Decoder, ids: Tensor, device: torch.device | str | None = None
) -> list[SiteKurtosis]:
    """Kurtosis of the inputs of both sites of every layer on token ids [B, T], one block at a time on
    `device`. The norm's gain counts as part of the input unless a transform has folded it into the weights.
    """
    found: list[SiteKurtosis] = []
    state = model.embed(ids.to(model.device))
    for layer, block in model.stream_blocks(device):
        for site, linear in (("attention", block.self_attn.q_proj), ("mlp", block.mlp.gate_proj)):

            def observe(x: Tensor, layer: int = layer, site: str = site) -> None:
                found.append(SiteKurtosis(layer, site, float(token_kurtosis(x).mean())))

            linear.observer = observe
        try:
            state = model.through(block, state)
        finally:
            block.self_attn.q_proj.observer = block.mlp.gate_proj.observer = None
    return found
