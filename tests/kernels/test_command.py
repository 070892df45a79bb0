"""Commands whose output nobody reads on: they end quietly, as Unix tools do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.command import UNREAD

PROTOCOLS = {"harness/worker.py", "harness/trial.py"}
"""Processes that this project starts for itself."""

# Catches what a careful command catches, and prints more than a buffer holds.
CAREFUL = """
import sys
from kernels.command import run_command

def main() -> int:
    try:
        for number in range(100_000):
            print(number)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        print("cleaned up", file=sys.stderr)
    return 0

run_command(main)
"""


def unread(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A run of python whose output has no reader from the start."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=root, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    "arguments", [("kernels",), ("methods",), ("kernels.roofline", "--help"), ("harness.grid", "--help")]
)
def test_a_command_whose_reader_left_says_nothing(root: Path, arguments: tuple[str, ...]) -> None:
    done = unread(root, "-m", *arguments)
    assert (done.returncode, done.stderr) == (UNREAD, "")


@pytest.mark.parametrize("options", [(), ("-u",)])
def test_it_is_no_error_that_a_command_catches(root: Path, options: tuple[str, ...]) -> None:
    done = unread(root, *options, "-c", CAREFUL)
    assert (done.returncode, done.stderr) == (UNREAD, "cleaned up\n")


def test_a_reader_that_stays_gets_everything(root: Path) -> None:
    """In the encoding that was asked for, with the status that `main` returns."""
    code = "from kernels.command import run_command\nrun_command(lambda: print('µ') or 3)"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"\xb5\n", b"")


def test_every_command_ends_so(root: Path) -> None:
    guard = 'if __name__ == "__main__":\n'
    found = {
        str(path.relative_to(root)): path.read_text().partition(guard)[2].strip()
        for package in ("kernels", "methods", "harness", "training")
        for path in (root / package).rglob("*.py")
        if guard in path.read_text()
    }
    assert len(found) > 10 and found.keys() > PROTOCOLS
    assert {ends for name, ends in found.items() if name not in PROTOCOLS} == {"run_command(main)"}
