"""The memory that work on a device takes."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch

from methods.device import device_name, peak_memory

SIZE = 64 * 2**20
CPU = torch.device("cpu")


def test_the_peak_is_of_what_happened_inside() -> None:
    before = psutil.Process(os.getpid()).memory_info().rss
    with peak_memory(CPU) as peak:
        torch.ones(SIZE // 4)
        first = peak()
    with peak_memory(CPU) as peak:
        second = peak()
    if first is None or second is None:
        pytest.skip("this system does not say")
    assert before + 0.95 * SIZE <= first < before + 2 * SIZE  # some pages are counted late
    assert second <= first - SIZE / 2


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, text: str) -> int:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "write_text", refused)
    with peak_memory(CPU) as peak:
        assert peak() is None
    assert device_name(CPU) == "cpu"
