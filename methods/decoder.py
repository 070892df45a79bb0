"""The one decoder that every method transforms: pre-norm, RMSNorm, RoPE, grouped-query attention, gated MLP.

Parameters carry the names of the Hugging Face Llama family (`layers.0.self_attn.q_proj.weight`, without
the leading `model.`), so that checkpoints map one to one. The seams at which methods act:

- residual basis: `embed_tokens`, every linear, `lm_head` (weights only); `config.norm_divisor` where the
  stream is wider than the model (QUAD)
- `Attention.rotation`: online transform of query and key after RoPE (R3)
- `Attention.output_transform`: online transform of o_proj's input (the cross-head Hadamard)
- `MLP.hidden_transform`: online transform of down_proj's input (R4)
- `Attention.kv`: quantiser of what is written to the KV cache
- `Linear.activation`, `Linear.keep`, `Linear.quantised`: quantisers of each linear
- `Linear.packed`, `Attention.packed`: set by methods/execution.py, they run on codes (int4 execution)
- `Attention.qkv_proj`, `MLP.gate_up_proj`: set by methods/execution.py in the place of their parts
- `Decoder.residual_scaling`: the per-token residual scale of FPTQuant
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods import rope
from methods.attention import Attention, Cache, attention_mask
from methods.cache import FixedCache, KVCache
from methods.linear import Linear, OnlineHadamard, QuantisedInput, project
from methods.norm import RMSNorm

__all__ = [
    "MERGED",
    "MLP",
    "Attention",
    "Block",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "RMSNorm",
    "State",
    "attention_mask",
    "parts_of",
]

TOGETHER = 8192
"""Calibration tokens that pass a block together on a GPU."""
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""The linears that one merged linear stands for, in the order of its outputs."""


def parts_of(name: str) -> tuple[str, ...]:
    """The names of the linears that the linear of this name stands for: its own, unless it is merged."""
    stem, dot, leaf = name.rpartition(".")
    return tuple(stem + dot + part for part in MERGED.get(leaf, (leaf,)))


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. `hidden_size` is the width of the residual stream; `norm_divisor` is what
    RMSNorm divides the sum of squares by (None: the stream's width). `windows[i]` is the sliding
    attention window of layer i (None: full). `recipe`: how it was trained, where that is on record."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_eps: float
    rope_theta: float
    rope_scaling: rope.RopeScaling
    max_positions: int
    tied: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    single_scale_norm: bool = False
    embedding_projections: bool = False
    norm_divisor: int | None = None
    windows: tuple[int | None, ...] = ()
    recipe: str | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    gate_up_proj: Linear | None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.register_module("gate_up_proj", None)
        self.gate_proj = Linear(width, hidden, config.mlp_bias)
        self.up_proj = Linear(width, hidden, config.mlp_bias)
        self.down_proj = Linear(hidden, width, config.mlp_bias)
        self.hidden_transform: OnlineHadamard | None = None

    @property
    def readers(self) -> tuple[Linear, ...]:
        """The linears that read the normalised residual stream."""
        if self.gate_up_proj is not None:
            return (self.gate_up_proj,)
        return self.gate_proj, self.up_proj

    def forward(self, x: Tensor | QuantisedInput, row_scale: Tensor | None = None) -> Tensor:
        outputs: Sequence[Tensor] = project(x, self.readers)
        gate, up = outputs[0].chunk(2, dim=-1) if len(outputs) == 1 else outputs
        return self.down_proj(up, row_scale, self.hidden_transform, gate)


@dataclass
class State:
    """What flows between blocks: the residual stream [B, T, hidden], as `base` and what the last `branch` has
    yet to add to it (the next norm does, in one pass), and with residual scaling the factor S [B, T, 1] by
    which each token's stream has been multiplied."""

    base: Tensor
    scale: Tensor | None = None
    branch: Tensor | None = None

    @property
    def stream(self) -> Tensor:
        """The whole residual stream."""
        return self.base if self.branch is None else self.base + self.branch

    def __getitem__(self, index: Any) -> State:
        """The state of some rows and positions: `index` applies to the axes [B, T]."""
        scale, branch = (None if x is None else x[index] for x in (self.scale, self.branch))
        return State(self.base[index], scale, branch)

    def to(self, device: torch.device) -> State:
        """The state there, summed up."""
        return State(self.stream.to(device), None if self.scale is None else self.scale.to(device))

    def step(self, norm: RMSNorm, branch: Attention | MLP, *args: Any) -> State:
        """The state after stream + branch(norm(stream)).

        With a scale S: x' = x/rms + S' f(x/rms), S' = S/rms, so that x = S * plain stream throughout
        and the stream that enters each sum has unit RMS (FPTQuant's residual scaling). The norm gives x/rms
        and S', and the branch's last linear multiplies by S' as it rounds its results: no pass is added.
        """
        stream, x, scale = norm.into(self, branch.readers)
        return State(stream, scale, branch(x, *args, row_scale=scale))


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        norm = (config.hidden_size, config.rms_eps, config.single_scale_norm, config.norm_divisor)
        self.input_layernorm = RMSNorm(*norm)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(*norm)
        self.mlp = MLP(config)

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """The seven quantisable linears, fewer where some are merged, with their names inside the block."""
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                yield name, module

    def forward(
        self,
        state: State,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> State:
        state = state.step(self.input_layernorm, self.self_attn, angles, mask, cache)
        return state.step(self.post_attention_layernorm, self.mlp)


class Decoder(nn.Module):
    """Token ids to logits. See the module's docstring for the seams."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Parameter(
            torch.empty(config.vocab_size, config.hidden_size), requires_grad=False
        )
        self.embed_in = (
            Linear(config.hidden_size, config.hidden_size) if config.embedding_projections else None
        )
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_eps, config.single_scale_norm, config.norm_divisor)
        self.embed_out = (
            Linear(config.hidden_size, config.hidden_size) if config.embedding_projections else None
        )
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tied:
            self.lm_head.weight = self.embed_tokens
        self.residual_scaling = False
        self.execution = "simulate"
        with torch.device("cpu"):  # also where the decoder itself is built without storage
            self.inverse_frequencies = rope.inverse_frequencies(
                config.rope_theta, config.head_dim, config.rope_scaling
            )

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.dtype

    def new_cache(self) -> KVCache:
        return KVCache(self.config.layers)

    @property
    def merged(self) -> bool:
        """Whether any linears have been merged; `linears` then has other names, see `parts_of`."""
        return any(parts_of(name) != (name,) for name, _ in self.linears())

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """Every quantisable linear by its full name, such as layers.3.mlp.down_proj, in execution order."""
        for index, block in enumerate(self.layers):
            assert isinstance(block, Block)
            for name, linear in block.linears():
                yield f"layers.{index}.{name}", linear

    def stream_blocks(self, device: torch.device | str | None = None) -> Iterator[tuple[int, Block]]:
        """Blocks in order, each on `device` while it is worked on and back home afterwards, so that
        whoever transforms or rounds a model needs one block's memory there."""
        home = self.device
        device = torch.device(device) if device is not None else home
        for index, block in enumerate(self.layers):
            assert isinstance(block, Block)
            if device != home:
                block.to(device)
            yield index, block
            if device != home:
                block.to(home)
                for _, linear in block.linears():
                    if linear.quantised is not None:
                        linear.quantised = linear.quantised.to(home)

    def embed(self, ids: Tensor) -> State:
        """ids [B, T] to the state that enters the first block."""
        stream = F.embedding(ids, self.embed_tokens)
        if self.embed_in is not None:
            stream = self.embed_in(stream)
        scale = None
        if self.residual_scaling:
            scale = torch.ones(
                *ids.shape, 1, dtype=torch.promote_types(stream.dtype, torch.float32), device=ids.device
            )
        return State(stream, scale)

    def batches(self, ids: Tensor, device: torch.device) -> list[State]:
        """The states of calibration tokens ids [samples, length] that enter the first block, on `device`,
        where `stream_blocks` puts the block that works on them. On a CPU a state is one sequence; on a GPU,
        which would wait for launches, it is as many as have TOGETHER tokens.
        """
        together = max(1, TOGETHER // ids.shape[1]) if device.type == "cuda" else 1
        return [self.embed(rows.to(self.device)).to(device) for rows in ids.split(together) if len(rows)]

    def logits(self, state: State) -> Tensor:
        """[B, T, vocab] from the state that leaves the last block."""
        _, hidden, _ = self.norm.of(state)
        if self.embed_out is not None:
            hidden = self.embed_out(hidden)
        return self.lm_head(hidden)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """RoPE cos and sin for positions [B, T], each [B, 1, T, head_dim/2]."""
        return rope.cos_sin(self.inverse_frequencies, positions, self.dtype)

    def through(self, block: Block, state: State) -> State:
        """The state behind one block, for whole sequences without padding or cache; computed where the
        block is, returned to where the state was."""
        device, home = block.mlp.down_proj.weight.device, state.stream.device
        length = state.stream.shape[1]
        mask = attention_mask(length, 0, None, block.self_attn.window, device)
        out = block(state.to(device), self.angles(torch.arange(length, device=device)[None]), mask)
        return out.to(home)

    def states(self, ids: Tensor, *, mask: Tensor | None = None, cache: Cache | None = None) -> State:
        """The state of [B, T] that leaves the last block, for ids [B, T]; `logits` takes any part of it.

        mask: bool [B, S], True at real tokens, over all S = cache.length + T key positions; padding may
        stand on either side, positions count real tokens. cache: continued and extended.
        """
        batch, length = ids.shape
        start = 0 if cache is None else cache.length
        if mask is None:
            positions = torch.arange(start, start + length, device=ids.device).expand(batch, length)
        else:
            if mask.shape != (batch, start + length):
                expected = (batch, start + length)
                raise ValueError(f"mask {tuple(mask.shape)}: must be {expected}, cached positions included")
            mask = mask.bool()
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, start:]
        masks = {window: attention_mask(length, start, mask, window, ids.device) for window in self.windows}
        state = self.flow(ids, self.angles(positions), masks, cache)
        if isinstance(cache, FixedCache):
            cache.length = start + length
        return state

    @property
    def windows(self) -> set[int | None]:
        """The attention windows of all layers."""
        attentions = (block.self_attn for block in self.layers if isinstance(block, Block))
        return {attention.window for attention in attentions}

    def flow(
        self,
        ids: Tensor,
        angles: tuple[Tensor, Tensor],
        masks: Mapping[int | None, Tensor | None],
        cache: Cache | None,
    ) -> State:
        """ids [B, T] through embedding and all blocks. masks: of `Attention.forward`, by its window."""
        state = self.embed(ids)
        for block in self.layers:
            assert isinstance(block, Block)
            state = block(state, angles, masks[block.self_attn.window], cache)
        return state

    def forward(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Logits [B, T, vocab] of ids [B, T], or of their last `last` positions only.

        mask, cache: as in `states`.
        """
        state = self.states(ids, mask=mask, cache=cache)
        return self.logits(state if last is None else state[:, -last:])
