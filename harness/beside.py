"""The report's section that sets what papers report (harness/published.py) beside a run: numbers where the
model is the same, relative changes alone where it is another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from harness import inference
from harness.evidence import over, paired_rows, reference_of
from harness.gains import change_text as change_with_interval
from harness.markdown import table
from harness.published import Column as Theirs
from harness.published import Paper, Table, change_text, papers
from harness.published import Row as TheirRow
from harness.records import Model, Row, flags_of, mean_accuracy, overall
from harness.stats import Estimate
from harness.tables import flag_notes, mean_accuracy_text, value_text

SAME = """\
The papers' own numbers of this model, not measured here, beside this run's: {ours}. Text, tasks, context \
and quantisers are the papers' (`python -m harness.report --published` has them), so a number is no target; \
the change over the float row of either side (perplexity in percent, accuracy in points) says more."""
OTHERS = """\
**Theirs is not measured here, and of other models**: how far perplexity moves from one row to another of \
one table, in percent, as the papers have it, beside the same two rows of this run ({ours}; paired by seed \
and passage, with its 95 % interval). A paper's row is taken where bits, method, its options and rounding \
are those of a row here; its text, context and quantisers are its own, and all of its models are in `python \
-m harness.report --published`. What a small model loses at 4 bits is not what a large one does: compare \
signs and orders, not sizes."""


def beside_section(model: Model) -> list[str]:
    """Empty where no paper has a row of this run."""
    same, others = _same(model), _others(model)
    ours = next((column.title for column in model.perplexities), "")
    text = []
    if same:
        head = ["bits", "method", "metric", "here", "change", "theirs", "their change", "paper"]
        said = [ours, "mean accuracy"] if ours else ["mean accuracy"]
        text += ["#### The same model", table(head, same), SAME.format(ours=" and ".join(said))]
    if others:
        head = ["bits", "method", "against", "here (%)", "theirs (%)", "paper"]
        text += ["#### Other models: relative changes alone", table(head, others), OTHERS.format(ours=ours)]
    text += flag_notes(model.record, [line[place] for line in (*same, *others) for place in (1, 2)])
    return ["### Beside the papers", *text] if text else []


def _tables(metric: str | None = None) -> Iterator[tuple[Paper, Table]]:
    for paper in papers().values():
        for found in paper.tables:
            if found.protocol.metric in ((metric,) if metric else ("perplexity", "accuracy")):
                yield paper, found


def _row_of(found: Table, row: Row) -> TheirRow | None:
    record = row.first.record
    return next((theirs for theirs in found.rows if theirs.stands_for(row.bits, record["method"])), None)


def _label(model: Model, row: Row) -> str:
    """A row as the main table calls it, with its flags."""
    return f"{row.label} {flags_of(model.record, row)}".strip()


def _cited(paper: Paper, found: Table) -> str:
    return f"{paper.authors}, {found.source.table or found.id}"


# The same model


def _columns(found: Table, model: Model) -> Iterator[Theirs]:
    return (column for column in found.models if column.is_(model.record))


def _same(model: Model) -> list[list[str]]:
    lines = []
    for row in model.rows:
        for paper, found in _tables():
            theirs = _row_of(found, row)
            for column in _columns(found, model):
                printed = theirs and found.printed(theirs, column.name)
                if theirs is None or not printed:
                    continue
                base = found.base
                moved = math.nan if base in (None, theirs) else found.change(theirs, base, column.name)
                metric = found.protocol.metric
                lines.append(
                    [
                        *(row.bits, _label(model, row), metric, *_here(model, row, metric)),
                        *(printed, change_text(moved), _cited(paper, found)),
                    ]
                )
    return lines


def _here(model: Model, row: Row, metric: str) -> tuple[str, str]:
    """This run's number, and its change over the float row."""
    base = _float_row(model)
    if metric == "perplexity":
        column = next(iter(model.perplexities), None)
        return ("–" if column is None else value_text(row, column)), _moved(model, row, base)
    if not model.accuracies:
        return "–", "–"
    found, reference = (_mean_accuracy(model, some) for some in (row, None if base is row else base))
    moved = 100 * (found.value - reference.value) if found and reference else math.nan
    return mean_accuracy_text(row, model.accuracies), change_text(moved)


def _mean_accuracy(model: Model, row: Row | None) -> Estimate | None:
    return None if row is None else overall(row, lambda cell: mean_accuracy(cell, model.accuracies))


def _float_row(model: Model) -> Row | None:
    return next((row for row in model.rows if row.first.is_float), None)


# Other models


def _others(model: Model) -> list[list[str]]:
    lines: list[list[str]] = []
    if not model.perplexities:
        return lines
    for row, reference in _pairs(model):
        ours = _moved(model, row, reference)
        for paper, found in _tables("perplexity"):
            theirs, against = _row_of(found, row), _row_of(found, reference)
            if theirs is None or against is None:
                continue
            moved = [
                (change, column.name)
                for column in found.models
                if not column.is_(model.record)
                and math.isfinite(change := found.change(theirs, against, column.name))
            ]
            if moved:
                cited = _cited(paper, found)
                labels = (_label(model, row), _label(model, reference))
                lines.append([row.bits, *labels, ours, _between(moved), cited])
    return lines


def _between(moved: Sequence[tuple[float, str]]) -> str:
    """The smallest and the largest change, each with its model."""
    ends = [f"{change_text(change)} ({name})" for change, name in (min(moved), max(moved))]
    return ends[0] if len(moved) == 1 else f"{ends[0]} to {ends[1]}, {len(moved)} models"


def _pairs(model: Model) -> Iterator[tuple[Row, Row]]:
    """Every quantised row against the float row, and against QuaRot of its bits."""
    for row in (row for row in model.rows if not row.first.is_float):
        beside = [other for other in model.rows if other.bits == row.bits and not other.first.is_float]
        quarot, _ = reference_of(beside)
        yield from (
            (row, other) for other in (_float_row(model), quarot) if other is not None and other is not row
        )


def _moved(model: Model, row: Row, reference: Row | None) -> str:
    """The change of this run's first perplexity in percent, with its interval."""
    column = next(iter(model.perplexities), None)
    if column is None or reference is None or row is reference:
        return "–"
    seeds = over(paired_rows(reference.usable, row, [column], {}), [column])
    return change_with_interval(inference.over_seeds(seeds)) if seeds else "–"
