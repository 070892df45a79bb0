"""Runs the process of one cell (harness/worker.py) to its end, whatever that is.

It imports nothing of this project: on a cluster the module goes to the nodes as it is, and a process that
only waits for another should be small.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POLL_SECONDS = 1.0
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
"""Has glibc keep freed memory for the next tensor (up to 32 MiB a block, 4 GiB in all): pages that go back
to the system are zeroed anew each time, which takes as long as a pass of a quantiser. No number depends on
it."""


@dataclass(frozen=True)
class Ending:
    """How the process of a cell came to its end."""

    last: dict[str, Any] = field(default_factory=dict)
    """The last event that it sent."""
    stage: str = "start"
    """The step that it was at."""
    status: int | None = 0
    """Its exit status; negative: the signal that killed it; None: it was killed here, for its time limit."""
    oom: bool = False
    """Whether the system killed for lack of memory meanwhile."""


def watch(
    line: bytes,
    seconds: float,
    show: Callable[[dict[str, Any]], None],
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
) -> Ending:
    """Run a worker to its end, of `seconds` at the most; `show` is given its events.

    line: its job (`harness.worker.Job.line`). environment, folder: what it runs in, by default this
    process's own.
    """
    kills = oom_kills()
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=inherited() if environment is None else dict(environment),
        cwd=folder,
        start_new_session=True,  # an interrupt from the keyboard is this process's to handle
    )
    last: dict[str, Any] = {}
    stage, buffer, deadline = "start", b"", time.monotonic() + seconds

    def ending(status: int | None) -> Ending:
        return Ending(last, stage, status, oom_kills() > kills)

    assert process.stdin is not None and process.stdout is not None
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            process.stdin.write(line)
            process.stdin.flush()
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    return ending(None)
                if not selector.select(min(left, POLL_SECONDS)):
                    # A process that it has forked may keep the pipe open after its death.
                    if process.poll() is not None:
                        return ending(process.returncode)
                    continue
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    return ending(process.wait())
                *lines, buffer = (buffer + data).split(b"\n")
                for text in lines:
                    last = json.loads(text)
                    stage = last.get("begin", stage)
                    show(last)
    except BrokenPipeError:
        return ending(process.wait())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
        process.wait()
        process.stdin.close()
        process.stdout.close()


def inherited() -> dict[str, str]:
    """The environment of a worker that finds what this process finds."""
    return {**ALLOCATOR, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def oom_kills() -> int:
    """How often the kernel has killed for memory in this control group so far; 0 where it does not say."""
    for file, name in (("memory.events", "oom_kill"), ("memory/memory.oom_control", "oom_kill")):
        try:
            for line in (Path("/sys/fs/cgroup") / file).read_text().splitlines():
                key, _, count = line.partition(" ")
                if key == name:
                    return int(count)
        except (OSError, ValueError):
            continue
    return 0
