"""The study: five recipes on the same data, tokens and seed. Each step is one command; what is done stays.
All of them after each other, runs side by side: training/study.sh.

python -m training.study rates     --data DIR --out DIR    learning rates, chosen on tuning text
python -m training.study run       --data DIR --out DIR --tokens N    the runs (a second seed of adam, osp)
python -m training.study tables    --data DIR --out DIR    what they lose at 4 bits
python -m training.study overhead  --out DIR               what a step costs at the paper's shape
python -m training.study collect   --out DIR --to FILE     everything measured in one JSON file
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from harness.environment import commit
from kernels.command import run_command
from kernels.recorded import encoded
from methods.checkpoint_folder import write_json
from methods.device import parse_device
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError
from training import overhead, tables, tokens
from training.recipe import RECIPES, SHAPES, Rates, Settings, settings_of
from training.tokens import Data
from training.train import add_settings, chosen_rates, read_json
from training.trainer import LOG, MODEL, PROBES, RUN, NotFiniteError, Place, Trainer, read_lines

RUNS = (
    *(("adam", 0), ("osp", 0), ("muon", 0), ("muon+ssnorm", 0), ("muon+embproj", 0)),
    *(("adam", 1), ("osp", 1)),
)
TRIED = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
DIGITS = 6
"""Significant ones of what is collected: of a window's thousand nats a hundredth."""
RATES, TABLES, OVERHEAD = "rates.json", "tables.json", "overhead.json"


def settings(arguments: argparse.Namespace, recipe: str, seed: int, count: float, rates: Rates) -> Settings:
    return Settings(
        recipe,
        max(1, round(count / (arguments.batch * arguments.length))),
        SHAPES[arguments.shape],
        seed,
        arguments.batch,
        arguments.micro or arguments.batch,
        arguments.length,
        rates,
        precision=arguments.precision,
        compiled=arguments.compile,
        deterministic=arguments.deterministic,
    )


def choose_rates(arguments: argparse.Namespace, data: Data, device: torch.device, command: str) -> None:
    """Shorter runs of adam, then of muon with adam's best rate for embedding and head; the lowest loss on
    tuning text wins, which is no text of any evaluation. `--beside` of them run side by side. Writes
    rates.json.

    Not too short: after a hundred steps of Adam the lowest rates lead, and of Muon rates at which a whole run
    does not converge."""
    tried: list[dict[str, Any]] = []
    best: dict[str, float] = {}
    for recipe in ("adam", "muon"):
        every = [
            Rates(adam=rate) if recipe == "adam" else Rates(best["adam"], rate, best["adam"])
            for rate in arguments.tried
        ]
        short = [settings(arguments, recipe, 0, arguments.tokens, rates) for rates in every]
        trials = [dataclasses.replace(one, probes=1, saves=1) for one in short]
        trial = partial(_try, data=data.folder, out=arguments.out, device=device, command=command)
        if arguments.beside == 1:
            found = [trial(one) for one in trials]
        else:
            with ProcessPoolExecutor(
                arguments.beside, get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),)
            ) as pool:
                try:
                    found = list(pool.map(trial, trials))
                except BrokenProcessPool as error:
                    raise UserError(
                        f"a run of {recipe} was killed, perhaps for want of memory: give the command again, "
                        "with a smaller --beside or --micro"
                    ) from error
        tried += found
        finite = [line for line in found if line["tuning"] is not None]
        if not finite:
            raise UserError(f"{recipe}: no rate of {arguments.tried} converges: give lower ones (--tried)")
        best[recipe] = min(finite, key=lambda line: line["tuning"])["rate"]
    chosen = {"adam": best["adam"], "muon": best["muon"], "embedding": best["adam"]}
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = {"command": command, "commit": commit(), "chosen": chosen, "tried": tried}
    write_json(arguments.out / RATES, about)
    _say(f"chosen: {json.dumps(chosen)}")


def _try(one: Settings, *, data: Path, out: Path, device: torch.device, command: str) -> dict[str, Any]:
    """One short run, what rates.json says of it; `tuning` is None where the loss ended in no number."""
    rate = one.rates.adam if one.recipe == "adam" else one.rates.muon
    folder = out / "rates" / f"{one.recipe}-{rate:g}"
    begun = time.perf_counter()
    tuning = None
    try:
        trainer = Trainer(one, tokens.read(data), folder, Place(device), command, _say)
        trainer.train()
        tuning = trainer.held_out_loss("tuning")
    except NotFiniteError as error:
        _say(str(error))
    speed = [line["tokens_per_second"] for line in read_lines(folder / LOG)]
    line = {
        "recipe": one.recipe,
        "rate": rate,
        "tuning": tuning if tuning is not None and math.isfinite(tuning) else None,
        "steps": one.steps,
        "tokens": one.tokens,
        "seconds": time.perf_counter() - begun,
        "tokens_per_second": sorted(speed)[len(speed) // 2] if speed else 0.0,
    }
    _say(json.dumps(line))
    return line


def run_all(arguments: argparse.Namespace, data: Data, device: torch.device, command: str) -> bool:
    """Every run of `--runs`, as far as `--limit` seconds go; whether all are finished."""
    started = time.perf_counter()
    rates = chosen_rates(arguments.out / RATES)
    for recipe, seed in arguments.runs:
        left = None if arguments.limit is None else arguments.limit - (time.perf_counter() - started)
        if left is not None and left <= 0:
            _say("out of time: give the command again")
            return False
        one = settings(arguments, recipe, seed, arguments.tokens, rates)
        trainer = Trainer(one, data, _folder(arguments, recipe, seed), Place(device), command, _say)
        if not trainer.train(left):
            return False
        del trainer
    return True


def quantise_all(arguments: argparse.Namespace, data: Data, device: torch.device, command: str) -> bool:
    """Measure every finished run at 4 bits, unless its folder has a tables.json already."""
    started = time.perf_counter()
    for recipe, seed in arguments.runs:
        folder = _folder(arguments, recipe, seed)
        if (folder / TABLES).is_file() or not (folder / MODEL).is_dir():
            continue
        if arguments.limit is not None and time.perf_counter() - started >= arguments.limit:
            _say("out of time: give the command again")
            return False
        more = tables.MORE if recipe in ("adam", "osp") else ()
        cells = (*tables.EVERY, *more)
        found = tables.measure(folder / MODEL, data, cells, device, seed=seed, windows=arguments.windows)
        write_json(folder / TABLES, {"command": command, "commit": commit(), "cells": found})
        _say(f"{folder.name}: {len(cells)} cells, {time.perf_counter() - started:.0f} s in all")
    return True


def time_steps(arguments: argparse.Namespace, device: torch.device, command: str) -> None:
    """Steps of adam, muon and osp at `--shape`; writes overhead.json."""
    tokens_a_step = arguments.batch * arguments.length
    every = [settings(arguments, recipe, 0, tokens_a_step, Rates()) for recipe in ("adam", "muon", "osp")]
    try:
        found = overhead.time_steps(every, arguments.vocabulary, device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device} has too little memory for models of three recipes at once: give a smaller --micro or "
            "--shape"
        ) from error
    for line in found:
        _say(json.dumps(line))
    about = {
        "command": command,
        "commit": commit(),
        "shape": arguments.shape,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "steps": found,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / OVERHEAD, about)


def collect(out: Path, data: Path, to: Path, runs: Sequence[tuple[str, int]]) -> None:
    """Everything that the commands above left in `out`, and where the data came from, in one file, numbers
    in `DIGITS` digits; compressed where its name ends in .xz."""
    found: dict[str, Any] = {"data": read_json(data / tokens.ABOUT), "runs": {}}
    for name in (RATES, OVERHEAD):
        path = out / name
        found[path.stem] = read_json(path) if path.is_file() else None
    measured = {
        path.parent.name: read_json(path)
        for recipe, seed in runs
        if (path := out / f"{recipe}-{seed}" / TABLES).is_file()
    }
    found["tables"] = (
        {
            "commands": [one["command"] for one in measured.values()],
            "commits": list(dict.fromkeys(one.get("commit") for one in measured.values())),
            "models": {name: one["cells"] for name, one in measured.items()},
        }
        if measured
        else None
    )
    for recipe, seed in runs:
        folder = out / f"{recipe}-{seed}"
        if not (folder / RUN).is_file():
            continue
        run = read_json(folder / RUN)
        planned = settings_of(run["settings"]).steps
        log = read_lines(folder / LOG)
        found["runs"][folder.name] = {
            **run,
            "finished": bool(log) and log[-1]["step"] == planned,
            "log": log,
            "probes": read_lines(folder / PROBES),
        }
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(encoded(to, json.dumps(_short(found), separators=(",", ":")) + "\n"))


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    return [_short(each) for each in value] if isinstance(value, list) else value


def _folder(arguments: argparse.Namespace, recipe: str, seed: int) -> Path:
    out: Path = arguments.out
    return out / f"{recipe}-{seed}"


def _say(text: str) -> None:
    print(text, flush=True)


def _run(text: str) -> tuple[str, int]:
    recipe, _, seed = text.partition(":")
    if recipe not in RECIPES or not (seed or "0").isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: write RECIPE or RECIPE:SEED")
    return recipe, int(seed or "0")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m training.study", description="Compare recipes.")
    commands = result.add_subparsers(dest="what", required=True)
    for name in ("rates", "run", "tables", "overhead", "collect"):
        one = commands.add_parser(name)
        one.add_argument("--out", required=True, type=Path, metavar="DIR", help="of the whole study")
        if name != "overhead":
            one.add_argument("--data", required=True, type=Path, metavar="DIR")
        if name in ("run", "tables", "collect"):
            one.add_argument("--runs", nargs="+", type=_run, default=RUNS, metavar="RECIPE[:SEED]")
        if name in ("run", "tables"):
            one.add_argument("--limit", type=float, metavar="SECONDS", help="stop after so long")
        if name in ("rates", "run"):
            one.add_argument("--tokens", type=float, required=True, metavar="N", help="of each run")
        if name != "collect":
            add_settings(one)
            one.set_defaults(shape="osp-1.4b" if name == "overhead" else "study")
        if name == "rates":
            one.add_argument("--tried", nargs="+", type=float, default=TRIED, metavar="RATE")
            one.add_argument("--beside", type=int, default=1, metavar="N", help="so many at a time")
        if name == "tables":
            one.add_argument("--windows", type=int, default=62, metavar="N", help="of each text")
        if name == "overhead":
            one.add_argument("--vocabulary", type=int, default=49152, metavar="N")
        if name == "collect":
            one.add_argument("--to", required=True, type=Path, metavar="FILE")
    return result


def run(arguments: argparse.Namespace, command: str) -> int:
    if arguments.what == "collect":
        collect(arguments.out, arguments.data, arguments.to, arguments.runs)
        return 0
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = parse_device(arguments.device)
    if arguments.what == "overhead":
        time_steps(arguments, device, command)
        return 0
    data = tokens.read(arguments.data)
    if arguments.what == "rates":
        if arguments.beside < 1:
            raise UserError(f"--beside {arguments.beside}: give 1 or more")
        choose_rates(arguments, data, device, command)
        return 0
    work = run_all if arguments.what == "run" else quantise_all
    work(arguments, data, device, command)
    return 0


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(given)
    try:
        refuse_foreign_kernels()
        return run(arguments, f"python -m training.study {shlex.join(given)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    run_command(main)
