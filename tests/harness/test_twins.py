"""The report's section on models that differ in how they were pre-trained, from made-up records."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.harness.runs import edit, number_and_interval, table, text_of, write_cell

SECTION = "### the-osp and the-adam: perplexity wikipedia"


def cell(run: Path, model: str, name: str, bits: str, seed: int = 0, rounding: str = "rtn") -> Path:
    """A cell of a model; its scores are those of the method without `osp`."""
    base = name.removeprefix("osp+") if name != "osp" else "rtn"
    given = {"name": model, "label": "", "sha256": model.encode().hex(), "family": "llama"}
    made = write_cell(run, base, bits, seed=seed, model=given)
    label = name if name in ("float", "rtn", "gptq") else f"{name} ({rounding})"

    def change(record: dict[str, Any]) -> None:
        options = {part: {"rounding": rounding} for part in name.split("+")}
        record["method"] |= {"row": label, "name": name, "rounding": rounding, "options": options}

    edit(made, change)
    return made


def refused(run: Path, model: str) -> Path:
    made = cell(run, model, "osp", "w4a4kv4", seed=7)
    edit(made, lambda record: record.update(status="not_applicable", tasks={}))
    return made


def rows(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    lines = (folder / "samples" / "perplexity_wikipedia.jsonl").read_text().splitlines()
    return {(row["window"], row["passage"]): row for row in map(json.loads, lines)}


def mean(folder: Path) -> float:
    found = rows(folder).values()
    return sum(float(row["nll"]) for row in found) / sum(row["tokens"] for row in found)


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Path]:
    return {
        "adam": cell(tmp_path, "the-adam", "float", "w16a16"),
        "adam rtn": cell(tmp_path, "the-adam", "rtn", "w4a4kv4"),
        "adam quarot": cell(tmp_path, "the-adam", "quarot", "w4a4kv4", rounding="gptq"),
        "adam w4a16": cell(tmp_path, "the-adam", "rtn", "w4a16"),
        "refused": refused(tmp_path, "the-adam"),
        "osp": cell(tmp_path, "the-osp", "float", "w16a16"),
        "osp rtn": cell(tmp_path, "the-osp", "osp", "w4a4kv4", seed=5),
        "osp quarot": cell(tmp_path, "the-osp", "osp+quarot", "w4a4kv4", rounding="gptq"),
    }


def test_rises_above_the_own_float_are_compared(made: dict[str, Path], tmp_path: Path) -> None:
    lines = table(text_of(tmp_path), SECTION)
    found = {(line["the-osp"], line["the-adam"]): line for line in lines}
    assert found.keys() == {("osp (rtn)", "rtn"), ("osp+quarot (gptq)", "quarot (gptq)")}
    line = found["osp (rtn)", "rtn"]
    means = {name: mean(folder) for name, folder in made.items()}
    ours, theirs = means["osp rtn"] - means["osp"], means["adam rtn"] - means["adam"]
    assert float(line["the-osp loses (%)"]) == pytest.approx(100 * math.expm1(ours), abs=0.06)
    assert float(line["the-adam loses (%)"]) == pytest.approx(100 * math.expm1(theirs), abs=0.06)
    value, low, high = number_and_interval(line["difference [95 %]"])
    assert value == pytest.approx(ours - theirs, abs=6e-4)
    assert low < value < high
    left = number_and_interval(line["the-osp against the-adam (%)"])[0]
    assert left == pytest.approx(100 * math.expm1(means["osp rtn"] - means["adam rtn"]), abs=0.06)
    # Equal cells lose alike, with certainty.
    same = found["osp+quarot (gptq)", "quarot (gptq)"]
    assert number_and_interval(same["difference [95 %]"])[0] == 0


def test_rows_of_other_options_are_not_paired(made: dict[str, Path], tmp_path: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["method"]["options"]["quarot"]["online"] = False

    edit(made["osp quarot"], change)
    edit(made["osp rtn"], lambda record: record["method"]["options"]["osp"].update(samples=64))
    edit(made["adam rtn"], lambda record: record["method"]["options"]["rtn"].update(samples=None))
    assert "in pairs" not in text_of(tmp_path)


def test_a_model_that_osp_was_not_asked_of_is_no_twin(made: dict[str, Path], tmp_path: Path) -> None:
    edit(made["refused"], lambda record: record.update(status="failed"))
    assert "in pairs" not in text_of(tmp_path)


def test_models_of_other_tokens_are_no_twins(made: dict[str, Path], tmp_path: Path) -> None:
    for name in ("osp", "osp rtn", "osp quarot"):
        for task in ("perplexity_wikipedia", "perplexity_news"):
            path = made[name] / "samples" / f"{task}.jsonl"
            changed = [json.loads(line) for line in path.read_text().splitlines()]
            text = "".join(json.dumps({**row, "tokens": row["tokens"] + 1}) + "\n" for row in changed)
            path.write_text(text)

            def seal(record: dict[str, Any], task: str = task, path: Path = path) -> None:
                record["tasks"][task]["samples_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()

            edit(made[name], seal)
    assert "in pairs" not in text_of(tmp_path)


def test_a_row_with_other_passages_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    (made["osp rtn"] / "samples" / "perplexity_wikipedia.jsonl").write_text("")
    text = text_of(tmp_path)
    assert [line["the-osp"] for line in table(text, SECTION)] == ["osp+quarot (gptq)"]
    assert "Not compared: w4a4kv4 osp (rtn): perplexity_wikipedia" in text
