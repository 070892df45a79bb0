"""Runs a grid: every cell quantised once and scored on every task, whatever becomes of the others.

The store is the only state: a cell's record is written after every task, so a killed run continues where it
stopped when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import environment, store
from harness.config import CellSpec, GridConfig, cells_of
from harness.evaluate import TaskPlan, plan_tasks, run_task
from harness.progress import Progress
from methods import assets, lattice
from methods.bits import Bits
from methods.calibration import Corpus, contamination, load_corpus, token_windows
from methods.checkpoint import Checkpoint, open_checkpoint
from methods.errors import UserError
from methods.kurtosis import block_input_kurtosis
from methods.method import Context
from methods.pipeline import Pipeline, Quantised, effective_bits, model_bits, quantise

PROBE_TOKENS = 1024
Record = dict[str, Any]


@dataclass
class Model:
    """What the cells of one model share."""

    checkpoint: Checkpoint
    tasks: list[TaskPlan]
    about: Record
    probe: Tensor
    kurtosis_before: dict[tuple[int, str], float] = field(default_factory=dict)


@dataclass
class Calibration:
    """The calibration text and what is on record about it."""

    corpus: Corpus
    about: Record

    def tokens(self, model: Model, grid: GridConfig, pipeline: Pipeline, seed: int) -> Tensor:
        samples, length = calibration_shape(grid, pipeline)
        return token_windows(
            self.corpus, model.checkpoint.tokenizer, samples=samples, length=length, seed=seed
        )


def calibration_shape(grid: GridConfig, pipeline: Pipeline) -> tuple[int, int]:
    """Calibration sequences and their length: the method's own options, else (but for paper presets) the
    grid's, else the preset's."""
    lead = pipeline.lead
    samples, length = lead.calibration_shape()
    if lead.preset == "paper":
        return samples, length
    return (
        lead.samples or grid.calibration.samples or samples,
        lead.length or grid.calibration.length or length,
    )


def run_grid(
    grid: GridConfig, out: Path, *, command: str, retry_failed: bool = False, quiet: bool = False
) -> list[Record]:
    """Fill every cell of the grid under `out`; return the records in the grid's order.

    Raises UserError, before anything runs, for models, tasks, devices and texts that cannot be had.
    """
    device = environment.parse_device(grid.device)
    if grid.threads is not None:
        torch.set_num_threads(grid.threads)
    models = {name: open_model(name, grid) for name in grid.models}
    calibration = open_calibration(grid)
    cells = cells_of(grid)
    identities = [identity(cell, grid, models[cell.model], calibration, device) for cell in cells]
    ids = [digest(item) for item in identities]
    manifest = {
        "name": grid.name,
        "command": command,
        "cells": ids,
        "tasks": task_names(models),
        "grid": grid.model_dump(mode="json"),
    }
    store.write_json(out / store.MANIFEST, manifest)
    records = []
    with Progress(sum(units(cell, grid, models[cell.model]) for cell in cells), quiet) as progress:
        for cell, cell_id, about in zip(cells, ids, identities, strict=True):
            runner = CellRun(cell, grid, models[cell.model], calibration, device, out / cell_id, progress)
            record = new_record(cell_id, about, models[cell.model], command)
            record = runner.run(record, retry_failed)
            asked = {plan.name for plan in models[cell.model].tasks}
            tasks = {name: task for name, task in record["tasks"].items() if name in asked}
            records.append(record | {"tasks": tasks})
    return records


def task_names(models: dict[str, Model]) -> list[str]:
    return list(dict.fromkeys(plan.name for model in models.values() for plan in model.tasks))


def open_model(name: str, grid: GridConfig) -> Model:
    checkpoint = open_checkpoint(name)
    length = min(PROBE_TOKENS, checkpoint.config.max_positions)
    probe = token_windows(
        load_corpus("boolq", "tuning"), checkpoint.tokenizer, samples=1, length=length, seed=0
    )
    parameters = sum(tensor.numel() for tensor in checkpoint.tensors().values())
    about = {
        "name": name,
        "label": checkpoint.label,
        "sha256": checkpoint.sha256,
        "family": checkpoint.config.family,
        "parameters": parameters,
        "pre_quantised": lattice.measure(checkpoint),
    }
    return Model(checkpoint, plan_tasks(grid, checkpoint), about, probe)


def open_calibration(grid: GridConfig) -> Calibration:
    corpus = load_corpus(grid.calibration.corpus, "calibration")
    about: Record = {"name": corpus.name, "sha256": corpus.sha256, "source": corpus.source}
    if grid.calibration.corpus != "boolq":
        about["shared_13_grams_with_evaluation"] = contamination(corpus)
    return Calibration(corpus, about)


def identity(
    cell: CellSpec, grid: GridConfig, model: Model, calibration: Calibration, device: torch.device
) -> Record:
    """Everything that can change a cell's numbers, tasks aside (those carry keys of their own)."""
    pipeline = cell.pipeline
    samples, length = calibration_shape(grid, pipeline)
    calibrated = pipeline.calibrates(Bits.parse(cell.bits), grid.quantiser)
    used = {**calibration.about, "samples": samples, "length": length} if calibrated else None
    return {
        "model": model.about["sha256"],
        "method": method_record(pipeline),
        "bits": cell.bits,
        "seed": cell.seed,
        "execution": "simulate",
        "quantiser": dataclasses.asdict(grid.quantiser),
        "calibration": used,
        "dtype": grid.dtype,
        "batch_size": grid.batch_size if device.type != "cpu" else None,
        "environment": {
            k: v for k, v in environment.describe(device).items() if k not in ("commit", "platform")
        },
    }


def method_record(pipeline: Pipeline) -> Record:
    rounding = "" if pipeline.name == pipeline.rounding or pipeline.is_float else f" ({pipeline.rounding})"
    preset = " [paper preset]" if any(part.preset == "paper" for part in pipeline.parts) else ""
    return {
        "row": _row_name(pipeline) + rounding + preset,
        "spec": pipeline.spec,
        "name": pipeline.name,
        "rounding": pipeline.rounding,
        "preset": pipeline.lead.preset,
        "options": {part.name: dataclasses.asdict(part) for part in pipeline.parts},
        "plugins": {part.name: environment.plugin_digest(type(part)) for part in pipeline.parts},
        "paper": "; ".join(part.paper for part in pipeline.parts),
    }


def _row_name(pipeline: Pipeline) -> str:
    """The method's name with those options that differ from its defaults, rounding and preset aside."""
    names = []
    for part in pipeline.parts:
        defaults = dataclasses.asdict(type(part)())
        changed = [
            f"{key}={value}"
            for key, value in dataclasses.asdict(part).items()
            if value != defaults[key] and key not in ("rounding", "preset")
        ]
        names.append(part.name + (f":{';'.join(changed)}" if changed else ""))
    return "+".join(names)


def digest(value: Record) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def new_record(cell_id: str, about: Record, model: Model, command: str) -> Record:
    return {
        "schema": 1,
        "id": cell_id,
        "status": "partial",
        "failure": None,
        **about,
        "model": model.about,
        "environment": about["environment"] | {"commit": environment.commit()},
        "effective_bits": None,
        "tasks": {},
        "diagnostics": {},
        "measured": {"seconds": {}, "started": _now()},
        "command": command,
    }


def units(cell: CellSpec, grid: GridConfig, model: Model) -> float:
    """Estimated cost of a cell in tokens."""
    return quantising_units(cell, grid) + sum(plan.units(grid) for plan in model.tasks)


def quantising_units(cell: CellSpec, grid: GridConfig) -> float:
    pipeline = cell.pipeline
    if pipeline.is_float:
        return 500.0
    samples, length = calibration_shape(grid, pipeline)
    # GPTQ passes the calibration text through each block about three times and then solves; rounding to
    # nearest takes as long as some ten thousand tokens.
    return 3.0 * samples * length if pipeline.rounding == "gptq" else 10_000.0


@dataclass
class CellRun:
    """One cell on its way: quantise once, then task by task, recording as it goes."""

    cell: CellSpec
    grid: GridConfig
    model: Model
    calibration: Calibration
    device: torch.device
    folder: Path
    progress: Progress
    stage: str = "start"

    def run(self, record: Record, retry_failed: bool) -> Record:
        """Fill the cell unless its record says that it is done (or has failed and is not to be retried);
        return what is then on record."""
        previous = store.read_record(self.folder)
        if previous is not None:
            asked = {plan.name: plan for plan in self.model.tasks}
            # What was done for another list of tasks stays; what was done under another key is made anew.
            kept = {
                name: task
                for name, task in previous["tasks"].items()
                if name not in asked or task["key"] == asked[name].key
            }
            if retry_failed:
                kept = {name: task for name, task in kept.items() if task["status"] == "done"}
            failed = previous["status"] == "failed" and not retry_failed
            if failed or asked.keys() <= kept.keys():
                return self._skip(previous | {"tasks": kept})
            record["tasks"] = kept
        with environment.PeakMemory(self.device) as memory:
            try:
                self._fill(record)
            except Exception as error:  # noqa: BLE001 - it is recorded and the other cells go on
                record["status"] = "failed"
                record["failure"] = failure(self.stage, error)
        record["measured"] |= {**memory.record(), "finished": _now()}
        self._save(record)
        if record["status"] != "done":
            self.progress.say(f"{self.cell}: {record['status']}: {_reasons(record)}")
        return record

    def _skip(self, record: Record) -> Record:
        self.progress.begin(f"{self.cell}: done before", units(self.cell, self.grid, self.model))
        self.progress.end()
        if record["status"] != "failed":
            record["status"] = self._status(record)
            self._save(record)
        return record

    def _status(self, record: Record) -> str:
        """done where every task asked for is."""
        tasks = (record["tasks"].get(plan.name, {}) for plan in self.model.tasks)
        return "done" if all(task.get("status") == "done" for task in tasks) else "partial"

    def _fill(self, record: Record) -> None:
        self.stage = "quantise"
        self.progress.begin(f"{self.cell}: quantise", quantising_units(self.cell, self.grid))
        quantised = self._quantise()
        self.progress.end()
        record["method"] = {**record["method"], "notes": quantised.notes}
        record["effective_bits"] = {
            **effective_bits(quantised.decoder, quantised.plan),
            "model": model_bits(quantised.decoder, quantised.plan) / self.model.about["parameters"],
        }
        record["diagnostics"] = self._diagnostics(quantised)
        record["measured"]["seconds"] |= quantised.seconds
        for plan in self.model.tasks:
            self.stage = plan.name
            self.progress.begin(f"{self.cell}: {plan.name}", plan.units(self.grid))
            if plan.name not in record["tasks"]:
                record["tasks"][plan.name] = self._score(quantised, plan)
                self._save(record)
            self.progress.end()
        seconds = [record["tasks"][plan.name]["seconds"] for plan in self.model.tasks]
        record["measured"]["seconds"]["evaluate"] = sum(seconds)
        record["status"] = self._status(record)

    def _quantise(self) -> Quantised:
        pipeline = self.cell.pipeline
        tokens = None
        if pipeline.calibrates(Bits.parse(self.cell.bits), self.grid.quantiser):
            tokens = self.calibration.tokens(self.model, self.grid, pipeline, self.cell.seed)
        report: Callable[[str, int, int], None] = lambda _, done, total: self.progress.advance(done, total)  # noqa: E731
        return quantise(
            self.model.checkpoint,
            pipeline,
            Bits.parse(self.cell.bits),
            Context(self.device, self.cell.seed, report, assets.home() / "artifacts"),
            settings=self.grid.quantiser,
            calibration=tokens,
            probe=None if pipeline.is_float else self.model.probe,
            dtype=getattr(torch, self.grid.dtype),
        )

    def _diagnostics(self, quantised: Quantised) -> Record:
        if not self.model.kurtosis_before:
            plain = self.model.checkpoint.load(getattr(torch, self.grid.dtype))
            for site in block_input_kurtosis(plain, self.model.probe, self.device):
                self.model.kurtosis_before[site.layer, site.site] = site.value
        return {
            "kurtosis": [
                {
                    "layer": site.layer,
                    "site": site.site,
                    "before": self.model.kurtosis_before[site.layer, site.site],
                    "after": site.value,
                }
                for site in quantised.kurtosis
            ],
            "weight_error": [dataclasses.asdict(error) for error in quantised.rounding_errors],
        }

    def _score(self, quantised: Quantised, plan: TaskPlan) -> Record:
        outcome: Record = {
            "status": "failed",
            "key": plan.key,
            "n": len(plan.ids),
            "available": plan.available,
            "protocol": plan.protocol,
            **plan.about,
            "metrics": {},
            "samples": f"samples/{plan.name}.jsonl",
            "failure": None,
        }
        started = time.perf_counter()
        try:
            result = run_task(
                quantised.decoder, self.model.checkpoint, plan, self.grid, self.progress.advance
            )
            store.write_rows(self.folder / outcome["samples"], result.rows)
        except Exception as error:  # noqa: BLE001 - recorded; the cell's other tasks go on
            return outcome | {"failure": failure(plan.name, error), "seconds": time.perf_counter() - started}
        return outcome | {
            "status": "done",
            "metrics": result.metrics,
            **result.facts,
            "seconds": time.perf_counter() - started,
        }

    def _save(self, record: Record) -> None:
        store.write_json(self.folder / store.RECORD, record)


def failure(stage: str, error: Exception) -> Record:
    """What goes on record about an error: a user's mistake in its one line, a bug with its trace."""
    if isinstance(error, UserError):
        return {"stage": stage, "kind": "error", "message": str(error), "trace": None}
    text = " ".join(str(error).split())[:500] or type(error).__name__
    lacking = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text
    trace = "".join(traceback.format_exception(error)[-6:])
    return {
        "stage": stage,
        "kind": "out of memory" if lacking else type(error).__name__,
        "message": text,
        "trace": trace,
    }


def _reasons(record: Record) -> str:
    failures = [record["failure"], *(task["failure"] for task in record["tasks"].values())]
    return "; ".join(f"{item['stage']}: {item['message']}" for item in failures if item)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
