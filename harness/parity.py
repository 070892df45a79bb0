"""`python -m harness.parity`: does the int4 execution of every method do what its simulation does?

Every registered method, with every rounding, at many bit-widths and quantiser settings, on the default model
and on two small random ones of awkward shapes. Each row is one quantised model in both executions, compared
as harness/side_by_side.py says. Exit status 0: all agree. 1: some do not. 2: a mistake in what was given.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import environment, perplexity, store
from harness.grid import silence_libraries
from harness.odd_models import NAMES, odd_checkpoint
from harness.parity_report import SCHEMA, THRESHOLDS, changes_text, row_of, write_report
from harness.perplexity import Windows
from harness.progress import Progress
from harness.side_by_side import compare
from kernels import recorded
from kernels.command import run_command
from methods.bits import Bits, QuantiserSettings
from methods.calibration import load_corpus, token_windows
from methods.checkpoint import DEFAULT_MODEL, Checkpoint, open_checkpoint
from methods.decoder import Decoder
from methods.device import parse_device
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError
from methods.execution import pack_decoder
from methods.method import ROUNDINGS, Context
from methods.pipeline import Pipeline, quantise
from methods.registry import method_classes, parse_method

SPECIAL = "a special checkpoint"
CALIBRATION = (8, 512)
WINDOWS, LENGTH = 8, 512
MORE = 4
"""How many times the windows a row is scored on whose log-perplexities differ too much on the first ones."""


@dataclass(frozen=True)
class Case:
    """One setting of the quantisers."""

    bits: Bits
    settings: QuantiserSettings
    dtype: str = "float32"


@dataclass(frozen=True)
class Subject:
    """A model with what it is measured on. windows: those that a row is scored on if need be, `few` at first.
    base: the quantiser settings that the cases change. group: of the grouped cases, None for none. small: all
    cases run with every rounding, in float64, and the int4 execution is made from the checkpoint on its own
    and not from a copy of the simulated model. artifacts: where what methods learn is kept for all rows."""

    name: str
    checkpoint: Checkpoint
    windows: Windows
    few: int
    calibration: Tensor
    base: QuantiserSettings
    group: int | None
    small: bool
    artifacts: Path | None = None


def methods_of_registry() -> tuple[list[str], list[str]]:
    """Every registered method but the float one with every rounding, as text; and the names of those that
    need a special checkpoint, which must be given with it. A method named after a rounding has only that."""
    texts, special = [], []
    for name, cls in method_classes().items():
        if SPECIAL in cls.needs:
            special.append(name)
        elif name in ROUNDINGS:
            texts.append(name)
        elif name != "float":
            texts += [f"{name}:rounding={rounding}" for rounding in ROUNDINGS]
    return texts, special


def cases(base: QuantiserSettings, group: int | None, small: bool) -> list[Case]:
    """The bit-widths and settings of the matrix; `group` is what g stands for, None leaves groups out."""
    g, kv = group or 0, "" if small else "kv4"  # see `odd_settings`
    asymmetric = {"activation_symmetric": False}
    wanted: list[tuple[str, dict[str, Any]]] = [
        ("w4a16", {}),
        ("w3a16g", {}),
        ("w8a8kv8", {}),
        ("w4a8kv8", {}),
        ("w4a4kv4", {}),
        ("w4a4kv4g", {}),
        ("w4a8kv8", {**asymmetric, "activation_static": True, "kv_static": True}),
        (f"w4a4{kv}", {**asymmetric, "weight_symmetric": False}),
        (f"w4a4{kv}g", {**asymmetric, "weight_symmetric": False, "activation_group": g}),
        ("w4a4kv4", {"kv_symmetric": True, "activation_static": True, "kv_static": True}),
    ]
    if small:
        wanted += [
            ("w2a16g", {}),
            ("w16a16kv4", {}),
            ("w16a8kv3", {"kv_symmetric": True}),
            ("w5a6", asymmetric),
            ("w7a3kv2", {"kv_static": True}),
            ("w6a7kv5", {"weight_symmetric": False, "kv_symmetric": True}),
            ("w8a8", {**asymmetric, "weight_symmetric": False}),
            ("w8a4kv6g", {"activation_group": g}),
        ]
    dtype = "float64" if small else "float32"
    found = [
        Case(Bits.parse(text + str(g) * text.endswith("g")), dataclasses.replace(base, **changes), dtype)
        for text, changes in wanted
        if group or not (text.endswith("g") or "activation_group" in changes)
    ]
    return found if small else [*found, Case(Bits.parse("w4a4kv4"), base, "float64")]


def matrix(
    subject: Subject, pipelines: Sequence[Pipeline], bits: Sequence[Bits]
) -> list[tuple[Pipeline, Case]]:
    """The rows of one model. On a large one, roundings other than to nearest, and methods without a
    transform, which give the same operations other codes, run two widths alone. bits: only these, with
    default settings where the matrix lacks them."""
    every = cases(subject.base, subject.group, subject.small)
    usual = {"w4a16", "w4a4kv4"}
    brief = [case for case in every if str(case.bits) in usual and case.settings == subject.base]
    rows = []
    for pipeline in pipelines:
        transforms = pipeline.name == "rtn" or any(part.seams for part in pipeline.parts)
        own = (
            every
            if subject.small or (pipeline.rounding == "rtn" and transforms)
            else [c for c in brief if c.dtype == "float32"]
        )
        if bits:
            lacking = [width for width in bits if all(case.bits != width for case in own)]
            own = [case for case in own if case.bits in bits]
            own += [Case(width, subject.base, every[0].dtype) for width in lacking]
        rows += [(pipeline, case) for case in own]
    return rows


def twins(
    subject: Subject, pipeline: Pipeline, case: Case, device: torch.device, seed: int = 0
) -> tuple[Decoder, Decoder]:
    """One cell simulated and packed. UserError where the method refuses these bits."""

    def make(execution: str) -> Decoder:
        return quantise(
            subject.checkpoint,
            pipeline,
            case.bits,
            Context(device, seed, cache=subject.artifacts),
            settings=case.settings,
            calibration=subject.calibration,
            dtype=getattr(torch, case.dtype),
            execution=execution,
        ).decoder

    simulated = make("simulate")
    try:
        if subject.small:
            return simulated, make("int4")
        packed = copy.deepcopy(simulated)
        pack_decoder(packed)
    except UserError as error:
        # What the simulation can, the int4 execution must: this is no mistake of the user's.
        raise RuntimeError(f"the int4 execution refuses what the simulation runs: {error}") from error
    return simulated, packed


def measure(subject: Subject, pipeline: Pipeline, case: Case, device: torch.device) -> dict[str, Any]:
    """One row, as the results file holds it; what the method refuses is not applicable."""
    started = time.perf_counter()
    about = {
        "model": subject.name,
        "dtype": case.dtype,
        "method": pipeline.spec,
        "bits": str(case.bits),
        "setting": changes_text(case.settings, subject.base),
    }
    try:
        simulated, packed = twins(subject, pipeline, case, device)
    except UserError as error:
        return {**about, "status": "n/a", "faults": [str(error)]}
    except RuntimeError as error:
        return {**about, "status": "differs", "faults": [str(error)]}
    try:
        found = compare(simulated, packed, subject.windows, few=subject.few)
    except Exception as error:  # noqa: BLE001 - a finding about this row; the others go on
        return {**about, "status": "differs", "faults": [f"{type(error).__name__}: {error}"]}
    return {**about, **row_of(found), "seconds": time.perf_counter() - started}


# Models


def open_subject(name: str, folder: Path, windows: int, length: int, seed: int = 0) -> Subject:
    """A model by name: one of `odd_models.NAMES`, made in `folder`, or any that `open_checkpoint` takes and
    that is then scored on the tuning split of the default calibration corpus."""
    if name in NAMES:
        return odd_subject(name, folder, seed=seed)
    checkpoint = open_checkpoint(name)
    text = perplexity.windows(checkpoint.tokenizer, load_corpus("boolq", "tuning"), length)
    chosen = perplexity.draw(len(text), MORE * windows, seed)
    calibration = token_windows(
        load_corpus(), checkpoint.tokenizer, samples=CALIBRATION[0], length=CALIBRATION[1], seed=seed
    )
    cut = Windows(text.tokens[chosen], text.passages[chosen])
    settings = QuantiserSettings()
    return Subject(name, checkpoint, cut, windows, calibration, settings, 64, False, folder / "artifacts")


def odd_subject(name: str, folder: Path, *, length: int = 40, seed: int = 0) -> Subject:
    """A small model on random tokens; every tenth begins another passage."""
    checkpoint = odd_checkpoint(name, folder, seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, checkpoint.config.vocab_size, (6, length), generator=generator)
    windows = Windows(ids[:2], (torch.arange(2 * length) // 10).view(2, length))
    group = 8 if name.endswith("g8") else None
    settings = odd_settings()
    return Subject(name, checkpoint, windows, 2, ids[2:], settings, group, True, folder / "artifacts")


def odd_settings() -> QuantiserSettings:
    """The quantisers of the small models. Attention's output at the first token is its own value, as it was
    quantised: integers times one scale. The next quantiser then sees quotients of small integers, some of
    them exact ties, also in float64. A clip ratio of 9 * 97 / 1000 rules them out, but not for a dynamic
    zero-point, in which the clip ratio cancels: where activations have one, `cases` leaves keys and values
    alone."""
    return QuantiserSettings(weight_search=False, activation_clip=0.873, kv_clip=0.937)


# Command line


def run(
    subjects: Sequence[Subject],
    texts: Sequence[str] | None,
    bits: Sequence[Bits],
    *,
    device: torch.device,
    save: Callable[[dict[str, Any]], None],
    command: str,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure the matrix of some models; `save` gets the record after each row. texts: methods, None for all
    registered."""
    registered, special = methods_of_registry()
    pipelines = [parse_method(text) for text in texts or registered]
    work = [(subject, *row) for subject in subjects for row in matrix(subject, pipelines, bits)]
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "complete": False,
        "left_out": [] if texts else special,
        "models": [_about(subject) for subject in subjects],
        "thresholds": THRESHOLDS,
        "calibration": list(CALIBRATION),
        "environment": environment.describe(device),
        "command": command,
        "commit": environment.commit(),
        "date": store.now(),
        "rows": [],
    }
    with Progress(len(work), quiet) as progress:
        for subject, pipeline, case in work:
            progress.begin(f"{subject.name}: {pipeline.spec} {case.bits} {case.dtype}", 1.0)
            row = measure(subject, pipeline, case, device)
            record["rows"].append(row)
            for fault in row["faults"] if row["status"] == "differs" else []:
                progress.say(f"{subject.name}: {pipeline.spec} {case.bits} {row['setting']}: {fault}")
            progress.end()
            save(record)
    record["complete"] = True
    save(record)
    return record


def _about(subject: Subject) -> dict[str, Any]:
    checkpoint = subject.checkpoint
    return {
        "name": subject.name,
        "label": "random weights" if subject.small else checkpoint.label,
        "sha256": checkpoint.sha256,
        "windows": subject.few,
        "more": len(subject.windows),
        "length": subject.windows.length,
        "base": changes_text(subject.base, QuantiserSettings()),
    }


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m harness.parity",
        description="Compare the int4 execution of every method with its simulation. "
        "Exit status: 0 they agree, 1 they do not, 2 a mistake in what was given.",
    )
    result.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        default=[*NAMES, DEFAULT_MODEL],
        help=f"{', '.join(NAMES)} (small, random), or any model (default: these and {DEFAULT_MODEL})",
    )
    result.add_argument("--methods", nargs="+", metavar="METHOD", help="default: every registered method")
    result.add_argument("--bits", nargs="+", metavar="BITS", help="these bit-widths only, such as w4a4kv4")
    result.add_argument(
        "--windows", type=int, default=WINDOWS, help="windows that a row is scored on (default %(default)s)"
    )
    result.add_argument(
        "--length", type=int, default=LENGTH, help="tokens of each window (default %(default)s)"
    )
    result.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    result.add_argument(
        "--out", type=Path, metavar="FILE", help="write the results there, as JSON, row by row"
    )
    result.add_argument("--report", type=Path, metavar="FILE", help="write the table there, as Markdown")
    result.add_argument(
        "--render", type=Path, metavar="FILE", help="measure nothing, write --report from these results"
    )
    result.add_argument("--quiet", action="store_true", help="no progress bar")
    return result


def _run(arguments: argparse.Namespace, command: str) -> int:
    if arguments.render is not None:
        try:
            record = recorded.read(arguments.render)
        except (OSError, ValueError) as error:
            raise UserError(f"{arguments.render}: no results that can be read ({error})") from error
        if not isinstance(record, dict) or record.get("schema") != SCHEMA or "rows" not in record:
            raise UserError(f"{arguments.render}: not the results of harness/parity.py, schema {SCHEMA}")
    else:
        if arguments.windows < 1 or arguments.length < 16:
            raise UserError("give at least 1 window of at least 16 tokens")
        for target in (arguments.out, arguments.report):
            if target is not None:
                target.parent.mkdir(parents=True, exist_ok=True)  # before the long work rather than after
        device = parse_device(arguments.device)
        bits = [Bits.parse(text) for text in arguments.bits or ()]
        with tempfile.TemporaryDirectory(prefix="quantgrid-parity-") as scratch:
            subjects = [
                open_subject(name, _made(Path(scratch) / str(place)), arguments.windows, arguments.length)
                for place, name in enumerate(arguments.models)
            ]
            record = run(
                subjects,
                arguments.methods,
                bits,
                device=device,
                save=lambda found: None if arguments.out is None else store.write_json(arguments.out, found),
                command=command,
                quiet=arguments.quiet,
            )
    text = write_report(record, arguments.report)
    if arguments.report is None:
        print(text)
    differing = sum(row["status"] == "differs" for row in record["rows"])
    print(f"parity: {_verdict(record['rows'], differing)}")
    return 1 if differing else 0


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _verdict(rows: Iterable[dict[str, Any]], differing: int) -> str:
    compared = sum(row["status"] != "n/a" for row in rows)
    return f"{differing} of {compared} rows differ" if differing else f"all {compared} rows agree"


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(given)
    silence_libraries()
    try:
        refuse_foreign_kernels()
        return _run(arguments, f"python -m harness.parity {shlex.join(given)}".strip())
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the rows that were finished are in --out", file=sys.stderr)
        return 130


if __name__ == "__main__":
    run_command(main)
