"""The study of boosting from its runs: every model's section, the authors' numbers once.

    python -m harness.boosting_report results/reference/boost.tar.xz results/reference/boost-trained.tar.xz \\
        --report reports/boost

It measures nothing: the same records give the same bytes. `harness.report` has these sections too, among
all others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.archive import opened
from harness.boosting import boosting_section, published_section
from harness.markdown import compact, plain, table
from harness.records import Model, models_of, read_run
from harness.store import os_reason, write_text
from kernels.command import run_command
from methods.errors import UserError

REPORT, FIGURES = "report.md", "figures"
HEAD = """\
# Bits where they matter

SensiBoost and KurtBoost against their base, against other roundings and against random choices of matrices. \
`†`, `‡`: a checkpoint whose weights had been rounded before; its rows say nothing about weight-only methods \
on others."""


def report(runs: Sequence[Path], folder: Path) -> str:
    """Writes the figures and returns the text. UserError for a run that holds no boosted rows."""
    text = [HEAD]
    for path in runs:
        with opened(path) as run:
            models = models_of(read_run(run).cells)
            sections = [boosting_section(model, folder / FIGURES, _stem(model)) for model in models]
            if not any(sections):
                raise UserError(f"{path} holds no cell of sensiboost or kurtboost")
            theirs = published_section()
            for model, section in zip(models, sections, strict=True):
                text += [f"## {plain(model.record['name'])}", _setting(path, model)]
                text += [block for block in section[1:] if block not in theirs]
    return "\n\n".join([*text, "## Published by the authors", *theirs[1:]]) + "\n"


def _stem(model: Model) -> str:
    return str(model.record["name"]).strip("./").replace("/", "--")


def _setting(path: Path, model: Model) -> str:
    records = [cell.record for row in model.rows for cell in row.cells]
    windows = {
        f"{name} {entry['n']} windows" for record in records for name, entry in record["tasks"].items()
    }
    environments = {
        str(record["environment"].get("gpu") or record["environment"].get("cpu")) for record in records
    }
    commits = {str(record["measured"].get("commit")) for record in records}
    commands = dict.fromkeys(str(record["measured"].get("command")) for record in records)
    lines = [
        ["model", f"{model.record['label']}, {model.record['parameters'] / 1e6:.1f} M parameters"],
        ["records", f"{path.name}, {len(records)} cells"],
        ["texts", ", ".join(sorted(windows))],
        ["machine", ", ".join(sorted(environments))],
        ["commit", ", ".join(sorted(commits))],
        *(["command", f"`{command}`"] for command in commands),
    ]
    return table(["what", "setting"], lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.boosting_report", description="Report boosting.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders or archives")
    parser.add_argument("--report", type=Path, required=True, metavar="DIR", help="where the report goes")
    arguments = parser.parse_args(argv)
    try:
        write_text(arguments.report / REPORT, compact(report(arguments.runs, arguments.report)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {os_reason(error)}", file=sys.stderr)
        return 2
    print(arguments.report / REPORT)
    return 0


if __name__ == "__main__":
    run_command(main)
