"""One online Hadamard transform in front of every down_proj, and nothing else ("FFN Had" of Park et al. 2025,
arXiv 2506.19697): what remains to be done for models whose residual stream has no outliers.

Gains of norms stay where they are: nothing rotates what the other linears read, and folding gains into their
weights, which a rotation needs, would make these and their inputs harder to round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.decoder import Decoder
from methods.linear import OnlineHadamard
from methods.method import Artifact, Method
from methods.transforms import block_size, edited, merge_online


@dataclass(frozen=True, kw_only=True)
class FFNHadamard(Method):
    """The input of every down_proj through a Hadamard matrix at run time, undone in its weight."""

    name: ClassVar[str] = "ffn_hadamard"
    paper: ClassVar[str] = "Park et al. 2025, arXiv 2506.19697"
    seams: ClassVar[frozenset[str]] = frozenset({"hidden"})
    rounding: str = "rtn"

    def transform(self, model: Decoder, artifact: Artifact) -> Decoder:
        hadamard = OnlineHadamard(block_size(model.config.intermediate_size))
        for _, block in model.stream_blocks():
            with edited(block) as edit:
                merge_online(edit, "mlp.down_proj", hadamard)
            block.mlp.hidden_transform = hadamard
        return model

    def notes(self, model: Decoder) -> list[str]:
        size = model.config.intermediate_size
        if block_size(size) == size:
            return []
        return [
            f"no Hadamard matrix of order {size} (MLP hidden) is known: block-diagonal, blocks of "
            f"{block_size(size)}"
        ]
