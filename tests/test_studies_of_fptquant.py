"""What docs/methods.md says of the study of FPTQuant is what is on record."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from harness.archive import opened
from harness.gains import gains_section
from harness.records import models_of, read_run
from kernels import recorded
from tests.report_tables import section_of

TASK = "perplexity_wikipedia"
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
    with opened(root / "results" / "reference" / "fptquant-paper-quarot.tar.xz") as run:
        others = read_run(run).cells
    of_seeds: dict[str, list[list[float]]] = {}
    for cell in others:
        values = [task["metrics"]["perplexity"]["value"] for task in cell.record["tasks"].values()]
        of_seeds.setdefault(cell.record["method"]["name"], []).append(values)
    wikipedias = [value for value, _ in of_seeds["quarot"]]
    means = [statistics.geometric_mean(values) for values in zip(*of_seeds["quarot+static"], strict=True)]
    assert len(wikipedias) == len(of_seeds["quarot+static"]) == 3
    assert (
        f"lie between {min(wikipedias):.2f} and {max(wikipedias):.2f} on Wikipedia; with static ranges"
        in flat
    )
    assert "it has {:.2f} there and {:.2f} on news".format(*means) in flat
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


def test_outliers_of_fptquants_blocks_are_what_the_docs_say(root: Path) -> None:
    flat = " ".join((root / "docs" / "methods.md").read_text().split())
    report = (root / "reports" / "fptquant" / "report.md").read_text()
    found = dict(re.findall(r"^\| (\S.*? \(gptq\)) +\| +([\d.]+) \| +[\d.]+ \| +[\d.]+ \|$", report, re.M))
    assert (
        f"with a kurtosis of {found['fptquant:steps=0 (gptq)']}, where a Hadamard matrix has "
        f"{found['quarot (gptq)']} and end-to-end learning ends at {found['fptquant (gptq)']}"
    ) in flat


def test_what_fptquants_parts_cost_is_what_the_docs_say(root: Path) -> None:
    flat = " ".join((root / "docs" / "methods.md").read_text().split())
    record = recorded.read(root / "results" / "reference" / "speed-h100-fptquant.json.xz")
    took = {
        row["online"]: statistics.median(row["seconds"])
        for row in record["overhead"]
        if row["form"] == "w4a4kv4"
    }
    more = {name: f"{100 * (seconds / took['none'] - 1):.1f} %" for name, seconds in took.items()}
    assert f"takes {more['fptquant']} longer with FPTQuant's online parts" in flat
    assert f"{more['quarot']} with QuaRot's online parts" in flat
    whole = recorded.read(root / "results" / "reference" / "speed-h100.json.xz")["overhead"]
    [plain, before] = [
        statistics.median(row["seconds"])
        for online in ("none", "fptquant")
        for row in whole
        if (row["form"], row["phase"], row["batch"], row["context"], row["online"])
        == ("w4a4kv4", "decode", 1, 1024, online)
    ]
    assert f"All of it took {100 * (before / plain - 1):.1f} % when" in flat
    assert (
        f"the scale per token {more['fptquant-scaling']}, static ranges {more['fptquant-static']}, the "
        f"Hadamard transform in seven blocks of 2048 in front of down_proj {more['fptquant-hadamard']} ("
    ) in flat
