"""The benchmark of single operations: what it runs, writes and refuses, never how long that took."""

from __future__ import annotations

import ast
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import bench, contests, timing
from kernels.contests import Shape
from kernels.timing import Limits, Timing, Work, duration, interleaved, measure_limits, nbytes

# Odd sizes: 3 heads, and packed rows that end within a byte plane.
TINY = Shape(hidden=24, intermediate=44, heads=3, kv_heads=1, head_dim=12)
CPU = torch.device("cpu")
EXPECTED = {
    "linear": {"float32", "bfloat16", "torch._int_mm alone", "w4a16", "w4a8", "w4a4"},
    "norm": {"clone", "F.rms_norm", "quantise a4", "rmsnorm_quantise a4"},
    "hadamard": {"clone", "hadamard_transform", "hadamard_quantise a4"},
    "append": {"copy", "kv_append kv4"},
    "attention": {"float32", "bfloat16", "kv_attention kv4"},
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contests.SHAPES, "tiny", TINY)
    monkeypatch.setattr(contests, "MOST_COPIES", 3)
    monkeypatch.setattr(bench, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(timing, "STREAMED_BYTES", 1 << 12)
    monkeypatch.setattr(timing, "MATRIX", {"cpu": 16})


def measured(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "made" / "bench.json"
    assert bench.main(["--shapes", "tiny", "--repeat", "3", "--out", str(out), *arguments]) == 0
    record: dict[str, Any] = json.loads(out.read_text())
    return record


def test_every_operation_is_timed_with_its_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--tokens", "1", "5", "--context", "9", "--threads", "1")
    record = measured(tmp_path, *arguments)
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in record["results"]:
        found.setdefault((result["operation"], result["tokens"]), []).append(result)
    linears = [f"linear {name}" for name in ("qkv", "o", "gate_up", "down")]
    others = ["RMSNorm, quantise", "Hadamard", "KV cache, append"]
    assert set(found) == {(name, count) for name in linears + others for count in (1, 5)} | {
        ("attention to 9", 1)
    }
    kinds = dict.fromkeys(linears, "linear") | dict(zip(others, ("norm", "hadamard", "append"), strict=True))
    for (operation, _), results in found.items():
        kind = kinds.get(operation, "attention")
        assert {result["implementation"] for result in results} == EXPECTED[kind]
        assert results[0]["ratio"] == 1
        for result in results:
            assert len(result["seconds"]) == 3
            assert min(result["seconds"]) > 0 < result["ratio"] and 0 < result["floor"] < math.inf
    assert record["command"].endswith(" ".join(arguments))
    assert record["machine"]["threads"] == 1
    assert set(record["limits"]["multiply_adds_per_second"]) == {"float32", "bfloat16", "int8"}
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 1 + len(record["results"])  # the head of the one table


def test_one_operation_at_a_time(tmp_path: Path) -> None:
    for name, implementations in EXPECTED.items():
        record = measured(tmp_path, "--operations", name, "--tokens", "2")
        assert {result["implementation"] for result in record["results"]} == implementations


def test_floors_count_every_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # At one byte a second and arithmetic for nothing, a floor is the number of bytes.
    rates = dict.fromkeys((torch.float32, torch.bfloat16, torch.int8), math.inf)
    monkeypatch.setattr(bench, "measure_limits", lambda *_: Limits(1.0, rates))
    record = measured(tmp_path, "--tokens", "5", "--context", "9")
    floors = {(row["operation"], row["implementation"]): row["floor"] for row in record["results"]}
    m, n, k, rows = 5, 60, 24, 3  # qkv: 60 outputs of 24 inputs
    out, x4 = 4 * m * n, m * k + 4 * m  # codes of activations are stored in a byte each
    packed = n * k // 2 + 4 * n
    assert {name: floors["linear qkv", name] for name in EXPECTED["linear"]} == {
        "float32": 4 * (m * k + n * k) + out,
        "bfloat16": 2 * (m * k + n * k + m * n),
        "torch._int_mm alone": m * k + n * k + out,
        "w4a16": 4 * m * k + packed + out,
        "w4a8": x4 + packed + out,
        "w4a4": x4 + packed + out,
    }
    assert floors["RMSNorm, quantise", "clone"] == 2 * 4 * m * k
    assert floors["RMSNorm, quantise", "rmsnorm_quantise a4"] == 4 * m * k + x4 + 4 * m  # and the rms
    assert floors["Hadamard", "hadamard_quantise a4"] == 4 * m * 44 + m * 44 + 4 * m
    # 12 codes are padded to 16: 8 bytes, a float32 scale and a zero-point of a byte.
    assert floors["KV cache, append", "kv_append kv4"] == m * (4 * 12 + 13)
    query = 4 * rows * 12
    assert floors["attention to 9", "float32"] == 2 * query + 2 * 9 * 4 * 12
    assert floors["attention to 9", "kv_attention kv4"] == 2 * query + 2 * 9 * 13


def test_floors_count_multiply_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 1.0, torch.bfloat16: 2.0, torch.int8: 8.0}
    monkeypatch.setattr(bench, "measure_limits", lambda *_: Limits(math.inf, rates))
    record = measured(tmp_path, "--tokens", "5", "--context", "9", "--operations", "linear", "attention")
    floors = {(row["operation"], row["implementation"]): row["floor"] for row in record["results"]}
    count = 5 * 24 * 88  # gate_up
    expected = {"float32": count, "bfloat16": count / 2, "torch._int_mm alone": count / 8}
    expected |= {"w4a16": count, "w4a8": count / 8, "w4a4": count / 8}
    assert {name: floors["linear gate_up", name] for name in expected} == expected
    assert floors["attention to 9", "kv_attention kv4"] == 2 * 3 * 12 * 9


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--shapes", "huge"), "'huge': choose among smollm2-135m, llama-3-8b"),
        (("--operations", "softmax"), "'softmax': choose among linear"),
        (("--tokens", "4", "0"), "--tokens: give at least 1"),
        (("--repeat", "0"), "--repeat"),
        (("--threads", "-1"), "--threads"),
        (("--context", "0"), "--context"),
        (("--device", "abacus"), "'abacus'"),
        (("--layers", "qkv"), "--layers: only with --device cuda"),
        (("--by", "ours"), "--by: only"),
        (("--prepare", "2"), "--prepare: only"),
        (("--commit", "abc"), "--commit: only"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["--shapes", "tiny", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_a_file_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("")
    out = str(tmp_path / "taken" / "bench.json")
    given = ["--shapes", "tiny", "--operations", "append", "--tokens", "1", "--repeat", "1", "--out", out]
    assert bench.main(given) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_number_of_threads_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads that there are no free cores for make everything slow, so none are made.
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    measured(tmp_path, "--threads", "7", "--operations", "append", "--tokens", "1")
    assert numbers == [7, torch.get_num_threads()]


def test_runs_take_turns_and_are_told_which_call_it_is() -> None:
    calls: list[tuple[str, int]] = []
    runs = {name: (lambda call, name=name: calls.append((name, call))) for name in "ab"}
    timings = interleaved(runs, 3, CPU)
    warm = 2 * len(runs)
    assert calls[warm:] == [(name, turn) for turn in range(3) for name in "ab"]
    assert {len(each.seconds) for each in timings.values()} == {3} and list(timings) == ["a", "b"]


def test_short_runs_are_repeated_to_fill_a_turn() -> None:
    numbers: list[int] = []
    interleaved({"short": numbers.append}, 2, CPU, least=1e-3)
    counted = numbers[2:]
    assert counted == list(range(len(counted))) and len(counted) > 20


def test_a_ratio_is_formed_within_each_turn() -> None:
    # The machine slows down fourfold in the second turn; the ratio does not notice.
    slow, fast = Timing((2.0, 8.0, 2.2)), Timing((1.0, 4.0, 1.0))
    assert slow.ratio(fast) == 2.0
    assert slow.median == 2.2


@given(
    moved=st.integers(1, 10**9),
    counts=st.dictionaries(st.sampled_from([torch.float32, torch.int8]), st.integers(1, 10**9)),
)
def test_a_floor_is_the_longer_of_memory_and_arithmetic(moved: int, counts: dict[torch.dtype, int]) -> None:
    limits = Limits(100.0, {torch.float32: 10.0, torch.int8: 40.0})
    arithmetic = counts.get(torch.float32, 0) / 10 + counts.get(torch.int8, 0) / 40
    assert limits.floor(Work(moved, counts)) == pytest.approx(max(moved / 100, arithmetic))


def test_a_floor_needs_the_limit_of_its_type() -> None:
    with pytest.raises(KeyError):
        Limits(1.0, {torch.float32: 1.0}).floor(Work(1, {torch.int8: 1}))


def test_limits_are_measured_for_each_type() -> None:
    limits = measure_limits(CPU, (torch.float64, torch.int8))
    assert limits.bytes_per_second > 0
    assert set(limits.multiply_adds_per_second) == {torch.float64, torch.int8}


def test_bytes_of_nested_parts() -> None:
    rows = contests.Run(lambda _: None, (torch.zeros(3, dtype=torch.int8), [torch.zeros(2), None]))
    assert nbytes(rows, torch.zeros(5, dtype=torch.float64)) == 3 + 8 + 40


@pytest.mark.parametrize(
    "seconds, text",
    [
        (12.34, "12.3 s"),
        (1.0, "1.00 s"),
        (0.0123, "12.3 ms"),
        (0.5, "500 ms"),
        (4.56e-6, "4.56 µs"),
        (0.0, "0 µs"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_it_needs_torch_alone(root: Path) -> None:
    # So that it runs on a bare GPU machine.
    for file in (root / "kernels").rglob("*.py"):
        allowed = {"torch", "triton", "kernels", *sys.stdlib_module_names}
        if file.name in ("roofline.py", "svg.py"):
            allowed.add("matplotlib")  # a report, made anywhere
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= allowed, file
