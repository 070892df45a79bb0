"""What docs/methods.md says of pre-training recipes is what is on record."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from harness.archive import opened
from harness.pretraining import ceiling, read_study, write_report
from harness.pretraining_tables import PUBLISHED_WIDTH, difference, recipe_name
from harness.records import models_of, read_run
from harness.twins import twins_section
from kernels import recorded
from methods.checkpoint import SHIPPED_MODELS
from tests.report_tables import chapter, lines_of, section_of
from training import trainer


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


@pytest.fixture(scope="module")
def record(root: Path) -> dict[str, Any]:
    """The study of recipes."""
    found: dict[str, Any] = recorded.read(root / "results" / "reference" / "osp.json.xz")
    return found


@pytest.fixture(scope="module")
def report(root: Path) -> str:
    return (root / "reports" / "osp" / "report.md").read_text()


@pytest.fixture(scope="module")
def flat(root: Path) -> str:
    return " ".join((root / "docs" / "methods.md").read_text().split())


def alone(probe: dict[str, Any]) -> float:
    return statistics.fmean(probe["alone"])


def inputs(probe: dict[str, Any], site: str) -> float:
    return statistics.fmean(each["kurtosis"] for each in probe["sites"][site]) - 3


def test_losses_of_recipes_are_what_the_docs_say(record: dict[str, Any], flat: str) -> None:
    held = {name: [probe["held_out"] for probe in run["probes"]] for name, run in record["runs"].items()}
    losses = (f"{held[name][-1]:.3f}" for name in ("adam-0", "adam-1", "muon-0", "osp-0", "osp-1"))
    said = "ended at {} and {} (two seeds) by Adam, {} by Muon alone, {} and {} by OSP"
    assert said.format(*losses) in flat
    assert "Held-out loss (64 windows)" in flat and trainer.HELD_OUT_WINDOWS == 64
    gaps = [adam - osp for adam, osp in zip(held["adam-0"], held["osp-0"], strict=True)]
    [early] = [
        gap
        for gap, probe in zip(gaps, record["runs"]["adam-0"]["probes"], strict=True)
        if round(probe["tokens"] / 1e6) == 14
    ]
    said = "Adam was {:.3f} behind OSP after 14 M tokens, {:.3f}, {:.3f} and {:.3f} at the last three probes"
    assert said.format(early, *gaps[-3:]) in flat
    assert early == max(gaps)


def test_outliers_of_recipes_are_what_the_docs_say(record: dict[str, Any], report: str, flat: str) -> None:
    ends = {name: run["probes"][-1] for name, run in record["runs"].items()}
    published = {row[0]: row[-1] for row in lines_of(chapter(report, "Outliers").partition("\n### ")[0])}
    ladder = ("muon-0", "muon+embproj-0", "muon+ssnorm-0", "osp-0", "osp-1")
    heights = [alone(ends[name]) for name in ladder]
    wanted = [float(published[recipe_name(name)[0]].replace(",", "")) for name in ladder]
    assert heights == sorted(heights, reverse=True) and wanted == sorted(wanted, reverse=True)
    shares = [100 * heights[0] / ceiling(256), 100 * wanted[0] / ceiling(PUBLISHED_WIDTH)]
    assert (
        f"it ended at {heights[0]:.2f} by Muon ({shares[0]:.0f} % of what is possible; the paper has "
        f"{wanted[0]:,}, {shares[1]:.0f} %), {heights[1]:.2f} with projections alone, {heights[2]:.2f} with "
        f"single-scale norms alone, {heights[3]:.2f} and {heights[4]:.2f} by OSP."
    ) in flat
    *others, last = ends["muon+ssnorm-0"]["alone"]
    assert f"only the last of {len(others) + 1} states stands out, at {last:.2f}" in flat
    assert max(others) < 0.2
    adam = " and ".join(f"{alone(ends[name]):.2f}" for name in ("adam-0", "adam-1"))
    assert f"Adam's, the highest of the paper, is not in its place: {adam}." in flat
    grew = {}
    for name, run in record["runs"].items():
        probes = next(probe for probe in run["probes"] if probe["tokens"] > 28e6), run["probes"][-1]
        grew[name] = " to ".join(f"{statistics.fmean(probe['excess']):.2f}" for probe in probes)
    assert (
        f"from 28 M tokens to the end, from {grew['muon-0']} by Muon, {grew['muon+embproj-0']} with "
        f"projections alone, {grew['adam-0']} by Adam and {grew['muon+ssnorm-0']} with single-scale norms "
        f"alone; by OSP it stayed where it was ({grew['osp-0']})"
    ) in flat
    assert "All of this is of 8 windows" in flat and trainer.PROBE_WINDOWS == 8
    read = [
        f"{inputs(ends[name], site):.2f}" for name in ("muon-0", "adam-0") for site in ("attention", "mlp")
    ]
    said = "(an excess kurtosis of {} for query, key and value, {} for gate and up; by Adam {} and {})"
    assert said.format(*read) in flat
    down = (f"{inputs(ends[name], 'down_proj'):.0f}" for name in ("adam-0", "adam-1", "osp-0", "osp-1"))
    assert "(an excess kurtosis of {} and {} by Adam, {} and {} by OSP)".format(*down) in flat


def test_what_recipes_lose_at_four_bits_is_what_the_docs_say(
    root: Path, record: dict[str, Any], report: str, flat: str
) -> None:
    docs = (root / "docs" / "methods.md").read_text()
    models = {
        name: {(cell["method"], cell["bits"]): cell for cell in cells}
        for name, cells in record["tables"]["models"].items()
    }

    def more(one: str, other: str, method: str, bits: str, text: str) -> str:
        value, low, high = difference(models[one], models[other], (method, bits), text)
        return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"

    methods = [method for method, bits in models["osp-0"] if bits == "w4a4kv4"]
    found = {
        method: [
            more(f"osp-{seed}", f"adam-{seed}", method, "w4a4kv4", text)
            for text in ("held_out", "wikipedia")
            for seed in (0, 1)
        ]
        for method in methods
    }
    assert len(found) == 7
    for method, values in found.items():
        assert f"| {method} | {' | '.join(values)} |" in docs
    shared = {method for method, values in found.items() if all("[+" in value for value in values)}
    assert shared == {"rtn", "gptq"}, "with these OSP loses more on both texts by both seeds"
    parts = []
    for text in ("held_out", "wikipedia"):
        for seed in (0, 1):
            weights, whole = (
                difference(models[f"osp-{seed}"], models[f"adam-{seed}"], ("rtn", bits), text)[0]
                for bits in ("w4a16", "w4a4kv4")
            )
            parts.append(f"{100 * weights / whole:.0f}")
    assert "makes {} and {} % of that on held-out text, {} and {} % on Wikipedia".format(*parts) in flat
    plain = {
        name: more(f"{name}-0", "adam-0", "rtn", "w4a4kv4", "held_out").split()[0]
        for name in ("muon", "muon+ssnorm", "muon+embproj", "osp")
    }
    assert (
        f"Muon {plain['muon']}, single-scale norms alone {plain['muon+ssnorm']}, projections alone "
        f"{plain['muon+embproj']}, OSP {plain['osp']})"
    ) in flat
    pair = [more("muon-0", "osp-0", "rtn", "w4a4kv4", text) for text in ("held_out", "wikipedia")]
    assert f"{pair[0]} for Muon on held-out text, {pair[1]} on Wikipedia" in flat
    widths = report.partition("### Perplexity, held-out text")[2].partition("\n### ")[0]
    rounded = {(row[0], row[1]): row[-1].split(" / ")[0] for row in lines_of(widths)}
    said = "({} and {} against {} and {}, rounded to nearest)"
    assert said.format(*(rounded[recipe, seed] for recipe in ("osp", "adam") for seed in "01")) in flat


def test_what_steps_of_recipes_cost_is_what_the_docs_say(report: str, flat: str) -> None:
    steps = {row[0]: row for row in lines_of(chapter(report, "What a step costs"))}
    updates = (f"{float(steps[name][3]):.0f}" for name in ("adam", "muon", "osp"))
    assert "updates of {} ms by Adam, {} ms by Muon and {} ms by OSP".format(*updates) in flat
    passes = sorted(float(row[2]) for row in steps.values())
    assert f"passes of 8,192 tokens of {passes[0]:.0f} to {passes[-1]:.0f} ms" in flat
    few, many = ([steps[name][column].replace("%", " %") for name in ("muon", "osp")] for column in (6, 8))
    assert "makes {} of Adam's speed by Muon and {} by OSP".format(*few) in flat
    assert "computed for 4 M tokens {} and {} (".format(*many) in flat


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
