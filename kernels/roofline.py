"""`python -m kernels.roofline`: the report of a GPU run of `python -m kernels.bench`, a table and a roofline
plot.

    python -m kernels.roofline results/reference/kernels-h100.json.xz --report reports/kernels

It measures nothing: the same JSON gives the same bytes. What the kernels are meant to reach is data, in
kernels/targets.py, and judged in kernels/verdicts.py. Why a target is missed stands beside the record, in
<name>.reasons.json: {target: {"<layer> <rows>": one sentence}}.
"""

import argparse
import io
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from kernels import recorded, svg
from kernels.command import run_command
from kernels.targets import BASELINE, COPY, SHAPE, W4A8, W4A16
from kernels.timing import duration
from kernels.verdicts import (
    NOT_A_RECORD,
    Key,
    Reasons,
    Row,
    attention_section,
    index,
    speed,
    targets_section,
)

REPORT, PLOT = "report.md", "roofline.svg"
CHECKED = "Results of the last replay are those of plain calls; of passes, those of the reference."
UNCHECKED = "Results were compared before graphs were recorded, of linears alone, not after the last replay."


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
            cells = [_speed_cell(row, of[0]) for row in of[1:]]
            lines.append(f"| {layer} | {count} | {_time_cell(of[0])} | {' | '.join(cells)} |")
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


def _speed_cell(row: Row | None, first: Row | None) -> str:
    found = speed(row, first)
    if row is None or found is None:
        return "-"
    return f"{found:.2f}" + ("*" if not row["rotated"] else "") + ("†" if row["eager"] else "")


def _rate(row: Row) -> str:
    seconds = statistics.median(row["seconds"])
    if row["multiply_adds"] > 200 * row["bytes"]:
        return f"{2 * row['multiply_adds'] / seconds / 1e12:.0f} TOPS"
    return f"{row['bytes'] / seconds / 1e12:.2f} TB/s"


def report(record: dict[str, Any], reasons: Reasons | None = None) -> str:
    """The Markdown report. reasons: why targets are missed. Raises ValueError for a record of another kind
    and for a reason for what is not missed."""
    rows = index(record)
    try:
        machine, limits = record["machine"], record["limits"]["measured"]
        versions = [f"torch {machine['torch']}", f"triton {machine['triton']}", f"driver {machine['driver']}"]
        versions += [f"{name} {version}" for name, version in machine["peers"].items()]
        checked = CHECKED if record.get("replays_compared") else UNCHECKED
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
            "in L2 (too small to rotate). †: launched by the host. -: did not run.",
            "",
            f"{checked} These kernels run by choices tuned on this kind of GPU for the very shapes shown "
            "here, where the tuning table has them; default choice: without the table. humming runs by its "
            "own heuristics, gemlite by the configurations that it ships.",
            "",
            f"![Rate against arithmetic intensity, with the measured ceilings]({PLOT})",
            "",
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(NOT_A_RECORD) from error
    body = (
        targets_section(rows, reasons or {})
        + attention_section(rows)
        + speed_section(rows)
        + ours_section(rows)
        + refusals_section(rows)
    )
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
    """The roofline of the run as SVG: the measured ceilings, and each linear as a point. Raises ValueError
    for a record of another kind."""
    from matplotlib.figure import Figure

    rows = index(record)
    figure = Figure(figsize=(8.6, 5.4), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    try:
        limits, device = record["limits"], record["machine"]["device"]
        bandwidth = limits["bytes_per_second"] / 1e12
        rates = limits["multiply_adds_per_second"]
        ceilings = {
            "int8, twice bf16": 2 * rates["int8"] / 1e12,
            "torch._int_mm": 2 * limits["measured"]["int8"] / 1e12,
            BASELINE: 2 * rates["bfloat16"] / 1e12,
        }
    except (KeyError, TypeError) as error:
        raise ValueError(NOT_A_RECORD) from error
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
    axes.set_title(f"{SHAPE}'s linears on {device}", fontsize=10)
    axes.grid(True, which="major", linewidth=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="lower right")
    stream.write(svg.drawn(figure))


def _json(path: Path) -> Any:
    try:
        return recorded.read(path)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


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
        record = _json(arguments.record)
        name = arguments.record.name.removesuffix(".xz").removesuffix(".json")
        beside = arguments.record.with_name(f"{name}.reasons.json")
        reasons = _json(beside) if beside.exists() else {}
        if not isinstance(reasons, dict) or not all(isinstance(each, dict) for each in reasons.values()):
            raise ValueError(f"{beside}: give {{target: {{'<layer> <rows>': reason}}}}")
        text, drawn = report(record, reasons), io.StringIO()
        plot(record, drawn)
        arguments.report.mkdir(parents=True, exist_ok=True)
        (arguments.report / REPORT).write_text(text)
        (arguments.report / PLOT).write_text(drawn.getvalue())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
