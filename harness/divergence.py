"""How far a quantised model's predictions lie from the float model's, token by token.

KL(float || quantised) and whether both find the same token likeliest see a change that the log-likelihood of
the text's own token misses: half of its moves are to the better. Both need the float model's predictions for
the same tokens. What is kept of them is the state that leaves its last block, hidden_size numbers a token
where logits would be vocab_size; the float model's norm and lm_head turn it into logits again, bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import environment
from kernels import ops
from methods import artifacts
from methods.checkpoint import Checkpoint, build
from methods.decoder import Decoder, State
from methods.method import Artifact

# So many windows of a task are compared with the float model, the first that were drawn. Their states take
# 75 MB of disk for windows of 2048 tokens of SmolLM2-135M (float32, 576 wide), 270 MB for an 8B model
# (bfloat16, 4096 wide), and 30 thousand tokens leave a mean KL with an error of about one per cent.
KL_WINDOWS = 16

# Float64 logits of so many positions at a time on a CPU: its cache holds them, and worked on in place they
# take a third of the time of whole chunks. Fewer would be faster on one thread, and slower on several.
_ROWS = 16


@dataclass(frozen=True)
class Reference:
    """What the float model predicts for some windows of a text.

    states: by window, [length - 1, hidden], the states that predict its tokens but the first. head: the float
    model without its blocks.
    """

    states: dict[int, Tensor]
    head: Decoder

    def logits(self, window: int, part: slice) -> Tensor:
        """The float model's logits [1, T, vocab] at some positions of a window."""
        state = self.states[window][None, part].to(self.head.lm_head.weight.device)
        return self.head.logits(State(state))


def divergence(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Compare two predictions by their logits, each [..., vocab].

    Returns:
        KL(expected || found) in nats, float64 [...], computed in float64 (0 for equal logits), and bool
        [...]: whether the likeliest token is the same.
    """
    size = _ROWS if expected.device.type == "cpu" else len(expected.flatten(0, -2))
    rows = [logits.flatten(0, -2).split(size) for logits in (expected, found)]
    parts = []
    for some in zip(*rows, strict=True):
        logp, logq = (logits.double().log_softmax(-1) for logits in some)
        gap = logq.sub_(logp).neg_()
        parts.append(logp.exp_().mul_(gap).sum(-1))
    return torch.cat(parts).view(expected.shape[:-1]), expected.argmax(-1) == found.argmax(-1)


def reference(
    checkpoint: Checkpoint,
    tokens: Tensor,
    ids: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    folder: Path,
) -> Reference:
    """The float model's predictions for the windows `ids` of `tokens` [n, length], from `folder`, where they
    are computed and kept once per model, windows, dtype and machine.

    The checkpoint must be the one that its sha256 names: not one whose `load` changes the weights.

    Raises UserError where the folder cannot be written.
    """
    inputs = tokens[list(ids), :-1]

    def make() -> Artifact:
        with ops.counted_apart():  # no part of what the cell is that happens to need them first
            return Artifact({"states": float_states(checkpoint, inputs, dtype, device)})

    about = describe(checkpoint, inputs, dtype, device)
    states = artifacts.stored(folder, about, make).tensors["states"]
    return Reference(dict(zip(ids, states, strict=True)), _head(checkpoint, dtype, device))


def describe(
    checkpoint: Checkpoint, inputs: Tensor, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Everything that can change the last bit of the states, as a JSON object; its digest is their key."""
    machine = environment.describe(device)
    return {
        "what": "float states",
        "model": checkpoint.sha256,
        "tokens": tokens_sha256(inputs),
        "dtype": str(dtype),
        "device": device.type,
        **{name: machine[name] for name in ("torch", "cpu", "cpu_capability", "threads", "gpu", "code")},
    }


def tokens_sha256(tokens: Tensor) -> str:
    """Digest of token ids, their shape included."""
    content = tokens.to("cpu", torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(f"{list(tokens.shape)} ".encode() + content).hexdigest()


@torch.no_grad()
def float_states(checkpoint: Checkpoint, inputs: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """States [n, T, hidden] that leave the last block, for inputs [n, T], on the CPU.

    One sequence at a time, as windows are scored, and one block at a time: the device holds no more of the
    model than a block.
    """
    decoder = checkpoint.load(dtype)
    states = [decoder.embed(row[None]) for row in inputs]
    for _, block in decoder.stream_blocks(device):
        states = [decoder.through(block, state) for state in states]
    return torch.cat([state.stream for state in states])


def _head(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The model as a decoder without blocks, of which `logits` works: norm, lm_head and what is between."""
    config = dataclasses.replace(checkpoint.config, layers=0, windows=())
    tensors = {name: tensor for name, tensor in checkpoint.tensors().items() if "layers." not in name}
    head = build(config, tensors, dtype)
    for module in (head.norm, head.embed_out, head.lm_head):
        if module is not None:
            module.to(device)
    return head
