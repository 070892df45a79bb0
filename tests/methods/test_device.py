"""The memory that work on a device takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from methods.device import device_name, peak_memory

SIZE = 64 * 2**20
CPU = torch.device("cpu")


MEASURED = f"""
import os, psutil, torch
from methods.device import peak_memory
before = psutil.Process(os.getpid()).memory_info().rss
peaks = []
for taken in ({SIZE}, 0):
    with peak_memory(torch.device("cpu")) as peak:
        torch.ones(taken // 4)
        peaks.append(peak())
print(before, *peaks)
"""


def test_the_peak_is_of_what_happened_inside(root: Path) -> None:
    """In a process of its own: one that has freed memory takes no more from the system."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], cwd=root, capture_output=True, text=True, check=True
    )
    before, *peaks = done.stdout.split()
    if "None" in peaks:
        pytest.skip("this system does not say")
    first, second = map(int, peaks)
    assert int(before) + 0.95 * SIZE <= first < int(before) + 2 * SIZE  # some pages are counted late
    assert second <= first - SIZE / 2


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, text: str) -> int:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "write_text", refused)
    with peak_memory(CPU) as peak:
        assert peak() is None
    assert device_name(CPU) == "cpu"
