"""The report's section on QUAD and QuaRot at equal bits, from made-up records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from methods.quad import QUAD
from methods.quarot import QuaRot
from tests.harness.runs import edit, number_and_interval, table, text_of, write_cell

SECTION = "### QUAD and QuaRot at equal bits"


def cell(run: Path, name: str, bits: str, weight: float, seed: int = 0, **options: Any) -> None:
    """A cell of a method by name; its scores are made up for `bits`."""
    defaults = vars(QUAD(rounding="rtn") if name == "quad" else QuaRot(rounding="rtn"))
    row = name + "".join(f" {key}={value}" for key, value in options.items())
    # Scores hang on the label that `write_cell` knows; identities differ by seed.
    made = write_cell(
        run, "quarot" if name == "quad" else "gptq", bits, seed=seed + 100 * len(list(run.iterdir()))
    )

    def change(record: dict[str, Any]) -> None:
        record["seed"] = seed
        record["method"] |= {"row": row, "name": name, "options": {name: {**defaults, **options}}}
        record["effective_bits"] |= {"weight": weight, "activation": 4.25}

    edit(made, change)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_cell(tmp_path, "float", "w16a16")
    for seed in (0, 1):
        cell(tmp_path, "quarot", "w4a4kv4", 4.02, seed)
        cell(tmp_path, "quarot", "w4a4kv4g32", 4.3, seed)
        cell(tmp_path, "quad", "w4a4kv4", 4.35, seed)
    return tmp_path


def test_the_same_widths_and_the_nearest_bits(run: Path) -> None:
    lines = table(text_of(run), SECTION)
    assert [(line["w / a"], line["against"], line["its w / a"]) for line in lines] == [
        ("4.35 / 4.25", "quarot, w4a4kv4", "4.02 / 4.25"),
        ("4.35 / 4.25", "quarot, w4a4kv4g32", "4.3 / 4.25"),
    ]
    for line, widths in zip(lines, (1.0, 0.8), strict=True):
        assert line["seeds"] == "2"
        columns = [name for name in line if "perplexity" in name]
        assert columns
        for name in columns:
            # Made-up losses: 0.1 for "quarot", 0.35 for "gptq", times those of the bits; QUAD's are at 1.0.
            value, low, high = number_and_interval(line[name])
            assert low < value < high
            assert value == pytest.approx(100 * math.expm1(0.1 - 0.35 * widths), abs=8)
        assert 0 < float(line["of float (%)"]) <= 120


def test_what_is_too_far_is_not_called_equal(run: Path) -> None:
    cell(run, "quad", "w4a4kv4", 5.34, rank=64)
    lines = [line for line in table(text_of(run), SECTION) if "rank=64" in line["method"]]
    assert [line["against"] for line in lines] == ["quarot, w4a4kv4"]


def test_eight_bits_meet_eight_bits(run: Path) -> None:
    """QuaRot has no such mode; QUAD of rank 0 has, and is held against nothing itself."""
    cell(run, "quad", "w4a4kv4", 4.35, a8=True)
    text = text_of(run)
    assert not any("a8" in line["method"] for line in table(text, SECTION))
    cell(run, "quad", "w4a4kv4", 4.02, rank=0, a8=True)
    cell(run, "quad", "w4a4kv4", 4.02, rank=0, tune=True)
    lines = table(text_of(run), SECTION)
    assert [line["against"] for line in lines if "a8" in line["method"]] == ["quad rank=0 a8=True, w4a4kv4"]
    assert not any("rank=0" in line["method"] for line in lines)
    assert not any("tune" in line["against"] for line in lines)


def test_what_was_tuned_meets_what_was_tuned_alike(run: Path) -> None:
    cell(run, "quad", "w4a4kv4", 4.35, tune=True)
    cell(run, "quad", "w4a4kv4", 4.02, rank=0, tune=True)
    cell(run, "quad", "w4a4kv4", 4.02, rank=0, tune=True, steps=7)
    lines = [line for line in table(text_of(run), SECTION) if "tune" in line["method"]]
    assert [line["against"] for line in lines] == [
        "quarot, w4a4kv4",
        "quarot, w4a4kv4g32",
        "quad rank=0 tune=True, w4a4kv4",
    ]


@pytest.mark.parametrize("other", [{"rounding": "gptq"}, {"online": False}, {"preset": "paper"}])
def test_other_roundings_and_online_parts_are_not_compared(tmp_path: Path, other: dict[str, Any]) -> None:
    write_cell(tmp_path, "float", "w16a16")
    cell(tmp_path, "quarot", "w4a4kv4", 4.02, **other)
    cell(tmp_path, "quad", "w4a4kv4", 4.35)
    assert SECTION not in text_of(tmp_path)


def test_nothing_is_said_without_quad(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    cell(tmp_path, "quarot", "w4a4kv4", 4.02)
    assert SECTION not in text_of(tmp_path)
