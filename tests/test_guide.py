"""What the README and the pages of docs/ tell a reader to type, install and open is there, and works."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import compare
from tests import families

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDE = ROOT / "docs" / "guide.md"
WITHOUT_OPTIONS = ("methods", "methods.assets", "kernels", "tests.harness.ten_kills")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page that are written in one of these languages."""
    found = re.findall(r"^```([a-z]*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [text for language, text in found if language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """Every command line of a page's blocks, continued lines joined and comments dropped, as words."""
    for block in blocks(page, "", "sh", "bash"):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # a quotation of output
                continue
            if words and (words[0] == "make" or words[0].endswith("python")):
                yield words


ALL = [(page, words) for page in PAGES for words in commands(page)]
NAMED = [f"{page.stem}: {' '.join(words)}"[:90] for page, words in ALL]


class ParsedError(Exception):
    """Arguments were read, and nothing is to follow."""


@pytest.fixture
def parses_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands stop where their arguments are read."""
    real = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        raise ParsedError(real(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)


def test_there_are_commands_to_check() -> None:
    assert len(COMPARISONS) >= 2
    assert len(ALL) > 40
    assert sum(page == GUIDE for page, _ in ALL) > 12
    assert {words[2] for _, words in ALL if words[1:2] == ["-m"]} >= {
        *("harness.grid", "harness.compare", "harness.report", "harness.gate", "harness.choose")
    }


@pytest.mark.parametrize(("page", "words"), ALL, ids=NAMED)
@pytest.mark.usefixtures("parses_alone")
def test_every_command_is_one(page: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert words[1] in targets
        return
    if words[1] != "-m":
        assert (ROOT / words[1]).is_file()
        return
    name, given = words[2], words[3:]
    if name == "pip":
        assert given[:1] == ["install"]
        return
    if name in WITHOUT_OPTIONS:
        assert not given and importlib.util.find_spec(name)
        return
    monkeypatch.setattr(sys, "argv", [name, *given])
    with pytest.raises(ParsedError) as caught:
        importlib.import_module(name).main()
    assert isinstance(caught.value.args[0], argparse.Namespace)


def test_an_option_that_is_not_there_is_seen(parses_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail."""
    monkeypatch.setattr(sys, "argv", ["harness.grid", "--metods", "rtn"])
    with pytest.raises(SystemExit):
        importlib.import_module("harness.grid").main()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_sections_of_a_report_that_the_guide_names_are_there(root: Path) -> None:
    part = GUIDE.read_text().split("## Reading a report", 1)[1].split("\n## ", 1)[0]
    named = set(re.findall(r"\*\*([^*]+)\*\*", re.sub(r"`[^`]*`", "", part)))
    report = (root / "reports" / "quick" / "report.md").read_text()
    headings = set(re.findall(r"^#+ (.+)$", report, re.M))
    assert len(named) > 8
    assert named <= headings


COMPARISONS = [
    words
    for _, words in ALL
    if words[1:3] == ["-m", "harness.compare"] and all("reference" in word for word in words[3:5])
]


@pytest.mark.parametrize("words", COMPARISONS, ids=lambda words: " ".join(words[3:]))
def test_every_comparison_of_kept_runs_can_be_made(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both sides scored the same documents."""
    monkeypatch.chdir(ROOT)
    assert compare.main(words[3:]) == 0
    assert "perplexity_wikipedia" in capsys.readouterr().out


# The worked example

RUN = """
import sys
import torch
from methods.bits import Bits
from methods.checkpoint import open_checkpoint
from methods.method import Artifact, Context
from methods.pipeline import quantise
from methods.registry import parse_method

checkpoint = open_checkpoint(sys.argv[1])
ids = torch.arange(11)[None]
plain = checkpoint.load(torch.float64)(ids)
for spec in sys.argv[2:]:
    (method,) = parse_method(spec).parts
    moved = method.transform(checkpoint.load(torch.float64), Artifact())(ids) - plain
    moved = moved.abs().max() / plain.abs().max()
    assert moved < 1e-9, f"{spec} changes the function: {moved}"
    found = quantise(checkpoint, parse_method(spec), Bits.parse("w4a4kv4"), Context())
    assert found.decoder(ids).isfinite().all()
    bits = {}
    for name, linear in found.decoder.linears():
        bits.setdefault(name.split(".")[1], set()).add(linear.quantised.spec.bits)
    print(spec, {layer: sorted(some) for layer, some in sorted(bits.items())})
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guide's package as pip leaves it behind: its module, and its metadata with its entry points."""
    (source,) = blocks(GUIDE, "python")
    (project,) = (tomllib.loads(text) for text in blocks(GUIDE, "toml"))
    site = tmp_path_factory.mktemp("site")
    (module,) = project["tool"]["hatch"]["build"]["targets"]["wheel"]["include"]
    (site / module).write_text(source)
    about = project["project"]
    info = site / f"{about['name']}-{about['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n"
    )
    points = about["entry-points"]["quantgrid.methods"]
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (info / "entry_points.txt").write_text(f"[quantgrid.methods]\n{lines}")
    return site


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_worked_example_runs(plugin: Path, tmp_path: Path) -> None:
    """It leaves the function as it is, and gives the blocks at the ends their bits, alone and composed."""
    model = families.model("llama3-scaled-rope", torch.float32)
    assert model.config.num_hidden_layers == 3
    model.save_pretrained(tmp_path / "model")
    done = python(plugin, "-c", RUN, str(tmp_path / "model"), "edges", "edges:bits=6;rotation_seed=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "edges {'0': [8], '1': [4], '2': [8]}",
        "edges:bits=6;rotation_seed=1 {'0': [6], '1': [4], '2': [6]}",
    ]


def test_the_worked_example_is_listed_and_checked(plugin: Path) -> None:
    done = python(plugin, "-m", "methods")
    assert done.returncode == 0, done.stderr
    entry = next(entry for entry in done.stdout.split("\n\n") if entry.startswith("edges\n"))
    assert "count=1, bits=8, rotation_seed=0" in entry
    composed = ["edges:rounding=gptq", "edges+sensiboost", "edges:count=2;bits=6"]
    taken = python(plugin, "-m", "harness.grid", "--methods", *composed, "--bits", "w4a4kv4", "--list")
    assert taken.returncode == 0 and "3 cells" in taken.stdout, taken.stderr
    for spec, word in (("edges:count=0", "positive"), ("edges:bits=16", "2 to 8"), ("edges+quarot", "seam")):
        refused = python(plugin, "-m", "harness.grid", "--methods", spec, "--list")
        assert refused.returncode == 2 and word in refused.stderr, spec
        assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_grid_of_a_page_is_one(page: Path, plugin: Path) -> None:
    """Methods, options, bits, tasks and models are known, the guide's own method with its options too."""
    given = [
        [word for word in words[3:] if word != "--list"]
        for words in commands(page)
        if words[1:3] == ["-m", "harness.grid"]
        and "path/to/a/model" not in words
        and "mygrid.yaml" not in words
    ]
    if not given:
        pytest.skip("no grid on this page")
    script = (
        "import sys\nfrom harness.grid import parser, run\n"
        f"for words in {given!r}:\n"
        "    assert run(parser().parse_args([*words, '--list']), '') == 0, words\n"
    )
    done = python(plugin, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cells; tasks:") == len(given)
