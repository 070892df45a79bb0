"""Run test files in several processes at once, where pytest-xdist is not installed: a GPU machine, say, where
tests wait for compilers.

    python tests/in_parallel.py --processes 14 tests/gpu
    python tests/in_parallel.py --processes 14 --seconds 200 tests/gpu/test_linear_many.py -k branches

Tests are dealt to the processes at random, by a fixed seed. Prints what failed, and which processes were cut
off; exit status 0 if all tests passed or were skipped.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PYTEST = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir=.", "--import-mode=importlib"]


def collected(tests: list[str], only: str | None, environment: dict[str, str]) -> list[str]:
    """The names of all tests of these files and folders, in one order."""
    chosen = ["-k", only] if only else []
    command = [*PYTEST, "--collect-only", *tests, *chosen]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout
    return sorted(line for line in output.splitlines() if "::" in line and not line.startswith("ERROR"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="+", help="files and folders")
    parser.add_argument("-k", dest="only", help="as pytest's -k")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=600.0, help="time for each process (default: 600)")
    given = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path[1:]]), "OMP_NUM_THREADS": "1"}
    names = collected(given.tests, given.only, environment)
    if not names:
        print("error: no tests found", file=sys.stderr)
        return 2
    random.Random(0).shuffle(names)
    parts = [part for first in range(given.processes) if (part := names[first :: given.processes])]
    failed = False
    # A process that is cut off is interrupted, so that it tells what failed until then; a shell that started
    # this in the background would have all of them ignore that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(number) for number in range(len(parts))]
        running = []
        for part, log in zip(parts, logs, strict=True):
            with log.open("w") as stream:
                limit = ["timeout", "--signal=INT", "--kill-after=15", str(given.seconds)]
                command = [*limit, *PYTEST, "-p", "no:cacheprovider", *part]
                running.append(
                    subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
                )
        for number, (process, log) in enumerate(zip(running, logs, strict=True)):
            status = process.wait()
            text = log.read_text()
            last = text.strip().rpartition("\n")[2] if status != 124 else "cut off"
            print(f"process {number}, {len(parts[number])} tests: {last}")
            if status:
                failed = True
                print(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
