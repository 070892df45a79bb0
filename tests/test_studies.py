"""What docs/methods.md and docs/clusters.md say of studies is what is on record."""

from __future__ import annotations

import re
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
from harness.records import Model, models_of, read_run
from tests.report_tables import section_of

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
