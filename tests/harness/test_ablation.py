"""Variants of one method against the method itself, and what runs online, in the report."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.harness.runs import edit, number_and_interval, row_of, rows_of, table, text_of, write_cell

OPTIONS = "### Options of one method"
ONLINE = "### Online transforms"
DELTA = "Δ log-perplexity wikipedia [95 %]"


def renamed(folder: Path, row: str) -> Path:
    """The same cell as one of another method or option."""
    name = row.partition(":")[0]
    edit(folder, lambda record: record["method"].update(row=row, name=name, spec=row))
    return folder


def log_perplexity(folder: Path) -> float:
    rows = rows_of(folder, "perplexity_wikipedia")
    return sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows)


def test_variants_are_compared_with_the_plainest(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    base = renamed(write_cell(tmp_path, "quarot", "w4a4kv4"), "fptquant")
    changed = renamed(write_cell(tmp_path, "rtn", "w4a4kv4"), "fptquant:value=false;steps=3")
    write_cell(tmp_path, "quarot", "w4a4kv4", seed=1)
    lines = table(text_of(tmp_path), OPTIONS)
    assert [line["method"] for line in lines] == ["fptquant", "fptquant:value=false;steps=3"]
    assert row_of(lines, "w4a4kv4", "fptquant")[DELTA] == "reference"
    shown = row_of(lines, "w4a4kv4", "fptquant:value=false;steps=3")
    value, low, high = number_and_interval(shown[DELTA])
    want = log_perplexity(changed) - log_perplexity(base)
    assert value == pytest.approx(want, abs=0.0006)
    assert low < value < high
    assert math.isfinite(number_and_interval(shown["Δ mean accuracy (%) [95 %]"])[0])


def test_other_bits_roundings_and_methods_are_no_variants(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    write_cell(tmp_path, "quarot", "w4a4kv4")
    write_cell(tmp_path, "quarot", "w4a8kv8")
    write_cell(tmp_path, "quarot (gptq)", "w4a4kv4")
    write_cell(tmp_path, "rtn", "w4a4kv4")
    text = text_of(tmp_path)
    assert OPTIONS not in text
    assert ONLINE not in text


def test_online_transforms_are_listed(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    parts = [
        {"seam": "down_proj's input", "count": 30, "width": 1536, "size": 512},
        {"seam": "residual stream", "count": 60, "width": 576, "size": None},
    ]
    edit(write_cell(tmp_path, "quarot", "w4a4kv4"), lambda record: record["diagnostics"].update(online=parts))
    lines = table(text_of(tmp_path), ONLINE)
    assert [tuple(line.values()) for line in lines] == [
        ("w4a4kv4", "quarot", "down_proj's input", "Hadamard, order 512", "30", "1,536"),
        ("w4a4kv4", "quarot", "residual stream", "scale", "60", "576"),
    ]
