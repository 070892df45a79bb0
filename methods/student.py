"""The quantised network as a function of transforms and static ranges that has gradients, and its loss.

Rounding passes gradients straight through; a quantiser's clipping and ends have true gradients, whether the
ends are learned (static ranges) or found on the row itself:

    s = (high - low) / (2^b - 1)    z = round(-low / s)    x̂ = s (clamp(round(x / s) + z, 0, 2^b - 1) - z)

With the ends of a row held constant instead, nothing would tell a rotation that it narrows a row's range.
Of the weights nothing learns: they are merged anew at every step, and rounded where asked for with scales
that keep the share of each row's largest value that was best before training. The loss is the Jensen-Shannon
divergence, per token in nats, between the float model's next-token distribution p and the student's q:

    ½ KL(p || m) + ½ KL(q || m),  m = (p + q) / 2

Each block is computed again when gradients pass it, and so is each chunk of logits: of what lies between,
memory holds that of one block and of `CHUNK` tokens (more on a GPU). Per-token scaling of the stream does
not change what linears read, so the student leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.kv_reference import rotate
from kernels.ops import find_range
from methods.bits import ActivationSpec, KVSpec
from methods.decoder import Attention, Block, Decoder, RMSNorm, State, attention_mask
from methods.device import float32_products
from methods.function_preserving import (
    LayerChange,
    Parameters,
    change_layer,
    hadamard_of,
    head_gains,
    layer_changes,
    residual_matrix,
)
from methods.gradients import straight_through
from methods.transforms import READERS, WRITERS, Edit, merge_online

CHUNK, _CHUNK_ON_GPU = 128, 1024  # tokens whose logits exist at a time
SITES = {
    "attention": ("self_attn.q_proj.input", "self_attn.k_proj.input", "self_attn.v_proj.input"),
    "output": ("self_attn.o_proj.input",),
    "mlp": ("mlp.gate_proj.input", "mlp.up_proj.input"),
    "hidden": ("mlp.down_proj.input",),
    "key": ("self_attn.k",),
    "value": ("self_attn.v",),
}
"""Everything that is quantised in a layer, and the stems of the ranges that it sets. The column of each in
`range.low` and `range.high` [layers, 6], the logarithms of -low and high, is its place here."""
_PLACE = {site: place for place, site in enumerate(SITES)}
RANGES = ("range.low", "range.high")
_SMALLEST = 1e-9
Merge = Callable[[Block, int, Tensor | None], tuple[Edit, tuple[Tensor, Tensor] | None]]


def _round(x: Tensor) -> Tensor:
    return straight_through(x, torch.round)


def quantise_between(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """x̂ of the equations above; low < 0 < high broadcast against x."""
    scale = (high - low) / (2**bits - 1)
    return _quantise(x, scale, _round(-low / scale), bits)


def _quantise(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((_round(x / scale) + zero).clamp(0, 2**bits - 1) - zero) * scale


def quantise_rows(x: Tensor, bits: int, *, symmetric: bool, clip: float, group: int | None = None) -> Tensor:
    """x̂ [..., n] with the range of each row, or of each `group` values of it, as kernels/reference.py
    measures it, and differentiable by x through that range, too."""
    rows = x if group is None else x.unflatten(-1, (-1, group))
    high, low = rows.amax(-1, keepdim=True), rows.amin(-1, keepdim=True)
    if symmetric:
        top = 2 ** (bits - 1)
        scale = torch.maximum(high, -low) * clip / (top - 1)
        scale = scale.masked_fill(scale == 0, 1.0)
        found = _round(rows / scale).clamp(-top, top - 1) * scale
    else:
        spans = torch.ones_like(high, dtype=torch.bool) if group is None else high == low  # zero, too
        high, low = torch.where(spans, high.clamp(min=0.0), high), torch.where(spans, low.clamp(max=0.0), low)
        none = (high == low).to(x.dtype)  # all zero: any range will do
        found = quantise_between(rows, clip * low - none, clip * high + none, bits)
    return found if group is None else found.flatten(-2)


@dataclass(frozen=True)
class Student:
    """What the network is quantised to while it learns. weight_bits: 16 leaves weights alone. shares: per
    layer and linear the share [out, 1] of each merged row's largest |w| that its scale spans (`rounded`)."""

    model: Decoder
    hadamard: bool
    condition: float
    activation: ActivationSpec | None
    kv: KVSpec | None
    weight_bits: int = 16
    shares: Mapping[tuple[int, str], Tensor] = field(default_factory=dict)

    def changes(self, parameters: Parameters) -> list[LayerChange]:
        """What `merged` merges into every layer."""
        return layer_changes(parameters, self.model.config.layers, self.condition)

    def merged(
        self, block: Block, change: LayerChange, residual: Tensor | None, dtype: torch.dtype
    ) -> tuple[Edit, tuple[Tensor, Tensor] | None]:
        """The weights and biases of a block with all transforms merged, in `dtype`, and the gains of its
        query and key norms where these change."""
        edit = Edit()
        for name, linear in block.linears():
            edit.weights[name] = linear.weight.to(dtype)
            if linear.bias is not None:
                edit.biases[name] = linear.bias.to(dtype)
        change_layer(edit, change, block)
        for norm, readers in (
            (block.input_layernorm, READERS[:3]),
            (block.post_attention_layernorm, READERS[3:]),
        ):
            for name in readers:
                edit.weights[name] = _times_gain(edit.weights[name], norm)
        if residual is not None:
            for name in READERS:
                edit.read(name, residual)
            for name in WRITERS:
                edit.write(name, residual)
        if self.hadamard:
            merge_online(edit, "mlp.down_proj", hadamard_of(self.model.config))
        return edit, head_gains(change, block)

    def rounded(self, layer: int, name: str, weight: Tensor) -> Tensor:
        """A merged weight [out, in] as codes of `weight_bits` have it, symmetric, one scale a row."""
        if self.weight_bits == 16:
            return weight
        top = 2 ** (self.weight_bits - 1)
        scale = weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-8) / (top - 1)
        scale = scale * self.shares[layer, name]
        return _round(weight / scale).clamp(-top, top - 1) * scale

    def states(self, ids: Tensor, parameters: Parameters) -> Tensor:
        """The stream [B, T, hidden] behind the last block, in the model's own basis, for ids [B, T]."""
        model, length = self.model, ids.shape[1]
        with float32_products("highest"):  # whatever the network multiplies in: R stays orthogonal
            residual, changes = residual_matrix(parameters), self.changes(parameters)
        angles = model.angles(torch.arange(length, device=ids.device)[None])
        x = model.embed(ids).stream
        turns = residual if self.weight_bits == 16 else None
        x = x if residual is None or turns is not None else x @ residual.to(x.dtype)
        dtype = dtype_of(parameters, model)
        layers = zip(model.layers, changes, self._codes(parameters, x.dtype), strict=True)
        for layer, (block, change, codes) in enumerate(layers):
            assert isinstance(block, Block)
            mask = attention_mask(length, 0, None, block.self_attn.window, ids.device)
            merged = partial(self.merged, block, change, None if turns is not None else residual, dtype)
            run = partial(self._block, layer, block, merged, codes, turns, angles=angles, mask=mask)
            x = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        return x if residual is None or turns is not None else x @ residual.mT.to(x.dtype)

    def _block(
        self,
        layer: int,
        block: Block,
        merged: Callable[[], tuple[Edit, tuple[Tensor, Tensor] | None]],
        codes: Mapping[str, tuple[Tensor, Tensor]],
        turns: Tensor | None,
        x: Tensor,
        *,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """The stream behind one block: merged weights read and write it in the basis of `residual`, or in the
        model's own where `turns` is that matrix and serves the quantisers alone, which for weights that are
        not rounded is the same function and far cheaper for few tokens."""
        attention = block.self_attn
        edit, gains = merged()
        batch, length, _ = x.shape

        def project(name: str, x: Tensor) -> Tensor:
            bias = edit.biases.get(name)
            weight = self.rounded(layer, name, edit.weights[name])
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

        def quantised(site: str, x: Tensor) -> Tensor:
            return self._quantised(site, x, codes)

        def normalised(site: str, norm: RMSNorm) -> Tensor:
            read = (x / norm.rms(x)).to(x.dtype)
            if turns is None:
                return quantised(site, read)
            return quantised(site, read @ turns.to(x.dtype)) @ turns.mT.to(x.dtype)

        read = normalised("attention", block.input_layernorm)
        query, key, value = (
            project(name, read).view(batch, length, -1, attention.head_dim).transpose(1, 2)
            for name in READERS[:3]
        )
        query, key = _normalised(attention, query, key, gains)
        query, key = rotate(query, *angles), rotate(key, *angles)
        out = F.scaled_dot_product_attention(
            query,
            quantised("key", key),
            quantised("value", value),
            attn_mask=mask,
            is_causal=mask is None and length > 1,
            enable_gqa=attention.heads != attention.kv_heads,
        )
        out = quantised("output", out.transpose(1, 2).reshape(batch, length, -1))
        x = x + project("self_attn.o_proj", out)
        read = normalised("mlp", block.post_attention_layernorm)
        hidden = F.silu(project("mlp.gate_proj", read)) * project("mlp.up_proj", read)
        hidden = hadamard_of(self.model.config)(hidden) if self.hadamard else hidden
        return x + project("mlp.down_proj", quantised("hidden", hidden))

    def _spec(self, site: str) -> ActivationSpec | KVSpec | None:
        return self.kv if site in ("key", "value") else self.activation

    def _codes(self, parameters: Parameters, dtype: torch.dtype) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """Scale and zero-point, scalars, of every site with a static range, for every layer; formed for all
        layers at once."""
        specs = {site: self._spec(site) for site in SITES}
        widths = {site: spec.bits for site, spec in specs.items() if spec is not None and spec.static}
        if not widths:
            return [{} for _ in self.model.layers]
        low, high = (
            end.to(dtype)[:, [_PLACE[site] for site in widths]].unbind(1) for end in ends(parameters)
        )
        found = {}
        for (site, bits), bottom, top in zip(widths.items(), low, high, strict=True):
            scale = (top - bottom) / (2**bits - 1)
            found[site] = zip(scale.unbind(), _round(-bottom / scale).unbind(), strict=True)
        return [dict(zip(found, each, strict=True)) for each in zip(*found.values(), strict=True)]

    def _quantised(self, site: str, x: Tensor, codes: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        spec = self._spec(site)
        if spec is None:
            return x
        if spec.static:
            return _quantise(x, *codes[site], spec.bits)
        group = spec.group if isinstance(spec, ActivationSpec) else None
        return quantise_rows(x, spec.bits, symmetric=spec.symmetric, clip=spec.clip, group=group)


@torch.no_grad()
def best_shares(student: Student, parameters: Parameters, bits: int) -> dict[tuple[int, str], Tensor]:
    """For `Student.shares`: what the search for ranges finds on the merged weights."""
    residual = residual_matrix(parameters)
    dtype = dtype_of(parameters, student.model)
    shares = {}
    for layer, (block, change) in enumerate(
        zip(student.model.layers, student.changes(parameters), strict=True)
    ):
        assert isinstance(block, Block)
        edit, _ = student.merged(block, change, residual, dtype)
        for name, weight in edit.weights.items():
            scale, _ = find_range(weight, bits, symmetric=True, search=True)
            whole = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / (2 ** (bits - 1) - 1)
            shares[layer, name] = scale / whole
    return shares


def dtype_of(parameters: Parameters, model: Decoder) -> torch.dtype:
    """In which weights are merged: the parameters'."""
    return next((tensor.dtype for tensor in parameters.values()), model.dtype)


def _times_gain(weight: Tensor, norm: RMSNorm) -> Tensor:
    return weight if norm.weight is None else weight * norm.weight.to(weight)


def _normalised(
    attention: Attention, query: Tensor, key: Tensor, gains: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Query and key behind their norms, where the family has them."""
    if attention.q_norm is None or attention.k_norm is None:
        return query, key
    if gains is None:
        return attention.q_norm(query), attention.k_norm(key)
    norms = (attention.q_norm, attention.k_norm)
    q, k = (
        (x / norm.rms(x)).to(x.dtype) * gain.to(x.dtype)
        for x, norm, gain in zip((query, key), norms, gains, strict=True)
    )
    return q, k


# Ranges


def ends(parameters: Parameters) -> tuple[Tensor, Tensor]:
    """Low and high of the static ranges, [layers, 6]."""
    return -parameters["range.low"].exp(), parameters["range.high"].exp()


def range_parameters(ranges: Mapping[str, Tensor], layers: int, bits: Mapping[str, int]) -> dict[str, Tensor]:
    """`range.low` and `range.high` of ranges that are named as in `Method.ranges`; bits: of each site."""
    found = {name: torch.zeros(layers, len(SITES), dtype=torch.float64) for name in RANGES}
    for layer in range(layers):
        for site, width in bits.items():
            stem = f"layers.{layer}.{SITES[site][0]}"
            scale, zero = float(ranges[f"{stem}_scale"]), float(ranges[f"{stem}_zero"])
            for name, end in (("range.low", zero), ("range.high", 2**width - 1 - zero)):
                found[name][layer, _PLACE[site]] = math.log(max(end * scale, _SMALLEST))
    return found


def learned_ranges(parameters: Parameters, bits: Mapping[str, int]) -> dict[str, Tensor]:
    """The opposite: scale and zero-point of each site in `bits` for every layer, float32 scalars; linears of
    one input have the very same tensors."""
    found = {}
    # What ships is in half precision: its logarithms are taken as they are, their ends are not rounded again.
    parameters = {name: parameters[name].detach().to("cpu", torch.float32) for name in RANGES}
    lows, highs = ends(parameters)
    for layer in range(lows.shape[0]):
        for site, width in bits.items():
            low, high = lows[layer, _PLACE[site]], highs[layer, _PLACE[site]]
            scale = (high - low) / (2**width - 1)
            zero = (-low / scale).round()
            for stem in SITES[site]:
                found[f"layers.{layer}.{stem}_scale"] = scale
                found[f"layers.{layer}.{stem}_zero"] = zero
    return found


# Loss


@torch.no_grad()
def teacher_states(model: Decoder, ids: Tensor) -> Tensor:
    """The stream [B, T, hidden] behind the float model's last block, one sequence at a time."""
    return torch.cat([model.states(row[None].to(model.device)).stream for row in ids])


def divergence(student: Student, ids: Tensor, taught: Tensor, parameters: Parameters) -> Tensor:
    """Mean Jensen-Shannon divergence per token, a scalar in nats, of ids [B, T] against the teacher's stream
    `taught` [B, T, hidden]."""
    model = student.model
    own, taught = student.states(ids, parameters).flatten(0, 1), taught.flatten(0, 1)

    def chunk(own: Tensor, taught: Tensor) -> Tensor:
        p, q = model.logits(State(taught[None])), model.logits(State(own[None]))
        return jensen_shannon(p, q).sum()

    size = _CHUNK_ON_GPU if own.device.type == "cuda" else CHUNK
    sums = [
        checkpoint(
            chunk,
            *parts,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for parts in zip(own.split(size), taught.split(size), strict=True)
    ]
    return torch.stack(sums).sum() / own.shape[0]


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Divergence [...] in nats, 0 to log 2, of two logits [..., vocabulary], in float32 or better."""
    p, q = (F.log_softmax(x.to(torch.promote_types(x.dtype, torch.float32)), -1) for x in (p, q))
    middle = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / 2
