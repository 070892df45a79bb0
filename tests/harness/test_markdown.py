"""harness/markdown.py: tables for a terminal, and the same tables in a file."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from harness.markdown import compact, table

WORDS = st.text(st.characters(categories=("L", "N", "P", "Z"), exclude_characters="`<&\\"), max_size=12)
CELLS = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(WORDS, min_size=width, max_size=width), min_size=2, max_size=5)
)


def read(text: str) -> list[str]:
    parsed = MarkdownIt("commonmark").enable("table").parse(text)
    return [token.content for token in parsed if token.type == "inline"]


@given(CELLS)
def test_a_file_has_the_same_cells_without_padding(cells: list[list[str]]) -> None:
    head = [name or "name" for name in (" ".join(cell.split()) for cell in cells[0])]
    padded = table(head, cells[1:])
    short = compact(f"words  as they were\n\n{padded}\n")
    assert len(read(padded)) == len(head) * len(cells)
    assert read(short)[1:] == [" ".join(each.split()) for each in read(padded)]
    assert short.startswith("words  as they were\n")
    assert "  " not in short.partition("\n\n")[2]


def test_a_terminal_gets_columns_of_one_width() -> None:
    lines = table(["method", "loss"], [["rtn", "1.25"], ["gptq", "10.5"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert compact("\n".join(lines)).splitlines() == [
        "| method | loss |",
        "|:--|--:|",
        "| rtn | 1.25 |",
        "| gptq | 10.5 |",
    ]
