"""The energy meter: what it adds up, and where there is none."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from harness import power


def printing(*lines: str, then: float = 60.0) -> subprocess.Popen[str]:
    """A program that prints the lines, and stays."""
    code = f"import time\nfor line in {lines!r}: print(line, flush=True)\ntime.sleep({then})"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_cpu_has_no_meter() -> None:
    assert power.meter(torch.device("cpu")) is None


def test_what_was_used_is_the_difference_and_the_meter_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    readings, closed = iter((1000.0, 1250.5)), []
    meter = power.Meter(power.COUNTER, lambda: next(readings), lambda: closed.append(1))
    monkeypatch.setattr(power, "meter", lambda device: meter)
    with power.used(torch.device("cuda")) as energy:
        assert energy() == {"joules": 250.5, "energy_source": power.COUNTER}
        assert not closed
    assert closed == [1]
    monkeypatch.undo()
    with power.used(torch.device("cpu")) as energy:
        assert energy() == {}


def test_power_is_added_up_over_time() -> None:
    meter = power._sampler(printing("100.0", "200.00 W"))
    assert meter is not None and meter.source == power.SAMPLES
    try:
        time.sleep(0.5)  # both lines are read
        begin, first = time.perf_counter(), meter.read()
        time.sleep(0.1)
        used, took = meter.read() - first, time.perf_counter() - begin
        assert 0.1 * 200 * 0.99 <= used <= 200 * took * 1.01
    finally:
        meter.close()


@pytest.mark.parametrize("line", ["[N/A]", "", "No devices were found"])
def test_a_driver_that_reports_no_power_gives_no_meter(line: str) -> None:
    assert power._sampler(printing(line)) is None


def test_a_program_that_says_nothing_gives_no_meter() -> None:
    assert power._sampler(printing(), patience=0.05) is None
    assert power._sampler(printing(then=0)) is None
    assert power._sampler(None) is None
