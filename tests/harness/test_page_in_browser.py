"""The HTML report in a browser: tables sort and filter by mouse and by keyboard, both colour schemes are
legible, nothing is fetched. Needs Playwright and a Chromium (Debian's package, or QUANTGRID_BROWSER)."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import report
from tests.harness.runs import MODEL, full_run, table

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
BROWSER = os.environ.get("QUANTGRID_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = full_run(tmp_path_factory.mktemp("browsed") / "demo")
    report.write_report(folder)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as program:
        opened = program.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(run: Path, browser: Any) -> Iterator[Any]:
    context = browser.new_context()
    tab = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((run / "report.html").as_uri())
    yield tab
    assert said == [], "the browser has nothing to complain about"
    assert asked == [(run / "report.html").as_uri()], "nothing is fetched"
    context.close()


def column(sheet: Any, name: str) -> list[str]:
    """What the lines that are shown have in a column, from above."""
    heads = [re.sub(r"\s+", " ", text).strip() for text in sheet.locator("th").all_inner_texts()]
    cells = sheet.locator(f"tbody tr:not([hidden]) td:nth-child({heads.index(name) + 1})")
    return [text.strip() for text in cells.all_inner_texts()]


def first_number(text: str) -> float:
    return float(text.split()[0])


def test_a_heading_sorts_up_down_and_back(opened: Any, run: Path) -> None:
    lines = table((run / "report.md").read_text(encoding="utf-8"), MODEL)
    name = "perplexity wikipedia [95 %]"
    written = [line[name] for line in lines]
    numbers = sorted(written, key=first_number)
    assert written != numbers
    sheet = opened.locator(".sheet").first
    assert column(sheet, name) == written
    heading = sheet.get_by_role("button", name=name)
    head = heading.locator("..")
    for state, expected in (("ascending", numbers), ("descending", numbers[::-1]), (None, written)):
        heading.click()
        assert column(sheet, name) == expected
        assert head.get_attribute("aria-sort") == state
    # A line stays whole, and of equal words the order stays.
    sheet.get_by_role("button", name="method", exact=True).click()
    methods = column(sheet, "method")
    assert methods == sorted(methods)
    assert column(sheet, name) == [line[name] for line in sorted(lines, key=lambda line: line["method"])]


def test_what_is_no_number_comes_last_either_way(opened: Any) -> None:
    sheet = opened.locator(".sheet").first
    heading = sheet.get_by_role("button", name="against QuaRot (%)")
    for sign in (1, -1):
        heading.click()
        shown = column(sheet, "against QuaRot (%)")
        numbers = [text for text in shown if re.match(r"[+-]", text)]
        assert shown[: len(numbers)] == sorted(numbers, key=lambda text: sign * first_number(text))
        assert set(shown[len(numbers) :]) == {"reference", "–"}


def test_by_keyboard_alone(opened: Any) -> None:
    """Tab reaches the filter, then the table, then its headings in order; Enter and Space sort."""
    sheet = opened.locator(".sheet").first
    box = sheet.get_by_label("Filter lines")
    box.focus()
    opened.keyboard.type("w4a4kv4")
    assert set(column(sheet, "bits")) == {"w4a4kv4"}
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.getAttribute('role')") == "region"
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.textContent") == "bits"
    outline = opened.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "what has the focus shows it"
    opened.keyboard.press("Tab")
    opened.keyboard.press("Enter")
    assert column(sheet, "method") == sorted(column(sheet, "method"))
    opened.keyboard.press("Space")
    assert column(sheet, "method") == sorted(column(sheet, "method"), reverse=True)
    assert set(column(sheet, "bits")) == {"w4a4kv4"}, "sorting keeps the filter"


def test_a_filter_takes_lines_with_every_word(opened: Any, run: Path) -> None:
    lines = table((run / "report.md").read_text(encoding="utf-8"), MODEL)
    sheet = opened.locator(".sheet").first
    box, told = sheet.get_by_label("Filter lines"), sheet.locator("output")
    box.fill("QUAROT gptq  w4a8")
    assert column(sheet, "method") == ["quarot (gptq)"]
    assert told.inner_text() == f"1 of {len(lines)} lines"
    box.fill("no such line")
    assert column(sheet, "method") == []
    assert told.inner_text() == f"0 of {len(lines)} lines"
    box.fill("")
    assert len(column(sheet, "method")) == len(lines)
    assert told.inner_text() == ""
    other = opened.locator(".sheet").nth(1)
    before = len(column(other, "bits"))
    box.fill("rtn")
    assert len(column(other, "bits")) == before, "a filter is its own table's"


CONTRAST = """(() => {
  const parts = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const luminance = (text) => {
    const linear = (p) => p <= 0.04045 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = parts(text).map((p) => linear(p / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const kinds = "p, td, th button, figcaption, h1, h2, h3, li, a, code, svg";
  return [...document.querySelectorAll(kinds)].map((element) => {
    const style = getComputedStyle(element);
    const words = luminance(element.tagName === "svg" ? style.fill : style.color);
    const behind = luminance(ground(element));
    return (Math.max(words, behind) + 0.05) / (Math.min(words, behind) + 0.05);
  });
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_are_legible(run: Path, browser: Any, scheme: str) -> None:
    """Every word has the contrast of 4.5 : 1 that WCAG asks for, words of figures included."""
    context = browser.new_context(color_scheme=scheme)
    tab = context.new_page()
    tab.goto((run / "report.html").as_uri())
    contrasts = tab.evaluate(CONTRAST)
    assert len(contrasts) > 300
    assert min(contrasts) >= 4.5
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    parts = [int(part) for part in re.findall(r"\d+", ground)[:3]]
    assert (max(parts) < 64) == (scheme == "dark")
    backgrounds = tab.evaluate(
        "[...document.querySelectorAll('svg > :first-child')].map((e) => getComputedStyle(e).fill)"
    )
    assert len(backgrounds) == tab.locator("svg").count()
    assert set(backgrounds) == {ground}, "figures stand on the page's own colour"
    context.close()


def test_a_narrow_screen_scrolls_tables_and_not_the_page(run: Path, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 400, "height": 800})
    tab = context.new_page()
    tab.goto((run / "report.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    assert tab.evaluate("document.querySelector('.scroll').scrollWidth") > 400
    context.close()


def test_without_scripts_everything_is_there(run: Path, browser: Any) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto((run / "report.html").as_uri())
    lines = table((run / "report.md").read_text(encoding="utf-8"), MODEL)
    assert len(column(tab.locator(".sheet").first, "bits")) == len(lines)
    assert not tab.get_by_label("Filter lines").first.is_visible(), "it could do nothing"
    context.close()
