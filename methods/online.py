"""What a decoder computes at run time beyond the plain one: the price of transforms that do not merge."""

from __future__ import annotations

from dataclasses import dataclass

from methods.decoder import Block, Decoder


@dataclass(frozen=True)
class OnlinePart:
    """Transforms of one kind: how many run per token, the width of each, and the order of their Hadamard
    matrices (None where it is a scale)."""

    seam: str
    count: int
    width: int
    size: int | None


def online_parts(model: Decoder) -> list[OnlinePart]:
    """Everything that runs online, each kind once; empty for a decoder whose transforms have all merged."""
    config = model.config
    found: dict[tuple[str, int, int], int] = {}
    for block in model.layers:
        assert isinstance(block, Block)
        attention = block.self_attn
        heads = attention.heads + attention.kv_heads
        seams = (
            ("query and key", attention.rotation, heads * attention.head_dim),
            ("o_proj's input", attention.output_transform, attention.heads * attention.head_dim),
            ("down_proj's input", block.mlp.hidden_transform, config.intermediate_size),
        )
        for seam, transform, width in seams:
            if transform is not None:
                key = (seam, width, transform.size)
                found[key] = found.get(key, 0) + 1
    parts = [OnlinePart(seam, count, width, size) for (seam, width, size), count in found.items()]
    if model.residual_scaling:
        parts.append(OnlinePart("residual stream", 2 * config.layers, config.hidden_size, None))
    return parts
