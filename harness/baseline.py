"""The reference of a gate: one JSON file with what a grid gave, document by document.

    {"format", "sha256" of all the rest, "recorded": when and from which commit, "environment", "grid",
     "rule": the tolerance's constants, "trials": [the harmless changes that were run],
     "cells": [{"cell": which, "float": whether it is the float model, "model_sha256", "identity": its facts,
                "tasks": {name: {"kind", "protocol", "data", "documents": [[...]],
                                 "outcomes": {name of the trial: numbers, or the name of an earlier trial that
                                              gave the same ones},
                                 "statistics": {trial: moves}, "tolerances": {statistic: bound}}}}],
     "probes": [what the sensitivity probes gave]}

The numbers of an outcome stand in the order of the documents.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from harness import store
from harness.config import CellSpec, GridConfig, cells_of
from harness.movement import Document, Floats, Outcome
from methods.calibration import evaluation_text
from methods.errors import UserError

FORMAT = 1
BASE = "recorded"
"""Name of the run that is no trial: the grid as it stands."""
DIGITS = 12
"""Significant digits of a stored number."""

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskReference:
    """A task of a cell: its documents and what each run made of them. kind: "perplexity", "choices",
    "log-likelihood" or "generation"."""

    kind: str
    protocol: str
    data: str
    documents: tuple[Document, ...]
    outcomes: dict[str, Outcome]

    @property
    def weights(self) -> Floats:
        return np.array([document.weight for document in self.documents], dtype=np.float64)


@dataclass(frozen=True)
class CellReference:
    """A cell: which, and what it gave. `identity`: facts of its record that explain a move."""

    cell: CellSpec
    is_float: bool
    model_sha256: str
    identity: dict[str, Any]
    tasks: dict[str, TaskReference]


@dataclass(frozen=True)
class Reference:
    """A whole reference, or (`whole` false) a part of one. `trials`: the harmless changes by name."""

    grid: GridConfig
    environment: dict[str, Any]
    recorded: dict[str, Any]
    trials: dict[str, dict[str, Any]]
    cells: tuple[CellReference, ...]
    probes: tuple[dict[str, Any], ...] = ()
    whole: bool = True

    def find(self, cell: CellSpec) -> CellReference | None:
        return next((item for item in self.cells if item.cell == cell), None)


def numbers(rows: Sequence[Row]) -> tuple[str, tuple[Document, ...], Outcome]:
    """Kind, documents and outcome of a task's sample rows, in the order of the rows.

    The score of a perplexity piece is its log-likelihood, of a multiple-choice document the log-probability
    of the right answer among the choices, of generated text (and where there is no single right choice) its
    first metric.
    """
    answers = None
    if "nll" in rows[0]:
        kind, documents = "perplexity", [_piece(row) for row in rows]
        likelihoods = [[-row["nll"]] for row in rows]
        scores = [own[0] for own in likelihoods]
    else:
        documents = [_document(row) for row in rows]
        if "choices" in rows[0]:
            kind, likelihoods = "choices", [row["choices"] for row in rows]
            scores = [_gold_log_probability(row) for row in rows]
        elif all(isinstance(value, int | float) for value in rows[0]["responses"]):
            kind, likelihoods = "log-likelihood", [row["responses"] for row in rows]
            scores = [math.fsum(own) for own in likelihoods]
        else:
            kind, scores = "generation", [_first_metric(row) for row in rows]
            likelihoods = [[score] for score in scores]
            answers = tuple(_digest(row["responses"]) for row in rows)
    return kind, tuple(documents), _outcome(scores, likelihoods, answers)


def _outcome(
    scores: Sequence[float], likelihoods: Sequence[Sequence[float]], answers: tuple[str, ...] | None
) -> Outcome:
    owner = np.repeat(np.arange(len(likelihoods)), [len(own) for own in likelihoods])
    flat = np.array([value for own in likelihoods for value in own], dtype=np.float64)
    return Outcome(_stored(np.array(scores, dtype=np.float64)), _stored(flat), owner, answers)


def _stored(values: Floats) -> Floats:
    """Numbers as a file holds them, so that a run is equal to itself."""
    return np.array([float(f"{value:.{DIGITS}g}") for value in values])


def _piece(row: Row) -> Document:
    window, passage = row["window"], row["passage"]
    return Document(f"window {window} passage {passage}", str(row["tokens"]), "", str(passage), row["tokens"])


def _document(row: Row) -> Document:
    shared = row.get("cluster")
    cluster = f"document {row['doc_id']}" if shared is None else f"text {shared}"
    return Document(f"document {row['doc_id']}", row["doc_hash"][:16], row["prompt_hash"][:16], cluster, 1)


def _gold_log_probability(row: Row) -> float:
    gold, choices = row["gold"], row["choices"]
    if not isinstance(gold, int):
        return _first_metric(row)
    return float(choices[gold] - np.logaddexp.reduce(choices))


def _first_metric(row: Row) -> float:
    return float(next(iter(row["metrics"].values())))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def read_rows(folder: Path, task: dict[str, Any]) -> list[Row]:
    """Sample rows of a finished task of a cell's folder."""
    text = (folder / task["samples"]).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def data_sha256(about: dict[str, Any]) -> str:
    """Digest of the data behind a task, by a plan's or a record's facts about it: of the whole text for
    perplexity, since how it is cut into windows is the code's doing; else of the documents scored."""
    return evaluation_text(about["text"]).sha256 if "text" in about else str(about["data"])


def narrowed(
    reference: Reference,
    methods: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
) -> Reference:
    """A part of a reference: fewer methods, tasks, or documents a task (a smaller draw is part of a larger
    one). Tolerances follow the documents that are left. UserError for names that the reference lacks."""
    if methods is None and tasks is None and limit is None:
        return reference
    grid = reference.grid
    known = [entry.method for entry in grid.methods]
    names = _known(tasks, grid.tasks, "task")
    chosen = _known(methods, known, "method")
    limits = {name: grid.limit_of(name) for name in names}
    if limit is not None:
        limits = {name: min(limit, own or limit) for name, own in limits.items()}
    values = grid.model_dump(mode="json") | {
        "methods": [entry.model_dump(mode="json") for entry in grid.methods if entry.method in chosen],
        "tasks": list(names),
        "limit": None,
        "limits": {name: own for name, own in limits.items() if own is not None},
    }
    smaller = GridConfig.model_validate(values)
    kept = set(cells_of(smaller))
    cells = tuple(item for item in reference.cells if item.cell in kept)
    return replace(reference, grid=smaller, cells=cells, whole=False)


def _known(asked: Sequence[str] | None, known: Sequence[str], what: str) -> Sequence[str]:
    strangers = [name for name in asked or () if name not in known]
    if strangers:
        raise UserError(f"the reference has no {what} {strangers[0]!r}: it has {', '.join(known)}")
    return known if asked is None else [name for name in known if name in asked]


# The file


def save(path: Path, reference: Reference, extra: dict[str, Any]) -> None:
    """Write a reference; `extra`: what is kept for readers alone (rule, statistics, tolerances by cell and
    task, under "cells" as {cell: {task: facts}})."""
    cells = []
    for item in reference.cells:
        facts = extra["cells"][str(item.cell)]
        tasks = {name: _task_json(task) | facts[name] for name, task in item.tasks.items()}
        cells.append(
            {
                "cell": asdict(item.cell),
                "float": item.is_float,
                "model_sha256": item.model_sha256,
                "identity": item.identity,
                "tasks": tasks,
            }
        )
    content = {
        "format": FORMAT,
        "recorded": reference.recorded,
        "environment": reference.environment,
        "grid": reference.grid.model_dump(mode="json"),
        "rule": extra["rule"],
        "trials": reference.trials,
        "cells": cells,
        "probes": list(reference.probes),
    }
    content = json.loads(json.dumps(content))  # as it will be read
    store.write_text(path, _lines({"sha256": _seal(content), **content}) + "\n")


def load(path: Path) -> Reference:
    """Read a reference. UserError in one line where it is missing, damaged or of another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        form, seal = content["format"], content.pop("sha256")
    except OSError as error:
        raise UserError(
            f"reference {path}: {error.strerror or error}; --record GRID.yaml makes one"
        ) from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"reference {path} is damaged: not a reference file ({error!r})") from error
    if form != FORMAT:
        raise UserError(f"reference {path} has format {form}, this version reads {FORMAT}: record it again")
    if seal != _seal(content):
        raise UserError(f"reference {path} is damaged: its content does not agree with its sha256")
    cells = tuple(
        CellReference(
            CellSpec(**item["cell"]),
            item["float"],
            item["model_sha256"],
            item["identity"],
            {name: _task_of(task) for name, task in item["tasks"].items()},
        )
        for item in content["cells"]
    )
    try:
        grid = GridConfig.model_validate(content["grid"])
    except ValidationError as error:
        reason = " ".join(str(error.errors()[0]["msg"]).split())
        raise UserError(f"reference {path}: its grid cannot be run ({reason}): record it again") from error
    facts = (content["environment"], content["recorded"], content["trials"])
    return Reference(grid, *facts, cells, tuple(content["probes"]))


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _task_json(task: TaskReference) -> dict[str, Any]:
    stored: dict[str, Any] = {}
    for name, outcome in task.outcomes.items():
        same = next((other for other in stored if task.outcomes[other].same(outcome)), None)
        stored[name] = same or _outcome_json(task.kind, outcome)
    documents = [[*asdict(document).values()] for document in task.documents]
    return {
        "kind": task.kind,
        "protocol": task.protocol,
        "data": task.data,
        "documents": documents,
        "outcomes": stored,
    }


def _task_of(content: dict[str, Any]) -> TaskReference:
    documents = tuple(Document(*values) for values in content["documents"])
    outcomes: dict[str, Outcome] = {}
    for name, stored in content["outcomes"].items():
        outcomes[name] = outcomes[stored] if isinstance(stored, str) else _outcome_of(content["kind"], stored)
    return TaskReference(content["kind"], content["protocol"], content["data"], documents, outcomes)


def _outcome_json(kind: str, outcome: Outcome) -> dict[str, Any]:
    values = np.split(outcome.values, np.flatnonzero(np.diff(outcome.owner)) + 1)
    stored: dict[str, Any] = {"values": [own.tolist() for own in values]}
    if kind == "choices":
        stored["scores"] = outcome.scores.tolist()
    if outcome.answers is not None:
        stored["answers"] = list(outcome.answers)
    return stored


def _outcome_of(kind: str, stored: dict[str, Any]) -> Outcome:
    answers = tuple(stored["answers"]) if "answers" in stored else None
    scores = stored["scores"] if kind == "choices" else [math.fsum(own) for own in stored["values"]]
    return _outcome(scores, stored["values"], answers)


def _lines(value: Any, depth: int = 0) -> str:
    """JSON with a line for each entry of what is nested less than six deep: readable, and small in a diff."""
    if depth == 6 or not value or not isinstance(value, dict | list):
        return json.dumps(value)
    if isinstance(value, list):
        if not any(isinstance(item, dict | list) for item in value):
            return json.dumps(value)
        parts = [_lines(item, depth + 1) for item in value]
        return "[\n" + ",\n".join(parts) + "\n]"
    parts = [f"{json.dumps(key)}: {_lines(item, depth + 1)}" for key, item in value.items()]
    return "{\n" + ",\n".join(parts) + "\n}"
