"""The report of a run: Markdown and figures from the cells' records, and the table for the terminal.

    python -m harness.report RUN_FOLDER

It reads <run>/<cell id>/cell.json with the samples beside it and writes <run>/report.md and
<run>/figures/*.svg. Equal records give equal bytes. Costs are measured and vary, so they stand in a
section of their own, after everything that a second run reproduces.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from harness import plots, stats
from harness.records import (
    Cell,
    Column,
    Model,
    Record,
    Row,
    Run,
    mean_accuracy,
    models_of,
    number,
    overall,
    read_run,
    unranked,
    weights_only,
)
from harness.stats import Estimate
from harness.tables import (
    calibration_text,
    count_text,
    distinct,
    effective_bits,
    flag_note,
    mean_accuracy_text,
    perplexity_of,
    plain,
    quantisers_text,
    reason_text,
    signed,
    table,
    upstream_text,
    value_text,
)
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError

SITES = ("attention", "mlp")
GUIDE = """\
Each row is one method at one bit-width: `w4a4kv4` means 4 bits for weights, activations (the inputs of \
linears) and KV cache; what is not named is not quantised. Effective bits count scales and zero-points: per \
weight of the quantised linears, per activation, per KV entry, and per parameter of the whole model, whose \
embedding and lm_head stay at 16 bits. Perplexity is better when lower, accuracy when higher. `±` is one \
standard error: how far the number would move with other documents. All rows answer the same documents, so \
compare methods by the *difference to float* table, which is paired document by document, and not by whether \
two `±` overlap."""
MARKS = """\
Method minus float: a positive Δ log-perplexity and a negative Δ accuracy are losses (a Δ log-perplexity of \
0.01 is 1 % of perplexity). `±` is the standard error of the paired difference. `*` marks |Δ|/SE beyond the \
two-sided 5 % point of Student's t, `**` beyond the 1 % point; for one task's accuracy with a single seed \
McNemar's exact test has to agree. Marks are per comparison and not corrected for their number: without any \
real difference about one in twenty would still carry one. No mark does not mean equal."""
SEEDS = """\
Several seeds: the mean over seeds (of perplexity the geometric mean). `±` joins the sampling error, which \
does not shrink with seeds because they share their documents, and the error of the mean over seeds."""


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write report.md and its figures from the records of a run into `out` (None: the run's own folder);
    returns the report's path.

    Raises UserError when there is nothing to report.
    """
    folder = Path(run_folder)
    run = read_run(folder)
    models = models_of(run.cells)
    out = folder if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    text = [f"# quantgrid: {folder.resolve().name}", GUIDE]
    for place, model in enumerate(models):
        twin = any(other.slug == model.slug for other in models[:place])
        stem = f"{model.slug}-{place + 1}" if twin else model.slug
        text += _model_section(model, out / "figures", stem)
    text += _tasks_section(run.cells, models)
    text += _settings_section(run)
    text += _notes_section(models)
    text += _failures_section(run)
    text += _cost_section(models)
    path = out / "report.md"
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return path


def headline(cells: Sequence[Record]) -> str:
    """The table of a run for the terminal: perplexities and mean accuracy of every row of every model."""
    wrapped = [Cell(record) for record in cells]
    blocks = []
    for model in models_of(wrapped):
        columns = [column for column in model.columns if column.kind == "perplexity"]
        header = ["bits", "method", *(column.title for column in columns)]
        header += ["mean accuracy (%)"] if model.accuracies else []
        lines = []
        for row in model.rows:
            line = [row.bits, row.label, *(value_text(row, column) for column in columns)]
            lines.append([*line, mean_accuracy_text(row, model.accuracies)] if model.accuracies else line)
        name = f"{model.record['name']}, {model.record.get('label', '')}".rstrip(", ")
        blocks.append(f"{name}\n\n" + tabulate(lines, header, tablefmt="simple", disable_numparse=True))
    unfinished = sum(cell.state in ("failed", "partial") for cell in wrapped)
    tail = (
        f"{unfinished} of {len(cells)} cells failed or are not finished: see the report" if unfinished else ""
    )
    return "\n\n".join([*blocks, *([tail] if tail else [])])


def _model_section(model: Model, figures: Path, stem: str) -> list[str]:
    record = model.record
    head = ["bits", "method", *(["seeds"] if model.several_seeds else []), *(["rank"] if model.ranks else [])]
    head += [column.title + " (%)" * (column.kind == "accuracy") for column in model.columns]
    head += [*(["mean accuracy (%)"] if model.accuracies else []), "effective bits w / a / kv / model"]
    lines, flags = [], set()
    for row in model.rows:
        out, weights = unranked(record, row), weights_only(record, row)
        flags |= {out, weights}
        line = [row.bits, f"{row.label} {weights}".strip()]
        if model.several_seeds:
            done = sum(cell.state == "done" for cell in row.cells)
            line.append(str(done) if done == len(row.cells) else f"{done} of {len(row.cells)}")
        if model.ranks:
            line.append(f"{model.ranks.get(row, '–')} {out}".strip())
        line += [value_text(row, column) for column in model.columns]
        line += [mean_accuracy_text(row, model.accuracies)] if model.accuracies else []
        lines.append([*line, effective_bits(row.first)])
    facts = [str(record.get("label") or ""), f"{record['family']} family" if record.get("family") else ""]
    facts += [f"{record['parameters'] / 1e6:,.1f} M parameters"] if record.get("parameters") else []
    notes = (
        [f"Rank: by {model.columns[0].title} within one bit-width; it does not say how sure the order is."]
        if model.ranks
        else []
    )
    notes += [SEEDS] if model.several_seeds else []
    notes += [flag_note(record, flag) for flag in "†‡§" if flag in flags]
    text = [f"## {record['name']}", ", ".join(filter(None, facts)), table(head, lines), *notes]
    figure_text = _bits_section(model, figures, stem) + _kurtosis_section(model, figures, stem)
    return [*filter(None, text), *_difference_section(model), *figure_text]


def _difference_section(model: Model) -> list[str]:
    title = "### Difference to float"
    if not model.floats:
        return [title, "No float cell of this model is finished in this run, so no differences are shown."]
    columns = [column for column in model.columns if column.kind != "other"]
    head = ["bits", "method"]
    head += [f"Δ log-{c.title}" if c.kind == "perplexity" else f"Δ {c.title} (%)" for c in columns]
    head += ["Δ mean accuracy (%)", "answers lost / gained (%)"] if model.accuracies else []
    problems: dict[str, None] = {}
    lines = [
        [row.bits, row.label, *_differences(model, row, columns, problems)]
        for row in model.rows
        if not row.first.is_float
    ]
    if not lines:
        return [title, "There is no other cell of this model in this run."]
    notes = ["Not paired: " + "; ".join(plain(problem) for problem in problems)] if problems else []
    return [title, table(head, lines), MARKS, *notes]


def _differences(model: Model, row: Row, columns: Sequence[Column], problems: dict[str, None]) -> list[str]:
    """The cells of a line of the difference table; why something does not pair is added to `problems`."""
    pairs: dict[str, list[stats.Paired | None]] = {column.task: [] for column in columns}
    for cell in row.cells:
        reference = next((other for other in model.floats if other.seed == cell.seed), model.floats[0])
        for column in columns:
            pair = None
            if column.estimate(cell) is not None:
                try:
                    pair = column.paired(reference, cell)
                except ValueError as error:
                    problems[f"{row.bits} {row.label}, {column.task}: {error}"] = None
            pairs[column.task].append(pair)
    line = []
    for column in columns:
        found = [pair for pair in pairs[column.task] if pair]
        total = stats.over_seeds([pair.difference for pair in found]) if found else None
        line.append(signed(total, column.kind, found[0].mcnemar if len(found) == 1 else None))
    if model.accuracies:
        by_cell = list(zip(*(pairs[column.task] for column in model.accuracies), strict=True))
        whole = [stats.average([p.difference for p in cell if p]) for cell in by_cell if all(cell)]
        line.append(signed(stats.over_seeds(whole) if whole else None, "accuracy"))
        flips = [p for cell in by_cell for p in cell if p and p.lost is not None and p.gained is not None]
        n = sum(pair.n for pair in flips)
        lost, gained = sum(pair.lost or 0 for pair in flips), sum(pair.gained or 0 for pair in flips)
        line.append(f"{100 * lost / n:.1f} / {100 * gained / n:.1f}" if n else "–")
    return line


def _bits_section(model: Model, figures: Path, stem: str) -> list[str]:
    perplexity = next((column for column in model.columns if column.kind == "perplexity"), None)
    panels = []
    if perplexity:
        panels.append(
            _panel(model, f"{perplexity.title} (log scale, lower is better)", perplexity.estimate, True)
        )
    if model.accuracies:
        panels.append(
            _panel(model, "mean accuracy, % (higher is better)", lambda c: mean_accuracy(c, model.accuracies))
        )
    bits = list(dict.fromkeys(row.bits for row in model.rows if not row.first.is_float))
    if not any(panel.series for panel in panels):
        return []
    plots.bits_figure(figures / f"{stem}-bits.svg", bits, panels, model.labels)
    return [
        "### Accuracy against bits",
        f"![Perplexity and mean accuracy of each method against bit-width](figures/{stem}-bits.svg)",
        "*Each line is a method, from more bits on the left to fewer on the right; bars are one standard "
        "error. The nearer a line stays to the dashed float line, the better; where it leaves that line is "
        "where the method stops being enough.*",
    ]


def _panel(
    model: Model, title: str, of_cell: Callable[[Cell], Estimate | None], log: bool = False
) -> plots.Panel:
    series: dict[str, list[tuple[str, float, float]]] = {}
    reference = None
    for row in model.rows:
        estimate = overall(row, of_cell)
        if estimate is None:
            continue
        value, stderr = perplexity_of(estimate) if log else (100 * estimate.value, 100 * estimate.stderr)
        if row.first.is_float:
            reference = value if math.isfinite(value) else None
        else:
            series.setdefault(row.label, []).append((row.bits, value, stderr))
    return plots.Panel(title, series, reference, log)


def _kurtosis_section(model: Model, figures: Path, stem: str) -> list[str]:
    measured: dict[str, list[Record]] = {}
    for row in model.rows:  # fewest bits come last and win: the transform is the same at every bit-width
        for cell in () if row.first.is_float else row.cells[:1]:
            points = cell.record.get("diagnostics", {}).get("kurtosis")
            if points:
                measured[row.label] = points
    sites = list(dict.fromkeys(str(point["site"]) for points in measured.values() for point in points))
    panels, changed = [], set()
    for site in sorted(sites, key=lambda site: (*SITES, site).index(site)):
        before: list[tuple[int, float]] = []
        after: dict[tuple[tuple[int, float], ...], tuple[str, ...]] = {}
        for label, points in measured.items():
            here = [point for point in points if point["site"] == site]
            first = [(int(point["layer"]), number(point["before"])) for point in here]
            then = tuple((int(point["layer"]), number(point.get("after"))) for point in here)
            before = before or first
            moved = any(abs(b - a) > 1e-3 * abs(a) for (_, a), (_, b) in zip(first, then, strict=True))
            if moved:  # methods without a transform stay on the line of before
                changed.add(label)
                after[then] = (*after.get(then, ()), label)
        title = {"attention": "attention inputs", "mlp": "MLP inputs"}.get(site, site)
        panels.append(plots.KurtosisPanel(title, before, {names: line for line, names in after.items()}))
    if not panels:
        return []
    plots.kurtosis_figure(figures / f"{stem}-kurtosis.svg", panels, model.labels)
    unchanged = sorted(measured.keys() - changed)
    same = f" Without a transform, on the grey line: {', '.join(unchanged)}." if unchanged else ""
    return [
        "### Outliers before and after the transform",
        f"![Kurtosis of activations per layer before and after each transform](figures/{stem}-kurtosis.svg)",
        "*Mean kurtosis of a token's activations in each layer (4th standardised moment, log scale): high "
        "means a few outlier channels that a 4-bit grid must stretch to. A transform that works pulls its "
        f"line from the grey one down to the Gaussian's 3 or below, towards the uniform's 1.8.{same}*",
    ]


def _tasks_section(cells: Sequence[Cell], models: Sequence[Model]) -> list[str]:
    columns = {column.task: column for model in models for column in model.columns}
    lines, differences = [], []
    for name, column in columns.items():
        entries = [cell.task(name) for cell in cells if cell.task(name)]
        unit = "windows" if column.kind == "perplexity" else "documents"
        chances = (None if (chance := e.get("chance")) is None else f"{100 * chance:.1f}" for e in entries)
        counts = distinct(count_text(entry, unit) for entry in entries)
        protocol = distinct(entry.get("protocol") for entry in entries)
        metric = "perplexity" if column.kind == "perplexity" else column.metric or "–"
        lines.append([name, metric, distinct(chances), counts, protocol])
        departs = distinct(upstream_text(entry) for entry in entries)
        differences += [f"- **{name}** {plain(departs)}"] if departs != "–" else []
    text = ["## Tasks and protocols"]
    text += [table(["task", "metric", "chance (%)", "scored", "protocol"], lines) if lines else "none"]
    return [
        *text,
        *(
            ["Differences from the tasks of the same name upstream:", "\n".join(differences)]
            * bool(differences)
        ),
    ]


def _settings_section(run: Run) -> list[str]:
    values: dict[str, list[str]] = {}
    for cell in run.cells:
        record = cell.record
        model, calibration = record["model"], record.get("calibration") or {}
        environment = record.get("environment") or {}
        text: dict[str, Any] = {
            "model": f"{model['name']}, {model.get('label')}, sha256 {str(model.get('sha256'))[:12]}",
            "calibration": calibration_text(calibration),
            **({} if cell.is_float else {f"quantisers at {cell.bits}": quantisers_text(record, cell.bits)}),
            "execution": record.get("execution"),
            "dtype": record.get("dtype"),
            "batch_size": record.get("batch_size"),
            "seed": cell.seed,
            **environment,
            "command": f"`{record['command']}`" if record.get("command") else None,
        }
        for key, value in text.items():
            values.setdefault(key, []).append("" if value in (None, {}) else str(value))
    lines = [[key.replace("_", " "), distinct(found)] for key, found in values.items() if any(found)]
    section = ["## Settings", table(["setting", "value"], lines) if lines else "none"]
    if run.others:
        section.append(f"Cells of other commands in this folder, not in this report: {run.others}.")
    return section


def _notes_section(models: Sequence[Model]) -> list[str]:
    notes: dict[str, dict[str, None]] = {}
    for row in (row for model in models for row in model.rows):
        for cell in row.cells:
            method = cell.record["method"]
            said = [f"`{method['spec']}`"] if method.get("spec") else []
            said += [str(method["paper"])] if method.get("paper") else []
            notes.setdefault(row.label, {}).update(dict.fromkeys([*said, *method.get("notes", [])]))
    lines = [
        f"- **{plain(label)}**: {'; '.join(plain(n) for n in said) or 'nothing to note'}"
        for label, said in sorted(notes.items())
    ]
    return ["## Notes on methods", "\n".join(lines) or "none"]


def _failures_section(run: Run) -> list[str]:
    lines = [[name, "–", "–", reason] for name, reason in run.missing]
    inapplicable = []
    for cell in sorted(run.cells, key=lambda cell: str(cell.record["id"])):
        record, failure = cell.record, cell.record.get("failure") or {}
        what = f"{record['model']['name']}, {record['method']['row']}, {record['bits']}, seed {cell.seed}"
        if cell.state == "n/a":
            inapplicable.append([record["id"], what, reason_text(failure)])
        elif failure or cell.state == "failed":
            lines.append([record["id"], what, failure.get("stage", "–"), reason_text(failure)])
        broken = {n: e for n, e in record.get("tasks", {}).items() if e.get("status", "done") != "done"}
        lines += [[record["id"], what, n, reason_text(e.get("failure") or {})] for n, e in broken.items()]
        if cell.state == "partial" and not failure and not broken:
            lines.append([record["id"], what, "–", "not finished: the run was stopped"])
    text = ["## Failures", table(["cell", "what", "stage", "reason"], lines) if lines else "none"]
    if inapplicable:
        text += ["### Not applicable", table(["cell", "what", "reason"], inapplicable)]
    return text


def _cost_section(models: Sequence[Model]) -> list[str]:
    stages = ("load", "learn", "transform", "round", "evaluate")
    lines = []
    for name, row in ((str(model.record["name"]), row) for model in models for row in model.rows):
        costs = [cell.record["measured"] for cell in row.cells if cell.record.get("measured")]
        if not costs:
            continue
        line = [name, row.bits, row.label]
        for stage in stages:
            seconds = [cost["seconds"][stage] for cost in costs if stage in cost.get("seconds", {})]
            line.append(f"{sum(seconds) / len(seconds):.1f}" if seconds else "–")
        memory = [cost["peak_memory_bytes"] for cost in costs if cost.get("peak_memory_bytes")]
        lines.append([*line, f"{max(memory) / 2**30:.2f}" if memory else "–"])
    head = ["model", "bits", "method", *(f"{stage} (s)" for stage in stages), "peak memory (GiB)"]
    note = "As measured on the machine of the settings: mean over seeds, of memory the largest."
    return ["## Cost", *([table(head, lines), note] if lines else ["not recorded"])]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m harness.report", description="Write the report of a run."
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="a folder that the grid wrote")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: RUN_FOLDER)")
    arguments = parser.parse_args(argv)
    try:
        refuse_foreign_kernels()
        print(write_report(arguments.run_folder, arguments.out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
