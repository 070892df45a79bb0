"""Trials: a grid run under a harmless change, in a process of its own, as torch reads the level of the
processor's instructions and the number of threads when it starts.

The process reads a job, one JSON object, from standard input; a user's mistake ends it with status 2 and one
line on standard error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import store
from harness.config import GridConfig
from methods.errors import UserError

LEAST = 8
"""Harmless changes that a reference rests on."""
NOISES = 6
"""How many of them are noise: those surely differ from each other."""

_LOWER = {"AVX512": ("avx2", "default"), "AVX2": ("default",)}
"""Levels below the one that torch reports."""


@dataclass(frozen=True)
class Trial:
    """A harmless change. capability: level of the processor's instructions, None: as it is."""

    name: str
    threads: int
    capability: str | None = None
    noise: int | None = None
    reverse: bool = False

    def environment(self) -> dict[str, str]:
        """Variables that its process starts with."""
        found = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        if self.capability is not None:
            found["ATEN_CPU_CAPABILITY"] = self.capability
        return found


def harmless(threads: int, capability: str, device: str) -> list[Trial]:
    """The changes to try beside a run with so many threads at this level, `LEAST` or more: the documents
    reversed, on a CPU 1 and 2 threads and every lower level, and noise."""
    trials = [Trial("documents reversed", threads, reverse=True)]
    if device == "cpu":
        trials += [Trial(f"threads {count}", count) for count in (1, 2) if count != threads]
        trials += [Trial(f"capability {level}", threads, level) for level in _LOWER.get(capability, ())]
    count = max(NOISES, LEAST - len(trials))
    return trials + [Trial(f"noise {seed}", threads, noise=seed) for seed in range(1, count + 1)]


def run(grid: GridConfig, out: Path, trial: Trial, command: str) -> list[store.Record]:
    """Run a grid under a trial into `out`; its records, in the grid's order. What is there is kept.

    UserError where the process could not run it; a cell that failed has its failure on record.
    """
    job = {
        "grid": grid.model_copy(update={"threads": trial.threads}).model_dump(mode="json"),
        "out": str(out),
        "command": command,
        "perturbation": {"noise": trial.noise, "reverse": trial.reverse},
    }
    done = subprocess.run(
        [sys.executable, "-m", "harness.trial"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **trial.environment()},
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"{trial.name}: {lines[-1].removeprefix('error: ')}")
    manifest = json.loads((out / store.MANIFEST).read_text(encoding="utf-8"))
    records = [store.read_record(out / cell_id) for cell_id in manifest["cells"]]
    return [record for record in records if record is not None]


def _run_here(job: dict[str, Any]) -> None:
    from harness.engine import run_grid
    from harness.perturb import Perturbation

    perturbation = Perturbation(**job["perturbation"])
    run_grid(
        GridConfig.model_validate(job["grid"]),
        Path(job["out"]),
        command=job["command"],
        quiet=True,
        isolate=False,
        perturbation=None if perturbation == Perturbation() else perturbation,
    )


def main() -> int:
    from harness.grid import silence_libraries

    silence_libraries()
    try:
        _run_here(json.load(sys.stdin))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
