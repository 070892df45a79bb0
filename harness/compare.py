"""Two runs, or two cells, compared over the same documents.

    python -m harness.compare results/before results/after
    python -m harness.compare results/quick:1cde results/quick:1825 --json
    python -m harness.compare results/reference/int4.tar.xz results/int4-on-a-gpu --within

Two run folders are compared cell by cell: the same model, method, bits and seed. Two cells, each given by its
folder or as RUN_FOLDER:CELL_ID_PREFIX, are compared as they are. Every difference is B minus A, paired
document by document; samples of other documents are refused. `--within` judges B by the bounds of
harness/within.py. Exit status 0; 1 where B is outside of them; 2 for a mistake of the user.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import inference, stats, store, within
from harness.archive import SUFFIX, opened
from harness.markdown import plain, table
from harness.records import Cell, Column, columns_of, read_cell, read_run
from harness.stats import Estimate, Paired
from harness.store import os_reason
from harness.tables import p_text, perplexity_of, signed
from kernels.command import run_command
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError

SETTINGS = (
    *("model", "execution", "quantiser", "calibration", "dtype", "batch_size"),
    *("perturbation", "environment"),
)
PROTOCOL = ("version", "protocol", "n_shot", "text")
NOTE = """\
B minus A over the same documents; brackets are 95 % intervals. Perplexity: A and B are perplexities, the \
difference is that of their logarithms, interval and p by bootstrap over passages, of which there are n \
(two or three: by Student's t). \
Accuracy in %: p by McNemar's exact test over n documents, lost and gained are the answers that turned \
wrong and right. Right answer: change of its mean log-likelihood in nats. Marks follow p (Holm), corrected \
for the {count} comparisons here: `*` below 5 %, `**` below 1 %."""

OTHER_TESTS = {
    "paired t": "the means are compared, interval and p by paired t over n documents",
    "bootstrap over clusters": "the means are compared, interval and p by bootstrap over the texts that "
    "questions share",
}
"""What the comparison says of metrics that the note does not cover, by `Paired.test`."""


@dataclass(frozen=True)
class Side:
    """What one argument names: the cells of a run, or one cell."""

    name: str
    cells: list[Cell]
    is_run: bool
    unusable: list[str]


@dataclass(frozen=True)
class Line:
    """One task of one pair of cells."""

    a: Cell
    b: Cell
    column: Column
    paired: Paired
    gold: Paired | None
    holm: float = math.nan


@dataclass(frozen=True)
class Comparison:
    lines: list[Line]
    settings: dict[str, tuple[str, str]]
    """Settings on record that differ: name -> what A has, what B has."""
    left_out: list[str]
    lost: list[str]
    """The part of `left_out` that A has and B failed at."""


@contextmanager
def opened_side(text: str) -> Iterator[Side]:
    """As `open_side`; a run may be an archive, which is unpacked for as long as this lasts."""
    run, inside, prefix = text.partition(f"{SUFFIX}:")
    with opened(Path(run + SUFFIX if inside else text)) as folder:
        yield replace(open_side(f"{folder}:{prefix}" if inside else str(folder)), name=text)


def open_side(text: str) -> Side:
    """A run folder, a cell's folder or its cell.json, or RUN_FOLDER:CELL_ID_PREFIX; UserError where it is
    none of them."""
    path = Path(text)
    path = path.parent if path.name == store.RECORD and path.is_file() else path
    if (path / store.RECORD).is_file():
        return Side(text, [_cell(path)], False, [])
    if path.is_dir() or ":" not in text:
        run = read_run(path)
        return Side(text, run.cells, True, [f"{name}: {reason}" for name, reason in run.missing])
    folder, _, prefix = text.rpartition(":")
    found = sorted(found.parent for found in Path(folder).glob(f"*/{store.RECORD}"))
    found = [cell for cell in found if prefix and cell.name.startswith(prefix)]
    if len(found) != 1:
        raise UserError(f"{text}: {len(found)} cells of {folder} begin with {prefix!r}; name exactly one")
    return Side(text, [_cell(found[0])], False, [])


def _cell(folder: Path) -> Cell:
    try:
        return read_cell(folder)
    except ValueError as error:
        raise UserError(f"{folder / store.RECORD}: {error}") from error


def compare(a: Side, b: Side) -> Comparison:
    """Compare two runs or two cells.

    Raises UserError where the sides are not of one kind, have nothing in common, or did not score the same
    documents.
    """
    if a.is_run != b.is_run:
        run, cell = (a, b) if a.is_run else (b, a)
        raise UserError(f"{run.name} is a run and {cell.name} is a cell: give two runs or two cells")
    left_out = [f"A, {reason}" for reason in a.unusable] + [f"B, {reason}" for reason in b.unusable]
    pairs = list(_matched(a, b, left_out)) if a.is_run else [(a.cells[0], b.cells[0])]
    lines: list[Line] = []
    lost: list[str] = []
    settings: dict[str, dict[tuple[str, str], None]] = {}
    for first, second in pairs:
        shared = list(_lines(first, second, left_out, lost, name_of(first) if a.is_run else ""))
        lines += shared
        tasks = [line.column.task for line in shared]
        for name, values in _differing(_settings(first, tasks), _settings(second, tasks)):
            settings.setdefault(name, {})[values] = None
        for task in tasks:
            changed = _changed_prompts(first.samples(task), second.samples(task))
            if changed:
                settings.setdefault(f"prompts of {task}", {})["–", f"{changed} differ"] = None
    if not lines:
        why = f" ({'; '.join(left_out)})" if left_out else ""
        raise UserError(f"{a.name} and {b.name} have no finished task of the same cell in common{why}")
    adjusted = inference.holm([line.paired.difference.p_value() for line in lines])
    lines = [replace(line, holm=p) for line, p in zip(lines, adjusted, strict=True)]
    shown = {
        name: (
            "; ".join(dict.fromkeys(first for first, _ in values)),
            "; ".join(dict.fromkeys(second for _, second in values)),
        )
        for name, values in settings.items()
    }
    return Comparison(lines, shown, left_out, lost)


def _matched(a: Side, b: Side, left_out: list[str]) -> Iterator[tuple[Cell, Cell]]:
    sides = [_by_identity(side) for side in (a, b)]
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        cells = [side.get(key, []) for side in sides]
        counts = [len(found) for found in cells]
        if counts == [1, 1]:
            yield cells[0][0], cells[1][0]
            continue
        name = name_of((cells[0] or cells[1])[0])
        if 0 in counts:
            left_out.append(f"{name}: only in {'B' if counts[0] == 0 else 'A'}")
        else:
            left_out.append(
                f"{name}: {counts[0]} cells in A, {counts[1]} in B; compare two of them by their ids"
            )


def _by_identity(side: Side) -> dict[tuple[str, ...], list[Cell]]:
    found: dict[tuple[str, ...], list[Cell]] = {}
    for cell in side.cells:
        record = cell.record
        model = str(record["model"].get("sha256"))
        key = (model, str(record["method"]["row"]), str(cell.bits), str(cell.seed))
        found.setdefault(key, []).append(cell)
    return found


def name_of(cell: Cell) -> str:
    record = cell.record
    return f"{record['model']['name']}, {record['method']['row']}, {cell.bits}, seed {cell.seed}"


def _whole_name(cell: Cell) -> str:
    """With the execution where it is not the usual one: two cells may differ in it alone."""
    execution = cell.record.get("execution", "simulate")
    return name_of(cell) + (f", {execution}" if execution != "simulate" else "")


def _lines(a: Cell, b: Cell, left_out: list[str], lost: list[str], name: str) -> Iterator[Line]:
    where = f"{name}, " if name else ""
    for column in columns_of([a, b]):
        has = [column.estimate(cell) is not None for cell in (a, b)]
        if not all(has):
            side = "either side" if not any(has) else "B" if has[0] else "A"
            left_out.append(f"{where}{column.task}: not finished in {side}")
            lost += left_out[-1:] if has == [True, False] else []
            continue
        data = [cell.task(column.task).get("data") for cell in (a, b)]
        try:
            if None not in data and data[0] != data[1]:
                raise ValueError("the scored documents differ")
            paired = column.paired(a, b)
        except ValueError as error:
            what = f"{where}{column.task}: B cannot be compared with A as its reference"
            raise UserError(f"{what}: {plain(error)}") from error
        yield Line(a, b, column, paired, _gold(a, b, column, where, left_out))


def _gold(a: Cell, b: Cell, column: Column, where: str, left_out: list[str]) -> Paired | None:
    """None, and why, where not every document has one right answer; None of tasks without choices."""
    first, second = a.samples(column.task), b.samples(column.task)
    if column.kind != "accuracy" or not any("choices" in row for row in (*first, *second)):
        return None
    try:
        return stats.paired_gold(first, second)
    except ValueError as error:
        left_out.append(f"{where}{column.task}, right answers: {error}")
        return None


def _settings(cell: Cell, tasks: Sequence[str]) -> dict[str, str]:
    record = cell.record
    method = record["method"]
    found = {"method": str(method.get("spec")), "bits": str(cell.bits), "seed": str(cell.seed)}
    found |= dict(_flat("plugins", method.get("plugins")))
    for name in SETTINGS:
        found |= dict(_flat(name, record.get(name)))
    for task in tasks:
        entry = cell.task(task)
        found |= {f"{name} of {task}": str(entry[name]) for name in PROTOCOL if name in entry}
    found["commit"] = str((record.get("measured") or {}).get("commit"))
    return found


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item)
    elif value is not None:
        yield name, str(value)


def _differing(a: dict[str, str], b: dict[str, str]) -> Iterator[tuple[str, tuple[str, str]]]:
    for name in dict.fromkeys([*a, *b]):
        values = a.get(name, "–"), b.get(name, "–")
        if values[0] != values[1]:
            yield name.removeprefix("environment."), values


def _changed_prompts(first: Sequence[stats.Row], second: Sequence[stats.Row]) -> str:
    """How many prompts differ: "3 of 20"; empty where none does or none is on record."""
    known = {row["doc_id"]: row["prompt_hash"] for row in first if "prompt_hash" in row}
    changed = sum(known.get(row["doc_id"]) != row["prompt_hash"] for row in second if "prompt_hash" in row)
    return f"{changed} of {len(known)}" if changed else ""


def markdown(a: Side, b: Side, comparison: Comparison) -> str:
    """The comparison as it is printed, ready for a README."""
    text = [f"A: `{a.name}`{_what(a)}  \nB: `{b.name}`{_what(b)}"]
    pairs = list(dict.fromkeys((line.a, line.b) for line in comparison.lines))
    for first, second in pairs:
        lines = [line for line in comparison.lines if line.a is first and line.b is second]
        text += [f"**{plain(name_of(first))}**"] if a.is_run else []
        text.append(_table(lines))
    text.append(NOTE.format(count=len(comparison.lines)))
    clustered = dict.fromkeys(x.column.task for x in comparison.lines if "clustered" in x.paired.test)
    if clustered:
        shared = "questions share texts, so the answers to one text change sign together in McNemar's test"
        text.append(f"{', '.join(clustered)}: {shared}.")
    for test, said in OTHER_TESTS.items():
        tasks = dict.fromkeys(x.column.task for x in comparison.lines if x.paired.test == test)
        text += [f"{', '.join(tasks)}: neither right or wrong nor perplexity, so {said}."] if tasks else []
    text.append("Both sides scored the same documents: every hash agrees.")
    if comparison.settings:
        rows = [[name, *values] for name, values in comparison.settings.items()]
        text += ["Settings that differ:", table(["setting", "A", "B"], rows)]
    else:
        text.append("No setting on record differs.")
    if comparison.left_out:
        text.append("Not compared:\n" + "\n".join(f"- {plain(reason)}" for reason in comparison.left_out))
    return "\n\n".join(text)


def _what(side: Side) -> str:
    return f" ({len(side.cells)} cells)" if side.is_run else f" ({_whole_name(side.cells[0])})"


def _table(lines: Sequence[Line]) -> str:
    head = ["task", "n", "A", "B", "Δ [95 %]", "p", "p (Holm)", "lost / gained", "Δ right answer"]
    rows = []
    for line in lines:
        paired, kind = line.paired, line.column.kind
        values = [_value(line.column, line.column.estimate(cell)) for cell in (line.a, line.b)]
        flips = "–" if paired.lost is None else f"{paired.lost} / {paired.gained}"
        gold = "–"
        if line.gold is not None:
            gold = signed(line.gold.difference, "nats", p=1.0)
        rows.append(
            [
                line.column.task,
                f"{paired.n:,}",
                *values,
                signed(paired.difference, kind, interval=True, p=line.holm),
                p_text(paired.difference.p_value()),
                p_text(line.holm),
                flips,
                gold,
            ]
        )
    return table(head, rows)


def _value(column: Column, estimate: Estimate | None) -> str:
    if estimate is None or not math.isfinite(estimate.value):
        return "not finite"
    if column.kind == "perplexity":
        value, _ = perplexity_of(estimate)
        return f"{value:.4g}"
    return f"{100 * estimate.value:.1f}" if column.kind == "accuracy" else f"{estimate.value:.4g}"


def as_json(a: Side, b: Side, comparison: Comparison) -> dict[str, Any]:
    """The comparison for machines; numbers that are not known are null."""

    return {
        "a": a.name,
        "b": b.name,
        "comparisons": [
            {
                "cells": [line.a.record["id"], line.b.record["id"]],
                "names": [_whole_name(line.a), _whole_name(line.b)],
                "task": line.column.task,
                "metric": line.column.metric,
                "n": line.paired.n,
                "a": _value_of(line.column, line.a),
                "b": _value_of(line.column, line.b),
                "difference": _facts(line.paired.difference),
                "test": line.paired.test,
                "p_holm": _known(line.holm),
                "lost": line.paired.lost,
                "gained": line.paired.gained,
                "right_answer": _facts(line.gold.difference) if line.gold else None,
            }
            for line in comparison.lines
        ],
        "same_documents": True,
        "settings": {name: list(values) for name, values in comparison.settings.items()},
        "not_compared": comparison.left_out,
    }


def _value_of(column: Column, cell: Cell) -> float | None:
    estimate = column.estimate(cell)
    return None if estimate is None else _known(estimate.value)


def _facts(estimate: Estimate) -> dict[str, Any]:
    return {
        "value": _known(estimate.value),
        "stderr": _known(estimate.stderr),
        "interval": [_known(bound) for bound in estimate.interval()],
        "p": _known(estimate.p_value()),
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m harness.compare", description="Compare two runs, or two cells, document by document."
    )
    where = "a run folder, its archive, a cell's folder, or RUN:CELL_ID_PREFIX"
    parser.add_argument("a", metavar="A", help=where)
    parser.add_argument("b", metavar="B", help="the same kind of thing; differences are B minus A")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for machines")
    form.add_argument(
        "--within",
        action="store_true",
        help="instead: does B agree with A as another machine must? exit status 1 where it does not",
    )
    arguments = parser.parse_args(argv)
    try:
        refuse_foreign_kernels()
        with opened_side(arguments.a) as a, opened_side(arguments.b) as b:
            comparison = compare(a, b)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {os_reason(error)}", file=sys.stderr)
        return 2
    if arguments.within:
        text, ok = within.verdict(comparison, _whole_name)
        print(text)
        return 0 if ok else 1
    if arguments.json:
        print(json.dumps(as_json(a, b, comparison), indent=1, allow_nan=False))
    else:
        print(markdown(a, b, comparison))
    return 0


if __name__ == "__main__":
    run_command(main)
