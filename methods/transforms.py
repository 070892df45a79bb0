"""Function-preserving changes of the decoder, merged in float64 and written back once.

Row-vector convention: y = x Wᵀ with W [out, in]. A basis change x → x Q of what a linear reads makes its
weight W Q; of what it writes, Qᵀ W (and Qᵀ b). Merging an online transform T in front of a linear applies
T to the rows of its weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels.hadamard import hadamard_transform, is_known_order, largest_known_divisor
from methods.decoder import Block, Decoder, RMSNorm
from methods.linear import OnlineHadamard

_ROWS = 4096  # rows of an embedding merged at a time: its float64 copy never exists whole

READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass
class Edit:
    """Weights [out, in] and biases [out] of one block in float64, written back once."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)

    def read(self, name: str, change: Tensor) -> None:
        """What `name` reads has been multiplied by `change` [in, in'] (x → x · change)."""
        self.weights[name] = self.weights[name] @ change

    def write(self, name: str, change: Tensor) -> None:
        """What `name` writes is to be multiplied by `change` [out, out']."""
        self.weights[name] = change.T @ self.weights[name]
        if name in self.biases:
            self.biases[name] = self.biases[name] @ change


@contextmanager
def edited(block: Block) -> Iterator[Edit]:
    """Edit a block's linears in float64; on leaving, cast once to the block's dtype."""
    edit = Edit()
    for name, linear in block.linears():
        edit.weights[name] = linear.weight.to(torch.float64)
        if linear.bias is not None:
            edit.biases[name] = linear.bias.to(torch.float64)
    yield edit
    for name, linear in block.linears():
        dtype = linear.weight.dtype
        linear.set_weight(edit.weights[name].to(dtype))
        if linear.bias is not None:
            linear.bias = torch.nn.Parameter(edit.biases[name].to(dtype), requires_grad=False)


@dataclass(frozen=True)
class Rotations:
    """Orthogonal matrices and online transforms of one decoder, any of them absent.

    residual (R1): float64 [d, d']. values (R2): per layer float64 [head_dim, head_dim], or
    [kv_heads, head_dim, head_dim] with one matrix per KV head. query_key (R3), attention_output (the
    cross-head transform) and hidden (R4) run online.
    """

    residual: Tensor | None = None
    values: list[Tensor] | None = None
    query_key: OnlineHadamard | None = None
    attention_output: OnlineHadamard | None = None
    hidden: OnlineHadamard | None = None


@torch.no_grad()
def rotate(
    model: Decoder,
    rotations: Rotations,
    device: torch.device | str | None = None,
    *,
    before: Callable[[int, Block, Edit], None] | None = None,
) -> Decoder:
    """Fold the norm gains, untie the head and apply `rotations`, in place, one block at a time. `before` may
    edit each block first, in the same float64."""
    untie(model)
    absorb_projections(model)
    residual = rotations.residual
    if residual is not None:
        residual = residual.to(torch.float64)
        model.embed_tokens = torch.nn.Parameter(
            _by_rows(model.embed_tokens, None, residual), requires_grad=False
        )
    for index, block in model.stream_blocks(device):
        with edited(block) as edit:
            if before is not None:
                before(index, block, edit)
            _fold_gains(edit, block)
            if residual is not None:
                matrix = residual.to(block.mlp.down_proj.weight.device)
                for name in READERS:
                    edit.read(name, matrix)
                for name in WRITERS:
                    edit.write(name, matrix)
            if rotations.values is not None:
                value = rotations.values[index].to(edit.weights["self_attn.v_proj"])
                _rotate_values(edit, value, block.self_attn.kv_heads, block.self_attn.heads)
            if rotations.attention_output is not None:
                merge_online(edit, "self_attn.o_proj", rotations.attention_output)
                block.self_attn.output_transform = rotations.attention_output
            if rotations.hidden is not None:
                merge_online(edit, "mlp.down_proj", rotations.hidden)
                block.mlp.hidden_transform = rotations.hidden
            if rotations.query_key is not None:
                block.self_attn.rotation = rotations.query_key
    gain = _take_gain(model.norm)
    model.lm_head.set_weight(_by_rows(model.lm_head.weight, gain, residual))
    return model


def untie(model: Decoder) -> None:
    """Give lm_head a weight of its own, so that the final norm's gain can be folded into it alone.

    No copy is made: `rotate` replaces both tensors by new ones.
    """
    model.config = replace(model.config, tied=False)
    if model.lm_head.weight is model.embed_tokens:
        model.lm_head.weight = torch.nn.Parameter(model.embed_tokens.data, requires_grad=False)


def absorb_projections(model: Decoder) -> None:
    """Multiply embedding projections (OSP) into the embedding and the head, which must be untied."""
    if model.embed_in is not None:
        matrix = model.embed_in.weight.to(torch.float64).T
        model.embed_tokens = torch.nn.Parameter(
            _by_rows(model.embed_tokens, None, matrix), requires_grad=False
        )
        model.embed_in = None
    if model.embed_out is not None:
        model.lm_head.set_weight(
            _by_rows(model.lm_head.weight, None, model.embed_out.weight.to(torch.float64))
        )
        model.embed_out = None


def _take_gain(norm: RMSNorm) -> Tensor | None:
    """The norm's gain in float64 ([width] or [1]), which the norm no longer applies."""
    if norm.weight is None:
        return None
    gain = norm.weight.to(torch.float64)
    norm.weight = None
    return gain


def folded(block: Block) -> Block:
    """A copy of a block whose norm gains are folded into the linears behind them: the same function."""
    own = copy.deepcopy(block)
    with edited(own) as edit:
        _fold_gains(edit, own)
    return own


def _fold_gains(edit: Edit, block: Block) -> None:
    _fold_gain(edit, block.input_layernorm, READERS[:3])
    _fold_gain(edit, block.post_attention_layernorm, READERS[3:])


def _fold_gain(edit: Edit, norm: RMSNorm, readers: tuple[str, ...]) -> None:
    gain = _take_gain(norm)
    if gain is not None:
        for name in readers:
            edit.weights[name] = edit.weights[name] * gain.to(edit.weights[name].device)


def _by_rows(weight: Tensor, gain: Tensor | None, matrix: Tensor | None) -> Tensor:
    """(weight * gain) @ matrix in float64, row by row block, in the weight's dtype: [rows, in]."""
    width = weight.shape[1] if matrix is None else matrix.shape[1]
    out = weight.new_empty(weight.shape[0], width)
    for start in range(0, weight.shape[0], _ROWS):
        part = weight[start : start + _ROWS].to(torch.float64)
        if gain is not None:
            part = part * gain
        if matrix is not None:
            part = part @ matrix
        out[start : start + _ROWS] = part
    return out


def _rotate_values(edit: Edit, matrix: Tensor, kv_heads: int, heads: int) -> None:
    """R2: v_proj's output heads times matrix, o_proj's input heads likewise; each query head takes the
    matrix of its KV head. matrix: [D, D] or [kv_heads, D, D]."""
    size = matrix.shape[-1]
    per_kv = matrix.expand(kv_heads, size, size)
    per_head = per_kv.repeat_interleave(heads // kv_heads, 0)
    value = edit.weights["self_attn.v_proj"].unflatten(0, (kv_heads, size))
    edit.weights["self_attn.v_proj"] = (per_kv.transpose(1, 2) @ value).flatten(0, 1)
    if "self_attn.v_proj" in edit.biases:
        bias = edit.biases["self_attn.v_proj"].view(kv_heads, 1, size)
        edit.biases["self_attn.v_proj"] = (bias @ per_kv).flatten()
    output = edit.weights["self_attn.o_proj"].unflatten(1, (heads, size))
    edit.weights["self_attn.o_proj"] = torch.einsum("ohd,hde->ohe", output, per_head).flatten(1)


def merge_online(edit: Edit, name: str, transform: OnlineHadamard) -> None:
    """Undo an orthogonal online transform of a linear's input in its weight."""
    edit.weights[name] = transform(edit.weights[name])


def randomised_hadamard(size: int, seed: int) -> Tensor:
    """diag(±1) · H, float64 [size, size], signs from a generator of its own (QuaRot's R1).

    Where no Hadamard matrix of this size is known: block-diagonal of the largest known block.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).to(torch.float64) * 2 - 1
    return hadamard_rows(torch.diag(signs))


def hadamard_rows(x: Tensor) -> Tensor:
    """Rows of x [..., n] times the orthonormal Hadamard matrix of n, or its block-diagonal fallback."""
    return hadamard_transform(x, block=block_size(x.shape[-1]))


def block_size(size: int) -> int:
    """`size` where a Hadamard matrix of it is known, else the largest known block that divides it."""
    return size if is_known_order(size) else largest_known_divisor(size)
