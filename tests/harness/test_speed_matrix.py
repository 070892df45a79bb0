"""`python -m harness.speed --shape`: what is measured, in what order, and what a record says, never how long
it took."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from harness import speed, speed_bench, speed_matrix, speed_passes, speed_report
from harness.power import COUNTER, Meter
from harness.speed_bench import Bench
from harness.speed_matrix import Options, units
from harness.speed_passes import Pass, capacity, decode_pass, groups
from harness.speed_targets import Target, judge
from kernels import svg
from kernels.timing import Limits
from methods.decoder import Decoder
from tests.harness.small_shape import ARGUMENTS, FORMS, SMALL, make_small, measured


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return measured(tmp_path_factory.mktemp("speed"))


def places(rows: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    return list(dict.fromkeys((row["phase"], row["batch"], row["context"]) for row in rows))


def test_every_form_is_measured_everywhere(record: dict[str, Any]) -> None:
    rows = record["results"]
    assert places(rows) == [
        *(("decode", 1, 8), ("prefill", 2, 12), ("decode", 1, 16), ("decode", 2, 8), ("decode", 2, 16)),
        *(("prefill", 1, 8), ("prefill", 1, 16), ("prefill", 2, 8), ("prefill", 2, 16)),
    ]
    for place in places(rows):
        own = [row for row in rows if (row["phase"], row["batch"], row["context"]) == place]
        assert [row["form"] for row in own] == list(FORMS)
        for row in own:
            assert (
                row["reason"] is None and len(row["seconds"]) == 2 and min(row["seconds"]) > 0 < row["floor"]
            )
            assert row["tokens_per_second"] > 0 and row["of_floor"] > 0 and not row["apart"]
            assert row["joules_per_token"] is None and row["peak"] is None, "of a GPU"
        assert own[0]["speed"] == 1 and own[0]["online"] == "none"
    assert record["not_run"] == [] and record["targets"] == [] and record["energy"] is None
    assert record["shapes"]["small"]["hidden_size"] == SMALL.hidden_size


def test_bytes_are_counted_exactly(record: dict[str, Any]) -> None:
    rows = {(row["form"], row["phase"], row["batch"], row["context"]): row for row in record["results"]}
    # Two layers, two KV heads, keys and values, 32 channels; a code row has a scale and a zero-point.
    for form, row_bytes in {"bf16": 64, "w4a16g64": 64, "w4a8kv8": 32 + 5, "w4a4kv4": 16 + 5}.items():
        assert rows[form, "decode", 2, 16]["kv"] == 2 * 16 * 2 * 2 * 2 * row_bytes
    weights = 2 * 128 * (2 * 128 + 2 * 64 + 3 * 384)
    head, gains = 100 * 128, 5 * 128
    assert rows["bf16", "decode", 1, 8]["weights"] == 2 * (weights + head + gains)
    outputs = 2 * (3 * 128 + 2 * 64 + 2 * 384)
    assert rows["w4a4kv4", "decode", 1, 8]["weights"] == weights // 2 + 4 * outputs + 2 * (head + gains)


def test_overheads_compare_all_online_parts_of_each_integer_form(record: dict[str, Any]) -> None:
    found = [(row["form"], row["phase"], row["online"]) for row in record["overhead"]]
    assert found == [
        (form, phase, online)
        for phase in ("decode", "prefill")
        for form in ("w4a8kv8", "w4a4kv4")
        for online in (
            *("none", "quarot", "quad", "fptquant"),
            *("fptquant-scaling", "fptquant-hadamard", "fptquant-static"),
        )
    ]
    assert all(row["reason"] is None for row in record["overhead"])


def test_the_record_says_what_ran_where(record: dict[str, Any]) -> None:
    assert record["command"].startswith("python -m harness.speed --shape small")
    assert {"torch", "code", "cpu", "platform"} <= set(record["machine"])
    assert set(record["limits"]["multiply_adds_per_second"]) == {"bfloat16", "int8"}
    assert {"linear w4a4", "linear w4a16", "rmsnorm_quantise a8"} <= set(record["implementations"])
    assert len(record["seconds"]) == 9 + 4 + 2
    assert {entry["reason"] for entry in record["shares"]} == {"not known: of a GPU alone"}


def test_the_report_regenerates(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    for folder in ("one", "two"):
        assert speed_report.main([str(path), "--report", str(tmp_path / folder)]) == 0
    for name in (speed_report.REPORT, speed_report.PLOT):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    text = (tmp_path / "one" / speed_report.REPORT).read_text()
    for part in ("### small: decode", "### small: prefill", "overhead of online parts", "| w4a16g64 |"):
        assert part in text
    assert text.count("| fptquant") == 0 and text.count("static ranges (FPTQuant)") == 4


@pytest.mark.parametrize(
    "content", ["{}", "[1]", "not JSON", '{"schema": 1, "results": [{}], "machine": {}}']
)
def test_another_file_is_refused_in_one_line(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text(content)
    assert speed_report.main([str(tmp_path / "other.json"), "--report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_forms_are_held_against_the_first_that_was_timed(record: dict[str, Any]) -> None:
    others = [row for row in record["results"] if row["form"] != "bf16"]
    text = speed_report.report(record | {"results": others})
    assert "`x w4a16g64`" in text and " x w4a16g64 |" in text and "x bf16" not in text
    drawn = io.StringIO()
    speed_report.plot(record | {"results": others}, drawn)
    assert "x w4a16g64" in drawn.getvalue() and "x bf16" not in drawn.getvalue()
    assert " x bf16 |" in speed_report.report(record)


@pytest.mark.parametrize("shape", ["", "-fptquant", "-llama-3.2-1b", "-qwen2.5-7b"])
def test_the_committed_report_is_what_its_record_gives(shape: str, root: Path, tmp_path: Path) -> None:
    record = root / "results" / "reference" / f"speed-h100{shape}.json.xz"
    assert speed_report.main([str(record), "--report", str(tmp_path)]) == 0
    for name in (speed_report.REPORT, speed_report.PLOT):
        assert (tmp_path / name).read_text() == (root / "reports" / f"speed{shape}" / name).read_text()


def test_what_time_leaves_out_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(speed_matrix.time, "monotonic", lambda: float(next(clock)))
    record = measured(tmp_path, "--minutes", "0.1", "--no-overhead")
    done = places(record["results"])
    assert 0 < len(done) < 9 and done[0] == ("decode", 1, 8)
    assert len(done) + len(record["not_run"]) == 9
    assert {entry["reason"] for entry in record["not_run"]} == {"--minutes"}
    assert "| --minutes |" in speed_report.report(record)


def test_a_record_is_written_after_each_combination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = Bench.compare

    def breaks(self: Bench, forms: Any, phase: str, *given: Any) -> Any:
        if phase == "prefill":
            raise KeyboardInterrupt
        return compare(self, forms, phase, *given)

    monkeypatch.setattr(Bench, "compare", breaks)
    out = tmp_path / "speed.json"
    assert speed.main([*ARGUMENTS, "--out", str(out)]) == 130
    assert places(json.loads(out.read_text())["results"]) == [("decode", 1, 8)]


def test_what_does_not_fit_says_so_and_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_bench, "room_of", lambda device: 900_000)
    record = measured(tmp_path, "--phases", "decode", "--no-overhead", "--batch", "1", "16", "--context", "8")
    rows = {(row["form"], row["batch"]): row for row in record["results"]}
    assert rows["bf16", 1]["reason"] is None is rows["w4a4kv4", 1]["reason"]
    assert rows["bf16", 1]["apart"] is False and rows["w4a4kv4", 16]["reason"] is None
    refused = rows["bf16", 16]["reason"]
    assert refused.startswith("does not fit: weights ") and "KV cache" in refused
    assert rows["w4a4kv4", 16]["speed"] is None and rows["bf16", 16]["kv"] > 0
    assert refused in speed_report.report(record)


def test_forms_that_do_not_fit_together_are_timed_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed_bench, "room_of", lambda device: 1_000_000)
    record = measured(tmp_path, "--phases", "decode", "--no-overhead", "--batch", "1", "--context", "8")
    assert {row["form"]: row["apart"] for row in record["results"]}["w4a4kv4"] is True
    assert all(row["speed"] is not None for row in record["results"])
    assert "*" in speed_report.report(record)


def test_who_runs_out_of_memory_loses_nothing_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(decoder: Decoder, batch: int, context: int) -> Any:
        if decoder.execution == "simulate":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB. And more.")
        return decode_pass(decoder, batch, context)

    monkeypatch.setattr(speed_bench, "decode_pass", greedy)
    record = measured(tmp_path, "--phases", "decode", "--no-overhead", "--batch", "1", "--context", "8")
    reasons = {row["form"]: row["reason"] for row in record["results"]}
    assert reasons.pop("bf16") == "out of memory: CUDA out of memory"
    assert set(reasons.values()) == {None}


def test_a_prefill_that_takes_too_long_is_not_extrapolated(tmp_path: Path) -> None:
    record = measured(tmp_path, "--phases", "prefill", "--no-overhead", "--longest-prefill", "1e-9")
    assert all(row["reason"].startswith("not measured: ") and not row["seconds"] for row in record["results"])


def test_energy_is_that_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter(range(0, 10_000, 48))
    meter = Meter(COUNTER, lambda: float(next(readings)))
    limits = Limits(1e9, {torch.bfloat16: 1e9, torch.int8: 1e9})
    bench = Bench("small", SMALL, torch.device("cpu"), limits, meter, 2, 100.0, 1e-9)
    with torch.no_grad():
        decode = bench.compare([bench.form("w4a4kv4", "none")], "decode", 2, 8)
        prefill = bench.compare([bench.form("w4a4kv4", "none")], "prefill", 2, 8)
    assert decode[0].joules_per_token == 48 / (speed_passes.STEPS * 2)
    assert prefill[0].joules_per_token == 48 / 16


@pytest.mark.parametrize("phase", speed_bench.PHASES)
def test_a_pass_is_gone_before_the_next_group_of_forms_is_made(
    monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Its cache would take the room that the next one was found to have."""
    made: list[weakref.ref[Pass]] = []
    before: list[int] = []
    make = getattr(speed_bench, f"{phase}_pass")

    def counting(*arguments: Any) -> Pass:
        before.append(sum(one() is not None for one in made))
        found: Pass = make(*arguments)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(speed_bench, f"{phase}_pass", counting)
    monkeypatch.setattr(Bench, "_groups", lambda self, forms, *_: [[form] for form in forms])
    limits = Limits(1e9, {torch.bfloat16: 1e9, torch.int8: 1e9})
    bench = Bench("small", SMALL, torch.device("cpu"), limits, None, 2, 100.0, 0.0)
    forms = [bench.form(name, "none") for name in ("bf16", "w4a4kv4")]
    with torch.no_grad():
        bench.compare(forms, phase, 2, 8)
        bench.shares(forms, phase, 2, 8)
    assert before == [0, 0, 0, 0]


@pytest.mark.parametrize("context", [1, 8, 1024, 32768])
def test_all_capacities_suit_one_compilation(context: int) -> None:
    assert capacity(context) % 64 == 0 and capacity(context) > context + speed_passes.STEPS


def test_groups_hold_what_fits_in_order() -> None:
    assert groups({"a": 5, "b": 6, "c": 4, "d": 2}, 10) == [["a", "c"], ["b", "d"]]
    assert groups({"a": 5}, 10) == [["a"]] and groups({}, 10) == []


def options(**changes: Any) -> Options:
    given: dict[str, Any] = {
        "shapes": ["small"],
        "forms": FORMS,
        "batches": (8, 1),
        "contexts": (1024,),
        "phases": ("prefill", "decode"),
        "online": "none",
        "turns": 2,
        "minutes": None,
        "longest": 1.0,
        "energy": 0.0,
        "overhead": True,
        "prepare": 0,
        "commit": None,
        "out": None,
    }
    return Options(**{**given, **changes})


def test_the_most_important_comes_first() -> None:
    found = [str(unit) for unit in units(options())]
    assert found[:3] == ["decode 1 x 1024", "prefill 2 x 12", "decode 8 x 1024"]
    assert found[3] == "overhead of w4a8kv8, decode 1 x 1024"
    assert found[-2:] == ["shares of decode 1 x 1024", "shares of prefill 2 x 12"]
    assert not any(unit.phase == "prefill" for unit in units(options(phases=("decode",))))


def row(form: str, speed_: float | None, weights: int = 10) -> dict[str, Any]:
    about = {"shape": "small", "phase": "decode", "batch": 1, "context": 8, "form": form, "online": "none"}
    seconds = () if speed_ is None else (0.9 / speed_, 1.0 / speed_, 3.0 / speed_)
    return {**about, "seconds": seconds, "of_floor": 0.5, "weights": weights, "kv": 0, "eager": None}


@pytest.mark.parametrize(
    "bound, speeds, met, form",
    [
        ({"what": "speed", "least": 2.4}, (2.0, 2.5), True, "w4a4kv4 quarot"),
        ({"what": "speed", "least": 2.6}, (2.5, 2.0), False, "w4a8kv8"),
        ({"what": "speed", "least": 2.4}, (None, None), None, None),
        ({"what": "bytes", "most": 0.35}, (None, None), True, "w4a8kv8"),
    ],
)
def test_targets_are_judged_by_the_best_form(
    bound: dict[str, Any], speeds: tuple[float | None, ...], met: bool | None, form: str | None
) -> None:
    target = Target(
        "",
        shape="small",
        phase="decode",
        batch=1,
        context=8,
        forms=(("w4a8kv8", "none"), ("w4a4kv4", "quarot")),
        **bound,
    )
    rows = [row("bf16", 1.0, 100), row("w4a8kv8", speeds[0]), row("w4a4kv4", 9.0, 1)]
    overhead = [{**row("w4a4kv4", speeds[1], 90), "online": "quarot"}, row("w4a8kv8", 9.0)]
    (verdict,) = judge([*rows, *overhead], [target])
    assert (verdict.met, verdict.form) == (met, form)
    assert judge([], [target]) == []


@pytest.mark.parametrize(
    "what, met", [({"what": "speed", "least": 2.0}, None), ({"what": "bytes", "most": 0.5}, True)]
)
def test_a_baseline_without_its_graph_judges_no_time(what: dict[str, Any], met: bool | None) -> None:
    target = Target(
        "", shape="small", phase="decode", batch=1, context=8, forms=(("w4a8kv8", "none"),), **what
    )
    slow = {**row("bf16", 1.0, 100), "eager": "an operation waits"}
    (verdict,) = judge([slow, row("w4a8kv8", 2.5)], [target])
    assert verdict.met is met and verdict.value is not None
    assert (verdict.reason is None) is (met is not None)
    (verdict,) = judge(
        [slow], [replace(target, forms=(("bf16", "none"),), what="of_floor", most=None, least=0.1)]
    )
    assert verdict.met is None and verdict.reason is not None
    assert verdict.reason == "the steps of bf16 were launched by the host (an operation waits)"


def test_the_report_says_what_is_not_judged(record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU every step is launched by the host."""
    targets = tuple(
        Target(title, what, "small", "decode", 1, 8, (("w4a4kv4", "none"),), **bound)
        for title, what, bound in (("time", "speed", {"least": 1e-9}), ("size", "bytes", {"most": 1.0}))
    )
    monkeypatch.setattr(speed_report, "judge", partial(judge, targets=targets))
    time, size = [
        line for line in speed_report.report(record).splitlines() if line.startswith(("| time", "| size"))
    ]
    assert "not judged: the steps of bf16 were launched by the host (there is no GPU)" in time
    assert "yes" in size


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--shape", "llama-9"), "--shape 'llama-9': choose among llama-3-8b"),
        (("--shape", "small", "--forms", "w4b4"), "'w4b4'"),
        (("--shape", "small", "--forms", "w16a16"), "called bf16"),
        (("--shape", "small", "--online", "magic"), "--online 'magic'"),
        (("--shape", "small", "--phases", "rest"), "--phase 'rest'"),
        (("--shape", "small", "--batch", "0"), "--batch [0]"),
        (("--shape", "small", "--minutes", "0"), "--minutes 0"),
        (("--shape", "small", "--longest-prefill", "-1"), "--longest-prefill -1"),
        (("--shape", "small", "--prepare", "-1"), "--prepare -1"),
        (("--shape", "small", "--methods", "rtn"), "--methods: not with --shape"),
        (("--batch", "1"), "--batch: only with --shape"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert speed.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and said in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


BARE = """
import sys

LACKING = ("pydantic", "datasets", "lm_eval", "tabulate", "gguf", "scipy", "psutil", "yaml", "triton")

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LACKING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Lacking())
import harness.speed_report
from harness import speed
from tests.harness.small_shape import SMALL
speed.SHAPES["small"] = SMALL
arguments = "--shape small --forms bf16 w4a4kv4 --batch 1 --context 8 --phases decode --repeat 1"
sys.exit(speed.main([*arguments.split(), "--no-overhead"]))
"""


def test_a_machine_without_the_grids_libraries_can_run_it(root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BARE], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "### small: decode" in done.stdout


def test_no_panel_of_the_figure_cuts_a_speed_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first panel has the slowest."""
    rows = [
        {
            "phase": "decode",
            "shape": "small",
            "batch": batch,
            "form": "w4a4kv4",
            "context": context,
            "speed": speed,
        }
        for batch, context, speed in ((1, 8, 1.0), (1, 16, 1.1), (8, 8, 2.0), (8, 16, 3.1))
    ]
    drawn: list[Figure] = []

    def kept(figure: Figure, **_: bool) -> str:
        drawn.append(figure)
        return ""

    monkeypatch.setattr(svg, "drawn", kept)
    speed_report.plot({"results": rows}, io.StringIO())
    for axes in drawn[0].axes:
        low, high = axes.get_ylim()
        assert low == 0 and all(float(np.max(line.get_ydata())) < high for line in axes.get_lines())
