"""Tuning a rounded model: kept columns and weight scales descend on the next-token loss (QUAD's tuning).

The network is the decoder itself, in simulation, its quantisers set. Of each rounded linear the kept columns
K [out, keep] and the scales s [out, groups] learn; codes q, zero-points and all else stay:

    W = [K | s (q - z)]      ∂L/∂s = Σ over the group of ∂L/∂W · (q - z)      ∂L/∂K = ∂L/∂W there

Quantisers of activations, keys and values pass gradients straight through (methods/gradients.py). The loss is
the cross-entropy of all tokens. What is kept of the result is how K and s changed, K' - K and s'/s - 1, so
that it fits codes of which another machine has rounded a few differently.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from methods.decoder import Block, Decoder, State, attention_mask
from methods.descent import Schedule, Snapshots, descend
from methods.device import device_name, peak_memory, placed
from methods.linear import Linear, QuantisedWeight
from methods.method import Artifact, Context

KEPT, SCALE = "kept ", "scale "
"""Names of what learns begin so; the linear's full name follows."""
AT_ONCE = 8192
"""Tokens that pass the network together, as far as windows are whole."""
STORED = torch.float16
"""Dtype of the changes that are kept: theirs is the relative precision, not that of the weights."""
Parameters = Mapping[str, Tensor]


def trainable(model: Decoder) -> dict[str, Tensor]:
    """Kept columns [out, keep] and scales [out, groups] of every rounded linear, in float32 or better."""
    found = {}
    for name, linear in _rounded(model).items():
        if linear.keep:
            found[KEPT + name] = linear.weight[:, : linear.keep]
        assert linear.quantised is not None
        found[SCALE + name] = linear.quantised.scale
    wide = {name: torch.promote_types(tensor.dtype, torch.float32) for name, tensor in found.items()}
    return {name: tensor.detach().to(model.device, wide[name]) for name, tensor in found.items()}


def codes_of(model: Decoder) -> dict[str, QuantisedWeight]:
    """The codes of every rounded linear, on the model's device."""
    rounded = {name: linear.quantised for name, linear in _rounded(model).items()}
    return {name: codes.to(model.device) for name, codes in rounded.items() if codes is not None}


def _rounded(model: Decoder) -> dict[str, Linear]:
    return {name: linear for name, linear in model.linears() if linear.quantised is not None}


def pieces(ids: Tensor, window: int) -> Tensor:
    """ids [samples, length] cut into windows [samples * (length // window), window]: the first window of
    every sequence, then the second of every one, so that neighbours are of different text."""
    whole = ids[:, : ids.shape[1] // window * window].unflatten(1, (-1, window))
    return whole.transpose(0, 1).flatten(0, 1).contiguous()


def next_token_loss(
    model: Decoder, ids: Tensor, parameters: Parameters, codes: Mapping[str, QuantisedWeight]
) -> Tensor:
    """Mean cross-entropy, a scalar in nats, of tokens 2 to T of ids [B, T], with the gradients by
    `parameters`."""
    logits = quantised_logits(model, ids, parameters, codes)[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def quantised_logits(
    model: Decoder, ids: Tensor, parameters: Parameters, codes: Mapping[str, QuantisedWeight]
) -> Tensor:
    """Logits [B, T, vocab] of ids [B, T] with the parameters of `trainable`, differentiable by them.

    Each block is computed again when gradients pass it, its weights too: of what lies between, memory holds
    one block's.
    """
    length = ids.shape[1]
    angles = model.angles(torch.arange(length, device=ids.device)[None])
    x = model.embed(ids).stream
    for index, block in enumerate(model.layers):
        assert isinstance(block, Block)
        mask = attention_mask(length, 0, None, block.self_attn.window, ids.device)
        run = partial(_block, block, f"layers.{index}.", parameters, codes, angles, mask)
        x = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
    return model.logits(State(x))


def _block(
    block: Block,
    prefix: str,
    parameters: Parameters,
    codes: Mapping[str, QuantisedWeight],
    angles: tuple[Tensor, Tensor],
    mask: Tensor | None,
    x: Tensor,
) -> Tensor:
    """The stream [B, T, hidden] behind one block."""
    weights = {
        f"{name}.weight": _weight(parameters, codes[prefix + name], prefix + name).to(x.dtype)
        for name, _ in block.linears()
        if prefix + name in codes
    }
    # On GPUs the fused kernels add up gradients in any order: another run would learn other numbers.
    with sdpa_kernel(SDPBackend.MATH) if x.is_cuda else nullcontext():
        state: State = functional_call(block, weights, (State(x), angles, mask))
    return state.stream


def _weight(parameters: Parameters, codes: QuantisedWeight, name: str) -> Tensor:
    rounded = replace(codes, scale=parameters[SCALE + name]).dequantise()
    kept = parameters.get(KEPT + name)
    return rounded if kept is None else torch.cat((kept, rounded), dim=1)


def tune(
    model: Decoder,
    ids: Tensor,
    held_out: Tensor,
    schedule: Schedule,
    batch: int,
    ctx: Context,
    snapshots: Snapshots | None = None,
) -> Artifact:
    """What to change, for `adjust`: tensors named as by `trainable`, and how it was learned. The model,
    rounded and simulated, is left as it is.

    ids, held_out: windows [n, T]. A step reads the next `batch` of ids, from the first again behind the last.
    `held_out` is read by nothing but the loss before and after.
    """
    started, shown = time.perf_counter(), ids[: len(held_out)]
    at_once = max(1, AT_ONCE // ids.shape[1])
    with peak_memory(ctx.device) as peak, placed(model, ctx.device):
        start, codes = trainable(model), codes_of(model)

        def loss_of(rows: Tensor, parameters: Parameters) -> Tensor:
            return next_token_loss(model, rows.to(model.device), parameters, codes)

        def objective(step: int, parameters: dict[str, Tensor]) -> float:
            total = 0.0
            places = torch.arange(step * batch, (step + 1) * batch) % len(ids)
            for rows in ids[places].split(at_once):
                loss = loss_of(rows, parameters) * (len(rows) / batch)
                loss.backward()
                total += float(loss.detach())
            return total

        def measure(rows: Tensor, parameters: Parameters) -> float:
            with torch.no_grad():
                return sum(float(loss_of(row[None], parameters)) for row in rows) / len(rows)

        steps: list[int] = []

        def report(done: int, total: int, loss: float) -> None:
            steps.append(done)
            ctx.report(f"tuning kept columns and scales, loss {loss:.3f}", done, total)

        found, losses = descend(start, objective, schedule, snapshots=snapshots, report=report)
        changes = {name: _change(name, start[name], found[name]) for name in found}
        kept = {name: _changed(name, start[name], change) for name, change in changes.items()}
        compared = {
            name: {"before": measure(rows, start), "after": measure(rows, kept), "windows": len(rows)}
            for name, rows in (("tuned_on", shown), ("held_out", held_out))
        }
        taken = peak()
    seen = schedule.steps * batch
    meta: dict[str, Any] = {
        "parameters": {
            kind.strip(): sum(tensor.numel() for name, tensor in changes.items() if name.startswith(kind))
            for kind in (KEPT, SCALE)
        },
        "tokens": {"seen": seen * ids.shape[1], "different": min(seen, len(ids)) * ids.shape[1]},
        "rate": max(schedule.rates.values()),
        "loss": losses,
        **compared,
        "measured": {
            "device": device_name(ctx.device),
            "tune_seconds": time.perf_counter() - started,
            "tune_steps": len(steps),
            "learn_peak_bytes": taken,
        },
    }
    return Artifact(changes, meta)


def _change(name: str, before: Tensor, after: Tensor) -> Tensor:
    change = after - before if name.startswith(KEPT) else after / before - 1
    return change.to("cpu", STORED)


def _changed(name: str, before: Tensor, change: Tensor) -> Tensor:
    change = change.to(before)
    return before + change if name.startswith(KEPT) else before * (1 + change)


@torch.no_grad()
def adjust(model: Decoder, changes: Mapping[str, Tensor]) -> None:
    """Change kept columns and scales of a rounded model, in place, as `tune` found."""
    if changes.keys() != trainable(model).keys():
        raise ValueError("what was tuned belongs to a model of other kept columns and scales")
    for name, linear in _rounded(model).items():
        assert linear.quantised is not None
        if linear.keep:
            weight = linear.weight.clone()
            kept = weight[:, : linear.keep]
            kept.copy_(_changed(KEPT, kept, changes[KEPT + name]))
            linear.set_weight(weight)
        scale = _changed(SCALE, linear.quantised.scale, changes[SCALE + name])
        linear.round_to(replace(linear.quantised, scale=scale))
