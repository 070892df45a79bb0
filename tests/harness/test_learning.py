"""The report's section on what methods learned, from made-up records."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tests.harness import runs
from tests.harness.runs import edit, row_of, table, text_of, write_cell

SECTION = "### What was learned"
GAINS = "### Does learning pay?"
SIZES = "### How much calibration text it takes"
LOG = {"loss": [0.9, 0.5, 0.25], "gradient": [1.0, 0.5, 0.1], "alpha": [1.0] * 3, "error": [1e-7, 4e-6, 2e-6]}
SPIN = {
    "tokens": {"seen": 25_600, "different": 8_192, "paper": 1_638_400},
    "log": {"R1 and R2": {**LOG, "retracted": [1]}},
}


def perplexity_in(line: dict[str, str]) -> float:
    """As the main table shows it, in front of its interval."""
    return float(line["perplexity wikipedia [95 %]"].split()[0])


def kurtail(sequences: int) -> dict[str, Any]:
    return {
        "sequences": sequences,
        "tokens": {"passed": 512 * sequences, "kept": 2048},
        "log": {"R1": {**LOG, "retracted": []}, "R2": {**LOG, "retracted": []}},
    }


def learner(run: Path, name: str, facts: dict[str, Any], *, bits: str = "w4a4kv4", **options: Any) -> None:
    row = name + (f":{options}" if options else "")
    folder = write_cell(run, row if row in runs.HARM else "quarot", bits, seed=len(list(run.iterdir())))

    def change(record: dict[str, Any]) -> None:
        record["seed"] = 0
        record["method"] |= {"row": f"{name} {sorted(options.items())}" if options else name, "name": name}
        given = {"preset": "quick", "rounding": "rtn", "sequences": options.get("sequences")}
        record["method"]["options"] = {name: given}
        counts = [0] * 96
        counts[40:56] = [10] * 16
        spread = {
            **{f"peak_{when}": 3.0 for when in ("before", "after")},
            "snr_before": 8.0,
            "snr_after": 20.25,
        }
        for point in record["diagnostics"]["kurtosis"]:
            point |= spread | {"after": 2.0 + 0.1 / len(facts)}
        record["diagnostics"]["histograms"] = [
            {"site": site, "reach": 12.0, "before": [1] * 96, "after": counts}
            for site in ("attention", "mlp")
        ]
        record["diagnostics"]["learned"] = {name: facts}
        record["measured"]["learned"] = {
            name: {
                "capture_seconds": 12.3,
                "learn_seconds": 45.6,
                "learn_peak_bytes": 3 * 2**20,
                "device": "a GPU",
            }
        }

    edit(folder, change)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return filled(tmp_path / "demo")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_of(filled(tmp_path_factory.mktemp("read") / "demo"))


def filled(folder: Path) -> Path:
    folder.mkdir()
    write_cell(folder, "float", "w16a16")
    write_cell(folder, "quarot", "w4a4kv4")
    learner(folder, "spinquant", SPIN)
    learner(folder, "kurtail", kurtail(64))
    for sequences in (4, 16):
        learner(folder, "kurtail", kurtail(sequences), sequences=sequences)
    return folder


def test_tokens_losses_and_times_are_the_records(text: str) -> None:
    lines = table(text, SECTION)
    spin, first, second = (
        next(line for line in lines if (line["method"], line["matrices"]) == names)
        for names in (("spinquant", "R1 and R2"), ("kurtail", "R1"), ("kurtail", "R2"))
    )
    assert spin["tokens"] == "25,600 (8,192 different), 1.6% of the paper's 1,638,400"
    assert first["tokens"] == "32,768 passed, 2,048 rows of each site kept"
    for line in (spin, first, second):
        assert (line["steps"], line["loss"], line["error"]) == ("3", "0.900 → 0.250", "4e-06")


def test_times_stand_among_the_costs(text: str) -> None:
    assert text.index("### What learning took") > text.index("## Cost")
    (line,) = (
        line
        for line in table(text, "### What learning took")
        if line["method"] == line["what"] == "spinquant"
    )
    assert [line[f"{stage} (s)"] for stage in ("capture", "start", "learn")] == ["12.3", "–", "45.6"]
    assert (line["peak memory (MiB)"], line["sample (MiB)"], line["device"]) == ("3.0", "–", "a GPU")


def test_gains_are_paired_and_stand_beside_the_papers(text: str) -> None:
    """Made-up cells of one seed: the ratio of their perplexities, and what KurTail's abstract says."""
    rows = {line["method"]: line for line in table(text, runs.MODEL)}
    lines = {(line["method"], line["against"]): line for line in table(text, GAINS)}
    assert {against for method, against in lines if method == "spinquant"} == {"quarot"}
    assert {pair: line["paper (%)"] for pair, line in lines.items() if pair[0] == "kurtail"} == {
        ("kurtail", "quarot"): "−15.5",
        ("kurtail", "spinquant"): "−2.9",
    }
    for (method, against), line in lines.items():
        shown = float(line["perplexity wikipedia (%)"].split()[0])
        ours, theirs = (perplexity_in(rows[name]) for name in (method, against))
        assert shown == pytest.approx(100 * (ours / theirs - 1), abs=0.1)
        low, high = (float(end) for end in line["perplexity wikipedia (%)"].split("[")[1][:-1].split(", "))
        assert low < shown < high


def test_static_ranges_are_held_against_quarot_with_both_kinds(run: Path) -> None:
    """Dynamic ones against dynamic ones alone, and another variant of the method against neither."""
    for options in ({}, {"steps": 0}, {"static": False}):
        learner(run, "fptquant", SPIN, **options)
    for norm in (4.0, 2.0):
        folder = write_cell(run, "quarot", "w4a4kv4", seed=len(list(run.iterdir())))

        def change(record: dict[str, Any], norm: float = norm) -> None:
            record["seed"] = 0
            name = "quarot+static"
            record["method"] |= {"row": name if norm == 2 else f"{name}:norm={norm}", "name": name}
            record["method"]["options"] |= {"static": {"norm": norm}}

        edit(folder, change)
    for path in run.glob("*/cell.json"):
        row = json.loads(path.read_text())["method"]["row"]
        changed = {name: value for name, value in (("steps", 0), ("static", False)) if name in row}
        if row.startswith("fptquant"):

            def vary(record: dict[str, Any], changed: dict[str, Any] = changed) -> None:
                record["method"]["options"]["fptquant"] |= changed

            edit(path.parent, vary)
    found = {
        (line["method"], line["against"])
        for line in table(text_of(run), GAINS)
        if line["method"].startswith("fptquant")
    }
    assert found == {
        ("fptquant", "quarot"),
        ("fptquant", "quarot+static"),
        ("fptquant [('static', False)]", "quarot"),
    }


def test_a_seed_that_failed_leaves_the_others(run: Path) -> None:
    """The first seed has nothing but its failure: what the second learned is shown, and the curve over
    sequences is of the seeds that all its points have."""
    for folder in [path for path in run.iterdir() if (path / "cell.json").is_file()]:
        record = json.loads((folder / "cell.json").read_text())
        if record["method"]["name"] in ("spinquant", "kurtail"):
            again = shutil.copytree(folder, run / f"{folder.name}x")
            edit(again, lambda record: record.update(id=f"{record['id']}x", seed=1))
        if record["method"]["name"] == "spinquant":
            edit(folder, lambda record: record.update(diagnostics={}, tasks={}, status="failed"))
    shown = next(line for line in table(text_of(run), SECTION) if line["method"] == "spinquant")
    assert (shown["steps"], shown["loss"]) == ("3", "0.900 → 0.250")
    for folder in [path for path in run.iterdir() if (path / "cell.json").is_file()]:
        edit(folder, lambda record: record.update(diagnostics={}))
    bare = text_of(run)
    assert SECTION not in bare
    assert SIZES not in bare
    assert GAINS in bare


def test_inputs_of_blocks_before_and_after(text: str) -> None:
    lines = table(text, "### Inputs of blocks before and after")
    assert lines[0]["method"] == "(before)"
    assert lines[0]["signal to noise (dB)"] == "8.0"
    assert next(line for line in lines if line["method"] == "kurtail")["signal to noise (dB)"] == "20.2"


def test_a_curve_over_the_calibration_text(text: str) -> None:
    lines = table(text, SIZES)
    assert [line["sequences"] for line in lines] == ["4", "16", "64"]
    assert {line["method"] for line in lines} == {"kurtail, w4a4kv4"}
    assert all(line["kurtosis"] == "2.033" for line in lines)


def test_figures_are_whole_and_repeat(run: Path) -> None:
    text = text_of(run)
    paths = {
        name: run / "figures" / f"smollm2-135m-instruct-{name}.svg"
        for name in ("learning", "layers", "inputs", "sizes")
    }
    drawn = {name: path.read_bytes() for name, path in paths.items()}
    for name, path in paths.items():
        assert f"](figures/{path.name})\n\n*" in text
        ElementTree.fromstring(drawn[name])
    text_of(run)
    assert drawn == {name: path.read_bytes() for name, path in paths.items()}


def test_nothing_is_said_where_nothing_was_learned(tmp_path: Path) -> None:
    write_cell(tmp_path, "float", "w16a16")
    write_cell(tmp_path, "quarot", "w4a4kv4")
    text = text_of(tmp_path)
    assert SECTION not in text
    assert SIZES not in text
    assert row_of(table(text, runs.MODEL), "w4a4kv4", "quarot")


# Tuned behind rounding

TUNED = "### What was tuned"
TUNING = {
    "parameters": {"kept": 1_935_360, "scale": 155_520},
    "tokens": {"seen": 25_600, "different": 25_088},
    "rate": 1e-3,
    "loss": [3.7] * 100,
    "tuned_on": {"before": 3.5, "after": 3.25, "windows": 8},
    "held_out": {"before": 3.6, "after": 3.4, "windows": 8},
}


def test_what_was_tuned_is_shown_for_every_bit_width(run: Path) -> None:
    learner(run, "quad", {"share": 0.9, "tuning": TUNING})
    learner(run, "quad", {"share": 0.9, "tuning": {**TUNING, "loss": [1.0]}}, bits="w4a8kv8")
    text = text_of(run)
    lines = {line["bits"]: line for line in table(text, TUNED)}
    assert lines.keys() == {"w4a4kv4", "w4a8kv8"}
    assert lines["w4a4kv4"] == {
        "bits": "w4a4kv4",
        "method": "quad",
        "kept weights": "1,935,360",
        "scales": "155,520",
        "steps": "100",
        "tokens": "25,600 (25,088)",
        "loss, tuned on": "3.500 → 3.250",
        "loss, held out": "3.600 → 3.400",
        "windows": "8",
    }
    assert lines["w4a8kv8"]["steps"] == "1"
    learned = [line["method"] for line in table(text, SECTION)]
    assert "quad" not in learned, "it keeps no log of rotations"


def test_nothing_is_said_where_nothing_was_tuned(run: Path) -> None:
    assert TUNED not in text_of(run)
