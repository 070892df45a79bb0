"""FPTQuant's local stage: a loss on merged weights alone, which needs no data.

    Σ over linears (mean |W̃|^p)^(1/p),  p = 4, with W̃ the merged q, k, v, o, gate, up, down, embedding and
    head

At equal energy a matrix without large entries has the smallest. Every column of the residual basis looks like
any other, so a step may look at a random share of them (and of the vocabulary), at that share of the cost.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from methods.decoder import Block, Decoder
from methods.function_preserving import LayerChange, Parameters, residual_matrix
from methods.student import Student, dtype_of
from methods.transforms import READERS, WRITERS


def weight_loss(
    student: Student, parameters: Parameters, *, norm: float, columns: int, generator: torch.Generator
) -> float:
    """The loss above on `columns` of the stream's channels drawn by `generator`; adds its gradient to `.grad`
    of the parameters, one layer after the other. Without a residual transform all channels are taken."""
    model = student.model
    residual = residual_matrix(parameters)
    width = model.config.hidden_size
    chosen = torch.randperm(width, generator=generator)[: min(columns, width)].to(model.device)
    part = None if residual is None else residual[:, chosen].detach().requires_grad_()
    dtype, total = dtype_of(parameters, model), 0.0
    whole = student.changes(parameters)
    # One layer after the other has its gradients, up to here; behind it all go through at once.
    changes = [_cut(change) for change in whole]
    for block, change in zip(model.layers, changes, strict=True):
        assert isinstance(block, Block)
        edit, _ = student.merged(block, change, None, dtype)
        weights = dict(edit.weights)
        if part is not None:
            weights |= {name: edit.weights[name] @ part for name in READERS}
            weights |= {name: part.mT @ edit.weights[name] for name in WRITERS}
        total += _add(sum(spread(weight, norm) for weight in weights.values()))
    _join(whole, changes)
    if part is not None and residual is not None:
        rows = max(1, model.config.vocab_size * chosen.numel() // width)
        ids = torch.randperm(model.config.vocab_size, generator=generator)[:rows].to(model.device)
        for weight in _vocabulary(model, ids):
            total += _add(spread(weight.to(part.dtype) @ part, norm))
        if residual.requires_grad:
            residual[:, chosen].backward(part.grad)
    return total


def _cut(change: LayerChange) -> LayerChange:
    """The same transforms as leaves."""
    parts = (getattr(change, field.name) for field in fields(change))
    return LayerChange(*(None if part is None else part.detach().requires_grad_() for part in parts))


def _join(whole: list[LayerChange], leaves: list[LayerChange]) -> None:
    """Gradients of the leaves go on through what they were cut from."""
    pairs = [
        (getattr(one, field.name), getattr(leaf, field.name).grad)
        for one, leaf in zip(whole, leaves, strict=True)
        for field in fields(one)
        if getattr(one, field.name) is not None
    ]
    found = [(tensor, grad) for tensor, grad in pairs if tensor.requires_grad and grad is not None]
    if found:
        torch.autograd.backward([tensor for tensor, _ in found], [grad for _, grad in found])


def spread(weight: Tensor, norm: float) -> Tensor:
    """(mean |w|^norm)^(1/norm), a scalar."""
    powers = weight.square().square() if norm == 4 else weight.abs().pow(norm)
    return powers.mean() ** (1 / norm)


def _add(loss: Tensor | int) -> float:
    assert isinstance(loss, Tensor)
    if loss.requires_grad:
        loss.backward()
    return float(loss.detach())


@torch.no_grad()
def _vocabulary(model: Decoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the embedding and of the head as the stream meets them, [n, hidden], without transforms."""
    head = model.lm_head.weight[ids]
    if model.embed_out is not None:
        head = head @ model.embed_out.weight
    gain = model.norm.weight
    return model.embed(ids[None]).stream[0], head if gain is None else head * gain
