"""Working memory that kernels keep between launches: partial sums, and counters of arrivals."""

import functools

import torch
from torch import Tensor

PARTIALS = 256 * 128
"""Partial sums a program, in words of 4 bytes; there are up to two programs a multiprocessor."""

# Partial sums and counters of arrivals, by device, stream, and whether calls on it are captured in a graph;
# and one a device that the next captured stream will get.
_workspaces: dict[tuple[int | None, int, bool], tuple[Tensor, Tensor]] = {}
_spares: dict[int | None, tuple[Tensor, Tensor]] = {}


def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for partial sums (int32, `words(device)` of them), and counters (int32, two a multiprocessor),
    which are 0 before and after every launch.

    Kept for each stream, since two streams may run at once, branches of a graph among them, and as large as
    any choice needs it (35 MB on 132 multiprocessors): a graph goes on using the one it was captured with.
    Graphs that were captured on one stream share it, and are to be replayed one after another. A kernel that
    is launched before the one in front has ended waits for that before it writes here.
    """
    captured = torch.cuda.is_current_stream_capturing()
    key = (device.index, torch.cuda.current_stream(device).cuda_stream, captured)
    if key not in _workspaces:
        if captured and device.index not in _spares:
            return _new_workspace(device)  # the graph zeroes it at every replay
        _workspaces[key] = _spares.pop(device.index) if captured else _new_workspace(device)
    if not captured and device.index not in _spares:
        _spares[device.index] = _new_workspace(device)
    return _workspaces[key]


@functools.cache
def nowhere(device: torch.device) -> tuple[Tensor, Tensor]:
    """Arguments for a launch that needs no such memory."""
    nothing = torch.empty(1, dtype=torch.int32, device=device)
    return nothing, nothing


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def words(processors: int) -> int:
    """Partial sums that there is room for on that many multiprocessors."""
    return 2 * processors * PARTIALS


def _new_workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    many = processors(device)
    return (
        torch.empty(words(many), dtype=torch.int32, device=device),
        torch.zeros(2 * many, dtype=torch.int32, device=device),
    )
