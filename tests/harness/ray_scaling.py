"""What `--engine ray` costs beside the local engine, and how it scales, on one machine.

    python -m tests.harness.ray_scaling real [--cells 6] [--workers 1 2] [--model MODEL]
    python -m tests.harness.ray_scaling sleep [--cells 8] [--workers 4] [--seconds 60]

`real`: RTN cells of one thread each, first with the local engine, then on Ray clusters of so many workers (a
node of one CPU each). `sleep`: cells that sleep instead of quantising, so that cores do not bound how many
run at a time. "command" is the whole command, "cells" from the first cell's start of work to the last one's
end, as their histories have it to the second, and "share" the sum of the cells' own seconds over workers
times that. The line "warm" is the first of all runs, which also makes what runs share.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from harness import store
from tests.harness.small_grid import save_model, write_grid
from tests.harness.tokenizers import word_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BITS = ["w4a4kv4", "w4a8kv8", "w4a16", "w3a16", "w8a8kv8", "w4a4", "w4a16kv4", "w4a8", "w3a8", "w8a16"]
PLUGIN = """
import time
from dataclasses import dataclass
from typing import ClassVar
from methods.method import Method


@dataclass(frozen=True, kw_only=True)
class Sleep(Method):
    name: ClassVar[str] = "sleep"
    seconds: float = 60.0

    def transform(self, model, artifact):
        time.sleep(self.seconds)
        return model
"""


def install(site: Path) -> None:
    """A folder that has the sleeping method, as an installed package."""
    info = site / "sleeping-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "sleeping.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sleeping\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[quantgrid.methods]\nsleep = sleeping:Sleep\n")


def seconds_of(out: Path) -> list[tuple[float, float]]:
    """Start and end of each cell's process at work, in seconds since the epoch, to the second."""
    found = []
    for path in out.glob(f"*/{store.HISTORY}"):
        times = {
            event["event"]: datetime.fromisoformat(event["time"]).timestamp()
            for event in store.read_history(path.parent)
        }
        found.append((times["started"], times["finished"]))
    return found


def measure(folder: Path, grid: Path, name: str, workers: int, arguments: list[str]) -> None:
    """Run the grid and print a line of the table."""
    out = folder / name.replace(" ", "-")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(folder / "site"))),
    }
    command = [sys.executable, "-m", "harness.grid", str(grid), "--quiet", "--out", str(out), *arguments]
    began = time.monotonic()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    whole = time.monotonic() - began
    spans = seconds_of(out)
    cells = max(end for _, end in spans) - min(begin for begin, _ in spans)
    own = sum(end - begin for begin, end in spans)
    share = own / (workers * max(cells, 1))
    print(f"{name:8} {workers:7} {len(spans):6} {whole:10.1f} {cells:8.0f} {share:7.2f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Overhead and scaling of --engine ray on this machine.")
    parser.add_argument("what", choices=("real", "sleep"))
    parser.add_argument("--cells", type=int, default=6)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=60.0, help="a sleeping cell sleeps so long")
    parser.add_argument("--model", help="model of the grid (default: a small random one)")
    arguments = parser.parse_args()
    from ray.cluster_utils import Cluster

    folder = Path(tempfile.mkdtemp(prefix="ray-scaling-"))
    install(folder / "site")
    os.environ["PYTHONPATH"] = str(folder / "site")
    sys.path.append(str(folder / "site"))
    model = arguments.model or save_model(folder / "model", word_tokenizer())
    method = "rtn" if arguments.what == "real" else f"sleep:seconds={arguments.seconds};rounding=rtn"
    grid = write_grid(
        folder / "grid.yaml", model, methods=[method], bits=BITS[: arguments.cells], tasks=["piqa_local"]
    )
    print("engine   workers  cells  command s  cells s   share")
    if arguments.what == "real":
        measure(folder, grid, "warm", 1, [])
        measure(folder, grid, "local", 1, [])
    for workers in arguments.workers:
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80_000_000}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(workers):
            cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
        try:
            cluster_arguments = ["--engine", "ray", "--address", cluster.address]
            measure(folder, grid, f"ray {workers}", workers, cluster_arguments)
        finally:
            cluster.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
