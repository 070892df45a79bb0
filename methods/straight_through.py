"""The quantised decoder as a function of R1 and R2 that has gradients: what SpinQuant descends on.

Rounding is passed straight through: the gradient of a quantiser is 1 everywhere, clipped values included,
and its scales are constants (SpinQuant, arXiv 2405.16406). Nothing is merged. The stream stays in the model's
own basis and is rotated, quantised and rotated back at every seam, which for orthogonal matrices is the
function that merged rotations compute and spares rotating every weight at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from kernels.kv_reference import rotate
from kernels.reference import fake_quantise
from methods.bits import Bits, KVSpec, LinearSpec, QuantiserSettings
from methods.decoder import Block, Decoder, State, attention_mask
from methods.gradients import straight_through
from methods.linear import Linear, OnlineHadamard
from methods.rtn import round_to_nearest

Turn = Callable[[Tensor, bool], Tensor]
"""Rows of (x [..., n], back) in another orthogonal basis; `back`: returned from there."""


@dataclass(frozen=True)
class Simulation:
    """What is quantised, and which transforms run online (R3 on query and key, R4 before down_proj)."""

    linear: LinearSpec
    kv: KVSpec | None
    query_key: OnlineHadamard | None
    hidden: OnlineHadamard | None

    @classmethod
    def of(
        cls, bits: Bits, query_key: OnlineHadamard | None = None, hidden: OnlineHadamard | None = None
    ) -> Simulation:
        """At these bits, by the default quantisers; R3 serves a quantised cache alone."""
        settings = QuantiserSettings()
        kv = settings.kv(bits)
        return cls(settings.linear(bits), kv, None if kv is None else query_key, hidden)

    def activation(self, x: Tensor) -> Tensor:
        """A linear's input [..., in], quantised per token."""
        spec = self.linear.activation
        if spec is None:
            return x
        quantise = partial(
            fake_quantise, bits=spec.bits, symmetric=spec.symmetric, clip=spec.clip, group=spec.group
        )
        return straight_through(x, quantise)

    def cached(self, x: Tensor) -> Tensor:
        """Keys or values [B, H, T, D], quantised per token and head."""
        if self.kv is None:
            return x
        quantise = partial(fake_quantise, bits=self.kv.bits, symmetric=self.kv.symmetric, clip=self.kv.clip)
        return straight_through(x, quantise)

    def weight(self, weight: Tensor) -> Tensor:
        """A rotated weight [out, in], rounded to nearest."""
        if self.linear.bits == 16:
            return weight
        return straight_through(weight, lambda w: round_to_nearest(w, self.linear).dequantise().to(w.dtype))


def next_token_loss(
    model: Decoder, ids: Tensor, residual: Tensor, values: Tensor, simulation: Simulation
) -> Tensor:
    """Mean cross-entropy, a scalar in nats, of tokens 2 to T of ids [B, T] under the quantised decoder."""
    logits = quantised_logits(model, ids, residual, values, simulation)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), ids[:, 1:].flatten())


def quantised_logits(
    model: Decoder, ids: Tensor, residual: Tensor, values: Tensor, simulation: Simulation
) -> Tensor:
    """Logits [B, T, vocab] of ids [B, T], differentiable by R1, `residual` [hidden, hidden], and the R2 of
    every layer, `values` [layers, head_dim, head_dim]; all on the model's device and in its dtype.

    Each block is computed again when gradients pass it: of what lies between, memory holds one block's.
    """
    length = ids.shape[1]
    angles = model.angles(torch.arange(length, device=ids.device)[None])
    x = model.embed(ids).stream
    for index, block in enumerate(model.layers):
        assert isinstance(block, Block)
        mask = attention_mask(length, 0, None, block.self_attn.window, ids.device)
        run = partial(_block, block, angles, mask, simulation)
        x = checkpoint(run, x, residual, values[index], use_reentrant=False, preserve_rng_state=False)
    return model.logits(State(x))


def _block(
    block: Block,
    angles: tuple[Tensor, Tensor],
    mask: Tensor | None,
    simulation: Simulation,
    x: Tensor,
    residual: Tensor,
    value: Tensor,
) -> Tensor:
    """The stream [B, T, hidden] behind one block."""
    attention, mlp = block.self_attn, block.mlp
    batch, length, _ = x.shape
    stream, head = _times(residual), _times(value, per=attention.head_dim)
    hidden = _online(simulation.hidden)
    project = partial(_project, simulation)

    norm = block.input_layernorm
    read = stream(simulation.activation(stream((x / norm.rms(x)).to(x.dtype), False)), True)
    query, key, values = (
        project(linear, read, norm.weight, stream, head if linear is attention.v_proj else None)
        .view(batch, length, -1, attention.head_dim)
        .transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if attention.q_norm is not None and attention.k_norm is not None:
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = rotate(query, *angles), rotate(key, *angles)
    if simulation.query_key is not None:
        query, key = simulation.query_key(query), simulation.query_key(key)
    # On GPUs the fused kernels add up gradients in any order: another run would learn another matrix.
    with sdpa_kernel(SDPBackend.MATH) if query.is_cuda else nullcontext():
        out = F.scaled_dot_product_attention(
            query,
            simulation.cached(key),
            simulation.cached(values @ value),
            attn_mask=mask,
            is_causal=mask is None and length > 1,
            enable_gqa=attention.heads != attention.kv_heads,
        )
    out = head(simulation.activation(out.transpose(1, 2).reshape(batch, length, -1)), True)
    x = x + project(attention.o_proj, out, None, head, stream)

    norm = block.post_attention_layernorm
    read = stream(simulation.activation(stream((x / norm.rms(x)).to(x.dtype), False)), True)
    gate, up = (project(linear, read, norm.weight, stream, None) for linear in (mlp.gate_proj, mlp.up_proj))
    out = hidden(simulation.activation(hidden(F.silu(gate) * up, False)), True)
    return x + project(mlp.down_proj, out, None, hidden, stream)


def _project(
    simulation: Simulation,
    linear: Linear,
    x: Tensor,
    gain: Tensor | None,
    inward: Turn,
    outward: Turn | None,
) -> Tensor:
    """(x * gain) Wᵀ + bias for x [..., in], already quantised. A weight of fewer than 16 bits is rounded in
    the bases that it will be merged into, W gain between `inward` and `outward`, and turned back."""
    if simulation.linear.bits == 16:
        return F.linear(x if gain is None else x * gain, linear.weight, linear.bias)
    weight = inward(linear.weight if gain is None else linear.weight * gain, False)
    weight = weight if outward is None else outward(weight.mT, False).mT
    weight = simulation.weight(weight)
    weight = weight if outward is None else outward(weight.mT, True).mT
    return F.linear(x, inward(weight, True), linear.bias)


def _times(matrix: Tensor, per: int | None = None) -> Turn:
    """Multiplication by an orthogonal matrix, of every `per` channels on their own where that is given."""

    def turn(x: Tensor, back: bool) -> Tensor:
        by = matrix.mT if back else matrix
        return x @ by if per is None else (x.unflatten(-1, (-1, per)) @ by).flatten(-2)

    return turn


def _online(transform: OnlineHadamard | None) -> Turn:
    if transform is None:
        return lambda x, back: x
    return lambda x, back: transform(x, inverse=back)
