"""One cell: what identifies it, and filling it - quantised once, then scored task by task.

The record is written after every task, so that what a killed process had finished stays finished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness import diagnostics, environment, lm_eval_results, power, quantising, store
from harness.cell_speed import speed_record
from harness.config import CellSpec, GridConfig
from harness.evaluate import TaskPlan, batch_spread, float_reference, plan_tasks, run_task
from harness.execution import counted, memory_record
from harness.perturb import Perturbation
from harness.progress import Steps
from harness.quantising import Calibration, artifact_folder, digest, open_calibration, quantise_cell
from harness.store import Record
from methods import artifacts, lattice
from methods.calibration import load_corpus, token_windows
from methods.checkpoint import Checkpoint, open_checkpoint
from methods.device import parse_device
from methods.errors import NotApplicableError, UserError
from methods.footprint import effective_bits, model_bits
from methods.kurtosis import block_input_kurtosis
from methods.method import Artifact
from methods.pipeline import Quantised

PROBE_TOKENS = 1024


@dataclass
class Model:
    """What the cells of one model share."""

    checkpoint: Checkpoint
    tasks: list[TaskPlan]
    about: Record
    probe: Tensor


@dataclass(frozen=True)
class Setting:
    """What all cells of a run share beside their models."""

    grid: GridConfig
    calibration: Calibration
    device: torch.device
    command: str
    perturbation: Perturbation | None = None
    machine: Record | None = None
    """The machine that the cells run on (`environment.describe`); None: this one."""


def open_setting(
    grid: GridConfig,
    command: str,
    perturbation: Perturbation | None = None,
    machine: Record | None = None,
) -> Setting:
    """Check the device, set the threads, read the calibration text. UserError for what cannot be had.

    machine: where the cells run if that is not here, as it described itself.
    """
    device = parse_device(grid.device) if machine is None else torch.device(grid.device)
    if grid.threads is not None:
        torch.set_num_threads(grid.threads)
    return Setting(grid, open_calibration(grid), device, command, perturbation, machine)


def open_model(name: str, grid: GridConfig) -> Model:
    """Open a checkpoint and draw the documents of its tasks. UserError for what cannot be had."""
    checkpoint = open_checkpoint(name)
    length = min(PROBE_TOKENS, checkpoint.config.max_positions)
    probe = token_windows(
        load_corpus("boolq", "tuning"), checkpoint.tokenizer, samples=1, length=length, seed=0
    )
    about = {
        "name": name,
        "label": checkpoint.label,
        "sha256": checkpoint.sha256,
        "family": checkpoint.config.family,
        "parameters": sum(tensor.numel() for tensor in checkpoint.tensors().values()),
        "pre_quantised": lattice.measure(checkpoint),
    }
    return Model(checkpoint, plan_tasks(grid, checkpoint), about, probe)


def identity(cell: CellSpec, model: Model, setting: Setting) -> Record:
    """Everything that can change a cell's numbers, tasks aside: those carry keys of their own."""
    sha256, machine = model.about["sha256"], setting.machine or environment.describe(setting.device)
    about = quantising.identity(cell, sha256, setting.grid, setting.calibration, setting.device, machine)
    if setting.perturbation is not None:
        about["perturbation"] = dataclasses.asdict(setting.perturbation)
    return about


def new_record(about: Record, model: Model, setting: Setting) -> Record:
    """The record of a cell of which nothing is known yet. `about`: its identity."""
    return {
        "schema": store.SCHEMA,
        "id": digest(about),
        "status": "partial",
        "failure": None,
        **about,
        "model": model.about,
        "effective_bits": None,
        "tasks": {},
        "diagnostics": {},
        "measured": {
            "seconds": {},
            "tasks": {},
            "implementations": {},
            "replays_counted": True,
            "started": store.now(),
            "command": setting.command,
            "corpus": setting.grid.calibration.corpus,  # a path as it was given; what was read is identified
            "commit": environment.commit(),
            "platform": environment.platform_name(),
        },
    }


def units(cell: CellSpec, grid: GridConfig, model: Model) -> float:
    """Estimated cost of a cell in tokens."""
    return quantising_units(cell, grid) + sum(plan.units(grid) for plan in model.tasks)


def quantising_units(cell: CellSpec, grid: GridConfig) -> float:
    pipeline = cell.pipeline
    if pipeline.is_float:
        return 500.0
    samples, length = pipeline.calibration_shape(grid.calibration.samples, grid.calibration.length)
    # GPTQ passes the calibration text through each block about three times and then solves; rounding to
    # nearest takes as long as some ten thousand tokens.
    # HQQ's twenty steps take as long as some twenty thousand, and sensitivity is two passes more.
    rounding = {"gptq": 3.0 * samples * length, "hqq": 20_000.0}.get(pipeline.rounding, 10_000.0)
    measured = any("calibration" in part.needs for part in pipeline.parts)
    return rounding + (3.0 * samples * length if measured else 0.0)


def settled(folder: Path, model: Model, retry_failed: bool, say: Callable[[str], None]) -> Record | None:
    """The record of a cell that needs no work: all tasks asked for are on it, or it has failed and is not to
    be retried. The caller holds the lease."""
    record = store.read_record(folder, say)
    if record is None:
        return None
    kept = _kept(record, model, retry_failed)
    if record["failure"] and not retry_failed:
        return record | {"tasks": kept}
    if record["failure"] or not {plan.name for plan in model.tasks} <= kept.keys():
        return None
    record |= {"tasks": kept, "status": _status(kept, model)}
    store.write_record(folder, record)
    lm_eval_results.write(folder, record)
    return record


def _kept(record: Record, model: Model, retry_failed: bool) -> Record:
    """The tasks of an earlier record that still hold: those of other lists stay, those made under another
    key are made anew."""
    asked = {plan.name: plan for plan in model.tasks}
    return {
        name: task
        for name, task in record["tasks"].items()
        if (name not in asked or task["key"] == asked[name].key)
        and (task["status"] == "done" or not retry_failed)
    }


def _status(tasks: Record, model: Model) -> str:
    """done where every task asked for is."""
    found = (tasks.get(plan.name, {}) for plan in model.tasks)
    return "done" if all(task.get("status") == "done" for task in found) else "partial"


@dataclass
class CellRun:
    """One cell on its way. The caller holds the lease of `folder`."""

    cell: CellSpec
    model: Model
    setting: Setting
    folder: Path
    steps: Steps
    output: Path | None = None
    """Where what is printed goes, of which the end is recorded with a failure."""

    def run(self, retry_failed: bool = False) -> Record:
        """Do what is missing; return what is then on record."""
        about = identity(self.cell, self.model, self.setting)
        record = new_record(about, self.model, self.setting)
        previous = store.read_record(self.folder)
        if previous is not None:
            record["tasks"] = _kept(previous, self.model, retry_failed)
            for fact in ("tasks", "implementations"):
                found = previous["measured"].get(fact, {})
                record["measured"][fact] = {name: found[name] for name in record["tasks"] if name in found}
            if record["measured"]["implementations"]:
                record["measured"]["replays_counted"] = previous["measured"].get("replays_counted", False)
        store.note(self.folder, "started", kept=sorted(record["tasks"]))
        device = self.setting.device
        with environment.PeakMemory(device) as memory, power.used(device) as energy:
            try:
                self._fill(record, memory)
            except Exception as error:  # noqa: BLE001 - it is recorded and the other cells go on
                record |= {"status": "failed", "failure": self._failure(self.steps.stage, error)}
            record["measured"] |= energy()
        record["measured"] |= {**memory.record(), "finished": store.now()}
        store.write_record(self.folder, record)
        lm_eval_results.write(self.folder, record)
        store.note(self.folder, "finished", status=record["status"])
        return record

    def _fill(self, record: Record, memory: environment.PeakMemory) -> None:
        grid = self.setting.grid
        with self.steps.step("quantise", quantising_units(self.cell, grid)):
            quantised = self._quantise()
            record["method"] = {**record["method"], "notes": quantised.notes}
            record["effective_bits"] = {
                **effective_bits(quantised.decoder, quantised.plan),
                "model": model_bits(quantised.decoder, quantised.plan) / self.model.about["parameters"],
            }
            before = self._kurtosis_before() if quantised.kurtosis else {}
            record["diagnostics"] = diagnostics.describe(quantised, before) | self._batch_spread(quantised)
            record["measured"]["seconds"] |= quantised.seconds
            record["measured"]["learned"] = diagnostics.learning_costs(quantised)
            record["measured"]["memory"] = memory_record(quantised.decoder, quantised.plan)
        for plan in self.model.tasks:
            with self.steps.step(plan.name, plan.units(grid)):
                if plan.name not in record["tasks"]:
                    started = time.perf_counter()
                    packed = quantised.decoder.execution == "int4"
                    with counted(record["measured"]["implementations"] if packed else {}, plan.name):
                        record["tasks"][plan.name] = self._score(quantised, plan)
                    record["measured"]["tasks"][plan.name] = time.perf_counter() - started
                    record["tasks"] = self._in_order(record["tasks"])
                    store.write_record(self.folder, record)
                    store.note(self.folder, "task", task=plan.name, key=plan.key)
        seconds = record["measured"]["tasks"]
        evaluating = sum(seconds.get(plan.name, 0.0) for plan in self.model.tasks)
        record["measured"]["seconds"]["evaluate"] = evaluating
        if self.setting.perturbation is None:
            record["measured"]["speed"] = speed_record(quantised.decoder, memory)
        record["status"] = _status(record["tasks"], self.model)

    def _in_order(self, tasks: Record) -> Record:
        """The grid's tasks in its order, then the others: whatever the order in which they were made."""
        names = [plan.name for plan in self.model.tasks if plan.name in tasks]
        return {name: tasks[name] for name in (*names, *sorted(tasks.keys() - set(names)))}

    @property
    def _checkpoint(self) -> Checkpoint:
        perturbation = self.setting.perturbation
        checkpoint = self.model.checkpoint
        return checkpoint if perturbation is None else perturbation.checkpoint(checkpoint)

    def _quantise(self) -> Quantised:
        return quantise_cell(
            self.cell,
            self._checkpoint,
            self.setting.grid,
            self.setting.calibration,
            self.setting.device,
            progress=self.steps.advance,
            # What is learned from a perturbed model must not serve the others.
            cache=artifact_folder() if self.setting.perturbation is None else None,
            probe=None if self.cell.pipeline.is_float else self.model.probe,
        )

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.setting.grid.dtype)
        return dtype

    def _kurtosis_before(self) -> dict[str, Record]:
        """Spread of block inputs of the checkpoint as it is, measured once for all its cells."""
        device = self.setting.device

        def measure() -> Artifact:
            plain = self.model.checkpoint.load(self._dtype)
            sites = block_input_kurtosis(plain, self.model.probe, device)
            return Artifact(
                meta={diagnostics.site_key(site): diagnostics.site_record(site) for site in sites}
            )

        about = {
            "what": "spread of block inputs",
            "model": self.model.about["sha256"],
            "dtype": str(self._dtype),
            "probe": hashlib.sha256(self.model.probe.numpy().tobytes()).hexdigest(),
            "environment": environment.describe(device),
        }
        return artifacts.stored(artifact_folder(), about, measure).meta

    def _score(self, quantised: Quantised, plan: TaskPlan) -> Record:
        grid, checkpoint, perturbation = self.setting.grid, self.model.checkpoint, self.setting.perturbation
        outcome: Record = {
            "status": "failed",
            "key": plan.key,
            "n": len(plan.ids),
            "available": plan.available,
            "protocol": plan.protocol,
            **plan.about,
            "metrics": {},
            "samples": None,
            "samples_sha256": None,
            "failure": None,
        }
        try:
            reference = None
            if not self.cell.pipeline.is_float:
                reference = float_reference(checkpoint, plan, grid, self.setting.device, artifact_folder())
            ordered = plan if perturbation is None else perturbation.order(plan)
            result = run_task(
                quantised.decoder, checkpoint, ordered, grid, self.steps.advance, reference=reference
            )
            samples = store.write_samples(self.folder, plan.name, result.rows)
        except Exception as error:  # noqa: BLE001 - recorded; the cell's other tasks go on
            return outcome | {"failure": self._failure(plan.name, error)}
        return outcome | {"status": "done", "metrics": result.metrics, **result.facts, **samples}

    def _failure(self, stage: str, error: Exception) -> Record:
        sys.stdout.flush()
        sys.stderr.flush()
        output = store.tail(self.output) if self.output else ""
        return failure(stage, error) | {"output": output or None}

    def _batch_spread(self, quantised: Quantised) -> Record:
        """On a GPU scores move with the batch: by how much, on the first multiple-choice task."""
        for plan in self.model.tasks if self.setting.device.type != "cpu" else ():
            spread = batch_spread(quantised.decoder, self.model.checkpoint, plan, self.setting.grid)
            if spread is not None:
                return {"batch_spread": spread}
        return {}


def failure(stage: str, error: Exception) -> Record:
    """What goes on record about an error: a user's mistake in its one line, a bug with its trace."""
    if isinstance(error, UserError):
        kind = "not_applicable" if isinstance(error, NotApplicableError) else "error"
        return {"stage": stage, "kind": kind, "message": str(error), "trace": None, "output": None}
    text = " ".join(str(error).split())[:500] or type(error).__name__
    lacking = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text
    return {
        "stage": stage,
        "kind": "out of memory" if lacking else type(error).__name__,
        "message": text,
        "trace": "".join(traceback.format_exception(error)[-6:]),
        "output": None,
    }
