"""A decoder's shape small enough to be timed in a test, and how to run the benchmark on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import speed, speed_matrix, speed_passes
from harness.speed_shapes import SHAPES
from kernels import timing

SMALL = replace(
    SHAPES["llama-3.2-1b"],
    layers=2,
    hidden_size=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    intermediate_size=384,
    vocab_size=100,
)
FORMS = ("bf16", "w4a16g64", "w4a8kv8", "w4a4kv4")
ARGUMENTS = (
    "--shape",
    "small",
    "--forms",
    *FORMS,
    "--batch",
    "1",
    "2",
    "--context",
    "8",
    "16",
    "--repeat",
    "2",
)


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Register the shape, and let limits be measured on little."""
    patch.setitem(SHAPES, "small", SMALL)
    patch.setattr(speed_matrix, "PREFILL", (2, 12))
    patch.setattr(speed_passes, "STEPS", 4)
    patch.setattr(timing, "STREAMED_BYTES", 1 << 12)
    patch.setattr(timing, "MATRIX", {"cpu": 16})


def measured(folder: Path, *arguments: str) -> dict[str, Any]:
    """The record of a run."""
    out = folder / "made" / "speed.json"
    assert speed.main([*ARGUMENTS, "--out", str(out), *arguments]) == 0
    record: dict[str, Any] = json.loads(out.read_text())
    return record
