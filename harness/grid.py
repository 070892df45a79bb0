"""`python -m harness.grid [grid.yaml] [options]`: fill a grid, print the comparison, write the report."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shlex
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.command import run_command
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError

if TYPE_CHECKING:
    from harness.config import GridConfig
    from harness.ray_engine import Cluster

_HERE = Path(__file__).resolve().parent
_CONDUCT = ("time_limit", "gpus")
"""Fields of a grid that say how it runs, and not what comes out."""


def quick_grid() -> Path:
    """The shipped quick grid: beside the packages in a checkout, inside this one where it is installed."""
    beside = _HERE.parent / "grids" / "quick.yaml"
    return beside if beside.is_file() else _HERE / "grids" / "quick.yaml"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m harness.grid",
        description="Compare 4-bit quantisation methods on the same models, data, protocol and settings.",
        epilog="A method is name[:option=value;option=value], a+b composes; `python -m methods` lists them.",
    )
    result.add_argument("grid", nargs="?", type=Path, help="grid file (default: grids/quick.yaml)")
    result.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="such as float rtn 'quarot:rounding=rtn'"
    )
    result.add_argument(
        "--models", nargs="+", metavar="MODEL", help="built-in model, folder, .gguf file or hub id"
    )
    result.add_argument("--bits", nargs="+", metavar="BITS", help="such as w4a16 w4a8kv8 w4a4kv4 w4a16g128")
    result.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="local tasks, perplexity_* or any lm-eval task"
    )
    result.add_argument("--limit", type=int, metavar="N", help="documents per task (windows for perplexity)")
    result.add_argument(
        "--calibration", metavar="NAME|PATH", help="boolq, wikitext2, c4, pile, or a text path"
    )
    result.add_argument(
        "--execution", help="simulate (4-bit arithmetic on floats) or int4 (packed weights and KV cache)"
    )
    result.add_argument("--seeds", type=int, metavar="N", help="repetitions with seeds 0 .. N-1")
    result.add_argument("--device", help="cpu, cuda or cuda:N")
    result.add_argument("--dtype", help="float32, float64, bfloat16 or float16")
    result.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    result.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go (default: results/<grid name>[-<digest>])"
    )
    result.add_argument(
        "--retry-failed", action="store_true", help="run cells again whose record says failed"
    )
    result.add_argument(
        "--time-limit", type=float, metavar="MINUTES", help="give a cell up as hanging after so long"
    )
    result.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local (default): cells one by one on this machine; ray: side by side, on a cluster too",
    )
    result.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="with --engine ray: the cluster's head, or auto (default: RAY_ADDRESS, or this machine alone)",
    )
    result.add_argument(
        "--gpus", type=int, metavar="N", help="with --engine ray: hold N GPUs at a time at most, one a cell"
    )
    result.add_argument(
        "--in-process",
        action="store_true",
        help="run cells in this process, for a debugger: a crash or a hang then ends the run",
    )
    result.add_argument("--list", action="store_true", help="list the cells and stop")
    result.add_argument("--quiet", action="store_true", help="no progress bar")
    return result


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The grid's fields that the command line gives."""
    names = (
        "methods",
        "models",
        "bits",
        "tasks",
        "limit",
        "calibration",
        "seeds",
        "execution",
        "device",
        "dtype",
        "threads",
        "time_limit",
        "gpus",
    )
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if "limit" in given:
        given["limits"] = {}  # the grid file's limits of single tasks give way, too
    if arguments.grid is None and "methods" in given:
        # The small models of the quick grid are there for its own rows.
        from methods.checkpoint import DEFAULT_MODEL

        given.setdefault("models", [DEFAULT_MODEL])
    return given


def run_name(grid: GridConfig, overridden: bool) -> str:
    """Folder of a run under results/: the grid's name, and a digest where the command line changed the grid,
    so that a trial never replaces the report of the grid file itself."""
    if not overridden:
        return grid.name
    content = grid.model_dump_json(exclude=set(_CONDUCT))
    return f"{grid.name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def run(arguments: argparse.Namespace, command: str) -> int:
    from harness.config import cells_of, load_grid, needs_hub

    given = overrides(arguments)
    grid = load_grid(arguments.grid or quick_grid(), given)
    if not needs_hub(grid):
        # Read when the hub's client is imported, which happens below.
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    if arguments.list:
        for cell in cells_of(grid):
            print(cell)
        print(f"{len(cells_of(grid))} cells; tasks: {', '.join(grid.tasks)}")
        return 0
    from harness import report
    from harness.engine import run_grid
    from harness.records import Cell

    out = arguments.out or Path("results") / run_name(grid, bool(given.keys() - set(_CONDUCT)))
    with cluster_of(arguments, grid, out) as cluster:
        records = run_grid(
            grid,
            out,
            command=command,
            retry_failed=arguments.retry_failed,
            quiet=arguments.quiet,
            isolate=not arguments.in_process,
            cluster=cluster,
        )
    print(report.headline(records))
    tasks = list(dict.fromkeys(name for record in records for name in record["tasks"]))
    manifest = {
        "cells": [record["id"] for record in records],
        "tasks": tasks,
        "grid": grid.model_dump(mode="json"),
    }
    print(f"report: {report.write_report(out, manifest=manifest)}")
    failed = sum(Cell(record).state not in ("done", "n/a") for record in records)
    if failed:
        print(f"{failed} of {len(records)} cells are incomplete; the report lists why", file=sys.stderr)
    return 1 if failed else 0


def cluster_of(
    arguments: argparse.Namespace, grid: GridConfig, out: Path
) -> AbstractContextManager[Cluster | None]:
    """Where the cells run; None: here. UserError for options that do not go together."""
    if arguments.engine == "local":
        if grid.gpus is not None or arguments.address is not None:
            raise UserError(f"{'gpus' if grid.gpus is not None else '--address'} needs --engine ray")
        return nullcontext()
    if arguments.in_process:
        raise UserError("--in-process runs cells in this process, --engine ray elsewhere: give one of them")
    from harness import ray_engine

    return ray_engine.connected(arguments.address, grid, out)


def silence_libraries() -> None:
    """Keep the libraries' chatter out of the progress bar; errors still show."""
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own bar says otherwise for itself
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(given)
    silence_libraries()
    try:
        refuse_foreign_kernels()
        return run(arguments, f"python -m harness.grid {shlex.join(given)}".strip())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {' '.join(str(error).split())}: finished tasks are kept", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished tasks are kept; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    run_command(main)
