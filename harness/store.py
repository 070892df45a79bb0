"""Results on disk: one folder a cell, one JSON record in it, samples beside it as JSON lines.

Every write is atomic (a temporary file in the same folder, then a rename), so that a killed process leaves
either the old record or the new one.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RECORD = "cell.json"
MANIFEST = "run.json"


def write_text(path: Path, text: str) -> None:
    """Replace a file's content atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON; numbers that are not finite, which JSON lacks, become null."""
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write samples, one JSON object a line; numbers that are not finite become null."""
    write_text(path, "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a cell's folder; None where there is none or it is damaged (the cell then runs
    anew). Tasks whose samples are missing are dropped from it."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        tasks = record["tasks"]
    except (OSError, ValueError, KeyError):
        return None
    record["tasks"] = {
        name: task
        for name, task in tasks.items()
        if task.get("status") != "done" or (folder / str(task["samples"])).is_file()
    }
    return record
