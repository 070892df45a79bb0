"""The report's sections on how to make it again: the grid in full, and the commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from harness.records import Cell, Run

GRID = """\
The grid as it ran, with every default and what the command line changed: `python -m harness.grid` reads \
it as it stands here."""
AGAIN = """\
Equal settings on an equal machine give the same records and so the same report, costs apart; another \
processor, GPU or number of threads rounds otherwise (the settings above name them). What is already in \
the folder is not computed again: give `--out` another one to start from nothing."""
DIRTY = """\
The tree had changes that are not in that commit ({}): without them the digest of the code in the \
settings, `code`, differs, and so may the numbers."""
SEVERAL = "The cells were made at several commits ({}): each cell's own stands in its `cell.json`."
UNKNOWN = "The commit is not on record."
NO_GRID = (
    "The run's manifest does not hold the grid: the command below names its file as it was at that commit."
)


def grid_section(run: Run) -> list[str]:
    """Empty where the manifest does not hold the grid."""
    if run.grid is None:
        return []
    return ["### The grid in full", GRID, f"```yaml\n{grid_text(run.grid)}```"]


def grid_text(grid: Any) -> str:
    """A grid as a YAML file, without what only says how its cells are shared out."""
    kept = {name: value for name, value in json.loads(json.dumps(grid)).items() if name != "gpus"}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=100)


def again_section(run: Run, name: str) -> list[str]:
    """How to make the run and its report again; `name`: the run's folder."""
    commits, commands = _measured(run.cells, "commit"), _measured(run.cells, "command")
    clean = [commit.removesuffix("+") for commit in commits]
    notes = [SEVERAL.format(", ".join(f"`{commit}`" for commit in commits))] if len(commits) > 1 else []
    notes += [] if commits else [UNKNOWN]
    changed = [f"`{commit}`" for commit in commits if commit.endswith("+")]
    notes += [DIRTY.format(", ".join(changed))] if changed else []
    lines = [f"git checkout {clean[0]}"] if len(commits) == 1 else []
    lines.append("make .venv/requirements.lock")
    if run.grid is not None:
        stem = str(run.grid.get("name") or name)
        lines.append(f"# the grid in full, from the settings above, as {stem}.yaml")
        lines.append(f".venv/bin/python -m harness.grid {stem}.yaml --out {shlex.quote(f'results/{name}')}")
    else:
        notes.append(NO_GRID)
        lines += [f".venv/bin/{command}" for command in commands]
    lines.append(f".venv/bin/python -m harness.report {shlex.quote(f'results/{name}')}")
    said = f"Its own command was `{commands[0]}`." if len(commands) == 1 else ""
    text = ["## Reproduce this", f"```sh\n{chr(10).join(lines)}\n```", AGAIN, *notes, said]
    return [part for part in text if part]


def _measured(cells: Sequence[Cell], fact: str) -> list[str]:
    """What the cells' records say, each answer once."""
    said = (str((cell.record.get("measured") or {}).get(fact) or "") for cell in cells)
    return [each for each in dict.fromkeys(said) if each]
