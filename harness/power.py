"""The energy that a GPU has used, as its driver reports it.

Two sources, the better first: the driver's energy counter, and samples of the power drawn, added up over time
in a thread beside what is measured. A driver that reports neither gives no meter.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from kernels.gpu_bench import gpu_id

COUNTER, SAMPLES = "energy counter", "power samples"
_MILLISECONDS = 20
"""Between two samples of the power."""


@dataclass(frozen=True)
class Meter:
    """source: COUNTER or SAMPLES. read(): joules since some moment. close(): end the thread behind it."""

    source: str
    read: Callable[[], float]
    close: Callable[[], None] = lambda: None


def meter(device: torch.device) -> Meter | None:
    """A meter of a GPU; None of a CPU and where the driver reports neither energy nor power."""
    if device.type != "cuda":
        return None
    return _counter(device) or _sampler(_watch(device))


@contextmanager
def used(device: torch.device) -> Iterator[Callable[[], dict[str, Any]]]:
    """Gives a function that says what the whole GPU has used since: {"joules", "energy_source"}; {} of a CPU
    and where the driver reports neither energy nor power."""
    found = meter(device)
    if found is None:
        yield dict
        return

    def energy() -> dict[str, Any]:
        try:
            return {"joules": found.read() - begin, "energy_source": found.source}
        except Exception:  # noqa: BLE001 - a driver that stops telling costs the cell nothing
            return {}

    try:
        begin = found.read()
        yield energy
    finally:
        found.close()


def driver(device: torch.device) -> tuple[Any, Any] | None:
    """The driver's own library (NVML) and what it calls a GPU; None where it cannot be had."""
    try:
        import pynvml  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        name = gpu_id(device)
        if name.startswith("GPU-"):
            handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        else:
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(name))
    except Exception:  # noqa: BLE001 - whatever the driver refuses, it tells nothing here
        return None
    return pynvml, handle


def _counter(device: torch.device) -> Meter | None:
    found = driver(device)
    if found is None:
        return None
    library, handle = found

    def joules() -> float:
        return float(library.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

    try:
        joules()
    except Exception:  # noqa: BLE001 - whatever the driver refuses, it reports no energy here
        return None
    return Meter(COUNTER, joules)


def _watch(device: torch.device) -> subprocess.Popen[str] | None:
    """A program that prints the watts drawn, one line a sample."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=power.draw.instant", "--format=csv,noheader,nounits"]
    asked += ["-i", gpu_id(device), "-lms", str(_MILLISECONDS)]
    try:
        return subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def _sampler(process: subprocess.Popen[str] | None, patience: float = 10.0) -> Meter | None:
    """A meter over the lines of a program, None where it prints no number within `patience` seconds."""
    if process is None or process.stdout is None:
        return None
    state: dict[str, Any] = {"joules": 0.0, "watts": 0.0, "at": 0.0}
    lock, first, lines = threading.Lock(), threading.Event(), process.stdout

    def advance(now: float) -> None:
        state["joules"] += state["watts"] * (now - state["at"])
        state["at"] = now

    def follow() -> None:
        for line in lines:
            try:
                watts = float(line.strip().split()[0])
            except (ValueError, IndexError):
                break
            with lock:
                now = time.perf_counter()
                if first.is_set():
                    advance(now)
                state.update(watts=watts, at=now)
            first.set()
        # Nobody adds up what the driver no longer says.
        with lock:
            state["joules"] = float("nan")
        first.set()

    def read() -> float:
        with lock:
            advance(time.perf_counter())
            return float(state["joules"])

    def close() -> None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        follower.join(5)
        lines.close()

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    found = Meter(SAMPLES, read, close)
    if not first.wait(patience) or math.isnan(read()):
        close()
        return None
    return found
