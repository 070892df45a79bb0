"""The study's commands on a small model: each leaves what the next one needs and goes on where it stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

from harness import environment
from kernels import recorded
from methods.errors import NotApplicableError, UserError
from tests.training import small_data
from training import overhead, study, tables
from training.recipe import SHAPES, Rates
from training.tokens import Data
from training.trainer import MODEL, NotFiniteError, Trainer

SHARED = ("--shape", "twin", "--batch", "4", "--length", "32", "--precision", "fp32")


@pytest.fixture(scope="module", autouse=True)
def _small_twin() -> Iterator[None]:
    with mock.patch.dict(SHAPES, twin=small_data.SHAPE):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return small_data.write(tmp_path_factory.mktemp("text") / "data")


def give(*arguments: object) -> int:
    return study.main([str(argument) for argument in arguments])


def test_the_whole_study(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "study"
    shared = ("--out", out, "--data", data.folder, *SHARED)
    assert give("run", *shared, "--tokens", 256) == 2
    assert "give the commands in their order" in capsys.readouterr().err
    assert give("rates", *shared, "--tokens", 2560, "--tried", 1e-5, 1e-2, 0.9) == 0
    rates = json.loads((out / study.RATES).read_text())
    assert rates["chosen"] == {"adam": 0.01, "muon": 0.01, "embedding": 0.01}
    assert [line["recipe"] for line in rates["tried"]] == ["adam"] * 3 + ["muon"] * 3
    beside = ("--out", tmp_path / "beside", *shared[2:])
    assert give("rates", *beside, "--tokens", 2560, "--tried", 1e-5, 1e-2, 0.9, "--beside", 2) == 0
    again = json.loads((tmp_path / "beside" / study.RATES).read_text())
    assert [line["tuning"] for line in again["tried"]] == [line["tuning"] for line in rates["tried"]]
    runs = ("--runs", "adam", "osp:1")
    assert give("run", *shared, *runs, "--tokens", 1280, "--limit", 0) == 0
    assert not (out / "adam-0").exists()
    assert give("run", *shared, *runs, "--tokens", 1280, "--limit", 500) == 0
    assert {path.name for path in out.iterdir() if (path / MODEL).is_dir()} == {"adam-0", "osp-1"}
    more = (("ffn_hadamard", "w4a4kv4"),)
    with mock.patch.object(tables, "EVERY", (("rtn", "w4a4"),)), mock.patch.object(tables, "MORE", more):
        assert give("tables", *shared, *runs, "--windows", 3) == 0
    found = {
        name: json.loads((out / name / study.TABLES).read_text())["cells"] for name in ("adam-0", "osp-1")
    }
    specs = {name: [cell["spec"] for cell in cells] for name, cells in found.items()}
    assert specs == {
        "adam-0": ["float", "rtn", "ffn_hadamard"],
        "osp-1": ["float", "osp", "osp+ffn_hadamard"],
    }
    before = json.loads((out / "osp-1" / study.TABLES).read_text())
    del before["commit"]  # as earlier ones wrote it
    (out / "osp-1" / study.TABLES).write_text(json.dumps(before))
    with mock.patch.object(tables, "measure", side_effect=AssertionError("measured again")):
        assert give("tables", *shared, *runs) == 0
    assert give("overhead", "--out", out, *SHARED, "--vocabulary", 60) == 0
    assert give("collect", "--out", out, "--data", data.folder, *runs, "--to", tmp_path / "all.json.xz") == 0
    whole = recorded.read(tmp_path / "all.json.xz")
    assert set(whole["runs"]) == {"adam-0", "osp-1"}
    assert all(run["finished"] and run["probes"] and run["log"] for run in whole["runs"].values())
    assert [step["recipe"] for step in whole["overhead"]["steps"]] == ["adam", "muon", "osp"]
    for name, cells in found.items():
        collected = whole["tables"]["models"][name]
        assert [cell["spec"] for cell in collected] == specs[name]
        for cell, short in zip(cells, collected, strict=True):
            for text, nll in cell["nll"].items():
                assert short["nll"][text] == pytest.approx(nll, rel=1e-5)
    assert whole["data"]["vocabulary"] == data.vocabulary
    parts = (whole["rates"], whole["overhead"], *(run["commands"][0] for run in whole["runs"].values()))
    assert {part["commit"] for part in parts} == {environment.commit()}
    assert whole["tables"]["commits"] == [environment.commit(), None]
    assert all(
        command.startswith("python -m training.study tables") for command in whole["tables"]["commands"]
    )


def test_rates_that_do_not_converge(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ("--out", tmp_path, "--data", data.folder, *SHARED, "--tokens", 1280)
    diverged = NotFiniteError("the loss is not finite")
    with mock.patch.object(Trainer, "train", side_effect=diverged):
        assert give("rates", *shared, "--tried", 0.1, 0.2) == 2
    assert "adam: no rate of [0.1, 0.2] converges" in capsys.readouterr().err
    with mock.patch.object(Trainer, "train", side_effect=UserError("the disk is full")):
        assert give("rates", *shared, "--tried", 0.1) == 2
    assert "the disk is full" in capsys.readouterr().err, "no other fault is taken for a rate too high"


def test_side_by_side_mistakes_and_deaths_get_one_line(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ("--out", tmp_path, "--data", data.folder, *SHARED, "--tokens", 1280, "--tried", 0.01)
    assert give("rates", *shared, "--beside", 0) == 2
    assert capsys.readouterr().err == "error: --beside 0: give 1 or more\n"
    with mock.patch.object(study.ProcessPoolExecutor, "map", side_effect=BrokenProcessPool):
        assert give("rates", *shared, "--beside", 2) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: a run of adam was killed") and len(said.splitlines()) == 1


def test_likelihoods_are_those_of_transformers(data: Data, tmp_path: Path) -> None:
    run = small_data.trainer(tmp_path / "run", data, small_data.settings("adam", 20, rates=Rates(0.01)))
    assert run.train()
    cells = tables.measure(
        tmp_path / "run" / MODEL,
        data,
        [("gptq", "w4a16"), ("rtn", "w4a4kv4")],
        torch.device("cpu"),
        windows=3,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / MODEL, dtype=torch.float32)
    for text in tables.TEXTS:
        ids = data.windows(text, run.settings.length, 3)
        with torch.no_grad():
            expected = [31 * float(model(row[None], labels=row[None]).loss) for row in ids]
        assert cells[0]["nll"][text] == pytest.approx(expected, rel=1e-5)
        float_, gptq, rtn = (sum(cell["nll"][text]) for cell in cells)
        assert float_ < rtn
        assert not math.isclose(float_, gptq)
    with pytest.raises(NotApplicableError):
        tables.measure(tmp_path / "run" / MODEL, data, [("osp", "w4a4")], torch.device("cpu"), windows=1)


def test_steps_are_timed_at_any_shape() -> None:
    given = [small_data.settings(recipe, 1) for recipe in ("adam", "osp")]
    adam, osp = overhead.time_steps(given, 50, torch.device("cpu"), repeats=3, warm=1)
    assert [adam["recipe"], osp["recipe"]] == ["adam", "osp"]
    assert adam["micro_tokens"] == osp["micro_tokens"] == 8 * 32
    for batch in overhead.BATCHES:
        expected = osp["pass_seconds"] * batch / 256 + osp["update_seconds"]
        assert osp["seconds"][str(batch)] == pytest.approx(expected)
    # Adam keeps two numbers a parameter, Muon one.
    hidden = small_data.SHAPE.layers * (4 * 32 * 32 + 3 * 32 * 48)
    assert adam["state_bytes"] > 8 * (hidden + 2 * 50 * 32)
    assert 4 * hidden < osp["state_bytes"] < adam["state_bytes"]


def test_too_little_memory_for_steps_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.object(overhead, "time_steps", side_effect=torch.OutOfMemoryError):
        assert give("overhead", "--out", tmp_path, *SHARED) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: cpu has too little memory") and len(said.splitlines()) == 1


def test_recipes_take_turns_to_be_timed() -> None:
    """What slows a device down while recipes are timed is no recipe's alone."""
    order: list[str] = []

    def measured(one: Any, action: Callable[[], object], device: torch.device) -> float:
        action()
        order.append(one.settings.recipe)
        return float(len(order))

    given = [small_data.settings(recipe, 1) for recipe in ("adam", "muon")]
    with mock.patch.object(overhead, "_measured", measured):
        adam, muon = overhead.time_steps(given, 50, torch.device("cpu"), repeats=3, warm=0)
    assert order == ["adam", "muon"] * 6
    assert (adam["pass_seconds"], muon["pass_seconds"]) == (3, 4), "medians of the first six"
    assert (adam["update_seconds"], muon["update_seconds"]) == (9, 10)


def test_a_limit_between_runs_is_kept(data: Data, tmp_path: Path) -> None:
    out = tmp_path / "study"
    out.mkdir()
    (out / study.RATES).write_text(json.dumps({"chosen": {"adam": 0.01, "muon": 0.01, "embedding": 0.01}}))
    shared = ("--out", out, "--data", data.folder, *SHARED, "--runs", "adam", "muon", "--tokens", 256)
    with mock.patch.object(Trainer, "train", return_value=False) as train:
        assert give("run", *shared, "--limit", 100) == 0
    assert train.call_count == 1, "a run that ran out of time ends the command"
    assert 0 < train.call_args.args[0] <= 100
