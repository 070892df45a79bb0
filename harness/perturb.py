"""Harmless changes, under which the gate measures how far numbers move by themselves.

Nobody would call any of them a change of the method, yet quantisers amplify them: a last-bit difference turns
a value that lies between two codes into the other code, and from there on everything differs a little.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.evaluate import TaskPlan
from methods.checkpoint import Checkpoint
from methods.decoder import Decoder


@dataclass(frozen=True)
class Perturbation:
    """noise: seed of a change of the embedding by -1, 0 or +1 ulp, each element at random, before anything
    else happens, so that calibration and quantising see it too; None: none. reverse: documents are computed
    in reverse order."""

    noise: int | None = None
    reverse: bool = False

    def checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint whose `load` gives the perturbed model; its name and digest are the original's."""
        if self.noise is None:
            return checkpoint
        return NoisyCheckpoint(
            checkpoint.name, checkpoint.label, checkpoint.folder, checkpoint.sha256, noise=self.noise
        )

    def order(self, plan: TaskPlan) -> TaskPlan:
        """The plan in the order in which its documents are to be computed."""
        return dataclasses.replace(plan, ids=plan.ids[::-1]) if self.reverse else plan


@dataclass(frozen=True)
class NoisyCheckpoint(Checkpoint):
    """A checkpoint that loads with noise in its embedding. A tied head is the same tensor and moves with it,
    an untied one stays. Nothing is written to the file, which is mapped into memory."""

    noise: int = 0

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Decoder:
        decoder = super().load(dtype, device)
        tied = decoder.lm_head.weight is decoder.embed_tokens
        moved = one_ulp(decoder.embed_tokens.data, self.noise)
        decoder.embed_tokens = nn.Parameter(moved, requires_grad=False)
        if tied:
            decoder.lm_head.weight = decoder.embed_tokens
        return decoder


def one_ulp(values: Tensor, seed: int) -> Tensor:
    """A new tensor: every element of `values`, or the next number of its dtype below or above it, each with
    probability 1/3. Zeros stay zero: their neighbours are so small that they slow arithmetic down and, behind
    a norm, are no small change."""
    step = torch.randint(-1, 2, values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    towards = torch.where(step > 0, torch.inf, -torch.inf).to(values)
    still = (step == 0).to(values.device) | (values == 0)
    return torch.where(still, values, torch.nextafter(values, towards))
