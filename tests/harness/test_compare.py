"""python -m harness.compare on made-up runs: what it pairs, what it prints, what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from harness import compare
from tests.harness.runs import (
    DOCUMENTS,
    accuracy_task,
    edit,
    number_and_interval,
    rewrite,
    rows_of,
    table,
    write_cell,
)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """A run and a second one of the same cells, whose code lost some answers."""
    for name in ("before", "after"):
        for row, bits in (("float", "w16a16"), ("rtn", "w4a16"), ("quarot (gptq)", "w4a16")):
            write_cell(tmp_path / name, row, bits)
    write_cell(tmp_path / "before", "gptq", "w4a16")
    write_cell(tmp_path / "after", "rtn", "w4a4kv4")
    return tmp_path / "before", tmp_path / "after"


def cell_of(run: Path, row: str, bits: str = "w4a16") -> Path:
    for path in run.glob("*/cell.json"):
        record = json.loads(path.read_text())
        if (record["method"]["row"], record["bits"]) == (row, bits):
            return path.parent
    raise AssertionError(f"no cell {row} {bits}")


def said(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    assert compare.main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def lines_of(text: str, heading: str) -> dict[str, dict[str, str]]:
    return {line["task"]: line for line in table(text, heading)}


def lose(folder: Path, task: str, lost: int, gained: int) -> None:
    """Turn answers of a cell's task to wrong and to right."""
    rows = rows_of(folder, task)
    right = np.array([row["metrics"]["acc"] for row in rows])
    right[np.flatnonzero(right == 1)[:lost]] = 0
    right[np.flatnonzero(right == 0)[-gained:] if gained else []] = 1
    entry, rows = accuracy_task(right)
    rewrite(folder, task, rows, metrics=entry["metrics"])


def test_two_runs_are_compared_cell_by_cell(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = runs
    lose(cell_of(after, "rtn"), "piqa_local", lost=14, gained=2)
    text = said(capsys, before, after)
    assert text.startswith(f"A: `{before}` (4 cells)  \nB: `{after}` (4 cells)\n")
    headings = [line for line in text.splitlines() if line.startswith("**")]
    cells = ("float, w16a16", "quarot (gptq), w4a16", "rtn, w4a16")
    assert sorted(headings) == [f"**smollm2-135m-instruct, {cell}, seed 0**" for cell in cells]
    assert "- smollm2-135m-instruct, gptq, w4a16, seed 0: only in A\n" in text
    assert "- smollm2-135m-instruct, rtn, w4a4kv4, seed 0: only in B\n" in text
    assert "Both sides scored the same documents: every hash agrees." in text
    assert "No setting on record differs." in text
    lines = lines_of(text, "**smollm2-135m-instruct, rtn, w4a16, seed 0**")
    line = lines["piqa_local"]
    first, second = (
        np.array([row["metrics"]["acc"] for row in rows_of(cell_of(run, "rtn"), "piqa_local")])
        for run in runs
    )
    assert (line["n"], line["lost / gained"]) == (str(DOCUMENTS), "14 / 2")
    assert (float(line["A"]), float(line["B"])) == pytest.approx(
        (100 * first.mean(), 100 * second.mean()), abs=0.051
    )
    value, low, high = number_and_interval(line["Δ [95 %]"])
    assert value == pytest.approx(-10.0, abs=0.051)
    p = scipy.stats.binomtest(14, 16).pvalue
    assert float(line["p"]) == pytest.approx(p, rel=0.05)
    assert float(line["p (Holm)"]) == pytest.approx(15 * p, rel=0.05), "three cells of five tasks"
    assert low < value < high < 0 and line["Δ [95 %]"][-1] != "*", "15 comparisons leave no mark"
    assert lines["boolq_local"]["Δ [95 %]"].startswith("+0.0 [")
    assert lines["perplexity_news"]["Δ [95 %]"] == "+0.0000 [+0.0000, +0.0000]"
    assert "corrected for the 15 comparisons here" in text


def test_two_cells_are_compared_as_they_are(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before, _ = runs
    cells = [cell_of(before, row) for row in ("quarot (gptq)", "gptq")]
    text = said(capsys, *cells)
    assert f"A: `{cells[0]}` (smollm2-135m-instruct, quarot (gptq), w4a16, seed 0)  \n" in text
    lines = lines_of(text, text.splitlines()[1])
    assert list(lines) == [
        "perplexity_wikipedia",
        "perplexity_news",
        "boolq_local",
        "piqa_local",
        "mmlu_local",
    ]
    a, b = (rows_of(cell, "perplexity_wikipedia") for cell in cells)
    change = sum(y["nll"] - x["nll"] for x, y in zip(a, b, strict=True)) / sum(x["tokens"] for x in a)
    line = lines["perplexity_wikipedia"]
    value, low, high = number_and_interval(line["Δ [95 %]"])
    assert value == pytest.approx(change, abs=6e-4) and low < value < high
    assert float(line["B"]) / float(line["A"]) == pytest.approx(np.exp(change), rel=2e-3)
    gold = [np.array([row["choices"][row["gold"]] for row in rows_of(cell, "mmlu_local")]) for cell in cells]
    moved = float((gold[1] - gold[0]).mean())
    assert float(lines["mmlu_local"]["Δ right answer"].split(" ± ")[0]) == pytest.approx(moved, abs=6e-4)
    settings = {line["setting"]: (line["A"], line["B"]) for line in table(text, "Settings that differ:")}
    assert settings["method"] == ("quarot:rounding=gptq", "gptq")
    assert "bits" not in settings


def test_a_cell_is_named_by_the_start_of_its_id(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = runs
    folder = cell_of(before, "rtn")
    by_prefix = said(capsys, f"{before}:{folder.name[:9]}", cell_of(after, "rtn"))
    by_folder = said(capsys, folder, cell_of(after, "rtn"))
    assert by_prefix.splitlines()[2:] == by_folder.splitlines()[2:]
    by_file = said(capsys, folder / "cell.json", cell_of(after, "rtn") / "cell.json")
    assert by_file.splitlines()[2:] == by_folder.splitlines()[2:]
    assert "0 cells of" in said(capsys, f"{before}:", folder, status=2), "an empty prefix names none"
    message = said(capsys, f"{before}:zz", folder, status=2)
    assert message == f"error: {before}:zz: 0 cells of {before} begin with 'zz'; name exactly one\n"


def test_swapping_sides_swaps_signs(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before, after = runs
    lose(cell_of(after, "rtn"), "boolq_local", lost=9, gained=3)
    cells = (cell_of(before, "gptq"), cell_of(after, "rtn"))
    there, back = (
        json.loads(said(capsys, *order, "--json"))["comparisons"] for order in (cells, cells[::-1])
    )
    for one, other in zip(there, back, strict=True):
        assert one["difference"]["value"] == -other["difference"]["value"]
        assert one["difference"]["interval"] == pytest.approx(
            [-x for x in other["difference"]["interval"][::-1]]
        )
        assert one["difference"]["p"] == pytest.approx(other["difference"]["p"], abs=2e-4)
        assert (one["lost"], one["gained"]) == (other["gained"], other["lost"])
        assert (one["a"], one["b"]) == (other["b"], other["a"])


def test_json_says_the_same(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before, after = runs
    lose(cell_of(after, "rtn"), "piqa_local", lost=14, gained=2)
    edit(cell_of(after, "rtn"), lambda record: record["environment"].update(threads=1))
    found = json.loads(said(capsys, before, after, "--json"))
    assert len(found["comparisons"]) == 15
    line = next(x for x in found["comparisons"] if x["task"] == "piqa_local" and "rtn" in x["names"][0])
    assert (line["test"], line["lost"], line["gained"], line["n"]) == ("McNemar exact", 14, 2, DOCUMENTS)
    assert line["difference"]["p"] == pytest.approx(scipy.stats.binomtest(14, 16).pvalue)
    assert line["p_holm"] == pytest.approx(15 * line["difference"]["p"])
    assert found["same_documents"] is True
    assert found["settings"] == {"threads": ["2", "1"]}
    assert len(found["not_compared"]) == 2


def test_settings_that_differ_are_named(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before, after = runs
    for path in after.glob("*/cell.json"):
        edit(path.parent, lambda record: record["environment"].update(torch="2.14.0", threads=8))
        edit(path.parent, lambda record: record["measured"].update(commit="f11"))
    folder = cell_of(after, "rtn")
    edit(folder, lambda record: record.update(calibration={"name": "c4", "samples": 64}))
    rows = rows_of(folder, "mmlu_local")
    rows[0]["prompt_hash"] = "shorter"
    rewrite(folder, "mmlu_local", rows, protocol="five-shot")
    settings = {
        line["setting"]: (line["A"], line["B"])
        for line in table(said(capsys, before, after), "Settings that differ:")
    }
    assert settings == {
        "torch": ("2.13.0", "2.14.0"),
        "threads": ("2", "8"),
        "calibration.name": ("boolq", "c4"),
        "calibration.samples": ("32", "64"),
        "calibration.length": ("512", "–"),
        "calibration.sha256": ("cd" * 32, "–"),
        "protocol of mmlu_local": ("zero-shot, log-likelihood", "five-shot"),
        "prompts of mmlu_local": ("–", f"1 of {DOCUMENTS} differ"),
        "commit": ("f00", "f11"),
    }


def other_documents(folder: Path) -> None:
    rows = rows_of(folder, "piqa_local")
    rows[5]["doc_hash"] = "another"
    rewrite(folder, "piqa_local", rows)


def fewer_documents(folder: Path) -> None:
    rewrite(folder, "piqa_local", rows_of(folder, "piqa_local")[:100])


def other_passages(folder: Path) -> None:
    rows = rows_of(folder, "perplexity_news")
    rows[0]["tokens"] += 1
    rewrite(folder, "perplexity_news", rows)


def other_data(folder: Path) -> None:
    edit(folder, lambda record: record["tasks"]["piqa_local"].update(data="b"))


def damaged(folder: Path) -> None:
    path = folder / "samples" / "piqa_local.jsonl"
    path.write_text(path.read_text().replace("hash3", "hash33", 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_documents,
            "piqa_local: B cannot be compared with A as its reference: doc_hash differs at doc_id (35,)",
        ),
        (
            fewer_documents,
            "20 of 120 in the reference alone, 0 of 100 not in it (doc_id: 700, 707, 714 and 17 more)",
        ),
        (other_passages, "tokens differs at window, passage (0, 0)"),
        (other_data, "piqa_local: B cannot be compared with A as its reference: the scored documents differ"),
        (damaged, "piqa_local.jsonl is damaged: its sha256 is not the record's"),
    ],
)
def test_other_documents_are_refused(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    before, after = runs
    edit(cell_of(before, "rtn"), lambda record: record["tasks"]["piqa_local"].update(data="a"))
    edit(cell_of(after, "rtn"), lambda record: record["tasks"]["piqa_local"].update(data="a"))
    change(cell_of(after, "rtn"))
    for sides in (runs, [cell_of(run, "rtn") for run in runs]):
        error = said(capsys, *sides, status=2)
        assert error.startswith("error: ") and error.count("\n") == 1
        assert message in error


def test_what_is_missing_is_said_and_the_rest_compared(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = runs
    edit(cell_of(after, "rtn"), lambda record: record["tasks"].pop("boolq_local"))
    broken = cell_of(after, "float", "w16a16") / "cell.json"
    broken.write_text(broken.read_text().replace("llama", "lama"))
    rows = rows_of(cell_of(before, "quarot (gptq)"), "piqa_local")
    rows[2]["gold"] = None
    rewrite(cell_of(before, "quarot (gptq)"), "piqa_local", rows)
    twice = cell_of(before, "rtn")
    text = said(capsys, before, after)
    assert "- smollm2-135m-instruct, rtn, w4a16, seed 0, boolq_local: not finished in B\n" in text
    assert f"- B, {broken.parent.name}: unreadable cell.json: damaged: its sha256" in text
    assert "piqa_local, right answers: no right answer among the choices of doc_id 14" in text
    lines = lines_of(text, "**smollm2-135m-instruct, quarot (gptq), w4a16, seed 0**")
    assert (lines["piqa_local"]["Δ right answer"], lines["piqa_local"]["lost / gained"]) == ("–", "0 / 0")
    shutil.copytree(twice, twice.parent / ("0" * 16))
    assert "rtn, w4a16, seed 0: 2 cells in A, 1 in B; compare two of them by their ids" in said(
        capsys, before, after
    )


def test_clustered_questions_are_said_to_be(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for run in runs:
        rows = rows_of(cell_of(run, "rtn"), "boolq_local")
        for place, row in enumerate(rows):
            row["cluster"] = f"text {place // 3}"
        rewrite(cell_of(run, "rtn"), "boolq_local", rows)
    text = said(capsys, *(cell_of(run, "rtn") for run in runs))
    assert "\n\nboolq_local: questions share texts, so the answers to one text change sign together" in text


def test_other_metrics_are_said_to_be_compared_by_t(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "paired t" not in said(capsys, *runs)
    rng, values = np.random.default_rng(0), []
    for run in runs:
        rows = rows_of(cell_of(run, "rtn"), "piqa_local")
        values.append(rng.random(len(rows)))
        for row, value in zip(rows, values[-1], strict=True):
            row["metrics"] = {"f1": value}
        metrics = {"f1": {"value": values[-1].mean(), "stderr": 0.02, "higher_is_better": True}}
        rewrite(cell_of(run, "rtn"), "piqa_local", rows, metrics=metrics, primary_metric="f1")
    text = said(capsys, *(cell_of(run, "rtn") for run in runs))
    assert "\n\npiqa_local: neither right or wrong nor perplexity, so the means are compared" in text
    p = scipy.stats.ttest_rel(*values).pvalue
    assert float(lines_of(text, text.splitlines()[1])["piqa_local"]["p"]) == pytest.approx(p, rel=0.05)


def test_what_the_system_refuses_is_one_line(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    error = said(capsys, *runs, status=2)
    assert error.startswith("error: Permission denied (") and error.count("\n") == 1


def test_mistakes_are_one_line_and_exit_2(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before, after = runs
    cell = cell_of(before, "rtn")
    (tmp_path / "empty").mkdir()
    write_cell(tmp_path / "other", "rtn", "w4a16", model={"name": "own", "label": "fp32", "sha256": "1"})
    for sides, message in (
        ((before, cell), "is a run and"),
        ((tmp_path / "absent", after), "there is no such folder"),
        ((before, tmp_path / "empty"), "holds no <cell id>/cell.json"),
        ((before, tmp_path / "other"), "have no finished task of the same cell in common"),
    ):
        error = said(capsys, *sides, status=2)
        assert error.startswith("error: ") and error.count("\n") == 1
        assert message in error
    edit(cell, lambda record: record.update(schema=1))
    assert "schema 1, this version reads 2" in said(capsys, cell, cell, status=2)
