"""The records of a run as rows and columns: what was measured, per model, method and bit-width.

A record is the JSON of one cell; cells that differ by seed alone are one row.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from harness import inference, stats, store
from harness.stats import Estimate
from methods.bits import Bits
from methods.errors import UserError

ACCURACIES = ("acc", "exact_match", "acc_norm")
"""Right-or-wrong metrics; the first that a task has is its column."""
LATTICE_GROUP = 64
"""Groups along the input of at most this many weights can land on a Q4 checkpoint's own lattice."""
Record = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Cell:
    """A cell's record and the folder of its samples (None where only the record is at hand)."""

    record: Record
    folder: Path | None = None
    _rows: dict[str, list[stats.Row]] = field(default_factory=dict)

    @cached_property
    def bits(self) -> Bits:
        return Bits.parse(self.record["bits"])

    @property
    def seed(self) -> int:
        return int(self.record.get("seed") or 0)

    @property
    def is_float(self) -> bool:
        return bool(self.record["method"]["name"] == "float")

    @property
    def state(self) -> str:
        """done, partial, failed or n/a (the method does not apply: not a failure)."""
        kind = (self.record.get("failure") or {}).get("kind", "")
        applies = "not_applicable" not in (self.record["status"], kind.replace("-", "_").replace(" ", "_"))
        return str(self.record["status"]) if applies else "n/a"

    def task(self, name: str) -> Record:
        return self.record.get("tasks", {}).get(name) or {}

    def samples(self, task: str) -> list[stats.Row]:
        """Sample rows of a task; ValueError when there are none or they are not those of the record."""
        if task not in self._rows:
            self._rows[task] = self._read(task)
        return self._rows[task]

    def _read(self, task: str) -> list[stats.Row]:
        entry = self.task(task)
        name = entry.get("samples")
        if self.folder is None or not name or not (self.folder / name).is_file():
            raise ValueError(f"{task}: no samples of {self.record['method']['row']} {self.record['bits']}")
        data = (self.folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != entry.get("samples_sha256"):
            raise ValueError(f"{task}: {self.folder.name}/{name} is damaged: its sha256 is not the record's")
        return [json.loads(line) for line in data.decode("utf-8").splitlines() if line.strip()]


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the tables: a method at a bit-width, with its cell of every seed."""

    label: str
    cells: tuple[Cell, ...]

    @property
    def first(self) -> Cell:
        return self.cells[0]

    @property
    def bits(self) -> str:
        return str(self.first.bits)

    @property
    def usable(self) -> list[Cell]:
        """Cells that have tasks to show: a partial one serves for those that it has."""
        return [cell for cell in self.cells if cell.state in ("done", "partial")]

    def with_(self, column: Column) -> list[Cell]:
        """The cells that have a number in this column."""
        return [cell for cell in self.cells if column.estimate(cell) is not None]


@dataclass(frozen=True)
class Run:
    """The usable cells of a run; (cell id, reason) of those that are not; how many other cells are there; the
    grid as the run's manifest has it, None where it does not say."""

    cells: list[Cell]
    missing: list[tuple[str, str]]
    others: int
    grid: Record | None = None


@dataclass(frozen=True)
class Column:
    """What is shown of a task. kind: perplexity, accuracy, or other (in no mean and no difference)."""

    task: str
    kind: str
    metric: str

    @property
    def title(self) -> str:
        return self.task.replace("_", " ") if self.kind == "perplexity" else self.task

    def estimate(self, cell: Cell) -> Estimate | None:
        """The cell's number (for perplexity its logarithm), None where it has none."""
        entry = cell.task(self.task)
        metric = entry.get("metrics", {}).get(self.metric)
        if metric is None or entry.get("status", "done") == "failed":
            return None
        value, stderr = number(metric.get("value")), number(metric.get("stderr"))
        if self.kind == "accuracy" and value in (0.0, 1.0) and entry.get("n"):
            stderr = stats.at_boundary(value, entry["n"])
        clusters = entry.get("passages") or entry.get("clusters") or entry.get("n")
        return Estimate(value, stderr, clusters - 1 if clusters else math.inf)

    def paired(self, reference: Cell, cell: Cell) -> stats.Paired:
        """Difference to the reference over the same samples; ValueError where they do not pair."""
        first, second = reference.samples(self.task), cell.samples(self.task)
        if self.kind == "perplexity":
            difference = stats.paired_log_perplexity(first, second)
            return stats.Paired(difference, int(difference.df) + 1, "bootstrap over passages")
        return stats.paired_mean(first, second, self.metric)


@dataclass(frozen=True, eq=False)
class Model:
    """All rows of one checkpoint."""

    record: Record
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    ranks: Mapping[Row, int] = field(default_factory=dict)

    @property
    def accuracies(self) -> list[Column]:
        return [column for column in self.columns if column.kind == "accuracy"]

    @property
    def perplexities(self) -> list[Column]:
        return [column for column in self.columns if column.kind == "perplexity"]

    @property
    def comparable(self) -> list[Column]:
        """Columns in which cells are compared: the others may have no better and worse."""
        return [column for column in self.columns if column.kind != "other"]

    @property
    def floats(self) -> list[Cell]:
        """References of the differences, one a seed."""
        rows = [row.usable for row in self.rows if row.first.is_float]
        return next(filter(None, rows), [])

    @property
    def labels(self) -> list[str]:
        return sorted({row.label for row in self.rows if not row.first.is_float})

    @property
    def several_seeds(self) -> bool:
        return any(len(row.cells) > 1 for row in self.rows)

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", str(self.record["name"]).lower()).strip("-") or "model"


def read_run(run: Path, manifest: Mapping[str, Any] | None = None) -> Run:
    """The cells of a run folder: those that `manifest` names (None: its run.json does, as another command may
    have left it), or every <cell id>/cell.json without one.

    Raises UserError when the folder is missing, names nothing, or has a damaged run.json.
    """
    if not run.is_dir():
        raise UserError(f"run folder {run}: there is no such folder; give one that the grid wrote")
    present = sorted(path.parent.name for path in run.glob(f"*/{store.RECORD}"))
    named, path = present, run / store.MANIFEST
    tasks: list[str] | None = None
    grid: Record | None = None
    if manifest is not None or path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if manifest is None else manifest
            named = [str(cell) for cell in content["cells"]]
            tasks, grid = content.get("tasks"), content.get("grid")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: run the grid again to re-make it") from error
    if not named:
        raise UserError(
            f"run folder {run}: it holds no <cell id>/cell.json; give a folder that the grid wrote"
        )
    cells, missing = [], []
    for name in named:
        if not (run / name / store.RECORD).is_file():
            missing.append((name, "not started: the run was stopped before it"))
            continue
        try:
            cell = read_cell(run / name)
        except ValueError as error:
            missing.append((name, f"unreadable {store.RECORD}: {error}"))
            continue
        if tasks is not None:  # a cell may have been scored on others by another command
            kept = {task: entry for task, entry in cell.record["tasks"].items() if task in tasks}
            cell = Cell({**cell.record, "tasks": kept}, cell.folder)
        cells.append(cell)
    return Run(cells, missing, len(set(present) - set(named)), grid)


def read_cell(folder: Path) -> Cell:
    """A cell's folder; ValueError says what is wrong with its record."""
    try:
        record = json.loads((folder / store.RECORD).read_text(encoding="utf-8"))
        if record["schema"] != store.SCHEMA:
            raise ValueError(f"schema {record['schema']}, this version reads {store.SCHEMA}")
        if record["sha256"] != store.content_sha256(record):
            raise ValueError("damaged: its sha256 is not that of its content")
        cell = Cell(record, folder)
        # What every section relies on; the rest of a record may be absent.
        model, method, tasks = record["model"], record["method"], record["tasks"]
        _ = (cell.bits, cell.is_float, cell.state, model["name"], method["row"], tasks.items())
    except KeyError as error:
        raise ValueError(f"no field {error}") from error
    except (OSError, TypeError, AttributeError, UserError) as error:
        raise ValueError(str(error)) from error
    return cell


def same_seeds(reference: Sequence[Cell], cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """Pairs of cells with the same seed; a side with one cell alone has it in every pair (a method without
    randomness runs once)."""
    if len(reference) == 1 or len(cells) == 1:
        return [(first, cell) for first in reference for cell in cells]
    by_seed = {cell.seed: cell for cell in reference}
    return [(by_seed[cell.seed], cell) for cell in cells if cell.seed in by_seed]


def models_of(cells: Iterable[Cell]) -> list[Model]:
    """Cells grouped by checkpoint, then into rows whose cells differ by seed alone, rows in reading order:
    float first, more bits before fewer, and better before worse within a bit-width."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        model = cell.record["model"]
        groups.setdefault((str(model["name"]), str(model.get("sha256"))), []).append(cell)
    models = []
    for _, members in sorted(groups.items()):
        columns, rows = columns_of(members), _rows(members)
        record = members[0].record["model"]
        ranked = [row for row in rows if not row.first.is_float and not unranked(record, row)]
        ranks: dict[Row, int] = {}
        for bits in {row.bits for row in ranked}:
            scores = {row: score for row in ranked if row.bits == bits and (score := _score(row, columns))}
            if len(scores) > 1:
                best = sorted(scores, key=lambda row: (scores[row], row.label))
                ranks |= {row: place + 1 for place, row in enumerate(best)}
        rows.sort(key=lambda row: (_reading_order(row), ranks.get(row, math.inf), row.label))
        models.append(Model(record, tuple(rows), tuple(columns), ranks))
    return models


def unranked(model: Record, row: Row) -> str:
    """Why a row takes no part in the ranking; empty when it does."""
    method = row.first.record["method"]
    parts = [part for part in method.get("options", {}).values() if isinstance(part, Mapping)]
    planned = (row.first.record.get("diagnostics") or {}).get("weights")
    if planned is None:
        groups = [row.first.bits.group, *(part.get("group") for part in parts if part.get("axis", 1) == 1)]
    else:
        groups = [some.get("group") for some in planned if some["axis"] == 1 and some["bits"] < 16]
    if model.get("pre_quantised") and any(0 < (group or 0) <= LATTICE_GROUP for group in groups):
        return "‡"
    return "§" if "paper" in (method.get("preset"), *(part.get("preset") for part in parts)) else ""


def weights_only(model: Record, row: Row) -> str:
    """The flag of weight-only rows on a checkpoint that was already rounded."""
    bits = row.first.bits
    return (
        "†"
        if model.get("pre_quantised") and bits.quantises_weights and bits.activation == bits.kv == 16
        else ""
    )


def flags_of(model: Record, row: Row) -> str:
    """Every flag of a row, where it stands alone."""
    return weights_only(model, row) + unranked(model, row)


def columns_of(cells: Sequence[Cell]) -> list[Column]:
    """A column for each task of these cells, perplexities first."""
    found: dict[str, Column] = {}
    for cell in cells:
        for name, entry in cell.record.get("tasks", {}).items():
            metrics = list(entry.get("metrics") or {})
            if name in found and (found[name].metric or not metrics):
                continue
            if "log_perplexity" in metrics or name.startswith("perplexity_"):
                found[name] = Column(name, "perplexity", "log_perplexity" if metrics else "")
            else:
                wanted = (entry.get("primary_metric"), *ACCURACIES)
                metric = next((metric for metric in wanted if metric in metrics), "")
                kind = "accuracy" if metric or not metrics else "other"
                found[name] = Column(name, kind, metric or next(iter(metrics), ""))
    order = ("perplexity_wikipedia", "perplexity", "accuracy", "other")
    return sorted(found.values(), key=lambda c: order.index(c.task if c.task in order else c.kind))


def _rows(cells: Sequence[Cell]) -> list[Row]:
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.seed, str(cell.record["id"]))):
        record, method = cell.record, cell.record["method"]
        settings = ("execution", "quantiser", "calibration", "dtype", "batch_size")
        identity = [str(cell.bits), *(method.get(key) for key in ("row", "name", "preset", "options"))]
        key = json.dumps([*identity, *(record.get(setting) for setting in settings)], sort_keys=True)
        # A seed that is there twice (measured by two versions, say) is no second seed.
        again = sum(
            other.seed == cell.seed for (known, _), row in groups.items() if known == key for other in row
        )
        groups.setdefault((key, again), []).append(cell)
    rows = []
    for members in groups.values():
        record = members[0].record
        label = str(record["method"]["row"])
        label += (
            ", paper preset" if record["method"].get("preset") == "paper" and "paper" not in label else ""
        )
        label += f", {record['execution']}" if record.get("execution", "simulate") != "simulate" else ""
        rows.append(Row(label, tuple(members)))
    shown = [(row.bits, row.label) for row in rows]
    return [
        # Rows of one name that differ in a setting are told apart by the folder that holds the difference.
        Row(f"{row.label} [{row.first.record['id'][:6]}]", row.cells)
        if shown.count((row.bits, row.label)) > 1
        else row
        for row in rows
    ]


def _reading_order(row: Row) -> tuple[float, ...]:
    bits = row.first.bits
    return (not row.first.is_float, -bits.weight, -bits.activation, -bits.kv, bits.group or math.inf)


def _score(row: Row, columns: Sequence[Column]) -> tuple[float] | None:
    """What rows are ranked by, lower first: the first column's mean over seeds. None without a number or
    where it is not on record which direction is better."""
    for column in columns[:1]:
        higher = row.first.task(column.task).get("metrics", {}).get(column.metric, {}).get("higher_is_better")
        found = [estimate for cell in row.cells if (estimate := column.estimate(cell))]
        if found and higher is not None:
            value = inference.over_seeds(found).value * (-1 if higher else 1)
            return (math.inf if math.isnan(value) else value,)
    return None


def overall(row: Row, of_cell: Callable[[Cell], Estimate | None]) -> Estimate | None:
    found = [estimate for cell in row.cells if (estimate := of_cell(cell)) is not None]
    return inference.over_seeds(found) if found else None


def mean_accuracy(cell: Cell, columns: Sequence[Column]) -> Estimate | None:
    """Mean accuracy over the columns: None unless the cell has all of them, for a mean over other tasks is
    another quantity."""
    found = [estimate for column in columns if (estimate := column.estimate(cell)) is not None]
    return inference.average(found) if columns and len(found) == len(columns) else None


def number(value: Any) -> float:
    """A record's number; NaN for null and for the words that lm-eval writes where it has none."""
    return float(value) if isinstance(value, int | float) else math.nan
