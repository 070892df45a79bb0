"""The report's section on costs: time, memory as computed and as measured, and which implementations ran.

All of it was measured on one machine and varies; it stands in a record's "measured".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.markdown import plain, table
from harness.neighbours import shared
from harness.records import Cell, Model, Record, Row, Run, number
from harness.tables import distinct, mean_accuracy_text, value_text
from harness.tradeoffs import measured_section

STAGES = ("load", "learn", "transform", "round", "tune", "pack", "evaluate")
ALWAYS = {"load", "learn", "transform", "round", "evaluate"}
"""Stages with a column of their own whether or not a cell has them."""
MEASURED = """\
As measured on the machine of the settings: mean over seeds, of memory the largest. Tokens: of the \
calibration text that transforms and rounding read, and, where something was learned, those that the \
learner was shown in all. Energy stands here where a GPU's driver reported it: what the whole GPU took \
in the attempt that ended the cell, loading and scoring included; not in it is what came from disk."""
LEARNED = """\
Of the run that learned, on its device: of the quickest seed, of memory the largest; cells of other \
bit-widths and later runs take it from disk. Capture: passing the calibration text for a sample. Start: \
learning what it starts from, capture included. Peak memory: while it learned, on a GPU what was allocated \
there, else of the whole process, model and libraries included. Sample: kept in the host's memory."""
MEMORY = """\
Computed: what the bit-widths promise, counted as in the effective bits: b bits a b-bit code, 16 bits a \
scale, b bits a weight's zero-point and 16 a KV entry's, 16 bits a value that is not quantised. Measured: \
the bytes of the tensors that the process held once the model was ready, each storage once; of the KV cache \
those held after a real prefill, per token (a cache that then grows doubles its room). \
`linears` are the quantisable ones with their scales and zero-points, \
`rest` is embedding, norms and lm_head, the KV cache is that of all layers. The ratios are measured bytes \
over those of as many float16 values. Peak memory, above, is that of the whole process: quantising, scoring, \
libraries and data included."""
SPEED = """\
Speed on a small workload, one sequence, the best of up to three runs: {}. Perplexity is that of the model's \
first text, mean accuracy as above. The peak is what a GPU had allocated meanwhile, weights included. How \
the time depends on batch and context is measured by `python -m harness.speed`."""
SHARED = """\
¶: others used the machine when timing began or ended, so it may be faster alone: {}. Unmarked: by the load \
average, and by processes and memory on a GPU, nobody did, or the record does not tell."""
INT4 = """\
Rows of int4 execution measure more than computed where scales are float32 (zero-points of weights too, \
those of the KV cache take a byte), where what is not quantised is held in the settings' dtype, and where \
rows are padded to 8 codes."""
FLOATS = """\
A simulated cell holds floats in the settings' dtype, of weights also the codes, a byte each. A float cell \
has nothing to pack: it is one and the same cell in either execution."""
OPERATIONS = """\
Calls while tasks were scored, over all cells of int4 execution; of an interrupted cell, each task has the \
calls of the run that scored it. {} What no implementation can run ends its cell with an \
error and is not simulated instead. kv16 stands for a cache that is not quantised. Not listed: embedding, \
lm_head, and linears whose weights are not quantised, which the notes on methods name."""
REPLAYS = "A replay of a CUDA graph counts as the calls that the graph was captured with."
NO_REPLAYS = "Replays of a CUDA graph are not among them, in some cells at least."
TUNED = """\
Beside `triton` stands the beginning of the SHA-256 of kernels/tuning.json, the table by which its kernels' \
variants were chosen."""
MEBIBYTE = 2**20


def cost_section(run: Run, named: Sequence[tuple[Model, str]], figures: Path) -> list[str]:
    """Writes the figures of measured costs; named: every model with the stem of its figures' names."""
    models = [model for model, _ in named]
    rows = [
        (str(model.record["name"]), row, costs)
        for model in models
        for row in model.rows
        if (costs := _costs(row))
    ]
    facts = {
        name: distinct((cell.record.get("measured") or {}).get(name) for cell in run.cells)
        for name in ("command", "commit", "platform")
    }
    made = "; ".join(f"{name} `{value}`" for name, value in facts.items() if value != "–")
    text = [_times(rows), MEASURED] if rows else ["not recorded"]
    text += [f"Made by: {plain(made)}."] if made else []
    return [
        "## Cost",
        *text,
        *_learning_section(rows),
        *measured_section(named, figures),
        *_speed_section(models),
        *_memory_section(rows),
        *_operations_section(run.cells),
    ]


def _costs(row: Row) -> list[Record]:
    return [cell.record["measured"] for cell in row.cells if cell.record.get("measured")]


Costs = Sequence[tuple[str, Row, Sequence[Record]]]


def _times(rows: Costs) -> str:
    taken = {stage for _, _, costs in rows for cost in costs for stage in cost.get("seconds", {})}
    stages = [stage for stage in STAGES if stage in ALWAYS | taken]
    learned = any(learned_tokens(cell) for _, row, _ in rows for cell in row.cells)
    metered = any(cost.get("joules") is not None for _, _, costs in rows for cost in costs)
    lines = []
    for name, row, costs in rows:
        line = [name, row.bits, row.label]
        for stage in stages:
            seconds = [cost["seconds"][stage] for cost in costs if stage in cost.get("seconds", {})]
            line.append(f"{sum(seconds) / len(seconds):.1f}" if seconds else "–")
        memory = [cost["peak_memory_bytes"] for cost in costs if cost.get("peak_memory_bytes")]
        line.append(f"{max(memory) / 2**30:.2f}" if memory else "–")
        line += [
            _tokens_text(row, calibration_tokens),
            *([_tokens_text(row, learned_tokens)] if learned else []),
        ]
        joules = [number(cost["joules"]) for cost in costs if cost.get("joules") is not None]
        energy = f"{sum(joules) / len(joules):,.0f}" if joules else "–"
        lines.append([*line, *([energy] if metered else [])])
    head = ["model", "bits", "method", *(f"{stage} (s)" for stage in stages), "peak memory (GiB)"]
    head += [
        "calibration (tokens)",
        *(["learning (tokens)"] if learned else []),
        *(["energy (J)"] if metered else []),
    ]
    return table(head, lines)


def _tokens_text(row: Row, of_cell: Callable[[Cell], int]) -> str:
    most = max(map(of_cell, row.cells), default=0)
    return f"{most:,}" if most else "–"


def calibration_tokens(cell: Cell) -> int:
    """Tokens of the calibration text of a cell, which rounding and transforms read; 0 where none is on
    record."""
    about = cell.record.get("calibration") or {}
    return 0 if cell.is_float else int(about.get("samples") or 0) * int(about.get("length") or 0)


def learned_tokens(cell: Cell) -> int:
    """Tokens that learners and tuning were shown in all, the same one counted as often as it was, whatever
    their stages are called; 0 without. A learner that only reads calibration text notes a number, not
    {"seen"} or {"passed"}: calibration_tokens has it."""
    return _shown((cell.record.get("diagnostics") or {}).get("learned") or {})


def _shown(facts: Mapping[str, Any]) -> int:
    tokens = facts.get("tokens")
    seen = int(tokens.get("seen") or tokens.get("passed") or 0) if isinstance(tokens, Mapping) else 0
    stages = (part for name, part in facts.items() if name != "tokens" and isinstance(part, Mapping))
    return seen + sum(map(_shown, stages))


def _speed_section(models: Sequence[Model]) -> list[str]:
    """Speed and memory beside accuracy; empty where no cell has speed on record."""
    lines, workloads = [], set()
    others: list[str] = []
    for model in models:
        perplexity = next((column for column in model.columns if column.kind == "perplexity"), None)
        for row in model.rows:
            found = [cost["speed"] for cost in _costs(row) if cost.get("speed")]
            if not found:
                continue
            line = [str(model.record["name"]), row.bits, row.label]
            line.append("–" if perplexity is None else value_text(row, perplexity))
            line.append(mean_accuracy_text(row, model.accuracies) if model.accuracies else "–")
            timed = [speed for speed in found if not speed.get("reason")]
            reasons = [why for speed in timed if "neighbours" in speed for why in shared(speed["neighbours"])]
            mark = "¶" if reasons else ""
            others += reasons
            for phase in ("prefill", "decode"):
                rates = [number(speed[f"{phase}_tokens_per_second"]) for speed in timed]
                line.append(f"{sum(rates) / len(rates):,.1f}{mark}" if rates else "–")
            peaks = [speed["peak_memory_bytes"] for speed in timed if speed.get("peak_memory_bytes")]
            line.append(f"{max(peaks) / 2**30:.2f}" if peaks else "–")
            lines.append([*line, distinct(speed["device"] for speed in found)])
            workloads |= {(speed["prefill_tokens"], speed["decoded_tokens"]) for speed in timed}
    if not lines:
        return []
    head = ["model", "bits", "method", "perplexity", "mean accuracy (%)", "prefill (tokens/s)"]
    head += ["decode (tokens/s)", "peak memory (GiB)", "device"]
    said = " or ".join(
        f"{prompt} tokens and {decoded} decoded behind them" for prompt, decoded in sorted(workloads)
    )
    notes = [SPEED.format(said or "none that ran")]
    notes += [SHARED.format("; ".join(dict.fromkeys(others)))] if others else []
    return ["### Accuracy beside speed and memory", table(head, lines), *notes]


def _learning_section(rows: Costs) -> list[str]:
    """Empty where no cell has learned anything: the run that learned it, once for all bit-widths."""
    stages = {stage: f"{stage}_seconds" for stage in ("capture", "start", "learn", "tune")}
    sizes = {"peak memory (MiB)": "learn_peak_bytes", "sample (MiB)": "sample_bytes"}
    lines: dict[tuple[str, ...], None] = {}
    for name, row, costs in rows:
        spent: dict[str, list[Record]] = {}
        for cost in costs:
            for method, facts in (cost.get("learned") or {}).items():
                spent.setdefault(method, []).append(facts)
        for method, runs in spent.items():
            line = [name, row.label, method]
            for key in (*stages.values(), *sizes.values()):
                found = [number(facts[key]) for facts in runs if facts.get(key) is not None]
                value = (min(found) if key in stages.values() else max(found) / MEBIBYTE) if found else 0.0
                line.append(f"{value:.1f}" if found else "–")
            lines[(*line, distinct(facts.get("device") for facts in runs))] = None
    head = ["model", "method", "what", *(f"{stage} (s)" for stage in stages), *sizes, "device"]
    return ["### What learning took", table(head, list(lines)), LEARNED] if lines else []


def _memory_section(rows: Costs) -> list[str]:
    """Empty where no cell has it on record."""
    lines, executions = [], set()
    for name, row, costs in rows:
        found = [cost["memory"] for cost in costs if cost.get("memory")]
        if not found:
            continue
        largest = max(found, key=lambda memory: number(memory["linears"]["measured"]))
        linears, rest, token = (largest[part] for part in ("linears", "rest", "kv_token"))
        line = [name, row.bits, row.label]
        line += [
            f"{part[how] / MEBIBYTE:.2f}" for part in (linears, rest) for how in ("computed", "measured")
        ]
        line += [f"{token[how]:,.0f}" for how in ("computed", "measured")]
        lines.append([*line, *(f"{part['measured'] / part['float16']:.3f}" for part in (linears, token))])
        executions |= {row.first.record.get("execution")}
    if not lines:
        return []
    head = ["model", "bits", "method"]
    head += [f"{part} {how} (MiB)" for part in ("linears", "rest") for how in ("computed", "measured")]
    head += [f"KV cache {how} (B/token)" for how in ("computed", "measured")]
    head += ["linears / float16", "KV cache / float16"]
    notes = [MEMORY, *([INT4] if "int4" in executions else []), *([FLOATS] if executions - {"int4"} else [])]
    return ["### Memory of the model and its KV cache", table(head, lines), " ".join(notes)]


def _operations_section(cells: Sequence[Cell]) -> list[str]:
    """Empty without a cell in int4 execution."""
    calls: dict[tuple[str, str], int] = {}
    users: dict[tuple[str, str], int] = {}
    for cell in cells:
        own = operations_of(cell)
        for key, count in own.items():
            calls[key] = calls.get(key, 0) + count
            users[key] = users.get(key, 0) + 1
    if not calls:
        return []
    lines: list[list[Any]] = [[*key, f"{calls[key]:,}", users[key]] for key in sorted(calls)]
    head = ["operation", "implementation", "calls", "cells"]
    tuned = any(implementation.startswith("triton, choices ") for _, implementation in calls)
    counted = all(cell.record["measured"].get("replays_counted") for cell in cells if operations_of(cell))
    notes = OPERATIONS.format(REPLAYS if counted else NO_REPLAYS)
    notes += f" {TUNED}" if tuned else ""
    return ["### Implementations that ran", table(head, lines), notes]


def operations_of(cell: Cell) -> dict[tuple[str, str], int]:
    """Calls by (operation, implementation), over the cell's tasks."""
    found: dict[tuple[str, str], int] = {}
    measured = cell.record.get("measured") or {}
    for task, operations in (measured.get("implementations") or {}).items():
        if not cell.task(task):
            continue
        for operation, implementations in operations.items():
            for implementation, count in implementations.items():
                key = operation, implementation
                found[key] = found.get(key, 0) + count
    return found
