"""QuaRot (Ashkboos et al. 2024, arXiv 2404.00456): random Hadamard rotations remove outliers.

R1 is a randomised Hadamard matrix on the residual stream, R2 an exact one on each value head; R3 on query
and key after RoPE, R4 before down_proj and, where the number of heads has a Hadamard matrix, one across
heads before o_proj run online in float32. The published code also subtracts the mean of the embedding,
which changes the function of an RMSNorm model; that is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.hadamard import is_known_order
from methods.decoder import Decoder
from methods.linear import OnlineHadamard
from methods.method import Artifact, Context, Method
from methods.transforms import Rotations, block_size, hadamard_rows, randomised_hadamard, rotate


@dataclass(frozen=True, kw_only=True)
class QuaRot(Method):
    """Random Hadamard rotations of every seam. `online`: whether R3, R4 and the cross-head transform
    run; without them only R1 and R2, which merge, remain."""

    name: ClassVar[str] = "quarot"
    paper: ClassVar[str] = "Ashkboos et al. 2024, arXiv 2404.00456"
    random: ClassVar[bool] = True
    seams: ClassVar[frozenset[str]] = frozenset(
        {"residual", "value", "query_key", "attention_output", "hidden"}
    )
    rounding: str = "gptq"
    online: bool = True

    def learn(self, model: Decoder, calibration: Tensor | None, ctx: Context) -> Artifact:
        """Draw R1's signs; nothing is learned."""
        return Artifact({"residual": randomised_hadamard(model.config.hidden_size, ctx.seed)})

    def transform(self, model: Decoder, artifact: Artifact) -> Decoder:
        head = hadamard_rows(torch.eye(model.config.head_dim, dtype=torch.float64))
        rotations = Rotations(
            residual=artifact.tensors["residual"],
            values=[head] * model.config.layers,
            **(online_hadamards(model) if self.online else {}),
        )
        return rotate(model, rotations)

    def notes(self, model: Decoder) -> list[str]:
        omitted = (
            "the embedding's mean is not subtracted, as the published code does: it changes the function"
        )
        return [omitted, *hadamard_notes(model, self.online)]


def online_hadamards(model: Decoder) -> dict[str, OnlineHadamard | None]:
    """R3, R4 and the cross-head transform as QuaRot runs them, by their names in `Rotations`."""
    config = model.config
    across = OnlineHadamard(config.heads, inner=config.head_dim) if is_known_order(config.heads) else None
    return {
        "query_key": OnlineHadamard(block_size(config.head_dim)),
        "attention_output": across,
        "hidden": OnlineHadamard(block_size(config.intermediate_size)),
    }


def hadamard_notes(model: Decoder, online: bool) -> list[str]:
    """Where this model's sizes have no Hadamard matrix, and what stands in for it."""
    config = model.config
    sizes = {"residual stream": config.hidden_size, "head": config.head_dim}
    if online:
        sizes["MLP hidden"] = config.intermediate_size
    notes = [
        f"no Hadamard matrix of order {size} ({seam}) is known: block-diagonal, blocks of {block_size(size)}"
        for seam, size in sizes.items()
        if block_size(size) != size
    ]
    if online and not is_known_order(config.heads):
        notes.append(
            f"no Hadamard matrix of order {config.heads} (heads): o_proj's input is rotated per head only"
        )
    return notes
