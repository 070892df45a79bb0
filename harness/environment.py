"""What a number may depend on beside the grid: versions, machine, threads, the code itself."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
_LIBRARIES = ("torch", "transformers", "tokenizers", "lm_eval", "datasets", "numpy", "scipy")
_CODE = ("kernels", "methods", "harness")
_PRESENTATION = {
    f"harness/{name}.py"
    for name in (
        *("report", "records", "tables", "figures", "ablation", "gains", "learning", "plots"),
        *("comparison_plots", "inputs", "page", "reproduce", "tradeoffs"),
        *("compare", "costs", "archive"),
        *("stats", "inference", "evidence", "fidelity"),
        *("gate", "baseline", "movement", "judgement", "recording", "trial"),
        *("grid", "engine", "ray_engine", "watch", "worker", "store", "progress"),
        "lm_eval",
        *("choose", "equal_bits", "parity", "parity_report", "agreement", "side_by_side", "odd_models"),
        *("speed", "speed_bench", "speed_matrix", "speed_passes", "speed_report", "speed_shapes"),
        *("speed_shares", "speed_targets", "speed_work", "power", "markdown", "cell_speed", "neighbours"),
        *("beside", "published", "boosting", "boosting_report", "choices"),
    )
} | {
    *("kernels/bench.py", "kernels/command.py", "kernels/contests.py", "kernels/timing.py"),
    *("methods/export.py", "methods/compressed.py"),
    *("methods/packed_checkpoint.py", "methods/checkpoint_folder.py"),
}


def describe(device: torch.device) -> dict[str, Any]:
    """Everything of this machine, its software and this code that can change a number."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "quantgrid": _version("quantgrid") or _declared_version(),
        "code": code_digest(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _LIBRARIES},
        "cpu": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
    }


def platform_name() -> str:
    return platform.platform(terse=True)


@cache
def code_digest() -> str:
    """Digest of the source files that can change a number (not those that present it)."""
    digest = hashlib.sha256()
    for package in _CODE:
        for file in sorted((ROOT / package).rglob("*")):
            name = file.relative_to(ROOT).as_posix()
            if file.suffix in (".py", ".yaml") and name not in _PRESENTATION:
                digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


@cache
def commit() -> str | None:
    """The commit of the working tree, "+" appended where it has changes; that of `git archive`, whose
    trees are not watched for changes; None outside both."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return _archived_commit()
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def _archived_commit() -> str | None:
    """What `git archive` wrote into a file of this tree; None where git itself has it."""
    try:
        found = (ROOT / ".git_archival.txt").read_text().strip()
    except OSError:
        return None
    return found[:12] if re.fullmatch("[0-9a-f]{40}", found) else None


@cache
def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def _declared_version() -> str | None:
    import tomllib

    try:
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    except (OSError, KeyError, ValueError):
        return None
    return str(declared)


def plugin_digest(cls: type) -> str | None:
    """Digest of the file that defines a third-party method; None for this project's own, whose code is in
    `code_digest`."""
    if cls.__module__.partition(".")[0] in _CODE:
        return None
    return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()[:16]


def main(argv: list[str]) -> int:
    """`python -m harness.environment DEVICE [THREADS]`: what `describe` says, as JSON, for others."""
    from methods.device import parse_device
    from methods.errors import UserError

    try:
        device = parse_device(argv[0])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if len(argv) > 1:
        torch.set_num_threads(int(argv[1]))
    print(json.dumps(describe(device)))
    return 0


class PeakMemory:
    """Highest memory in bytes while the context is open: resident memory of the whole process, sampled at
    20 Hz, and on a GPU what torch has allocated there."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        import psutil  # here: a bare GPU machine may have none, and speed needs none

        self._process = psutil.Process(os.getpid())
        self._stop = threading.Event()
        self._gpu_bytes = 0
        self.bytes = 0

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, self._process.memory_info().rss)
            if self._stop.wait(0.05):
                return

    def record(self) -> dict[str, int]:
        """What goes into a cell's record."""
        found = {"peak_memory_bytes": self.bytes}
        if self._gpu is not None:
            found["peak_gpu_memory_bytes"] = max(self._gpu_bytes, torch.cuda.max_memory_allocated(self._gpu))
        return found

    @contextmanager
    def apart(self) -> Iterator[Callable[[], int | None]]:
        """Gives a function that says what was allocated on the GPU inside at the most, None without a GPU."""
        if self._gpu is None:
            yield lambda: None
            return
        self._gpu_bytes = max(self._gpu_bytes, torch.cuda.max_memory_allocated(self._gpu))
        torch.cuda.reset_peak_memory_stats(self._gpu)
        yield partial(torch.cuda.max_memory_allocated, self._gpu)

    def __enter__(self) -> PeakMemory:
        if self._gpu is not None:
            torch.cuda.reset_peak_memory_stats(self._gpu)
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
