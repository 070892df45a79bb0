"""The report's section on what methods learned: their cost in tokens, convergence, and what more
calibration text would have brought. Drawn from the records of the cells."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from harness import inference, plots
from harness.inputs import diagnostic, diagnostics, one_width
from harness.markdown import table
from harness.records import Column, Model, Record, Row, number
from harness.tables import perplexity_of

TOKENS = """\
Tokens: what the learner was shown in all, how many of them lie in different windows of the calibration \
text (which may overlap), and for SpinQuant the 800 x 2,048 of its paper. Loss: cross-entropy in nats of the \
quantised network (SpinQuant), or distance of kurtosis from 1.8 (KurTail), at the first and last step, each \
on what that step saw. Error: the largest max|RRᵀ - I| that a step left, before the final decomposition \
makes R orthogonal to 1e-12. What is kept is learned once for all bit-widths; the section on costs says how \
long it took."""
CONVERGENCE = """\
*The loss that each learner descends on, against its steps (first seed; mean of the last ten): a noisy line \
where every step sees other tokens. Where it has not flattened, more steps or more text may still help.*"""
TUNED = """\
Of the rounded and quantised network: weights kept in full precision and scales that were tuned, tokens that \
were shown (in brackets how many of them are different), and its cross-entropy in nats before and after, on \
so many windows each of what it was tuned on and of calibration text that it was not. Unlike what is learned \
before rounding, this belongs to one bit-width. The section on costs says how long it took."""
SIZES = """\
*Perplexity, and kurtosis on tuning text, against the number of sequences that were learned from, over the \
seeds that all points share; rounding reads the same calibration text throughout. Bars are one standard \
error, of which other documents would move all points alike: paired differences between points stand \
under the options of one method. Where the lines are flat, more text does not help, up to the most that \
was tried.*"""


def learning_section(model: Model, figures: Path, stem: str) -> list[str]:
    """Writes the figures, returns their text; empty where no cell has learned anything."""
    learned = {row: facts for row in one_width(model) if (facts := _facts(row))}
    text = []
    if learned:
        text += [
            "### What was learned",
            _tokens(learned),
            TOKENS,
            *_convergence(learned, model, figures, stem),
        ]
    return [*text, *_tuning(model), *_sizes(model, figures, stem)]


def _facts(row: Row) -> dict[str, Record]:
    """What the methods of a row learned, by method: those that keep a log of at least one step."""
    learned = diagnostic(row, "learned") or {}
    logged = {name: list((facts.get("log") or {}).values()) for name, facts in learned.items()}
    return {name: learned[name] for name, logs in logged.items() if logs and all(log["loss"] for log in logs)}


def _tokens(learned: Mapping[Row, Mapping[str, Record]]) -> str:
    lines = []
    for row, methods in learned.items():
        for facts in methods.values():
            tokens = facts.get("tokens") or {}
            seen = f"{tokens.get('seen', tokens.get('passed', 0)):,}"
            if tokens.get("paper"):
                share = f"{tokens['seen'] / tokens['paper']:.1%}"
                seen += f" ({tokens['different']:,} different), {share} of the paper's {tokens['paper']:,}"
            elif tokens.get("kept"):
                seen += f" passed, {tokens['kept']:,} rows of each site kept"
            for what, log in facts["log"].items():
                ends = f"{number(log['loss'][0]):.3f} → {number(log['loss'][-1]):.3f}"
                error = f"{max(map(number, log['error'])):.0e}"
                lines.append([row.label, what, len(log["loss"]), seen, ends, error])
    return table(["method", "matrices", "steps", "tokens", "loss", "error"], lines)


def _convergence(
    learned: Mapping[Row, Mapping[str, Record]], model: Model, figures: Path, stem: str
) -> list[str]:
    panels: dict[tuple[str, str], dict[str, Sequence[float]]] = {}
    for row, methods in learned.items():
        for name, facts in methods.items():
            for what, log in facts["log"].items():
                panels.setdefault((name, what), {})[row.label] = [number(loss) for loss in log["loss"]]
    drawn = [
        plots.LearningPanel(f"{name}: loss of {what}", series) for (name, what), series in panels.items()
    ]
    plots.learning_figure(figures / f"{stem}-learning.svg", drawn, model.labels)
    return [f"![Loss of each learner against its steps](figures/{stem}-learning.svg)", CONVERGENCE]


def _tuning(model: Model) -> list[str]:
    """Of the first seed of each row that has been tuned; empty where none has."""
    lines = []
    for row in model.rows:
        learned = (row.first.record.get("diagnostics") or {}).get("learned") or {}
        for facts in learned.values():
            if "tuning" in facts:
                said = facts["tuning"]
                sizes, tokens = said["parameters"], said["tokens"]
                line = [row.bits, row.label, f"{sizes['kept']:,}", f"{sizes['scale']:,}", len(said["loss"])]
                line.append(f"{tokens['seen']:,} ({tokens['different']:,})")
                for text in ("tuned_on", "held_out"):
                    ends = (number(said[text][when]) for when in ("before", "after"))
                    line.append(" → ".join(f"{loss:.3f}" for loss in ends))
                lines.append([*line, said["held_out"]["windows"]])
    if not lines:
        return []
    head = ["bits", "method", "kept weights", "scales", "steps", "tokens", "loss, tuned on", "loss, held out"]
    return ["### What was tuned", table([*head, "windows"], lines), TUNED]


def _sizes(model: Model, figures: Path, stem: str) -> list[str]:
    """The curve over the number of calibration sequences, for methods with rows that differ in it alone."""
    column = next(iter(model.perplexities), None)
    if column is None:
        return []
    groups: dict[str, list[tuple[int, Row]]] = {}
    for row in model.rows:
        for name, facts in _facts(row).items():
            if facts.get("sequences"):
                method = row.first.record["method"]
                options = dict((method.get("options") or {}).get(name) or {}, sequences=None)
                key = json.dumps([row.bits, method["name"], options], sort_keys=True, default=str)
                groups.setdefault(key, []).append((int(facts["sequences"]), row))
    curves = {}
    for rows in groups.values():
        if len({size for size, _ in rows}) > 1:
            ordered = sorted(rows, key=lambda item: item[0])
            label = f"{ordered[0][1].first.record['method']['name']}, {ordered[0][1].bits}"
            seeds = set.intersection(*({cell.seed for cell in row.with_(column)} for _, row in ordered))
            curves[label] = [(size, *_at_size(row, column, seeds)) for size, row in ordered] if seeds else []
    curves = {label: points for label, points in curves.items() if points}
    if not curves:
        return []
    plots.sizes_figure(figures / f"{stem}-sizes.svg", column.title, curves)
    lines = [
        [label, f"{size:,}", f"{value:.2f}", f"{kurtosis:.3f}"]
        for label, points in curves.items()
        for size, value, _, kurtosis in points
    ]
    return [
        "### How much calibration text it takes",
        table(["method", "sequences", column.title, "kurtosis"], lines),
        f"![Perplexity and kurtosis against calibration sequences](figures/{stem}-sizes.svg)",
        SIZES,
    ]


def _at_size(row: Row, column: Column, seeds: Collection[int]) -> tuple[float, float, float]:
    """Perplexity with its standard error, and mean kurtosis over sites, over these seeds."""
    cells = [cell for cell in row.cells if cell.seed in seeds]
    value, stderr = perplexity_of(inference.over_seeds([e for cell in cells if (e := column.estimate(cell))]))
    found = [number(point["after"]) for cell in cells for point in diagnostics(cell).get("kurtosis") or ()]
    return value, stderr, sum(found) / len(found) if found else math.nan
