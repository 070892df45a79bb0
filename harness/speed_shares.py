"""Which operation the time of a pass goes to: what the GPU's kernels took, grouped by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

OPERATIONS: tuple[tuple[str, str], ...] = (
    ("RoPE, append to the KV cache", r"rope_append|kv_append"),
    ("KV rows to 16 bits", r"^_dequantise"),
    ("attention", r"^attend|^combine|flash|fmha|cudnn|sdpa|softmax"),
    ("RMSNorm and quantiser", r"^_rmsnorm"),
    ("Hadamard transform and quantiser", r"^_hadamard"),
    ("gated product, quantiser", r"^_quantise|^_gated"),
    (
        "linears of 4-bit weights",
        r"^_kernel|^_kept|linear_many|^held_kernel|^streamed_kernel|^dequantise_weight",
    ),
    ("products in 16 bits", r"gemm|gemv|cutlass|nvjet|xmma|cublas|splitkreduce|^dense_kernel"),
    ("rounding weights", r"^_find_range|^_gptq_block"),
    ("copies", r"memcpy|memset|copy_kernel|catarray"),
    ("look-ups", r"embedding|index_?select|gather"),
)
"""Operations and a pattern of the names of their kernels, of which the first that fits counts; all others are
"other"."""
OTHER = "other"


@dataclass(frozen=True)
class Share:
    """An operation's part of a pass. seconds: of its kernels in one pass; fraction: of those of all kernels.
    kernels: how many run in one pass. names: the kernels that took most."""

    operation: str
    seconds: float
    fraction: float
    kernels: float
    names: tuple[str, ...]


def operation_of(kernel: str) -> str:
    """The operation that a GPU kernel belongs to."""
    found = (name for name, pattern in OPERATIONS if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, OTHER)


def grouped(kernels: Iterable[tuple[str, float]], calls: int) -> list[Share]:
    """Shares of (name, seconds) of every kernel that ran in `calls` passes, the largest first."""
    seconds: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    for name, took in kernels:
        operation = operation_of(name)
        own = seconds.setdefault(operation, {})
        own[name] = own.get(name, 0.0) + took
        counts[operation] = counts.get(operation, 0) + 1
    total = sum(sum(own.values()) for own in seconds.values())
    shares = [
        Share(
            operation,
            sum(own.values()) / calls,
            sum(own.values()) / total,
            counts[operation] / calls,
            tuple(_short(name) for name in sorted(own, key=own.__getitem__, reverse=True)[:2]),
        )
        for operation, own in seconds.items()
        if total > 0
    ]
    return sorted(shares, key=lambda share: -share.seconds)


def _short(name: str) -> str:
    """A kernel's name without its return type, template arguments and parameters."""
    bare = re.sub(r"^(void|static)\s+", "", name)
    return re.split(r"[<(]", bare)[0].split("::")[-1][:60] or name[:60]


def profiled(play: Callable[[], object], calls: int, device: torch.device) -> list[Share]:
    """Shares of a pass that `play` runs `calls` times on a GPU, its graph replays included. Raises
    RuntimeError where the profiler sees no kernel.

    A kernel's time is from the end of the one before it, or its own start where that is later, to its end:
    kernels begin early and wait, and so the parts add up.
    """
    from torch.profiler import ProfilerActivity, profile

    if device.type != "cuda":
        raise RuntimeError("of a GPU alone")
    play()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        play()
        torch.cuda.synchronize(device)
    kernels = sorted(
        (event.time_range.end, event.time_range.start, event.name)
        for event in found.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    return grouped(one_after_another(kernels), calls)


def one_after_another(kernels: Iterable[tuple[float, float, str]]) -> list[tuple[str, float]]:
    """(name, seconds) of kernels (end, start, name) in microseconds, ordered by their ends."""
    found, before = [], 0.0
    for end, start, name in kernels:
        found.append((name, max(end - max(start, before), 0.0) / 1e6))
        before = max(before, end)
    return found
