"""The speed of a cell's model on a small workload: what is on record, and how a report shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness import cell_speed
from harness.cell_speed import speed_record
from harness.environment import PeakMemory
from harness.report import write_report
from harness.speed_shapes import ONLINE, form_bits, random_decoder, vocabulary
from methods.decoder import Decoder
from tests.harness.runs import write_cell
from tests.harness.small_shape import SMALL

CPU = torch.device("cpu")
SPEED = {
    "device": "a processor",
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
    assert record["reason"] == "RuntimeError: no room at all" and set(record) == {"device", "reason"}


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


def test_records_without_speed_have_no_such_section(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    assert "Accuracy beside speed" not in write_report(tmp_path).read_text()
