"""The report's sections on options, each variant of a method against that method, and on online parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness import inference
from harness.evidence import over, paired_rows
from harness.markdown import plain, table
from harness.records import Column, Model, Row
from harness.tables import signed

ABLATION = """\
Rows of one method that differ in its options, each minus the row with the fewest options changed (the \
reference), over the same documents (exploratory: marks are per comparison). Positive Δ log-perplexity: the \
change makes the method worse."""
ONLINE = """\
Transforms that run for every token, per row; all others are merged into the weights and cost nothing. \
`python -m harness.speed --methods ...` measures what they take."""


def ablation_section(model: Model) -> list[str]:
    """Empty where no method has two rows at one bit-width."""
    lines: list[list[str]] = []
    perplexities, accuracies = model.perplexities, model.accuracies
    groups: list[tuple[list[Column], str, str]] = [
        ([column], f"Δ log-{column.title} [95 %]", "perplexity") for column in perplexities
    ]
    groups += [(accuracies, "Δ mean accuracy (%) [95 %]", "accuracy")] if accuracies else []
    columns = [column for group, _, _ in groups for column in group]
    for rows in _families(model.rows):
        reference = min(rows, key=lambda row: len(changed_options(row)))
        lines.append([reference.bits, reference.label, "reference", *["–"] * (len(groups) - 1)])
        for row in rows:
            if row is reference:
                continue
            pairs = paired_rows(reference.usable, row, columns, {})
            line = [row.bits, row.label]
            for group, _, kind in groups:
                found = over(pairs, group)
                line.append(signed(inference.over_seeds(found), kind, interval=True) if found else "–")
            lines.append(line)
    if not lines or not groups:
        return []
    head = ["bits", "method", *(title for _, title, _ in groups)]
    return ["### Options of one method", ABLATION, table(head, lines)]


def online_section(model: Model) -> list[str]:
    """What runs online in every row whose record says so; empty where none does."""
    lines = []
    for row in model.rows:
        for part in (row.first.record.get("diagnostics") or {}).get("online", ()):
            size = "scale" if part["size"] is None else f"Hadamard, order {part['size']}"
            lines.append(
                [row.bits, row.label, plain(part["seam"]), size, str(part["count"]), f"{part['width']:,}"]
            )
    if not lines:
        return []
    head = ["bits", "method", "seam", "what", "per token", "width"]
    return ["### Online transforms", ONLINE, table(head, lines)]


def changed_options(row: Row) -> dict[str, Any]:
    """The options of a row, by part and name, that differ from their defaults in the rows beside it: all that
    the label does not take for granted."""
    label = row.label
    return {text: None for part in label.split("+") for text in _options(part)}


def _options(part: str) -> list[str]:
    """The written options of one part of a label such as `name:option=value;option=value (gptq)`."""
    _, _, options = part.partition(" (")[0].partition(" [")[0].partition(":")
    return [option for option in options.split(";") if option]


def _families(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one method, rounding and bit-width, where there are several."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        method = row.first.record["method"]
        if not row.first.is_float:
            key = (row.bits, str(method.get("name")), str(method.get("rounding")))
            found.setdefault(key, []).append(row)
    return [family for family in found.values() if len(family) > 1]
