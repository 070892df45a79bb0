"""Have a finished run's model come with the project: `python -m training.ship RUN --name twin-osp`.

It is then a built-in model of every command. Beside its weights lies what made it: settings, data, commands.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from kernels.command import run_command
from methods.checkpoint import SHIPPED_MODELS, write_label
from methods.checkpoint_folder import appearing
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError
from training.tokens import ABOUT
from training.trainer import MODEL, PROBES, RUN, read_lines

LARGEST = 8 * 10**6
"""Bytes that a shipped model may have."""


def ship(run: Path, name: str, data: Path) -> Path:
    """Copy the plain model of a run into the project; returns its folder. UserError where it cannot ship."""
    if not (run / MODEL).is_dir():
        raise UserError(f"{run} holds no finished model: train to the end first")
    size = sum(path.stat().st_size for path in (run / MODEL).iterdir())
    if size > LARGEST:
        raise UserError(f"{run / MODEL} has {size:,} bytes: what ships has {LARGEST:,} at most")
    about = json.loads((run / RUN).read_text())
    settings = about["settings"]
    tokens = settings["steps"] * settings["batch"] * settings["length"]
    probes = read_lines(run / PROBES)
    folder = SHIPPED_MODELS / name
    with appearing(folder) as inside:
        for path in (run / MODEL).iterdir():
            shutil.copyfile(path, inside / path.name)
        write_label(
            inside,
            f"bf16 (pre-trained by {settings['recipe']}, {tokens / 1e6:,.0f} M tokens)",
            held_out_loss=probes[-1]["held_out"] if probes else None,
            probes=[{name: probe[name] for name in ("step", "held_out", "excess")} for probe in probes],
            run=about,
            text=json.loads((data / ABOUT).read_text()),
        )
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.ship", description="Have a trained model come with the project."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder of python -m training.train")
    parser.add_argument("--name", required=True, help="by which commands will open it, such as twin-osp")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="what it was trained on")
    arguments = parser.parse_args(argv)
    try:
        refuse_foreign_kernels()
        print(ship(arguments.run, arguments.name, arguments.data))
    except (UserError, OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
