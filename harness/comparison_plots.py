"""Figures that set methods against what they cost, and against each other task by task; drawn as those of
plots.py are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from harness.plots import axes_grid, dress, legend, line_style, log_axis, log_ticks, save, tick_label

WORSE, BETTER, ABSENT = "#D55E00", "#0072B2", "#EEEEEE"
"""Vermillion and blue of Okabe and Ito's palette: apart under every common colour blindness."""
INK, PAPER = "#1A1A1A", "#FAFAFA"
"""Words on a coloured cell: they keep their colour on a dark page, as the cell does."""
DARK = 0.19
"""Relative luminance below which PAPER stands out from a cell better than INK does."""
FRONT = "#777777"
BEYOND = 20
"""How many times float's perplexity still has its place on the axis."""
EQUAL = 0.01
"""Share of a cost by which two rows may differ and still cost the same."""


@dataclass(frozen=True)
class Point:
    """A row in a cost panel. stderr NaN: unknown; flags: those that tables mark the row with."""

    cost: float
    value: float
    stderr: float
    bits: str
    flags: str = ""


@dataclass(frozen=True)
class CostPanel:
    """One pair of axes of the Pareto figure: a value against a cost, label -> points."""

    title: str
    across: str
    points: Mapping[str, Sequence[Point]]
    higher: bool
    """Whether more of the value is better."""
    more: bool = False
    """Whether more of the cost is better, as of tokens per second."""
    log: bool = False
    """Whether the value stands on a log axis."""
    wide: bool = False
    """Whether the cost stands on a log axis."""
    reference: Point | None = None
    """The unquantised model."""


@dataclass(frozen=True)
class HeatBlock:
    """Columns of the heat map that share a unit. cells[row][column]: what stands in it, and its colour from
    -1 (much better) over 0 to 1 (much worse); None where there is no number."""

    title: str
    columns: Sequence[str]
    cells: Sequence[Sequence[tuple[str, float] | None]]


@dataclass(frozen=True)
class ErrorPanel:
    """One pair of axes of the figure of rounding errors: label -> (layer, relative error)."""

    title: str
    series: Mapping[str, Sequence[tuple[int, float]]]


def front(points: Sequence[Point], *, higher: bool, more: bool) -> list[Point]:
    """The points that no other one beats, by their cost: none has a better value for a cost that is at most
    `EQUAL` worse, and none an equal value for less."""

    def loss(point: Point) -> float:
        return -point.value if higher else point.value

    def price(point: Point) -> float:
        return 1 / point.cost if more else point.cost

    def beats(other: Point, point: Point) -> bool:
        if loss(other) < loss(point):
            return price(other) <= (1 + EQUAL) * price(point)
        return loss(other) == loss(point) and (1 + EQUAL) * price(other) < price(point)

    kept = [point for point in points if not any(beats(other, point) for other in points)]
    return sorted(kept, key=lambda point: point.cost)


def pareto_figure(path: Path, panels: Sequence[CostPanel], order: Sequence[str], columns: int) -> None:
    """Value against cost, a marker a row, `columns` panels a line; the line joins the rows that no other
    beats in both, and these have their bit-width beside them, flagged rows their flags. Perplexities beyond
    `BEYOND` times float's are arrows at the upper end, so that the others can be told apart. `order` as in
    `plots.bits_figure`."""
    figure, axes_of = axes_grid(len(panels), columns=columns)
    for axes, panel in zip(axes_of, panels, strict=True):
        most = BEYOND * panel.reference.value if panel.log and panel.reference is not None else math.inf
        within = {
            label: [point for point in points if point.value <= most]
            for label, points in panel.points.items()
        }
        everything = [point for points in within.values() for point in points]
        for label, points in panel.points.items():
            for point in points:
                if point.value > most:
                    colour = line_style(order.index(label))["color"]
                    axes.annotate("↑", (point.cost, most), ha="center", va="top", color=colour)
        if panel.reference is not None:
            everything.append(panel.reference)
            axes.plot(panel.reference.cost, panel.reference.value, "k*", markersize=10, label="float")
        best = front(everything, higher=panel.higher, more=panel.more)
        axes.plot(
            [point.cost for point in best],
            [point.value for point in best],
            color=FRONT,
            linestyle="--",
            linewidth=1.0,
            zorder=1,
            label="best for its cost",
        )
        for label in filter(within.__contains__, order):  # those beyond, too, for the legend
            points = within[label]
            axes.errorbar(
                [point.cost for point in points],
                [point.value for point in points],
                yerr=[point.stderr if math.isfinite(point.stderr) else 0.0 for point in points],
                capsize=2,
                label=label,
                **line_style(order.index(label)) | {"linestyle": "none", "elinewidth": 1.0},
            )
        named: dict[float, list[Point]] = {}
        for point in best:
            if point is not panel.reference:
                named.setdefault(point.value, []).append(point)
        for place, (value, points) in enumerate(named.items()):  # equal ones stand on each other
            axes.annotate(
                ", ".join(dict.fromkeys(f"{point.bits} {point.flags}".strip() for point in points)),
                (points[0].cost, value),
                xytext=(5, -10 if place % 2 else 5),
                textcoords="offset points",
                fontsize=7,
            )
        for point in everything:
            if point.flags and point not in best:
                axes.annotate(
                    point.flags,
                    (point.cost, point.value),
                    xytext=(-10, -3),
                    textcoords="offset points",
                    fontsize=7,
                )
        costs = [point.cost for point in everything]
        axes.margins(x=0.18)
        axes.set_xlabel(panel.across)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        dress(axes, panel.title)
        if panel.wide:
            _wide_axis(axes, costs)
        if panel.log:
            ends = [p.value + e for p in everything if math.isfinite(p.stderr) for e in (p.stderr, -p.stderr)]
            beyond = [most] if within != panel.points else []
            log_axis(axes, [*(point.value for point in everything), *ends, *beyond])
    legend(figure)
    save(figure, path)


def heat_figure(path: Path, rows: Sequence[str], blocks: Sequence[HeatBlock]) -> None:
    """A table of coloured cells, a line a row: blue is better than the reference, vermillion worse."""
    widths = [len(block.columns) for block in blocks]
    names = max(2.6, 0.3 + 0.065 * max(map(len, rows), default=0))  # else long ones leave no room for cells
    figure = Figure(
        figsize=(names + 0.92 * sum(widths) + 0.3 * len(blocks), 1.9 + 0.3 * len(rows)),
        layout="constrained",
        facecolor="white",
    )
    grid = figure.add_gridspec(1, len(blocks), width_ratios=widths)
    for place, block in enumerate(blocks):
        axes = figure.add_subplot(grid[0, place])
        for line, cells in enumerate(block.cells):
            for column, cell in enumerate(cells):
                _heat_cell(axes, column, line, cell)
        axes.set_xlim(0, len(block.columns))
        axes.set_ylim(len(rows), 0)
        places = [column + 0.5 for column in range(len(block.columns))]
        axes.set_xticks(places, block.columns, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks([line + 0.5 for line in range(len(rows))], rows if place == 0 else [], fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(block.title, fontsize=10, loc="left")
    save(figure, path)


def errors_figure(path: Path, panels: Sequence[ErrorPanel], order: Sequence[str]) -> None:
    """Rounding error of the weights against the layer, one line a method; `order` as in
    `plots.bits_figure`."""
    figure, axes_of = axes_grid(len(panels))
    top = max((y for panel in panels for series in panel.series.values() for _, y in series), default=1.0)
    for axes, panel in zip(axes_of, panels, strict=True):
        for label in filter(panel.series.__contains__, order):
            points = panel.series[label]
            axes.plot(
                [x for x, _ in points], [y for _, y in points], **line_style(order.index(label)), label=label
            )
        axes.set_ylim(0, 1.05 * top)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        dress(axes, panel.title)
    legend(figure)
    save(figure, path)


def _heat_cell(axes: Axes, column: int, line: int, cell: tuple[str, float] | None) -> None:
    colour = ABSENT if cell is None else shade(cell[1])
    axes.add_patch(Rectangle((column + 0.02, line + 0.04), 0.96, 0.92, facecolor=colour, linewidth=0))
    dark = _luminance(colour) < DARK
    words: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "color": PAPER if dark else INK}
    axes.text(column + 0.5, line + 0.5, "–" if cell is None else cell[0], **words)


def shade(strength: float) -> str:
    """The colour of a cell: nearly white at 0, full at -1 and 1; of what is not finite, the darkest on its
    side."""
    end = WORSE if not strength < 0 else BETTER
    share = min(1.0, abs(strength)) if math.isfinite(strength) else 1.0
    ends = zip(to_rgb(PAPER), to_rgb(end), strict=True)
    mixed = (round(255 * (pale + share * (full - pale))) for pale, full in ends)
    return "#" + "".join(f"{part:02X}" for part in mixed)


def _luminance(colour: str) -> float:
    """Relative luminance as the Web Content Accessibility Guidelines define it, of sRGB."""
    parts = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour))
    red, green, blue = parts
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _wide_axis(axes: Axes, values: Sequence[float]) -> None:
    """A log axis across, with round numbers on it; of nothing, the axis as it is."""
    if not values:
        return
    low, high = min(values), max(values)
    margin = (high / low) ** 0.12 * 1.1
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)
    axes.xaxis.set_major_locator(FixedLocator(log_ticks(low / margin, high * margin)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_label(value)))
