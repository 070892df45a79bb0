"""How hard the inputs of each block are to quantise: kurtosis, largest value and signal-to-noise per token.

kurtosis = E[((x - mean)/std)⁴] over the channels of one token (population moments; 1.8 is uniform, 3
Gaussian), averaged over tokens. Measured at the inputs of q_proj (site "attention") and gate_proj ("mlp").
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.reference import fake_quantise
from methods.bits import ActivationSpec, QuantiserSettings
from methods.decoder import Block, Decoder

BINS, REACH = 96, 12.0
"""Bins of a histogram of x/rms between -REACH and REACH; what lies beyond counts in the outermost."""


@dataclass(frozen=True)
class Spread:
    """How the channels of tokens spread, averaged over tokens.

    kurtosis: as above. peak: largest |x| over the root mean square. snr: signal to quantisation noise in
    decibels of all tokens together, by the default 4-bit activation quantiser.
    """

    kurtosis: float
    peak: float
    snr: float


@dataclass(frozen=True)
class SiteKurtosis:
    """Mean kurtosis per token at one site of one layer; its spread, and how many values of x/rms fall in
    each bin."""

    layer: int
    site: str
    value: float
    spread: Spread
    counts: tuple[int, ...]


def token_kurtosis(x: Tensor) -> Tensor:
    """Kurtosis of each row of x [..., width], float64 [...]."""
    x = x.to(torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    return centred.square().square().mean(-1) / variance.square().clamp(min=1e-30)


def published_excess(x: Tensor) -> Tensor:
    """Excess kurtosis of each row of x [..., width] as outlier-safe pre-training publishes it (arXiv
    2506.19697): max(E[x⁴]/s⁴ - 3, 0), the fourth moment not centred, s the unbiased standard deviation. The
    paper prints the centred one, `token_kurtosis` - 3. float64 [...]."""
    x = x.to(torch.float64)
    return (x.pow(4).mean(-1) / x.std(-1).pow(4).clamp(min=1e-30) - 3).clamp(min=0)


@torch.no_grad()
def hidden_states(model: Decoder, ids: Tensor) -> Iterator[Tensor]:
    """The residual stream [B, T, width] that enters the first block of ids [B, T], then behind each block,
    the last behind the final norm: layers + 1, as transformers returns them."""
    state = model.embed(ids)
    yield state.stream
    for index, block in enumerate(model.layers, start=1):
        assert isinstance(block, Block)
        state = model.through(block, state)
        yield state.stream if index < len(model.layers) else model.norm.of(state)[1]


def excess_by_layer(model: Decoder, ids: Tensor, alone: bool = False) -> list[float]:
    """Mean `published_excess` over the tokens of ids [B, T] at each of `hidden_states`. alone: every token by
    itself, without context, as the published figures were measured."""
    ids = ids.reshape(-1, 1) if alone else ids
    return [float(published_excess(x).mean()) for x in hidden_states(model, ids)]


def spread(x: Tensor, quantiser: ActivationSpec | None = None) -> Spread:
    """The spread of x [..., width]; computed in float64. `quantiser`: another than the default."""
    x = x.to(torch.float64)
    spec = quantiser or QuantiserSettings().activation(4)
    rounded = fake_quantise(x, spec.bits, symmetric=spec.symmetric, clip=spec.clip, group=spec.group)
    noise = float((rounded - x).square().sum())
    signal = float(x.square().sum())
    return Spread(
        float(token_kurtosis(x).mean()),
        float((x.abs().amax(-1) / _rms(x).squeeze(-1)).mean()),
        10 * math.log10(signal / noise) if noise > 0 else math.inf,
    )


def histogram(x: Tensor) -> Tensor:
    """How many of the values of x/rms, rms per row of x [..., width], fall in each bin: int64 [BINS]."""
    scaled = (x.to(torch.float64) / _rms(x)).flatten()
    places = ((scaled + REACH) * (BINS / (2 * REACH))).floor().clamp(0, BINS - 1)
    return torch.bincount(places.to(torch.int64).cpu(), minlength=BINS)


def _rms(x: Tensor) -> Tensor:
    return x.to(torch.float64).square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)


@torch.no_grad()
def block_input_kurtosis(
    model: Decoder, ids: Tensor, device: torch.device | str | None = None
) -> list[SiteKurtosis]:
    """Spread of the inputs of both sites of every layer on token ids [B, T], without the channels kept in
    full precision, one block at a time on `device`. The norm's gain counts as part of the input unless a
    transform has folded it into the weights.
    """
    found: list[SiteKurtosis] = []
    state = model.embed(ids.to(model.device))

    def observe(x: Tensor, layer: int, site: str, keep: int) -> None:
        x = x[..., keep:]
        here = spread(x)
        found.append(SiteKurtosis(layer, site, here.kurtosis, here, tuple(histogram(x).tolist())))

    for layer, block in model.stream_blocks(device):
        for linear, site in ((block.self_attn.q_proj, "attention"), (block.mlp.gate_proj, "mlp")):
            linear.observer = partial(observe, layer=layer, site=site, keep=linear.keep)
        try:
            state = model.through(block, state)
        finally:
            block.self_attn.q_proj.observer = block.mlp.gate_proj.observer = None
    return found
