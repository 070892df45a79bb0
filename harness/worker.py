"""The process of one cell: started by the engine, dead with it, its memory given back at its end.

It reads a job, one line of JSON, from standard input; writes events, one line each, to what was its standard
output; and what it or a library prints goes to the cell's output.log. When standard input closes, the process
that wanted the cell is gone, and this one ends at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from harness import store
from harness.grid import silence_libraries


@dataclass(frozen=True)
class Job:
    """What a worker is to do: fill `cell` of `grid` under `out`, if its address still is `cell_id`."""

    grid: dict[str, Any]
    cell: dict[str, Any]
    cell_id: str
    out: str
    command: str
    retry_failed: bool

    def line(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"


def end_with_parent() -> None:
    """Wait, on a thread, for the other end of standard input to close, and end this process then."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def fill(job: Job, events: TextIO) -> None:
    """Fill the cell; the last event is {"settled": true}, {"leased": true}, {"refused": reason} or
    {"changed": this machine} where the cell's address is another than the job's."""
    from harness import environment
    from harness.cell import CellRun, digest, identity, open_model, open_setting, settled
    from harness.config import CellSpec, GridConfig
    from harness.progress import Steps
    from methods.errors import UserError

    def send(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    class Teller(logging.Handler):
        """What methods warn of, such as a damaged file, is for the user's eyes."""

        def emit(self, record: logging.LogRecord) -> None:
            send({"say": record.getMessage()})

    logging.getLogger("methods").addHandler(Teller(logging.WARNING))
    grid, cell = GridConfig.model_validate(job.grid), CellSpec(**job.cell)
    try:
        setting = open_setting(grid, job.command)
        model = open_model(cell.model, grid)
    except UserError as error:
        send({"refused": str(error)})
        return
    if digest(identity(cell, model, setting)) != job.cell_id:
        send({"changed": environment.describe(setting.device)})
        return
    folder = Path(job.out) / job.cell_id
    try:
        with store.lease(folder):
            # Another command's process may have filled it while this one was starting.
            if settled(folder, model, job.retry_failed, lambda said: send({"say": said})) is None:
                run = CellRun(cell, model, setting, folder, Steps(send), folder / store.OUTPUT)
                run.run(job.retry_failed)
    except store.Leased:
        send({"leased": True})
        return
    send({"settled": True})


def main() -> None:
    job = Job(**json.loads(os.fdopen(os.dup(0), "rb", buffering=0).readline()))
    threading.Thread(target=end_with_parent, daemon=True).start()
    folder = Path(job.out) / job.cell_id
    folder.mkdir(parents=True, exist_ok=True)
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    log = os.open(folder / store.OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with contextlib.suppress(OSError):
        # Where memory runs out, the kernel takes this process and not the grid's.
        Path("/proc/self/oom_score_adj").write_text("500")
    silence_libraries()
    fill(job, events)
    # Not by way of the interpreter's end, in which libraries have been seen to hang or crash.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
