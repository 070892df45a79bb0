"""The command itself, on a small random model and the real benchmark data: what it leaves behind, and what
it says when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import cell, grid, quantising
from harness.config import load_grid
from methods.decoder import Decoder, State
from tests.harness.small_grid import TASKS, save_model, write_grid

pytestmark = pytest.mark.usefixtures("opened_once")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture
def settings(tmp_path: Path, model: str) -> Path:
    return write_grid(tmp_path / "grid.yaml", model)


def run(settings: Path, out: Path, *arguments: str) -> int:
    """In this process, where a test can reach inside; test_isolation.py runs it as users do."""
    return grid.main([str(settings), "--out", str(out), "--quiet", "--in-process", *arguments])


def records(out: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in out.glob("*/cell.json")]
    return {f"{record['method']['name']} {record['bits']} {record['seed']}": record for record in found}


def numbers(out: Path) -> dict[str, Any]:
    """All metrics and every sample of a run."""
    return {
        name: (
            {task: entry["metrics"] for task, entry in record["tasks"].items()},
            {path.name: path.read_text() for path in (out / record["id"] / "samples").iterdir()},
        )
        for name, record in records(out).items()
    }


def test_a_run_leaves_records_samples_and_a_report(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(settings, out) == 0
    printed = capsys.readouterr().out
    assert "quarot (gptq)" in printed
    assert str(out / "report.md") in printed
    report = (out / "report.md").read_text()
    assert "quarot (gptq)" in report
    found = records(out)
    assert set(found) == {"float w16a16 0", "rtn w4a4kv4 0", "quarot w4a4kv4 0"}
    record = found["quarot w4a4kv4 0"]
    assert record["status"] == "done"
    assert set(record["tasks"]) == set(TASKS)
    assert record["environment"]["threads"] == torch.get_num_threads()
    assert record["calibration"]["samples"] == 4
    assert 4 < record["effective_bits"]["weight"] < 5
    assert record["measured"]["peak_memory_bytes"] > 0
    assert len(record["diagnostics"]["kurtosis"]) == 3 * 2
    perplexity = record["tasks"]["perplexity_wikipedia"]
    assert perplexity["n"] == 3 < perplexity["available"]
    assert "windows of 64" in perplexity["protocol"]
    rows = (out / record["id"] / "samples" / "piqa_local.jsonl").read_text().splitlines()
    assert len(rows) == 3
    assert len(json.loads(rows[0])["choices"]) == 2


def test_the_same_command_gives_the_same_numbers(settings: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert run(settings, tmp_path / name) == 0
    assert numbers(tmp_path / "first") == numbers(tmp_path / "second")


def test_another_seed_gives_another_quarot_and_the_same_documents(settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(settings, out, "--seeds", "2", "--tasks", "perplexity_wikipedia") == 0
    found = records(out)
    assert set(found) == {"float w16a16 0", "rtn w4a4kv4 0", "quarot w4a4kv4 0", "quarot w4a4kv4 1"}
    first, second = (found[f"quarot w4a4kv4 {seed}"]["tasks"]["perplexity_wikipedia"] for seed in (0, 1))
    assert first["key"] == second["key"]
    assert first["metrics"] != second["metrics"]


def test_what_is_done_is_not_done_again(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(settings, out, "--tasks", "piqa_local", "asdiv_local") == 0
    before = numbers(out)
    scored: list[str] = []
    monkeypatch.setattr(cell, "run_task", _counting(cell.run_task, scored))
    assert run(settings, out) == 0
    assert scored == ["perplexity_wikipedia"] * 3
    after = numbers(out)
    for name, (metrics, samples) in before.items():
        assert {task: after[name][0][task] for task in metrics} == metrics
        assert {file: after[name][1][file] for file in samples} == samples
    monkeypatch.setattr(quantising, "quantise", _never)
    assert run(settings, out) == 0


def test_an_interrupted_run_goes_on_where_it_stopped(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(settings, tmp_path / "whole") == 0
    out = tmp_path / "out"
    scored: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(cell, "run_task", _counting(cell.run_task, scored, stop_at=5))
        assert run(settings, out) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(cell, "run_task", _counting(cell.run_task, scored))
    assert run(settings, out) == 0
    assert len(scored) == 9 + 1  # the interrupted one twice
    assert numbers(out) == numbers(tmp_path / "whole")


def test_other_documents_are_scored_and_not_taken_from_the_store(settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--methods", "rtn", "--tasks", "piqa_local", "perplexity_wikipedia")
    for limit in ("3", "2", "3"):
        assert run(settings, out, *arguments, "--limit", limit) == 0
        found = records(out)["rtn w4a4kv4 0"]["tasks"]
        assert {task["n"] for task in found.values()} == {int(limit)}
    assert len(list(out.glob("*/cell.json"))) == 1


def test_the_order_of_a_records_tasks_is_the_grids(settings: Path, tmp_path: Path) -> None:
    """However it came about: here the first task is made again after the others."""
    out = tmp_path / "out"
    assert run(settings, out, "--methods", "rtn") == 0
    (path,) = out.glob("*/cell.json")
    before = json.loads(path.read_text())
    (path.parent / "samples" / "perplexity_wikipedia.jsonl").write_text("{}")
    assert run(settings, out, "--methods", "rtn") == 0
    after = json.loads(path.read_text())
    assert json.dumps(after["tasks"]) == json.dumps(before["tasks"])
    assert list(after["tasks"]) == list(TASKS)


def test_a_folder_that_cannot_be_is_one_line(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    assert run(settings, tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_damaged_record_is_made_again(settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(settings, out, "--tasks", "piqa_local") == 0
    before = numbers(out)
    damaged = records(out)["rtn w4a4kv4 0"]["id"]
    (out / damaged / "cell.json").write_text('{"schema": 1, "tas')
    missing = records_except(out, damaged)
    (out / missing / "samples" / "piqa_local.jsonl").unlink()
    assert run(settings, out, "--tasks", "piqa_local") == 0
    assert numbers(out) == before


def records_except(out: Path, name: str) -> str:
    return next(path.parent.name for path in sorted(out.glob("*/cell.json")) if path.parent.name != name)


def test_a_cell_that_cannot_run_is_recorded_and_the_rest_goes_on(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ("--tasks", "piqa_local", "--methods", "rtn", "--bits", "w4a16g104", "w4a16")
    assert run(settings, out, *arguments) == 1
    assert "group size 104" in capsys.readouterr().out
    found = records(out)
    failed = found["rtn w4a16g104 0"]
    assert failed["status"] == "failed"
    assert failed["failure"]["stage"] == "quantise"
    assert "group size 104" in failed["failure"]["message"]
    assert found["rtn w4a16 0"]["status"] == "done"
    assert "group size 104" in (out / "report.md").read_text()


def test_a_method_that_is_for_other_models_is_not_applicable(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ("--tasks", "piqa_local", "--methods", "float", "osp", "osp+ffn_hadamard")
    assert run(settings, out, *arguments) == 0, "no failure"
    assert "incomplete" not in capsys.readouterr().err
    found = records(out)
    failure = found["osp w4a4kv4 0"]["failure"]
    assert failure["kind"] == "not_applicable"
    report = (out / "report.md").read_text()
    assert "### Not applicable" in report
    assert f"| {failure['message']}" in report
    assert failure["message"].startswith("osp needs a model of outlier-safe pre-training, and the gains of")


def test_a_task_that_breaks_is_recorded_and_retried_on_request(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(cell, "run_task", _breaking(cell.run_task, "piqa_local"))
        assert run(settings, out, "--methods", "rtn") == 1
    record = records(out)["rtn w4a4kv4 0"]
    assert record["status"] == "partial"
    assert record["tasks"]["piqa_local"]["failure"]["kind"] == "ZeroDivisionError"
    assert record["tasks"]["asdiv_local"]["status"] == "done"
    assert run(settings, out, "--methods", "rtn") == 1  # not again by itself
    assert run(settings, out, "--methods", "rtn", "--retry-failed") == 0


@pytest.mark.parametrize("where", ["logits", "embed"])
def test_numbers_that_are_not_finite_are_failures(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Planted in the logits or in the residual stream, where the diagnostics see it, too."""
    out = tmp_path / "out"
    whole = getattr(Decoder, where)

    def broken(self: Decoder, *arguments: Any) -> Any:
        result = whole(self, *arguments)
        return State(result.stream * float("nan")) if isinstance(result, State) else result * float("nan")

    monkeypatch.setattr(Decoder, where, broken)
    assert (
        run(settings, out, "--methods", "rtn", "float", "--tasks", "perplexity_wikipedia", "piqa_local") == 1
    )
    found = records(out)
    assert set(found) == {"float w16a16 0", "rtn w4a4kv4 0"}
    for record in found.values():
        for task in record["tasks"].values():
            assert "not finite" in task["failure"]["message"]
    assert (out / "report.md").is_file()


def test_other_tasks_of_a_cell_stay_when_the_list_changes(settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(settings, out, "--methods", "rtn", "--tasks", "piqa_local", "perplexity_wikipedia") == 0
    before = records(out)["rtn w4a4kv4 0"]
    assert run(settings, out, "--methods", "rtn", "--tasks", "piqa_local", "asdiv_local") == 0
    after = records(out)["rtn w4a4kv4 0"]
    assert set(after["tasks"]) == {"piqa_local", "perplexity_wikipedia", "asdiv_local"}
    assert after["tasks"]["perplexity_wikipedia"] == before["tasks"]["perplexity_wikipedia"]
    report = (out / "report.md").read_text()
    assert "asdiv_local" in report
    assert "perplexity wikipedia" not in report


def test_a_methods_own_calibration_size_holds_against_the_grids(settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    methods = ("gptq", "gptq:samples=2;length=16", "gptq:preset=paper;samples=3;length=24")
    assert run(settings, out, "--tasks", "piqa_local", "--methods", *methods) == 0
    shapes = {
        record["method"]["spec"]: (record["calibration"]["samples"], record["calibration"]["length"])
        for record in (json.loads(path.read_text()) for path in out.glob("*/cell.json"))
    }
    assert shapes == dict(zip(methods, [(4, 32), (2, 16), (3, 24)], strict=True))


def test_a_trial_does_not_replace_the_grids_own_run(settings: Path) -> None:
    plain = load_grid(settings, {})
    trial = load_grid(settings, {"limit": 5})
    assert grid.run_name(plain, False) == "grid"
    assert grid.run_name(trial, True) not in ("grid", grid.run_name(plain, True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "quarott"], "did you mean 'quarot'"),
        (["--methods", "quarot+quarot"], "both transform"),
        (["--methods", "rtn:rounding=nearest"], "rtn, gptq"),
        (["--bits", "w4"], "w4a4kv4"),
        (["--models", "no-such-model"], "smollm2-135m-instruct"),
        (["--tasks", "piqa_locl"], "did you mean 'piqa_local'"),
        (["--tasks", "humaneval"], "executes code"),
        (["--limit", "0"], "limit"),
        (["--time-limit", "0"], "time_limit"),
        (["--time-limit", "inf"], "time_limit"),
        (["--limit", "-3"], "limit"),
        (["--seeds", "0"], "seeds"),
        (["--device", "abacus"], "cpu, cuda"),
        (["--calibration", "no-such-text"], "no-such-text"),
        (["--dtype", "int4"], "float32"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert run(settings, tmp_path / "out", *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert words in lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(settings, tmp_path / "out", "--device", "cuda") == 2
    assert "no usable CUDA GPU" in capsys.readouterr().err


def test_a_missing_grid_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert grid.main([str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_list_runs_nothing(settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(settings, tmp_path / "out", "--list") == 0
    printed = capsys.readouterr().out
    assert "quarot w4a4kv4 seed 0" in printed
    assert "3 cells" in printed
    assert not (tmp_path / "out").exists()


def _counting(original: Any, scored: list[str], stop_at: int | None = None) -> Any:
    def run_task(decoder: Any, checkpoint: Any, plan: Any, *rest: Any, **named: Any) -> Any:
        scored.append(plan.name)
        if len(scored) == stop_at:
            raise KeyboardInterrupt
        return original(decoder, checkpoint, plan, *rest, **named)

    return run_task


def _breaking(original: Any, name: str) -> Any:
    def run_task(decoder: Any, checkpoint: Any, plan: Any, *rest: Any, **named: Any) -> Any:
        if plan.name == name:
            raise ZeroDivisionError("planted")
        return original(decoder, checkpoint, plan, *rest, **named)

    return run_task


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this cell was done before")
