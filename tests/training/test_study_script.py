"""training/study.sh: which commands it gives, in which order, and what becomes of one that fails."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from training.study import RUNS, parser

STUB = """\
#!{python}
import sys
from pathlib import Path
given = sys.argv[3:]
out = Path(given[given.index("--out") + 1])
with open({log!r}, "a") as log:
    print(" ".join(given), file=log)
if given[0] in ("rates", "overhead"):
    (out / (given[0] + ".json")).write_text("")
sys.exit({failing!r} in " ".join(given))
"""


def give(root: Path, folder: Path, *arguments: str, failing: str = "nothing") -> tuple[int, list[str], str]:
    """Exit status, the commands of training.study that were given, and what was printed as errors."""
    python, log = folder / "python", folder / "log"
    python.write_text(STUB.format(python=sys.executable, log=str(log), failing=failing))
    python.chmod(0o755)
    log.write_text("")
    done = subprocess.run(
        [root / "training" / "study.sh", *arguments],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, log.read_text().splitlines(), done.stderr


def test_every_command_in_its_order(root: Path, tmp_path: Path) -> None:
    arguments = ("cpu cuda:1", "data", str(tmp_path / "out"), "80e6", "--compile", "--micro", "16")
    status, given, _ = give(root, tmp_path, *arguments)
    assert status == 0
    parsed = [parser().parse_args(shlex.split(line)) for line in given]
    assert [one.what for one in parsed[:1] + parsed[-2:]] == ["rates", "overhead", "collect"]
    assert parsed[0].tokens == 20e6 and parsed[0].compile and parsed[0].beside == 5
    for what in ("run", "tables"):
        named = [(one.runs[0], one.device) for one in parsed if one.what == what]
        assert sorted(run for run, _ in named) == sorted(RUNS)
        assert {device for _, device in named} == {"cpu", "cuda:1"}
    for run in RUNS:
        order = [one.what for one in parsed if one.what in ("run", "tables") and one.runs == [run]]
        assert order == ["run", "tables"]
    assert (parsed[-2].shape, parsed[-2].micro, parsed[-2].compile) == ("osp-1.4b", 4, True)
    assert parsed[-1].to == tmp_path / "out" / "study.json"
    _, again, _ = give(root, tmp_path, *arguments)
    assert [line.split()[0] for line in again].count("rates") == 0, "what is done is not done again"


def test_a_run_that_fails_costs_the_others_nothing(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, given, errors = give(
        root, tmp_path, "cpu", "data", str(out), "80e6", failing="--runs muon+ssnorm"
    )
    assert status == 1 and "see" in errors
    tables = [line for line in given if line.startswith("tables")]
    assert len(tables) == len(RUNS) - 1 and not any("muon+ssnorm" in line for line in tables)
    assert given[-1].startswith("collect")


def test_bad_use(root: Path, tmp_path: Path) -> None:
    assert give(root, tmp_path, "cpu")[0] == 2
