"""What a trained model loses at 4 bits: the negative log-likelihood of every window of text, by method and
bit-width, so that models and methods can be compared in pairs.

Quantisers are those of the paper (arXiv 2506.19697) where this project has them: weights symmetric by output
channel in a searched range, activations and KV cache asymmetric by token, and by token and head, unclipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ops
from methods.bits import Bits, QuantiserSettings
from methods.checkpoint import Checkpoint, open_checkpoint
from methods.decoder import Decoder
from methods.method import Context
from methods.pipeline import quantise
from methods.registry import parse_method
from training.tokens import Data

PAPER = QuantiserSettings(activation_symmetric=False, activation_clip=1.0, kv_clip=1.0)
WIDTHS = ("w4a8", "w4a8kv8", "w4a4", "w4a4kv4")
"""The paper's 4-8-16, 4-8-8, 4-4-16 and 4-4-4 of weights, activations and KV cache."""
EVERY = tuple((method, width) for method in ("rtn", "ffn_hadamard") for width in WIDTHS)
MORE = (
    *(("gptq", "w4a16"), ("rtn", "w4a16"), ("gptq", "w4a4kv4"), ("ffn_hadamard:rounding=gptq", "w4a4kv4")),
    *(("quarot:rounding=rtn", "w4a4kv4"), ("quarot", "w4a4kv4"), ("kurtail", "w4a4kv4")),
)
"""Of Adam and OSP alone, as in the paper's table of its longest runs."""
TEXTS = ("held_out", "wikipedia")
CALIBRATION = 32
"""Windows of training text that learned methods and GPTQ see."""
_BATCH = 8


def measure(
    folder: Path,
    data: Data,
    cells: Sequence[tuple[str, str]],
    device: torch.device,
    *,
    seed: int = 0,
    windows: int = 62,
    length: int | None = None,
) -> list[dict[str, Any]]:
    """The float model and each (method, bits) of `cells`: for each of `TEXTS` the sum of the negative
    log-likelihoods in nats of each window. An osp model's methods are composed with `osp`, which changes no
    number but refuses what is none."""
    checkpoint = open_checkpoint(str(folder))
    length = length or checkpoint.config.max_positions
    texts = {name: data.windows(name, length, windows) for name in TEXTS}
    calibration = data.windows("train", length, CALIBRATION)
    found = []
    for method, bits in (("float", "w16a16"), *cells):
        spec = method
        if checkpoint.config.recipe == "osp" and method != "float":
            spec = {"rtn": "osp", "gptq": "osp:rounding=gptq"}.get(method, f"osp+{method}")
        model = _quantised(checkpoint, spec, Bits.parse(bits), calibration, device, seed)
        nll = {name: window_nll(model, ids.to(device)).tolist() for name, ids in texts.items()}
        found.append(
            {"method": method, "spec": spec, "bits": bits, "length": length, "seed": seed, "nll": nll}
        )
    return found


def _quantised(
    checkpoint: Checkpoint, spec: str, bits: Bits, calibration: Tensor, device: torch.device, seed: int
) -> Decoder:
    pipeline = parse_method(spec)
    tokens = calibration if pipeline.calibrates(bits, PAPER) else None
    return quantise(
        checkpoint, pipeline, bits, Context(device, seed), settings=PAPER, calibration=tokens
    ).decoder


@torch.no_grad()
def window_nll(model: Decoder, ids: Tensor) -> Tensor:
    """Sum over tokens 2 to T of each row of ids [B, T] of -ln p, float64 [B]."""
    found = []
    with ops.reference_only():
        for rows in ids.split(_BATCH):
            logits = model(rows)[:, :-1].float()
            losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
            found.append(losses.view(len(rows), -1).to(torch.float64).sum(-1))
    return torch.cat(found).cpu()
