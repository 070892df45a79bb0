"""`python -m kernels.roofline`: the report of a GPU run of `python -m kernels.bench`, a table and a roofline
plot.

    python -m kernels.roofline results/reference/kernels-h100.json --report reports/kernels

It measures nothing: the same JSON gives the same bytes. What the kernels are meant to reach stands below in
TARGETS, as data; a target that was not measured is not met.
"""

import argparse
import io
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from kernels.timing import duration

REPORT, PLOT = "report.md", "roofline.svg"
BASELINE, COPY = "bf16 cuBLAS", "copy of the same bytes"
FEW, SIXTY_FOUR, MANY = (1, 4, 16), (64,), (1024, 4096, 8192)
SHAPE = "llama-3-8b"
LINEARS = ("qkv", "o", "gate_up", "down")

Row = dict[str, Any]
Key = tuple[str, str, str, int, str]
"""Shape, operation, layer, rows, contestant."""


@dataclass(frozen=True)
class Target:
    """`ours` against another contestant of the same contest, at every layer and number of rows named: at
    least `least` times as fast. aim: what was hoped for. limit: what the memory or the tensor cores allow at
    best."""

    title: str
    operation: str
    ours: str
    against: str
    layers: Sequence[str]
    rows: Sequence[int]
    least: float
    aim: float | None = None
    limit: float | None = None


def _against_humming(operation: str, ours: str, theirs: str, rows: Sequence[int]) -> Target:
    return Target(f"{ours} against {theirs}", operation, ours, theirs, LINEARS, rows, 1.0)


def _against_copy(title: str, operation: str, layers: Sequence[str]) -> Target:
    return Target(
        title, operation, "ours a4", COPY, layers, (*FEW, *SIXTY_FOUR, *MANY), 1 / 1.4, 1 / 1.3, 1.0
    )


W4A8, W4A16 = "linear w4a8", "linear w4a16 g128"
AT_REST = "ours w4a8, weights at rest"
A16_AT_REST = "ours w4a16, weights at rest"
TARGETS = (
    Target("W4A4, many rows", W4A8, "ours w4a4", BASELINE, LINEARS, MANY, 1.7, 1.8, 2.0),
    Target("W4A8, few rows", W4A8, AT_REST, BASELINE, LINEARS, FEW, 3.2, 3.5, 4.0),
    Target("W4A8, 64 rows", W4A8, AT_REST, BASELINE, LINEARS, SIXTY_FOUR, 2.7, 3.0, 3.8),
    Target("W4A16 g128, few rows", W4A16, A16_AT_REST, BASELINE, LINEARS, FEW, 3.2, 3.4, 3.9),
    _against_humming(W4A8, "ours w4a4", "humming w4a8", MANY),
    _against_humming(W4A8, "ours w4a4 + quantise", "humming w4a8 + quantise", MANY),
    _against_humming(W4A8, "ours w4a8", "humming w4a8", MANY),
    _against_humming(W4A8, AT_REST, "humming w4a8", (*FEW, *SIXTY_FOUR)),
    _against_humming(W4A8, "ours w4a8 + quantise", "humming w4a8 + quantise", (*FEW, *SIXTY_FOUR, *MANY)),
    _against_humming(W4A16, A16_AT_REST, "humming w4a16", FEW),
    _against_copy("RMSNorm + quantise", "rmsnorm + quantise", ("hidden",)),
    _against_copy("Hadamard + quantise", "hadamard + quantise", ("heads", "hidden", "intermediate")),
)


@dataclass(frozen=True)
class Point:
    """A target at one layer and number of rows; speed None where it was not measured."""

    layer: str
    rows: int
    speed: float | None


def index(record: dict[str, Any]) -> dict[Key, Row]:
    """The rows of a run by what they are about. Raises ValueError for a file of another kind."""
    try:
        rows = record["results"]
        return {(r["shape"], r["operation"], r["layer"], r["rows"], r["name"]): r for r in rows}
    except (KeyError, TypeError) as error:
        raise ValueError("this is no record of a GPU run of kernels.bench") from error


def speed(ours: Row | None, theirs: Row | None) -> float | None:
    """How many times as fast ours is: the median over turns, None where one of them did not run."""
    if ours is None or theirs is None or not ours["seconds"] or not theirs["seconds"]:
        return None
    return statistics.median(b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True))


def points(target: Target, rows: dict[Key, Row]) -> Iterator[Point]:
    """The target at each of its layers and numbers of rows."""
    for layer in target.layers:
        for count in target.rows:
            pair = [
                rows.get((SHAPE, target.operation, layer, count, name))
                for name in (target.ours, target.against)
            ]
            yield Point(layer, count, speed(*pair))


def met(target: Target, point: Point) -> bool:
    """Faster than another package means faster; other targets are met by reaching them."""
    if point.speed is None:
        return False
    return point.speed > target.least if target.least == 1.0 else point.speed >= target.least


def targets_section(rows: dict[Key, Row]) -> list[str]:
    """Every target with how often it is met and its slowest point, then what misses it."""
    lines = ["## Targets", ""]
    lines += [
        "| target | against | at least | aim | limit | met | slowest |",
        "|:--|:--|--:|--:|--:|--:|:--|",
    ]
    missed: list[str] = []
    for target in TARGETS:
        every = list(points(target, rows))
        measured = [point for point in every if point.speed is not None]
        slowest = min(measured, key=lambda point: point.speed or 0.0, default=None)
        worst = "not measured" if slowest is None else _at(slowest)
        numbers = [_times(target.least), _times(target.aim), _times(target.limit)]
        count = f"{sum(met(target, point) for point in every)} of {len(every)}"
        lines.append(f"| {' | '.join([target.title, target.against, *numbers, count, worst])} |")
        short = [point for point in measured if not met(target, point)]
        missed += [f"- {target.title}: {_at(point)}" for point in short]
        if len(measured) < len(every):
            missed.append(f"- {target.title}: {len(every) - len(measured)} not measured")
    lines += ["", "Missed:" if missed else "All are met.", ""]
    return [*lines, *missed, ""] if missed else lines


def _at(point: Point) -> str:
    rows = "1 row" if point.rows == 1 else f"{point.rows} rows"
    return f"{point.layer}, {rows}: {point.speed:.2f}x"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def speed_section(rows: dict[Key, Row]) -> list[str]:
    """For each shape and operation: the first contestant's time and all speeds against it."""
    lines: list[str] = []
    for shape, operation in dict.fromkeys(key[:2] for key in rows):
        here = {key: row for key, row in rows.items() if key[:2] == (shape, operation)}
        names = list(dict.fromkeys(key[4] for key in here))
        first, *others = names
        lines += [f"## {shape}, {operation}", ""]
        lines += [f"Speed against {first}, whose time stands beside it.", ""]
        lines += [f"| layer | rows | {first} | {' | '.join(others)} |", "|:--|" + "--:|" * (len(names) + 1)]
        for layer, count in dict.fromkeys(key[2:4] for key in here):
            of = [here.get((shape, operation, layer, count, name)) for name in names]
            speeds = [_speed_cell(row) for row in of[1:]]
            lines.append(f"| {layer} | {count} | {_time_cell(of[0])} | {' | '.join(speeds)} |")
        lines.append("")
    return lines


def ours_section(rows: dict[Key, Row]) -> list[str]:
    """What this project's own kernels reach: time, rate, share of the floor, the best of the others."""
    lines = ["## These kernels", ""]
    lines += ["| shape | operation | layer | rows | kernel | time | rate | of the floor | best other |"]
    lines += ["|:--|:--|:--|--:|:--|--:|--:|--:|:--|"]
    for (shape, operation, layer, count, name), row in rows.items():
        if row["by"] != "ours" or not row["seconds"]:
            continue
        others = {
            key[4]: found
            for key, other in rows.items()
            if key[:4] == (shape, operation, layer, count)
            and other["by"] != "ours"
            and key[4] not in (BASELINE, COPY)
            and (found := speed(row, other)) is not None
        }
        best = min(others, key=lambda other: others[other], default=None)
        versus = "" if best is None else f"{others[best]:.2f}x {best}"
        cells = [shape, operation, layer, str(count), name, _time_cell(row), _rate(row)]
        lines.append(f"| {' | '.join(cells)} | {row['of_floor']:.0%} | {versus} |")
    return [*lines, ""]


def refusals_section(rows: dict[Key, Row]) -> list[str]:
    """What did not run, and why, once for each reason."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for (shape, operation, layer, count, name), row in rows.items():
        if row["reason"] is not None:
            found.setdefault((name, operation, row["reason"]), []).append(f"{shape} {layer} {count}")
    if not found:
        return []
    lines = ["## What did not run", ""]
    for (name, operation, reason), where in found.items():
        places = ", ".join(where[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else "")
        lines.append(f"- {name}, {operation}: {reason} ({places})")
    return [*lines, ""]


def _time_cell(row: Row | None) -> str:
    if row is None or not row["seconds"]:
        return "-"
    marks = ("*" if not row["rotated"] else "") + ("†" if row["eager"] else "")
    return duration(statistics.median(row["seconds"])) + marks


def _speed_cell(row: Row | None) -> str:
    if row is None or row["speed"] is None:
        return "-"
    return f"{row['speed']:.2f}" + ("*" if not row["rotated"] else "") + ("†" if row["eager"] else "")


def _rate(row: Row) -> str:
    seconds = statistics.median(row["seconds"])
    if row["multiply_adds"] > 200 * row["bytes"]:
        return f"{2 * row['multiply_adds'] / seconds / 1e12:.0f} TOPS"
    return f"{row['bytes'] / seconds / 1e12:.2f} TB/s"


def report(record: dict[str, Any]) -> str:
    """The Markdown report. Raises ValueError for a record of another kind."""
    rows = index(record)
    try:
        machine, limits = record["machine"], record["limits"]["measured"]
        versions = [f"torch {machine['torch']}", f"triton {machine['triton']}", f"driver {machine['driver']}"]
        versions += [f"{name} {version}" for name, version in machine["peers"].items()]
        head = [
            f"# Int4 kernels on {machine['device']}",
            "",
            f"`{record['command']}`, {record['turns']} turns; commit {record['commit']}, sources "
            f"{machine['code']}, tuning table {machine['tuning'][:16]}.",
            "",
            f"{', '.join(versions)}.",
            "",
            f"Measured in the same run: copy {limits['copy'] / 1e12:.2f} TB/s (read and written), read "
            f"{limits['read'] / 1e12:.2f} TB/s, bf16 product {2 * limits['bf16'] / 1e12:.0f} TFLOP/s, "
            f"torch._int_mm {2 * limits['int8'] / 1e12:.0f} TOPS. Floors take twice the bf16 rate for int8, "
            "as tensor cores do.",
            "",
            "Times are medians of CUDA-graph replays over rotated operands, in turns. *: the operands stay "
            "in L2 (too small to rotate). †: launched by the host. -: did not run. Weights at rest: the "
            "kernel fetches them before the one in front of it has ended; w4a8 + quantise does so, too.",
            "",
            f"![Rate against arithmetic intensity, with the measured ceilings]({PLOT})",
            "",
        ]
    except (KeyError, TypeError) as error:
        raise ValueError("this is no record of a GPU run of kernels.bench") from error
    body = targets_section(rows) + speed_section(rows) + ours_section(rows) + refusals_section(rows)
    return "\n".join(head + body).rstrip() + "\n"


SERIES = {
    (W4A8, BASELINE): ("bf16 cuBLAS", "#555555", "x"),
    (W4A8, "ours w4a8"): ("ours w4a8", "#0072B2", "o"),
    (W4A16, "ours w4a16"): ("ours w4a16 g128", "#009E73", "s"),
    (W4A8, "humming w4a8"): ("humming w4a8", "#D55E00", "^"),
    (W4A16, "humming w4a16"): ("humming w4a16 g128", "#E69F00", "v"),
    (W4A16, "tinygemm"): ("tinygemm g128", "#CC79A7", "D"),
}
"""What the plot shows of SHAPE's linears: label, colour (Okabe and Ito's) and marker."""


def plot(record: dict[str, Any], stream: TextIO) -> None:
    """The roofline of the run as SVG: the measured ceilings, and each linear as a point."""
    import matplotlib
    from matplotlib.figure import Figure

    rows, limits = index(record), record["limits"]
    figure = Figure(figsize=(8.6, 5.4), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    bandwidth = limits["bytes_per_second"] / 1e12
    rates = limits["multiply_adds_per_second"]
    ceilings = {
        "int8, twice bf16": 2 * rates["int8"] / 1e12,
        "torch._int_mm": 2 * limits["measured"]["int8"] / 1e12,
        BASELINE: 2 * rates["bfloat16"] / 1e12,
    }
    left, right = 0.5, 2e4
    for name, rate in ceilings.items():
        corner = rate / bandwidth
        axes.plot(
            [left, corner, right], [left * bandwidth, rate, rate], color="black", linewidth=0.9, linestyle="-"
        )
        axes.annotate(
            f"{name}: {rate:.0f}",
            (right, rate),
            xytext=(-2, -9 if name == BASELINE else 3),
            textcoords="offset points",
            ha="right",
            fontsize=7,
        )
    axes.annotate(
        f"{bandwidth:.2f} TB/s", (20, 20 * bandwidth), xytext=(8, -10), textcoords="offset points", fontsize=7
    )
    for (operation, name), (label, colour, marker) in SERIES.items():
        shown = [
            row
            for key, row in rows.items()
            if key[0] == SHAPE and key[1] == operation and key[4] == name and row["seconds"]
        ]
        if not shown:
            continue
        intensity = [2 * row["multiply_adds"] / row["bytes"] for row in shown]
        reached = [2 * row["multiply_adds"] / statistics.median(row["seconds"]) / 1e12 for row in shown]
        axes.plot(
            intensity,
            reached,
            linestyle="",
            marker=marker,
            color=colour,
            label=label,
            markersize=5,
            alpha=0.85,
        )
    axes.set_xlim(left, right)
    axes.set_xlabel("operations for each byte that must move")
    axes.set_ylabel("10¹² operations a second")
    axes.set_title(f"{SHAPE}'s linears on {record['machine']['device']}", fontsize=10)
    axes.grid(True, which="major", linewidth=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="lower right")
    # Text becomes outlines, and no date or random id enters: the same bytes everywhere.
    with matplotlib.rc_context({"svg.hashsalt": "quantgrid", "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": "quantgrid"})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.roofline", description="Report a GPU run of python -m kernels.bench."
    )
    parser.add_argument("record", type=Path, help="the JSON that --out wrote")
    parser.add_argument(
        "--report", type=Path, required=True, metavar="FOLDER", help="where to write the report"
    )
    arguments = parser.parse_args(argv)
    try:
        record = json.loads(arguments.record.read_text())
        text, drawn = report(record), io.StringIO()
        plot(record, drawn)
        arguments.report.mkdir(parents=True, exist_ok=True)
        (arguments.report / REPORT).write_text(text)
        (arguments.report / PLOT).write_text(drawn.getvalue())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
