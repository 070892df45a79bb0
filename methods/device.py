"""Devices, as users name them, models on them for a while, and the memory that this takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Inside, products of float32 matrices are formed as `torch.set_float32_matmul_precision` names it,
    whatever a user has set: whole ("highest"), or in TensorFloat-32 on GPUs that have it ("high")."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def device_name(device: torch.device) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Gives a function that says how many bytes were taken inside at the most: on a GPU what torch had
    allocated there, else the resident memory of the whole process; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.init()  # before its first use there are no statistics to begin anew
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident size counts anew
    except OSError:
        yield lambda: None
        return
    yield _largest_resident_size


def _largest_resident_size() -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return None
