"""The report on recipes: its numbers from made-up likelihoods whose answers are known, and what it says."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import pretraining
from harness.pretraining import read_study, shipped_runs, write_report
from harness.pretraining_tables import NAMES, difference, increase, perplexity
from methods.checkpoint import SHIPPED_MODELS
from methods.errors import UserError

WINDOWS, LENGTH = 40, 11
RUNS = ("osp-1", "adam-0", "osp-0", "muon-0", "adam-1")
LOSS = {"adam": 0.5, "muon": 0.2, "osp": 0.05}
"""Nats a token that a made-up recipe loses at 4-4-4."""
SCALE = {"w4a8": 0.25, "w4a8kv8": 0.3, "w4a4": 0.9, "w4a4kv4": 1.0, "w4a16": 0.2}


def cell(method: str, bits: str, loss: float, seed: int) -> dict[str, Any]:
    shared = np.random.default_rng(7)
    own = np.random.default_rng([seed, *method.encode(), *bits.encode()])
    base = {part: 3 + shared.standard_normal(WINDOWS) for part in ("held_out", "wikipedia")}
    nll = {part: (x + loss * own.uniform(0.9, 1.1, WINDOWS)) * (LENGTH - 1) for part, x in base.items()}
    return {
        "method": method,
        "spec": method,
        "bits": bits,
        "length": LENGTH,
        "seed": seed,
        "nll": {part: values.tolist() for part, values in nll.items()},
    }


def cells(recipe: str, seed: int) -> list[dict[str, Any]]:
    found = [cell("float", "w16a16", 0.0, seed)]
    for method, share in (("rtn", 1.0), ("ffn_hadamard", 0.5)):
        found += [cell(method, b, share * LOSS[recipe] * SCALE[b], seed) for b in list(NAMES)[1:]]
    if recipe != "muon":
        found += [cell("gptq", b, 0.3 * LOSS[recipe] * SCALE[b], seed) for b in ("w4a16", "w4a4kv4")]
    return found


def study(excess: dict[str, float]) -> dict[str, Any]:
    runs = {}
    for name in RUNS:
        recipe, seed = name.rsplit("-", 1)
        probes = [
            {
                "step": 50 * part,
                "tokens": 50_000 * part,
                "held_out": 5.0 / part,
                "excess": [0.0, excess[recipe], 2 * excess[recipe]],
                "alone": [0.5, 0.5, 0.5],
                "sites": {
                    "attention": [{"kurtosis": 3.5, "largest": 2.5}],
                    "mlp": [{"kurtosis": 2.75, "largest": 1.5}],
                    "down_proj": [{"kurtosis": 9.0, "largest": 12.5}],
                },
                **({"histograms": {"mlp": {"reach": 4.0, "counts": [1, 8, 20, 1]}}} if part == 2 else {}),
            }
            for part in (1, 2)
        ]
        log = [
            {"step": s, "tokens": 1000 * s, "loss": 9.0 / s, "seconds": 2.0, "tokens_per_second": 500.0}
            for s in (1, 100)
        ]
        runs[name] = {
            "settings": {
                "recipe": recipe,
                "steps": 100,
                "seed": int(seed),
                "batch": 10,
                "length": 100,
                "shape": {"layers": 2, "width": 32, "heads": 2, "hidden": 48},
                "rates": {"adam": 0.002, "muon": 0.004, "embedding": 0.002},
                "warmup": 0.05,
                "decay": 0.2,
                "weight_decay": 0.01,
                "precision": "bf16",
            },
            "parameters": {"all": 1_500_000},
            "train_tokens": 80_000,
            "commands": [
                {
                    "command": f"python -m training.study run --runs {name}",
                    "commit": "abc123",
                    "device": "a GPU",
                    "torch": "2.11",
                }
            ],
            "log": log,
            "probes": probes,
        }
    steps = [
        {
            "recipe": recipe,
            "parameters": 1_400_000_000,
            "micro_tokens": 8192,
            "pass_seconds": 0.2,
            "update_seconds": update,
            "seconds": {"4194304": 100.0 + update},
            "state_bytes": 2**30,
            "peak_bytes": 2**35,
        }
        for recipe, update in (("adam", 0.02), ("muon", 2.5))
    ]
    tried = [{"recipe": "adam", "rate": 0.002, "tuning": 4.5, "tokens": 1e6}]
    tried += [{"recipe": "adam", "rate": 0.9, "tuning": None, "tokens": 1e6}]
    return {
        "data": {
            "sources": [{"name": "books", "package": "books==1", "what": "prose", "licence": "CC0"}],
            "characters": {"books": {"kept": 12_300_000}},
            "tokens": {"held_out": 1234},
            "vocabulary": 4096,
            "command": "python -m training.prepare",
        },
        "runs": runs,
        "tables": {
            "commands": ["python -m training.study tables"],
            "commits": ["abc123", None],
            "models": {name: cells(name.rsplit("-", 1)[0], int(name[-1])) for name in RUNS},
        },
        "overhead": {
            "command": "python -m training.study overhead",
            "commit": "abc123",
            "shape": "osp-1.4b",
            "device": "a GPU",
            "torch": "2.11",
            "steps": steps,
        },
        "rates": {
            "command": "python -m training.study rates",
            "commit": "abc123",
            "chosen": {"adam": 0.002, "muon": 0.004, "embedding": 0.002},
            "tried": tried,
        },
    }


LOW = {"adam": 0.3, "muon": 0.2, "osp": 0.01}
HIGH = {"adam": 900.0, "muon": 500.0, "osp": 0.02}


def rows(text: str, heading: str) -> list[dict[str, str]]:
    """The first table behind a heading, each line by its columns."""
    lines = text.split(heading, 1)[1].split("\n\n")
    block = next(part for part in lines if part.startswith("|")).splitlines()
    parsed = [[value.strip() for value in line.strip("|").split("|")] for line in block]
    return [dict(zip(parsed[0], line, strict=True)) for line in parsed[2:]]


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a study without outliers."""
    return write_report(study(LOW), tmp_path_factory.mktemp("low")).read_text()


def test_perplexities_are_those_of_the_windows(low: str) -> None:
    given, text = study(LOW), low
    found = rows(text, "### Perplexity, Wikipedia")
    assert [(row["recipe"], row["seed"]) for row in found] == [
        *(("adam", "0"), ("adam", "1"), ("muon", "0"), ("osp", "0"), ("osp", "1"))
    ]
    for row in found:
        model = given["tables"]["models"][f"{row['recipe']}-{row['seed']}"]
        for bits, name in NAMES.items():
            wanted = [
                math.exp(sum(c["nll"]["wikipedia"]) / WINDOWS / (LENGTH - 1))
                for c in model
                if c["bits"] == bits and c["method"] != "gptq"
            ]
            assert row[name].split(" / ") == [f"{value:.2f}" for value in wanted]
    further = rows(text, "### Further methods")
    assert [line["method"] for line in further] == ["rtn", "ffn_hadamard", "gptq", "gptq"]
    assert further[0]["published OSP"] == "45.92"
    assert [perplexity(x) for x in (0.0, 10.0, 1e9)] == ["1.00", "2.2e4", "1.0e304"]


def test_intervals_are_of_the_paired_differences() -> None:
    models = {
        name: {(c["method"], c["bits"]): c for c in found}
        for name, found in study(LOW)["tables"]["models"].items()
    }
    key = ("rtn", "w4a4kv4")

    def gains(name: str) -> Any:
        own, plain = models[name][key], models[name]["float", "w16a16"]
        return (np.array(own["nll"]["held_out"]) - plain["nll"]["held_out"]) / (LENGTH - 1)

    for found, values in (
        (increase(models["osp-0"], key, "held_out"), gains("osp-0")),
        (difference(models["osp-0"], models["adam-0"], key, "held_out"), gains("osp-0") - gains("adam-0")),
    ):
        assert found[0] == pytest.approx(values.mean())
        reach = 1.96 * values.std(ddof=1) / WINDOWS**0.5
        assert found[1:] == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.2 * reach)


def test_the_report_says_whether_outliers_appeared(low: str, tmp_path: Path) -> None:
    high = write_report(study(HIGH), tmp_path / "high").read_text()
    assert "did not appear at this scale" in low
    assert "did not appear" not in high
    between = write_report(study(LOW | {"muon": 5.0}), tmp_path / "between").read_text()
    assert "did not appear" not in between, "17 % of what a width of 32 allows"
    assert "Highest stands muon: 5.00 in context, 0.50 of tokens alone (17%; published 1,575.12)" in between
    assert "At this width it can be 29 at most" in between and "2,045 at that of the published" in between
    assert "(by Adam 1,818.56, 89% of what is possible)" in low
    assert "mean excess kurtosis of 900.00 and 900.00 by Adam and of 0.02 and 0.02 by OSP" in high
    assert rows(high, "## Outliers")[0]["published, 1.4 B"] == "1,818.56"
    read = rows(high, "## Outliers")[0]
    assert [read[name] for name in ("inputs of q, k, v", "of gate, up", "of down_proj")] == [
        "0.50",
        "-0.25",
        "6.00",
    ]
    assert rows(high, "## Runs")[0]["epochs"] == "1.25"
    assert rows(high, "## What a step costs")[1]["of Adam's speed at 4,194,304 tokens a step"] == "97.6%"
    assert rows(high, "## How the rates")[1]["loss on tuning text"] == "not finite"
    assert "Made by (commit: abc123)\n\n    python -m training.study run --runs adam-0\n" in high
    assert "Made by (commits: abc123, not known)\n\n    python -m training.study tables\n" in high
    drawn = {path.name for path in (tmp_path / "high" / "figures").iterdir()}
    assert drawn == {"curves.svg", "kurtosis.svg", "layers.svg", "histograms.svg", "bits.svg"}
    assert all(f"figures/{name}" in high for name in drawn)


def test_equal_studies_give_equal_bytes_and_parts_may_be_missing(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_report(study(HIGH), tmp_path / name)
    for path in sorted((tmp_path / "one").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    bare = copy.deepcopy(study(LOW)) | {"tables": None, "overhead": None, "rates": None}
    text = write_report(bare, tmp_path / "bare").read_text()
    assert "## Outliers" in text
    assert "## At 4 bits" not in text


def test_models_that_ship_are_shown_through_their_training(low: str, tmp_path: Path) -> None:
    """They were trained longest: whether outliers grow with training is seen there."""
    lines = low.partition("### Longer runs")[2].partition("\n## ")[0].splitlines()
    for name in ("twin-adam", "twin-osp"):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if f"| {name} |" in line]
        about = json.loads((SHIPPED_MODELS / name / "quantgrid.json").read_text())
        last, settings = about["probes"][-1], about["run"]["settings"]
        assert last["step"] == settings["steps"]
        assert [float(each) for each in rows[-1][2:]] == pytest.approx(
            [
                settings["steps"] * settings["batch"] * settings["length"] / 1e6,
                last["held_out"],
                *last["excess"],
            ],
            abs=0.05,
        )
    assert shipped_runs(tmp_path) == []


def test_mistakes_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    earlier = study(LOW) | {"tables": {"command": "python -m training.study tables", "models": {}}}
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    (tmp_path / "empty.json").write_text(json.dumps(study(LOW) | {"runs": {}}))
    for name, said in (
        ("none", "No such file"),
        ("broken", "is damaged"),
        ("other", "not a file that"),
        ("earlier", "by an earlier version: give python -m training.study collect again"),
    ):
        with pytest.raises(UserError, match=said):
            read_study(tmp_path / f"{name}.json")
    assert pretraining.main([str(tmp_path / "empty.json"), "--report", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: the study has no runs to report\n"
