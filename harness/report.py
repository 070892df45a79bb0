"""The report of a run: Markdown and figures from the cells' records, and the table for the terminal.

    python -m harness.report RUN               # a folder that the grid wrote, or its archive (archive.py)
    python -m harness.report --published       # what papers report, which reports set beside ours

It reads <run>/<cell id>/cell.json with the samples beside it and writes <run>/report.md, <run>/figures/*.svg
and <run>/report.html, one file that holds all of it (page.py). Equal records give equal bytes. Costs are
measured and vary, so they stand in a section of their own, with the command and commit, after everything that
a second run reproduces.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from harness import published, store
from harness.ablation import ablation_section, online_section
from harness.archive import is_archive, opened
from harness.beside import beside_section
from harness.boosting import boosting_section
from harness.costs import cost_section
from harness.equal_bits import equal_bits_section
from harness.evidence import (
    Comparison,
    Differences,
    paired_rows,
    power_section,
    primary,
    primary_section,
    seeds_section,
)
from harness.fidelity import difference_section, fidelity_section, recovery_section
from harness.figures import bits_section, errors_section, heat_section, kurtosis_section
from harness.gains import change, gains_section
from harness.inputs import inputs_section
from harness.learning import learning_section
from harness.markdown import compact, plain, table
from harness.page import page
from harness.records import (
    Cell,
    Model,
    Record,
    Run,
    models_of,
    number,
    read_run,
    unranked,
    weights_only,
)
from harness.reproduce import again_section, grid_section
from harness.store import os_reason
from harness.tables import (
    calibration_text,
    count_text,
    distinct,
    effective_bits,
    flag_notes,
    mark,
    mean_accuracy_text,
    options_text,
    output_text,
    quantisers_text,
    reason_text,
    upstream_text,
    value_text,
)
from harness.tradeoffs import pareto_section
from harness.twins import twins_section
from kernels.command import run_command
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError

FIGURES = "figures"
EFFECTIVE = "effective bits w / a / kv / model"
GUIDE = """\
Each row is one method at one bit-width: `w4a4kv4` means 4 bits for weights, activations (the inputs of \
linears) and KV cache; what is not named is not quantised. Effective bits count scales and zero-points: \
per weight of the quantised linears, per activation, per KV entry, and per parameter of the whole model, \
whose embedding and lm_head stay at 16 bits. Perplexity is better when lower, accuracy when higher. \
Brackets hold 95 % intervals, `±` is one standard error: how far the number would move with other \
documents. All rows answer the same documents, so compare methods by their paired *differences*, and not \
by whether two intervals overlap."""
AGAINST = "against QuaRot (%)"
MARKS = """\
Against QuaRot: change of {} in percent, below zero the method is better; `*` marks p below 5 %, `**` \
below 1 %, corrected for the number of methods at that bit-width (the primary comparison below). What has \
no mark may be chance."""
SEEDS = """\
Several seeds: the mean over seeds (of perplexity the geometric mean); interval and `±` join the sampling \
error, which does not shrink with seeds because they share their documents, and the error of the mean over \
seeds. Two or three seeds hardly tell how far seeds differ: where a row's `SD` is far below those of its \
neighbours, its interval is too narrow by luck."""


def write_report(
    run_folder: Path, out: Path | None = None, *, manifest: dict[str, Any] | None = None
) -> Path:
    """Write report.md, its figures and report.html from the records of a run into `out` (None: the run's own
    folder); returns the path of report.md. Each file is replaced whole or not at all.

    `manifest` is what run.json holds ("cells", "tasks" and "grid" of the run), for a caller whose run.json
    another command may have replaced; None reads the file.

    Raises UserError when there is nothing to report, or a file cannot be read or written.
    """
    folder = Path(run_folder)
    out = folder if out is None else Path(out)
    try:
        return _write(folder, out, manifest)
    except OSError as error:
        raise UserError(f"report {out}: {os_reason(error)}") from error


def _write(folder: Path, out: Path, manifest: dict[str, Any] | None) -> Path:
    run = read_run(folder, manifest)
    models = models_of(run.cells)
    out.mkdir(parents=True, exist_ok=True)
    name, figures = folder.resolve().name, out / FIGURES
    text, named = [f"# quantgrid: {name}", GUIDE], []
    for place, model in enumerate(models):
        twin = any(other.slug == model.slug for other in models[:place])
        named.append((model, f"{model.slug}-{place + 1}" if twin else model.slug))
        text += _model_section(model, figures, named[-1][1])
    text += twins_section(models)
    text += _tasks_section(run.cells, models)
    text += [*_settings_section(run), *grid_section(run)]
    text += _notes_section(models)
    text += _failures_section(run)
    text += cost_section(run, named, figures)
    text += again_section(run, name)
    path = out / "report.md"
    store.write_text(out / "report.html", page(f"quantgrid: {name}", text, out))
    # Last: where it is new, so is all that it shows.
    store.write_text(path, compact("\n\n".join(text) + "\n"))
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
    facts = [str(record.get("label") or ""), f"{record['family']} family" if record.get("family") else ""]
    facts += [f"{record['parameters'] / 1e6:,.1f} M parameters"] if record.get("parameters") else []
    unequal: dict[str, None] = {}
    comparisons = primary(model, unequal)
    text = [f"## {record['name']}", ", ".join(filter(None, facts)), *_main_table(model, comparisons)]
    if any(not row.first.is_float for row in model.rows):
        text += primary_section(model, comparisons, list(unequal))
    text += _tasks_table(model)
    problems: dict[str, None] = {}
    to_float: Differences = {}
    if model.floats:
        to_float = {
            row: paired_rows(model.floats, row, model.comparable, problems)
            for row in model.rows
            if not row.first.is_float
        }
    further = [*fidelity_section(model, to_float, problems), *recovery_section(model, problems)]
    text += [
        *difference_section(model, to_float, list(problems)),
        *heat_section(model, to_float, figures, stem),
    ]
    text += further
    text += [*ablation_section(model), *online_section(model)]
    text += [*seeds_section(model, comparisons, to_float), *power_section(model, comparisons, to_float)]
    text += boosting_section(model, figures, stem)
    text += [*bits_section(model, figures, stem), *pareto_section(model, figures, stem)]
    text += [*kurtosis_section(model, figures, stem), *inputs_section(model, figures, stem)]
    text += errors_section(model, figures, stem)
    text += [*equal_bits_section(model), *gains_section(model), *learning_section(model, figures, stem)]
    text += beside_section(model)
    return list(filter(None, text))


def _main_table(model: Model, comparisons: Sequence[Comparison]) -> list[str]:
    """The headline numbers with their intervals, and what the primary comparison says of each row."""
    record, against = model.record, {found.row: found for found in comparisons}
    references = {found.reference for found in comparisons}
    head = ["bits", "method", *(["seeds"] if model.several_seeds else []), *(["rank"] if model.ranks else [])]
    head += [f"{column.title} [95 %]" for column in model.perplexities]
    head += ["mean accuracy (%) [95 %]"] if model.accuracies else []
    head += [*([AGAINST] if comparisons else []), EFFECTIVE]
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
        line += [value_text(row, column, interval=True) for column in model.perplexities]
        line += [mean_accuracy_text(row, model.accuracies, interval=True)] if model.accuracies else []
        if comparisons:
            found = against.get(row)
            shown = change(found.difference) + mark(found.holm) if found else "–"
            line.append("reference" if row in references else shown)
        lines.append([*line, effective_bits(row.first)])
    notes = (
        [f"Rank: by {model.columns[0].title} within one bit-width; it does not say how sure the order is."]
        if model.ranks
        else []
    )
    notes += [MARKS.format(model.columns[0].title)] if comparisons else []
    notes += [SEEDS] if model.several_seeds else []
    notes += flag_notes(record, flags)
    return [table(head, lines), *notes]


def _tasks_table(model: Model) -> list[str]:
    columns = [column for column in model.columns if column.kind != "perplexity"]
    if not columns:
        return []
    head = [f"{column.title} (%)" if column.kind == "accuracy" else column.title for column in columns]
    lines = [[row.bits, row.label, *(value_text(row, column) for column in columns)] for row in model.rows]
    return ["### Scores by task", table(["bits", "method", *head], lines)]


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
        data = distinct(str(entry["data"])[:12] for entry in entries if entry.get("data"))
        lines.append([name, metric, distinct(chances), counts, protocol, data])
        departs = distinct(upstream_text(entry) for entry in entries)
        differences += [f"- **{name}** {plain(departs)}"] if departs != "–" else []
    head = ["task", "metric", "chance (%)", "scored", "protocol", "data, sha256"]
    text = ["## Tasks and protocols", table(head, lines) if lines else "none"]
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
            # A float cell has nothing to execute otherwise: it is the same cell in every grid.
            "execution": None if cell.is_float else record.get("execution"),
            "dtype": record.get("dtype"),
            "batch_size": record.get("batch_size"),
            "seed": cell.seed,
            **environment,
            **_batch_spread(record),
            f"options of {record['method']['row']}": options_text(record["method"]),
        }
        for key, value in text.items():
            values.setdefault(key, []).append("" if value in (None, {}) else str(value))
    lines = [[key.replace("_", " "), distinct(found)] for key, found in values.items() if any(found)]
    section = ["## Settings", table(["setting", "value"], lines) if lines else "none"]
    if run.others:
        section.append(f"Cells of other commands in this folder, not in this report: {run.others}.")
    return section


def _batch_spread(record: Record) -> dict[str, str]:
    """What the batch changes on a GPU, where it was measured."""
    spread = (record.get("diagnostics") or {}).get("batch_spread")
    if not spread:
        return {}
    return {
        f"batch {spread['batch_size']} against 1": f"{spread['task']}, {spread['documents']} documents: "
        f"log-likelihoods differ by {number(spread['mean_abs']):.2g} on average and "
        f"{number(spread['max_abs']):.2g} at most, answers changed: {spread['changed_answers']}"
    }


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
    lines = [[name, "–", "–", reason, "–"] for name, reason in run.missing]
    inapplicable = []
    for cell in sorted(run.cells, key=lambda cell: str(cell.record["id"])):
        record, failure = cell.record, cell.record.get("failure") or {}
        what = f"{record['model']['name']}, {record['method']['row']}, {record['bits']}, seed {cell.seed}"
        if cell.state == "n/a":
            inapplicable.append([record["id"], what, reason_text(failure)])
        elif failure or cell.state == "failed":
            stage = failure.get("stage", "–")
            lines.append([record["id"], what, stage, reason_text(failure), output_text(failure)])
        broken = {n: e for n, e in record.get("tasks", {}).items() if e.get("status", "done") != "done"}
        for name, entry in broken.items():
            fault = entry.get("failure") or {}
            lines.append([record["id"], what, name, reason_text(fault), output_text(fault)])
        if cell.state == "partial" and not failure and not broken:
            lines.append([record["id"], what, "–", "not finished: the run was stopped", "–"])
    head = ["cell", "what", "stage", "reason", "last output"]
    text = ["## Failures", table(head, lines) if lines else "none"]
    if inapplicable:
        text += ["### Not applicable", table(["cell", "what", "reason"], inapplicable)]
    return text


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m harness.report", description="Write the report of a run, or what papers report."
    )
    what = result.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "run_folder", type=Path, nargs="?", metavar="RUN", help="a folder that the grid wrote, or its archive"
    )
    what.add_argument("--published", action="store_true", help="what papers report (methods/published)")
    result.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where it goes (default: RUN; --published: the terminal)",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        refuse_foreign_kernels()
        if not arguments.published:
            if arguments.out is None and is_archive(arguments.run_folder):
                raise UserError(f"{arguments.run_folder} is an archive: say with --out where the report goes")
            with opened(arguments.run_folder) as folder:
                print(write_report(folder, arguments.out))
        elif arguments.out is not None:
            print(published.write(arguments.out))
        else:
            print(published.render(published.papers()), end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
