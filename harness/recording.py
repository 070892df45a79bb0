"""Recording a gate's reference: run the grid, run it again under harmless changes, see that its rules would
notice what they must, write the file.

A reference is refused where a probe, a change of the quantiser that costs or may cost accuracy, would pass
its tolerances: activations clipped at 0.85 of their range instead of 0.9, keys and values in 3 bits, not 4.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import movement, trial
from harness.baseline import (
    BASE,
    CellReference,
    Reference,
    TaskReference,
    data_sha256,
    numbers,
    read_rows,
    save,
)
from harness.config import CellSpec, GridConfig, MethodEntry, cells_of
from harness.judgement import Finding, Rules, identity, judge_cell, label, rules, spec
from harness.store import Record
from harness.trial import Trial
from methods.bits import Bits, QuantiserSettings

CLIP_STEP = 0.05
Say = Callable[[str], None]
Runs = Mapping[str, tuple[Sequence[Record], Path]]


@dataclass(frozen=True)
class Probe:
    """A change of a cell's quantiser that a gate must notice, as a grid of that cell alone."""

    name: str
    cell: CellSpec
    grid: GridConfig


def record(grid: GridConfig, path: Path, out: Path, command: str, say: Say) -> list[str]:
    """Measure a grid's reference, working under `out`, and write it to `path`; returns why it was refused
    instead, in lines, or nothing."""
    import torch

    from harness.engine import run_grid

    threads = grid.threads or torch.get_num_threads()
    grid = grid.model_copy(update={"threads": threads})
    with _timed(BASE, say):
        base = run_grid(grid, out / BASE, command=command, quiet=True)
    if broken := failures(base):
        return broken
    capability = base[0]["environment"]["cpu_capability"]
    trials = trial.harmless(threads, capability, grid.device.partition(":")[0])
    runs = {BASE: (base, out / BASE)}
    for item in trials:
        folder = out / item.name.replace(" ", "-")
        with _timed(item.name, say):
            runs[item.name] = (trial.run(grid, folder, item, command), folder)
        if broken := failures(runs[item.name][0]):
            return [f"under {item.name}: {line}" for line in broken]
    reference = assemble(grid, runs, trials, command)
    rule = rules(reference, same_machine=True)
    refusals = unsteady(reference)
    found: list[dict[str, Any]] = []
    for probe in probes(grid):
        title = f"probe {probe.name} of {probe.cell}"
        folder = out / f"probe-{len(found) + 1}"
        with _timed(title, say):
            records = trial.run(probe.grid, folder, Trial(probe.name, threads), command)
        if broken := failures(records):
            return [f"{title}: {line}" for line in broken]
        findings = _findings(reference, probe.cell, records[0], folder, rule)
        found.append({"probe": probe.name, "cell": str(probe.cell), "findings": list(map(_brief, findings))})
        refusals += missed(title, findings)
    facts = explained(reference, rule)
    for name, tasks in facts["cells"].items():
        for task, own in tasks.items():
            allowed = ", ".join(f"{what} {bound:.3g}" for what, bound in own["tolerances"].items())
            say(f"tolerances of {name}, {task}: {allowed}")
    if not refusals:
        save(path, dataclasses.replace(reference, probes=tuple(found)), facts)
    return refusals


@contextmanager
def _timed(what: str, say: Say) -> Iterator[None]:
    started = time.perf_counter()
    yield
    say(f"{what}: {time.perf_counter() - started:.0f} s")


def failures(records: Sequence[Record]) -> list[str]:
    """What failed in cells and tasks, one line each."""
    return [
        f"{label(item)}: {failure['stage']}: {failure['message']}"
        for item in records
        for failure in (item["failure"], *(task["failure"] for task in item["tasks"].values()))
        if failure
    ]


def assemble(grid: GridConfig, runs: Runs, trials: Sequence[Trial], command: str) -> Reference:
    """The reference of a grid, from the records of its runs and the folders that hold their samples."""
    base, _ = runs[BASE]
    cells = []
    for item in base:
        cell, is_float = spec(item), item["method"]["name"] == "float"
        tasks = {name: _task(facts, cell, name, runs) for name, facts in item["tasks"].items()}
        cells.append(CellReference(cell, is_float, item["model"]["sha256"], identity(item), tasks))
    environment = {key: value for key, value in base[0]["environment"].items() if key != "code"}
    measured = base[-1]["measured"]
    recorded = {name: measured[name] for name in ("commit", "platform", "finished")} | {"command": command}
    described = {item.name: dataclasses.asdict(item) for item in trials}
    return Reference(grid, environment, recorded, described, tuple(cells))


def _task(facts: Record, cell: CellSpec, name: str, runs: Runs) -> TaskReference:
    outcomes, kinds = {}, set()
    for run, (records, folder) in runs.items():
        own = next(item for item in records if spec(item) == cell)
        kind, documents, outcomes[run] = numbers(read_rows(folder / own["id"], own["tasks"][name]))
        kinds.add((kind, documents))
    if len(kinds) > 1:
        raise ValueError(f"{cell}: {name} has other documents in some trial")
    return TaskReference(kind, facts["protocol"], data_sha256(facts), documents, outcomes)


def unsteady(reference: Reference) -> list[str]:
    """Where a harmless change moves a float cell by more than its tolerance, which then can hold nowhere."""
    found = []
    for cell in reference.cells:
        for name, task in cell.tasks.items() if cell.is_float else ():
            if task.kind == "generation":
                continue
            for run, outcome in task.outcomes.items():
                largest = float(movement.relative(outcome, task.outcomes[BASE]).max())
                if largest > movement.RTOL:
                    found.append(
                        f"{cell.cell}: {name}: {run} moves a log-likelihood of the float model by "
                        f"{largest:.2g} of itself, and the gate allows {movement.RTOL:g}: use a wider dtype"
                    )
    return found


def probes(grid: GridConfig) -> list[Probe]:
    """The probes that apply to a grid's cells: 4-bit activations and 4-bit keys and values (seed 0)."""
    found = []
    for cell in cells_of(grid):
        bits = Bits.parse(cell.bits)
        if cell.seed:
            continue
        if bits.activation == 4:
            clip = grid.quantiser.activation(4).clip
            less = round(clip - CLIP_STEP, 6)
            settings = dataclasses.replace(grid.quantiser, activation_clip=less)
            found.append(Probe(f"clip {clip:g} -> {less:g}", cell, _alone(grid, cell, bits, settings)))
        if bits.kv == 4:
            fewer = dataclasses.replace(bits, kv=3)
            found.append(Probe("kv 4 -> 3 bits", cell, _alone(grid, cell, fewer, grid.quantiser)))
    return found


def _alone(grid: GridConfig, cell: CellSpec, bits: Bits, settings: QuantiserSettings) -> GridConfig:
    entry = MethodEntry(method=cell.method, bits=(str(bits),))
    changes = {"models": (cell.model,), "methods": (entry,), "quantiser": settings, "seeds": 1}
    return grid.model_copy(update=changes)


def _findings(reference: Reference, cell: CellSpec, item: Record, folder: Path, rule: Rules) -> list[Finding]:
    known = reference.find(cell)
    assert known is not None
    return judge_cell(known, item, folder / item["id"], rule)


def missed(title: str, findings: Sequence[Finding]) -> list[str]:
    """Why a reference is refused on account of a probe: a line, or none where some finding flags it."""
    if any(finding.verdict != "ok" for finding in findings):
        return []
    nearest = max(findings, key=_share)
    return [
        f"{title} would pass: it moves {nearest.task} ({nearest.what}) by {nearest.moved:.3g}, "
        f"{_share(nearest):.0%} of the tolerance; more documents are needed"
    ]


def _share(finding: Finding) -> float:
    return abs(finding.moved or 0.0) / finding.limit if finding.limit else 0.0


def _brief(finding: Finding) -> dict[str, Any]:
    names = ("task", "what", "moved", "limit", "verdict")
    return {name: getattr(finding, name) for name in names}


def explained(reference: Reference, rule: Rules) -> dict[str, Any]:
    """What a reference file holds for readers: the rule, each trial's statistics, the tolerances."""
    constants = {
        "float": f"every log-likelihood within rtol {movement.RTOL:g} (of {movement.SMALL:g} nats or more)",
        "quantised": "Student's t prediction bound over distinct outcomes, each against the others' centre",
        "false_alarm": movement.FALSE_ALARM,
        "false_alarm_of_each": rule.chance,
        "at_least_times_the_largest_seen": movement.MARGIN,
    }
    cells = {
        str(cell.cell): {
            name: _float_facts(task)
            if cell.is_float and task.kind != "generation"
            else _spread_facts(task, rule.chance)
            for name, task in cell.tasks.items()
        }
        for cell in reference.cells
    }
    return {"rule": constants, "cells": cells}


def _float_facts(task: TaskReference) -> dict[str, Any]:
    base = task.outcomes[BASE]
    moved = {
        run: {"largest": float(movement.relative(outcome, base).max())}
        for run, outcome in task.outcomes.items()
    }
    return {"statistics": moved, "tolerances": {"largest": movement.RTOL}}


def _spread_facts(task: TaskReference, chance: float) -> dict[str, Any]:
    outcomes = movement.distinct(list(task.outcomes.values()))
    moved = {}
    for run, outcome in task.outcomes.items():
        others = [other for other in outcomes if not other.same(outcome)] or [outcome]
        moved[run] = movement.measure(outcome, others, task.weights).statistics
    allowed = movement.tolerances(outcomes, task.weights, chance)
    return {"statistics": moved, "tolerances": {name: found.bound for name, found in allowed.items()}}
