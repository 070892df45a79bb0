"""Results on disk, the only state of a run: one folder a cell, its record in cell.json, samples beside it.

    <run>/run.json                      the cells of the last command, by their ids
    <run>/<cell id>/cell.json           what was measured; "sha256" seals all but its costs and dates
    <run>/<cell id>/samples/TASK.jsonl  one line a document; its sha256 stands in the record
    <run>/<cell id>/results_DATE.json   its scores as lm-eval writes them (harness/lm_eval_results.py)
    <run>/<cell id>/history.jsonl       what happened to the cell and when, one line an event
    <run>/<cell id>/output.log          what the cell's process printed

Every write is atomic (a temporary file in the same folder, then a rename), so that a killed process leaves
either the old file or the new one. Whoever fills a cell holds its lease, a lock that the kernel gives back
when the process dies, however it dies. What does not agree with its sha256 is named and made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kernels import recorded
from methods.errors import UserError

SCHEMA = 2
RECORD = "cell.json"
MANIFEST = "run.json"
HISTORY = "history.jsonl"
OUTPUT = "output.log"
LEASE = "lease.lock"
_STALE_SECONDS = 3600
_TAIL_BYTES, _TAIL_LINES, _TAIL_WIDTH = 65536, 20, 500
Record = dict[str, Any]


class Leased(Exception):  # noqa: N818 - a state of affairs, not an error
    """Another live process is filling this cell."""


@contextmanager
def lease(folder: Path) -> Iterator[None]:
    """Hold a cell's folder while it is read and filled; raises Leased at once where another process does.

    What a killed process left behind half-written is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LEASE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Leased(folder.name) from None
    except NotImplementedError as error:
        raise UserError(f"{folder}: this file system has no file locks; give another --out") from error
    try:
        for stray in (*folder.glob(".*.partial"), *folder.glob("samples/.*.partial")):
            stray.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def refresh(folder: Path) -> None:
    """See what other machines have written in a folder. A client of NFS remembers for a while that a file was
    not there; a change that it makes itself has it ask again."""
    probe = folder / f".{os.uname().nodename}-{os.getpid()}-{time.monotonic_ns()}.partial"
    probe.touch()
    probe.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace a file's content atomically; compressed where its name ends in .xz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.partial")
    try:
        with temporary.open("xb") as stream:
            stream.write(recorded.encoded(path, text))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON; numbers that are not finite, which JSON lacks, become null."""
    write_text(path, _json(value))


def _json(value: Record) -> str:
    return json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"


def write_record(folder: Path, record: Record) -> None:
    """Write a cell's record, sealed with the sha256 of all that a second run reproduces."""
    write_text(folder / RECORD, encoded_record(record))


def encoded_record(record: Record) -> str:
    whole = json.loads(json.dumps(_finite(record)))  # as it will be read
    return _json({**whole, "sha256": content_sha256(whole)})


def write_samples(folder: Path, task: str, rows: Iterable[Record]) -> Record:
    """Write a task's sample rows; returns what the record says of them: {"samples", "samples_sha256"}."""
    text, sha256 = encoded_samples(rows)
    name = f"samples/{task}.jsonl"
    write_text(folder / name, text)
    return {"samples": name, "samples_sha256": sha256}


def encoded_samples(rows: Iterable[Mapping[str, Any]]) -> tuple[str, str]:
    """What is written of sample rows, and its sha256."""
    text = "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)
    return text, hashlib.sha256(text.encode()).hexdigest()


def content_sha256(record: Record) -> str:
    """Digest of a record without "sha256" itself and "measured" (costs, dates, the command)."""
    content = {key: value for key, value in record.items() if key not in ("sha256", "measured")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_record(folder: Path, say: Callable[[str], None] = lambda _: None) -> Record | None:
    """The record of a cell's folder; None where there is none, or none that can be trusted.

    `say` is told of every file that is damaged; a task whose samples are damaged or gone is left out of the
    record, so that it is scored again.
    """
    path = folder / RECORD
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            raise ValueError(f"schema {record['schema']}, this version writes {SCHEMA}")
        if record["sha256"] != content_sha256(record):
            raise ValueError("its sha256 differs")
        tasks, _ = record["tasks"], record["measured"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        say(f"{path} is damaged ({reason}): the cell is made again")
        return None
    record["tasks"] = {}
    for name, task in tasks.items():
        reason = _damage(folder, task) if task["status"] == "done" else ""
        if reason:
            say(f"{folder / str(task['samples'])} is {reason}: {name} is scored again")
        else:
            record["tasks"][name] = task
    return record


def _damage(folder: Path, task: Record) -> str:
    """What is wrong with a finished task's samples; empty where nothing is."""
    try:
        data = (folder / task["samples"]).read_bytes()
    except OSError:
        return "gone"
    return "" if hashlib.sha256(data).hexdigest() == task["samples_sha256"] else "damaged"


def note(folder: Path, event: str, **facts: Any) -> None:
    """Append an event to a cell's history, in one write."""
    line = {"time": now(), "host": os.uname().nodename, "pid": os.getpid(), "event": event, **facts}
    with (folder / HISTORY).open("ab") as stream:
        stream.write(json.dumps(line).encode() + b"\n")


def read_history(folder: Path) -> list[Record]:
    """The events of a cell; a line that a kill cut short is left out."""
    try:
        lines = (folder / HISTORY).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def sweep(run: Path) -> None:
    """Remove what killed commands have left half-written in a run's own folder and among its figures."""
    for stray in (*run.glob(".*.partial"), *run.glob("figures/.*.partial")):
        with suppress(OSError):
            if time.time() - stray.stat().st_mtime > _STALE_SECONDS:
                stray.unlink()


def tail(path: Path) -> str:
    """The last lines that a cell's process printed; empty where there are none."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(line[:_TAIL_WIDTH] for line in text.splitlines()[-_TAIL_LINES:])


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def os_reason(error: OSError) -> str:
    """What the system refused, and where it says so of which file: "Permission denied (runs/a)"."""
    reason = error.strerror or str(error)
    return f"{reason} ({error.filename})" if error.filename else reason


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
