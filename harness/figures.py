"""The report's sections that are figures: what is drawn, and what there is to see."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from harness import comparison_plots, inference, plots
from harness.evidence import Differences, over
from harness.inputs import drawn, moved
from harness.records import Cell, Column, Model, Record, Row, mean_accuracy, number, overall
from harness.stats import Estimate, Paired
from harness.tables import mark, perplexity_of

SITES = ("attention", "mlp")
LEAST_LOG, LEAST_ACCURACY = 0.02, 0.05
"""Differences below which the heat map stays pale even where none is larger."""
HEAT = """\
*What each row gains and loses against float on each task, from the paired differences of the tables: \
log-perplexity, and accuracy in points. Vermillion is worse than float, blue better, pale alike; the \
colour of perplexity grows with the logarithm of the difference. `*` and `**` as in the tables. A column \
that is vermillion throughout is a task that every method hurts, a row that is pale throughout a method \
that keeps the model; coloured cells without a mark may be chance.*"""
ERRORS = """\
*Relative error ‖Ŵ - W‖ / ‖W‖ (Frobenius norm) that rounding left in each layer, mean over its linears: of \
the weights as the transform made them, so that a lower line means that the transform made them easier to \
round. A peak names a layer that bit-widths of its own could help. It does not say how much the outputs \
suffer: GPTQ trades larger weight errors for smaller output errors."""


def bits_section(model: Model, figures: Path, stem: str) -> list[str]:
    """Accuracy against bits: writes the figure, returns its text; empty without a number."""
    perplexity = next(iter(model.perplexities), None)
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
    if len(bits) < 2 or not any(panel.series for panel in panels):
        return []  # a line needs two bit-widths: of one, the tables say all
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


def kurtosis_section(model: Model, figures: Path, stem: str) -> list[str]:
    """Outliers before and after each transform: writes the figure, returns its text; empty without any."""
    measured: dict[str, list[Record]] = {}
    for row in model.rows:  # fewest bits come last and win: the transform is the same at every bit-width
        for cell in () if row.first.is_float else row.cells:
            points = cell.record.get("diagnostics", {}).get("kurtosis")
            if points:
                measured[row.label] = points
                break
    sites = list(dict.fromkeys(str(point["site"]) for points in measured.values() for point in points))
    # Methods without a transform stay on the line of before.
    changed = [label for label, points in measured.items() if moved(points, "before", "after")]
    shown, left_out = drawn(changed)
    panels = []
    for site in sorted(sites, key=lambda site: (*SITES, site).index(site)):
        before: list[tuple[int, float]] = []
        after: dict[tuple[tuple[int, float], ...], tuple[str, ...]] = {}
        for label, points in measured.items():
            here = [point for point in points if point["site"] == site]
            before = before or [(int(point["layer"]), number(point["before"])) for point in here]
            if label in shown and moved(here, "before", "after"):
                then = tuple((int(point["layer"]), number(point.get("after"))) for point in here)
                after[then] = (*after.get(then, ()), label)
        title = {"attention": "attention inputs", "mlp": "MLP inputs"}.get(site, site)
        panels.append(plots.KurtosisPanel(title, before, {names: line for line, names in after.items()}))
    if not panels:
        return []
    plots.kurtosis_figure(figures / f"{stem}-kurtosis.svg", panels, model.labels)
    unchanged = sorted(measured.keys() - set(changed))
    same = f" Without a transform, on the grey line: {', '.join(unchanged)}." if unchanged else ""
    return [
        "### Outliers before and after the transform",
        f"![Kurtosis of activations per layer before and after each transform](figures/{stem}-kurtosis.svg)",
        "*Mean kurtosis of a token's activations in each layer (4th standardised moment, log scale): high "
        "means a few outlier channels that a 4-bit grid must stretch to. A transform that works pulls its "
        "line from the grey one down to the Gaussian's 3 or below, towards the uniform's 1.8; the lower "
        f"panels show what is left of it, where transforms differ.{same}{left_out}*",
    ]


def heat_section(model: Model, to_float: Differences, figures: Path, stem: str) -> list[str]:
    """Method x task, coloured by the difference to float: writes the figure, returns its text; empty without
    a difference."""
    rows = [row for row, pairs in to_float.items() if any(pairs)]
    groups = [("Δ log-perplexity", model.perplexities), ("Δ accuracy (points)", model.accuracies)]
    blocks = [_heat_block(title, columns, rows, to_float) for title, columns in groups if columns]
    if not rows or not blocks:
        return []
    names = [f"{row.label}  {row.bits}" for row in rows]
    comparison_plots.heat_figure(figures / f"{stem}-tasks.svg", names, blocks)
    return [f"![Difference to float of each row on each task](figures/{stem}-tasks.svg)", HEAT]


def _heat_block(
    title: str, columns: Sequence[Column], rows: Sequence[Row], to_float: Differences
) -> comparison_plots.HeatBlock:
    found = [[_joined(to_float[row], column) for column in columns] for row in rows]
    sizes = [abs(e.value) for line in found for e in line if e is not None and math.isfinite(e.value)]
    most = max(sizes, default=0.0)

    def cell(estimate: Estimate | None, column: Column) -> tuple[str, float] | None:
        if estimate is None:
            return None
        if not math.isfinite(estimate.value):
            return "not finite", math.inf
        stars = mark(estimate.p_value()).strip()
        if column.kind == "accuracy":
            strength = -estimate.value / max(most, LEAST_ACCURACY)
            return f"{100 * estimate.value:+.1f}{stars}", strength
        strength = math.log1p(abs(estimate.value) / LEAST_LOG) / math.log1p(max(most, LEAST_LOG) / LEAST_LOG)
        return f"{estimate.value:+.2f}{stars}", math.copysign(strength, estimate.value)

    cells = [[cell(e, column) for e, column in zip(line, columns, strict=True)] for line in found]
    names = [column.title.removeprefix("perplexity ").removesuffix("_local") for column in columns]
    return comparison_plots.HeatBlock(title, names, cells)


def _joined(pairs: Sequence[Mapping[str, Paired]], column: Column) -> Estimate | None:
    found = over(pairs, [column])
    return inference.over_seeds(found) if found else None


def errors_section(model: Model, figures: Path, stem: str) -> list[str]:
    """What rounding did to the weights of each layer: writes the figure, returns its text; empty where it is
    not on record."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in model.rows:
        errors = next(filter(None, (_weight_errors(cell) for cell in row.cells)), None)
        if errors:
            panels.setdefault(row.bits, {})[row.label] = errors
    if not panels:
        return []
    shown, left_out = drawn(
        [label for label in model.labels if any(label in each for each in panels.values())]
    )
    found = [
        comparison_plots.ErrorPanel(bits, {label: line for label, line in series.items() if label in shown})
        for bits, series in panels.items()
        if series.keys() & set(shown)
    ]
    comparison_plots.errors_figure(figures / f"{stem}-errors.svg", found, model.labels)
    return [
        "### Rounding error by layer",
        f"![Relative rounding error of the weights of each layer](figures/{stem}-errors.svg)",
        f"{ERRORS}{left_out}*",
    ]


def _weight_errors(cell: Cell) -> list[tuple[int, float]]:
    """(layer, mean relative error of its linears)."""
    layers: dict[int, list[float]] = {}
    for entry in (cell.record.get("diagnostics") or {}).get("weight_error") or ():
        layers.setdefault(int(str(entry["linear"]).split(".")[1]), []).append(number(entry["relative_error"]))
    return [(layer, sum(found) / len(found)) for layer, found in sorted(layers.items())]
