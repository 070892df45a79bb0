"""One online Hadamard transform in front of every down_proj, and nothing else ("FFN Had" of Park et al. 2025,
arXiv 2506.19697): what remains to be done for models whose residual stream has no outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.decoder import Decoder
from methods.linear import OnlineHadamard
from methods.method import Artifact, Method
from methods.transforms import Rotations, block_size, rotate


@dataclass(frozen=True, kw_only=True)
class FFNHadamard(Method):
    """The input of every down_proj through a Hadamard matrix at run time, undone in its weight."""

    name: ClassVar[str] = "ffn_hadamard"
    paper: ClassVar[str] = "Park et al. 2025, arXiv 2506.19697"
    seams: ClassVar[frozenset[str]] = frozenset({"hidden"})
    rounding: str = "rtn"

    def transform(self, model: Decoder, artifact: Artifact) -> Decoder:
        return rotate(model, Rotations(hidden=OnlineHadamard(block_size(model.config.intermediate_size))))

    def notes(self, model: Decoder) -> list[str]:
        size = model.config.intermediate_size
        if block_size(size) == size:
            return []
        return [
            f"no Hadamard matrix of order {size} (MLP hidden) is known: block-diagonal, blocks of "
            f"{block_size(size)}"
        ]
