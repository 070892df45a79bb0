"""The report's section on what methods learned, from made-up records."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tests.harness import runs
from tests.harness.runs import edit, row_of, table, text_of, write_cell

SECTION = "### What was learned"
SIZES = "### How much calibration text it takes"
LOG = {"loss": [0.9, 0.5, 0.25], "gradient": [1.0, 0.5, 0.1], "alpha": [1.0] * 3, "error": [1e-7, 4e-6, 2e-6]}
SPIN = {
    "tokens": {"seen": 25_600, "different": 8_192, "paper": 1_638_400},
    "log": {"R1 and R2": {**LOG, "retracted": [1]}},
}


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
        record["method"]["options"] = {name: {"sequences": options.get("sequences")}}
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
        record["measured"]["learned"] = {name: {"capture_seconds": 12.3, "learn_seconds": 45.6, "bytes": 9}}

    edit(folder, change)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    folder.mkdir()
    write_cell(folder, "float", "w16a16")
    write_cell(folder, "quarot", "w4a4kv4")
    learner(folder, "spinquant", SPIN)
    learner(folder, "kurtail", kurtail(64))
    for sequences in (4, 16):
        learner(folder, "kurtail", kurtail(sequences), sequences=sequences)
    return folder


def test_tokens_losses_and_times_are_the_records(run: Path) -> None:
    lines = table(text_of(run), SECTION)
    spin, first, second = (
        next(line for line in lines if (line["method"], line["matrices"]) == names)
        for names in (("spinquant", "R1 and R2"), ("kurtail", "R1"), ("kurtail", "R2"))
    )
    assert spin["tokens"] == "25,600 (8,192 different), 1.6% of the paper's 1,638,400"
    assert first["tokens"] == "32,768 passed, 2,048 rows of each site kept"
    for line in (spin, first, second):
        assert (line["steps"], line["loss"], line["error"]) == ("3", "0.900 → 0.250", "4e-06")


def test_times_stand_among_the_costs(run: Path) -> None:
    text = text_of(run)
    assert text.index("### What learning took") > text.index("## Cost")
    lines = table(text, "### What learning took")
    found = {line["what"]: line["seconds"] for line in lines if line["method"] == "spinquant"}
    assert found == {"spinquant, capture": "12.3", "spinquant, learn": "45.6"}


def test_inputs_of_blocks_before_and_after(run: Path) -> None:
    lines = table(text_of(run), SECTION, 1)
    assert lines[0]["method"] == "(before)"
    assert lines[0]["signal to noise (dB)"] == "8.0"
    assert next(line for line in lines if line["method"] == "kurtail")["signal to noise (dB)"] == "20.2"


def test_a_curve_over_the_calibration_text(run: Path) -> None:
    lines = table(text_of(run), SIZES)
    assert [line["sequences"] for line in lines] == ["4", "16", "64"]
    assert {line["method"] for line in lines} == {"kurtail, w4a4kv4"}
    assert all(line["kurtosis"] == "2.033" for line in lines)


def test_figures_are_whole_and_repeat(run: Path) -> None:
    text = text_of(run)
    paths = {
        name: run / "figures" / f"smollm2-135m-instruct-{name}.svg"
        for name in ("learning", "inputs", "sizes")
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
