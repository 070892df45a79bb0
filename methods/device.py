"""Devices, as users name them, and models on them for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from methods.errors import UserError


def parse_device(text: str) -> torch.device:
    """cpu, cuda or cuda:N; UserError where this machine lacks it."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise UserError(f"device {text!r}: give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {text!r}: give cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {text!r}: this machine has no usable CUDA GPU; give cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {text!r}: this machine has {torch.cuda.device_count()} GPU(s)")
    return device


@contextmanager
def placed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """The model on `device`; at its end it is where it was."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
