"""Records that can be trusted: atomic, sealed, leased."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import store


def record(folder: Path) -> dict[str, Any]:
    """A small record with two tasks and their samples, written."""
    tasks = {}
    for name in ("first", "second"):
        samples = store.write_samples(folder, name, [{"doc_id": 1, "metrics": {"acc": 1.0}}])
        tasks[name] = {"status": "done", "key": "k", "n": 1, **samples}
    whole = {"schema": store.SCHEMA, "id": "x", "tasks": tasks, "measured": {"seconds": 1.5}}
    store.write_record(folder, whole)
    return whole


def test_what_is_written_is_read(tmp_path: Path) -> None:
    whole = record(tmp_path)
    said: list[str] = []
    found = store.read_record(tmp_path, said.append)
    assert found is not None
    assert {key: value for key, value in found.items() if key != "sha256"} == whole
    assert said == []
    assert store.read_record(tmp_path / "nothing", said.append) is None
    assert said == []


def test_costs_are_outside_the_seal(tmp_path: Path) -> None:
    whole = record(tmp_path)
    before = json.loads((tmp_path / "cell.json").read_text())["sha256"]
    store.write_record(tmp_path, whole | {"measured": {"seconds": 99}})
    assert json.loads((tmp_path / "cell.json").read_text())["sha256"] == before
    store.write_record(tmp_path, whole | {"id": "y"})
    assert json.loads((tmp_path / "cell.json").read_text())["sha256"] != before


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    store.write_record(
        tmp_path,
        {"schema": store.SCHEMA, "tasks": {}, "measured": {}, "x": [float("nan"), (float("inf"), 1)]},
    )
    found = store.read_record(tmp_path)
    assert found is not None
    assert found["x"] == [None, [None, 1]]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damaged_byte_is_trusted(tmp_path: Path, data: st.DataObject) -> None:
    """Any one byte of the record changed: it reads as before (outside the seal: white space, costs), or not
    at all, and then the file is named."""
    whole = record(tmp_path)
    path = tmp_path / "cell.json"
    text = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(text))
    said: list[str] = []
    found = store.read_record(tmp_path, said.append)
    if found is None:
        assert len(said) == 1 and str(path) in said[0]
    else:
        assert {k: v for k, v in found.items() if k not in ("sha256", "measured")} == {
            k: v for k, v in whole.items() if k != "measured"
        }


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_samples_cost_their_task_alone(tmp_path: Path, damage: str) -> None:
    record(tmp_path)
    path = tmp_path / "samples" / "second.jsonl"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-5] if damage == "cut" else data.replace(b"1.0", b"0.0"))
    said: list[str] = []
    found = store.read_record(tmp_path, said.append)
    assert found is not None
    assert list(found["tasks"]) == ["first"]
    assert len(said) == 1 and str(path) in said[0]


def test_a_lease_is_exclusive_and_dies_with_its_process(tmp_path: Path, root: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from harness import store\n"
        "with store.lease(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(store.Leased), store.lease(tmp_path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    (tmp_path / ".cell.json.abc.partial").write_text("half a rec")
    with store.lease(tmp_path):
        assert not list(tmp_path.glob("*.partial")), "what the killed one left is still there"


def test_a_kill_between_any_two_writes_leaves_old_or_new(tmp_path: Path, root: Path) -> None:
    """A process that rewrites a record and a megabyte of samples for ever, killed at some moment, again and
    again."""
    code = (
        "import sys; from pathlib import Path; from harness import store\n"
        "n = 0\nwhile True:\n"
        "    n += 1\n"
        "    s = store.write_samples(Path(sys.argv[1]), 't', [{'n': n}] * 100_000)\n"
        "    store.write_record(Path(sys.argv[1]), {'schema': store.SCHEMA, 'n': n, 'measured': {}, 'tasks':"
        " {'t': {'status': 'done', **s}}})\n"
        "    print(n, flush=True)"
    )
    draw = random.Random(1)
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.uniform(0, 0.4))
        process.kill()
        process.communicate()
        found = store.read_record(tmp_path)
        assert found is not None
        # Samples newer than the record are told by their digest, and scored again.
        for task in found["tasks"].values():
            rows = (tmp_path / task["samples"]).read_text().splitlines()
            assert {json.loads(row)["n"] for row in rows} == {found["n"]}
        samples = (tmp_path / "samples" / "t.jsonl").read_text()
        assert samples.count("\n") == 100_000 and samples.endswith("\n"), "samples cut off"


def test_a_line_cut_short_in_the_history_is_left_out(tmp_path: Path) -> None:
    store.note(tmp_path, "started", kept=[])
    with (tmp_path / store.HISTORY).open("a") as stream:
        stream.write('{"time": "2026')
    assert [event["event"] for event in store.read_history(tmp_path)] == ["started"]
