"""What docs/methods.md says of pre-training recipes is what is on record."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.archive import opened
from harness.pretraining import read_study, write_report
from harness.records import models_of, read_run
from harness.twins import twins_section
from kernels import recorded
from methods.checkpoint import SHIPPED_MODELS
from tests.report_tables import chapter, lines_of, section_of


def test_what_the_docs_say_of_the_models_that_ship(root: Path) -> None:
    flat = " ".join((root / "docs" / "methods.md").read_text().split())
    about = {
        name: json.loads((SHIPPED_MODELS / f"twin-{name}" / "quantgrid.json").read_text())
        for name in ("adam", "osp")
    }
    losses = [f"{facts['held_out_loss']:.3f}" for facts in about.values()]
    assert f"ended at {' and '.join(losses)} nats a token" in flat
    first, last = (about["adam"]["probes"][place]["excess"][1] for place in (0, -1))
    assert f"grew from {first:.2f} to {last:.2f} through training" in flat
    assert f"that of OSP's ended at {about['osp']['probes'][-1]['excess'][1]:.2f}" in flat
    for facts in about.values():
        settings = facts["run"]["settings"]
        assert settings["steps"] * settings["batch"] * settings["length"] == pytest.approx(200e6, rel=1e-3)
        assert facts["run"]["train_tokens"] == pytest.approx(28e6, rel=0.02)
        assert facts["run"]["parameters"]["all"] == pytest.approx(1.2e6, rel=0.03)


def test_what_recipes_of_pretraining_bring_is_what_the_docs_say(root: Path) -> None:
    docs = (root / "docs" / "methods.md").read_text()
    flat = " ".join(docs.split())
    report = (root / "reports" / "osp" / "report.md").read_text()
    runs = recorded.read(root / "results" / "reference" / "osp.json.xz")["runs"]

    def ends(what: Callable[[Any], float], digits: int, *names: str) -> tuple[str, ...]:
        return tuple(f"{what(runs[name]['probes'][-1]):.{digits}f}" for name in names)

    def alone(probe: Any) -> float:
        return statistics.fmean(probe["alone"])

    def tails(probe: Any) -> float:
        return statistics.fmean(site["kurtosis"] - 3 for site in probe["sites"]["down_proj"])

    names = ("adam-0", "adam-1", "muon-0", "osp-0", "osp-1")
    losses = ends(lambda probe: float(probe["held_out"]), 3, *names)
    said = "ended at {} and {} (two seeds) by Adam, {} by Muon alone, {} and {} by OSP"
    assert said.format(*losses) in flat
    gaps = [
        adam["held_out"] - osp["held_out"]
        for adam, osp in zip(runs["adam-0"]["probes"], runs["osp-0"]["probes"], strict=True)
        if adam["tokens"] > 13.9e6
    ]
    assert f"it was {gaps[0]:.3f} behind OSP after 14 M tokens and {gaps[-1]:.3f} at the end" in flat
    published = {row[0]: row[-1] for row in lines_of(chapter(report, "Outliers").partition("\n### ")[0])}
    ladder = ("muon-0", "muon+embproj-0", "muon+ssnorm-0", "osp-0", "osp-1")
    said = (
        "ended at {} by Muon, {} with projections alone, {} with single-scale norms alone, {} and {} by OSP: "
        "the order of the paper, which has {}, {}, {} and {} at"
    )
    recipes = ("muon", "muon+embproj", "muon+ssnorm", "osp")
    assert said.format(*ends(alone, 2, *ladder), *map(published.get, recipes)) in flat
    heights = [alone(runs[name]["probes"][-1]) for name in ladder]
    assert heights == sorted(heights, reverse=True)
    said = "the highest there ({}), is only {} and {} here"
    assert said.format(published["adam"], *ends(alone, 2, "adam-0", "adam-1")) in flat
    grew = {}
    for name, run in runs.items():
        probes = next(probe for probe in run["probes"] if probe["tokens"] > 28e6), run["probes"][-1]
        grew[name] = " to ".join(f"{statistics.fmean(probe['excess']):.2f}" for probe in probes)
    assert (
        f"from 28 M tokens to the end, from {grew['muon-0']} by Muon, {grew['muon+embproj-0']} with "
        f"projections alone, {grew['adam-0']} by Adam and {grew['muon+ssnorm-0']} with single-scale norms "
        f"alone; by OSP it stayed where it was ({grew['osp-0']})"
    ) in flat
    said = "(an excess kurtosis of {} and {} by Adam, {} and {} by OSP)"
    assert said.format(*ends(tails, 0, "adam-0", "adam-1", "osp-0", "osp-1")) in flat
    found: dict[tuple[str, str], list[str]] = {}
    for text in ("On held-out text:", "On Wikipedia:"):
        part = report.partition(text)[2].partition("\nOn ")[0].partition("\n### ")[0]
        for recipe, _, method, bits, value, low, high, *_ in lines_of(part):
            if recipe == "osp":
                found.setdefault((method, bits), []).append(f"{value} [{low}, {high}]")
    methods = [method for method, bits in found if bits == "4-4-4"]
    assert len(methods) == 7
    for method in methods:
        assert f"| {method} | {' | '.join(found[method, '4-4-4'])} |" in docs
    shared = {method for method in methods if all("[+" in value for value in found[method, "4-4-4"])}
    assert shared == {"rtn", "gptq"}, "with these OSP loses more on both texts by both seeds"
    weights = [value.split()[0] for value in found["rtn", "w4a16"][:2]]
    assert "(without anything else quantised {} and {} on held-out text)".format(*weights) in flat
    part = report.partition("On held-out text:")[2].partition("\nOn ")[0]
    lost = {row[0]: float(row[7]) for row in lines_of(part) if row[1:4] == ["0", "rtn", "4-4-4"]}
    assert f"Muon loses {lost['muon']:.3f} nats of held-out text and OSP {lost['osp']:.3f}" in flat
    widths = report.partition("### Perplexity, held-out text")[2].partition("\n### ")[0]
    rounded = {(row[0], row[1]): row[-1].split(" / ")[0] for row in lines_of(widths)}
    said = "({} and {} against {} and {}, rounded to nearest)"
    assert said.format(*(rounded[recipe, seed] for recipe in ("osp", "adam") for seed in "01")) in flat
    steps = {row[0]: row for row in lines_of(chapter(report, "What a step costs"))}
    updates = [f"{float(steps[name][3]):.0f} ms by {name.replace('osp', 'OSP')}" for name in ("muon", "osp")]
    assert f"{updates[0].replace('muon', 'Muon')} and {updates[1]}, with every process" in flat
    few, _, many = (share.replace("%", " %") for share in steps["muon"][6:])
    assert f"makes {few} of Adam's speed by Muon, computed for 4 M tokens {many}" in flat


def test_the_report_on_recipes_is_what_the_record_gives(root: Path, tmp_path: Path) -> None:
    write_report(read_study(root / "results" / "reference" / "osp.json.xz"), tmp_path)
    kept = root / "reports" / "osp"
    names = {path.relative_to(kept) for path in kept.rglob("*.*")}
    assert names == {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")} and len(names) == 6
    for name in names:
        assert (tmp_path / name).read_bytes() == (kept / name).read_bytes(), name


def test_what_the_twins_lose_is_what_the_docs_say(root: Path) -> None:
    docs = (root / "docs" / "methods.md").read_text()
    with opened(root / "results" / "reference" / "osp.tar.xz") as run:
        text = "\n".join(twins_section(models_of(read_run(run).cells)))
    wikipedia, news = (
        {row[2]: row for row in section_of(text, f"twin-osp and twin-adam: perplexity {name}")}
        for name in ("wikipedia", "news")
    )
    methods = [row[2] for row in wikipedia.values() if row[0] == "w4a4kv4"]
    assert len(methods) == 6
    for method in methods:
        _, _, _, _, own, adams, difference, left = wikipedia[method]
        assert (
            f"| {method} | {adams} | {own} | {difference.rstrip(' *')} | {news[method][6].rstrip(' *')} |"
            in docs
        )
        assert left.startswith("-"), "its perplexity is the lower one in every row"
