"""The report's figures, as SVG files that are the same bytes on every run.

Colours are Okabe and Ito's (distinct under all common colour blindness), without their yellow, which is
too faint on white; markers tell methods apart a second time, and where there are more methods than colours
so do dashes. The background is white in every figure, so
that it reads the same on a dark page. No date or random id enters a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from harness import store
from kernels import svg

UNIFORM, GAUSSIAN = 1.8, 3.0
"""Kurtosis (4th standardised moment) of a uniform and of a Gaussian distribution."""
CLOSE = 5.0
SMOOTH = 10
MARKED = 8

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")
_GREY = "#555555"


@dataclass(frozen=True)
class Panel:
    """One pair of axes of the bits figure. series: label -> points (bits, value, standard error)."""

    title: str
    series: Mapping[str, Sequence[tuple[str, float, float]]]
    reference: float | None = None
    """Value of the unquantised model, a dashed line."""
    log: bool = False


@dataclass(frozen=True)
class KurtosisPanel:
    """One pair of axes of the kurtosis figure: mean per-token kurtosis of each layer (layer, value)."""

    title: str
    before: Sequence[tuple[int, float]]
    after: Mapping[tuple[str, ...], Sequence[tuple[int, float]]] = field(default_factory=dict)
    """Labels of the methods that share a line -> points."""


@dataclass(frozen=True)
class LayersPanel:
    """One pair of axes of the figure of block inputs: a value of each layer (layer, value), by label."""

    title: str
    before: Sequence[tuple[int, float]]
    after: Mapping[str, Sequence[tuple[int, float]]]
    log: bool = False


@dataclass(frozen=True)
class DepthPanel:
    """One pair of axes of the depth figure: a value of every layer, on a log axis."""

    title: str
    series: Mapping[str, Sequence[float]]
    marked: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Layers of a series with a ring around them."""


@dataclass(frozen=True)
class LearningPanel:
    """One pair of axes of the learning figure: the loss at each step, by label."""

    title: str
    series: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class HistogramPanel:
    """One pair of axes of the histogram figure: counts in equal bins from -reach to reach."""

    title: str
    reach: float
    before: Sequence[int]
    after: dict[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class CurvePanel:
    """One pair of axes of a curve figure: label -> points (x, y)."""

    title: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    across: str
    """What x is."""
    log: bool = False
    reference: tuple[str, float] | None = None
    """A dotted line: what to call it, and where."""


def bits_figure(path: Path, bits: Sequence[str], panels: Sequence[Panel], order: Sequence[str]) -> None:
    """Value against bit-width, one line a method, from most bits to fewest; values not finite are left out.

    Bit-widths are categories, not numbers: settings such as w4a16 and w4a4kv4 have the same effective bits
    per weight, and their difference lies in activations and KV cache. A label's place in `order` is its
    colour and marker, so that a method looks the same in all figures.
    """
    figure = Figure(figsize=(4.3 * len(panels) + 2.4, 4.4), layout="constrained", facecolor="white")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        shown = [] if panel.reference is None else [panel.reference]
        if panel.reference is not None:
            axes.axhline(panel.reference, color="black", linestyle="--", linewidth=1.2, label="float")
        for number, label in enumerate(order):
            if label not in panel.series:
                continue
            # Side by side within a bit-width: equal values must not hide each other.
            shift = min(0.05, 0.6 / len(order)) * (number - (len(order) - 1) / 2)
            points = [p for p in panel.series[label] if math.isfinite(p[1])]
            errors = [p[2] if math.isfinite(p[2]) else 0.0 for p in points]
            axes.errorbar(
                [bits.index(name) + shift for name, _, _ in points],
                [value for _, value, _ in points],
                yerr=errors,
                capsize=2,
                **line_style(number),
                label=label,
            )
            for (_, value, _), error in zip(points, errors, strict=True):
                shown += [value + error, value - error if value > error or not panel.log else value]
        axes.set_xticks(range(len(bits)), bits)
        axes.set_xlim(-0.5, len(bits) - 0.5)
        axes.set_xlabel("fewer bits →")
        dress(axes, panel.title)
        if panel.log:
            log_axis(axes, shown)
    legend(figure)
    save(figure, path)


def kurtosis_figure(path: Path, panels: Sequence[KurtosisPanel], order: Sequence[str]) -> None:
    """Kurtosis against layer, before (grey) and after each transform, on one log axis for all panels; below,
    the same from the uniform's up to CLOSE, where transforms differ.

    `order` as in `bits_figure`; of methods that share a line the first gives colour and marker.
    """
    figure, axes_of = axes_grid(2 * len(panels), columns=len(panels))
    everything = [
        value for panel in panels for line in (panel.before, *panel.after.values()) for _, value in line
    ]
    grey: dict[str, Any] = {"color": _GREY, "marker": ".", "linewidth": 1.6}
    for axes, panel in zip(axes_of, [*panels, *panels], strict=True):
        lines = [("before (float model)", grey, panel.before)]
        for labels, series in panel.after.items():
            style = layer_style(order.index(labels[0]), len(series))
            lines.append((f"after {', '.join(labels)}", style, series))
        for label, style, series in lines:
            points = [(layer, value) for layer, value in series if value > 0 and math.isfinite(value)]
            axes.plot([layer for layer, _ in points], [value for _, value in points], **style, label=label)
        axes.axhline(GAUSSIAN, color="black", linestyle="--", linewidth=1, label="Gaussian (3)")
        axes.axhline(UNIFORM, color="black", linestyle=":", linewidth=1, label="uniform (1.8)")
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        dress(axes, panel.title)
        log_axis(axes, [UNIFORM, GAUSSIAN, *everything])
    for axes, panel in zip(axes_of[len(panels) :], panels, strict=True):
        axes.set_title(f"{panel.title}, up to {CLOSE:g}", fontsize=11, loc="left")
        log_axis(axes, [UNIFORM, CLOSE])
    legend(figure)
    save(figure, path)


def layers_figure(path: Path, panels: Sequence[LayersPanel], order: Sequence[str]) -> None:
    """A value against the layer, before (grey) and after each transform, two panels a line; `order` as in
    `bits_figure`."""
    figure, axes_of = axes_grid(len(panels), columns=2)
    for axes, panel in zip(axes_of, panels, strict=True):
        grey: dict[str, Any] = {"color": _GREY, "marker": ".", "linewidth": 1.6}
        axes.plot(*zip(*panel.before, strict=True), **grey, label="before (float model)")
        for label, series in panel.after.items():
            style = layer_style(order.index(label), len(series))
            axes.plot(*zip(*series, strict=True), **style, label=f"after {label}")
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        dress(axes, panel.title)
        if panel.log:
            lines = (panel.before, *panel.after.values())
            log_axis(axes, [value for line in lines for _, value in line])
    legend(figure)
    save(figure, path)


def depth_figure(path: Path, panels: Sequence[DepthPanel]) -> None:
    """Values along depth, one line a series; what is not finite and positive is left out."""
    figure = Figure(figsize=(4.3 * len(panels) + 2.4, 4.4), layout="constrained", facecolor="white")
    order = list(dict.fromkeys(label for panel in panels for label in panel.series))
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for label, values in panel.series.items():
            points = [(at, value) for at, value in enumerate(values) if value > 0 and math.isfinite(value)]
            places, heights = [at for at, _ in points], [value for _, value in points]
            axes.plot(places, heights, **layer_style(order.index(label), len(points)), label=label)
            ringed = [point for point in points if point[0] in panel.marked.get(label, ())]
            if ringed:
                axes.scatter(
                    [at for at, _ in ringed],
                    [value for _, value in ringed],
                    s=90,
                    facecolors="none",
                    edgecolors="black",
                    label="boosted",
                )
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        dress(axes, panel.title)
        log_axis(axes, [value for values in panel.series.values() for value in values])
    legend(figure)
    save(figure, path)


def learning_figure(path: Path, panels: Sequence[LearningPanel], order: Sequence[str]) -> None:
    """Loss against step, mean of the last SMOOTH steps, one line a method; `order` as in `bits_figure`."""
    figure, axes_of = axes_grid(len(panels))
    for axes, panel in zip(axes_of, panels, strict=True):
        for label, losses in panel.series.items():
            style = line_style(order.index(label)) | {"marker": "", "linewidth": 1.2}
            last = [losses[max(0, end - SMOOTH) : end] for end in range(1, len(losses) + 1)]
            axes.plot(
                range(1, len(losses) + 1), [sum(some) / len(some) for some in last], **style, label=label
            )
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        dress(axes, panel.title)
    legend(figure)
    save(figure, path)


def curve_figure(path: Path, panels: Sequence[CurvePanel], order: Sequence[str]) -> None:
    """y against x, one line a label; `order` as in `bits_figure`. A label "name, repetition" takes the colour
    of its name and is dashed."""
    figure, axes_of = axes_grid(len(panels))
    for axes, panel in zip(axes_of, panels, strict=True):
        for label, points in panel.series.items():
            name, _, repetition = label.partition(", ")
            style = line_style(order.index(name)) | {"markersize": 3.0}
            style |= {"linestyle": "--"} if repetition else {}
            style |= {"marker": ""} if repetition or len(points) > 50 else {}
            axes.plot([x for x, _ in points], [y for _, y in points], **style, label=label)
        if panel.reference is not None:
            name, place = panel.reference
            axes.axhline(place, color="black", linestyle=":", linewidth=1, label=name)
        axes.set_xlabel(panel.across)
        dress(axes, panel.title)
        if panel.log:
            log_axis(axes, [y for points in panel.series.values() for _, y in points])
    legend(figure)
    save(figure, path)


def histogram_figure(path: Path, panels: Sequence[HistogramPanel], order: Sequence[str]) -> None:
    """Share of values against their size in units of the root mean square, before (grey) and after each
    transform, on a log axis; `order` as in `bits_figure`."""
    figure, axes_of = axes_grid(len(panels))
    for axes, panel in zip(axes_of, panels, strict=True):
        grey: dict[str, Any] = {"color": _GREY, "linewidth": 1.6}
        lines = [("before (float model)", grey, panel.before)]
        for label, counts in panel.after.items():
            lines.append((f"after {label}", line_style(order.index(label)) | {"marker": ""}, counts))
        shares: list[float] = []
        for label, style, counts in lines:
            total, width = sum(counts) or 1, 2 * panel.reach / len(counts)
            points = [(width * (i + 0.5) - panel.reach, n / total) for i, n in enumerate(counts) if n]
            axes.plot([x for x, _ in points], [y for _, y in points], **style, label=label)
            shares += [y for _, y in points]
        axes.set_xlabel("value / root mean square")
        dress(axes, panel.title)
        log_axis(axes, shares)
    legend(figure)
    save(figure, path)


def sizes_figure(
    path: Path, measure: str, curves: Mapping[str, Sequence[tuple[int, float, float, float]]]
) -> None:
    """Two panels against the number of sequences (log axis): `measure` with its standard error, and kurtosis.
    curves: label -> points (sequences, value, standard error, kurtosis)."""
    figure, (left, right) = axes_grid(2)
    for number, (label, points) in enumerate(curves.items()):
        sizes, style = [size for size, *_ in points], line_style(number)
        errors = [error if math.isfinite(error) else 0.0 for _, _, error, _ in points]
        left.errorbar(sizes, [v for _, v, *_ in points], yerr=errors, capsize=2, **style, label=label)
        right.plot(sizes, [kurtosis for *_, kurtosis in points], **style, label=label)
    right.axhline(UNIFORM, color="black", linestyle=":", linewidth=1, label="uniform (1.8)")
    ticks = sorted({size for points in curves.values() for size, *_ in points})
    for axes, title in ((left, f"{measure} (lower is better)"), (right, "kurtosis of block inputs")):
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("calibration sequences")
        dress(axes, title)
    legend(figure)
    save(figure, path)


_LEGEND, _HANDLE, _LETTER = 2.4, 0.7, 0.073
"""Inches: what a figure leaves to its legend, and what an entry takes and each letter of it."""


def axes_grid(count: int, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    """A figure with so many pairs of axes, `columns` (None: all) side by side, and room for its legend."""
    across = columns or count
    down = -(-count // across)
    size = (4.3 * across + _LEGEND, 4.4 * down)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    return figure, [figure.add_subplot(down, across, index + 1) for index in range(count)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers within [low, high] for a log axis: 1, 2, 5 per decade, fewer over a wide range, more
    over a narrow one; at least two wherever low < high."""
    decades = math.log10(high / low) if high > low > 0 else 0.0
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1.0,) if decades > 4 else (1.0, 3.0) if decades > 2.5 else (1.0, 2.0, 5.0)
    ticks = [step * 10.0**power for power in powers for step in steps]
    inside = [tick for tick in ticks if low <= tick <= high]
    if len(inside) >= 3:
        return inside
    return [float(tick) for tick in MaxNLocator(nbins=5).tick_values(low, high) if low <= tick <= high]


def log_axis(axes: Axes, values: Sequence[float]) -> None:
    values = [value for value in values if value > 0 and math.isfinite(value)]
    if not values:
        return
    margin = (max(values) / min(values)) ** 0.06 * 1.02
    low, high = min(values) / margin, max(values) * margin
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_label(value)))


def tick_label(value: float) -> str:
    return f"{value:g}" if value < 1e4 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def line_style(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
        "markersize": 4.5,
        "linewidth": 1.3,
    }


def layer_style(number: int, layers: int) -> dict[str, Any]:
    """Of a line over layers: `MARKED` markers or a few more, each line's in other places, so that lines that
    lie on each other can be told apart."""
    step = max(1, layers // MARKED)
    return line_style(number) | {"markevery": (number % step, step)}


def dress(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure) -> None:
    entries = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", frameon=False, fontsize=9)
    wanted = _HANDLE + _LETTER * max(map(len, entries), default=0)
    # Else long names squeeze the axes.
    figure.set_figwidth(figure.get_figwidth() + max(0.0, wanted - _LEGEND))


def save(figure: Figure, path: Path) -> None:
    store.write_text(path, svg.drawn(figure))
