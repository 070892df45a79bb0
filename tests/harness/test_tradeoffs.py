"""What the report says of costs, of tasks and layers, and of how to make it again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import report
from harness.comparison_plots import BETTER, INK, PAPER, WORSE, Point, front, shade
from harness.config import load_grid
from tests.harness.runs import (
    DIFFERENCE,
    MODEL,
    PRIMARY,
    edit,
    row_of,
    settings_of,
    table,
    text_of,
    write_cell,
)

STEM = "smollm2-135m-instruct"
SPEED: dict[str, Any] = {
    "decode_tokens_per_second": 50.0,
    "prefill_tokens_per_second": 9.0,
    "prefill_tokens": 128,
}
SPEED |= {"decoded_tokens": 8, "device": "a processor", "peak_memory_bytes": None}
MEMORY = {
    "linears": {"computed": 10 * 2**20, "measured": 11 * 2**20, "float16": 40 * 2**20},
    "rest": {"computed": 5 * 2**20, "measured": 6 * 2**20},
    "kv_token": {"computed": 512.0, "measured": 1024.0, "float16": 2048.0},
}


def words(path: Path) -> list[str]:
    """The words of a figure."""
    return [
        text.strip() for text in re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text(encoding="utf-8"))
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("costs") / "demo"
    write_cell(folder, "float", "w16a16", calibration=None)
    for row in ("rtn", "quarot", "quarot (gptq)"):
        for bits in ("w4a16", "w4a4kv4"):
            errors = [
                {"linear": f"layers.{layer}.{name}", "relative_error": 0.1 + 0.01 * layer}
                for layer in range(3)
                for name in ("mlp.up_proj", "mlp.down_proj")
            ]
            cell = write_cell(folder, row, bits)

            def change(record: dict[str, Any], errors: list[Any] = errors) -> None:
                record["diagnostics"]["weight_error"] = errors
                record["measured"] |= {"speed": SPEED, "memory": MEMORY, "joules": 1234.4}

            edit(cell, change)
    report.write_report(folder)
    return folder


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return (run / "report.md").read_text(encoding="utf-8")


def test_the_headline_carries_the_marks_of_the_primary_comparison(text: str) -> None:
    lines, compared = table(text, MODEL), table(text, PRIMARY)
    marks = set()
    for line in compared:
        shown = next(
            each["against QuaRot (%)"]
            for each in lines
            if (each["bits"], each["method"].removesuffix(" †")) == (line["bits"], line["method"])
        )
        difference = line["Δ log-perplexity wikipedia [95 %]"]
        if difference == "reference":
            assert shown == "reference"
            continue
        value, mark = re.fullmatch(r"([+-][\d.]+) \[.*?\]( \*{1,2})?", difference).groups()  # type: ignore[union-attr]
        expected = 100 * math.expm1(float(value))
        number, _, stars = shown.partition(" ")
        assert float(number) == pytest.approx(expected, abs=0.06 + 0.0006 * (100 + abs(expected)))
        assert stars == (mark or "").strip()
        holm = float(line["p (Holm)"].removeprefix("< "))
        assert stars == ("**" if holm <= 0.01 else "*" if holm <= 0.05 else "")
        marks.add(stars)
    assert "**" in marks and len(compared) == 6
    assert lines[0]["against QuaRot (%)"] == "–"
    assert "corrected for the number of methods at that bit-width" in text


points = st.lists(
    st.builds(Point, st.floats(0.1, 1e4), st.integers(0, 9).map(float), st.just(math.nan), st.just("w4a16")),
    max_size=12,
)


@given(points, st.booleans(), st.booleans())
def test_the_front_is_what_nothing_beats(found: list[Point], higher: bool, more: bool) -> None:
    """Against the definition, pair by pair; costs within 1 % are equal."""

    def beaten(point: Point) -> bool:
        for other in found:
            better = other.value > point.value if higher else other.value < point.value
            dear, cheap = (other.cost, point.cost) if not more else (point.cost, other.cost)
            if better and dear / cheap <= 1.01 * (1 + 1e-12):
                return True
            if other.value == point.value and dear / cheap < (1 - 1e-12) / 1.01:
                return True
        return False

    def close(point: Point) -> bool:  # so near to the border that rounding decides
        return any(
            abs(ratio - 1.01) < 1e-9
            for other in found
            for ratio in (other.cost / point.cost, point.cost / other.cost)
        )

    kept = front(found, higher=higher, more=more)
    assert [point.cost for point in kept] == sorted(point.cost for point in kept)
    assert {id(point) for point in kept if not close(point)} == {
        id(point) for point in found if not beaten(point) and not close(point)
    }
    if found:
        best = max(found, key=lambda point: point.value if higher else -point.value).value
        assert kept and any(point.value == best for point in kept)


def test_every_cost_on_record_has_a_panel(run: Path, text: str) -> None:
    said = words(run / "figures" / f"{STEM}-pareto.svg")
    for across in ("effective bits per parameter", "MiB by formula, with KV cache"):
        assert said.count(across) == 2, "perplexity and accuracy"
    assert said.count("↑") == 1, "rtn at w4a4kv4 is far beyond float"
    said = words(run / "figures" / f"{STEM}-costs.svg")
    for across in ("decode tokens/s (more is better →)", "seconds to quantise (log scale)"):
        assert said.count(across) == 2
    assert not any("held" in word for word in said), "simulated cells hold floats whatever their bits"
    assert {"float", "quarot", "rtn", "quarot (gptq)", "best for its cost"} <= set(
        words(run / "figures" / f"{STEM}-pareto.svg")
    )
    assert text.index("## Cost") < text.index(f"figures/{STEM}-costs.svg") < text.index("## Reproduce this")
    assert text.index(f"figures/{STEM}-pareto.svg") < text.index("## Tasks and protocols")


def test_flagged_rows_are_marked_in_the_figures_of_costs(tmp_path: Path) -> None:
    """On the front beside their bits, elsewhere alone; and the caption says what that means."""
    for row, bits in (("float", "w16a16"), ("rtn", "w4a16"), ("quarot", "w4a16"), ("rtn", "w4a4kv4")):
        write_cell(tmp_path, row, bits)
    text = text_of(tmp_path)
    for figure in ("pareto", "costs"):
        said = words(tmp_path / "figures" / f"{STEM}-{figure}.svg")
        marks = [word for word in said if "†" in word]
        assert set(marks) <= {"†", "w4a16 †"} and len(marks) == 2 * 2, "two rows, perplexity and accuracy"
        caption = text.split(f"figures/{STEM}-{figure}.svg)\n\n", 1)[1].split("\n\n", 1)[0]
        assert "† beside a marker" in caption and "‡" not in caption
    for cell in tmp_path.glob("*/cell.json"):
        edit(cell.parent, lambda record: record["model"].update(pre_quantised=None))
    text = text_of(tmp_path)
    assert "†" not in (tmp_path / "figures" / f"{STEM}-pareto.svg").read_text()
    assert "beside a marker" not in text


def test_the_cost_table_has_tokens_and_energy(run: Path, text: str, tmp_path: Path) -> None:
    cost = row_of(table(text, "## Cost"), "w4a4kv4", "quarot")
    assert (cost["calibration (tokens)"], cost["energy (J)"]) == (f"{32 * 512:,}", "1,234")
    line = row_of(table(text, "## Cost"), "w16a16", "float")
    assert (line["calibration (tokens)"], line["energy (J)"]) == ("–", "–")
    assert "learning (tokens)" not in cost, "nothing was learned"
    learned = write_cell(tmp_path, "quarot", "w4a16")
    ends = {"before": 3.0, "after": 2.9, "windows": 2}
    tuning = {"parameters": {"kept": 5, "scale": 6}, "loss": [3.0], "tuned_on": ends, "held_out": ends}
    facts = {"tokens": {"seen": 4096}, "tuning": {**tuning, "tokens": {"seen": 1000, "different": 10}}}
    edit(learned, lambda record: record["diagnostics"].update(learned={"quarot": facts}))
    edit(learned, lambda record: record["measured"].update(joules=None))
    cost = table(text_of(tmp_path), "## Cost")[0]
    assert cost["learning (tokens)"] == "5,096"
    assert "energy (J)" not in cost, "no driver told"
    # A learner that only reads notes a number; another's stages have tokens each.
    stages = {"local": {"tokens": {"seen": 7}}, "student": {"tokens": {"seen": 30}}}
    facts = {"sensiboost": {"tokens": 999}, "fptquant": stages}
    edit(learned, lambda record: record["diagnostics"].update(learned=facts))
    assert table(text_of(tmp_path), "## Cost")[0]["learning (tokens)"] == "37"


def test_the_heat_map_holds_the_differences_of_the_tables(run: Path, text: str) -> None:
    said = words(run / "figures" / f"{STEM}-tasks.svg")
    logs, accuracies = table(text, DIFFERENCE), table(text, DIFFERENCE, 1)
    cells = [word for word in said if re.match(r"[+-]\d", word)]
    expected = []
    for line in logs:
        for task in ("wikipedia", "news"):
            shown = line[f"Δ log-perplexity {task} [95 %]"]
            expected.append((float(shown.split()[0]), 0.0051, re.sub(r"[^*]", "", shown)))
    for line in accuracies:
        for task in ("boolq", "piqa", "mmlu"):
            shown = line[f"Δ {task}_local (%)"]
            expected.append((float(shown.split()[0]), 0.051, re.sub(r"[^*]", "", shown)))
    assert len(cells) == len(expected) == 6 * 5
    for cell, (value, slack, stars) in zip(cells, expected, strict=True):
        assert float(cell.rstrip("*")) == pytest.approx(value, abs=slack)
        assert cell[len(cell.rstrip("*")) :] == stars
    assert any(cell.endswith("**") for cell in cells)
    svg = (run / "figures" / f"{STEM}-tasks.svg").read_text(encoding="utf-8")
    drawn = re.findall(r"<path [^>]*fill:(#[0-9a-f]{3,6})", svg)
    fills = [fill for fill in drawn if fill != "#fff"]
    assert len(fills) == len(cells)
    for fill, cell, (value, _, _), accuracy in zip(
        fills, cells, expected, [False] * 12 + [True] * 18, strict=True
    ):
        red, blue = int(fill[1:3], 16), int(fill[5:7], 16)
        worse = value < 0 if accuracy else value > 0
        assert abs(value) < 0.02 or (red > blue) == worse, (fill, cell)
    assert {"wikipedia", "news", "boolq", "piqa", "mmlu"} <= set(said)
    assert text.count(f"figures/{STEM}-tasks.svg)\n\n*") == 1


def linear(colour: str) -> np.ndarray:
    part = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.asarray(np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4))


DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)
PROTANOPIA = np.array(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
)
TRITANOPIA = np.array(
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
)
"""Machado, Oliveira and Fernandes 2009 (IEEE TVCG 15, 1291), severity 1, for linear RGB."""


@pytest.mark.parametrize("seen", [np.eye(3), DEUTERANOPIA, PROTANOPIA, TRITANOPIA])
def test_worse_and_better_differ_for_every_eye(seen: np.ndarray) -> None:
    worse, better = (np.clip(seen @ linear(colour), 0, 1) for colour in (shade(0.7), shade(-0.7)))
    assert np.abs(worse - better).max() > 0.2


@given(st.floats(-1, 1))
def test_words_stand_out_from_every_cell(strength: float) -> None:
    """The better of the two inks has a contrast of 3.9 or more, and colour grows with the strength."""
    behind = float(linear(shade(strength)) @ (0.2126, 0.7152, 0.0722))
    inks = (float(linear(ink) @ (0.2126, 0.7152, 0.0722)) for ink in (INK, PAPER))
    assert max((max(behind, ink) + 0.05) / (min(behind, ink) + 0.05) for ink in inks) >= 3.9
    assert shade(0) == PAPER and shade(1) == shade(math.inf) == WORSE and shade(-1) == BETTER


def test_rounding_errors_are_those_on_record(run: Path, text: str) -> None:
    assert "### Rounding error by layer" in text
    said = words(run / "figures" / f"{STEM}-errors.svg")
    assert {"w4a16", "w4a4kv4", "layer", "rtn", "quarot"} <= set(said)


def grid_of(text: str) -> str:
    found = re.search(r"### The grid in full\n.*?```yaml\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def commands_of(text: str) -> list[str]:
    found = re.search(r"## Reproduce this\n\n```sh\n(.*?)\n```", text, re.DOTALL)
    assert found is not None
    return found[1].splitlines()


@pytest.mark.parametrize("name", ["quick", "full", "int4", "quad"])
def test_the_grid_in_a_report_is_the_grid_that_ran(root: Path, tmp_path: Path, name: str) -> None:
    """What the report prints, saved as a file, is read back as the same grid, command line included."""
    grid = load_grid(root / "grids" / f"{name}.yaml", {"seeds": 3, "time_limit": 7.5, "gpus": 2})
    cell = write_cell(tmp_path / "run", "float", "w16a16")
    manifest = {"cells": [cell.name], "grid": grid.model_dump(mode="json")}
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    saved = tmp_path / "saved.yaml"
    saved.write_text(grid_of(text_of(tmp_path / "run")))
    assert load_grid(saved, {}) == grid.model_copy(update={"gpus": None}), "which needs a cluster"


def test_commands_to_make_it_again(tmp_path: Path, text: str) -> None:
    assert "The run's manifest does not hold the grid" in text and "The grid in full" not in text
    assert commands_of(text) == [
        "git checkout f00",
        "make .venv/requirements.lock",
        ".venv/bin/python -m harness.grid grids/quick.yaml",
        ".venv/bin/python -m harness.report results/demo",
    ]
    cells = [write_cell(tmp_path / "run", row, "w4a16") for row in ("rtn", "gptq")]
    edit(cells[0], lambda record: record["measured"].update(commit="abc123+"))
    (tmp_path / "run" / "run.json").write_text(
        json.dumps({"cells": [cell.name for cell in cells], "grid": {"name": "mine", "methods": ["rtn"]}})
    )
    several = text_of(tmp_path / "run")
    assert commands_of(several) == [
        "make .venv/requirements.lock",
        "# the grid in full, from the settings above, as mine.yaml",
        ".venv/bin/python -m harness.grid mine.yaml --out results/run",
        ".venv/bin/python -m harness.report results/run",
    ]
    assert "several commits" in several
    assert "changes that are not in that commit (`abc123+`)" in several


def test_every_option_of_a_method_is_among_the_settings(text: str) -> None:
    settings = settings_of(text)
    assert settings["options of quarot (gptq)"] == "preset=quick, rounding=gptq"


def test_figures_are_drawn_where_there_is_something_to_draw(tmp_path: Path) -> None:
    """One bit-width is no line of accuracy against bits."""
    write_cell(tmp_path, "rtn", "w4a16", effective_bits=None, measured={}, diagnostics={})
    said = text_of(tmp_path)
    assert not (tmp_path / "figures").exists()
    assert "Accuracy against bits" not in said
    write_cell(tmp_path, "rtn", "w4a8kv8", effective_bits=None, measured={}, diagnostics={})
    said = text_of(tmp_path)
    names: Sequence[str] = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == [f"{STEM}-bits.svg"]
    assert "What accuracy costs" not in said and "heat" not in said


def test_a_score_that_no_row_has_leaves_its_panel_empty(tmp_path: Path) -> None:
    """Both quantised rows have seconds, and neither a mean accuracy."""
    write_cell(tmp_path, "float", "w16a16")
    for row in ("rtn", "gptq"):
        edit(write_cell(tmp_path, row, "w4a16"), lambda record: record["tasks"].pop("mmlu_local"))
    assert "## Cost" in text_of(tmp_path)
