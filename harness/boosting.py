"""The report's section on methods that give more bits to some matrices: does the choice of matrices matter?

A boosted row is compared, on the same documents, with its base (the rounding alone, of the same bits and
groups) and with its control (as many matrices of each type, drawn at random).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import inference, plots
from harness.evidence import over, paired_rows
from harness.layers import CORRELATIONS, LayerValues, correlations, merged, published
from harness.markdown import plain, table
from harness.published import Paper, papers
from harness.published import Row as PublishedRow
from harness.records import Cell, Column, Model, Row
from harness.stats import Estimate
from harness.tables import flag_note, p_text, signed
from methods.sensitivity import Layers, of_matrices

BOOSTS = ("sensiboost", "kurtboost")
ALPHA = 0.05
PUBLISHED_ROWS = {
    f"{name} {stop}": f"{method}stop={stop}"
    for name, method in (
        ("sensiboost", "sensiboost:"),
        ("kurtboost", "kurtboost:"),
        ("random", "sensiboost:choice=random;"),
    )
    for stop in (2, 3)
}
"""The authors' rows, as reports call them and as methods/published writes them."""
EXPLAINED = """\
Δ log-perplexity over the same passages (below zero is better, 0.01 is 1 % of perplexity; 95 % \
intervals), within one bit-width. `base`: the rounding alone with the same bits and groups. `control`: as \
many matrices of each type, drawn at random from those that do not stand out; over its draws, whose spread \
is part of the interval. `choice - control` is what choosing adds; its p-values are corrected for all \
choices of this table (Holm). Memory is that of the quantised linears over the base's: by formula (bits, and \
16 for a scale or a fractional zero-point, or 8 where those are quantised) and by the bytes that they held \
once packed, which counts float32 scales, padding, and scales that groups across outputs repeat (–: not on \
record)."""
PUBLISHED_NOTE = """\
Theirs, not measured here: from the authors' repository (methods/published/boost.json), on their models \
by their protocol. Change of WikiText-2 perplexity against HQQ of the same budget in percent, for 2 and 3 \
rungs, with the change of memory that they recorded in brackets; `random` is their control. Not to be set \
beside the numbers above."""


@dataclass(frozen=True)
class Comparison:
    """A boosted row, its base and its control, with the differences of log-perplexity that could be had."""

    row: Row
    base: Row
    control: Row | None
    to_base: Estimate | None
    control_to_base: Estimate | None
    to_control: Estimate | None


def boosting_section(model: Model, figures: Path, stem: str) -> list[str]:
    """Writes its figure, returns its text; empty without a boosted row."""
    rows = [row for row in model.rows if _boost(row.first)]
    if not rows:
        return []
    problems: dict[str, None] = {}
    found: list[Comparison] = []
    text = ["### More bits where they matter"]
    for place, column in enumerate(model.perplexities):
        if found := _comparisons(model, column, rows, problems):
            holm = inference.holm([_p(comparison.to_control) for comparison in found])
            text += [f"#### On {column.title}", _table(found, holm)]
            text += [] if place else [EXPLAINED]
            text.append(_verdict(found, holm))
    missing = [f"{row.bits} {row.label}" for row in rows if not _is_control(row) and not _in(row, found)]
    if missing:
        text.append(
            f"Without a base (hqq, or the same rounding alone) to compare with: {plain('; '.join(missing))}."
        )
    text += [f"Not compared: {plain('; '.join(problems))}."] if problems else []
    empty = [
        f"{row.bits} {row.label}" for row in rows if not _is_control(row) and not boosted_linears(row.first)
    ]
    if empty:
        text.append(f"No layer stood out, so nothing was boosted: {plain('; '.join(empty))}.")
    if model.record.get("pre_quantised"):
        text.append(flag_note(model.record, "†"))
    return [*text, *_figure(model, rows, figures, stem), *published_section()]


def _comparisons(
    model: Model, column: Column, rows: Sequence[Row], problems: dict[str, None]
) -> list[Comparison]:
    def difference(reference: Row | None, row: Row | None) -> Estimate | None:
        if reference is None or row is None:
            return None
        seeds = over(paired_rows(reference.usable, row, [column], problems), [column])
        return inference.over_seeds(seeds) if seeds else None

    found = []
    for row in rows:
        base = next((other for other in model.rows if _is_base(other, row)), None)
        if _is_control(row) or base is None:
            continue
        control = next((other for other in rows if _is_control(other) and _same_choice(other, row)), None)
        found.append(
            Comparison(
                row, base, control, difference(base, row), difference(base, control), difference(control, row)
            )
        )
    return found


def _table(found: Sequence[Comparison], holm: Sequence[float]) -> str:
    lines = []
    for comparison, p in zip(found, holm, strict=True):
        row, control = comparison.row, comparison.control
        total = sum(some["count"] for some in _weights(row.first))
        lines.append(
            [
                row.bits,
                row.label,
                f"{len(boosted_linears(row.first))} of {total}",
                *(_more(comparison.base.first, row.first, how) for how in ("computed", "packed")),
                signed(comparison.to_base, "perplexity", interval=True, p=1.0),
                "–" if control is None else str(len(control.usable)),
                signed(comparison.control_to_base, "perplexity", interval=True, p=1.0),
                signed(comparison.to_control, "perplexity", interval=True, p=p),
                p_text(p),
            ]
        )
    head = ["bits", "method", "boosted", "memory by formula", "memory in bytes", "choice - base [95 %]"]
    head += ["draws", "control - base [95 %]", "choice - control [95 %]", "p (Holm)"]
    return table(head, lines)


def _verdict(found: Sequence[Comparison], holm: Sequence[float]) -> str:
    """Does boosting beat the control, and what of the paper's headline."""
    tested = [
        (comparison, comparison.to_control, p)
        for comparison, p in zip(found, holm, strict=True)
        if comparison.to_control is not None and boosted_linears(comparison.row.first)
    ]
    if not tested:
        said = "**Whether choosing beats drawing at random is open**: no choice has a control here."
    else:
        better = [c for c, d, p in tested if p < ALPHA and d.value < 0]
        worse = [c for c, d, p in tested if p < ALPHA and d.value > 0]
        answer = "yes" if len(better) == len(tested) else "not in general" if better else "not here"
        said = (
            f"**Does choosing beat drawing at random? {answer.capitalize()}.** Choices that have a control: "
            f"{len(tested)}; better than its mean at 5 % (Holm): {len(better)}{_names(better)}; worse: "
            f"{len(worse)}{_names(worse)}; the rest cannot be told apart in a run of this size."
        )
    gains = [(comparison, estimate) for comparison in found if (estimate := comparison.to_base) is not None]
    if not gains:
        return said
    best, gain = min(gains, key=lambda pair: pair[1].value)
    cost = _more(best.base.first, best.row.first, "computed")
    sure = "" if gain.p_value() < ALPHA else ", which may be chance"
    return (
        f"{said} The paper's headline is up to 9 % less perplexity for 2 % more memory; the most favourable "
        f"choice here, {best.row.bits} {plain(best.row.label)}, changes its base's by "
        f"{100 * math.expm1(gain.value):+.1f} %{sure}, for {cost} of the linears' memory by formula."
    )


def _names(found: Sequence[Comparison]) -> str:
    return f" ({', '.join(f'{c.row.bits} {plain(c.row.label)}' for c in found)})" if found else ""


def _figure(model: Model, rows: Sequence[Row], figures: Path, stem: str) -> list[str]:
    """Sensitivity and kurtosis of each layer, as the first row that measured them did."""
    series: dict[str, tuple[Layers, Mapping[str, Sequence[int]]]] = {}
    for row in rows:
        for name, facts in _learned(row.first).items():
            layers = _values(facts)
            if layers and name not in series and not _is_control(row):
                series[name] = layers, _by_type(boosted_linears(row.first))
    if not series:
        return []
    titles = {
        "sensiboost": "activation sensitivity (4 bits, groups of 64)",
        "kurtboost": "kurtosis of weights",
    }
    shown = []
    for name in filter(series.__contains__, BOOSTS):
        layers, boosted = series[name]
        lines = merged(layers)
        marked = {
            label: sorted({layer for leaf in label.split(", ") for layer in boosted.get(leaf, ())})
            for label in lines
        }
        shown.append(plots.DepthPanel(titles[name], lines, marked))
    plots.depth_figure(figures / f"{stem}-depth.svg", shown)
    own = LayerValues(
        str(model.record["name"]),
        series["sensiboost"][0] if "sensiboost" in series else {},
        series["kurtboost"][0] if "kurtboost" in series else {},
    )
    return [
        f"![Sensitivity and kurtosis of each layer, boosted ones ringed](figures/{stem}-depth.svg)",
        "*Each line is a type of matrix; rings are the layers that the choice boosts, those whose value "
        "jumps or drops from the layer before by more than usual.*",
        correlations([own, *published()]),
        CORRELATIONS,
    ]


def published_section() -> list[str]:
    """The authors' own numbers, marked as theirs."""
    paper = papers()["boost"]
    perplexity = paper.table("wikitext2")
    lines = []
    for model in (column.name for column in perplexity.models):
        for base in (row for row in perplexity.rows if row.method == "hqq"):
            if printed := perplexity.printed(base, model):
                gains = (_their_gain(paper, base, spec, model) for spec in PUBLISHED_ROWS.values())
                lines.append([f"{model} (theirs)", base.name.removeprefix("HQQ "), printed, *gains])
    head = ["model", "bits per weight", "HQQ", *PUBLISHED_ROWS]
    return ["#### Published by the authors", table(head, lines), PUBLISHED_NOTE]


def _their_gain(paper: Paper, base: PublishedRow, spec: str, model: str) -> str:
    """Percent of perplexity against the base of the same bits, from the two perplexities where both are
    there, else as stated; with the change of memory where it is."""
    perplexity = paper.table("wikitext2")
    row = perplexity.row(spec, base.bits)
    gain = math.nan if row is None else perplexity.change(row, base, model)
    if math.isnan(gain):
        gain = paper.table("wikitext2-change").value_of(spec, base.bits, model)
    memory = paper.table("memory-change").value_of(spec, base.bits, model)
    return f"{gain:+.2f}" + ("" if math.isnan(memory) else f" ({memory:+.2f})")


# What a record says


def boosted_linears(cell: Cell) -> list[str]:
    """Names of the linears that have another quantiser than most."""
    return [name for some in _weights(cell) for name in some["linears"] or ()]


def _weights(cell: Cell) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (cell.record.get("diagnostics") or {}).get("weights") or []
    return found


def _by_type(names: Sequence[str]) -> dict[str, list[int]]:
    """ "layers.3.mlp.down_proj" as {"down": [3]}."""
    found: dict[str, list[int]] = {}
    for name in names:
        _, layer, rest = name.split(".", 2)
        found.setdefault(rest.rpartition(".")[2].removesuffix("_proj"), []).append(int(layer))
    return found


def _learned(cell: Cell) -> dict[str, dict[str, Any]]:
    learned = (cell.record.get("diagnostics") or {}).get("learned") or {}
    return {name: facts for name, facts in learned.items() if name in BOOSTS}


def _values(facts: Mapping[str, Any]) -> Layers:
    if "kurtosis" in facts:
        found: Layers = facts["kurtosis"]
        return found
    readings = facts.get("readings", {}).get("mse")
    return of_matrices(readings, own_output=not facts.get("grouped_queries")) if readings else {}


def _parts(row: Row) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = row.first.record["method"].get("options") or {}
    return parts


def _boost(cell: Cell) -> dict[str, Any] | None:
    """Options of the boosting part of a cell's method."""
    parts = cell.record["method"].get("options") or {}
    return next((options for name, options in parts.items() if name in BOOSTS), None)


def _is_control(row: Row) -> bool:
    return (_boost(row.first) or {}).get("choice") == "random"


def _same_choice(control: Row, row: Row) -> bool:
    """Whether two rows differ in how matrices are chosen alone."""

    def rest(some: Row) -> dict[str, dict[str, Any]]:
        return {name: {k: v for k, v in part.items() if k != "choice"} for name, part in _parts(some).items()}

    return control.bits == row.bits and rest(control) == rest(row)


def _is_base(other: Row, row: Row) -> bool:
    """Whether a row is another without its boosting part, rounded alike."""
    boost, plain_rounding = _boost(row.first), next(iter(_parts(other).values()), {})
    own, theirs = row.first.record["method"], other.first.record["method"]
    return (
        other.bits == row.bits
        and not other.first.is_float
        and boost is not None
        and _boost(other.first) is None
        and own.get("rounding") == theirs.get("rounding")
        and _transforms(row) == _transforms(other)
        and all(boost.get(key) == plain_rounding.get(key) for key in ("group_axis", "meta", "preset"))
    )


def _transforms(row: Row) -> dict[str, dict[str, Any]]:
    """The parts of a method that neither boost nor round alone, by their options but the rounding."""
    return {
        name: {key: value for key, value in part.items() if key != "rounding"}
        for name, part in _parts(row).items()
        if name not in (*BOOSTS, "hqq", "gptq", "rtn")
    }


def _more(base: Cell, cell: Cell, how: str) -> str:
    """How many percent more the linears of a cell take than the base's."""
    sizes = [
        ((some.record.get("measured") or {}).get("memory") or {}).get("linears", {}).get(how)
        for some in (base, cell)
    ]
    return f"{100 * (sizes[1] / sizes[0] - 1):+.2f} %" if all(sizes) else "–"


def _p(estimate: Estimate | None) -> float:
    return math.nan if estimate is None else estimate.p_value()


def _in(row: Row, found: Sequence[Comparison]) -> bool:
    return any(comparison.row is row for comparison in found)
