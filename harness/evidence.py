"""The report's sections on what the run shows: the primary comparison, seeds, and what its size can see."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness import inference
from harness.markdown import plain, table
from harness.records import Cell, Column, Model, Row, mean_accuracy, same_seeds
from harness.stats import Estimate, Paired
from harness.tables import p_text, signed
from methods.registry import method_class

REFERENCE = "quarot"
PRIMARY = """\
The one comparison that this report was made for: each method's log-perplexity minus QuaRot's on {task}, \
over the same passages, within one bit-width. Below zero the method is better than QuaRot; 0.01 is 1 % of \
perplexity. Interval (95 %) and p are the bootstrap's over passages (bootstrap-t, 10,000 resamples, p = (1 \
+ as extreme) / (1 + resamples); with two or three passages Student's t); with several seeds the seeds' own \
spread is added and both are Student's t. `p (Holm)` is corrected for the number of methods at that \
bit-width, and the marks follow it: `*` at 5 %, `**` at 1 %. The last column is the smallest true difference \
that one such comparison would see with 80 % power. Everything after this section is exploratory: not \
corrected for the number of comparisons, good for questions and not for claims."""
RULE = (
    "QuaRot is the row of method `quarot` with default options, else the only `quarot` row of the bit-width."
)
SEEDS = """\
Another seed draws other rotations or other calibration text; other documents would draw another sample. \
The two are kept apart: `SD` is the spread between seeds, the interval (95 %) that of the mean over seeds \
if only seeds varied (Student's t), and `sampling SE` what other documents would change, which no number \
of seeds shrinks. Differences are paired by seed; a method without randomness runs once and stands in \
every pair."""
POWER = """\
The smallest true difference that a two-sided test at 5 % would see in 80 % of runs of this size, from the \
paired standard errors at hand (median over the methods of a bit-width, one comparison, no correction): of \
log-perplexity, and of mean accuracy over tasks as in the difference to float. What is smaller can be real \
and go unseen. `flips` is the share of all documents whose answer changes between right and wrong; the last \
column is how many documents a single task would need to show one point of accuracy with as many flips, if \
no questions shared a text."""

Differences = Mapping[Row, Sequence[Mapping[str, Paired]]]
"""For every row and each of its seeds: task -> paired difference to a reference."""


@dataclass(frozen=True)
class Comparison:
    """One line of the primary comparison: a row minus the reference of its bit-width."""

    row: Row
    reference: Row
    seeds: tuple[Estimate, ...]
    difference: Estimate
    holm: float


def paired_rows(
    reference: Sequence[Cell], row: Row, columns: Sequence[Column], problems: dict[str, None]
) -> list[dict[str, Paired]]:
    """The differences of a row to reference cells, seed by seed, for the tasks that both sides have; why
    something does not pair is added to `problems`."""
    found = []
    for first, cell in same_seeds(reference, row.usable):
        pairs: dict[str, Paired] = {}
        for column in columns:
            if column.estimate(first) is None or column.estimate(cell) is None:
                continue
            try:
                pairs[column.task] = column.paired(first, cell)
            except ValueError as error:
                problems[f"{row.bits} {row.label}, {column.task}: {error}"] = None
        found.append(pairs)
    return found


def over(pairs: Sequence[Mapping[str, Paired]], columns: Sequence[Column]) -> list[Estimate]:
    """Per seed the mean difference over the columns, of the seeds that have them all."""
    whole = [pair for pair in pairs if columns and all(column.task in pair for column in columns)]
    return [inference.average([pair[column.task].difference for column in columns]) for pair in whole]


def primary(model: Model, problems: dict[str, None]) -> list[Comparison]:
    """Every row against the reference of its bit-width on the first perplexity, Holm over the methods of one
    bit-width. Empty without a perplexity; a bit-width without a reference is told to `problems`."""
    column = next(iter(model.perplexities), None)
    result: list[Comparison] = []
    for bits in dict.fromkeys(row.bits for row in model.rows if not row.first.is_float) if column else ():
        rows = [row for row in model.rows if row.bits == bits and not row.first.is_float]
        reference, why = reference_of(rows)
        if reference is None:
            problems[f"{bits}: {why}"] = None
            continue
        found: list[tuple[Row, list[Estimate]]] = []
        for row in rows:
            assert column is not None
            if row is not reference:
                found.append((row, over(paired_rows(reference.usable, row, [column], problems), [column])))
        found = [(row, seeds) for row, seeds in found if seeds]
        differences = [inference.over_seeds(seeds) for _, seeds in found]
        adjusted = inference.holm([difference.p_value() for difference in differences])
        result += [
            Comparison(row, reference, tuple(seeds), difference, p)
            for (row, seeds), difference, p in zip(found, differences, adjusted, strict=True)
        ]
    return result


def reference_of(rows: Sequence[Row]) -> tuple[Row | None, str]:
    """The QuaRot row among the rows of one bit-width (`RULE`), or None and why there is none."""
    named = [row for row in rows if row.first.record["method"].get("name") == REFERENCE]
    default = [row for row in named if _default_options(row)]
    chosen = default or named
    if len(chosen) == 1:
        return chosen[0], ""
    return None, "several rows of QuaRot could be the reference" if chosen else "there is no row of QuaRot"


def _default_options(row: Row) -> bool:
    method = row.first.record["method"]
    options = method.get("options", {}).get(REFERENCE, {})
    defaults = dataclasses.asdict(method_class(REFERENCE)())
    return all(options.get(name, value) == value for name, value in defaults.items())


def primary_section(model: Model, comparisons: Sequence[Comparison], problems: Sequence[str]) -> list[str]:
    title = "### Primary comparison: log-perplexity against QuaRot"
    column = next(iter(model.perplexities), None)
    if column is None:
        return [title, "No perplexity was measured, so there is no primary comparison."]
    said = [f"Not compared: {'; '.join(plain(problem) for problem in problems)}."] if problems else []
    if not comparisons:
        return [title, f"There is nothing to compare. {RULE}", *said]
    lines = []
    for place, found in enumerate(comparisons):
        if place == 0 or comparisons[place - 1].reference is not found.reference:
            lines.append([found.reference.bits, found.reference.label, "reference", "–", "–", "–"])
        estimate, sees = found.difference, inference.detectable(found.difference.stderr, found.difference.df)
        shown = signed(estimate, "perplexity", interval=True, p=found.holm)
        seen = f"{sees:.3f}" if math.isfinite(sees) else "–"
        lines.append(
            [found.row.bits, found.row.label, shown, p_text(estimate.p_value()), p_text(found.holm), seen]
        )
    head = ["bits", "method", f"Δ log-{column.title} [95 %]", "p", "p (Holm)", "seen with 80 % power"]
    return [title, PRIMARY.format(task=column.title), table(head, lines), RULE, *said]


def seeds_section(model: Model, comparisons: Sequence[Comparison], to_float: Differences) -> list[str]:
    """Empty without several seeds."""
    lines: list[list[str]] = []

    def add(quantity: str, row: Row, estimates: Sequence[Estimate], kind: str) -> None:
        if len(estimates) < 2:
            return
        found, scale = inference.spread(estimates), 100 if kind == "accuracy" else 1
        low, high = (scale * bound for bound in found.over.interval())
        digits = 1 if kind == "accuracy" else 3
        numbers = [f"{scale * value:.{digits}f}" for value in (found.over.value, found.sd)]
        sampling = f"{scale * found.sampling:.{digits}f}" if math.isfinite(found.sampling) else "–"
        between = f"[{low:.{digits}f}, {high:.{digits}f}]"
        lines.append([quantity, row.bits, row.label, str(found.seeds), *numbers, between, sampling])

    for column in model.perplexities:
        for row in model.rows:
            values = [value for cell in row.cells if (value := column.estimate(cell))]
            add(f"log-{column.title}", row, values, column.kind)
    for row in model.rows:
        values = [value for cell in row.cells if (value := mean_accuracy(cell, model.accuracies))]
        add("mean accuracy (%)", row, values, "accuracy")
    for found in comparisons:
        add(
            f"Δ log-{model.perplexities[0].title} to {found.reference.label}",
            found.row,
            found.seeds,
            "perplexity",
        )
    for column in model.perplexities:
        for row, pairs in to_float.items():
            add(f"Δ log-{column.title} to float", row, over(pairs, [column]), "perplexity")
    if not lines:
        return []
    head = ["quantity", "bits", "method", "seeds", "mean", "SD", "mean [95 %]", "sampling SE"]
    return ["### Seeds", SEEDS, table(head, lines)]


def power_section(model: Model, comparisons: Sequence[Comparison], to_float: Differences) -> list[str]:
    column = next(iter(model.perplexities), None)
    lines = []
    for bits in dict.fromkeys(row.bits for row in to_float):
        pairs = [pairs for row, pairs in to_float.items() if row.bits == bits]
        against = [found.difference for found in comparisons if found.row.bits == bits]
        floats = [inference.over_seeds(seeds) for p in pairs if column and (seeds := over(p, [column]))]
        means = [inference.over_seeds(seeds) for p in pairs if (seeds := over(p, model.accuracies))]
        shares, documents = _flips(pairs, model.accuracies)
        line = [bits, _visible(against), _visible(floats), _visible(means, "accuracy")]
        if shares:
            flips = statistics.median(shares)
            needed = f"{math.ceil(inference.documents_for(0.01, flips)):,}" if flips else "–"
            line += [f"{documents:,}", f"{100 * flips:.1f}", needed]
        else:
            line += ["–"] * 3
        lines.append(line)
    if not any(set(line[1:]) - {"–"} for line in lines):
        return []
    log = f"Δ log-{column.title}" if column else "Δ log-perplexity"
    head = ["bits", f"{log} to QuaRot", f"{log} to float", "Δ mean accuracy to float (points)"]
    head += ["documents", "flips (%)", "documents of one task for 1 point"]
    return ["### What this run can see", POWER, table(head, lines)]


def _visible(differences: Sequence[Estimate], kind: str = "perplexity") -> str:
    seen = [inference.detectable(estimate.stderr, estimate.df) for estimate in differences]
    known = [value for value in seen if math.isfinite(value)]
    if not known:
        return "–"
    sees = statistics.median(known)
    return f"{100 * sees:.1f}" if kind == "accuracy" else f"{sees:.3f}"


def _flips(
    rows: Sequence[Sequence[Mapping[str, Paired]]], columns: Sequence[Column]
) -> tuple[list[float], int]:
    """The share of answers that flip, of each row, and the documents of one seed of all tasks."""
    shares, most = [], 0
    for pairs in rows:
        lost, gained, n = answers(pairs, columns)
        if n:
            shares.append((lost + gained) / n)
            most = max(most, round(n / len(pairs)))
    return shares, most


def answers(pairs: Sequence[Mapping[str, Paired]], columns: Sequence[Column]) -> tuple[int, int, int]:
    """Answers lost and gained, and documents, over all seeds and right-or-wrong tasks."""
    found = [pair[column.task] for pair in pairs for column in columns if column.task in pair]
    known = [pair for pair in found if pair.lost is not None]
    lost, gained = sum(pair.lost or 0 for pair in known), sum(pair.gained or 0 for pair in known)
    return lost, gained, sum(pair.n for pair in known)
