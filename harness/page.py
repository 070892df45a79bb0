"""A report as one HTML file: the Markdown that report.py makes, its figures inside, nothing from a network.

It knows the Markdown of reports and no more: headings, paragraphs, lists, tables, figures with a caption
below, fenced code; in a line code, emphasis and links. Tables sort and filter (page.js); figures take the
colours of the page, light or dark (page.css).
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

STYLE, SCRIPT = "page.css", "page.js"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What the browser may load: what is in the file."""
FILTERED = 6
"""Lines from which on a table has a filter."""
LONG = 60
"""Characters of a cell from which on it breaks into lines."""
PAGE_COLOURS = {
    "#000": "currentColor",
    "#fff": "var(--page)",
    "#555": "var(--faint)",
    "#777": "var(--faint)",
    "#ddd": "var(--line)",
    "#ccc": "var(--line)",
}
"""Colours of figures, as kernels/svg.py writes them, that follow the page's; those of methods do not."""
_NUMBER = re.compile(r"[<~]?\s*([+\-−]?[\d,]*\.?\d+(?:e[+-]?\d+)?)(?![\w.]*[A-Za-z])")
_INLINE = re.compile(r"`([^`]+)`|\*\*(\S(?:.*?\S)?)\*\*|\*(\S(?:.*?\S)?)\*|\[([^\]]+)\]\(([^)\s]+)\)")


def page(title: str, blocks: Sequence[str], folder: Path) -> str:
    """The HTML of a report. blocks: its Markdown, as report.md joins them by blank lines; folder: what the
    paths of its figures start from. OSError where one cannot be read."""
    body = _Body(folder)
    for block in _units("\n\n".join(blocks)):
        body.add(block)
    entries = "".join(
        f'<li class="level{level}"><a href="#{name}">{_inline(text)}</a></li>'
        for level, name, text in body.headings
        if level in (2, 3)
    )
    here = Path(__file__)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{here.with_name(STYLE).read_text()}</style>\n</head>\n"
        '<body>\n<a class="skip" href="#report">Skip to the report</a>\n'
        '<nav aria-label="Contents"><details open><summary>Contents</summary>'
        f"<ul>{entries}</ul></details></nav>\n"
        f'<main id="report" tabindex="-1">\n{"".join(body.parts)}</main>\n'
        f"<script>\n{here.with_name(SCRIPT).read_text()}</script>\n</body>\n</html>\n"
    )


class _Body:
    """The page as it grows: which figure is the how-manieth, and which names are taken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[str] = []
        self.headings: list[tuple[int, str, str]] = []
        self._figures = self._tables = 0

    def add(self, block: str) -> None:
        heading = re.fullmatch(r"(#{1,6}) (.+)", block)
        figure = re.fullmatch(r"!\[([^\]]*)\]\(([^)]+)\)", block)
        if heading:
            self._heading(len(heading[1]), heading[2])
        elif figure:
            self._figure(figure[1], figure[2])
        elif block.startswith("```"):
            code = block.partition("\n")[2].removesuffix("```").rstrip("\n")
            self.parts.append(f'<pre tabindex="0"><code>{html.escape(code)}</code></pre>\n')
        elif re.match(r"\|.*\n\|[:|-]+\|(\n|$)", block):
            self._table(block.splitlines())
        elif block.startswith("- "):
            items = "".join(f"<li>{_inline(line.removeprefix('- '))}</li>" for line in block.splitlines())
            self.parts.append(f"<ul>{items}</ul>\n")
        elif self.parts and self.parts[-1].endswith("<!--caption--></figure>\n") and _emphasised(block):
            self.parts[-1] = self.parts[-1].replace(
                "<!--caption-->", f"<figcaption>{_inline(block[1:-1])}</figcaption>"
            )
        else:
            self.parts.append(f"<p>{_inline(block)}</p>\n")

    def _heading(self, level: int, text: str) -> None:
        taken = {name for _, name, _ in self.headings}
        base = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"
        name = next(
            each
            for number in range(1, len(taken) + 2)
            if (each := base if number == 1 else f"{base}-{number}") not in taken
        )
        self.headings.append((level, name, text))
        self.parts.append(f'<h{level} id="{name}">{_inline(text)}</h{level}>\n')

    def _figure(self, alt: str, path: str) -> None:
        self._figures += 1
        drawn = inline_svg((self.folder / path).read_text(encoding="utf-8"), f"f{self._figures}-", alt)
        self.parts.append(f"<figure>{drawn}<!--caption--></figure>\n")

    def _table(self, lines: Sequence[str]) -> None:
        self._tables += 1
        head, rule, *body = [_cells(line) for line in lines]
        right = [cell.endswith(":") for cell in rule]
        name = self.headings[-1][2] if self.headings else "table"
        label = html.escape(name.strip(), quote=True)
        columns = "".join(
            f'<th scope="col"{" class=right" if end else ""}>'
            f'<button type="button">{_inline(text)}</button></th>'
            for text, end in zip(head, right, strict=True)
        )
        rows = "".join(
            "<tr>" + "".join(_cell(text, end) for text, end in zip(line, right, strict=True)) + "</tr>\n"
            for line in body
        )
        sought = f"filter{self._tables}"
        form = (
            f'<p class="filter" hidden><label for="{sought}">Filter lines</label> <input id="{sought}" '
            f'type="search" autocomplete="off"> <output for="{sought}"></output></p>'
            if len(body) >= FILTERED
            else ""
        )
        self.parts.append(
            f'<div class="sheet">{form}<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
            f"<table><thead><tr>{columns}</tr></thead>\n<tbody>\n{rows}</tbody></table></div></div>\n"
        )


def inline_svg(text: str, prefix: str, alt: str) -> str:
    """A figure's file as an element of a page: named for who cannot see it, its ids apart from other
    figures', black, white and grey those of the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s*<defs>\s*<style type="text/css">.*?</style>\s*</defs>', "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}", text)
    text = re.sub(r"(?<=:)#[0-9a-f]{3,6}\b", lambda found: PAGE_COLOURS.get(found[0], found[0]), text)
    size = re.search(r'width="([\d.]+)pt" height="[\d.]+pt"', text)
    if size is None:
        raise ValueError(f"a figure without a size: {alt}")
    shown = f'role="img" aria-label="{html.escape(alt, quote=True)}" style="max-width: {float(size[1]):g}pt"'
    return text.replace(size[0], shown, 1).rstrip()


def sort_key(text: str) -> float | None:
    """The number that a cell begins with: "6.43e3 [4.97e3, 8.30e3]" is 6430; None of words and of a dash."""
    found = _NUMBER.match(text.strip())
    return float(found[1].replace(",", "").replace("−", "-")) if found else None


def _cell(text: str, right: bool) -> str:
    key = sort_key(text)
    marked = "" if key is None else f' data-key="{key!r}"'
    kind = "long" if len(text) > LONG else "right" if right else ""
    return f"<td{f' class={kind}' if kind else ''}{marked}>{_inline(text)}</td>"


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|").removesuffix("|")
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inner)]


def _units(text: str) -> list[str]:
    """Blocks between blank lines; fenced code is one, blank lines inside it included."""
    found: list[str] = []
    fenced = False
    for block in text.split("\n\n"):
        if fenced:
            found[-1] += f"\n\n{block}"
        elif block.strip():
            found.append(block.strip("\n"))
        fenced ^= len(re.findall(r"(?m)^```", block)) % 2 == 1
    return found


def _emphasised(block: str) -> bool:
    return len(block) > 2 and block[0] == block[-1] == "*" and block[1] not in " *"


def _inline(text: str) -> str:
    """Code, strong, emphasis and links; everything else as it is written."""
    parts, place = [], 0
    for found in _INLINE.finditer(text):
        parts.append(html.escape(text[place : found.start()], quote=False))
        code, strong, emphasis, words, address = found.groups()
        if code is not None:
            parts.append(f"<code>{html.escape(code, quote=False)}</code>")
        elif strong is not None:
            parts.append(f"<strong>{_inline(strong)}</strong>")
        elif emphasis is not None:
            parts.append(f"<em>{_inline(emphasis)}</em>")
        elif re.fullmatch(r"https?://.+|[#\w./-]+", address):
            parts.append(f'<a href="{html.escape(address, quote=True)}">{_inline(words)}</a>')
        else:  # the text of a record, not of a report
            parts.append(html.escape(found.group(), quote=False))
        place = found.end()
    return "".join([*parts, html.escape(text[place:], quote=False)]).replace("\\|", "|")
