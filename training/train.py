"""Train one model: `python -m training.train --data DIR --out DIR --recipe osp --tokens 50e6`.

Several GPUs: `torchrun --nproc-per-node N -m training.train ...`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from kernels.command import run_command
from methods.device import parse_device
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError
from training import tokens
from training.recipe import RECIPES, SHAPES, Rates, Settings
from training.trainer import MODEL, Trainer, processes


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that commands which train have in common."""
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="twin", help="layers and widths (default: %(default)s)")
    add("--batch", type=int, default=32, metavar="N", help="sequences a step (default: %(default)s)")
    add("--micro", type=int, metavar="N", help="of which so many at a time (default: all of a process)")
    add("--length", type=int, default=1024, metavar="N", help="tokens of a sequence (default: %(default)s)")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="(default: %(default)s)")
    add("--compile", action="store_true", help="compile the pass through a block")
    add("--deterministic", action="store_true", help="on a GPU: the same bits in every run")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="of a CPU (default: torch's)")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m training.train", description="Train one model.")
    add = result.add_argument
    add("--data", required=True, type=Path, metavar="DIR", help="made by python -m training.prepare")
    add("--out", required=True, type=Path, metavar="DIR", help="a new folder, or the run to go on with")
    add("--recipe", choices=RECIPES, required=True)
    add("--tokens", type=float, required=True, metavar="N", help="to train on, repeated ones counted again")
    add("--seed", type=int, default=0, metavar="N", help="of the weights and of the order of the text")
    add("--rate-adam", type=float, default=Rates.adam, metavar="X", help="(default: %(default)s)")
    add("--rate-muon", type=float, default=Rates.muon, metavar="X", help="(default: %(default)s)")
    add("--rate-embedding", type=float, default=Rates.embedding, metavar="X", help="(default: %(default)s)")
    add("--rates", type=Path, metavar="FILE", help="those that python -m training.study rates chose, instead")
    add("--limit", type=float, metavar="SECONDS", help="stop after so long; the same command goes on")
    add_settings(result)
    return result


def chosen_rates(path: Path) -> Rates:
    """The rates that a study has chosen; UserError where the file is not there or no such file."""
    found = read_json(path)
    try:
        return Rates(**found["chosen"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not what python -m training.study rates writes") from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: give the commands in their order") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def run(arguments: argparse.Namespace, command: str) -> int:
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    data = tokens.read(arguments.data)
    rates = Rates(arguments.rate_adam, arguments.rate_muon, arguments.rate_embedding)
    if arguments.rates is not None:
        rates = chosen_rates(arguments.rates)
    with processes(parse_device(arguments.device)) as place:
        settings = Settings(
            arguments.recipe,
            max(1, round(arguments.tokens / (arguments.batch * arguments.length))),
            SHAPES[arguments.shape],
            arguments.seed,
            arguments.batch,
            arguments.micro or max(1, arguments.batch // place.world),
            arguments.length,
            rates,
            precision=arguments.precision,
            compiled=arguments.compile,
            deterministic=arguments.deterministic,
        )
        if Trainer(settings, data, arguments.out, place, command).train(arguments.limit) and place.first:
            print(f"finished: {arguments.out / MODEL}")
    return 0


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(given)
    try:
        refuse_foreign_kernels()
        return run(arguments, f"python -m training.train {shlex.join(given)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    run_command(main)
