"""The benchmark of whole decoders: what it runs, writes and refuses, never how long that took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import speed
from kernels import timing
from kernels.timing import Timing
from methods.errors import UserError
from tests.harness.small_grid import save_model

METHOD = "quarot:rounding=rtn"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "STREAMED_BYTES", 1 << 12)
    monkeypatch.setattr(timing, "MATRIX", {"cpu": 16})


def run(model: str, *arguments: str) -> int:
    return speed.main(["--model", model, "--tokens", "12", "--repeat", "2", *arguments])


def measured(model: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "made" / "speed.json"
    assert run(model, "--out", str(out), *arguments) == 0
    record: dict[str, Any] = json.loads(out.read_text())
    return record


def test_all_decoders_are_timed_in_both_phases(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--methods", "rtn", METHOD, "--bits", "w4a16", "w4a4kv4", "--threads", "1")
    record = measured(model, tmp_path, *arguments)
    subjects = [("float", "w16a16", "float")]
    for method in ("rtn", METHOD):
        for bits in ("w4a16", "w4a4kv4"):
            subjects += [(method, bits, "simulate"), (method, bits, "int4")]
    found = [(row["phase"], row["method"], row["bits"], row["execution"]) for row in record["results"]]
    assert found == [(phase, *subject) for phase in ("prefill", "decode") for subject in subjects]
    for row in record["results"]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0 < row["floor"]
        assert row["execution"] != "float" or row["ratio"] == 1
        assert row["tokens"] == (12 if row["phase"] == "prefill" else speed.DECODED)
    printed = capsys.readouterr().out
    for line in ("prefill, 12 tokens", "decode, each token", "1 thread,", "2 turns"):
        assert line in printed
    assert printed.count(f"| {METHOD} ") == 8


def test_the_record_says_what_ran_where(model: str, tmp_path: Path) -> None:
    record = measured(model, tmp_path)
    assert record["command"].startswith("python -m harness.speed --model ")
    assert record["model"]["name"] == model and len(record["model"]["sha256"]) == 64
    assert record["machine"]["threads"] == torch.get_num_threads() and record["machine"]["load"] >= 0
    assert set(record["machine"]["multiply_adds_per_second"]) == {"float32", "int8"}
    assert "commit" in record
    assert {"linear w4a4", "kv_attention kv4", "rmsnorm_quantise a4"} <= set(record["implementations"])


def test_the_number_of_threads_is_put_back(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads that there are no free cores for make everything slow, so none are made.
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    assert run(model, "--threads", "7", "--bits", "w4a16") == 0
    assert numbers == [7, torch.get_num_threads()]


def test_work_is_that_of_linears_attention_and_head(model: str, tmp_path: Path) -> None:
    record = measured(model, tmp_path)
    rows = {(row["phase"], row["execution"]): row for row in record["results"]}
    # hidden 72, intermediate 192, 4 heads and 2 KV heads of 32, 3 layers, a window of 5 positions.
    weights = 3 * (72 * 128 * 2 + 72 * 64 * 2 + 3 * 72 * 192)
    channels = 3 * (128 + 2 * 64 + 72 + 2 * 192 + 72)  # outputs of linears, each with a scale
    head = 72 * vocabulary(Path(model))
    seen = sum(min(5, position + 1) for position in range(12))
    attention = 3 * 2 * 4 * 32
    steps = speed.DECODED

    prefill = rows["prefill", "float"]
    assert prefill["multiply_adds"] == {"float32": 12 * weights + head + attention * seen}
    cached = 3 * 2 * 2 * 32 * 5  # keys and values within the window, in values
    assert prefill["bytes"] == 4 * (weights + head + cached)
    decode = rows["decode", "float"]
    assert decode["multiply_adds"] == {"float32": steps * (weights + head + attention * 5)}
    assert decode["bytes"] == steps * 4 * (weights + head + cached)
    for phase in ("prefill", "decode"):
        simulated = rows[phase, "simulate"]
        assert simulated["multiply_adds"] == rows[phase, "float"]["multiply_adds"]
        assert simulated["bytes"] == rows[phase, "float"]["bytes"]

    packed = rows["decode", "int4"]
    assert packed["multiply_adds"] == {"float32": steps * (head + attention * 5), "int8": steps * weights}
    # A position of a head: 32 codes in 16 bytes, a float32 scale, a zero-point of a byte.
    rows_bytes = 3 * 2 * 2 * 5 * (16 + 4 + 1)
    assert packed["bytes"] == steps * (weights // 2 + 4 * channels + 4 * head + rows_bytes)


def vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def test_weight_only_products_are_float(model: str, tmp_path: Path) -> None:
    record = measured(model, tmp_path, "--methods", "rtn", "--bits", "w4a16")
    assert all(set(row["multiply_adds"]) == {"float32"} for row in record["results"])


def test_a_method_that_learns_gets_tokens(model: str, tmp_path: Path) -> None:
    record = measured(model, tmp_path, "--methods", "quarot:samples=2;length=8")  # rounds by gptq
    assert len(record["results"]) == 6


def test_a_bound_that_can_be_run(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--at-most", "1e9") == 0
    assert capsys.readouterr().err == ""
    assert run(model, "--at-most", "1e-9") == 1
    captured = capsys.readouterr()
    assert "### prefill" in captured.out
    assert captured.err.count("\n") == 1
    assert f"{METHOD} w4a4kv4: the simulated prefill costs" in captured.err


def test_the_bound_is_on_simulated_prefills() -> None:
    def result(phase: str, execution: str, ratio: float) -> speed.Result:
        return speed.Result(phase, "rtn", "w4a4", execution, 1, (1.0,), ratio, 1.0, 1, {})

    results = [
        result("prefill", "float", 1.0),
        result("prefill", "simulate", 2.0),
        result("prefill", "int4", 9.0),
        result("decode", "simulate", 9.0),
    ]
    assert speed.too_slow(results, 2.0) == []
    assert len(speed.too_slow(results, 1.99)) == 1


def test_decoded_times_are_shown_for_each_token() -> None:
    seconds = (0.8, 1.6, 0.8)
    rows = [
        speed.Result(phase, "float", "w16a16", "float", tokens, seconds, 1.0, 0.4, 1, {})
        for phase, tokens in (("prefill", 32), ("decode", 8))
    ]
    prefill, decode = speed.markdown(rows).split("### decode")
    for text in ("800 ms", "1.60 s", "400 ms", "40.0", "2.00"):
        assert text in prefill
    for text in ("100 ms", "200 ms", "50.0 ms", "10.0", "2.00"):
        assert text in decode
    assert Timing(seconds).median == 0.8


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--methods", "quarto"), "quarto"),
        (("--methods", "float"), "timed in any case"),
        (("--bits", "w4b4"), "'w4b4'"),
        (("--bits", "w16a16"), "timed in any case"),
        (("--tokens", "0"), "--tokens 0"),
        (("--tokens", "4000"), "room for 2040 at most"),
        (("--repeat", "0"), "--repeat 0"),
        (("--threads", "0"), "--threads 0"),
        (("--at-most", "0"), "--at-most 0"),
        (("--at-most", "nan"), "--at-most nan"),
        (("--device", "abacus"), "'abacus'"),
        (("--model", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_a_mistake_is_one_line(
    model: str, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and said in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_a_file_that_cannot_be_written_is_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("")
    assert run(model, "--out", str(tmp_path / "taken" / "speed.json")) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_a_foreign_distribution_stops_it_first(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise UserError("the installed distribution 'kernels' is in the way")

    monkeypatch.setattr(speed, "refuse_foreign_kernels", refuse)
    assert run(model) == 2
    assert "in the way" in capsys.readouterr().err
