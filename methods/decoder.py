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
- `Decoder.residual_scaling`: the per-token residual scale of FPTQuant
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import ops
from kernels.kv_reference import PackedRows, kv_rows
from kernels.reference import fake_quantise
from methods import rope
from methods.bits import KVSpec
from methods.cache import KVCache
from methods.linear import Linear, OnlineHadamard, QuantisedInput, fused_quantiser, project


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. `hidden_size` is the width of the residual stream; `norm_divisor` is what
    RMSNorm divides the sum of squares by (None: the stream's width). `windows[i]` is the sliding
    attention window of layer i (None: full)."""

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
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()


class RMSNorm(nn.Module):
    """x / sqrt(sum(x²)/divisor + eps) * weight.

    weight: [width], [1] (single-scale, OSP), or None once folded into the linears behind it. Half
    precision is normalised in float32; float64 stays float64.
    """

    def __init__(
        self, width: int, eps: float, single_scale: bool = False, divisor: int | None = None
    ) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(
            torch.empty(1 if single_scale else width), requires_grad=False
        )
        self.eps = eps
        self.divisor = divisor

    def rms(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """[..., 1] root of the mean square of x [..., width]; eps grows with scale² where the stream
        is scaled per token, which keeps the function exact (FPTQuant)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        eps: float | Tensor = self.eps if scale is None else self.eps * scale.square()
        return (x.square().sum(-1, keepdim=True) / (self.divisor or x.shape[-1]) + eps).sqrt()

    def apply_gain(self, normalised: Tensor) -> Tensor:
        return normalised if self.weight is None else normalised * self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_gain((x / self.rms(x)).to(x.dtype))

    def into(
        self, x: Tensor, scale: Tensor | None, readers: Sequence[Linear]
    ) -> tuple[Tensor | QuantisedInput, Tensor]:
        """x normalised, as `readers` take it: in codes, by one operation, where they are packed and quantise
        alike; and the root mean square [..., 1]. scale: as in `rms`."""
        reader = fused_quantiser(readers)
        if reader is None:
            rms = self.rms(x, scale)
            return self.apply_gain((x / rms).to(x.dtype)), rms
        kept, codes, rms = ops.rmsnorm_quantise(
            x,
            eps=self.eps,
            divisor=self.divisor,
            gain=self.weight,
            row_scale=scale,
            keep=reader.keep,
            **reader.input_quantiser(),
        )
        return reader.observed(QuantisedInput(codes, kept, x.dtype)), rms


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE; query heads of one group are consecutive.

    `kv_observer`, where set, is shown every unquantised key and value, each [B, kv_heads, T, head_dim];
    `code_observer` the packed keys and values and the positions (from, to) just written. `packed`: keys and
    values are held, and attended to, as codes.
    """

    k_scale: Tensor | None
    k_zero: Tensor | None
    v_scale: Tensor | None
    v_zero: Tensor | None

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_dim = (
            layer,
            config.heads,
            config.kv_heads,
            config.head_dim,
        )
        width, head_dim = config.hidden_size, config.head_dim
        self.q_proj = Linear(width, config.heads * head_dim, config.qkv_bias)
        self.k_proj = Linear(width, config.kv_heads * head_dim, config.qkv_bias)
        self.v_proj = Linear(width, config.kv_heads * head_dim, config.qkv_bias)
        self.o_proj = Linear(config.heads * head_dim, width, config.o_bias)
        self.q_norm = RMSNorm(head_dim, config.rms_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_eps) if config.qk_norm else None
        self.window = config.windows[layer] if config.windows else None
        self.rotation: OnlineHadamard | None = None
        self.output_transform: OnlineHadamard | None = None
        self.kv: KVSpec | None = None
        self.kv_observer: Callable[[Tensor, Tensor], None] | None = None
        self.code_observer: Callable[[PackedRows, PackedRows, int, int], None] | None = None
        self.packed = False
        for name in ("k_scale", "k_zero", "v_scale", "v_zero"):
            self.register_buffer(name, None)

    @property
    def readers(self) -> tuple[Linear, ...]:
        """The linears that read the normalised residual stream."""
        return self.q_proj, self.k_proj, self.v_proj

    def quantise_kv(self, x: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
        """Keys or values [B, H, T, D] as the cache will hold them."""
        if self.kv is None:
            return x
        if self.kv.static and scale is None:
            raise ValueError("a static range of keys and values is asked for, and none has been set")
        # A static range has been clipped when it was found.
        clip = 1.0 if self.kv.static else self.kv.clip
        return fake_quantise(x, self.kv.bits, symmetric=self.kv.symmetric, clip=clip, scale=scale, zero=zero)

    def forward(
        self,
        x: Tensor | QuantisedInput,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """x: [B, T, hidden]; mask: bool [B or 1, 1, T, S] (True = attend) or None for plain causal."""
        batch, length, _ = x.shape
        query, key, value = (
            y.view(batch, length, -1, self.head_dim).transpose(1, 2) for y in project(x, self.readers)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rope.rotate(query, *angles), rope.rotate(key, *angles)
        if self.rotation is not None:
            query, key = self.rotation(query), self.rotation(key)
        if self.kv_observer is not None:
            self.kv_observer(key, value)
        if self.packed:
            out = self._attend_packed(query, key, value, mask, cache)
        else:
            key = self.quantise_kv(key, self.k_scale, self.k_zero)
            value = self.quantise_kv(value, self.v_scale, self.v_zero)
            if cache is not None:
                key, value = cache.append(self.layer, key, value)
            out = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None and length > 1,
                enable_gqa=self.heads != self.kv_heads,
            )
        out = out.transpose(1, 2).reshape(batch, length, -1)
        return self.o_proj(out, row_scale, self.output_transform)

    def _attend_packed(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """Append keys and values as codes, to the cache or to one of this pass alone, and attend to them."""
        spec = self.kv
        assert spec is not None
        batch, heads, length, width = key.shape

        def rows(capacity: int, scale: Tensor | None, zero: Tensor | None) -> PackedRows:
            if spec.static and scale is None:
                raise ValueError("a static range of keys and values is asked for, and none has been set")
            return kv_rows(
                batch,
                heads,
                capacity,
                width,
                spec.bits,
                symmetric=spec.symmetric,
                scale=scale,
                zero=zero,
                dtype=torch.promote_types(key.dtype, torch.float32),
                device=key.device,
            )

        def allocate(capacity: int) -> tuple[PackedRows, PackedRows]:
            return rows(capacity, self.k_scale, self.k_zero), rows(capacity, self.v_scale, self.v_zero)

        keys, values, start = (
            (*allocate(length), 0) if cache is None else cache.reserve(self.layer, length, allocate)
        )
        clip = 1.0 if spec.static else spec.clip
        ops.kv_append(keys, key, start, clip=clip)
        ops.kv_append(values, value, start, clip=clip)
        if self.code_observer is not None:
            self.code_observer(keys, values, start, start + length)
        return ops.kv_attention(query, keys, values, start + length, mask=mask)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(width, hidden, config.mlp_bias)
        self.up_proj = Linear(width, hidden, config.mlp_bias)
        self.down_proj = Linear(hidden, width, config.mlp_bias)
        self.hidden_transform: OnlineHadamard | None = None

    @property
    def readers(self) -> tuple[Linear, ...]:
        """The linears that read the normalised residual stream."""
        return self.gate_proj, self.up_proj

    def forward(self, x: Tensor | QuantisedInput, row_scale: Tensor | None = None) -> Tensor:
        gate, up = project(x, self.readers)
        return self.down_proj(F.silu(gate) * up, row_scale, self.hidden_transform)


@dataclass
class State:
    """What flows between blocks: the residual stream [B, T, hidden] and, with residual scaling, the
    factor S [B, T, 1] by which each token's stream has been multiplied."""

    stream: Tensor
    scale: Tensor | None = None

    def __getitem__(self, index: Any) -> State:
        """The state of some rows and positions: `index` applies to the axes [B, T]."""
        return State(self.stream[index], None if self.scale is None else self.scale[index])

    def to(self, device: torch.device) -> State:
        return State(self.stream.to(device), None if self.scale is None else self.scale.to(device))

    def step(self, norm: RMSNorm, branch: Attention | MLP, *args: Any) -> State:
        """The state after stream + branch(norm(stream)).

        With a scale S: x' = x/rms + S' f(x/rms), S' = S/rms, so that x = S * plain stream throughout
        and the stream that enters each sum has unit RMS (FPTQuant's residual scaling).
        """
        x, rms = norm.into(self.stream, self.scale, branch.readers)
        if self.scale is None:
            return State(self.stream + branch(x, *args))
        scale = self.scale / rms
        normalised = (self.stream / rms).to(self.stream.dtype)
        return State(normalised + branch(x, *args, row_scale=scale), scale)


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
        """The seven quantisable linears with their names inside the block."""
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                yield name, module

    def forward(
        self,
        state: State,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: KVCache | None = None,
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

    def logits(self, state: State) -> Tensor:
        """[B, T, vocab] from the state that leaves the last block."""
        normalised = (state.stream / self.norm.rms(state.stream, state.scale)).to(state.stream.dtype)
        hidden = self.norm.apply_gain(normalised)
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

    def states(self, ids: Tensor, *, mask: Tensor | None = None, cache: KVCache | None = None) -> State:
        """The state [B, T, hidden] that leaves the last block, for ids [B, T]; `logits` takes any part of it.

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
        angles = self.angles(positions)
        state = self.embed(ids)
        masks: dict[int | None, Tensor | None] = {}
        for block in self.layers:
            assert isinstance(block, Block)
            window = block.self_attn.window
            if window not in masks:
                masks[window] = attention_mask(length, start, mask, window, ids.device)
            state = block(state, angles, masks[window], cache)
        return state

    def forward(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Logits [B, T, vocab] of ids [B, T], or of their last `last` positions only.

        mask, cache: as in `states`.
        """
        state = self.states(ids, mask=mask, cache=cache)
        return self.logits(state if last is None else state[:, -last:])


def attention_mask(
    length: int, start: int, real: Tensor | None, window: int | None, device: torch.device
) -> Tensor | None:
    """Which keys each of `length` queries after `start` cached positions may see: bool [B or 1, 1, T, S].

    None where plain causal attention (or a single query that sees everything) says the same. A padded
    query sees itself, which keeps its unused output finite.
    """
    total = start + length
    reach = total if window is None else window
    windowed = total > reach
    if real is None and not windowed and (start == 0 or length == 1):
        return None
    queries = torch.arange(start, total, device=device)[:, None]
    keys = torch.arange(total, device=device)[None, :]
    allowed = keys <= queries
    if real is None:
        if windowed:
            allowed = allowed & (queries - keys < reach)
        return allowed[None, None]
    if windowed:
        # Distance in real tokens, so that padding does not shorten the window.
        position = real.long().cumsum(-1)
        distance = position[:, start:, None] - position[:, None, :]
        allowed = allowed[None] & (distance < reach)
    else:
        allowed = allowed[None]
    allowed = allowed & real[:, None, :]
    return (allowed | (keys == queries)[None])[:, None]
