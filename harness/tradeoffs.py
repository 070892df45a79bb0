"""The report's figures of what accuracy costs: in bits and bytes, which a second run reproduces, and in time,
which it does not; and how many bits a row takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import comparison_plots as plots
from harness.records import Cell, Column, Model, Record, Row, flags_of, mean_accuracy, number, overall
from harness.stats import Estimate
from harness.tables import perplexity_of

TOKENS = 2048
"""Of the KV cache that counts as held: a conversation's."""
MEBIBYTE = 2**20
BITS = """\
*Each marker is a row of the table; the dashed line joins the rows that no other beats in both directions, \
with their bit-width beside them: the nearer to it, the better a row uses its {what}, and what lies behind \
it has a better choice at the same price. An arrow at the upper end is a perplexity \
beyond {beyond} times float's. Costs within 1 % of each other count as equal. Bars are one \
standard error: rows whose bars overlap may have another order. Bits are of every parameter of the model, \
the embedding and lm_head at 16 bits included{bytes}.*"""
BYTES = f"; bytes are what the bit-widths promise of the model and the KV cache of {TOKENS:,} tokens"
MEASURED = """\
*Markers, line and bars as in the figure of bits, against what was measured: {}. Where rows stand close \
together in the cost, the machine's own noise may have ordered them.*"""
FLAGGED = "{} beside a marker: as in the first table, whose notes say what not to conclude from it."
LEARNING = "seconds to quantise (learning where it was learned, transform, rounding; without scoring)"
SPEED = (
    "tokens per second of the small workload below, where more is better and the best rows stand on the "
    "right (a simulated row computes in floats: that says nothing of its method's speed)"
)
HELD = (
    f"bytes that were held for the model and the KV cache of {TOKENS:,} tokens, of rows of int4 execution "
    "(a float model in the settings' dtype)"
)


@dataclass(frozen=True)
class Cost:
    """What a row costs: of each cell, None where it is not on record. `more`: more of it is better; `wide`:
    it stands on a log axis."""

    across: str
    of_cell: Callable[[Cell], float | None]
    more: bool = False
    wide: bool = False


def pareto_section(model: Model, figures: Path, stem: str) -> list[str]:
    """Accuracy against bits and bytes: writes the figure, returns its text; empty without a number."""
    costs = [Cost("effective bits per parameter", _bits), Cost("MiB by formula, with KV cache", _promised)]
    shown = _draw(model, costs, figures / f"{stem}-pareto.svg")
    if not shown:
        return []
    both = len(shown) > 1
    caption = BITS.format(
        what="bits and bytes" if both else "bits",
        bytes=BYTES if both else "",
        beyond=plots.BEYOND,
    )
    return [
        "### What accuracy costs in bits",
        f"![Perplexity and mean accuracy of each row against its bits](figures/{stem}-pareto.svg)",
        _flagged(caption, model),
    ]


def measured_section(models: Sequence[tuple[Model, str]], figures: Path) -> list[str]:
    """Accuracy against measured costs, a figure for each (model, stem); empty where none is on record."""
    costs = {
        HELD: Cost("MiB held, with KV cache", _held),
        SPEED: Cost("decode tokens/s (more is better →)", _speed, more=True),
        LEARNING: Cost("seconds to quantise (log scale)", _seconds, wide=True),
    }
    text: list[str] = []
    for model, stem in models:
        shown = _draw(model, list(costs.values()), figures / f"{stem}-costs.svg")
        said = [name for name, cost in costs.items() if cost in shown]
        if shown:
            alt = f"Perplexity and mean accuracy of {model.record['name']} against measured costs"
            caption = _flagged(MEASURED.format("; ".join(said)), model)
            text += [f"![{alt}](figures/{stem}-costs.svg)", caption]
    return ["### What accuracy costs in time and memory", *text] if text else []


def _flagged(caption: str, model: Model) -> str:
    """A caption that also says what its flags are, where a row has one."""
    flags = "".join(flags_of(model.record, row) for row in model.rows)
    found = [flag for flag in "†‡§" if flag in flags]
    return f"{caption.removesuffix('*')} {FLAGGED.format(' or '.join(found))}*" if found else caption


def _draw(model: Model, costs: Sequence[Cost], path: Path) -> list[Cost]:
    """The costs that at least two rows have; nothing is drawn where there are none, or no number to set
    against them."""
    perplexity = next(iter(model.perplexities), None)
    known = [cost for cost in costs if len([row for row in model.rows if _mean(row, cost) is not None]) > 1]
    panels = [_panel(model, cost, perplexity) for cost in known for _ in (perplexity,) if perplexity]
    if model.accuracies:
        panels += [_panel(model, cost, None) for cost in known]
    if not any(panel.points for panel in panels):
        return []
    plots.pareto_figure(path, panels, model.labels, columns=len(known) if len(known) > 1 else len(panels))
    return known


def _panel(model: Model, cost: Cost, column: Column | None) -> plots.CostPanel:
    """Perplexity, or mean accuracy where no column is given, against a cost."""
    points: dict[str, list[plots.Point]] = {}
    reference = None
    for row in model.rows:
        price, estimate = _mean(row, cost), overall(row, lambda cell: _score(cell, model, column))
        if price is None or estimate is None:
            continue
        value, stderr = (
            (100 * estimate.value, 100 * estimate.stderr) if column is None else perplexity_of(estimate)
        )
        if not math.isfinite(value):
            continue
        point = plots.Point(price, value, stderr, row.bits, flags_of(model.record, row))
        if row.first.is_float:
            reference = point
        else:
            points.setdefault(row.label, []).append(point)
    return plots.CostPanel(
        title="mean accuracy, % (higher is better)"
        if column is None
        else f"{column.title} (log scale, lower is better)",
        across=cost.across,
        points=points,
        higher=column is None,
        more=cost.more,
        log=column is not None,
        wide=cost.wide,
        reference=reference,
    )


def _score(cell: Cell, model: Model, column: Column | None) -> Estimate | None:
    return mean_accuracy(cell, model.accuracies) if column is None else column.estimate(cell)


def _mean(row: Row, cost: Cost) -> float | None:
    found = [price for cell in row.usable if (price := cost.of_cell(cell)) is not None and price > 0]
    return sum(found) / len(found) if found else None


def _measured(cell: Cell) -> Record:
    return cell.record.get("measured") or {}


def _bits(cell: Cell) -> float | None:
    return (cell.record.get("effective_bits") or {}).get("model")


def _promised(cell: Cell) -> float | None:
    return _mebibytes(cell, "computed")


def _held(cell: Cell) -> float | None:
    """A simulated cell holds floats whatever its bits: that is no cost of its method."""
    packed = cell.is_float or cell.record.get("execution") == "int4"
    return _mebibytes(cell, "measured") if packed else None


def _mebibytes(cell: Cell, how: str) -> float | None:
    memory = _measured(cell).get("memory")
    if not memory:
        return None
    return (
        sum(
            number(memory[part][how]) * times
            for part, times in (("linears", 1), ("rest", 1), ("kv_token", TOKENS))
        )
        / MEBIBYTE
    )


def _speed(cell: Cell) -> float | None:
    return (_measured(cell).get("speed") or {}).get("decode_tokens_per_second")


def _seconds(cell: Cell) -> float | None:
    """To quantise: what was learned may have come from disk, and then counts as long as it once took."""
    if cell.is_float:
        return None
    seconds = _measured(cell).get("seconds") or {}
    learned = [
        number(facts[f"{stage}_seconds"])
        for facts in (_measured(cell).get("learned") or {}).values()
        for stage in ("capture", "start", "learn", "tune")
        if facts.get(f"{stage}_seconds") is not None
    ]
    stages = ("transform", "round") if learned else ("learn", "transform", "round", "tune")
    return sum(learned) + sum(seconds.get(stage, 0.0) for stage in stages) if seconds else None
