"""Run folders with made-up cells, as the grid writes them, and their reports read back."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harness import report, store
from harness.perplexity import PassageRow, summary

DOCUMENTS, PASSAGES = 120, 40
HARM = {"float": 0.0, "rtn": 0.9, "gptq": 0.35, "quarot": 0.1, "hqq": 0.5}
"""Nats of log-perplexity that the made-up methods lose at 4 bit everywhere."""
LOSS = {"w16a16": 0.0, "w4a16": 0.15, "w4a8kv8": 0.3, "w4a4kv4": 1.0, "w4a4kv4g32": 0.8}


def accuracy_task(correct: np.ndarray) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rows = [
        {
            "doc_id": 7 * i,
            "doc_hash": f"hash{i}",
            "prompt_hash": f"prompt{i}",
            "metrics": {"acc": float(value)},
            "gold": i % 2,
            "choices": [-2.0 - (value == i % 2), -3.0 + (value == i % 2)],
            "cluster": None,
        }
        for i, value in enumerate(correct)
    ]
    stderr = float(correct.std(ddof=1) / math.sqrt(len(correct)))
    entry = {
        "status": "done",
        "n": len(correct),
        "available": 1838,
        "protocol": "zero-shot, log-likelihood",
        "mirrors": "piqa 1.0",
        "differences": ["rows of another mirror", "no titles"],
        "chance": 0.5,
        "majority": 0.55,
        "primary_metric": "acc",
        "metrics": {"acc": {"value": float(correct.mean()), "stderr": stderr, "higher_is_better": True}},
        "failure": None,
    }
    return entry, rows


def perplexity_task(
    nats: np.ndarray, tokens: np.ndarray, is_float: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rows = [
        PassageRow(i // 5, i, float(n * t), int(t)) for i, (n, t) in enumerate(zip(nats, tokens, strict=True))
    ]
    facts = summary(rows)
    entry = {"status": "done", "n": len(nats) // 5, **facts, "protocol": "windows of 1024", "failure": None}
    if not is_float:
        entry["kl"] = {"mean": 0.25, "stderr": 0.03, "median": 0.125, "p99": 2.5, "p999": 4.0, "max": 9.0}
        entry |= {"top1_agreement": {"value": 0.75, "stderr": 0.01}, "kl_windows": 6}
    return entry, [row.sample() for row in rows]


def write_cell(
    run: Path, row: str, bits: str, *, seed: int = 0, model: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """A made-up cell: the harder the method and the bits, the worse; documents are shared by all cells."""
    name = row.split(" ")[0]
    shared = np.random.default_rng(1)
    ease, nats = shared.random((3, DOCUMENTS)), 2.9 + 0.3 * shared.standard_normal((2, PASSAGES))
    tokens = shared.integers(60, 200, PASSAGES)
    own = np.random.default_rng([seed, *row.encode(), *bits.encode()])
    harm = HARM[name] * LOSS[bits] * (6.6 if (name, bits) == ("rtn", "w4a4kv4") else 1)
    tasks, samples = {}, {}
    for task, base in zip(("boolq_local", "piqa_local", "mmlu_local"), ease, strict=True):
        noise = 0.15 * harm**0.5 * own.standard_normal(DOCUMENTS)
        tasks[task], samples[task] = accuracy_task((base + noise < 0.6 - 0.05 * harm).astype(float))
    for task, base in zip(("perplexity_news", "perplexity_wikipedia"), nats, strict=True):
        nll = base + harm * own.uniform(0.8, 1.2, PASSAGES)
        tasks[task], samples[task] = perplexity_task(nll, tokens, name == "float")
    rotates = name == "quarot"
    layers = np.arange(30)
    kurtosis = [
        {
            "layer": int(i),
            "site": site,
            "before": float(b),
            "after": float(2.9 + 0.1 * math.sin(i) if rotates else b),
        }
        for site, before in (("attention", 20 + 60 * np.exp(-layers / 5)), ("mlp", 8 + 300 * (layers == 3)))
        for i, b in zip(layers, before, strict=True)
    ]
    identity = hashlib.sha256(repr((row, bits, seed, model, sorted(changes.items()))).encode()).hexdigest()[
        :16
    ]
    record: dict[str, Any] = {
        "schema": 2,
        "id": identity,
        "status": "done",
        "failure": None,
        "model": model
        or {
            "name": "smollm2-135m-instruct",
            "label": "fp32 (dequantised Q4_1)",
            "sha256": "ab" * 32,
            "family": "llama",
            "parameters": 134515008,
            "pre_quantised": {"group": 32, "levels": 16, "fraction": 1.0},
        },
        "method": {
            "row": row,
            "spec": row.replace(" (gptq)", ":rounding=gptq"),
            "name": name,
            "rounding": "gptq" if "gptq" in row else "rtn",
            "preset": "quick",
            "options": {name: {"preset": "quick", "rounding": "gptq" if "gptq" in row else "rtn"}},
            "paper": "QuaRot, arXiv 2404.00456" if rotates else "",
            "notes": ["cross-head Hadamard of 9 heads does not exist: per-head only"] if rotates else [],
        },
        "bits": bits,
        "seed": seed,
        "execution": "simulate",
        "quantiser": {"activation_clip": None, "kv_clip": None, "weight_search": True},
        "calibration": {"name": "boolq", "samples": 32, "length": 512, "sha256": "cd" * 32},
        "effective_bits": {"weight": 4.03, "activation": 4.0, "kv": 4.25, "model": 8.1},
        "tasks": tasks,
        "diagnostics": {"kurtosis": kurtosis},
        "measured": {
            "seconds": {"load": 1.0, "learn": 0.0, "transform": 2.5, "round": 31.0, "evaluate": 60.0},
            "peak_memory_bytes": 3 * 2**29,
            "command": "python -m harness.grid grids/quick.yaml",
            "commit": "f00",
        },
        "environment": {
            "python": "3.11.9",
            "torch": "2.13.0",
            "threads": 2,
            "device": "cpu",
        },
    }
    record |= changes
    folder = run / record["id"]
    folder.mkdir(parents=True)
    for task, rows in samples.items():
        if task in record["tasks"]:
            record["tasks"][task] |= store.write_samples(folder, task, rows)
    store.write_record(folder, record)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a record as its writer would have written it."""
    record = json.loads((folder / "cell.json").read_text())
    change(record)
    store.write_record(folder, record)


def rewrite(folder: Path, task: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Replace a task's samples, and facts of its record."""
    facts |= store.write_samples(folder, task, rows)
    edit(folder, lambda record: record["tasks"].setdefault(task, {"status": "done"}).update(facts))


def rows_of(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples" / f"{task}.jsonl").read_text().splitlines()]


def full_run(run: Path) -> Path:
    write_cell(run, "float", "w16a16")
    for bits in ("w4a16", "w4a8kv8", "w4a4kv4"):
        for row in ("rtn", "gptq", "quarot", "quarot (gptq)"):
            write_cell(run, row, bits)
    return run


def table(text: str, heading: str, place: int = 0) -> list[dict[str, str]]:
    """The first table below a heading (or a later one), its lines as {column: text}."""
    section = text[text.index(f"{heading}\n") :].splitlines()
    blocks = [list(lines) for inside, lines in itertools.groupby(section, lambda s: s[:1] == "|") if inside]
    block = blocks[place]
    cut = [[cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")] for line in block]
    assert {len(line) for line in cut} == {len(cut[0])}, "a table whose lines differ in length"
    return [dict(zip(cut[0], line, strict=True)) for line in cut[2:]]


def row_of(lines: list[dict[str, str]], bits: str, method: str) -> dict[str, str]:
    return next(line for line in lines if (line["bits"], line["method"]) == (bits, method))


MODEL = "## smollm2-135m-instruct"
TASKS = "### Scores by task"
DIFFERENCE = "### Difference to float"
PRIMARY = "### Primary comparison: log-perplexity against QuaRot"


def text_of(run: Path) -> str:
    return report.write_report(run).read_text(encoding="utf-8")


def settings_of(text: str) -> dict[str, str]:
    return {line["setting"]: line["value"] for line in table(text, "## Settings")}


def number_and_interval(text: str) -> tuple[float, float, float]:
    """ "18.56 [14.68, 23.47] **" as numbers."""
    value, low, high = text.rstrip(" *]").replace(" [", ", ").split(", ")
    return float(value), float(low), float(high)
