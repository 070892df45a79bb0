"""harness/page.py: the HTML of a report holds what its Markdown holds, loads nothing, names what it has. The
Markdown is read by another program's parser, the page by the standard library's. How the page behaves is
tested in a browser (test_page_in_browser.py)."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from harness import page, report
from tests.harness.runs import full_run, write_cell

VOID = {"meta", "input", "link", "br", "hr", "img"}


class Tree(HTMLParser):
    """The elements of a page with their attributes, and the words of each kind that the test asks about."""

    KINDS = ("h1", "h2", "h3", "h4", "th", "td", "p", "li", "figcaption", "code")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {kind: [] for kind in self.KINDS}
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"{tag}: an attribute twice"
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            if tag in self.words:
                self.words[tag].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "elements close in the order in which they opened"

    def handle_data(self, data: str) -> None:
        for kind in set(self.open) & self.words.keys():
            self.words[kind][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = full_run(tmp_path_factory.mktemp("pages") / "demo")
    failure = {"stage": "round", "kind": "error", "message": "2 < 3 & a | pipe, `code` & <b>"}
    write_cell(folder, "hqq", "w4a4kv4", status="failed", failure=failure, tasks={})
    report.write_report(folder)
    return folder


@pytest.fixture(scope="module")
def tree(run: Path) -> Tree:
    return Tree((run / "report.html").read_text(encoding="utf-8"))


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_the_words_are_those_of_the_markdown(run: Path, tree: Tree) -> None:
    """Every heading, cell, paragraph, item and caption, in order, as markdown-it-py reads report.md."""
    tokens = MarkdownIt("commonmark").enable("table").parse((run / "report.md").read_text(encoding="utf-8"))
    expected: dict[str, list[str]] = {kind: [] for kind in Tree.KINDS}
    items = 0
    for place, token in enumerate(tokens):
        items += token.type == "list_item_open"
        items -= token.type == "list_item_close"
        if token.type == "inline":
            assert token.children is not None
            words = "".join(child.content for child in token.children if child.type != "image")
            words = " ".join(child.content for child in token.children if child.type == "softbreak") + words
            kind = "li" if items else tokens[place - 1].tag
            if any(child.type == "image" for child in token.children):
                continue
            whole = token.content
            if kind == "p" and whole.startswith("*") and whole.endswith("*"):
                kind = "figcaption"
            expected[kind].append(squeezed(words))
    links = len(expected["h2"]) + len(expected["h3"])
    assert [squeezed(word) for word in tree.words["li"][links:]] == expected["li"]
    for kind in ("h1", "h2", "h3", "h4", "th", "td", "figcaption"):
        assert [squeezed(word) for word in tree.words[kind]] == expected[kind], kind
    paragraphs = [squeezed(word) for word in tree.words["p"] if not word.startswith("Filter lines")]
    assert paragraphs == expected["p"]
    assert len(expected["td"]) > 300 and len(expected["figcaption"]) >= 4


def test_nothing_is_loaded(tree: Tree, run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    addresses = [
        value
        for _, attributes in tree.found
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "data", "action", "srcset") and value is not None
    ]
    assert len(addresses) > 100
    assert all(address.startswith("#") for address in addresses)
    assert all(place.startswith("#") for place in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text and "fetch(" not in text
    policy = next(each for each in tree.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert (policy["content"] or "").startswith("default-src 'none'")


def test_names_are_unique_and_references_end_somewhere(tree: Tree) -> None:
    names = [attributes["id"] for _, attributes in tree.found if "id" in attributes]
    assert len(set(names)) == len(names)
    for _, attributes in tree.found:
        for name in ("href", "xlink:href", "for"):
            if name in attributes:
                assert (attributes[name] or "").removeprefix("#") in names


def test_figures_are_named_and_take_the_pages_colours(run: Path, tree: Tree) -> None:
    drawn = tree.all("svg")
    assert len(drawn) == len(list((run / "figures").iterdir())) >= 4
    for attributes in drawn:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 20
    text = (run / "report.html").read_text(encoding="utf-8")
    for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(found)
        assert not re.search(r": ?#(000|fff|555|ddd)\1?\b", found), "legible on a dark page"
        assert "var(--page)" in found
        assert "<style" not in found, "it would be the whole page's"


def test_tables_can_be_reached_and_used_without_a_mouse(tree: Tree) -> None:
    regions = [each for each in tree.all("div") if each.get("role") == "region"]
    assert len(regions) == len(tree.all("table")) > 8
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in regions)
    assert len(tree.all("button")) == len(tree.all("th"))
    assert all(each["scope"] == "col" for each in tree.all("th"))
    labels = {each["for"] for each in tree.all("label")}
    assert {each["id"] for each in tree.all("input")} == labels and labels
    assert tree.all("html")[0]["lang"] == "en"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("18.56 [14.68, 23.47]", 18.56),
        ("6.43e3 [4.97e3, 8.30e3]", 6430.0),
        ("+0.338 [+0.294, +0.383] **", 0.338),
        ("-3.1 [-9.6, +3.4]", -3.1),
        ("−15.5", -15.5),
        ("< 0.0001", 0.0001),
        ("23,049", 23049.0),
        ("16 / 16 / 16 / 16", 16.0),
        ("65.0 ± 10.9", 65.0),
        ("5 of 373 windows", 5.0),
        ("–", None),
        ("reference", None),
        ("w4a16", None),
        ("4bit", None),
        ("failed", None),
        ("", None),
    ],
)
def test_cells_sort_by_the_number_that_they_begin_with(text: str, key: float | None) -> None:
    assert page.sort_key(text) == key


def test_markdown_of_reports_becomes_what_it_means(tmp_path: Path) -> None:
    blocks = [
        "# A & B",
        "`a*b*` **bold** *so* [x](#y) 2 * 3",
        "```yaml\na: <1>\n\n# no heading\n```",
        "# A & B",
    ]
    text = page.page("t <>", blocks, tmp_path)
    assert '<h1 id="a-b">A &amp; B</h1>' in text and '<h1 id="a-b-2">' in text
    assert '<p><code>a*b*</code> <strong>bold</strong> <em>so</em> <a href="#y">x</a> 2 * 3</p>' in text
    assert '<pre tabindex="0"><code>a: &lt;1&gt;\n\n# no heading</code></pre>' in text
    assert "<title>t &lt;&gt;</title>" in text


def test_text_of_records_is_only_text(tmp_path: Path) -> None:
    """A model's name or a failure's last line with what would be Markdown."""
    blocks = [
        "| last output |\n|:--|\n| ends in ``` |",
        "after",
        "| no table: a name",
        "[x](javascript:alert(1)) and [y](data:text/html,z)",
    ]
    text = page.page("t", blocks, tmp_path)
    assert "<p>after</p>" in text and "<p>| no table: a name</p>" in text
    assert '<a href="javascript' not in text and '<a href="data' not in text
    assert "[x](javascript:alert(1)" in text
