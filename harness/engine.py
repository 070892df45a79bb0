"""Runs a grid: every cell in a process of its own, whatever becomes of the others.

The store is the only state (harness/store.py): a killed run continues where it stopped when the same command
is given again, and several runs may fill one store at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from harness import environment, store
from harness.cell import (
    CellRun,
    Model,
    Setting,
    digest,
    identity,
    new_record,
    open_model,
    open_setting,
    settled,
    units,
)
from harness.config import CellSpec, GridConfig, cells_of
from harness.perturb import Perturbation
from harness.progress import Event, Progress, Steps
from harness.store import Record
from harness.worker import Job
from methods.errors import UserError

_POLL_SECONDS = 1.0
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
"""Has glibc keep freed memory for the next tensor (up to 32 MiB a block, 4 GiB in all): pages that go back
to the system are zeroed anew each time, which takes as long as a pass of a quantiser. No number depends on
it."""


def run_grid(
    grid: GridConfig,
    out: Path,
    *,
    command: str,
    retry_failed: bool = False,
    quiet: bool = False,
    isolate: bool = True,
    perturbation: Perturbation | None = None,
) -> list[Record]:
    """Fill every cell of the grid under `out`; return the records in the grid's order.

    isolate: each cell in a process of its own, under the grid's time limit; else all in this process, where a
    crash or a hang ends the run. perturbation: a harmless change to run under (harness/perturb.py), in this
    process only.

    Raises UserError, before anything runs, for models, tasks, devices and texts that cannot be had.
    """
    if perturbation is not None and isolate:
        raise ValueError("perturbed cells run in this process: give isolate=False")
    setting = open_setting(grid, command, perturbation)
    models = {name: open_model(name, grid) for name in grid.models}
    cells = cells_of(grid)
    ids = [digest(identity(cell, models[cell.model], setting)) for cell in cells]
    tasks = list(dict.fromkeys(plan.name for model in models.values() for plan in model.tasks))
    manifest = {
        "name": grid.name,
        "command": command,
        "cells": ids,
        "tasks": tasks,
        "grid": grid.model_dump(mode="json"),
    }
    store.sweep(out)
    store.write_json(out / store.MANIFEST, manifest)
    found: dict[str, Record] = {}
    with Progress(sum(units(cell, grid, models[cell.model]) for cell in cells), quiet) as progress:
        queue = deque(zip(cells, ids, strict=True))
        passed = 0  # cells in a row that another process holds
        while queue:
            cell, cell_id = queue.popleft()
            work = _Work(cell, cell_id, models[cell.model], setting, out, progress, retry_failed)
            record = work.run(isolate)
            if record is not None:
                found[cell_id], passed = record, 0
                continue
            queue.append((cell, cell_id))
            passed += 1
            if passed >= len(queue):
                progress.wait(f"{cell}: another process is at it")
                time.sleep(_POLL_SECONDS)
    return [_asked(found[cell_id], models[cell.model]) for cell, cell_id in zip(cells, ids, strict=True)]


def _asked(record: Record, model: Model) -> Record:
    """A record with the tasks of this grid alone."""
    names = {plan.name for plan in model.tasks}
    return record | {"tasks": {name: task for name, task in record["tasks"].items() if name in names}}


@dataclasses.dataclass
class _Work:
    """A cell to be filled by this run, or found filled."""

    cell: CellSpec
    cell_id: str
    model: Model
    setting: Setting
    out: Path
    progress: Progress
    retry_failed: bool

    @property
    def folder(self) -> Path:
        return self.out / self.cell_id

    def run(self, isolate: bool) -> Record | None:
        """The cell's record when nothing is left to do; None while another process holds the cell."""
        try:
            with store.lease(self.folder):
                record = settled(self.folder, self.model, self.retry_failed, self.progress.say)
                if record is None and not isolate:
                    steps = Steps(lambda event: self.progress.show(str(self.cell), event))
                    record = CellRun(self.cell, self.model, self.setting, self.folder, steps).run(
                        self.retry_failed
                    )
                    self._tell(record)
                    return record
        except store.Leased:
            return None
        if record is not None:
            self.progress.begin(f"{self.cell}: done before", self._units)
            self.progress.end()
            return record
        return self._isolated()

    @property
    def _units(self) -> float:
        return units(self.cell, self.setting.grid, self.model)

    def _isolated(self) -> Record | None:
        """Have a process of its own fill the cell; put on record how it ended where it could not itself."""
        kills = environment.oom_kills()
        grid = self.setting.grid
        job = Job(
            grid.model_dump(mode="json"),
            dataclasses.asdict(self.cell),
            self.cell_id,
            str(self.out),
            self.setting.command,
            self.retry_failed,
        )
        before = self.progress.position
        label = str(self.cell)
        last, stage, status = watch(job, 60 * grid.time_limit, lambda event: self.progress.show(label, event))
        if "leased" in last:
            return None
        if "refused" in last:
            raise UserError(last["refused"])
        if "changed" in last:
            raise UserError(
                f"{label}: code, versions or data have changed since this run began: give the command again"
            )
        self.progress.settle(before + self._units)
        try:
            with store.lease(self.folder):
                record = store.read_record(self.folder, self.progress.say)
                if "settled" not in last or record is None:
                    record = self._record_death(record, stage, status, environment.oom_kills() > kills)
        except store.Leased:  # taken up by another run since
            return None
        self._tell(record)
        return record

    def _record_death(self, record: Record | None, stage: str, status: int | None, killed: bool) -> Record:
        record = record or new_record(identity(self.cell, self.model, self.setting), self.model, self.setting)
        output = store.tail(self.folder / store.OUTPUT)
        record |= {"status": "failed", "failure": death(stage, status, self.setting.grid, killed, output)}
        record["measured"]["finished"] = store.now()
        store.write_record(self.folder, record)
        store.note(self.folder, "died", stage=stage, kind=record["failure"]["kind"])
        return record

    def _tell(self, record: Record) -> None:
        failures = [record["failure"], *(task["failure"] for task in record["tasks"].values())]
        reasons = "; ".join(f"{item['stage']}: {item['message']}" for item in failures if item)
        if record["status"] != "done" and reasons:
            refused = record["failure"] and record["failure"]["kind"] == "not_applicable"
            state = "not applicable" if refused else record["status"]
            self.progress.say(f"{self.cell}: {state}: {reasons}")


def watch(job: Job, seconds: float, show: Callable[[Event], None]) -> tuple[Event, str, int | None]:
    """Run a worker to its end; `show` is given its events.

    Returns its last event, the step it was at, and its exit status (negative: the signal that killed it;
    None: it was killed here, for taking longer than `seconds`).
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**ALLOCATOR, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # an interrupt from the keyboard is this process's to handle
    )
    last: Event = {}
    stage, buffer, deadline = "start", b"", time.monotonic() + seconds
    assert process.stdin is not None and process.stdout is not None
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            process.stdin.write(job.line())
            process.stdin.flush()
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    return last, stage, None
                if not selector.select(min(left, _POLL_SECONDS)):
                    # A process that it has forked may keep the pipe open after its death.
                    if process.poll() is not None:
                        return last, stage, process.returncode
                    continue
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    return last, stage, process.wait()
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    last = json.loads(line)
                    stage = last.get("begin", stage)
                    show(last)
    except BrokenPipeError:
        return last, stage, process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
        process.wait()
        process.stdin.close()
        process.stdout.close()


def death(stage: str, status: int | None, grid: GridConfig, oom: bool, output: str) -> Record:
    """What goes on record about a cell whose process did not come to its end."""
    if status is None:
        kind, message = "hang", f"not done within the time limit of {grid.time_limit:g} minutes a cell"
    elif status == -signal.SIGKILL and oom:
        kind, message = "out of memory", "the system killed the cell's process, for lack of memory"
    elif status < 0:
        kind, message = "crash", f"the cell's process was killed by {signal.Signals(-status).name}"
        if status == -signal.SIGKILL:
            message += " (often by the system, for lack of memory)"
    else:
        kind, message = "crash", f"the cell's process ended with exit status {status}"
    return {"stage": stage, "kind": kind, "message": message, "trace": None, "output": output or None}
