"""The report of a GPU run: what it concludes from a small record, not how it looks."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch.nn.attention import SDPBackend

from kernels import gpu_attention, roofline, verdicts
from kernels.gpu_bench import Row
from kernels.roofline import report
from kernels.targets import ATTENTION, COPY, DECIDING, INFORMATION, TORCH_ATTENTION, Target
from kernels.verdicts import index, met, points, speed, speeds

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
    for target in (*DECIDING, *INFORMATION):
        for layer in target.layers:
            for count in target.rows:
                for name in (*target.against, target.ours):
                    by = "ours" if name == target.ours else "torch"
                    seconds = 1e-5 if by == "torch" else 1e-5 / (4.0 * factor)
                    at = {"operation": target.operation, "layer": layer, "rows": count}
                    made = row(name, by, (seconds, seconds, seconds), **at)
                    rows[(*at.values(), name)] = made
    return record(*rows.values())


TARGET = Target("one", "linear w4a8", "ours w4a8", ("bf16 cuBLAS",), ("o",), (64,), 2.7, 3.0, 3.8)


def test_a_target_is_judged_by_the_median_over_turns() -> None:
    rows = index(
        record(
            row("bf16 cuBLAS", "torch", (3e-5, 6e-5, 2.4e-5)), row("ours w4a8", "ours", (1e-5, 2e-5, 1e-5))
        )
    )
    (point,) = points(TARGET, rows)
    assert point.speed == pytest.approx(3.0)  # within each turn 3.0, 3.0, 2.4
    assert met(TARGET, point)


@pytest.mark.parametrize("seconds, reached", [((1e-5,), True), ((1.0e-5 * 2.75 / 2.69,), False), ((), False)])
def test_a_target_is_met_missed_or_not_measured(seconds: tuple[float, ...], reached: bool) -> None:
    rows = index(
        record(row("bf16 cuBLAS", "torch", (2.75e-5,)), row("ours w4a8", "ours", seconds, reason="no"))
    )
    (point,) = points(TARGET, rows)
    assert met(TARGET, point) is reached and (point.speed is None) is not bool(seconds)


def test_as_fast_as_a_package_is_not_faster() -> None:
    target = Target("two", "linear w4a8", "ours w4a8", ("humming w4a8",), ("o",), (64,), 1.0)
    rows = index(record(row("humming w4a8", "humming", (1e-5,)), row("ours w4a8", "ours", (1e-5,))))
    (point,) = points(target, rows)
    assert point.speed == 1.0 and not met(target, point)


@pytest.mark.parametrize("slower, reached", [(0, True), (1, True), (2, False)])
def test_faster_than_a_package_means_in_nine_of_ten_turns(slower: int, reached: bool) -> None:
    target = Target("two", "linear w4a8", "ours w4a8", ("humming w4a8",), ("o",), (64,), 1.0)
    theirs = (0.9e-5,) * slower + (1.1e-5,) * (10 - slower)
    rows = index(record(row("humming w4a8", "humming", theirs), row("ours w4a8", "ours", (1e-5,) * 10)))
    (point,) = points(target, rows)
    assert point.speed == pytest.approx(1.1) and met(target, point) is reached


def test_a_pass_is_judged_by_the_faster_of_two_copies_in_each_turn() -> None:
    ours, one, two = (
        row(name, "torch", seconds)
        for name, seconds in {
            "ours a4": (2.0, 2.0, 2.0),
            COPY: (1.0, 3.0, 2.0),
            "kernel over the same bytes": (2.0, 2.0, 1.0),
        }.items()
    )
    assert speeds(ours, one, two) == (0.5, 1.0, 0.5)
    assert speeds(ours, one, None) == ()
    for target in (*DECIDING, *INFORMATION):
        if target.ours == "ours a4":
            assert set(target.against) == {COPY, "kernel over the same bytes"}
            assert (min(target.rows) >= 1024) is (target in DECIDING)


def test_the_targets_are_those_of_the_project() -> None:
    known = {(target.title, target.least) for target in DECIDING}
    assert {
        ("W4A4, many rows", 1.7),
        ("W4A8, few rows", 3.2),
        ("W4A8, 64 rows", 2.7),
        ("W4A16 g128, few rows", 3.2),
        ("RMSNorm + quantise", 1 / 1.4),
        ("Hadamard + quantise", 1 / 1.4),
    } <= known
    every = (*DECIDING, *INFORMATION)
    assert all(len(target.layers) == 4 for target in every if target.operation.startswith("linear"))
    assert sum(target.against[0].startswith("humming") for target in DECIDING) == 6
    assert len({target.title for target in every}) == len(every)


def test_a_report_says_what_was_met_and_what_was_missed() -> None:
    text = report(full(2.0))
    assert "Missed" not in text and "not measured" not in text
    slow = full(2.0)
    for made in slow["results"]:
        if made["name"] == "ours w4a16, weights at rest" and made["layer"] == "down" and made["rows"] == 4:
            made["seconds"] = [5e-6] * 3
    text = report(slow)
    missed = "| W4A16 g128, few rows | 3.20x | down, 4 rows: 2.00x (lowest turn 2.00x) |"
    unknown = "not known: no counters were read"
    assert f"{missed} {unknown} |" in text and "11 of 12" in text
    assert text.count(f"(lowest turn 2.00x) | {unknown} |") == 1
    why = {"W4A16 g128, few rows": {"down 4": "Measured: this and that."}}
    assert f"{missed} Measured: this and that. |" in report(slow, why)
    for wrong in ({"W4A16 g128, few rows": {"down 1": "no"}}, {"another": {"down 4": "no"}}):
        with pytest.raises(ValueError, match="a reason for what is not missed"):
            report(slow, wrong)
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
    assert "2.00x humming w4a8" in text and "0.45*†" in text and "| 0.90 |" in text


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


@pytest.mark.parametrize("content", ["[", "[]", "{}", '{"results": [{}]}', '{"results": []}', "damaged"])
def test_another_file_is_one_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "run.json"
    if content == "damaged":
        rows = [row("bf16 cuBLAS", "torch", (1.0,)), row("ours w4a8", "ours", (1.0, 1.0))]
        content = json.dumps(record(*rows))
    source.write_text(content)
    assert roofline.main([str(source), "--report", str(tmp_path / "report")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "report").exists()


def test_speed_needs_both() -> None:
    one = row("a", "ours", (1.0,))
    assert speed(one, None) is None and speed(None, one) is None


@pytest.mark.parametrize("field", ["seconds", "of_floor", "bytes", "rotated", "reason"])
def test_a_row_without_a_field_is_one_line(
    field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = full(1.0)
    del damaged["results"][-1][field]
    (tmp_path / "run.json").write_text(json.dumps(damaged))
    assert roofline.main([str(tmp_path / "run.json"), "--report", str(tmp_path / "report")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and verdicts.NOT_A_RECORD in said


def test_a_record_without_limits_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = full(1.0)
    del damaged["limits"]["bytes_per_second"]
    (tmp_path / "run.json").write_text(json.dumps(damaged))
    assert roofline.main([str(tmp_path / "run.json"), "--report", str(tmp_path / "report")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["kernels", "kv-attention"])
def test_the_vouched_for_report_is_what_its_record_gives(root: Path, tmp_path: Path, name: str) -> None:
    source = root / "results" / "reference" / f"{name}-h100.json.xz"
    assert roofline.main([str(source), "--report", str(tmp_path)]) == 0
    for file in (roofline.REPORT, roofline.PLOT):
        assert (tmp_path / file).read_bytes() == (root / "reports" / name / file).read_bytes()


def test_a_run_is_not_asked_for_what_it_did_not_time() -> None:
    run = full(2.0)
    run["results"] = [row for row in run["results"] if row["operation"] != "linear w4a16 g128"]
    text = report(run)
    assert "| W4A16 g128, few rows |" not in text and "| W4A8, few rows |" in text
    assert "this run did not time: W4A16 g128, few rows; ours w4a16, weights at rest against humming" in text


KV4 = next(target for target in DECIDING if target.operation == ATTENTION)


def without(*names: str, reason: str | None = None) -> dict[str, Any]:
    """A run in which these contestants did not take part, or failed with a reason."""
    run = full(2.0)
    if reason is None:
        run["results"] = [row for row in run["results"] if row["name"] not in names]
    for made in run["results"]:
        if made["name"] in names:
            made |= {"seconds": [], "reason": reason, "of_floor": None, "speed": None}
    return run


@pytest.mark.parametrize("backend", ["flash", "cuDNN"])
def test_kv4_is_not_judged_without_the_fastest_attention(backend: str) -> None:
    one, folded = TORCH_ATTENTION[backend]
    for run, why in (
        (without(one, folded), "not in this run"),
        (without(one, folded, reason="RuntimeError: No available kernel."), "RuntimeError: No available"),
    ):
        every = list(points(KV4, index(run)))
        assert all(not point.speeds and not met(KV4, point) for point in every)
        assert all(f"{one}: {why}" in str(point.reason) for point in every)
        text = report(run)
        assert "| 0 of 2, 2 not judged | not measured |" in text
        assert text.count(f"{KV4.title}, batch 1 32768: not judged: {one}: {why}") == 1
        assert "### Missed" not in text
    for alone in (one, folded):
        assert all(met(KV4, point) for point in points(KV4, index(without(alone))))
    ours_failed = without("ours kv4", one, folded)
    assert all(point.reason is None and not point.speeds for point in points(KV4, index(ours_failed)))


def test_kv4_is_judged_by_the_fastest_that_ran() -> None:
    run = without("torch math", "torch efficient", reason="no")
    for made in run["results"]:
        if made["name"] == "torch cuDNN, heads folded":
            made["seconds"] = [value / 4 for value in made["seconds"]]
    (first, _) = points(KV4, index(run))
    assert first.speed == pytest.approx(2.0) and first.reason is None and not met(KV4, first)


def test_every_way_to_attend_is_accounted_for() -> None:
    run = without("torch efficient", reason="RuntimeError: No available kernel.")
    run["results"] = [
        made
        for made in run["results"]
        if not made["name"].startswith("torch math")
        and (made["layer"], made["name"]) != ("batch 8", "ours bf16")
    ]
    lines = [line for line in report(run).splitlines() if line.startswith("| ")]
    total = 8  # batches 1 and 8 at three contexts, and heads of 64 at the longest
    for line in (
        f"| ours bf16 | 5 of {total} | not in this run (batch 8 32768, batch 8 1024, batch 8 8192) |",
        f"| torch flash | {total} of {total} |  |",
        f"| torch efficient | 0 of {total} | RuntimeError: No available kernel. |",
        f"| torch math | 0 of {total} | not in this run |",
        f"| torch math, heads folded | 0 of {total} | not in this run |",
    ):
        assert line in lines
    assert "## Attention in bf16" not in report(record(row("bf16 cuBLAS", "torch", (1e-5,))))


def test_pytorch_knows_its_backends_by_the_names_that_are_timed() -> None:
    assert set(gpu_attention.BACKENDS) == set(TORCH_ATTENTION)
    assert all(hasattr(SDPBackend, name) for name in gpu_attention.BACKENDS.values())


def test_reasons_are_read_beside_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, beside = tmp_path / "run.json", tmp_path / "run.reasons.json"
    slow = full(2.0)
    for made in slow["results"]:
        if made["name"] == "ours a4" and made["rows"] == 1024 and made["layer"] == "heads":
            made["seconds"] = [2e-5] * 3
    source.write_text(json.dumps(slow))
    beside.write_text(json.dumps({"Hadamard + quantise": {"heads 1024": "It waits."}}))
    assert roofline.main([str(source), "--report", str(tmp_path)]) == 0
    assert "0.500x (lowest turn 0.500x) | It waits. |" in (tmp_path / roofline.REPORT).read_text()
    for wrong in ("[", "[]", '{"Hadamard + quantise": ["heads 1024"]}'):
        beside.write_text(wrong)
        assert roofline.main([str(source), "--report", str(tmp_path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_earlier_names_say_how_they_were_launched() -> None:
    rows = index(
        record(row("ours w4a8 + quantise", "ours", (1.0,)), row("ours w4a4 + quantise", "ours", (1.0,)))
    )
    assert [key[4] for key in rows] == [
        "ours w4a8 + quantise, weights at rest",
        "ours w4a4 + quantise, plain",
    ]
