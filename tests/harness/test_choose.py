"""Options compared on tuning text: the numbers of the grid's own parts, paired, and of that split alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness import choose, perplexity, stats
from harness.markdown import compact
from harness.perplexity import Windows
from methods.bits import Bits
from methods.calibration import load_corpus
from methods.checkpoint import open_checkpoint
from tests.harness.small_grid import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def study(model: str, tmp_path: Path, *methods: str, seeds: int = 1) -> tuple[dict[str, Any], str]:
    out, report = tmp_path / "out.json", tmp_path / "deep" / "report.md"
    command = [*methods, "--model", model, "--seeds", str(seeds), "--windows", "2", "--length", "64"]
    command += ["--calibration", "3", "32", "--bits", "w4a4", "--out", str(out), "--report", str(report)]
    assert choose.main(command) == 0
    return json.loads(out.read_text()), report.read_text()


def test_rows_are_scored_on_the_tuning_split(model: str, tmp_path: Path) -> None:
    record, text = study(model, tmp_path, "quad:rank=0;rounding=rtn", "quad:rank=8;rounding=rtn")
    checkpoint = open_checkpoint(model)
    corpus = load_corpus("boolq", "tuning")
    every = perplexity.windows(checkpoint.tokenizer, corpus, 64)
    chosen = perplexity.draw(len(every), 2, seed=0)
    cut = Windows(every.tokens[chosen], every.passages[chosen])
    for row in record["rows"]:
        assert [(entry["window"], entry["passage"]) for entry in row["rows"]] == [
            (window, passage)
            for window in range(2)
            for passage in sorted(set(cut.passages[window, 1:].tolist()))
        ]
        assert row["loss"] == pytest.approx(
            sum(entry["nll"] for entry in row["rows"]) / sum(entry["tokens"] for entry in row["rows"])
        )
    first, second = record["rows"]
    assert second["effective_bits"]["weight"] > first["effective_bits"]["weight"] > 4
    change = stats.paired_log_perplexity(first["rows"], second["rows"])
    assert f"{change.value:+.4f} [" in text
    assert "quad:rank=8;rounding=rtn" in text
    assert "2 windows of 64 tokens of tuning text, 1 seed;" in text
    made = choose.quantised(
        choose.Study(checkpoint, cut, load_corpus(), 3, 32, choose.parse_device("cpu")),
        "quad:rank=8;rounding=rtn",
        Bits.parse("w4a4"),
        seed=0,
    )
    scored = [row.sample() for row in perplexity.score(made.decoder, cut, range(2))]
    assert scored == second["rows"]


def row(method: str, seed: int, shift: float) -> dict[str, Any]:
    rows = [
        {"window": 0, "passage": place, "nll": 20.0 + place + 10 * shift * (1 + place % 2), "tokens": 10}
        for place in range(6)
    ]
    bits = {"weight": 4.0, "activation": 4.0, "kv": 16.0, "model": 8.0}
    loss = sum(entry["nll"] for entry in rows) / 60
    return {
        "method": method,
        "bits": "w4a4",
        "seed": seed,
        "loss": loss,
        "effective_bits": bits,
        "tuning": None,
        "rows": rows,
    }


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_differences_are_paired_by_seed(seeds: int) -> None:
    """Seeds that shift both methods alike leave the difference as it is."""
    rows = [row("a", seed, seed) for seed in range(seeds)]
    rows += [row("b", seed, seed + 0.02 * (1 + seed)) for seed in range(seeds)]
    record = {
        "model": "m",
        "windows": 1,
        "length": 61,
        "calibration": [16, 512],
        "command": "c",
        "rows": rows,
    }
    text = choose.report(record)
    line = next(line for line in text.splitlines() if line.startswith("| b"))
    differences = [0.02 * 1.5 * (1 + seed) for seed in range(seeds)]
    mean = sum(differences) / seeds
    assert f"{mean:+.4f} [" in line
    if seeds == 4:
        low, high = stats.mean(differences).interval()
        assert f"[{low:+.4f}, {high:+.4f}]" in line


def test_a_record_is_rendered_again(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, text = study(model, tmp_path, "rtn")
    capsys.readouterr()
    assert choose.main(["--render", str(tmp_path / "out.json")]) == 0
    assert compact(capsys.readouterr().out) == text + "\n"
    (tmp_path / "other.json").write_text("{}")
    assert choose.main(["--render", str(tmp_path / "other.json")]) == 2


@pytest.mark.parametrize("wrong", [[], ["quodd"], ["rtn", "--seeds", "0"], ["rtn", "--bits", "w9"]])
def test_mistakes_are_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert choose.main(wrong) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
