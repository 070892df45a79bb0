"""Tables of reports, read back."""

from __future__ import annotations


def section_of(report: str, title: str) -> list[list[str]]:
    """The cells of every line of a section's table."""
    text = report.partition(f"### {title}\n")[2].partition("\n### ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| w")
    ]


def lines_of(text: str) -> list[list[str]]:
    """The cells of every line of the tables in a text, headings and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = {place for place, line in enumerate(lines) if set(line) <= set("|:- ")}
    kept = [line for place, line in enumerate(lines) if not {place, place + 1} & rules]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in kept]


def chapter(report: str, title: str) -> str:
    return report.partition(f"## {title}\n")[2].partition("\n## ")[0]
