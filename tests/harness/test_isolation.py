"""Cells in processes of their own: kills, crashes, hangs and what is on record of them afterwards.

The command runs as a user runs it, as a process; methods that misbehave come from a package of their own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import engine, store
from harness.config import GridConfig, cells_of, load_grid
from harness.watch import Ending, watch
from harness.worker import Job
from methods import assets
from tests.harness.small_grid import contents, save_model, tasks_done, write_grid
from tests.harness.tokenizers import word_tokenizer

pytestmark = pytest.mark.timeout(1200)

PLUGIN = '''
import os, time
from dataclasses import dataclass
from typing import ClassVar
import signal, subprocess
import torch
from methods.method import Method


@dataclass(frozen=True, kw_only=True)
class Orphan(Method):
    """Dies and leaves a child that has its files open."""

    name: ClassVar[str] = "orphan"

    def transform(self, model, artifact):
        if os.fork() == 0:
            time.sleep(10_000)
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class Crash(Method):
    name: ClassVar[str] = "crash"

    def transform(self, model, artifact):
        print("the last words of this cell")
        os.abort()


@dataclass(frozen=True, kw_only=True)
class Hang(Method):
    name: ClassVar[str] = "hang"

    def transform(self, model, artifact):
        time.sleep(10_000)


@dataclass(frozen=True, kw_only=True)
class Hog(Method):
    name: ClassVar[str] = "hog"

    def transform(self, model, artifact):
        print("about to ask for much")
        torch.empty(2**55)


@dataclass(frozen=True, kw_only=True)
class Ruin(Method):
    name: ClassVar[str] = "ruin"

    def transform(self, model, artifact):
        model.norm.weight.mul_(float("nan"))
        return model


@dataclass(frozen=True, kw_only=True)
class Moody(Method):
    """Crashes while the file that MOODY names is there."""

    name: ClassVar[str] = "moody"

    def transform(self, model, artifact):
        if os.path.exists(os.environ["MOODY"]):
            os._exit(7)
        return model
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every process cuts the texts into tokens anew: words, of which they have fewest."""
    return save_model(tmp_path_factory.mktemp("model") / "small", word_tokenizer())


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, root: Path) -> dict[str, str]:
    """That of a machine on which the methods above are installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "misbehaving.py").write_text(PLUGIN)
    info = site / "misbehaving-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: misbehaving\nVersion: 1.0\n")
    names = {"crash": "Crash", "hang": "Hang", "hog": "Hog", "ruin": "Ruin", "moody": "Moody"}
    names["orphan"] = "Orphan"
    points = "".join(f"{name} = misbehaving:{cls}\n" for name, cls in names.items())
    (info / "entry_points.txt").write_text(f"[quantgrid.methods]\n{points}")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(root), str(site))),
        "OMP_NUM_THREADS": "1",
        "MOODY": str(site / "moody"),
    }


def start(grid: Path, out: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    out.parent.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "harness.grid", str(grid), "--out", out.name, "--quiet", *arguments],
        cwd=out.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output = process.communicate(timeout=900)[0]
    return process.returncode, output


def records(out: Path) -> dict[str, dict[str, Any]]:
    found = (json.loads(path.read_text()) for path in out.glob(f"*/{store.RECORD}"))
    return {record["method"]["name"]: record for record in found}


@pytest.fixture(scope="module")
def hanging(
    model: str, tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A command whose first cell hangs, and its folder of results. The first test asks for it and the last
    one looks at it, so that nobody waits for its time limit."""
    folder = tmp_path_factory.mktemp("hanging")
    tasks = ["perplexity_wikipedia"]
    grid = write_grid(folder / "grid.yaml", model, methods=("hang", "ruin"), tasks=tasks, time_limit=1.5)
    process = start(grid, folder / "out", environment)
    yield process, folder / "out"
    process.kill()
    process.communicate()


@pytest.mark.usefixtures("hanging")
def test_what_befalls_a_cell_is_recorded_and_the_grid_goes_on(
    model: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    methods = ("crash", "orphan", "hog", "rtn")
    grid = write_grid(tmp_path / "grid.yaml", model, methods=methods, tasks=["piqa_local"])
    code, output = finish(start(grid, tmp_path / "out", environment))
    assert code == 1, output
    found = records(tmp_path / "out")
    assert found["rtn"]["status"] == "done", output
    failures = {name: found[name]["failure"] for name in ("crash", "orphan", "hog")}
    assert {name: item["kind"] for name, item in failures.items()} == {
        "crash": "crash",
        "orphan": "crash",
        "hog": "out of memory",
    }
    assert {item["stage"] for item in failures.values()} == {"quantise"}
    assert "SIGABRT" in failures["crash"]["message"]
    assert "the last words of this cell" in failures["crash"]["output"]
    assert "about to ask for much" in failures["hog"]["output"]
    assert "SIGKILL" in failures["orphan"]["message"]
    assert processes_of_cells(tmp_path / "out") == 4


def processes_of_cells(out: Path) -> int:
    """How many processes have filled cells: one each, whose memory went with it."""
    events = [store.read_history(path.parent) for path in out.glob(f"*/{store.RECORD}")]
    return len({event["pid"] for cell in events for event in cell if event["event"] == "started"})


def test_a_crash_is_kept_until_it_is_retried(model: str, tmp_path: Path, environment: dict[str, str]) -> None:
    grid = write_grid(tmp_path / "grid.yaml", model, methods=["moody"], tasks=["piqa_local"])
    mood = Path(environment["MOODY"])
    mood.touch()
    assert finish(start(grid, tmp_path / "out", environment))[0] == 1
    mood.unlink()
    before = records(tmp_path / "out")["moody"]
    assert "exit status 7" in before["failure"]["message"]
    assert finish(start(grid, tmp_path / "out", environment))[0] == 1  # not again by itself
    assert records(tmp_path / "out")["moody"] == before
    assert finish(start(grid, tmp_path / "out", environment, "--retry-failed"))[0] == 0
    assert records(tmp_path / "out")["moody"]["failure"] is None


def _filled(
    grid: Path, out: Path, attempt: Callable[[], Ending], monkeypatch: pytest.MonkeyPatch, retry: bool = False
) -> dict[str, Any]:
    """The record of a grid's one cell, whose process fares as `attempt` says, and which is attempted once."""
    attempts = []

    def watch(*arguments: Any) -> Ending:
        attempts.append(arguments)
        assert len(attempts) == 1
        return attempt()

    monkeypatch.setattr(engine, "watch", watch)
    settings = load_grid(grid, {})
    (record,) = engine.run_grid(settings, out, command="tests", quiet=True, retry_failed=retry)
    assert attempts
    return record


def test_a_failure_is_recorded_though_the_cell_is_held_just_then(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process that is not quite dead, say. Also where failures are to be retried: once is once."""
    grid = write_grid(tmp_path / "grid.yaml", model, methods=["rtn"], tasks=["piqa_local"])
    holders: list[threading.Thread] = []

    def attempt() -> Ending:
        held = threading.Event()

        def hold() -> None:
            (cell,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
            with store.lease(cell):
                held.set()
                time.sleep(1.5)

        holders.append(threading.Thread(target=hold))
        holders[-1].start()
        assert held.wait(60)
        return Ending({}, "quantise", -signal.SIGABRT)

    for retry in (False, True):
        record = _filled(grid, tmp_path / "out", attempt, monkeypatch, retry)
        holders[-1].join()
        assert (record["status"], record["failure"]["kind"]) == ("failed", "crash")
        assert "SIGABRT" in record["failure"]["message"]
        (kept,) = records(tmp_path / "out").values()
        assert kept["failure"] == record["failure"]


def test_a_failure_does_not_replace_what_another_command_has_made_since(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = write_grid(tmp_path / "grid.yaml", model, methods=["rtn"], tasks=["piqa_local"])

    def attempt() -> Ending:
        """Its process is killed, and before that is noticed the other command has filled the cell."""
        engine.run_grid(load_grid(grid, {}), tmp_path / "out", command="other", quiet=True, isolate=False)
        return Ending({}, "quantise", -signal.SIGKILL)

    record = _filled(grid, tmp_path / "out", attempt, monkeypatch)
    assert (record["status"], record["failure"]) == ("done", None)
    assert record["measured"]["command"] == "other"


def workers(parent: int) -> list[int]:
    """Processes that `parent` has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes by /proc")
def test_kills_at_random_moments_lose_and_repeat_nothing(
    model: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    """kill -9 of the command or of its worker, then the same command again."""
    grid = write_grid(tmp_path / "grid.yaml", model, methods=["float", "quarot"])
    whole, out, draw = tmp_path / "whole" / "run", tmp_path / "killed" / "run", random.Random(5)
    began = time.monotonic()
    assert finish(start(grid, whole, environment))[0] == 0
    took = time.monotonic() - began
    for kill in range(3):
        process = start(grid, out, environment)
        time.sleep(draw.uniform(0.2, 1.0) * took)
        children = workers(process.pid)
        victims = children if kill % 2 and children else [process.pid]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        process.kill()
        process.communicate(timeout=60)
        deadline = time.monotonic() + 20  # a worker ends with the command that wanted it
        while any(Path(f"/proc/{child}/stat").exists() and _alive(child) for child in children):
            assert time.monotonic() < deadline, "a worker outlives its command"
            time.sleep(0.05)
    assert finish(start(grid, out, environment, "--retry-failed"))[0] == 0  # killed workers count as crashes
    assert finish(start(grid, out, environment))[0] == 0
    assert contents(out) == contents(whole)
    done = tasks_done(out)
    assert len(done) == len(set(done)), "a finished task was computed again"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_commands_fill_one_store(model: str, tmp_path: Path, environment: dict[str, str]) -> None:
    grid = write_grid(tmp_path / "grid.yaml", model, methods=["float", "rtn"], bits=["w4a4kv4", "w4a16"])
    out = tmp_path / "out"
    both = [start(grid, out, environment) for _ in range(2)]
    for process in both:
        code, output = finish(process)
        assert code == 0, output
    done = tasks_done(out)
    assert len(done) == len(set(done)) == 3 * 3
    starts = [e["pid"] for path in out.glob("*/history.jsonl") for e in store.read_history(path.parent)]
    assert len(set(starts)) == 3  # one worker a cell, whichever command started it

    # A worker that was starting while another command's filled the cell finds nothing left to do.
    manifest = json.loads((out / store.MANIFEST).read_text())
    cell, cell_id = cells_of(GridConfig.model_validate(manifest["grid"]))[0], manifest["cells"][0]
    history = (out / cell_id / store.HISTORY).read_bytes()
    job = Job(manifest["grid"], dataclasses.asdict(cell), cell_id, str(out), "late", False)
    assert watch(job.line(), 300, lambda event: None) == Ending({"settled": True}, "start", 0)
    assert (out / cell_id / store.HISTORY).read_bytes() == history


def test_a_damaged_artifact_is_named_and_made_again(
    model: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    """What cells share beside their records: here the float model's kurtosis."""
    grid = write_grid(tmp_path / "grid.yaml", model, methods=["rtn"], tasks=["piqa_local"])
    home = tmp_path / "home"
    home.mkdir()
    for name in ("assets", "calibration"):
        (assets.home() / name).mkdir(parents=True, exist_ok=True)
        (home / name).symlink_to(assets.home() / name)
    environment = {**environment, "QUANTGRID_HOME": str(home)}
    assert finish(start(grid, tmp_path / "first", environment))[0] == 0
    (artifact,) = (home / "artifacts").glob("*.json")
    whole = artifact.read_bytes()
    artifact.write_bytes(whole.replace(b"0 attention", b"1 attention"))
    code, output = finish(start(grid, tmp_path / "second", environment))
    assert code == 0
    assert f"{artifact} is damaged" in output
    assert artifact.read_bytes() == whole
    first, second = (records(tmp_path / name)["rtn"] for name in ("first", "second"))
    assert first["sha256"] == second["sha256"]


def test_a_hang_is_given_up_and_the_grid_goes_on(hanging: tuple[subprocess.Popen[str], Path]) -> None:
    """And what the next cell computes is not finite. The last test of this file: see `hanging`."""
    process, out = hanging
    code, output = finish(process)
    assert code == 1, output
    found = records(out)
    failure = found["hang"]["failure"]
    assert (failure["kind"], failure["stage"]) == ("hang", "quantise")
    assert "1.5 minutes" in failure["message"]
    task = found["ruin"]["tasks"]["perplexity_wikipedia"]
    assert (task["status"], found["ruin"]["status"]) == ("failed", "partial")
    assert "not finite" in task["failure"]["message"]
    assert processes_of_cells(out) == 2
