"""`--engine ray`: the cells of a grid side by side, on this machine or on the nodes of a Ray cluster.

The store stays the only state, and each cell keeps a process of its own, watched on its node
(harness/watch.py). Ray chooses the node, reserves a cell's CPUs or its GPU there, and tells when a node is
lost. All nodes must share the file system of the store, its locks included: each cell's node is asked first.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from harness import watch
from harness.watch import Ending

if TYPE_CHECKING:
    from harness.config import GridConfig
    from harness.engine import Work
    from harness.progress import Progress

Record = dict[str, Any]
Event = dict[str, Any]
_FORWARDED = ("QUANTGRID_", "HF_", "OMP_", "MKL_", "ATEN_", "TORCH", "CUBLAS_", "NVIDIA_TF32_")
"""Variables that numbers or what is found may depend on: a node takes this process's, and none of its own."""
_CONNECT_SECONDS = 10


@dataclass(frozen=True)
class Place:
    """What a node needs to know to run this project as this process would."""

    folder: str
    """Working directory."""
    claim: str
    """A file beside the cells whose lock this process holds."""
    path: str
    """PYTHONPATH."""
    variables: dict[str, str]

    def environment(self) -> dict[str, str]:
        """The environment of a process on this node, with the GPU that Ray gave it."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(_FORWARDED)}
        return {**watch.ALLOCATOR, **own, **self.variables, "PYTHONPATH": self.path}


def refusal(place: Place) -> str | None:
    """Why no cell may run on this node; None where one may."""
    claim = Path(place.claim)
    for path, shared in ((claim, claim.parent), (Path(place.folder), Path(place.folder))):
        if not path.exists():
            return f"does not see {shared}: all nodes must share it"
    try:
        with FileLock(claim, timeout=0):
            return (
                f"sees {claim.parent} but not the locks that other nodes hold there: "
                "put --out on a file system whose locks reach all nodes"
            )
    except Timeout:
        return None


def describe_node(place: Place, device: str, threads: int | None) -> Event:
    """On a node: {"machine": what it is} or {"refused": why no cell can run there}."""
    node = f"node {socket.gethostname()}"
    reason = refusal(place)
    if reason is not None:
        return {"refused": f"{node} {reason}"}
    done = subprocess.run(
        [sys.executable, "-m", "harness.environment", device, *([str(threads)] if threads else [])],
        env=place.environment(),
        cwd=place.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"refused": f"{node}: {lines[-1].removeprefix('error: ')}"}
    return {"machine": json.loads(done.stdout)}


def fill_on_node(place: Place, line: bytes, seconds: float) -> Iterator[Event]:
    """On a node: {"node": its name}, the events of the cell's process, and {"ended": how it ended}."""
    with suppress(OSError):
        # Ray offers its own processes first where memory runs out; the cell's is the one to take.
        Path("/proc/self/oom_score_adj").write_text("0")
    yield {"node": socket.gethostname()}
    reason = refusal(place)
    if reason is not None:
        yield {"ended": dataclasses.asdict(Ending({"refused": reason}))}
        return
    events: SimpleQueue[Event | None] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(watch.watch, line, seconds, events.put, place.environment(), place.folder)
        ended.add_done_callback(lambda _: events.put(None))
        while (event := events.get()) is not None:
            yield event
        yield {"ended": dataclasses.asdict(ended.result())}


@contextmanager
def connected(address: str | None, grid: GridConfig, out: Path) -> Iterator[Cluster]:
    """A cluster for this grid: that at `address` ("host:port" or "auto"), that of RAY_ADDRESS, or else one on
    this machine for as long as the context is open. `out`: the store.

    Raises UserError where Ray is not installed, nothing answers, or no node can run a cell.
    """
    from methods.errors import UserError

    gpus = _gpus(grid)
    ray = _ray()
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _reach(address)
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, logging_level="ERROR", log_to_driver=False, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster at {address}: {_line(error)}") from error
    try:
        with _claim(out) as claim:
            variables = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
            place = Place(str(Path.cwd()), str(claim), os.pathsep.join(filter(None, sys.path)), variables)
            asked, total = grid.gpus or gpus, sum(node.get("GPU", 0) for node in _nodes())
            if asked > total:
                raise UserError(
                    f"the grid asks for {asked} GPU(s), the Ray cluster at {address} has {total:g}"
                )
            needs = {"CPU": grid.threads or 1, "GPU": gpus}
            _require_room(needs, address)
            try:
                answer = ray.get(_task(describe_node, needs).remote(place, grid.device, grid.threads))
            except ray.exceptions.RayError as error:
                raise UserError(f"a node could not be asked what it is: {_line(error)}") from error
            if "refused" in answer:
                raise UserError(answer["refused"])
            machine = answer["machine"]
            if not gpus:
                needs["CPU"] = machine["threads"]  # which a cell computes with
                _require_room(needs, address)
            yield Cluster(place, machine, needs, grid.gpus)
    finally:
        ray.shutdown()


@dataclass
class _Run:
    """A cell on a node, or waiting for one."""

    work: Work
    node: str | None = None
    stage: str = "start"
    units: float = 0.0
    _begun: float = 0.0
    _step: float = 0.0

    @property
    def place(self) -> str:
        return f"node {self.node}" if self.node else "an unknown node"

    def take(self, event: Event) -> None:
        """Follow where the cell is."""
        self.node = event.get("node", self.node)
        self.stage = event.get("begin", self.stage)
        if "begin" in event:
            self._begun, self._step = self.units, event["units"]
        elif "end" in event:
            self.units = self._begun + self._step
        elif "done" in event:
            share = min(1.0, event["done"] / max(event["total"], 1))
            self.units = max(self.units, self._begun + self._step * share)
        elif "say" in event:
            self.work.progress.say(f"{self.work.cell}: {event['say']}")


@dataclass
class Cluster:
    """Where the cells of a grid run side by side."""

    place: Place
    machine: Record
    """What every node must be, as one of them described itself (`harness.environment.describe`)."""
    needs: dict[str, int]
    """What Ray reserves for a cell: "CPU" and "GPU"."""
    at_once: int | None
    """Cells at a time; None: as many as there is room for."""

    def fill(self, works: Sequence[Work], progress: Progress) -> dict[str, Record]:
        """The records of all cells by their ids. A cell whose node is lost runs once more."""
        return _Filling(self, progress, deque(works)).run()


@dataclass
class _Filling:
    """Cells on their way through a cluster."""

    cluster: Cluster
    progress: Progress
    waiting: deque[Work]
    held: list[Work] = field(default_factory=list)
    """Those that another command's processes are at."""
    running: dict[Any, _Run] = field(default_factory=dict)
    """By the stream of events that Ray gives."""
    found: dict[str, Record] = field(default_factory=dict)
    done: float = 0.0
    losses: Counter[str] = field(default_factory=Counter)
    _look_again: float = 0.0

    def run(self) -> dict[str, Record]:
        try:
            while self.waiting or self.held or self.running:
                self._start()
                self._show()
                self._listen()
        finally:
            for stream in self.running:
                with suppress(Exception):
                    _ray().cancel(stream, force=True)
        return self.found

    def _start(self) -> None:
        from harness.store import Leased

        if time.monotonic() >= self._look_again:
            self.waiting.extend(self.held)
            self.held.clear()
            self._look_again = time.monotonic() + watch.POLL_SECONDS
        cluster = self.cluster
        while self.waiting and len(self.running) < (cluster.at_once or sys.maxsize):
            work = self.waiting.popleft()
            try:
                record = work.settled()
            except Leased:
                self.held.append(work)
                continue
            if record is not None:
                self._keep(work, record)
                continue
            task = _task(fill_on_node, cluster.needs, num_returns="streaming")
            seconds = 60 * work.setting.grid.time_limit
            self.running[task.remote(cluster.place, work.job.line(), seconds)] = _Run(work)

    def _show(self) -> None:
        placed = sum(run.node is not None for run in self.running.values())
        others = len(self.waiting) + len(self.held) + len(self.running) - placed
        position = self.done + sum(run.units for run in self.running.values())
        self.progress.reach(position, f"{placed} cells run, {others} wait")

    def _listen(self) -> None:
        """Take the next event of any cell, for which it waits a second at the most."""
        if not self.running:
            time.sleep(watch.POLL_SECONDS if self.held else 0)
            return
        ray = _ray()
        ready, _ = ray.wait(list(self.running), num_returns=1, timeout=watch.POLL_SECONDS)
        for stream in ready:
            run = self.running[stream]
            try:
                event = ray.get(next(stream))
            except ray.exceptions.RayTaskError as error:  # the cell's process could not be run there
                cause = error.cause or error
                self._fail(stream, type(cause).__name__, f"{run.place}: {_line(cause)}")
            except ray.exceptions.OutOfMemoryError:  # Ray watches a node's memory, too
                self._end(stream, Ending({}, run.stage, -signal.SIGKILL, True))
            except ray.exceptions.RayError:
                self._lose(stream)
            else:
                if "ended" in event:
                    self._end(stream, Ending(**event["ended"]))
                else:
                    run.take(event)

    def _keep(self, work: Work, record: Record) -> None:
        self.found[work.cell_id] = record
        self.done += work.units

    def _end(self, stream: Any, ending: Ending, failure: Record | None = None) -> None:
        run = self.running.pop(stream)
        record = run.work.conclude(ending, run.place, failure)
        if record is None:
            self.held.append(run.work)
        else:
            self._keep(run.work, record)

    def _fail(self, stream: Any, kind: str, message: str) -> None:
        """What no process of the cell could say itself goes on record."""
        stage = self.running[stream].stage
        failure = {"stage": stage, "kind": kind, "message": message, "trace": None, "output": None}
        self._end(stream, Ending({}, stage, -signal.SIGKILL), failure)

    def _lose(self, stream: Any) -> None:
        """Its node, or Ray's process there, is no more."""
        run = self.running[stream]
        self.losses[run.work.cell_id] += 1
        if self.losses[run.work.cell_id] > 1:
            again = f"its node was lost, and so was the one that it ran on again ({run.place})"
            self._fail(stream, "lost node", again)
            return
        del self.running[stream]
        self.waiting.appendleft(run.work)
        self.progress.say(f"{run.work.cell}: {run.place} was lost at {run.stage}; the cell runs again")
        if not _room(self.cluster.needs):
            self.progress.say(f"no node with {_words(self.cluster.needs)} is left: waiting for one to join")


def _ray() -> Any:
    from methods.errors import UserError

    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs the extra 'ray': pip install 'quantgrid[ray]'") from error
    return ray


def _gpus(grid: GridConfig) -> int:
    """How many GPUs the grid needs at the least."""
    from methods.errors import UserError

    if grid.device not in ("cpu", "cuda"):
        raise UserError(f"device {grid.device!r}: on a cluster Ray chooses the GPU: give cpu or cuda")
    if grid.gpus and grid.device == "cpu":
        raise UserError(f"gpus: {grid.gpus} on device 'cpu': give --device cuda")
    return 1 if grid.device == "cuda" else 0


def _reach(address: str) -> None:
    """Ray waits for minutes where nothing answers, and ends the process then."""
    from methods.errors import UserError

    if address in ("auto", "local"):
        return
    host, colon, port = address.rpartition(":")
    if "://" in address or not (colon and port.isdecimal()):
        raise UserError(f"Ray address {address!r}: give HOST:PORT of the head node, auto or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster at {address}: {error}") from error


@contextmanager
def _claim(out: Path) -> Iterator[Path]:
    """A file in the store whose lock this process holds while the context is open."""
    out.mkdir(parents=True, exist_ok=True)
    path = out.resolve() / f".{socket.gethostname()}-{os.getpid()}-{time.time_ns()}.claim"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except NotImplementedError as error:
        from methods.errors import UserError

        raise UserError(f"{out}: this file system has no file locks; give another --out") from error
    try:
        yield path
    finally:
        lock.release()
        path.unlink(missing_ok=True)


def _task(function: Any, needs: dict[str, int], **options: Any) -> Any:
    """The function as a task of Ray that is not repeated: what its end means is decided here."""
    ray = _ray()
    for module in (sys.modules[__name__], watch):
        # They go to the nodes as they are: Ray's processes there need not find this project.
        ray.cloudpickle.register_pickle_by_value(module)
    reserved = {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"]}
    return ray.remote(max_retries=0, max_calls=0, **reserved, **options)(function)


def _nodes() -> list[dict[str, float]]:
    """What the nodes that are up have in all."""
    return [node["Resources"] for node in _ray().nodes() if node["Alive"]]


def _room(needs: dict[str, int]) -> bool:
    """Whether a node has what a cell needs, in use or not."""
    return any(all(node.get(name, 0) >= count for name, count in needs.items()) for node in _nodes())


def _line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _words(needs: dict[str, int]) -> str:
    return " and ".join(f"{count} {name}(s)" for name, count in needs.items() if count)


def _require_room(needs: dict[str, int], address: str) -> None:
    from methods.errors import UserError

    if not _room(needs):
        hint = "; --threads says how many CPUs a cell takes" if needs["CPU"] > 1 else ""
        raise UserError(f"no node of the Ray cluster at {address} has {_words(needs)}{hint}")
