"""Uniform samples of what blocks read and of their values, by one pass that holds one block at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.decoder import Decoder
from methods.method import Context
from methods.transforms import folded

STORED = torch.float16
"""Dtype of what is kept: RMSNorm leaves values of size one, none above the root of the width."""


@dataclass(frozen=True)
class Sample:
    """Rows drawn from calibration tokens, on the CPU in `STORED`.

    inputs: [layers * 2, rows, hidden], what attention and MLP of each layer in turn read: normalised, without
    the norm's gain. values: [layers, rows, kv_heads, head_dim].
    """

    inputs: Tensor
    values: Tensor


@torch.no_grad()
def sample_blocks(model: Decoder, calibration: Tensor, rows: int, ctx: Context) -> Sample:
    """Draw `rows` tokens (or all) for each site of each layer, without replacement and each token of
    calibration [samples, length] as likely as any other, by a generator seeded from `ctx.seed`.

    Which tokens is settled before the pass, so that nothing else is ever kept. Beside the sample, memory
    holds, on `ctx.device`, one block and the hidden states of all tokens. The model is left as it is.
    """
    config = model.config
    count, length = calibration.shape
    rows = min(rows, count * length)
    inputs = torch.empty(2 * config.layers, rows, config.hidden_size, dtype=STORED)
    values = torch.empty(config.layers, rows, config.kv_heads, config.head_dim, dtype=STORED)
    generator = torch.Generator().manual_seed(ctx.seed)
    states = model.batches(calibration, ctx.device)
    for layer, block in model.stream_blocks(ctx.device):
        own = folded(block)
        seen: list[Tensor] = []  # of one batch: attention's input, values, MLP's input
        own.self_attn.q_proj.observer = seen.append
        own.self_attn.kv_observer = lambda _, value, seen=seen: seen.append(value.transpose(1, 2))
        own.mlp.gate_proj.observer = seen.append
        stores = (inputs[2 * layer], values[layer], inputs[2 * layer + 1])
        chosen = [torch.randperm(count * length, generator=generator)[:rows].sort().values for _ in stores]
        begin = 0
        for number, state in enumerate(states):
            seen.clear()
            states[number] = model.through(own, state)
            end = begin + state.stream.shape[0] * length
            for store, places, x in zip(stores, chosen, seen, strict=True):
                first, last = torch.searchsorted(places, torch.tensor([begin, end])).tolist()
                inside = places[first:last] - begin
                store[first:last] = x.flatten(0, 1)[inside.to(x.device)].to("cpu", STORED)
            begin = end
        ctx.report("sampling block inputs", layer + 1, config.layers)
    return Sample(inputs, values)
