"""A decoder to train: how it begins, the pass that has gradients, and the plain Llama it becomes.

The pass is that of `methods.decoder.Decoder` without its quantisers, written over the tensors of one block,
so that a compiler makes one graph for all blocks; the tests hold the two equal.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.kv_reference import rotate
from methods import rope
from methods.checkpoint import RECIPE_KEY
from methods.checkpoint_folder import appearing, copy_companions, write_json, write_tensors
from methods.decoder import Block, Decoder, DecoderConfig
from methods.norm import RMSNorm
from methods.transforms import absorb_projections, untie

STD = 0.02
"""Standard deviation of what weights begin at; that of what writes to the stream is lower by √(2 layers)."""

BlockPass = Callable[..., Tensor]


def new_model(config: DecoderConfig, seed: int, device: torch.device | str = "cpu") -> Decoder:
    """A decoder in float32 with gradients: normal weights by a generator of its own, which is the CPU's so
    that a seed gives one model everywhere; projections orthogonal, norms 1."""
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.startswith("embed_") and name.endswith(".weight"):
            nn.init.orthogonal_(parameter, generator=generator)
        elif parameter.ndim < 2:
            nn.init.ones_(parameter)
        else:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(
                parameter, 0.0, STD / math.sqrt(2 * config.layers) if writes else STD, generator=generator
            )
        parameter.requires_grad_(True)
    return model.to(device).train()


def block_pass(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    eps: float,
    gains: tuple[Tensor, Tensor],
    qkv: tuple[Tensor, Tensor, Tensor],
    output: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
) -> Tensor:
    """x [B, T, width] behind one block of these weights; cos, sin [1, 1, T, head_dim/2]."""
    batch, length, _ = x.shape
    normed = normalised(x, gains[0], eps)
    query, key, value = (F.linear(normed, w).view(batch, length, -1, head_dim).transpose(1, 2) for w in qkv)
    query, key = (rotate(part, cos, sin).to(value.dtype) for part in (query, key))
    attended = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )
    x = x + F.linear(attended.transpose(1, 2).reshape(batch, length, -1), output)
    normed = normalised(x, gains[1], eps)
    return x + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)


def normalised(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., width] with a gain [width] or [1]."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps) * gain


def final_hidden(model: Decoder, ids: Tensor, block: BlockPass = block_pass) -> Tensor:
    """What lm_head reads, [B, T, width], for ids [B, T]."""
    config = model.config
    x = F.embedding(ids, model.embed_tokens)
    if model.embed_in is not None:
        x = F.linear(x, model.embed_in.weight).to(model.embed_tokens.dtype)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    cos, sin = rope.cos_sin(model.inverse_frequencies, positions, x.dtype)
    for layer in model.layers:
        assert isinstance(layer, Block)
        attention, mlp = layer.self_attn, layer.mlp
        x = block(
            x,
            cos,
            sin,
            config.head_dim,
            config.rms_eps,
            (_gain(layer.input_layernorm), _gain(layer.post_attention_layernorm)),
            (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
            attention.o_proj.weight,
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.down_proj.weight,
        )
    x = normalised(x, _gain(model.norm), config.rms_eps)
    return x if model.embed_out is None else F.linear(x, model.embed_out.weight)


def _gain(norm: RMSNorm) -> Tensor:
    assert norm.weight is not None
    return norm.weight


class NextToken(nn.Module):
    """Mean cross-entropy in nats of tokens 2 to T of ids [B, T] under a decoder: what is minimised, and what
    DDP wraps."""

    def __init__(self, model: Decoder, precision: str = "fp32", compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.autocast = precision == "bf16"
        # Every recipe and length of a process gets its graph; torch gives up after a few otherwise.
        self.block: BlockPass = torch.compile(block_pass, dynamic=False) if compiled else block_pass

    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.autocast):
            hidden = final_hidden(self.model, ids[:, :-1], self.block)
            logits = F.linear(hidden, self.model.lm_head.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def plain(model: Decoder) -> Decoder:
    """The same function as a plain Llama: projections multiplied, in float64, into an embedding and a head of
    their own, a single scale spread over all channels."""
    found = copy.deepcopy(model)
    untie(found)
    absorb_projections(found)
    for module in list(found.modules()):
        if isinstance(module, RMSNorm) and module.weight is not None and module.weight.numel() == 1:
            module.weight = nn.Parameter(module.weight.expand(found.config.hidden_size).clone(), False)
    for parameter in found.parameters():
        parameter.requires_grad_(False)
    return found.eval()


def save_plain(
    model: Decoder, folder: Path, tokenizer: Path, recipe: str, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write `plain(model)` as a checkpoint that transformers reads too. tokenizer: the folder that holds its
    files. config.json says by which recipe it was trained."""
    config = model.config
    tensors = {}
    for name, parameter in plain(model).named_parameters():
        renamed = {"embed_tokens": "model.embed_tokens.weight", "lm_head.weight": name}
        tensors[renamed.get(name, f"model.{name}")] = parameter.detach().to("cpu", dtype)
    settings: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0],
        "dtype": str(dtype).removeprefix("torch."),
        RECIPE_KEY: recipe,
    }
    with appearing(folder) as inside:
        write_tensors(inside, tensors)
        write_json(inside / "config.json", settings)
        copy_companions(tokenizer, inside)
