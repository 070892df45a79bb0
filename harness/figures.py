"""The report's sections that are figures: what is drawn, and what there is to see."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from harness import plots
from harness.records import Cell, Model, Record, mean_accuracy, number, overall
from harness.stats import Estimate
from harness.tables import perplexity_of

SITES = ("attention", "mlp")


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
