"""`python -m harness.choose`: methods, or one with several values of an option, compared on tuning text.

What a method leaves open is chosen here and never on evaluation text: the tuning split shares no 13-gram with
calibration or evaluation text. Every method is quantised with each seed and scored on the same windows; the
differences are to the first method given, paired over passages. Exit status 2: a mistake in what was given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import environment, perplexity, store
from harness.markdown import compact, table
from harness.perplexity import Windows
from kernels.command import run_command
from methods import assets
from methods.bits import Bits, QuantiserSettings
from methods.calibration import Corpus, load_corpus, token_windows
from methods.checkpoint import DEFAULT_MODEL, Checkpoint, open_checkpoint
from methods.device import parse_device
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError
from methods.footprint import effective_bits, model_bits
from methods.method import Context
from methods.pipeline import Quantised, quantise
from methods.registry import parse_method

SCHEMA = 1
SAID = """\
{model}, {windows} windows of {length} tokens of tuning text, {seeds}; calibration {samples} x {tokens} \
tokens where a method does not say otherwise. Loss in nats per token. Difference: to the first line, paired \
over passages; its 95 % interval is from passages, with three seeds or more from the spread between seeds.

Command: `{command}`"""

Record = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What all methods of a study share."""

    checkpoint: Checkpoint
    windows: Windows
    corpus: Corpus
    samples: int
    length: int
    device: torch.device


def quantised(study: Study, method: str, bits: Bits, seed: int) -> Quantised:
    """One cell, simulated in float32, as a grid of default settings makes it."""
    pipeline, settings = parse_method(method), QuantiserSettings()
    tokens = None
    if pipeline.calibrates(bits, settings):
        samples, length = pipeline.calibration_shape(study.samples, study.length)
        tokens = token_windows(
            study.corpus, study.checkpoint.tokenizer, samples=samples, length=length, seed=seed
        )
    ctx = Context(study.device, seed, cache=assets.home() / "artifacts")
    return quantise(study.checkpoint, pipeline, bits, ctx, settings=settings, calibration=tokens)


def measure(study: Study, method: str, bits: Bits, seed: int) -> Record:
    """A row of the study: bits, loss, and the samples behind it."""
    started = time.perf_counter()
    made = quantised(study, method, bits, seed)
    rows = [row.sample() for row in perplexity.score(made.decoder, study.windows, range(len(study.windows)))]
    parameters = sum(tensor.numel() for tensor in study.checkpoint.tensors().values())
    tuning = next((facts["tuning"] for facts in made.learned.values() if "tuning" in facts), None)
    return {
        "method": method,
        "bits": str(bits),
        "seed": seed,
        "loss": math.fsum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows),
        "effective_bits": {
            **effective_bits(made.decoder, made.plan),
            "model": model_bits(made.decoder, made.plan) / parameters,
        },
        "tuning": tuning,
        "rows": rows,
        "seconds": time.perf_counter() - started,
    }


def run(
    study: Study,
    methods: Sequence[str],
    bits: Bits,
    seeds: int,
    command: str,
    save: Callable[[Record], None],
) -> Record:
    """Measure everything; `save` gets the record after each row."""
    record: Record = {
        "schema": SCHEMA,
        "model": study.checkpoint.label,
        "sha256": study.checkpoint.sha256,
        "windows": len(study.windows),
        "length": study.windows.length,
        "calibration": [study.samples, study.length],
        "environment": environment.describe(study.device),
        "command": command,
        "commit": environment.commit(),
        "date": store.now(),
        "rows": [],
    }
    for seed in range(seeds):
        for method in methods:
            row = measure(study, method, bits, seed)
            record["rows"].append(row)
            print(f"{method} {bits} seed {seed}: {row['loss']:.4f}, {row['seconds']:.0f} s", file=sys.stderr)
            save(record)
    return record


def report(record: Record) -> str:
    """The study as Markdown."""
    by_method: dict[str, list[Record]] = {}
    for row in record["rows"]:
        by_method.setdefault(row["method"], []).append(row)
    first = next(iter(by_method.values()))
    lines = []
    for method, rows in by_method.items():
        found = rows[0]["effective_bits"]
        bits = " / ".join(f"{round(found[part], 2):g}" for part in ("weight", "activation", "kv", "model"))
        loss = sum(row["loss"] for row in rows) / len(rows)
        line = [method, rows[0]["bits"], bits, len(rows), f"{loss:.4f}"]
        lines.append([*line, "reference" if rows is first else _difference(first, rows)])
    samples, tokens = record["calibration"]
    seeds = 1 + max(row["seed"] for row in record["rows"])
    said = SAID.format(
        **{key: record[key] for key in ("model", "windows", "length", "command")},
        seeds=f"{seeds} seed{'s' if seeds > 1 else ''}",
        samples=samples,
        tokens=tokens,
    )
    head = ["method", "bits", "effective bits w / a / kv / model", "seeds", "loss", "difference [95 %]"]
    return f"{table(head, lines)}\n\n{said}\n"


def _difference(first: Sequence[Record], rows: Sequence[Record]) -> str:
    """Of two methods, over the seeds that both have."""
    from harness import stats  # needs scipy, which a GPU machine may lack

    twins = {row["seed"]: row for row in first}
    found = [
        stats.paired_log_perplexity(twins[row["seed"]]["rows"], row["rows"])
        for row in rows
        if row["seed"] in twins
    ]
    if not found:
        return "–"
    estimate = found[0] if len(found) == 1 else stats.mean([one.value for one in found])
    if len(found) == 2:  # too few to say how seeds spread
        error = math.hypot(*(one.stderr for one in found)) / 2
        estimate = stats.Estimate(estimate.value, error)
    low, high = estimate.interval()
    return f"{estimate.value:+.4f} [{low:+.4f}, {high:+.4f}]"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m harness.choose",
        description="Compare methods on tuning text, as options are to be chosen.",
    )
    result.add_argument("methods", nargs="*", metavar="METHOD", help="methods with their options")
    result.add_argument("--bits", default="w4a4kv4", help="bit-widths (default %(default)s)")
    result.add_argument("--model", default=DEFAULT_MODEL, help="default %(default)s")
    result.add_argument("--seeds", type=int, default=1, help="0, 1, ... (default %(default)s)")
    result.add_argument("--windows", type=int, default=8, help="windows of text (default %(default)s)")
    result.add_argument("--length", type=int, default=512, help="tokens of each (default %(default)s)")
    result.add_argument(
        "--calibration",
        nargs=2,
        type=int,
        default=(16, 512),
        metavar=("SAMPLES", "LENGTH"),
        help="of methods that do not say (default 16 512)",
    )
    result.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    result.add_argument("--out", type=Path, metavar="FILE", help="write the record there, as JSON")
    result.add_argument("--report", type=Path, metavar="FILE", help="write the table there, as Markdown")
    result.add_argument(
        "--render", type=Path, metavar="FILE", help="measure nothing, make the table of this record"
    )
    return result


def _study(arguments: argparse.Namespace, command: str) -> Record:
    if not arguments.methods:
        raise UserError("give at least one method")
    if min(arguments.seeds, arguments.windows, *arguments.calibration) < 1 or arguments.length < 16:
        raise UserError("give at least 1 seed, 1 window and 1 calibration sequence, and windows of 16 tokens")
    for method in arguments.methods:
        parse_method(method)
    bits, device = Bits.parse(arguments.bits), parse_device(arguments.device)
    for target in (arguments.out, arguments.report):
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(arguments.model)
    text = perplexity.windows(checkpoint.tokenizer, load_corpus("boolq", "tuning"), arguments.length)
    chosen = perplexity.draw(len(text), arguments.windows, seed=0)
    cut = Windows(text.tokens[chosen], text.passages[chosen])
    samples, tokens = arguments.calibration
    study = Study(checkpoint, cut, load_corpus(), samples, tokens, device)

    def save(record: Record) -> None:
        if arguments.out is not None:
            store.write_json(arguments.out, record)

    return run(study, arguments.methods, bits, arguments.seeds, command, save)


def _read(path: Path) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no record that can be read ({error})") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or not record.get("rows"):
        raise UserError(f"{path}: no record of harness/choose.py, schema {SCHEMA}")
    return record


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(given)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        refuse_foreign_kernels()
        if arguments.render is not None:
            record = _read(arguments.render)
        else:
            record = _study(arguments, f"python -m harness.choose {shlex.join(given)}")
        text = report(record)
        if arguments.report is not None:
            arguments.report.write_text(compact(text), encoding="utf-8")
        print(text)
        return 0
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    run_command(main)
