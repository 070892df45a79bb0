"""The speed of a cell's model on a small workload: what is on record, and how a report shows it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness import cell_speed, power
from harness.cell_speed import speed_record
from harness.environment import PeakMemory
from harness.neighbours import _processes, busier, shared
from harness.report import write_report
from harness.speed_shapes import ONLINE, form_bits, random_decoder, vocabulary
from methods.decoder import Decoder
from tests.harness.runs import write_cell
from tests.harness.small_shape import SMALL

CPU = torch.device("cpu")
SPEED = {
    "device": "a processor",
    "neighbours": {"load": 2.9, "threads": 2},
    "prefill_tokens": 128,
    "decoded_tokens": 8,
    "prefill_tokens_per_second": 1234.5,
    "decode_tokens_per_second": 67.89,
    "peak_memory_bytes": None,
    "eager": "there is no GPU",
}


def decoder(form: str) -> Decoder:
    words = vocabulary(SMALL, ONLINE["none"], CPU, torch.bfloat16)
    return random_decoder(SMALL, form_bits(form), ONLINE["none"], words, CPU)


def recorded(form: str) -> dict[str, object]:
    with PeakMemory(CPU) as memory:
        return speed_record(decoder(form), memory)


@pytest.mark.parametrize("form", ["bf16", "w4a4kv4"])
def test_speed_and_workload_are_on_record(form: str) -> None:
    record = recorded(form)
    assert set(record) == set(SPEED)
    assert (record["prefill_tokens"], record["decoded_tokens"]) == cell_speed.WORKLOAD["cpu"]
    for phase in ("prefill", "decode"):
        rate = record[f"{phase}_tokens_per_second"]
        assert isinstance(rate, float) and rate > 0
    assert record["peak_memory_bytes"] is None and record["eager"] == "there is no GPU"


def test_a_slow_model_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    monkeypatch.setattr(cell_speed, "LEAST_SECONDS", 1e-9)
    assert cell_speed._best(lambda: runs.append(1), CPU) > 0 and len(runs) == 1


def test_a_failure_is_a_reason_and_no_failed_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(cell_speed, "Decoding", fail)
    record = recorded("bf16")
    assert record["reason"] == "RuntimeError: no room at all" and set(record) == {
        "device",
        "neighbours",
        "reason",
    }


def test_the_report_shows_speed_beside_accuracy(tmp_path: Path) -> None:
    costs = {"seconds": {"evaluate": 1.0}, "peak_memory_bytes": 2**30}
    write_cell(tmp_path, "float", "w16a16", measured={**costs, "speed": SPEED})
    failed = {"device": "a processor", "reason": "no room"}
    write_cell(tmp_path, "rtn", "w4a4kv4", measured={**costs, "speed": failed})
    text = write_report(tmp_path).read_text()
    section = text.split("### Accuracy beside speed and memory")[1].split("###")[0]
    line = next(line for line in section.splitlines() if "| float" in line)
    assert "1,234.5" in line and "67.9" in line and "a processor" in line
    assert "128 tokens and 8 decoded behind them" in section
    assert text.index("## Cost") < text.index("### Accuracy beside speed and memory")


def test_who_else_used_the_machine_is_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it began or ended."""
    for loads in ((7.25, 1.0), (1.0, 7.25)):
        given = iter(loads)
        monkeypatch.setattr("os.getloadavg", lambda given=given: (next(given), 0.0, 0.0))
        found = recorded("bf16")["neighbours"]
        assert found == {"load": 7.25, "threads": torch.get_num_threads()}
    silent = {"load": 1.0, "threads": 2, "gpu_bytes": 5, "gpu_processes": None}
    assert busier(silent, {**silent, "gpu_bytes": 4, "gpu_processes": 1}) == {**silent, "gpu_processes": 1}
    assert busier(silent, silent) == silent


@pytest.mark.parametrize(
    "found, said",
    [
        ({"load": 2.9, "threads": 2}, []),
        ({"load": 3.0, "threads": 2}, ["load 3.0 with 2 threads of its own"]),
        ({"load": 1.0, "threads": 2, "gpu_bytes": 1.4e9, "gpu_processes": 0}, []),
        ({"load": 9.0, "threads": 2, "gpu_bytes": 1.4e9, "gpu_processes": 0}, []),
        (
            {"load": 9.0, "threads": 2, "gpu_bytes": 1.4e9, "gpu_processes": None},
            ["load 9.0 with 2 threads of its own"],
        ),
        (
            {"load": 1.0, "threads": 2, "gpu_bytes": 0.2e9, "gpu_processes": 2},
            ["2 other processes on the GPU"],
        ),
        (
            {"load": 1.0, "threads": 2, "gpu_bytes": 2.6e9, "gpu_processes": None},
            ["2.6 GB of the GPU taken beside this process' tensors"],
        ),
    ],
)
def test_a_machine_is_shared_where_others_compute(found: dict[str, Any], said: list[str]) -> None:
    assert shared(found) == said


def test_processes_are_counted_where_this_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that shows other numbers does not tell whose they are."""
    running = [SimpleNamespace(pid=pid) for pid in (os.getpid(), 1, 2)]
    library = SimpleNamespace(nvmlDeviceGetComputeRunningProcesses=lambda handle: running)
    monkeypatch.setattr(power, "driver", lambda device: (library, "handle"))
    gpu = torch.device("cuda", 0)
    assert _processes(gpu) == 2
    running.pop(0)
    assert _processes(gpu) is None
    library.nvmlDeviceGetComputeRunningProcesses = None
    assert _processes(gpu) is None
    monkeypatch.setattr(power, "driver", lambda device: None)
    assert _processes(gpu) is None


def test_the_report_marks_a_cell_whose_machine_was_shared(tmp_path: Path) -> None:
    seconds = {"seconds": {"evaluate": 1.0}}
    busy = {**SPEED, "neighbours": {"load": 9.0, "threads": 2}}
    write_cell(tmp_path, "float", "w16a16", measured={**seconds, "speed": SPEED})
    write_cell(tmp_path, "rtn", "w4a4kv4", measured={**seconds, "speed": busy})
    section = write_report(tmp_path).read_text().split("### Accuracy beside speed and memory")[1]
    float_line, rtn_line = (
        next(line for line in section.splitlines() if f"| {name}" in line) for name in ("float", "rtn")
    )
    assert "1,234.5¶" in rtn_line and "67.9¶" in rtn_line and "¶" not in float_line
    assert "so it may be faster alone: load 9.0 with 2 threads of its own." in section


def test_records_without_speed_have_no_such_section(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    assert "Accuracy beside speed" not in write_report(tmp_path).read_text()
