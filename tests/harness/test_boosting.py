"""The report's section on boosting, and the command that measures layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import boosting_report, layers
from harness.boosting import published_section
from harness.config import GridConfig, cells_of
from harness.layers import correlations, published, read_csv
from harness.records import Cell, Row, unranked
from tests import families
from tests.harness import runs
from tests.methods.small_checkpoint import save

TYPES = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
)
KURTOSIS = {name: [3.0 + 0.1 * i for i in range(30)] for name in TYPES}


def boosted(options: dict[str, Any], linears: list[str], computed: float, packed: float) -> dict[str, Any]:
    """Changes to a made-up cell's record: as a kurtboost cell would have them."""
    return {
        "diagnostics": {
            "weights": [
                {"bits": 4, "group": 128, "axis": 1, "count": 210 - len(linears), "linears": None},
                {"bits": 8, "group": 128, "axis": 1, "count": len(linears), "linears": linears},
            ][: 2 if linears else 1],
            "learned": {"kurtboost": {"kurtosis": KURTOSIS}} if "choice" in options else {},
        },
        "measured": {
            "seconds": {},
            "memory": {
                "linears": {"computed": computed, "measured": 999.0, "float16": 400.0, "packed": packed},
                "rest": {"computed": 1.0, "measured": 1.0},
                "kv_token": {"computed": 1.0, "measured": 1.0, "float16": 1.0},
            },
        },
    }


def add(
    run: Path,
    row: str,
    name: str,
    harm: float,
    changes: dict[str, Any],
    bits: str = "w4a16",
    **options: Any,
) -> None:
    """A cell of `harm` nats more a token than float."""
    runs.HARM[row.split(" ")[0]] = harm / runs.LOSS[bits]
    method = {
        "row": row,
        "spec": row,
        "name": name,
        "rounding": "hqq",
        "preset": "quick",
        "options": {
            name: {"preset": "quick", "rounding": "hqq", "group_axis": None, "meta": None, **options}
        },
    }
    runs.write_cell(run, row, bits, method=method, **changes)


CHOSEN = ["layers.3.mlp.down_proj", "layers.4.mlp.down_proj"]
DRAWS = (0.44, 0.46, 0.48, 0.5, 0.52)


def filled(folder: Path, choice: float, draws: Sequence[float] = DRAWS, matrix: str = "down_proj") -> str:
    """The section on boosting of a run whose base loses 0.5 nats a token, choice and draws as given."""
    runs.write_cell(folder, "float", "w16a16")
    add(folder, "hqq", "hqq", 0.5, boosted({}, [], 100.0, 120.0))
    add(
        folder,
        "kurtboost",
        "kurtboost",
        choice,
        boosted({"choice": 1}, CHOSEN, 102.0, 123.0),
        choice="outliers",
    )
    for seed, harm in enumerate(draws):
        others = [f"layers.{5 + seed}.mlp.{matrix}", "layers.20.mlp.down_proj"]
        changes = boosted({"choice": 1}, others, 102.0, 123.0) | {"seed": seed}
        add(folder, "kurtboost:choice=random", "kurtboost", harm, changes, choice="random")
    text = runs.text_of(folder)
    return text[text.index("### More bits where they matter") :]


@pytest.fixture(autouse=True)
def _own_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "HARM", dict(runs.HARM))
    monkeypatch.setattr(runs, "LOSS", dict(runs.LOSS))


def test_section(tmp_path: Path) -> None:
    section = filled(tmp_path, 0.2)
    line = next(line for line in section.splitlines() if "| kurtboost" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["w4a16", "kurtboost †", "2 of 210"]
    assert float(cells[-1].split()[0]) == pytest.approx(-0.3, abs=0.05)
    draws = next(line for line in section.splitlines() if "kurtboost:choice=random" in line)
    assert " to " in draws.split("|")[7], "the best and the worst"
    test = next(line for line in section.splitlines() if line.startswith("| w4 "))
    cells = [cell.strip() for cell in test.strip("|").split("|")]
    assert cells[:4] == ["w4", "kurtboost", "1", "5"]
    assert float(cells[4].split()[0]) == pytest.approx(-0.28, abs=0.05)
    assert float(cells[5].replace("<", "")) < 0.01 < float(cells[6])
    assert "Does choosing beat drawing at random? Yes." in section
    texts = [line for line in section.splitlines() if line.startswith("#### On ")]
    assert texts == ["#### On perplexity wikipedia", "#### On perplexity news"]
    assert section.count("Does choosing beat drawing at random?") == 2
    assert (tmp_path / "figures" / "smollm2-135m-instruct-depth.svg").is_file()
    assert "Meta-Llama-3-8B (theirs)" in section and "Theirs, not measured here" in section
    assert "† Weight-only" in section
    tables = "".join(line for line in section.splitlines() if line.startswith("|"))
    assert all(f"\n{flag} " in section for flag in "†‡§" if flag in tables)
    assert runs.text_of(tmp_path).endswith(section)


def test_a_choice_among_its_draws_is_not_told_from_them(tmp_path: Path) -> None:
    """Better than the mean of the draws, which is known well, but no better than the best of them."""
    section = filled(tmp_path, 0.44)
    assert "Does choosing beat drawing at random? It cannot be told." in section


def test_a_choice_that_harms_is_called_worse(tmp_path: Path) -> None:
    section = filled(tmp_path, 0.8)
    assert "Does choosing beat drawing at random? Worse for kurtboost at 4 bits." in section


def test_one_draw_has_no_spread_to_test_by(tmp_path: Path) -> None:
    assert "is open**: no choice has two draws" in filled(tmp_path, 0.2, (0.48,))


def test_draws_of_another_size_are_no_control(tmp_path: Path) -> None:
    section = filled(tmp_path, 0.2, matrix="up_proj")
    assert "draws with other numbers of matrices than the choice, seeds 0, 1, 2, 3, 4" in section
    assert "is open**" in section


def test_the_headline_is_read_from_the_authors_own_cell(tmp_path: Path) -> None:
    assert "The authors' headline" not in filled(tmp_path / "another", 0.2)
    run = tmp_path / "theirs"
    runs.LOSS["w3a16g128"] = runs.LOSS["w4a16"]
    runs.write_cell(run, "float", "w16a16")
    add(run, "hqq", "hqq", 0.5, boosted({}, [], 100.0, 120.0), bits="w3a16g128")
    changes = boosted({"choice": 1}, CHOSEN, 102.0, 123.0)
    options = {"choice": "outliers", "stop": 3}
    add(run, "sensiboost:stop=3", "sensiboost", 0.3, changes, bits="w3a16g128", **options)
    text = runs.text_of(run)
    assert "sensiboost at 3 bits in groups of 128, 3 rungs up" in text
    assert "for +2.00 % of the linears' memory by formula and +2.50 % packed" in text


def test_nothing_boosted_and_no_base_are_said(tmp_path: Path) -> None:
    runs.write_cell(tmp_path, "float", "w16a16")
    add(tmp_path, "kurtboost", "kurtboost", 0.5, boosted({"choice": 1}, [], 100.0, 120.0), choice="outliers")
    text = runs.text_of(tmp_path)
    assert "Without a base" in text and "nothing was boosted: w4a16 kurtboost" in text


def test_a_run_without_boosting_has_no_section(tmp_path: Path) -> None:
    runs.write_cell(tmp_path, "float", "w16a16")
    runs.write_cell(tmp_path, "rtn", "w4a16")
    assert "More bits where they matter" not in runs.text_of(tmp_path)


@pytest.mark.parametrize(
    ("weights", "flag"),
    [
        ([(4, 128, 1)], ""),
        ([(4, 128, 1), (4, 32, 1)], "‡"),
        ([(4, 64, 0)], ""),
        ([(4, 64, 1)], "‡"),
        ([(16, 64, 1), (4, None, 1)], ""),
    ],
)
def test_small_groups_of_any_linear_flag_a_row(weights: list[tuple[int, int | None, int]], flag: str) -> None:
    """On a checkpoint that lies on a lattice; groups across outputs do not meet it."""
    record = {
        "bits": "w4a16g64",
        "method": {"options": {}},
        "diagnostics": {
            "weights": [dict(zip(("bits", "group", "axis"), some, strict=True)) for some in weights]
        },
    }
    assert unranked({"pre_quantised": {"group": 32}}, Row("x", (Cell(record),))) == flag


def test_seeds_of_an_entry() -> None:
    methods = ["hqq", {"method": "kurtboost:choice=random", "seeds": 5}, "kurtboost", "sensiboost"]
    grid = GridConfig.model_validate({"methods": methods, "bits": ["w3a16g64"], "tasks": ["boolq_local"]})
    counts: dict[str, int] = {}
    for cell in cells_of(grid):
        counts[cell.method] = counts.get(cell.method, 0) + 1
    assert counts == {"hqq": 1, "kurtboost:choice=random": 5, "kurtboost": 1, "sensiboost": 1}


def test_published_data_are_the_authors(golden: Path) -> None:
    found = published()
    assert [values.name for values in found] == ["Llama-2-13b-hf", "Llama-2-7b-hf", "Meta-Llama-3-8B"]
    for values in found:
        assert values.theirs
        assert values == read_csv(golden / "boost" / f"{values.name}.csv", theirs=True)


def test_published_numbers_agree_with_themselves() -> None:
    """Where a perplexity and a gain are both stated, one follows from the other."""
    text = "\n".join(published_section())
    assert "-9.40 (+0.85)" in text and "9.3077" in text and "+0.18" in text
    assert text.count("(theirs)") == 14


def test_correlation_within_a_family_of_the_published() -> None:
    """High, but no higher than across families, nor than with depth alone: the claim of a pattern of one's
    own within a family does not follow from it."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in correlations(published()).splitlines()[2:]
    ]
    sensitivity = {line[0].replace(" (theirs)", ""): float(line[1].split()[0]) for line in lines}
    family = sensitivity["Llama-2-13b-hf, Llama-2-7b-hf"]
    assert 0.8 < family < min(value for name, value in sensitivity.items() if "Llama-3" in name)
    assert family < min(value for name, value in sensitivity.items() if name.endswith("depth"))


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "model", "llama-biases", num_hidden_layers=4)
    text = tmp_path / "text.txt"
    words = np.random.default_rng(0).integers(0, families.VOCABULARY, 3000)
    text.write_text("\n\n".join(" ".join(f"w{i}" for i in words[k : k + 100]) for k in range(0, 3000, 100)))
    arguments = [
        "--out",
        str(tmp_path / "out"),
        "--calibration",
        str(text),
        "--samples",
        "2",
        "--length",
        "32",
    ]
    assert layers.main([str(tmp_path / "model"), *arguments]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.md")
    values = read_csv(tmp_path / "out" / "model.csv")
    assert set(values.sensitivity) == set(TYPES) and all(len(v) == 4 for v in values.kurtosis.values())
    assert values.sensitivity["self_attn.q_proj"] == values.sensitivity["self_attn.k_proj"]
    assert all(np.isfinite(v).all() and min(v) > 0 for v in values.sensitivity.values())
    record = json.loads((tmp_path / "out" / "layers.json").read_text())
    facts = next(iter(record["models"].values()))
    assert facts["calibration"]["samples"] == 2 and facts["seconds"]["sensitivity"] > 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "model, Llama-2-13b-hf (theirs)" in report and (tmp_path / "out" / "model.svg").is_file()
    assert layers.main([str(tmp_path / "nothing"), *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_studys_own_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path / "run", 0.2)
    assert boosting_report.main([str(tmp_path / "run"), "--report", str(tmp_path / "study")]) == 0
    text = (tmp_path / "study" / "report.md").read_text()
    assert text.startswith("# Bits where they matter\n\nSensiBoost")
    assert "## smollm2-135m-instruct\n" in text and "\\" not in text
    assert text.count("## Published by the authors") == 1
    assert (tmp_path / "study" / "figures" / "smollm2-135m-instruct-depth.svg").is_file()
    runs.write_cell(tmp_path / "plain", "float", "w16a16")
    for bad in ("plain", "nothing"):
        assert boosting_report.main([str(tmp_path / bad), "--report", str(tmp_path / "study")]) == 2
        assert capsys.readouterr().err.startswith("error: ")
