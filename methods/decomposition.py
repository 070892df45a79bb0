"""Where the residual stream is large: principal directions of its second moment, and the widened basis.

QUAD (arXiv 2503.19353), one matrix for the whole model. With x the un-normalised rows of the residual stream
in front of both norms of every block (the final norm is left out), and P the eigenvectors of its r largest
eigenvalues,

    C = Σ xᵀx [d, d] (uncentred)      Q = [P | I - PPᵀ] [d, d + r]

PᵀP = I gives QQᵀ = PPᵀ + (I - PPᵀ)² = I: multiplying by Q changes neither lengths nor products, so it merges
like a rotation as long as norms go on dividing by d. Tokens of huge norm dominate C, and so P.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.decoder import Block, Decoder, State, attention_mask
from methods.method import Context


@torch.no_grad()
def second_moment(
    model: Decoder, calibration: Tensor, ctx: Context, *, normalised: bool = False, centred: bool = False
) -> Tensor:
    """C / n of the n rows of the stream that calibration [samples, length] makes: float64 [d, d] on the CPU.

    normalised: every row counts alike, divided by its root mean square, which is another method. centred: the
    mean over channels has been subtracted from the embedding. Products are summed in float64, one block on
    `ctx.device` at a time, which holds the stream of all tokens beside it.
    """
    states = model.batches(calibration, ctx.device)
    if centred:
        states = [State(state.stream - state.stream.mean(-1, keepdim=True)) for state in states]
    width, rows = model.config.hidden_size, 0
    total = torch.zeros(width, width, dtype=torch.float64, device=ctx.device)
    for index, block in model.stream_blocks(ctx.device):
        for number, state in enumerate(states):
            middle, after = _halves(model, block, state)
            for x in (state.stream, middle.stream):
                x = x.flatten(0, 1).to(torch.float64)
                x = x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30) if normalised else x
                total.addmm_(x.T, x)
                rows += x.shape[0]
            states[number] = after.to(ctx.device)
        ctx.report("second moment of the stream", index + 1, model.config.layers)
    return (total / rows).cpu()


def _halves(model: Decoder, block: Block, state: State) -> tuple[State, State]:
    """The states behind attention and behind the MLP of a block, for whole sequences."""
    length, device = state.stream.shape[1], state.stream.device
    mask = attention_mask(length, 0, None, block.self_attn.window, device)
    angles = model.angles(torch.arange(length, device=device)[None])
    middle = state.step(block.input_layernorm, block.self_attn, angles, mask, None)
    return middle, middle.step(block.post_attention_layernorm, block.mlp)


def principal_directions(moment: Tensor, rank: int) -> tuple[Tensor, float]:
    """P [d, rank], float64 with orthonormal columns, largest eigenvalue first, and the share of the trace of
    `moment` [d, d] that they hold. The largest entry of each column is positive: eigenvectors have no sign,
    and what is learned behind them on one machine must fit those that another one finds."""
    values, vectors = torch.linalg.eigh(moment.to(torch.float64))
    chosen = vectors.flip(1)[:, :rank]
    largest = chosen.gather(0, chosen.abs().argmax(0, keepdim=True)) if rank else chosen[:1]
    return chosen * largest.sign(), float(values.flip(0)[:rank].sum() / values.sum())


def widening(directions: Tensor) -> Tensor:
    """Q = [P | I - PPᵀ], float64 [d, d + r], of P [d, r]."""
    projector = directions @ directions.T
    return torch.cat((directions, torch.eye(directions.shape[0], dtype=torch.float64) - projector), dim=1)
