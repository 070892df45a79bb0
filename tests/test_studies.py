"""What docs/methods.md and docs/clusters.md say of studies is what is on record."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import boosting_report, stats
from harness.archive import opened
from harness.equal_bits import equal_bits_section
from harness.gains import change_text, gains_section
from harness.layers import correlations, published
from harness.markdown import compact
from harness.pretraining import read_study, write_report
from harness.records import Model, models_of, read_run
from harness.twins import twins_section
from kernels import recorded
from methods.checkpoint import SHIPPED_MODELS

TASK = "perplexity_wikipedia"


def test_what_learned_rotations_bring_is_what_the_docs_say(root: Path) -> None:
    readme = (root / "docs" / "methods.md").read_text()
    report = (root / "reports" / "rotations" / "report.md").read_text()
    gains = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.partition("### Does learning pay?")[2].partition("\n### ")[0].splitlines()
        if line.startswith("| w4a4kv4")
    ]
    plain = {(name.removesuffix(" (gptq)"), against): rest for _, name, against, *rest in gains}
    for method in ("kurtail", "spinquant", "spinquant:start=kurtail"):
        assert f"| {' | '.join((method, *plain[method, 'quarot (gptq)']))} |" in readme
    wikipedia, news = plain["kurtail", "spinquant (gptq)"][1:3]
    flat = " ".join(readme.split())
    for text, said in (("Wikipedia", wikipedia), ("news", news)):
        assert f"{said.replace(' [', ' % [')} on {text}" in flat
    spreads = re.findall(r"^\| (\(before\)|kurtail \(gptq\)|quarot \(gptq\)) +\| +([\d.]+) \|", report, re.M)
    before, learned, drawn = (dict(spreads)[name] for name in ("(before)", "kurtail (gptq)", "quarot (gptq)"))
    assert f"from {float(before):.1f} to {learned}, a Hadamard matrix to {drawn}" in flat
    assert float(learned) <= 2.1


def test_what_learning_rotations_took_is_what_the_docs_say(root: Path) -> None:
    """The study's quick presets, the papers' budgets, and what is shipped."""
    flat = " ".join((root / "docs" / "methods.md").read_text().split())
    costs: dict[str, list[Any]] = {}
    for name in ("rotations", "rotations-paper"):
        with opened(root / "results" / "reference" / f"{name}.tar.xz") as run:
            for cell in read_run(run).cells:
                facts = cell.record["measured"].get("learned") or {}
                costs.setdefault(cell.record["method"]["spec"], []).extend(facts.values())

    def ranges(method: str, what: str) -> tuple[float, float]:
        found = [fact[what] for fact in costs[method]]
        return min(found), max(found)

    quick, capture = ranges("kurtail", "learn_seconds"), ranges("kurtail", "capture_seconds")
    slow = ranges("spinquant", "learn_seconds")
    took = "KurTail {:.1f} to {:.1f} s behind a capture of {:.0f} to {:.0f} s, SpinQuant {:.1f} to {:.1f} s"
    assert took.format(*quick, *capture, *slow) in flat
    assert 4 * quick[1] <= slow[0]
    variants = [name for name in costs if name.startswith("kurtail") and "preset" not in name]
    held, sample = (
        max(ranges(name, what)[1] for name in variants) / 2**20
        for what in ("learn_peak_bytes", "sample_bytes")
    )
    least, most = (size / 2**20 for size in ranges("spinquant", "learn_peak_bytes"))
    assert (
        f"at the most {held:.0f} MiB (with the sample, which waits on the host, {held + sample:.0f}) "
        f"against {most:.0f}"
    ) in flat
    assert 4 * held <= least
    [fast], [long] = costs["kurtail:preset=paper"], costs["spinquant:preset=paper"]
    assert (
        f"KurTail {fast['learn_seconds']:.1f} s behind a capture of {fast['capture_seconds']:.0f} s, "
        f"SpinQuant {long['learn_seconds']:.0f} s"
    ) in flat
    for fact in (fast, long):
        assert sum(value for name, value in fact.items() if name.endswith("_seconds")) <= 180


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


RTN_OPT = (
    "fptquant:pre_rope=False;value=False;up_down=False;residual=False;hadamard=False;tokens=False (gptq)"
)


def test_what_fptquant_brings_is_what_the_docs_say(root: Path) -> None:
    docs = (root / "docs" / "methods.md").read_text()
    flat = " ".join(docs.split())
    report = (root / "reports" / "fptquant" / "report.md").read_text()
    gains = section_of(report, "Does learning pay?")
    assert len(gains) == 4
    for _, method, against, seeds, wikipedia, news, _ in gains:
        assert seeds == "3"
        assert f"| {method} | {against} | {wikipedia} | {news} |" in docs
    changed = {
        row: (wikipedia, news) for _, row, wikipedia, news in section_of(report, "Options of one method")
    }
    for option, said in {
        "residual=False": "the residual rotation {}",
        "hadamard=False": "the Hadamard transform before down_proj {}",
        "steps=0": "end-to-end learning {}",
        "local_steps=0": "the local stage {}",
        "up_down=False": "scales of up and down {}",
        "value=False": "the value transform {}",
        "pre_rope=False": "the rotation in front of RoPE ({})",
        "tokens=False": "the per-token scale ({})",
    }.items():
        assert said.format(changed[f"fptquant:{option} (gptq)"][0].split()[0]) in flat
    per_token = changed["fptquant:static=False (gptq)"][0].removesuffix(" **")
    assert f"(`static=false`, {per_token} against static ranges)" in flat
    alone = changed["fptquant:static=False;local_steps=0 (gptq)"][0].removesuffix(" **")
    assert f"it is better left out ({alone})" in flat
    rounded = changed["fptquant:learn_bits=w4a4kv4 (rtn)"][0].split()[0].lstrip("-")
    assert f"are {rounded} nats better than weights rounded afterwards" in flat
    level = {
        row[1]: row[4].split()[0]
        for row in section_of(report.replace("## smollm2", "### smollm2"), "smollm2-135m-instruct")
    }
    assert f"(a perplexity of {level['static (gptq)']} on Wikipedia) or learned ({level[RTN_OPT]}," in flat
    drawn = level["fptquant:local_steps=0;steps=0 (gptq)"]
    assert (
        f"(`local_steps=0;rate=0`) brings {drawn} on Wikipedia down to "
        f"{level['fptquant:local_steps=0;rate=0.0 (gptq)']}. QuaRot with static ranges has "
        f"{level['quarot+static (gptq)']} and FPTQuant {level['fptquant (gptq)']}."
    ) in flat
    assert (
        f"without online parts perplexity is {level['fptquant:hadamard=False;tokens=False (gptq)']}" in flat
    )


def test_what_fptquant_brings_at_its_papers_budget_is_what_the_docs_say(root: Path) -> None:
    flat = " ".join((root / "docs" / "methods.md").read_text().split())
    with opened(root / "results" / "reference" / "fptquant-paper.tar.xz") as run:
        cells = read_run(run).cells
        [model] = models_of(cells)
        _, lines, *_ = gains_section(model)
    rows = [[cell.strip() for cell in line.split("|")] for line in lines.splitlines() if "w4a4kv4" in line]
    [(wikipedia, news)] = [row[5:7] for row in rows if row[3].startswith("quarot (")]
    levels = {
        cell.record["method"]["name"]: [
            f"{task['metrics']['perplexity']['value']:.2f}" for task in cell.record["tasks"].values()
        ]
        for cell in cells
    }
    for place, (text, change) in enumerate((("Wikipedia", wikipedia), ("news", news))):
        both = f"{levels['fptquant'][place]} against {levels['quarot'][place]} on {text}"
        assert f"{both} ({change.replace(' [', ' % [')})" in flat
    [took] = [
        fact["learn_seconds"]
        for cell in cells
        for fact in (cell.record["measured"].get("learned") or {}).values()
    ]
    assert f"It learned for {took:.0f} s, alone on one H100" in flat
    drift = {
        (cell.record["method"]["name"], task): f"{entry['kl']['mean']:.3f}"
        for cell in cells
        for task, entry in cell.record["tasks"].items()
        if "kl" in entry
    }
    for task, said in (
        ("perplexity_news", "on news, from {} to {} nats a token"),
        (TASK, "on Wikipedia from {} to {}"),
    ):
        assert said.format(drift["quarot", task], drift["fptquant", task]) in flat


def test_what_quad_brings_is_what_the_docs_say(root: Path) -> None:
    docs = (root / "docs" / "methods.md").read_text()
    flat = " ".join(docs.split())
    report = (root / "reports" / "quad" / "report.md").read_text()
    equal = {
        (bits, method, against): (wikipedia, news, of_float)
        for bits, method, _, against, _, _, wikipedia, news, _, _, of_float in section_of(
            report, "QUAD and QuaRot at equal bits"
        )
    }
    said = re.findall(r"^\| (w4a\S+) \| (quad\S* \(gptq\)) \| (\S.*?) \| (\S.*?) \| (\S.*?) \|$", docs, re.M)
    assert len(said) == 6
    for bits, method, against, wikipedia, news in said:
        assert equal[bits, method, against][:2] == (wikipedia, news)
    kept = {(bits, method): of_float for (bits, method, _), (*_, of_float) in equal.items()}
    tuned = "quad:samples=176;a8=True;sequences=16;tune=True (gptq)"
    assert (
        f"is {kept['w4a4', 'quad (gptq)']} % of float's at W4A4 and {kept['w4a4', tuned]} % at W4A4/A8 with "
        f"tuning ({kept['w4a4', 'quad:a8=True (gptq)']} % without)"
    ) in flat
    answers = {(row[0], row[1]): row[-1].split()[0] for row in section_of(report, "Scores by task")}
    assert (
        f"float solves {answers['w16a16', 'float']} % of asdiv, QUAD {answers['w4a4', 'quad (gptq)']} % at "
        f"W4A4, {answers['w4a4', 'quad:a8=True (gptq)']} % at W4A4/A8 (with tuning "
        f"{answers['w4a4', tuned]} %) and {answers['w4a8', 'quad (gptq)']} % at w4a8"
    ) in flat
    tuning = "quad:samples=176;sequences=16;tune=True (gptq)"
    changed = {(row[0], row[1]): row[2:4] for row in section_of(report, "Options of one method")}
    wikipedia, news = changed["w4a4kv4", tuning]
    assert f"takes {wikipedia.split()[0].lstrip('-')} nats off the log-perplexity on Wikipedia" in flat
    assert f"on news {news.split()[0].lstrip('-')}, which may be chance" in flat and "*" not in news
    news = changed["w4a8", tuning][1]
    assert f"loses {news.split()[0].lstrip('+')} nats on news" in flat and "*" in news
    assert (
        f"solves {answers['w4a8', tuning]} % of asdiv instead of {answers['w4a8', 'quad (gptq)']} %" in flat
    )
    drift = {
        (row[1], row[2]): row[3].split()[0]
        for row in section_of(report, "Fidelity to float")
        if row[0] == "w4a4kv4" and len(row) == 7
    }
    for text, shown in (("wikipedia", "Wikipedia"), ("news", "news")):
        first, last = drift["quad (gptq)", text], drift[tuning, text]
        assert f"{first} to {last} " in flat and first < last, shown
        first, last = drift["quarot (gptq)", text], drift[tuning.replace("176;", "176;rank=0;"), text]
        assert f"{first} to {last} on {shown}" in flat and first > last
    shares = [number["chance"] for number in _float_tasks(root, "quad") if number.get("chance") is not None]
    [level] = [
        row[6].split()[0]
        for row in section_of(report.replace("## smollm2", "### smollm2"), "smollm2-135m-instruct")
        if row[1] == "float"
    ]
    assert f"guessing would have {100 * 100 * sum(shares) / len(shares) / float(level):.1f} %" in flat


def _float_tasks(root: Path, name: str) -> list[dict[str, Any]]:
    with opened(root / "results" / "reference" / f"{name}.tar.xz") as run:
        [cell] = [cell for cell in read_run(run).cells if cell.record["method"]["name"] == "float"]
    return list(cell.record["tasks"].values())


@pytest.mark.parametrize(
    ("name", "section"),
    [("rotations", gains_section), ("fptquant", gains_section), ("quad", equal_bits_section)],
)
def test_what_learning_brings_is_what_the_results_give(
    root: Path, name: str, section: Callable[[Model], list[str]]
) -> None:
    """Of reports that take a minute to write, the table that the docs rest on."""
    report = (root / "reports" / name / "report.md").read_text()
    with opened(root / "results" / "reference" / f"{name}.tar.xz") as run:
        [model] = models_of(read_run(run).cells)
        title, lines, *_ = section(model)
    assert compact(f"{title}\n\n{lines}\n") in report


def test_outliers_of_fptquants_blocks_are_what_the_docs_say(root: Path) -> None:
    flat = " ".join((root / "docs" / "methods.md").read_text().split())
    report = (root / "reports" / "fptquant" / "report.md").read_text()
    found = dict(re.findall(r"^\| (\S.*? \(gptq\)) +\| +([\d.]+) \| +[\d.]+ \| +[\d.]+ \|$", report, re.M))
    assert (
        f"with a kurtosis of {found['fptquant:steps=0 (gptq)']}, where a Hadamard matrix has "
        f"{found['quarot (gptq)']} and end-to-end learning ends at {found['fptquant (gptq)']}"
    ) in flat


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
        if adam["tokens"] > 14e6
    ]
    assert f"it was {gaps[0]:.3f} behind OSP after 15 M tokens and {gaps[-1]:.3f} at the end" in flat
    published = {row[0]: row[-1] for row in lines_of(chapter(report, "Outliers").partition("\n### ")[0])}
    said = "ended at {} and {} by Adam, {} by Muon, {} and {} by OSP (the paper has {}, {} and {}"
    assert said.format(*ends(alone, 2, *names), *map(published.get, ("adam", "muon", "osp"))) in flat
    grew = {}
    for name, run in runs.items():
        probes = next(probe for probe in run["probes"] if probe["tokens"] > 11.5e6), run["probes"][-1]
        grew[name] = " to ".join(f"{statistics.fmean(probe['excess']):.2f}" for probe in probes)
    assert (
        f"from 12 M tokens to the end, from {grew['adam-0']} by Adam, {grew['muon-0']} by Muon and "
        f"{grew['muon+embproj-0']} with projections alone, and was still growing; with single-scale norms it "
        f"stayed where it was ({grew['muon+ssnorm-0']}; by OSP {grew['osp-0']})"
    ) in flat
    said = "(an excess kurtosis of {} and {} by Adam, {} and {} by OSP)"
    assert said.format(*ends(tails, 0, "adam-0", "adam-1", "osp-0", "osp-1")) in flat
    found: dict[tuple[str, str], list[str]] = {}
    for text in ("On held-out text:", "On Wikipedia:"):
        part = report.partition(text)[2].partition("\nOn ")[0].partition("\n### ")[0]
        for recipe, _, method, bits, value, low, high, *_ in lines_of(part):
            if recipe == "osp":
                found.setdefault((method, bits), []).append(f"{value} [{low}, {high}]")
    for method in ("rtn", "gptq", "quarot:rounding=rtn", "quarot", "kurtail"):
        assert f"| {method} | {' | '.join(found[method, '4-4-4'])} |" in docs
    weights = [value.split()[0] for value in found["rtn", "w4a16"][:2]]
    assert "(without anything else quantised {} and {} on held-out text)".format(*weights) in flat
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


def test_what_fptquants_parts_cost_is_what_the_docs_say(root: Path) -> None:
    flat = " ".join((root / "docs" / "methods.md").read_text().split())
    record = recorded.read(root / "results" / "reference" / "speed-h100-fptquant.json.xz")
    took = {
        row["online"]: statistics.median(row["seconds"])
        for row in record["overhead"]
        if row["form"] == "w4a4kv4"
    }
    more = {name: f"{100 * (seconds / took['none'] - 1):.1f} %" for name, seconds in took.items()}
    assert f"took {more['fptquant']} longer with FPTQuant's online parts" in flat
    assert f"{more['quarot']} with QuaRot's online parts" in flat
    assert (
        f"the scale per token {more['fptquant-scaling']}, static ranges {more['fptquant-static']}, the "
        f"Hadamard transform in seven blocks of 2048 in front of down_proj {more['fptquant-hadamard']} ("
    ) in flat


def test_what_ray_costs_is_what_was_printed(root: Path) -> None:
    docs = (root / "docs" / "clusters.md").read_text()
    printed = (root / "results" / "reference" / "ray-scaling.txt").read_text()
    took = re.findall(r"^(local|ray \d) +(\d) +(\d) +([\d.]+) +(\d+) +[\d.]+$", printed, re.M)
    assert len(took) == 4
    for name, workers, _, command, cells in took:
        assert f"| {name.split()[0]} | {workers} | {command} | {cells} |" in docs
    seconds = {name: (float(command), int(cells)) for name, *_, command, cells in took}
    assert f"Ray adds {seconds['ray 1'][0] - seconds['local'][0]:.1f} s" in docs
    assert f"take {seconds['ray 2'][1] / seconds['ray 1'][1]:.2f} of the time" in docs
    for command in re.findall(r"^\$ python (.*)$", printed, re.M):
        assert f".venv/bin/python {command}\n" in docs


def test_what_the_papers_budgets_bring_is_what_the_docs_say(root: Path) -> None:
    flat = " ".join((root / "docs" / "methods.md").read_text().split())
    with opened(root / "results" / "reference" / "rotations-paper.tar.xz") as run:
        cells = {cell.record["method"]["name"]: cell for cell in read_run(run).cells}
        for method, said in (
            ("spinquant", "by {} on Wikipedia and by {} on news"),
            ("kurtail", "KurTail by {} and {}"),
        ):
            shown = []
            for task in (TASK, "perplexity_news"):
                paired = stats.paired_log_perplexity(
                    cells["quarot"].samples(task), cells[method].samples(task)
                )
                shown.append(change_text(paired).replace(" [", " % ["))
            assert said.format(*shown) in flat


DEEP, DEFAULT = ".training/deep-adam/model", "smollm2-135m-instruct"


def boosting(root: Path, model: str, text: str) -> dict[str, list[list[str]]]:
    """The lines of the tables on one text in a model's part of reports/boost."""
    report = (root / "reports" / "boost" / "report.md").read_text()
    part = report.partition(f"\n## {model}\n")[2].partition("\n## ")[0]
    part = part.partition(f"#### On perplexity {text}\n")[2].partition("\n#### ")[0]
    found: dict[str, list[list[str]]] = {"levels": [], "rows": [], "tests": []}
    for line in part.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"w\d(a16g\d+)?", cells[0]):
            found[{8: "levels", 4: "rows", 7: "tests"}[len(cells)]].append(cells)
    return found


@pytest.mark.parametrize(
    ("model", "name", "texts"),
    [(DEFAULT, "default †", ["wikipedia"]), (DEEP, "deep", ["wikipedia", "news"])],
)
def test_what_choosing_brings_is_what_the_docs_say(
    root: Path, model: str, name: str, texts: list[str]
) -> None:
    docs = (root / "docs" / "methods.md").read_text()
    for text in texts:
        tests = boosting(root, model, text)["tests"]
        assert len(tests) == 4
        for bits, method, _, draws, *rest in tests:
            assert f"| {' | '.join([name, text, bits, method, draws, *rest])} |" in docs
            seen = float(rest[1].replace("<", "")) < 0.05
            assert seen == (name == "default †" and bits == "w3")


@pytest.mark.parametrize(("model", "name"), [(DEFAULT, "default †"), (DEEP, "deep")])
def test_what_else_the_bits_buy_is_what_the_docs_say(root: Path, model: str, name: str) -> None:
    docs = (root / "docs" / "methods.md").read_text()
    levels = boosting(root, model, "wikipedia")["levels"]
    for bits, method, _, weight, _, packed, level, change in levels:
        if bits in ("w3a16g128", "w4a16g128") and "stop=3" not in method:
            assert f"| {' | '.join([name, bits, method, weight, packed, level, change or '–'])} |" in docs
    best: dict[str, float] = {}
    boosted = []
    for bits, method, *_, level, _ in levels:
        if "random" in method or not bits.startswith("w3"):
            continue
        if bits == "w3a16g128":
            best[method.split(" ")[0]] = float(level)
        if "boost" in method:
            boosted.append(float(level))
    assert best["gptq"] < min(boosted)
    if name == "deep":
        assert best["rtn"] < min(value for method, value in best.items() if "boost" in method)


def test_the_headline_and_the_family_are_what_the_docs_say(root: Path) -> None:
    flat = " ".join((root / "docs" / "methods.md").read_text().split())
    report = (root / "reports" / "boost" / "report.md").read_text()
    found = re.findall(
        r"The same here, \S+ \(hqq\): (\S+ % \[.*?\]) for (\S+ %) of the linears' memory by formula "
        r"and (\S+ %) packed, from a base of perplexity (\S+) where float has (\d[\d.]*\d)\.",
        report,
    )
    default, deep = found[0], found[1]
    assert (
        "`deep` {} for {} by the formula and {} packed, from a base of perplexity {} (float {})".format(*deep)
        in flat
    )
    assert f"On news `deep` has {found[2][0]}." in flat
    assert "the default model {} for {} and {}, from {} (float {})".format(*default) in flat
    medians = {}
    for line in correlations(published()).splitlines()[2:]:
        pair, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        medians[pair.replace(" (theirs)", "")] = [cell.split(" ")[0] for cell in cells]
    family = medians["Llama-2-13b-hf, Llama-2-7b-hf"]
    across = [medians[f"{name}, Meta-Llama-3-8B"] for name in ("Llama-2-13b-hf", "Llama-2-7b-hf")]
    depth = [medians[f"{name}, depth"] for name in ("Llama-2-13b-hf", "Llama-2-7b-hf")]
    for said in (
        f"correlate by {family[0]}, less than those of either with Llama-3 ({across[0][0]}, {across[1][0]})",
        f"the number of the layer alone ({depth[0][0]}, {depth[1][0]})",
        f"by {family[1]} within the family, {across[0][1]} and {across[1][1]} across",
        f"of kurtosis {family[2]} within and {across[0][2]} and {across[1][2]} across",
        f"its steps {family[3]}, {across[0][3]} and {across[1][3]}",
    ):
        assert said in flat


def test_the_report_on_boosting_is_what_the_results_give(root: Path, tmp_path: Path) -> None:
    runs = [root / "results" / "reference" / f"{name}.tar.xz" for name in ("boost", "boost-trained")]
    text = compact(boosting_report.report(runs, tmp_path))
    assert text == (root / "reports" / "boost" / "report.md").read_text()
