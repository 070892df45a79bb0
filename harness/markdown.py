"""Markdown tables of reports, by the standard library alone: a bare GPU machine makes some of them, too."""

from __future__ import annotations

import re
from collections.abc import Sequence

TEXT_COLUMNS = (
    *("bits", "method", "model", "task", "metric", "protocol"),
    *("setting", "value", "cell", "what", "stage", "reason", "last output", "text", "quantity", "test"),
    *("operation", "implementation", "execution", "matrices", "against"),
    *("run", "recipe", "package", "licence"),
    *("shape", "phase", "online", "bound by", "target", "met", "device"),
)
"""Columns of words, which start at the left; all others end at the right."""
_ROOM = 2  # more than a heading takes
_WIDEST = 120  # one long value does not pad all others


def plain(text: object) -> str:
    """One line that cannot break a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A pipe table whose columns are padded to one width, up to `_WIDEST`."""
    cells = [[plain(value) for value in line] for line in lines]
    widths = [
        min(max(len(name) + _ROOM, *(len(line[place]) for line in cells), 0), _WIDEST)
        for place, name in enumerate(head)
    ]

    def row(line: Sequence[str]) -> str:
        padded = (
            value.ljust(width) if name in TEXT_COLUMNS else value.rjust(width)
            for value, width, name in zip(line, widths, head, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rules = (
        ":" + "-" * (width + 1) if name in TEXT_COLUMNS else "-" * (width + 1) + ":"
        for name, width in zip(head, widths, strict=True)
    )
    return "\n".join([row(head), "|" + "|".join(rules) + "|", *map(row, cells)])


def compact(text: str) -> str:
    """A Markdown text for a file: tables without the padding that a terminal wants, which is a third of a
    report's bytes and nothing to a page."""
    lines = (re.sub(" +", " ", line) if line.startswith("| ") else line for line in text.split("\n"))
    return "\n".join(re.sub("-+", "--", line) if re.fullmatch(r"\|[|:-]+", line) else line for line in lines)
