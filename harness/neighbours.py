"""Who else uses a machine while something is timed there, as far as it tells."""

from __future__ import annotations

import os

import torch

from harness import power
from harness.store import Record

OWN_BYTES = 1.5e9
"""Of a GPU, what a process takes at the most beside its tensors: the driver's context, libraries, kernels."""


def neighbours(device: torch.device) -> Record:
    """{"load", "threads"}: the machine's load average over the last minute, and the threads of this process
    that are part of it. On a GPU also "gpu_bytes", what is taken there beside what torch holds in this
    process, and "gpu_processes", how many others compute there: None where the driver does not say, or where
    a container hides which of them is this one."""
    found: Record = {"load": os.getloadavg()[0], "threads": torch.get_num_threads()}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found["gpu_bytes"] = total - free - torch.cuda.memory_reserved(device)
        found["gpu_processes"] = _processes(device)
    return found


def busier(first: Record, second: Record) -> Record:
    """The larger of each of two findings of `neighbours`."""
    return {
        name: max((each[name] for each in (first, second) if each[name] is not None), default=None)
        for name in first
    }


def shared(found: Record) -> list[str]:
    """What says that others used the machine, in phrases, of what `neighbours` found. The load counts this
    process' own last minute, too, and so nothing on a GPU that tells who computes there."""
    reasons = []
    if found.get("gpu_processes") is None and found["load"] >= found["threads"] + 1:
        reasons.append(f"load {found['load']:.1f} with {found['threads']} threads of its own")
    if found.get("gpu_processes"):
        reasons.append(f"{found['gpu_processes']} other processes on the GPU")
    elif found.get("gpu_bytes", 0) > OWN_BYTES:
        reasons.append(f"{found['gpu_bytes'] / 1e9:.1f} GB of the GPU taken beside this process' tensors")
    return reasons


def _processes(device: torch.device) -> int | None:
    driver = power.driver(device)
    if driver is None:
        return None
    library, handle = driver
    try:
        running = {process.pid for process in library.nvmlDeviceGetComputeRunningProcesses(handle)}
    except Exception:  # noqa: BLE001 - whatever the driver refuses, it does not say
        return None
    return len(running) - 1 if os.getpid() in running else None
