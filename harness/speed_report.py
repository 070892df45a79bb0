"""The report of a run of `python -m harness.speed --shape`: tables and a figure.

    python -m harness.speed_report results/reference/speed-h100.json.xz --report reports/speed

It measures nothing: the same JSON gives the same bytes.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from harness.markdown import compact, table
from harness.speed_matrix import SCHEMA
from harness.speed_shapes import ONLINE
from harness.speed_targets import BASELINE, judge
from harness.store import os_reason, write_text
from kernels import recorded, svg
from kernels.command import run_command
from kernels.timing import Timing, duration, spread
from methods.errors import UserError

REPORT, PLOT = "report.md", "speed.svg"
NOT_A_RECORD = "no record of `python -m harness.speed --shape` that this version reads"
GIGABYTE = 1e9
GUIDE = """\
Decoders of published shapes with random weights, which cost what real ones cost. A form is `bf16`, or bits \
as grids name them: `w4a8kv8` has weights of 4 bits, inputs of linears and a KV cache of 8. Embedding and \
lm_head are bf16 in all. All forms have merged q/k/v and gate/up projections and decode by one CUDA graph a \
step, with attention of this project's; a prefill attends with PyTorch's. Contexts beyond those that a model \
was made for are timed as they are. Forms take turns in one process; `x {first}` is the \
median over turns of {first}'s time as a multiple of the form's, so above 1 is faster."""
FLOORS = """\
Floor: weights and the keys and values of the context read once at the measured bandwidth, or the \
multiply-adds of linears, head and attention at the measured rate of a large product (int8: twice that of \
bf16, as tensor cores do), whichever takes longer; `of floor` is its share of the time. *: {first} and this \
form did not fit beside each other and were timed one after the other. †: steps were launched by the host. \
Peak: bytes that torch had allocated at most, with this form's weights and cache alone. J/token: {energy}."""
SHORTEST_ENERGY = 1.0
"""Seconds: what a driver's counter says of less is off by more than a tenth."""
DECODED = """\
Each step gives one token of every sequence behind a context of this length; the cache holds random rows. \
tokens/s counts those of all sequences."""
PREFILLED = """\
From the call to the logits of the last position, launched by the host: the time to first token but for \
sampling."""
OVERHEAD = """\
What methods compute online beside the quantised linears, on the same random decoder in turns: microseconds \
more for each token of each sequence, and as a share of the time without. Only the costs are those of the \
methods; what they gain is in the reports on accuracy."""
SHARES = """\
By the GPU's profiler over {where}: each kernel from the end of the one before it, or its own start where \
that is later, to its own end."""


Row = dict[str, Any]


def report(record: Row) -> str:
    """The Markdown report. Raises UserError for a record of another kind."""
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or "results" not in record:
        raise UserError(NOT_A_RECORD)
    try:
        parts = [
            *_head(record),
            *_targets(record),
            *(part for shape in record["shapes"] for part in _shape(record, shape)),
            *_not_run(record),
            *_implementations(record),
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{NOT_A_RECORD}: {type(error).__name__} {error}") from error
    return "\n\n".join(parts) + "\n"


def _head(record: Row) -> list[str]:
    machine, limits = record["machine"], record["limits"]
    rates = limits["multiply_adds_per_second"]
    versions = [
        f"{name} {machine[name]}"
        for name in ("python", "torch", "triton", "cuda", "driver")
        if machine.get(name)
    ]
    measured = [f"memory {limits['bytes_per_second'] / 1e12:.2f} TB/s"]
    measured += [f"{name} {2 * rate / 1e12:.0f} T operations/s" for name, rate in rates.items()]
    tuned = f", tuning table {machine['tuning'][:16]}" if machine.get("tuning") else ""
    made = f"`{record['command']}`, {record['turns']} turns; commit {record['commit']}, "
    return [
        f"# Whole decoders on {machine['gpu'] or machine['cpu']}",
        f"{made}sources {machine['code']}{tuned}.",
        f"{', '.join(versions)}. Limits, in the same run: {', '.join(measured)}.",
        GUIDE.format(first=first_form(record)),
    ]


def first_form(record: Row) -> str:
    """What forms are held against: bf16 where it was timed, else the first of the others."""
    rows = record["results"]
    return str(rows[0]["form"]) if rows else BASELINE


def _targets(record: Row) -> list[str]:
    verdicts = judge([*record["results"], *record["overhead"]])
    if not verdicts:
        return []
    lines = []
    for verdict in verdicts:
        value = "not measured" if verdict.value is None else f"{verdict.value:.3g} ({verdict.form})"
        met = {None: "–", True: "yes", False: "no"}[verdict.met]
        met = met if verdict.reason is None else f"not judged: {verdict.reason}"
        lines.append([verdict.title, verdict.shape, verdict.bound, value, met])
    return ["## Targets", table(["target", "shape", "bound", "measured", "met"], lines)]


def _shape(record: Row, shape: str) -> list[str]:
    rows = [row for row in record["results"] if row["shape"] == shape]
    config = record["shapes"][shape]
    facts = f"{config['layers']} layers of {config['hidden_size']}, {config['heads']} heads and "
    facts += f"{config['kv_heads']} of keys and values of {config['head_dim']}, "
    facts += f"MLP {config['intermediate_size']}, "
    facts += f"vocabulary {config['vocab_size']}{', tied' if config['tied'] else ''}"
    online = dict.fromkeys(row["online"] for row in rows if row["form"] != BASELINE)
    facts += "".join(f"; {ONLINE[name].says}" for name in online if name in ONLINE)
    parts = [f"## {shape}", f"{facts}."]
    energy, shown = _energy(record), record.get("energy_seconds", 0.0) >= SHORTEST_ENERGY
    for phase, says in (("decode", DECODED), ("prefill", PREFILLED)):
        own = [row for row in rows if row["phase"] == phase]
        if own:
            parts += [f"### {shape}: {phase}", says, _rows_table(own, first_form(record), shown)]
    if rows:
        first = first_form(record)
        parts += [FLOORS.format(energy=energy, first=first)]
        parts += [f"![Decoding beside {first}, by context]({PLOT})"]
        parts = parts if shape == next(iter(record["shapes"])) else parts[:-1]
    return [*parts, *_overhead(record, shape), *_shares(record, shape)]


def _energy(record: Row) -> str:
    """What is said of the column."""
    if not record["energy"]:
        return "the driver reports no energy"
    if record.get("energy_seconds", 0.0) < SHORTEST_ENERGY:
        return (
            f"not shown, since each was measured over less than {SHORTEST_ENERGY:g} s, in which the driver's "
            "counter moves a few times only"
        )
    return f"by the driver's {record['energy']}, over {record['energy_seconds']:g} s or more of each"


def _rows_table(rows: Sequence[Row], first: str, energy: bool) -> str:
    prefill = rows[0]["phase"] == "prefill"
    head = ["batch", "context", "bits", "median", "fastest to slowest", f"x {first}", "tokens/s", "J/token"]
    head += ["floor", "of floor", "bound by", "peak GB", "weights GB", "KV GB"]
    lines = []
    ordered = sorted(rows, key=lambda row: (row["batch"], row["context"]))
    for row in ordered:
        line = [row["batch"], row["context"], row["form"]]
        sizes = [f"{row['weights'] / GIGABYTE:.2f}", f"{row['kv'] / GIGABYTE:.2f}"]
        floor = [duration(row["floor"])]
        if row["reason"] is not None:
            lines.append([*line, "–", "–", "–", "–", "–", *floor, "–", row["bound"], "–", *sizes])
            continue
        timing = Timing(tuple(row["seconds"]))
        speed = "–" if row["speed"] is None else f"{row['speed']:.2f}{'*' if row['apart'] else ''}"
        mark = "" if prefill or row["eager"] is None else "†"
        line += [duration(timing.median) + mark, spread(timing), speed, f"{row['tokens_per_second']:,.0f}"]
        line += [
            _number(row["joules_per_token"] if energy else None, "{:.3g}"),
            *floor,
            f"{row['of_floor']:.0%}",
            row["bound"],
        ]
        lines.append([*line, _number(row["peak"], "{:.1f}", GIGABYTE), *sizes])
    return table(head, lines)


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "–" if value is None else form.format(value / unit)


def _overhead(record: Row, shape: str) -> list[str]:
    rows = [row for row in record["overhead"] if row["shape"] == shape]
    if not rows:
        return []
    lines = []
    plain: Row | None = None
    for row in rows:
        plain = row if row["online"] == "none" else plain
        name = ONLINE[row["online"]].says if row["online"] in ONLINE else row["online"]
        line = [row["form"], row["phase"], row["batch"], row["context"], name]
        if row["reason"] is not None or plain is None or plain["reason"] is not None:
            lines.append([*line, "–", "–", row["reason"] or "–"])
            continue
        tokens = row["batch"] * (1 if row["phase"] == "decode" else row["context"])
        own, least = (statistics.median(x["seconds"]) / tokens for x in (row, plain))
        more = statistics.median(a / b for a, b in zip(row["seconds"], plain["seconds"], strict=False)) - 1
        line.append(f"{own * 1e6:.2f}")
        line += ["–", "–"] if row is plain else [f"{(own - least) * 1e6:+.2f}", f"{100 * more:+.1f} %"]
        lines.append(line)
    head = ["bits", "phase", "batch", "context", "online", "µs/token", "more", "in %"]
    return [f"### {shape}: overhead of online parts", OVERHEAD, table(head, lines)]


def _shares(record: Row, shape: str) -> list[str]:
    parts = []
    entries = [entry for entry in record["shares"] if entry["shape"] == shape]
    for where in dict.fromkeys((entry["phase"], entry["batch"], entry["context"]) for entry in entries):
        own = [e for e in entries if (e["phase"], e["batch"], e["context"]) == where]
        forms = [entry["form"] for entry in own]
        names = dict.fromkeys(share["operation"] for entry in own for share in entry["shares"])
        lines = [[name, *(_share(entry, name) for entry in own)] for name in names]
        title = f"### {shape}: time of each operation, {where[0]} {where[1]} x {where[2]}"
        notes = [f"{entry['form']}: {entry['reason']}." for entry in own if entry["reason"] is not None]
        said = SHARES.format(where="graph replays" if where[0] == "decode" else "one prefill")
        body = [said, table(["operation", *forms], lines)] if lines else []
        parts += [title, *body, *([" ".join(notes)] if notes else [])]
    return parts


def _share(entry: Row, operation: str) -> str:
    """An operation's share and time in one pass."""
    found = [share for share in entry["shares"] if share["operation"] == operation]
    if not found:
        return "–"
    return f"{found[0]['fraction']:.1%}, {duration(found[0]['seconds'])}"


def _not_run(record: Row) -> list[str]:
    lines = [
        [row["shape"], row["bits"], row["what"], row["reason"]]
        for row in (
            *(
                {
                    "shape": row["shape"],
                    "bits": row["form"] if row["online"] == "none" else f"{row['form']}, {row['online']}",
                    "what": f"{row['phase']} {row['batch']} x {row['context']}",
                    "reason": row["reason"],
                }
                for row in (*record["results"], *record["overhead"])
                if row["reason"] is not None
            ),
            *({"bits": "all", **entry} for entry in record["not_run"]),
        )
    ]
    if not lines:
        return []
    return ["## What did not run", table(["shape", "bits", "what", "reason"], lines)]


def _implementations(record: Row) -> list[str]:
    lines = [
        [operation, implementation, f"{calls:,}"]
        for operation, found in record["implementations"].items()
        for implementation, calls in found.items()
    ]
    if not lines:
        return []
    replays = "each replay of a graph with those that it was captured with"
    if not record.get("replays_counted"):
        replays = "a graph's replays are not among them"
    said = f"Calls over the whole run, warm-up included; {replays}."
    return ["## Implementations that ran", said, table(["operation", "implementation", "calls"], lines)]


COLOURS = ("#555555", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, by the order of forms."""


def plot(record: Row, stream: TextIO) -> None:
    """Tokens per second of decoding beside the first form's, by context, a panel for each shape and batch,
    as SVG."""
    from matplotlib.figure import Figure

    rows = [row for row in record["results"] if row["phase"] == "decode" and row["speed"] is not None]
    shapes = list(dict.fromkeys(row["shape"] for row in rows)) or [""]
    batches = sorted({row["batch"] for row in rows}) or [0]
    forms = list(dict.fromkeys(row["form"] for row in rows))
    size = (1.2 + 2.9 * len(batches), 0.9 + 2.5 * len(shapes))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    panels = figure.subplots(len(shapes), len(batches), squeeze=False, sharey=True)
    for shape, line in zip(shapes, panels, strict=True):
        for batch, axes in zip(batches, line, strict=True):
            for form, colour in zip(forms, COLOURS, strict=False):
                own = sorted(
                    (row["context"], row["speed"])
                    for row in rows
                    if (row["shape"], row["batch"], row["form"]) == (shape, batch, form)
                )
                if own:
                    axes.plot(*zip(*own, strict=True), marker="o", color=colour, label=form, linewidth=1.4)
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
            axes.set_title(f"{shape}, batch {batch}", fontsize=9)
            axes.set_xlabel("context (tokens)", fontsize=8)
        line[0].set_ylabel(f"decoding, x {first_form(record)}", fontsize=8)
    panels[0][0].set_ylim(bottom=0)  # of all panels; sooner, the first one's top would be that of all
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False
        )
    stream.write(svg.drawn(figure))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.speed_report", description="Report a speed run.")
    parser.add_argument(
        "record", type=Path, metavar="RECORD", help="what python -m harness.speed --shape wrote"
    )
    parser.add_argument("--report", type=Path, required=True, metavar="DIR", help="where the report goes")
    arguments = parser.parse_args(argv)
    try:
        try:
            record = recorded.read(arguments.record)
        except ValueError as error:
            raise UserError(f"{arguments.record}: {NOT_A_RECORD}") from error
        text, drawn = report(record), io.StringIO()
        plot(record, drawn)
        write_text(arguments.report / REPORT, compact(text))
        write_text(arguments.report / PLOT, drawn.getvalue())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {os_reason(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
