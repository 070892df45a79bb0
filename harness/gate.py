"""`python -m harness.gate --reference FILE`: has accuracy fallen since the reference was recorded?

Exit status 0: no. 1: it fell, or numbers moved in a way that is no harmless change. 2: a user's mistake.
`--record GRID.yaml` measures a reference; harness/recording.py says how.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tabulate import tabulate

from harness import baseline
from harness.baseline import Reference
from harness.config import GridConfig, load_grid, needs_hub
from harness.grid import silence_libraries
from harness.judgement import ALPHA, POWER, Finding, Verdict, judge
from harness.movement import RTOL
from kernels.command import run_command
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError

_WIDTH = 110


def check(
    reference: Reference,
    out: Path,
    *,
    alpha: float = ALPHA,
    power: float = POWER,
    same_machine: bool | None = None,
    isolate: bool = True,
    quiet: bool = True,
    command: str = "gate",
) -> Verdict:
    """Rerun what a reference names, under `out`, and judge it; the arguments are those of the command line.

    UserError where the model or the tasks' data are not the reference's.
    """
    from harness.engine import run_grid

    refuse_other_inputs(reference)
    records = run_grid(reference.grid, out, command=command, isolate=isolate, quiet=quiet)
    return judge(reference, records, out, alpha=alpha, power=power, same_machine=same_machine)


def refuse_other_inputs(reference: Reference) -> None:
    """Raise UserError where the model's files or the tasks' data differ from those recorded: numbers would
    move, and not for any change of the code."""
    from harness.evaluate import plan_tasks
    from methods.checkpoint import open_checkpoint

    for name in reference.grid.models:
        checkpoint = open_checkpoint(name)
        known = next(cell for cell in reference.cells if cell.cell.model == name)
        if checkpoint.sha256 != known.model_sha256:
            raise UserError(
                f"model {name} has sha256 {checkpoint.sha256[:16]}, the reference was recorded with "
                f"{known.model_sha256[:16]}: give that model or record a new reference"
            )
        if not reference.whole:
            continue  # digests are of all documents drawn; each document is compared in any case
        for plan in plan_tasks(reference.grid, checkpoint):
            before = known.tasks.get(plan.name)
            if before is not None and baseline.data_sha256(plan.about) != before.data:
                raise UserError(
                    f"the data of task {plan.name} are not those that the reference was recorded with: "
                    "fetch the same data or record a new reference"
                )


# Text


def text(verdict: Verdict, name: str) -> str:
    """What is printed: what was compared how, the table, and for each failure why it counts."""
    parts = [_head(verdict, name), f"{_table(verdict.findings)}\n\n{_LEGEND}"]
    for finding in verdict.failures:
        where = " ".join(part for part in (finding.cell, finding.task) if part)
        parts.append(_wrap(f"{finding.verdict.upper()}: {where}: {finding.what}: {finding.why}"))
        if finding.worst:
            parts[-1] += "\n  farthest: " + "\n            ".join(finding.worst)
    if verdict.failures and verdict.changed:
        parts.append("changed since:\n  " + "\n  ".join(verdict.changed))
    total, failed = len(verdict.findings), len(verdict.failures)
    parts.append(
        f"gate passed: {total} comparisons"
        if verdict.passed
        else f"gate FAILED: {failed} of {total} comparisons"
    )
    return "\n\n".join(parts)


def _head(verdict: Verdict, name: str) -> str:
    other = f"another kind of machine ({'; '.join(verdict.machine)})"
    where = other if verdict.machine else "this kind of machine"
    how = "by the tolerances that harmless changes gave there"
    if not verdict.same_machine:
        how = (
            f"by one-sided paired tests of whether the mean fell, alpha {verdict.alpha:g} for all together, "
            f"each with the fall that it sees at power {verdict.power:g}"
        )
    return _wrap(f"{name}, recorded on {where}. Float cells by rtol {RTOL:g}, quantised cells {how}.")


_LEGEND = """\
mean: change of the mean score: log-likelihood of a token (perplexity), log-probability of the right choice,
  or the metric of generated text. typical, rms: how far the documents' log-likelihoods moved either way,
  over the root of their tokens. largest: relative change of the log-likelihood that moved most."""


def _table(findings: Sequence[Finding]) -> str:
    rows = []
    last = ("", "")
    for finding in findings:
        place = (finding.cell, finding.task)
        shown = ("" if finding.cell == last[0] else finding.cell, "" if place == last else finding.task)
        numbers = ["" if value is None else f"{value:.3g}" for value in (finding.moved, finding.limit)]
        note = finding.why if finding.verdict == "ok" else ""
        rows.append([*shown, finding.n or "", finding.what, *numbers, finding.verdict, note])
        last = place
    headers = ["cell", "task", "n", "what", "moved", "limit", "", ""]
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=_ALIGN)


_ALIGN = ("left", "left", "right", "left", "right", "right", "left", "left")


def _wrap(line: str) -> str:
    return textwrap.fill(line, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


# Command line


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m harness.gate",
        description="Rerun what a reference names and compare, document by document. "
        "Exit status: 0 nothing fell, 1 accuracy fell or numbers moved, 2 a mistake in what was given.",
    )
    result.add_argument(
        "--reference", type=Path, required=True, metavar="FILE", help="reference to compare with"
    )
    result.add_argument(
        "--record",
        type=Path,
        metavar="GRID",
        help="measure a reference of this grid file and write it instead",
    )
    result.add_argument(
        "--out", type=Path, metavar="DIR", help="keep the cells here; a rerun goes on from them"
    )
    result.add_argument("--json", action="store_true", help="print the verdict as JSON")
    result.add_argument(
        "--alpha",
        type=float,
        default=ALPHA,
        help="on another kind of machine: chance that a gate fails where nothing fell (default %(default)s)",
    )
    result.add_argument(
        "--power",
        type=float,
        default=POWER,
        help="the chance with which the fall stated for each test is seen (default %(default)s)",
    )
    result.add_argument(
        "--same-machine",
        action=argparse.BooleanOptionalAction,
        help="apply the tolerances of the reference's machine, or do not (default: where this is its kind)",
    )
    result.add_argument("--methods", nargs="+", metavar="METHOD", help="these methods of the reference only")
    result.add_argument("--tasks", nargs="+", metavar="TASK", help="these tasks of the reference only")
    result.add_argument("--limit", type=int, metavar="N", help="no more documents a task than this")
    result.add_argument("--quiet", action="store_true", help="no progress bar")
    return result


def run(arguments: argparse.Namespace, command: str) -> int:
    for name in ("alpha", "power"):
        if not 0 < getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: give a probability between 0 and 1")
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit}: give a positive number")
    if arguments.record is not None:
        return _record(arguments, command)
    whole = baseline.load(arguments.reference)
    reference = baseline.narrowed(whole, arguments.methods, arguments.tasks, arguments.limit)
    _without_hub(reference.grid)
    with _folder(arguments.out) as out:
        verdict = check(
            reference,
            out,
            alpha=arguments.alpha,
            power=arguments.power,
            same_machine=arguments.same_machine,
            quiet=arguments.quiet or arguments.json,
            command=command,
        )
    if arguments.json:
        print(json.dumps(verdict.to_json(), indent=1))
    else:
        print(text(verdict, arguments.reference.name))
    return 0 if verdict.passed else 1


def _record(arguments: argparse.Namespace, command: str) -> int:
    partial = [name for name in ("methods", "tasks", "limit") if getattr(arguments, name) is not None]
    if partial:
        raise UserError(
            f"--record takes the grid as it stands: change the grid file instead of --{partial[0]}"
        )
    grid = load_grid(arguments.record, {})
    _without_hub(grid)
    from harness.recording import record

    with _folder(arguments.out) as out:
        refusals = record(grid, arguments.reference, out, command, lambda line: print(line, file=sys.stderr))
    for line in refusals:
        print(_wrap(f"refused: {line}"))
    if not refusals:
        print(f"reference: {arguments.reference}")
    return 1 if refusals else 0


def _without_hub(grid: GridConfig) -> None:
    if not needs_hub(grid):
        # Read when the hub's client is imported, which happens after this.
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="quantgrid-gate-") as name:
        yield Path(name)


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(given)
    silence_libraries()
    try:
        refuse_foreign_kernels()
        return run(arguments, f"python -m harness.gate {shlex.join(given)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    run_command(main)
