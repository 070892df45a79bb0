"""Two small random models of awkward shapes, on which every method and every quantiser runs in a second.

Both have two layers, fewer KV heads than heads, biases, gains and weights that are all random, and two
channels far larger than the others in what each half of a layer reads, as in language models. "odd": no width
is a multiple of 8, and every Hadamard factor is other than a power of two. "odd-g8": all widths are multiples
of 8, for quantisers in groups; query and key are normalised, and the second layer attends to a sliding
window.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from methods.checkpoint import Checkpoint, open_checkpoint, read_config
from methods.decoder import Decoder

_COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_bias": True,
}
_SHAPES: dict[str, dict[str, Any]] = {
    "odd": {
        "model_type": "llama",
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "odd-g8": {
        "model_type": "qwen3",
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "tie_word_embeddings": False,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
}
NAMES = tuple(_SHAPES)
_OUTLIERS = {3: 60.0, 17: 20.0}


def odd_checkpoint(name: str, folder: Path, seed: int = 0) -> Checkpoint:
    """Write the model `name` (one of NAMES) into `folder` and open it; float32."""
    (folder / "config.json").write_text(json.dumps(_COMMON | _SHAPES[name]))
    with torch.device("meta"):
        decoder = Decoder(read_config(folder))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"model.{own}{'.weight' if own == 'embed_tokens' else ''}": _draw(own, tuple(empty.shape), generator)
        for own, empty in decoder.named_parameters()
        if not (decoder.config.tied and own.startswith("lm_head"))
    }
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(str(folder))


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gains between 0.3 and 1.3 but for the outliers, small biases, and weights that mostly keep the size of
    what they multiply."""
    if "norm" in name:
        gain = 0.3 + torch.rand(shape, generator=generator)
        for channel, factor in _OUTLIERS.items() if "layernorm" in name else ():
            gain[channel] *= factor
        return gain
    drawn = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.1 * drawn
    # Small enough for attention to look at several tokens in spite of the outliers.
    spread = 0.12 if "q_proj" in name or "k_proj" in name else 1.0
    return spread * drawn / shape[-1] ** 0.5
