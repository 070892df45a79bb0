"""Cells on a Ray cluster of several nodes on this machine: nodes killed, commands interrupted, cells that
misbehave, and what users are told. The command runs as a user runs it, as a process."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from filelock import FileLock

from harness import grid, ray_engine, store
from harness.cell import open_setting
from harness.config import GridConfig, cells_of
from harness.engine import Work
from harness.watch import Ending
from methods.errors import UserError
from tests.harness.small_grid import save_model, tasks_done, write_grid
from tests.harness.tokenizers import word_tokenizer

pytestmark = pytest.mark.timeout(1200)

PLUGIN = '''
import os, time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from methods.method import Method

HERE = Path(__file__).parent


def starts(name):
    """How often a process of this method has come so far, this one included."""
    count = len(list(HERE.glob(f"{name}.*"))) + 1
    part = HERE / f".{name}"
    part.write_text(str(os.getpid()))
    part.rename(HERE / f"{name}.{count}")
    return count


@dataclass(frozen=True, kw_only=True)
class Doom(Method):
    """Waits for its node to be killed."""

    name: ClassVar[str] = "doom"

    def transform(self, model, artifact):
        starts("doom")
        time.sleep(10_000)


@dataclass(frozen=True, kw_only=True)
class Stall(Method):
    """The same, until it is let go."""

    name: ClassVar[str] = "stall"

    def transform(self, model, artifact):
        starts("stall")
        while not (HERE / "go").exists():
            time.sleep(0.1)
        return model


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
class Seen(Method):
    """Which GPU is visible; waits until both cells have looked."""

    name: ClassVar[str] = "seen"

    def transform(self, model, artifact):
        (HERE / f"gpu.{os.getpid()}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        while len(list(HERE.glob("gpu.*"))) < 2:
            time.sleep(0.1)
        return model
'''
METHODS = ("doom", "stall", "crash", "rtn")
LIMIT = 0.1
"""Minutes, for the method that hangs: wherever its process is by then."""
WAIT = 300


def wait_for_end(pid: int) -> None:
    """Until the process of a cell is no more, as it soon has to be."""
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline, "a cell outlives its command or its node"
        time.sleep(0.1)


class Nodes:
    """A cluster whose nodes are groups of processes on this machine; its head runs no cells."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        # A node that answers no more is noticed after 3 seconds; one that is slow to answer has 10 each time.
        health = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
        head = {
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": 80_000_000,
            "_system_config": health,
        }
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: list[Any] = []
        self.address: str = self._cluster.address

    def add(self, cpus: int = 1, gpus: int = 0) -> None:
        node = self._cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=80_000_000)
        self._nodes.append(node)

    def kill(self, pid: int) -> None:
        """kill -9 of all of Ray on the node that a cell's process runs on; returns when it is gone, too."""
        raylets = {parent.pid for parent in psutil.Process(pid).parents()}
        for node in list(self._nodes):
            if node.all_processes["raylet"][0].process.pid in raylets:
                self._cluster.remove_node(node, allow_graceful=False)
                self._nodes.remove(node)
                wait_for_end(pid)
                return
        raise AssertionError(f"process {pid} runs on no node")

    def end(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the methods above are installed, and what their processes leave."""
    site = tmp_path_factory.mktemp("site")
    (site / "waiting.py").write_text(PLUGIN)
    info = site / "waiting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: waiting\nVersion: 1.0\n")
    names = ("doom", "stall", "crash", "hang", "seen")
    points = "".join(f"{name} = waiting:{name.capitalize()}\n" for name in names)
    (info / "entry_points.txt").write_text(f"[quantgrid.methods]\n{points}")
    return site


@pytest.fixture(scope="module")
def environment(site: Path, root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(site))), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model") / "small", word_tokenizer())


def start(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "harness.grid", "grid.yaml", "--quiet", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell that runs the tests in the background has them, and what they start, ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output = process.communicate(timeout=WAIT)[0]
    return process.returncode, output


def process_of(site: Path, name: str, command: subprocess.Popen[str]) -> int:
    """The id of a process of a method, once it is there."""
    path, deadline = site / name, time.monotonic() + WAIT
    while not path.exists():
        assert command.poll() is None, command.communicate()[0]
        assert time.monotonic() < deadline, f"no {name}"
        time.sleep(0.1)
    return int(path.read_text())


def records(out: Path) -> dict[str, dict[str, Any]]:
    found = [store.read_record(path.parent) for path in out.glob(f"*/{store.RECORD}")]
    return {record["method"]["name"]: record for record in found if record is not None}


def starts(out: Path) -> dict[str, int]:
    """How many processes began to fill the cell of each method."""
    return {
        name: sum(event["event"] == "started" for event in store.read_history(out / record["id"]))
        for name, record in records(out).items()
    }


@dataclasses.dataclass
class Story:
    """A grid that was interrupted, begun again, lost three nodes, and was given once more with a method that
    hangs."""

    out: Path
    interrupted: tuple[int, str]
    ended: tuple[int, str]
    starts: dict[str, int]
    """Of each method's cell, before the last command."""
    repeated: tuple[int, str]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    nodes = Nodes()
    yield nodes
    nodes.end()


@pytest.fixture(scope="module")
def story(
    nodes: Nodes,
    model: str,
    site: Path,
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Story:
    folder = tmp_path_factory.mktemp("story")
    write_grid(folder / "grid.yaml", model, methods=METHODS, tasks=["piqa_local"])
    arguments = ("--engine", "ray", "--address", nodes.address, "--out", "out")
    nodes.add()
    nodes.add()

    # Ray starts cells in an order of its own: those that wait do so for as long as it takes the others.
    command = start(folder, environment, *arguments)
    waiting = [process_of(site, name, command) for name in ("doom.1", "stall.1")]
    command.send_signal(signal.SIGINT)
    interrupted = finish(command)

    for pid in waiting:
        wait_for_end(pid)

    command = start(folder, environment, *arguments)
    for pid in [process_of(site, name, command) for name in ("doom.2", "stall.2")]:
        nodes.kill(pid)
    (site / "go").touch()
    nodes.add()
    nodes.add()
    nodes.kill(process_of(site, "doom.3", command))
    ended = finish(command)

    limit = ("--methods", *METHODS, "hang", "--time-limit", f"{LIMIT}")
    before = starts(folder / "out")
    repeated = finish(start(folder, environment, *arguments, *limit))
    return Story(folder / "out", interrupted, ended, before, repeated)


def test_an_interrupt_stops_the_cells_and_the_command_goes_on_later(story: Story) -> None:
    code, output = story.interrupted
    assert code == 130, output
    assert output.strip().splitlines()[-1].startswith("interrupted: finished tasks are kept")
    assert "Traceback" not in output


def test_a_lost_node_costs_one_retry(story: Story, site: Path) -> None:
    code, output = story.ended
    assert code == 1, output
    assert output.count("was lost at quantise; the cell runs again") == 2
    found = records(story.out)
    assert found["stall"]["status"] == "done"
    failure = found["doom"]["failure"]
    assert (failure["kind"], failure["stage"]) == ("lost node", "quantise")
    for name in ("doom", "stall"):  # once before the interrupt
        assert {path.name for path in site.glob(f"{name}.*")} == {f"{name}.{count}" for count in (1, 2, 3)}


def test_crashes_and_hangs_are_recorded_as_they_are_on_one_machine(story: Story) -> None:
    found = records(story.out)
    crash, hang = found["crash"]["failure"], found["hang"]["failure"]
    assert (crash["kind"], crash["stage"], hang["kind"]) == ("crash", "quantise", "hang")
    assert "SIGABRT" in crash["message"] and "the last words of this cell" in crash["output"]
    assert f"{LIMIT} minutes" in hang["message"]
    assert found["rtn"]["status"] == "done"


def test_nothing_is_computed_twice(story: Story) -> None:
    done = tasks_done(story.out)
    assert len(done) == len(set(done)) == 2  # of rtn and stall
    assert story.repeated[0] == 1
    # Failures are kept until --retry-failed: the last command began no cell but the one that hangs.
    assert {name: count for name, count in starts(story.out).items() if name != "hang"} == story.starts
    assert story.starts["doom"] == story.starts["stall"] == 3  # once before the interrupt, twice after it


def test_the_numbers_are_those_of_one_machine(story: Story, environment: dict[str, str]) -> None:
    """To the byte, under the same addresses."""
    folder = story.out.parent
    arguments = ("--in-process", "--methods", "stall", "rtn", "--out", "here")
    code, output = finish(start(folder, environment, *arguments))
    assert code == 0, output
    here, there = records(folder / "here"), records(story.out)
    for name in ("stall", "rtn"):
        assert (here[name]["id"], here[name]["sha256"]) == (there[name]["id"], there[name]["sha256"])


def test_a_cell_has_a_gpu_for_itself(
    nodes: Nodes,
    model: str,
    site: Path,
    environment: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """GPUs that Ray is told of and this machine lacks: cells compute on the CPU and see which is theirs."""
    nodes.add(cpus=2, gpus=2)
    write_grid(
        tmp_path / "grid.yaml", model, methods=["seen"], bits=["w4a4kv4", "w4a16"], tasks=["piqa_local"]
    )
    code = (
        "import sys; from harness import grid, ray_engine\n"
        "ray_engine._gpus = lambda _: 1\n"
        "sys.exit(grid.main(sys.argv[1:]))"
    )
    arguments = ["grid.yaml", "--quiet", "--engine", "ray", "--address", nodes.address, "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.read_text() for path in site.glob("gpu.*")) == ["0", "1"]

    for arguments, words in (
        (["--gpus", "5"], "asks for 5 GPU(s), the Ray cluster at"),
        ([], f"node {socket.gethostname()}: device 'cuda': this machine has no usable CUDA GPU"),
    ):
        arguments += ["--engine", "ray", "--address", nodes.address, "--device", "cuda"]
        assert run(tmp_path / "grid.yaml", "--methods", "rtn", *arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and words in line


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    return write_grid(tmp_path / "grid.yaml", "smollm2-135m-instruct")


def run(settings: Path, *arguments: str) -> int:
    return grid.main([str(settings), "--out", str(settings.parent / "out"), *arguments])


def test_without_ray_the_extra_is_named(
    settings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(settings, "--engine", "ray") == 2
    assert "pip install 'quantgrid[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--address", "127.0.0.1:6379"], "--address needs --engine ray"),
        (["--gpus", "2"], "gpus needs --engine ray"),
        (["--gpus", "0", "--engine", "ray"], "gpus"),
        (["--gpus", "2", "--engine", "ray"], "give --device cuda"),
        (["--engine", "ray", "--in-process"], "give one of them"),
        (["--engine", "ray", "--device", "cuda:1"], "Ray chooses the GPU"),
        (["--engine", "ray", "--address", "ray://head:10001"], "HOST:PORT"),
        (["--engine", "ray", "--address", "head"], "HOST:PORT"),
    ],
)
def test_mistakes_get_one_line(
    settings: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(ray_engine, "_ray", lambda: None)  # refused before Ray is asked anything
    assert run(settings, *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and words in line


def test_where_nothing_listens_there_is_no_cluster(
    settings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_engine, "_ray", lambda: None)
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unheard.getsockname()[1]}"
        assert run(settings, "--engine", "ray", "--address", address) == 2
    assert f"error: no Ray cluster at {address}" in capsys.readouterr().err


def test_a_node_that_does_not_share_the_store_is_refused(tmp_path: Path) -> None:
    """It sees no file of this process, or sees the file and not that this process holds its lock."""
    claim = tmp_path / "out" / ".claim"
    place = ray_engine.Place(str(tmp_path), str(claim), "", {})
    assert ray_engine.refusal(place) == f"does not see {claim.parent}: all nodes must share it"
    claim.parent.mkdir()
    claim.touch()
    assert "locks" in str(ray_engine.refusal(place))
    with FileLock(claim):
        assert ray_engine.refusal(place) is None
        elsewhere = dataclasses.replace(place, folder=str(tmp_path / "none"))
        assert f"does not see {tmp_path / 'none'}" in str(ray_engine.refusal(elsewhere))


def test_a_node_takes_what_numbers_depend_on_from_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("OMP_NUM_THREADS", "7"), ("CUDA_VISIBLE_DEVICES", "3"), ("HF_HOME", "there")):
        monkeypatch.setenv(name, value)
    found = ray_engine.Place("", "", "a:b", {"HF_HOME": "here"}).environment()
    assert "OMP_NUM_THREADS" not in found
    assert (found["CUDA_VISIBLE_DEVICES"], found["HF_HOME"], found["PYTHONPATH"]) == ("3", "here", "a:b")


class Failing:
    """Ray, as far as cells hear of it, when an error comes of one."""

    class exceptions:  # noqa: N801 - as Ray names it
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            cause = FileNotFoundError("[Errno 2] No such file or directory: '/nowhere'")

        class OutOfMemoryError(RayError):
            pass

        class NodeDiedError(RayError):
            pass

    def __init__(self, error: str) -> None:
        self._error: type[Exception] = getattr(self.exceptions, error)

    def wait(self, streams: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return streams, []

    def get(self, _: Any) -> Any:
        raise self._error

    def cancel(self, stream: Any, force: bool) -> None:
        pass

    def nodes(self) -> list[Any]:
        return []


class Told:
    """A cell of which only the end is of interest."""

    cell, cell_id, units = "a cell", "id", 1.0

    def __init__(self) -> None:
        self.endings: list[tuple[Ending, Any]] = []

    def conclude(self, ending: Ending, place: str, failure: Any) -> dict[str, Any]:
        assert place == "node b"
        self.endings.append((ending, failure))
        return {}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        ("OutOfMemoryError", (-signal.SIGKILL, True)),
        ("RayTaskError", ("FileNotFoundError", "node b: [Errno 2] No such file or directory: '/nowhere'")),
        ("NodeDiedError", None),
    ],
)
def test_what_ray_tells_of_a_cell(error: str, outcome: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lack of memory that Ray notices is recorded as the system's is; a process that could not be started on
    its node is that cell's failure and no other's; a lost node has the cell wait again, and where no other
    has room, this is said."""
    ray: Any = Failing(error)
    monkeypatch.setattr(ray_engine, "_ray", lambda: ray)
    said: list[str] = []
    place = ray_engine.Place("", "", "", {})
    cluster = ray_engine.Cluster(place, {}, {"CPU": 1, "GPU": 0}, None)
    progress: Any = SimpleNamespace(say=said.append)
    filling = ray_engine._Filling(cluster, progress, deque())
    told: Any = Told()
    filling.running[iter([None])] = ray_engine._Run(told, "b", "piqa_local")
    filling._listen()
    assert not filling.running
    if outcome is None:
        assert list(filling.waiting) == [told] and not told.endings
        assert "was lost at piqa_local" in said[0]
        assert said[1] == "no node with 1 CPU(s) is left: waiting for one to join"
        return
    ((ending, failure),) = told.endings
    assert ending.stage == "piqa_local" and filling.found == {"id": {}}
    if failure is None:
        assert (ending.status, ending.oom) == outcome
    else:
        assert (failure["kind"], failure["message"], failure["stage"]) == (*outcome, "piqa_local")


def test_a_node_of_another_kind_is_named(root: Path) -> None:
    """By the first thing that its cell's process finds to be different."""
    done = subprocess.run(
        [sys.executable, "-m", "harness.environment", "cpu", "1"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    machine = json.loads(done.stdout)
    assert machine["threads"] == 1
    settings = GridConfig.model_validate({"methods": ["rtn"], "tasks": ["piqa_local"]})
    setting = open_setting(settings, "tests", machine=machine)
    nothing: Any = None
    (cell,) = (cell for cell in cells_of(settings) if cell.bits == "w4a16")
    work = Work(cell, "id", nothing, setting, root, nothing, False)
    with pytest.raises(UserError, match="node b has threads 2, where this run began it is 1"):
        work.conclude(Ending({"changed": {**machine, "threads": 2}}), "node b")
    with pytest.raises(UserError, match="changed since this run began"):
        work.conclude(Ending({"changed": machine}), "node b")


def test_a_record_that_is_yet_to_be_seen_is_not_written_over(tmp_path: Path) -> None:
    """A node says that the cell is done, and the file system of this machine lags behind."""
    nothing: Any = None
    progress: Any = SimpleNamespace(say=lambda line: None)
    work = Work(nothing, "id", nothing, nothing, tmp_path, progress, False)
    assert work.conclude(Ending({"settled": True}), "node b") is None
    assert {path.name for path in (tmp_path / "id").iterdir()} <= {store.LEASE}
