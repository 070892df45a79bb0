"""The report's sections on how near each row stays to the float model: differences, divergence, answers that
flip, recovery. All of it is exploratory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from harness import inference, stats
from harness.evidence import Differences, answers, over
from harness.markdown import plain, table
from harness.records import Cell, Column, Model, Record, Row, number, same_seeds
from harness.stats import Estimate
from harness.tables import distinct, signed, with_error

DIFFERENCES = """\
Method minus float (exploratory): a positive Δ log-perplexity and a negative Δ accuracy are losses. \
Brackets are 95 % intervals, `±` one standard error, both of the paired difference. `*` marks p below 5 %, \
`**` below 1 %: by bootstrap for log-perplexity, by McNemar's exact test for one task's accuracy (where \
questions share a text, with that text's answers changing sign together), by Student's t for means and \
several seeds. Marks are per comparison: without any real difference about one in twenty would still carry \
one. No mark does not mean equal."""
DIVERGENCE = """\
Per token, over the perplexity texts (exploratory): the Kullback-Leibler divergence of the row's \
next-token distribution from float's in nats, and how often both find the same token likeliest. `±` is one \
standard error (bootstrap over passages)."""
ANSWERS = """\
Documents whose answer changed from right to wrong and from wrong to right, in % of all; accuracy shows \
only their difference. Then the mean log-likelihood of the right answer of each multiple-choice task \
(nats): float's own, and each row's paired difference to it (`±` and marks as above), which moves before \
accuracy does."""
RECOVERY = """\
(accuracy - chance) / (float's accuracy - chance) in %, with the 95 % interval of a bootstrap that draws \
the same documents for both (exploratory); with several seeds their mean, with the interval of Student's t \
that joins the documents' error and the seeds' own. Shown only where float exceeds both chance and always \
giving the most frequent answer by three standard errors; elsewhere the quotient would be noise."""
SURE = 3.0


def difference_section(model: Model, to_float: Differences, problems: Sequence[str]) -> list[str]:
    title = "### Difference to float"
    if not model.floats:
        return [title, "No float cell of this model is finished in this run, so no differences are shown."]
    if not to_float:
        return [title, "There is no other cell of this model in this run."]
    tasks = model.accuracies
    groups = [([column], f"Δ log-{column.title} [95 %]", column.kind) for column in model.perplexities]
    groups += [(tasks, "Δ mean accuracy (%) [95 %]", "accuracy")] if tasks else []
    lines = []
    for row, pairs in to_float.items():
        shown = [signed(_joined(pairs, columns), kind, interval=True) for columns, _, kind in groups]
        lines.append([row.bits, row.label, *shown])
    text = [title, table(["bits", "method", *(head for _, head, _ in groups)], lines)]
    if tasks:
        lines = []
        for row, pairs in to_float.items():
            shown = [signed(_joined(pairs, [column]), "accuracy") for column in tasks]
            lines.append([row.bits, row.label, *shown])
        text.append(table(["bits", "method", *(f"Δ {column.title} (%)" for column in tasks)], lines))
    notes = ["Not paired: " + "; ".join(plain(problem) for problem in problems)] if problems else []
    return [*text, DIFFERENCES, *notes]


def fidelity_section(model: Model, to_float: Differences, problems: dict[str, None]) -> list[str]:
    """What moved beside the scores; empty where nothing of it is on record."""
    blocks = [*_divergence(model), *_answers(model, to_float, problems)]
    return ["### Fidelity to float", *blocks] if blocks else []


def _divergence(model: Model) -> list[str]:
    lines, windows = [], []
    for row in model.rows:
        for column in model.perplexities:
            entries = [cell.task(column.task) for cell in row.with_(column)]
            entries = [entry for entry in entries if entry.get("kl") and entry.get("top1_agreement")]
            if not entries:
                continue
            kl = inference.over_seeds([_fact(entry, "kl", "mean") for entry in entries])
            tail = [sum(number(e["kl"].get(q)) for e in entries) / len(entries) for q in ("median", "p99")]
            agree = inference.over_seeds([_fact(entry, "top1_agreement", "value") for entry in entries])
            shown = [with_error(f"{kl.value:.4f}", kl.stderr, 4), *(f"{value:.4f}" for value in tail)]
            shown.append(with_error(f"{100 * agree.value:.1f}", 100 * agree.stderr, 1))
            lines.append([row.bits, row.label, column.title.removeprefix("perplexity "), *shown])
            windows += [f"{e.get('kl_windows')} of {e.get('windows')}" for e in entries]
    if not lines:
        return []
    head = ["bits", "method", "text", "KL, mean", "median", "99 %", "top-1 agreement (%)"]
    return [DIVERGENCE, table(head, lines), f"Windows compared with float: {distinct(windows)}."]


def _fact(entry: Record, fact: str, name: str) -> Estimate:
    passages = entry.get("passages") or math.inf
    return Estimate(number(entry[fact].get(name)), number(entry[fact].get("stderr")), passages - 1)


def _answers(model: Model, to_float: Differences, problems: dict[str, None]) -> list[str]:
    """Flips, and the log-likelihood of the right answer of tasks whose rows say which it is."""
    gold = {row: _gold_pairs(model, row, problems) for row in to_float}
    tasks = [c for c in model.accuracies if any(c.task in pair for pairs in gold.values() for pair in pairs)]
    head = ["bits", "method", *(["answers lost / gained (%)"] if model.accuracies else [])]
    head += [f"{column.title} (nats)" for column in tasks] + (["mean of tasks (nats)"] if tasks else [])
    lines = []
    if tasks:
        own = [stats.document_mean(_gold(model.floats[0], column), "gold") for column in tasks]
        shown = [f"{e.value:.3f}" + f" ± {e.stderr:.3f}" * math.isfinite(e.stderr) for e in own]
        label = next(row.label for row in model.rows if row.first.is_float)
        lines.append([str(model.floats[0].bits), label, "–", *shown, f"{inference.average(own).value:.3f}"])
    for row, pairs in to_float.items():
        line = [row.bits, row.label]
        if model.accuracies:
            lost, gained, n = answers(pairs, model.accuracies)
            line.append(f"{100 * lost / n:.1f} / {100 * gained / n:.1f}" if n else "–")
        line += [signed(_joined(gold[row], [column]), "nats") for column in tasks]
        lines.append(line + ([signed(_joined(gold[row], tasks), "nats")] if tasks else []))
    return [ANSWERS, table(head, lines)] if lines and len(head) > 2 else []


def _gold_pairs(model: Model, row: Row, problems: dict[str, None]) -> list[dict[str, stats.Paired]]:
    found = []
    for first, cell in same_seeds(model.floats, row.usable):
        pairs = {}
        for column in model.accuracies:
            try:
                if any("choices" in sample for sample in first.samples(column.task)):
                    pairs[column.task] = stats.paired_gold(
                        first.samples(column.task), cell.samples(column.task)
                    )
            except ValueError as error:
                problems[f"{row.bits} {row.label}, {column.task}, right answers: {error}"] = None
        found.append(pairs)
    return found


def recovery_section(model: Model, problems: dict[str, None]) -> list[str]:
    """Empty where no accuracy has a level of chance on record."""
    if not model.floats:
        return []
    known = [
        column for column in model.accuracies if model.floats[0].task(column.task).get("chance") is not None
    ]
    shown = [column for column in known if _exceeds_chance(model.floats[0], column)]
    rows = [row for row in model.rows if not row.first.is_float]
    if not known or not rows:
        return []
    title, hidden = "### Recovery", [column.title for column in known if column not in shown]
    hidden_in = f"Not shown, for float is not that far above them: {', '.join(hidden)}."
    note = [hidden_in] if hidden else []
    if not shown:
        return [title, RECOVERY, *note]
    lines = []
    for row in rows:
        lines.append(
            [row.bits, row.label, *(_recovery(model.floats, row, column, problems) for column in shown)]
        )
    return [title, RECOVERY, table(["bits", "method", *(f"{c.title} (%)" for c in shown)], lines), *note]


def _exceeds_chance(cell: Cell, column: Column) -> bool:
    """Whether float exceeds chance and majority class by `SURE` standard errors."""
    entry, estimate = cell.task(column.task), column.estimate(cell)
    if estimate is None:
        return False
    bar = max(number(entry["chance"]), float(entry.get("majority") or 0.0))
    return estimate.value - bar > SURE * estimate.stderr


def _recovery(floats: Sequence[Cell], row: Row, column: Column, problems: dict[str, None]) -> str:
    cells = row.with_(column)
    if not cells:
        return "–"
    try:
        reference, chance = floats[0].samples(column.task), float(floats[0].task(column.task)["chance"])
        found = inference.over_seeds(
            [stats.recovery(reference, cell.samples(column.task), column.metric, chance) for cell in cells]
        )
    except ValueError as error:
        problems[f"{row.bits} {row.label}, {column.task}, recovery: {error}"] = None
        return "–"
    if math.isnan(found.value):
        return "not finite"
    low, high = (100 * bound for bound in found.interval())
    return f"{100 * found.value:.0f}" + (f" [{low:.0f}, {high:.0f}]" if not math.isnan(low + high) else "")


def _joined(pairs: Sequence[Mapping[str, stats.Paired]], columns: Sequence[Column]) -> Estimate | None:
    """Mean over the columns, then over seeds; None where no seed has them all."""
    found = over(pairs, columns)
    return inference.over_seeds(found) if found else None


def _gold(cell: Cell, column: Column) -> list[stats.Row]:
    return stats.gold_rows(cell.samples(column.task))
