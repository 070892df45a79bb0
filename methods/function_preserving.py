"""FPTQuant's function-preserving transforms: parameters, the matrices these stand for, and how they merge.

Rows are vectors, y = x Wᵀ. Per layer, KV head and so on, all optional (van Breugel et al., FPTQuant):

    pre-RoPE   k → s R(θ) k, q → s⁻¹ R(θ) q for every RoPE pair (i, i + D/2) of every KV head; query heads
               take the parameters of their group. 2x2 rotations commute with RoPE's, so scores stay.
    value      v → v M per KV head, each query head's slice of o_proj takes M⁻¹
    up/down    row c of up_proj times u_c, column c of down_proj divided by it: linear in between
    residual   x → x R, one orthogonal matrix for the whole stream
    hadamard   a block-diagonal Hadamard matrix in front of down_proj, the only one that runs online
    (the per-token scale of the stream has no parameters: `Decoder.residual_scaling`)

Parameters are free numbers, one set per model, named tensors; every value of them gives valid transforms:

    residual.signs [d], residual.skew [d(d-1)/2]      R = diag(signs) H cayley(skew)
    value.left, value.right [L, K, D(D-1)/2]          M = cayley(left) diag(e^σ) cayley(right)ᵀ, so M⁻¹
    value.spread [L, K, D]                            needs no solver; |σ| ≤ ½ log κ, hence cond(M) ≤ κ
    pre_rope.angle, pre_rope.scale [L, K, D/2]        θ and log s, bounded
    hidden.scale [L, F]                               log u, bounded

Everything here has gradients; merging in float64, the network that is trained and the loss on weights are all
computed by these functions. Where query and key are normalised per head (Qwen3), a gain per channel stands
between projection and RoPE: s then merges into the norms' gains, and no rotation by θ can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.decoder import Block, Decoder, DecoderConfig
from methods.linear import OnlineHadamard
from methods.orthogonal import cayley
from methods.transforms import Edit, Rotations, hadamard_rows, rotate

Parameters = Mapping[str, Tensor]
Turn = Callable[[Tensor], Tensor]
SCALE_LIMIT = math.log(32.0)
"""Bound of |log s| and |log u|."""


@dataclass(frozen=True)
class Switches:
    """Which transforms are there. `tokens`: the per-token scale of the residual stream."""

    pre_rope: bool = True
    value: bool = True
    up_down: bool = True
    residual: bool = True
    hadamard: bool = True
    tokens: bool = True


@dataclass(frozen=True)
class LayerChange:
    """The merged transforms of one layer, each None where it is off. value, value_inverse: [K, D, D]; angle,
    key_scale (log s): [K, D/2]; hidden (log u): [F]."""

    value: Tensor | None = None
    value_inverse: Tensor | None = None
    angle: Tensor | None = None
    key_scale: Tensor | None = None
    hidden: Tensor | None = None


def initial(config: DecoderConfig, switches: Switches, seed: int) -> dict[str, Tensor]:
    """Parameters, float32, before learning: R a randomised Hadamard matrix, all others identities."""
    layers, heads, size = config.layers, config.kv_heads, config.head_dim
    found: dict[str, Tensor] = {}
    if switches.residual:
        width = config.hidden_size
        generator = torch.Generator().manual_seed(seed)  # QuaRot's R1 of this seed, so that seeds pair
        found["residual.signs"] = torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1
        found["residual.skew"] = torch.zeros(width * (width - 1) // 2)
    if switches.value:
        for side in ("left", "right"):
            found[f"value.{side}"] = torch.zeros(layers, heads, size * (size - 1) // 2)
        found["value.spread"] = torch.zeros(layers, heads, size)
    if switches.pre_rope:
        found["pre_rope.scale"] = torch.zeros(layers, heads, size // 2)
        if not config.qk_norm:
            found["pre_rope.angle"] = torch.zeros(layers, heads, size // 2)
    if switches.up_down:
        found["hidden.scale"] = torch.zeros(layers, config.intermediate_size)
    return found


def hadamard_of(config: DecoderConfig) -> OnlineHadamard:
    """The online transform in front of down_proj, in blocks of the largest power of two in its width."""
    return OnlineHadamard(config.intermediate_size & -config.intermediate_size)


def bounded(raw: Tensor, limit: float) -> Tensor:
    """`raw` for small values, within ±limit for all, smooth."""
    return limit * torch.tanh(raw / limit)


def orthogonal(skew: Tensor, size: int) -> Tensor:
    """The Cayley transform (I - A)⁻¹ (I + A) [..., n, n], orthogonal, of the skew-symmetric A whose upper
    triangle, row by row, is `skew` [..., n(n-1)/2]; 0 gives the identity."""
    rows, columns = torch.triu_indices(size, size, 1, device=skew.device)
    upper = skew.new_zeros(*skew.shape[:-1], size * size).index_copy(-1, rows * size + columns, skew)
    a = upper.unflatten(-1, (size, size))
    a = a - a.mT
    return cayley(torch.eye(size, dtype=skew.dtype, device=skew.device), 2 * a)


def residual_matrix(parameters: Parameters) -> Tensor | None:
    """R [d, d] in the parameters' dtype."""
    if "residual.signs" not in parameters:
        return None
    signs, skew = parameters["residual.signs"], parameters["residual.skew"]
    start = hadamard_rows(torch.diag(signs.to(torch.float64))).to(skew)
    return start @ orthogonal(skew, signs.numel())


def layer_changes(parameters: Parameters, layers: int, condition: float) -> list[LayerChange]:
    """The transforms of every layer, formed for all at once: on a GPU small products and solves cost their
    launch. condition: the largest condition number κ of a value transform."""
    value = inverse = None
    if "value.spread" in parameters:
        size = parameters["value.spread"].shape[-1]
        left, right = (orthogonal(parameters[f"value.{side}"], size) for side in ("left", "right"))
        stretch = bounded(parameters["value.spread"], math.log(condition) / 2).exp()[..., None, :]
        value = (left * stretch) @ right.mT
        inverse = (right / stretch) @ left.mT
    angle, scale, hidden = (
        parameters.get(name) for name in ("pre_rope.angle", "pre_rope.scale", "hidden.scale")
    )
    scale, hidden = (None if raw is None else bounded(raw, SCALE_LIMIT) for raw in (scale, hidden))
    columns = [
        (None,) * layers if each is None else each.unbind() for each in (value, inverse, angle, scale, hidden)
    ]
    return [LayerChange(*each) for each in zip(*columns, strict=True)]


def change_layer(edit: Edit, change: LayerChange, block: Block) -> None:
    """Merge a layer's own transforms into its weights and biases; `block` says how many heads there are, and
    keeps the gains of its norms (`head_gains` has the new ones)."""
    attention = block.self_attn
    groups = attention.heads // attention.kv_heads
    if change.key_scale is not None and attention.q_norm is None:
        scale = change.key_scale
        angle = torch.zeros_like(scale) if change.angle is None else change.angle
        _rows(edit, "self_attn.k_proj", lambda rows: turn_pairs(rows, angle, scale))
        of_query = (angle.repeat_interleave(groups, 0), -scale.repeat_interleave(groups, 0))
        _rows(edit, "self_attn.q_proj", lambda rows: turn_pairs(rows, *of_query))
    if change.value is not None and change.value_inverse is not None:
        matrix, inverse = change.value, change.value_inverse.repeat_interleave(groups, 0)
        heads, size = attention.kv_heads, attention.head_dim
        _rows(
            edit,
            "self_attn.v_proj",
            lambda rows: (matrix.mT @ rows.unflatten(0, (heads, size))).flatten(0, 1),
        )
        # o_proj's columns of a head read what M has changed: W Mᵀ⁻¹.
        output = edit.weights["self_attn.o_proj"].unflatten(1, (attention.heads, size))
        edit.weights["self_attn.o_proj"] = torch.einsum("ohd,hed->ohe", output, inverse).flatten(1)
    if change.hidden is not None:
        up = change.hidden.exp()
        _rows(edit, "mlp.up_proj", lambda rows: rows * up[:, None])
        edit.weights["mlp.down_proj"] = edit.weights["mlp.down_proj"] / up


def head_gains(change: LayerChange, block: Block) -> tuple[Tensor, Tensor] | None:
    """Gains [heads, 1, D] and [K, 1, D] of the norms of query and key, with s merged; None without these."""
    attention = block.self_attn
    if attention.q_norm is None or attention.k_norm is None or change.key_scale is None:
        return None
    scale = change.key_scale.repeat(1, 2)[:, None]  # both of a pair, (i, i + D/2)
    query, key = (
        torch.ones_like(scale) if norm.weight is None else norm.weight.to(scale)
        for norm in (attention.q_norm, attention.k_norm)
    )
    return query / scale.exp().repeat_interleave(attention.heads // attention.kv_heads, 0), key * scale.exp()


def _rows(edit: Edit, name: str, turn: Turn) -> None:
    """Change what a linear writes: the rows of its weight, and its bias."""
    edit.weights[name] = turn(edit.weights[name])
    if name in edit.biases:
        edit.biases[name] = turn(edit.biases[name][:, None])[:, 0]


def turn_pairs(rows: Tensor, angle: Tensor, scale: Tensor) -> Tensor:
    """e^scale R(angle) of the pairs (i, i + D/2) of rows [heads * D, n]; angle, scale: [heads, D/2]."""
    first, second = rows.unflatten(0, (angle.shape[0], 2, angle.shape[1])).unbind(1)
    cos, sin = ((part * scale.exp())[..., None] for part in (angle.cos(), angle.sin()))
    return torch.stack((first * cos - second * sin, second * cos + first * sin), 1).flatten(0, 2)


@torch.no_grad()
def apply(model: Decoder, parameters: Parameters, switches: Switches, condition: float) -> Decoder:
    """Merge the transforms in float64, in place, one block at a time, and set those that run online."""
    exact = {name: tensor.detach().to(model.device, torch.float64) for name, tensor in parameters.items()}
    changes = layer_changes(exact, model.config.layers, condition)

    def change(layer: int, block: Block, edit: Edit) -> None:
        found = changes[layer]
        change_layer(edit, found, block)
        gains = head_gains(found, block)
        if gains is not None:
            attention = block.self_attn
            for norm, gain in zip((attention.q_norm, attention.k_norm), gains, strict=True):
                assert norm is not None
                own = gain[:, 0].to(attention.o_proj.weight)  # the decoder's heads stand beside channels
                norm.weight = torch.nn.Parameter(own, requires_grad=False)

    model.residual_scaling = switches.tokens
    rotations = Rotations(
        residual=residual_matrix(exact), hidden=hadamard_of(model.config) if switches.hadamard else None
    )
    return rotate(model, rotations, before=change)


def condition_numbers(parameters: Parameters, condition: float) -> Tensor:
    """The condition number of every value transform, [L, K]; empty where there is none."""
    if "value.spread" not in parameters:
        return torch.zeros(0, 0)
    spread = bounded(parameters["value.spread"].to(torch.float64), math.log(condition) / 2)
    return (spread.amax(-1) - spread.amin(-1)).exp()
