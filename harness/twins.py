"""The report's section on models that differ in how they were pre-trained: how much each of two that saw the
same text loses at 4 bits, over the same passages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations

from harness import inference, stats
from harness.gains import change, change_text
from harness.markdown import plain, table
from harness.records import Cell, Column, Model, Row, same_seeds
from harness.stats import Estimate
from harness.tables import signed
from methods.osp import OSP

TWINS = """\
Models of one tokenizer, on the same passages, by the same method: one that `osp` takes and one that it \
refuses. `loses`: how far perplexity rises above the model's own in floating point. Difference: of the two \
rises, the first model's minus the second's, in nats of log-perplexity; below zero the first loses less. The \
last column compares the perplexities that are left at these bits. Both with 95 % intervals, paired by \
passage and by the seed of the method; how far another seed of the pre-training would move them, two models \
cannot say. Exploratory: not corrected for the number of comparisons."""


def twins_section(models: Sequence[Model]) -> list[str]:
    """Empty without a model that `osp` takes beside one of the same tokens that it refuses."""
    text = []
    for ours, other in permutations(models, 2):
        if not (ours.floats and other.floats and _taken(ours) and _refused(other)):
            continue
        names = (str(ours.record["name"]), str(other.record["name"]))
        for column in ours.perplexities:
            try:
                column.paired(other.floats[0], ours.floats[0])
            except ValueError:  # other tokens: no twins
                continue
            text += _table(ours, other, column, names)
    if not text:
        return []
    return ["## Pre-training recipes in pairs", *text, TWINS]


def _table(ours: Model, other: Model, column: Column, names: tuple[str, str]) -> list[str]:
    lines = []
    problems: dict[str, None] = {}
    for row, theirs in _rows(ours, other):
        pairs = same_seeds(theirs.with_(column), row.with_(column))
        try:
            rises = [
                (
                    _rise(other.floats[0], second, column),
                    _rise(ours.floats[0], first, column),
                    _difference(ours.floats[0], other.floats[0], first, second, column),
                    column.paired(second, first).difference,
                )
                for second, first in pairs
            ]
        except ValueError as error:
            problems[f"{row.bits} {row.label}: {error}"] = None
            continue
        if rises:
            lost, own, difference, left = (inference.over_seeds(each) for each in zip(*rises, strict=True))
            shown = [change(own), change(lost), signed(difference, "perplexity", interval=True)]
            lines.append([row.bits, row.label, theirs.label, len(rises), *shown, change_text(left)])
    if not lines:
        return []
    ours_name, other_name = names
    head = ["bits", ours_name, other_name, "seeds", f"{ours_name} loses (%)", f"{other_name} loses (%)"]
    head += ["difference [95 %]", f"{ours_name} against {other_name} (%)"]
    left_out = [f"Not compared: {'; '.join(plain(problem) for problem in problems)}."] if problems else []
    title = f"### {ours_name} and {other_name}: {column.title}"
    floats = column.paired(other.floats[0], ours.floats[0]).difference
    start = f"In floating point {ours_name} has {change_text(floats)} % of perplexity against {other_name}."
    return [title, table(head, lines), start, *left_out]


def _taken(model: Model) -> bool:
    return any(row.usable and OSP.name in _parts(row) for row in model.rows)


def _refused(model: Model) -> bool:
    return any(cell.state == "n/a" and OSP.name in _parts(row) for row in model.rows for cell in row.cells)


def _rows(ours: Model, other: Model) -> Iterator[tuple[Row, Row]]:
    """(row with osp, row of the other model that is the same without it)."""
    for row in ours.rows:
        if OSP.name in _parts(row):
            yield from ((row, each) for each in other.rows if each.bits == row.bits and _same(row, each))


def _parts(row: Row) -> list[str]:
    return str(row.first.record["method"]["name"]).split("+")


def _same(row: Row, other: Row) -> bool:
    """Whether `other` has the row's method without osp, with all its options; osp alone is its rounding."""
    method, theirs = row.first.record["method"], other.first.record["method"]
    rest = [part for part in _parts(row) if part != OSP.name]
    names = rest or [str(method["rounding"])]
    if names != _parts(other) or method["rounding"] != theirs["rounding"]:
        return False
    if not rest:
        shared = method["options"][OSP.name].items()
        return all(theirs["options"][names[0]].get(key, value) == value for key, value in shared)
    return all(method["options"][part] == theirs["options"][part] for part in rest)


def _rise(whole: Cell, cell: Cell, column: Column) -> Estimate:
    return column.paired(whole, cell).difference


def _difference(our_float: Cell, their_float: Cell, ours: Cell, theirs: Cell, column: Column) -> Estimate:
    rises = [
        stats.increase(whole.samples(column.task), cell.samples(column.task))
        for whole, cell in ((their_float, theirs), (our_float, ours))
    ]
    return stats.paired_log_perplexity(*rises)
