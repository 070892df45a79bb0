"""Runs a grid: every cell in a process of its own, whatever becomes of the others.

The store is the only state (harness/store.py): a killed run continues where it stopped when the same command
is given again, and several runs may fill one store at a time.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness import lm_eval_results, store
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
from harness.progress import Progress, Steps
from harness.store import Record
from harness.watch import POLL_SECONDS, Ending, watch
from harness.worker import Job
from methods.errors import UserError

if TYPE_CHECKING:
    from harness.ray_engine import Cluster


def run_grid(
    grid: GridConfig,
    out: Path,
    *,
    command: str,
    retry_failed: bool = False,
    quiet: bool = False,
    isolate: bool = True,
    perturbation: Perturbation | None = None,
    cluster: Cluster | None = None,
) -> list[Record]:
    """Fill every cell of the grid under `out`; return the records in the grid's order.

    isolate: each cell in a process of its own, under the grid's time limit; else all in this process, where a
    crash or a hang ends the run. perturbation: a harmless change to run under (harness/perturb.py), in this
    process only. cluster: where cells run side by side (harness/ray_engine.py); None: here, one by one.

    Raises UserError, before anything runs, for models, tasks, devices and texts that cannot be had.
    """
    if perturbation is not None and isolate:
        raise ValueError("perturbed cells run in this process: give isolate=False")
    setting = open_setting(grid, command, perturbation, None if cluster is None else cluster.machine)
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
    with Progress(sum(units(cell, grid, models[cell.model]) for cell in cells), quiet) as progress:
        works = [
            Work(cell, cell_id, models[cell.model], setting, out, progress, retry_failed)
            for cell, cell_id in zip(cells, ids, strict=True)
        ]
        found = _one_by_one(works, isolate) if cluster is None else cluster.fill(works, progress)
    return [_asked(found[cell_id], models[cell.model]) for cell, cell_id in zip(cells, ids, strict=True)]


def _one_by_one(works: Sequence[Work], isolate: bool) -> dict[str, Record]:
    """The records of the cells by their ids, each filled on this machine."""
    found: dict[str, Record] = {}
    queue = deque(works)
    passed = 0  # cells in a row that another process holds
    while queue:
        work = queue.popleft()
        record = work.run(isolate)
        if record is not None:
            found[work.cell_id], passed = record, 0
            continue
        queue.append(work)
        passed += 1
        if passed >= len(queue):
            work.progress.wait(f"{work.cell}: another process is at it")
            time.sleep(POLL_SECONDS)
    return found


def _asked(record: Record, model: Model) -> Record:
    """A record with the tasks of this grid alone."""
    names = {plan.name for plan in model.tasks}
    return record | {"tasks": {name: task for name, task in record["tasks"].items() if name in names}}


@dataclasses.dataclass
class Work:
    """A cell to be filled by this run, or found filled."""

    cell: CellSpec
    cell_id: str
    model: Model
    setting: Setting
    out: Path
    progress: Progress
    retry_failed: bool
    _before: int | None = None
    """How many events the cell's history had when this run first looked at it."""
    _owed: tuple[Ending, str, Record | None] | None = None
    """What `conclude` was given while another process held the cell, to be put on record once none does."""

    @property
    def folder(self) -> Path:
        return self.out / self.cell_id

    @property
    def units(self) -> float:
        """Estimated cost in tokens."""
        return units(self.cell, self.setting.grid, self.model)

    @property
    def job(self) -> Job:
        """What a process of its own is to do."""
        return Job(
            self.setting.grid.model_dump(mode="json"),
            dataclasses.asdict(self.cell),
            self.cell_id,
            str(self.out),
            self.setting.command,
            self.retry_failed,
        )

    def run(self, isolate: bool) -> Record | None:
        """The cell's record when nothing is left to do; None while another process holds the cell."""
        owed = self._owed is not None
        try:
            if isolate:
                record = self.settled()
            else:
                with store.lease(self.folder):
                    record = self._settled()
                    if record is None:
                        record = self._fill_here()
                        self._tell(record)
                        return record
        except store.Leased:
            return None
        if record is not None:
            if not owed:
                self.progress.begin(f"{self.cell}: done before", self.units)
                self.progress.end()
            return record
        before = self.progress.position
        label = str(self.cell)
        ending = watch(
            self.job.line(),
            60 * self.setting.grid.time_limit,
            lambda event: self.progress.show(label, event),
        )
        if "leased" not in ending.last:
            self.progress.settle(before + self.units)
        return self.conclude(ending)

    def settled(self) -> Record | None:
        """The record of a cell that needs no work; raises store.Leased while another process holds it."""
        with store.lease(self.folder):
            return self._settled()

    def _settled(self) -> Record | None:
        """The caller holds the lease."""
        if self._before is None:
            self._before = len(store.read_history(self.folder))
        owed, self._owed = self._owed, None
        if owed is not None and (record := self._put_on_record(*owed)) is not None:
            self._tell(record)
            return record
        retry = self.retry_failed and not self._tried()
        return settled(self.folder, self.model, retry, self.progress.say)

    def _tried(self) -> bool:
        """Whether a process of this run or of another has come to its end with the cell, or its failure was
        put on record, since this run first looked."""
        events = store.read_history(self.folder)[self._before or 0 :]
        return any(event["event"] in ("finished", "died") for event in events)

    def _fill_here(self) -> Record:
        steps = Steps(lambda event: self.progress.show(str(self.cell), event))
        return CellRun(self.cell, self.model, self.setting, self.folder, steps).run(self.retry_failed)

    def conclude(self, ending: Ending, place: str = "", failure: Record | None = None) -> Record | None:
        """The cell's record once a process has been at it; None where another process holds the cell, or what
        another machine wrote is yet to be seen here.

        How the process ended is put on record where it could not itself: `failure`, or what `ending` says;
        where another process holds the cell just then, by the next call of `run` or `settled` that finds it
        free, unless that process has filled it. place: the node that it ran on, for messages; empty: this
        machine.

        Raises UserError where no cell of this run can go on.
        """
        last = ending.last
        if "leased" in last:
            return None
        if "refused" in last:
            raise UserError(f"{place}: {last['refused']}" if place else last["refused"])
        if "changed" in last:
            raise UserError(f"{self.cell}: {self._change(last['changed'], place)}")
        try:
            with store.lease(self.folder):
                record = self._put_on_record(ending, place, failure)
        except store.Leased:  # by another run, or by a process that is not quite dead
            self._owed = ending, place, failure
            return None
        if record is not None:
            self._tell(record)
        return record

    def _put_on_record(self, ending: Ending, place: str, failure: Record | None) -> Record | None:
        """The cell's record after an attempt that ended so. The caller holds the lease."""
        if place:
            store.refresh(self.folder)
        record = store.read_record(self.folder, self.progress.say)
        if "settled" in ending.last and (record is not None or place):
            return record  # None: not to be seen from here yet
        if self._tried():  # by another run, between this attempt and now
            found = settled(self.folder, self.model, False, self.progress.say)
            if found is not None:
                return found
        return self._record_death(record, ending, failure)

    def _change(self, machine: Record, place: str) -> str:
        """Why a process that finds `machine` computes another cell than this one."""
        ours = self.setting.machine
        differing = [name for name in machine if ours is not None and machine[name] != ours[name]]
        if ours is None or not differing:
            return "code, versions or data have changed since this run began: give the command again"
        name = differing[0]
        return (
            f"{place} has {name} {machine[name]}, where this run began it is {ours[name]}: "
            "the cells of a run need nodes of one kind"
        )

    def _record_death(self, record: Record | None, ending: Ending, failure: Record | None) -> Record:
        record = record or new_record(identity(self.cell, self.model, self.setting), self.model, self.setting)
        if failure is None:
            output = store.tail(self.folder / store.OUTPUT)
            failure = death(ending.stage, ending.status, self.setting.grid, ending.oom, output)
        record |= {"status": "failed", "failure": failure}
        record["measured"]["finished"] = store.now()
        store.write_record(self.folder, record)
        lm_eval_results.write(self.folder, record)
        store.note(self.folder, "died", stage=ending.stage, kind=failure["kind"])
        return record

    def _tell(self, record: Record) -> None:
        failures = [record["failure"], *(task["failure"] for task in record["tasks"].values())]
        reasons = "; ".join(f"{item['stage']}: {item['message']}" for item in failures if item)
        if record["status"] != "done" and reasons:
            refused = record["failure"] and record["failure"]["kind"] == "not_applicable"
            state = "not applicable" if refused else record["status"]
            self.progress.say(f"{self.cell}: {state}: {reasons}")


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
