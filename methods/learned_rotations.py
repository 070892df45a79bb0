"""What methods that learn R1 and R2 share: where they start, how they are kept, applied and described."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from methods.capture import Sample
from methods.decoder import Decoder
from methods.kurtosis import spread
from methods.linear import OnlineHadamard
from methods.method import Artifact
from methods.orthogonal import orthogonalise
from methods.transforms import Rotations, hadamard_rows, randomised_hadamard, rotate

ROUNDING_SEQUENCES = 128
"""Calibration sequences that the papers round with, fewer than they learn from."""


@dataclass(frozen=True)
class Pair:
    """R1 [hidden, hidden] and the R2 of every layer [layers, head_dim, head_dim], float64 on the CPU."""

    residual: Tensor
    values: Tensor


def quarot_pair(model: Decoder, seed: int) -> Pair:
    """QuaRot's R1 of this seed, and its R2, a Hadamard matrix without signs: what learning starts from, so
    that seeds pair."""
    config = model.config
    head = hadamard_rows(torch.eye(config.head_dim, dtype=torch.float64))
    return Pair(randomised_hadamard(config.hidden_size, seed), head.expand(config.layers, -1, -1))


def kept(pair: Pair, meta: dict[str, Any]) -> Artifact:
    """As an artifact: single precision, half the bytes (what ships has half of that); `pair_of` makes it
    orthogonal again."""
    tensors = {"residual": pair.residual, "values": pair.values}
    return Artifact({name: tensor.to(torch.float32) for name, tensor in tensors.items()}, meta)


def pair_of(artifact: Artifact) -> Pair:
    """The rotations of an artifact, orthogonal to 1e-12."""
    return Pair(*(orthogonalise(artifact.tensors[name]) for name in ("residual", "values")))


def apply(model: Decoder, artifact: Artifact, online: Mapping[str, OnlineHadamard | None]) -> Decoder:
    """Merge learned rotations; `online` as `Rotations` names them."""
    pair = pair_of(artifact)
    return rotate(model, Rotations(residual=pair.residual, values=list(pair.values), **online))


def site_spreads(
    sample: Sample, pairs: Mapping[str, Pair | None], device: torch.device
) -> list[dict[str, Any]]:
    """Kurtosis, peak and signal-to-noise of every site under each of some rotations (None: unrotated), on the
    rows of a sample, as records {layer, site, rotation, kurtosis, peak, snr}; site: attention, mlp, value.
    One site at a time is on `device`, where they are computed."""
    found = []
    for name, pair in pairs.items():
        for layer, values in enumerate(sample.values):
            rows = {
                "attention": (sample.inputs[2 * layer], None if pair is None else pair.residual),
                "mlp": (sample.inputs[2 * layer + 1], None if pair is None else pair.residual),
                "value": (values, None if pair is None else pair.values[layer]),
            }
            for site, (x, matrix) in rows.items():
                x = x.to(device).to(torch.float32)
                x = x if matrix is None else x @ matrix.to(x)
                found.append({"layer": layer, "site": site, "rotation": name, **asdict(spread(x))})
    return found
