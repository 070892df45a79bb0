"""The long form of the test of kills: 24 cells, ten kills, nothing lost and nothing done twice.

    python -m tests.harness.ten_kills [--model MODEL] [--kills N] [--seed N] [--folder DIR]

Runs a grid of 24 cells once undisturbed and once with kill -9 at random moments, in turn of the command and
of its worker, each time followed by the same command; then compares records, samples, report and figures byte
by byte, and counts in the cells' histories that no finished task was computed again. Without --model, a small
random model: some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.harness.small_grid import contents, save_model, tasks_done, write_grid

ROOT = Path(__file__).resolve().parents[2]
BITS = ["w4a4kv4", "w4a8kv8", "w4a16", "w3a16", "w8a8kv8", "w4a4", "w4a16kv4", "w4a8"]
METHODS: list[object] = ["float", {"method": "rtn", "bits": BITS[:7]}, "quarot:rounding=rtn"]
CELLS = 1 + 7 + 2 * 8  # quarot with two seeds


def start(grid: Path, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "harness.grid", str(grid), "--out", "run", "--quiet", *arguments]
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a grid ten times; nothing may be lost.")
    parser.add_argument("--model", help="model of the grid (default: a small random one)")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="ten-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    model = arguments.model or save_model(folder / "model")
    tasks = ["perplexity_wikipedia", "piqa_local"]
    grid = write_grid(folder / "grid.yaml", model, methods=METHODS, bits=BITS, tasks=tasks, seeds=2)
    began = time.monotonic()
    assert start(grid, folder / "whole").wait() == 0
    took = time.monotonic() - began
    print(f"undisturbed: {CELLS} cells in {took:.0f} s", flush=True)
    draw, whole, out = random.Random(arguments.seed), folder / "whole" / "run", folder / "killed" / "run"
    for kill in range(arguments.kills):
        process = start(grid, folder / "killed", "--retry-failed")
        pause = draw.uniform(0.02, 1.6 / arguments.kills) * took + 5
        time.sleep(pause)
        workers = psutil.Process(process.pid).children() if process.poll() is None else []
        victim = workers[0].pid if kill % 2 and workers else process.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        time.sleep(1)  # the command records the death of its worker before it is killed, too
        process.kill()
        process.wait()
        psutil.wait_procs(workers, timeout=30)
        who = "worker" if victim != process.pid else "command"
        print(f"kill {kill + 1} ({who}) after {pause:.0f} s: {len(tasks_done(out))} tasks done", flush=True)
    assert start(grid, folder / "killed", "--retry-failed").wait() == 0
    assert start(grid, folder / "killed").wait() == 0
    done = tasks_done(out)
    again = len(done) - len(set(done))
    before, after = contents(whole), contents(out)
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    print(f"{CELLS * len(tasks)} tasks, {again} of them computed again after they were finished")
    print(f"{len(before)} files compared, {len(differing)} differ {' '.join(differing)}")
    return 1 if again or differing else 0


if __name__ == "__main__":
    sys.exit(main())
