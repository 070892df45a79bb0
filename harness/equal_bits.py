"""The report's section on what channels in full precision buy: QUAD against QuaRot, at the same widths and at
the nearest effective bits that QuaRot has in the run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from harness import inference
from harness.evidence import over, paired_rows
from harness.gains import change_text
from harness.markdown import plain, table
from harness.records import Cell, Column, Model, Record, Row, mean_accuracy
from harness.stats import Estimate
from harness.tables import signed

WITHIN = 0.05
"""Share of the effective bits of weights by which two rows may differ and still be called equal."""
EQUAL = """\
QUAD against QuaRot (where inputs of o_proj and down_proj have 8 bits, QUAD of rank 0, which is QuaRot) of \
the same rounding: at the same bit-widths, and where groups of weights cost QuaRot at most 5 % more or fewer \
bits than kept channels cost QUAD; tuned rows also against QuaRot whose scales were tuned alike (rank 0). \
Equal bits are those of the weights: kept channels also make activations and the whole model a little wider. \
Groups that are not ranked elsewhere, since they fit a lattice that this model's weights lie on, count here: \
rotated weights lie on none. Bits: effective ones of weights / activations. Perplexity: change in \
percent, paired by seed and passage, below zero QUAD is better. Accuracy: in points, paired by document, \
above zero QUAD is better. Of float: mean accuracy as a share of the float model's. The paper reports 94 to \
96 % at W4A4, 98 % at W4A4/A8 with tuning, of Llama-3 and Qwen-2.5 and of other tasks. Exploratory: not \
corrected for the number of comparisons."""


def equal_bits_section(model: Model) -> list[str]:
    """Empty without a row of QUAD beside what it can be compared with."""
    problems: dict[str, None] = {}
    generated = [column for column in model.accuracies if column.metric == "exact_match"]
    groups = [[column] for column in model.perplexities]
    groups += [columns for columns in (model.accuracies, generated) if columns]
    titles = [*(f"{column.title} (%)" for column in model.perplexities)]
    titles += ["mean accuracy"] * bool(model.accuracies) + ["generated answers"] * bool(generated)
    lines = []
    for row, other in _pairs(model):
        found = [_differences(row, other, columns, problems) for columns in groups]
        seeds = max(map(len, found), default=0)
        if seeds:
            shown = [_shown(columns, each) for columns, each in zip(groups, found, strict=True)]
            line = [row.bits, row.label, _bits_text(row), f"{other.label}, {other.bits}", _bits_text(other)]
            lines.append([*line, seeds, *shown, _of_float(model, row)])
    if not lines:
        return []
    head = ["bits", "method", "w / a", "against", "its w / a", "seeds", *titles, "of float (%)"]
    lost = [f"Not compared: {'; '.join(plain(problem) for problem in problems)}."] if problems else []
    return ["### QUAD and QuaRot at equal bits", table(head, lines), EQUAL, *lost]


def _pairs(model: Model) -> Iterator[tuple[Row, Row]]:
    """(row of QUAD, row of QuaRot): the one of its widths, then the nearest in effective bits; a tuned row
    meets QuaRot as it is, then tuned."""
    quad = [row for row in model.rows if _options(row, "quad").get("rank")]
    for row in quad:
        wanted = _weight_bits(row)
        for tuned in (False, True)[: 2 if _options(row, "quad").get("tune") else 1]:
            beside = [other for other in model.rows if _is_quarot(other, row, tuned)]
            same = [other for other in beside if other.bits == row.bits]
            yield from ((row, other) for other in same[:1])
            nearest = min(beside, key=lambda other: abs(_weight_bits(other) - wanted), default=None)
            if nearest is None or nearest in same[:1]:
                continue
            if abs(_weight_bits(nearest) - wanted) <= WITHIN * wanted:
                yield row, nearest


def _is_quarot(other: Row, row: Row, tuned: bool) -> bool:
    """Whether a row is QuaRot, tuned as the row is or not at all, of the row's rounding, widths but for
    groups, and online parts."""
    ours, rank_zero = _options(row, "quad"), _options(other, "quad")
    theirs = _options(other, "quarot") or (rank_zero if rank_zero.get("rank") == 0 else {})
    if not theirs or bool(theirs.get("a8")) != bool(ours.get("a8")):
        return False
    if any(theirs.get(name) != ours.get(name) for name in ("rounding", "preset", "online")):
        return False
    if bool(theirs.get("tune")) != tuned or (rank_zero and not (ours.get("a8") or tuned)):
        return False
    if tuned and any(theirs[name] != ours.get(name) for name in theirs.keys() - {"rank"}):
        return False
    return replace(other.first.bits, group=None) == replace(row.first.bits, group=None)


def _options(row: Row, name: str) -> Record:
    """Options of a row that is this method and no other."""
    method = row.first.record["method"]
    found: Record = (method.get("options") or {}).get(name) or {}
    return found if method.get("name") == name else {}


def _weight_bits(row: Row) -> float:
    bits = row.first.record.get("effective_bits") or {}
    return float(bits.get("weight", math.nan))


def _bits_text(row: Row) -> str:
    bits = row.first.record.get("effective_bits") or {}
    return " / ".join(f"{round(bits[part], 2):g}" for part in ("weight", "activation") if part in bits)


def _differences(
    row: Row, other: Row, columns: Sequence[Column], problems: dict[str, None]
) -> list[Estimate]:
    return over(paired_rows(other.usable, row, columns, problems), columns)


def _shown(columns: Sequence[Column], found: Sequence[Estimate]) -> str:
    if not found:
        return "–"
    estimate = inference.over_seeds(found)
    if columns[0].kind == "perplexity":
        return change_text(estimate)
    return signed(estimate, "accuracy", interval=True)


def _of_float(model: Model, row: Row) -> str:
    """Mean accuracy of the row's seeds as percent of the float model's."""

    def means(cells: Sequence[Cell]) -> list[float]:
        found = (mean_accuracy(cell, model.accuracies) for cell in cells)
        return [estimate.value for estimate in found if estimate is not None]

    own, whole = means(row.usable), means(model.floats)
    if not own or not whole or not whole[0]:
        return "–"
    return f"{100 * sum(own) / len(own) / whole[0]:.1f}"
