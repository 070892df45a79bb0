"""Tiny random models of every supported family, made by transformers: the reference that is not this project.

Every parameter is random. Default initialisation (gains of one, biases of zero) hides a gain that is folded
into the wrong linear and a bias that is not rotated, so gains lie in [0.3, 3] and biases are not small.
Weights are scaled so that attention looks at several tokens and logits are of order one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from transformers import modeling_rope_utils

from methods.checkpoint import build as build_decoder
from methods.checkpoint import from_transformers
from methods.decoder import Decoder

# One entry per family and trait. Sizes are those of real checkpoints where they are awkward: 576 = 36 * 16,
# 1536 = 12 * 128, 896 = 28 * 32 and 4864 = 76 * 64 are no powers of two; 9, 3 and 14 heads have no Hadamard
# matrix.
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa-tied": (
        "Llama",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "num_hidden_layers": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "rms_norm_eps": 1e-5,
        },
    ),
    "llama3-scaled-rope": (
        "Llama",
        {
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_hidden_layers": 3,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama-linear-rope": (
        "Llama",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_hidden_layers": 2,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
        },
    ),
    "llama-biases": (
        "Llama",
        {
            "hidden_size": 80,
            "intermediate_size": 144,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "num_hidden_layers": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-3,
        },
    ),
    "mistral-window": (
        "Mistral",
        {
            "hidden_size": 72,
            "intermediate_size": 192,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_hidden_layers": 3,
            "sliding_window": 5,
        },
    ),
    "qwen2-bias-tied": (
        "Qwen2",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
        },
    ),
    "qwen2-mixed-window": (
        "Qwen2",
        {
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
    "qwen3-qk-norm": (
        "Qwen3",
        {
            "hidden_size": 192,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "num_hidden_layers": 2,
            "attention_bias": True,
            "rms_norm_eps": 1e-6,
        },
    ),
}
NAMES = tuple(_SHAPES)
SMALL = tuple(name for name in NAMES if name not in ("llama-gqa-tied", "qwen2-bias-tied"))
VOCABULARY = 131


def config(name: str, **changes: Any) -> Any:
    """The transformers configuration of one test model."""
    family, shape = _SHAPES[name]
    make = getattr(transformers, f"{family}Config")
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
    return make(**{**common, **shape, **changes})


def build(config: Any, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A transformers model of this configuration, its parameters drawn in float64 and cast once."""
    architecture = f"{type(config).__name__.removesuffix('Config')}ForCausalLM"
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: _draw(name, tuple(parameter.shape), generator).to(dtype)
        for name, parameter in model.named_parameters()
    }
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    with torch.device("cpu"):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if "norm" in name:
        return 0.3 + 2.7 * torch.rand(shape, generator=generator, dtype=torch.float64)
    if name.endswith("bias"):
        return 0.5 * normal()
    # Inputs behind a gain have an RMS of 1.8, so 0.5 keeps scores of query and key within a few units.
    spread = 0.5 if "q_proj" in name or "k_proj" in name else 1.0
    return spread * normal() / shape[-1] ** 0.5


@lru_cache(maxsize=2 * len(NAMES))
def model(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """The test model of this name; shared by tests, so not to be changed."""
    return build(config(name), dtype)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


class _Torch64:
    """torch, in which float32 is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def true_float64(model: Any) -> Iterator[Any]:
    """Make a float64 model of transformers compute in float64 throughout.

    transformers casts to float32 inside its RMSNorm, its rotary embedding (inverse frequencies and angles)
    and its eager softmax, whatever the model's dtype. Those casts name `torch.float32`, `torch.float` or
    `.float()`: here they mean float64 while the model runs, and nothing else of the reference changes.
    """
    modules = [sys.modules[type(model).__module__], modeling_rope_utils]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "torch", _Torch64()))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        narrow = model.model.rotary_emb
        model.model.rotary_emb = type(narrow)(model.config)
        try:
            yield model
        finally:
            model.model.rotary_emb = narrow


@torch.no_grad()
def reference_logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of transformers by its eager attention; float64 models run in true float64."""
    model.set_attn_implementation("eager")
    arguments: dict[str, Any] = {"use_cache": False}
    if mask is not None:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        arguments |= {"attention_mask": mask.long(), "position_ids": positions}
    exact = true_float64(model) if model.dtype == torch.float64 else contextlib.nullcontext(model)
    with exact as lifted:
        logits: Tensor = lifted(input_ids=ids, **arguments).logits
    return logits


def relative(got: Tensor, want: Tensor) -> float:
    """max |got - want| as a share of the range of `want`, in float64; nan where either is not finite."""
    got, want = got.double(), want.double()
    return float((got - want).abs().max() / (want.max() - want.min()))


def rebuilt(model: Any, changes: dict[str, Tensor], **config: Any) -> Decoder:
    """The decoder of a transformers model with some tensors replaced (the decoder's names) and another
    configuration, for traits that no family of transformers has."""
    decoder = from_transformers(model)
    tensors: dict[str, Tensor] = {**dict(decoder.named_parameters()), **changes}
    tensors.setdefault("lm_head.weight", decoder.lm_head.weight)
    return build_decoder(dataclasses.replace(decoder.config, **config), tensors, decoder.dtype)
