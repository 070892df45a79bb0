"""The report's section on the inputs of blocks: how wide they are spread before and after each transform,
on text that no method learned from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import plots
from harness.markdown import table
from harness.records import Cell, Model, Record, Row, number

INPUTS = """\
Inputs of blocks on tuning text, which no method learned from, mean over sites of the first seed: kurtosis \
per token, the largest value over the root mean square, and signal to noise in decibels under the default \
4-bit quantiser of activations."""
LAYERS = """\
*The same by layer: above, the largest value of a token over its root mean square (log scale); below, \
signal to noise under the 4-bit quantiser (6 dB are one bit). A transform that works pulls the upper lines \
down and lifts the lower ones in every layer; a layer that stays behind is where the next error comes from. \
Kurtosis by layer stands under the outliers."""
HISTOGRAMS = """\
*How often values of block inputs occur, in units of their token's root mean square, all layers together \
(log scale; the outermost bins hold all that lies beyond). Outlier channels make the long tails of the grey \
line; the narrower a line, the finer its 4-bit grid."""

LINES = 8
"""Methods that one figure of lines shows at most."""


def inputs_section(model: Model, figures: Path, stem: str) -> list[str]:
    """Writes the figures, returns their text; empty where nothing of it is on record."""
    lines: list[list[str]] = []
    measured: dict[str, list[Record]] = {}
    panels: dict[str, plots.HistogramPanel] = {}
    for row in one_width(model):
        points = [point for point in diagnostic(row, "kurtosis") or () if "snr_after" in point]
        if points and not lines:
            lines.append(["(before)", *_means(points, "before")])
        if points:
            lines.append([row.label, *_means(points, "after")])
            measured[row.label] = points
        for entry in diagnostic(row, "histograms") or ():
            panel = panels.setdefault(
                entry["site"],
                plots.HistogramPanel(f"{entry['site']} inputs", entry["reach"], entry["before"]),
            )
            if entry["after"] != entry["before"]:
                panel.after[row.label] = entry["after"]
    if not lines:
        return []
    text = [
        "### Inputs of blocks before and after",
        INPUTS,
        table(["method", "kurtosis", "largest / rms", "signal to noise (dB)"], lines),
    ]
    shown, left_out = drawn([label for label, points in measured.items() if _transformed(points)])
    plots.layers_figure(figures / f"{stem}-layers.svg", _layers(measured, shown), model.labels)
    text += [
        f"![Largest value and signal to noise of block inputs by layer](figures/{stem}-layers.svg)",
        f"{LAYERS}{left_out}*",
    ]
    if not panels:
        return text
    shown, left_out = drawn(dict.fromkeys(label for panel in panels.values() for label in panel.after))
    histograms = [
        replace(panel, after={label: panel.after[label] for label in shown if label in panel.after})
        for panel in panels.values()
    ]
    plots.histogram_figure(figures / f"{stem}-inputs.svg", histograms, model.labels)
    alt = "Histograms of block inputs before and after each transform"
    return [*text, f"![{alt}](figures/{stem}-inputs.svg)", f"{HISTOGRAMS}{left_out}*"]


def _layers(measured: Mapping[str, Sequence[Record]], shown: Sequence[str]) -> list[plots.LayersPanel]:
    """A panel for each quantity and site; methods without a transform stay on the line of before."""
    sites = dict.fromkeys(point["site"] for points in measured.values() for point in points)
    panels = []
    for key, title in (("peak", "largest / rms"), ("snr", "signal to noise (dB)")):
        for site in sites:
            before: list[tuple[int, float]] = []
            after: dict[str, list[tuple[int, float]]] = {}
            for label, points in measured.items():
                here = [point for point in points if point["site"] == site]
                first, then = (
                    [(int(point["layer"]), number(point[f"{key}_{when}"])) for point in here]
                    for when in ("before", "after")
                )
                before = before or first
                if label in shown and moved(here, f"{key}_before", f"{key}_after"):
                    after[label] = then
            panels.append(plots.LayersPanel(f"{title}, {site} inputs", before, after, log=key == "peak"))
    return panels


def _means(points: Sequence[Record], when: str) -> list[str]:
    keys = ((when, 2), (f"peak_{when}", 2), (f"snr_{when}", 1))
    return [f"{sum(number(p[key]) for p in points) / len(points):.{digits}f}" for key, digits in keys]


def one_width(model: Model) -> list[Row]:
    """Each label's row of fewest bits: what is learned is the same at every bit-width."""
    return list({row.label: row for row in model.rows if not row.first.is_float}.values())


def moved(points: Sequence[Record], before: str, after: str) -> bool:
    """Whether a transform changed what is measured at any of the points."""
    pairs = [(number(point[before]), number(point.get(after))) for point in points]
    return any(abs(then - first) > 1e-3 * abs(first) for first, then in pairs)


def _transformed(points: Sequence[Record]) -> bool:
    return any(moved(points, f"{key}_before", f"{key}_after") for key in ("peak", "snr"))


def drawn(labels: Collection[str]) -> tuple[list[str], str]:
    """Which methods a figure of lines shows, in their order, and its caption's word on the others: more than
    `LINES` cannot be told apart. Those with the fewest options come first."""
    first = sorted(labels, key=lambda label: label.count("="))[:LINES]
    shown = [label for label in labels if label in first]
    if len(shown) == len(labels):
        return shown, ""
    return shown, f" Drawn: {len(shown)} of {len(labels)} methods, those with the fewest options."


def diagnostic(row: Row, what: str) -> Any:
    """A diagnostic of the first cell of a row that has it: the first seed's, unless that failed."""
    return next((found for cell in row.cells if (found := diagnostics(cell).get(what))), None)


def diagnostics(cell: Cell) -> Record:
    return cell.record.get("diagnostics") or {}
