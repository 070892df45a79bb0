"""How the commands of this project end: where nobody reads on, as other Unix tools do, without a word."""

import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

UNREAD = 128 + signal.SIGPIPE
"""The exit status of a command whose output lost its reader, as of one that SIGPIPE ended."""


class _Output(io.FileIO):
    """Standard output. A write that nobody can read ends the command, whatever errors it catches; what is
    written from then on goes nowhere."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            raise SystemExit(UNREAD) from None


def run_command(main: Callable[[], int]) -> NoReturn:
    """End the process with the status that `main` returns, or with UNREAD."""
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper):
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_Output(out.fileno(), "wb", closefd=False)),
            encoding=out.encoding,
            errors=out.errors,
            line_buffering=out.line_buffering or out.write_through,
        )
    try:
        sys.exit(main())
    finally:
        sys.stdout.flush()
