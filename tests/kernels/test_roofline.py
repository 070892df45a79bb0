"""The report of a GPU run: what it concludes from a small record, not how it looks."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from kernels import roofline
from kernels.gpu_bench import Row
from kernels.roofline import TARGETS, Target, met, points, report, speed

HEAD: dict[str, Any] = {
    "command": "python -m kernels.bench --device cuda",
    "commit": "0123abc",
    "turns": 3,
    "machine": {
        "device": "Some GPU",
        "code": "fedc",
        "torch": "2.11",
        "triton": "3.6",
        "driver": "580",
        "tuning": "ab" * 32,
        "peers": {"humming-kernels": "0.1.19"},
    },
    "limits": {
        "bytes_per_second": 3e12,
        "multiply_adds_per_second": {"bfloat16": 3.5e14, "int8": 7e14},
        "measured": {"copy": 3e12, "read": 2.9e12, "bf16": 3.5e14, "int8": 4.5e14},
    },
}


def row(name: str, by: str, seconds: tuple[float, ...], **about: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "shape": "llama-3-8b",
        "operation": "linear w4a8",
        "layer": "o",
        "rows": 64,
        "outputs": 4096,
        "inputs": 4096,
        "bytes": 10**7,
        "multiply_adds": 64 * 4096**2,
        "floor": 3e-6,
        "of_floor": 0.5,
        "speed": 1.0,
        "sets": 20,
        "rotated": True,
        "eager": False,
    }
    made = asdict(Row(name=name, by=by, seconds=seconds, **(fields | about)))
    written: dict[str, Any] = json.loads(json.dumps(made))
    return written


def record(*rows: dict[str, Any]) -> dict[str, Any]:
    return {**copy.deepcopy(HEAD), "results": list(rows)}


def full(factor: float) -> dict[str, Any]:
    """Every contestant of every target; this project's are `factor` times as fast as it takes."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for target in TARGETS:
        for layer in target.layers:
            for count in target.rows:
                for name, by in ((target.against, "torch"), (target.ours, "ours")):
                    seconds = 1e-5 if by == "torch" else 1e-5 / (4.0 * factor)
                    at = {"operation": target.operation, "layer": layer, "rows": count}
                    made = row(name, by, (seconds, seconds, seconds), **at)
                    rows[(*at.values(), name)] = made
    return record(*rows.values())


TARGET = Target("one", "linear w4a8", "ours w4a8", "bf16 cuBLAS", ("o",), (64,), 2.7, 3.0, 3.8)


def test_a_target_is_judged_by_the_median_over_turns() -> None:
    rows = roofline.index(
        record(
            row("bf16 cuBLAS", "torch", (3e-5, 6e-5, 2.4e-5)), row("ours w4a8", "ours", (1e-5, 2e-5, 1e-5))
        )
    )
    (point,) = points(TARGET, rows)
    assert point.speed == pytest.approx(3.0)  # within each turn 3.0, 3.0, 2.4
    assert met(TARGET, point)


@pytest.mark.parametrize("seconds, reached", [((1e-5,), True), ((1.0e-5 * 2.75 / 2.69,), False), ((), False)])
def test_a_target_is_met_missed_or_not_measured(seconds: tuple[float, ...], reached: bool) -> None:
    rows = roofline.index(
        record(row("bf16 cuBLAS", "torch", (2.75e-5,)), row("ours w4a8", "ours", seconds, reason="no"))
    )
    (point,) = points(TARGET, rows)
    assert met(TARGET, point) is reached and (point.speed is None) is not bool(seconds)


def test_as_fast_as_a_package_is_not_faster() -> None:
    target = Target("two", "linear w4a8", "ours w4a8", "humming w4a8", ("o",), (64,), 1.0)
    rows = roofline.index(record(row("humming w4a8", "humming", (1e-5,)), row("ours w4a8", "ours", (1e-5,))))
    (point,) = points(target, rows)
    assert point.speed == 1.0 and not met(target, point)


def test_the_targets_are_those_of_the_project() -> None:
    known = {(target.title, target.least) for target in TARGETS}
    assert {
        ("W4A4, many rows", 1.7),
        ("W4A8, few rows", 3.2),
        ("W4A8, 64 rows", 2.7),
        ("W4A16 g128, few rows", 3.2),
        ("RMSNorm + quantise", 1 / 1.4),
        ("Hadamard + quantise", 1 / 1.4),
    } <= known
    assert all(len(target.layers) == 4 for target in TARGETS if target.operation.startswith("linear"))
    assert sum(target.against.startswith("humming") for target in TARGETS) == 6


def test_a_report_says_what_was_met_and_what_was_missed() -> None:
    text = report(full(2.0))
    assert "All are met." in text and "Missed" not in text
    slow = full(2.0)
    for made in slow["results"]:
        if made["name"] == "ours w4a16, weights at rest" and made["layer"] == "down" and made["rows"] == 4:
            made["seconds"] = [5e-6] * 3
    text = report(slow)
    assert "- W4A16 g128, few rows: down, 4 rows: 2.00x" in text
    assert text.count("\n- ") == 1 and "11 of 12" in text
    for said in ("Some GPU", "0123abc", "humming-kernels 0.1.19", "700 TFLOP/s", "900 TOPS", "roofline.svg"):
        assert said in text


def test_the_best_of_the_others_stands_beside_ours() -> None:
    text = report(
        record(
            row("bf16 cuBLAS", "torch", (9e-6,)),
            row("ours w4a8", "ours", (1e-5,), speed=0.9),
            row("tinygemm", "torch", (3e-5,)),
            row("humming w4a8", "humming", (2e-5,), eager=True, rotated=False),
        )
    )
    assert "2.00x humming w4a8" in text and "1.00*†" in text and "| 0.90 |" in text


def test_what_did_not_run_is_listed_once_for_each_reason() -> None:
    rows = [row("gemlite w4a16", "gemlite", (), reason="none", rows=count, speed=None) for count in range(9)]
    text = report(record(*rows))
    assert text.count("gemlite w4a16, linear w4a8: none") == 1 and "and 5 more" in text


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "run.json"
    source.write_text(json.dumps(full(1.0)))
    for name in ("one", "two"):
        assert roofline.main([str(source), "--report", str(tmp_path / name)]) == 0
    for file in (roofline.REPORT, roofline.PLOT):
        first = (tmp_path / "one" / file).read_bytes()
        assert first == (tmp_path / "two" / file).read_bytes() and len(first) > 1000
    assert b"<dc:date>" not in (tmp_path / "one" / roofline.PLOT).read_bytes()


@pytest.mark.parametrize("content", ["[", "[]", "{}", '{"results": [{}]}', '{"results": []}'])
def test_another_file_is_one_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "run.json"
    source.write_text(content)
    assert roofline.main([str(source), "--report", str(tmp_path / "report")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "report").exists()


def test_speed_needs_both() -> None:
    one = row("a", "ours", (1.0,))
    assert speed(one, None) is None and speed(None, one) is None
