"""The GPU benchmark on a CPU: what takes part, what rotates, what is written; the clock and the graphs are
stand-ins.

The kernels are stand-ins too: the reference under their names.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import bench, contests, gpu_bench, gpu_contests, peers, reference, timing, tuning
from kernels.contests import Shape
from kernels.timing import Limits, Replay, Timing, sets_needed

TINY = Shape(hidden=256, intermediate=512, heads=2, kv_heads=1, head_dim=128)
CPU = torch.device("cpu")
LIMITS = Limits(1e9, {torch.bfloat16: 1e9, torch.int8: 2e9})
L2 = 1 << 16


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(contests.SHAPES, "llama-3-8b", TINY)
    monkeypatch.setitem(contests.SHAPES, "wide", Shape(1024, 2048, 8, 8, 128))
    kernels: dict[str, dict[str, Callable[..., Any]]] = {
        "quantise": {"quantise": overlapped_too(reference.quantise)},
        "linear_few": {"linear": at_rest_too(reference.linear)},
        "linear_many": {"linear": at_rest_too(reference.linear)},
        "linear_a16": {"linear": at_rest_too(reference.linear)},
        "rmsnorm_quantise": {"rmsnorm_quantise": reference.rmsnorm_quantise},
        "hadamard_quantise": {"hadamard_quantise": reference.hadamard_quantise},
    }
    for operation, functions in kernels.items():
        module = types.ModuleType(operation)
        for name, function in functions.items():
            setattr(module, name, function)
        monkeypatch.setitem(sys.modules, f"kernels.triton.{operation}", module)
    for package in ("humming.layer", "humming.ops", "gemlite.core", "bitsandbytes", "mslk"):
        monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    monkeypatch.setattr(gpu_bench, "recorded", played)
    monkeypatch.setattr(gpu_bench, "replayed", clocked)
    monkeypatch.setattr(timing, "MOST_SETS", 5)
    with torch.no_grad():
        yield


def at_rest_too(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, w, *, weights_at_rest=False, **rest: linear(x, w, **rest)


def overlapped_too(quantise: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, bits, *, overlapped=False, **rest: quantise(x, bits, **rest)


def played(calls: Sequence[Callable[[], object]], device: torch.device) -> Replay:
    return Replay(lambda: [call() for call in calls], len(calls), eager=True)


def clocked(replays: Mapping[str, Replay], turns: int, least: float) -> dict[str, Timing]:
    """The n-th contestant takes n microseconds, and is played once."""
    for replay in replays.values():
        replay.play()
    return {name: Timing((1e-6 * place,) * turns) for place, name in enumerate(replays, start=1)}


def rows_of(operation: str, layer: str, count: int) -> dict[str, gpu_bench.Row]:
    rows: dict[str, gpu_bench.Row] = {}
    unit = ("llama-3-8b", operation, layer)
    for contest in gpu_bench.contests(unit, [count], gpu_bench.BY, L2, CPU):
        rows |= {row.name: row for row in gpu_bench.timed(unit[0], contest, 3, LIMITS, L2, CPU)}
    return rows


@pytest.mark.parametrize("count", [1, 64, 128])
def test_a_linear_of_int8_inputs_meets_its_peers(count: int) -> None:
    rows = rows_of("w4a8", "o", count)
    first = next(iter(rows.values()))
    assert first.name == "bf16 cuBLAS" and first.speed == 1 and first.error == 0
    ours = {name for name, row in rows.items() if row.by == "ours" and row.reason is None}
    few = {"ours w4a8, weights at rest"}
    many = {"ours w4a4", "ours w4a4 + quantise"}
    between = few | {"ours w4a8, few-row kernel"}
    expected = {"ours w4a8", "ours w4a8 + quantise"} | {1: few, 64: between, 128: many}[count]
    assert ours == expected
    for row in rows.values():
        if row.by == "ours":
            assert row.error is not None and 0.01 < row.error < 0.4
            assert row.multiply_adds == count * 256 * 256 and row.of_floor is not None
    codes, weight, result = count * (256 + 4), 256 * (128 + 4), 2 * count * 256
    assert rows["ours w4a8"].bytes == codes + weight + result


def test_what_is_not_installed_is_a_row_with_the_reason() -> None:
    rows = rows_of("w4a8", "o", 4) | rows_of("w4a16", "o", 4)
    for name in ("humming w4a8", "gemlite w8a8 + quantise", "bitsandbytes nf4", "mslk w4a16"):
        reason = rows[name].reason
        assert reason is not None and reason.startswith("ModuleNotFoundError") and "\n" not in reason
        assert rows[name].seconds == () and rows[name].speed is None
        assert reason in gpu_bench.line(rows[name])
    assert rows["ours w4a16, weights at rest"].reason is None


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = types.ModuleType("linear_many")
    wrong.linear = lambda x, w, *, dtype, **rest: torch.ones(len(x.codes), len(w.packed), dtype=dtype)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels.triton.linear_many", wrong)
    row = rows_of("w4a8", "o", 128)["ours w4a4"]
    assert row.reason is not None and "wrong" in row.reason and row.seconds == ()


def test_a_call_that_raises_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(w: Tensor, l2: int) -> peers.Linear:
        def call(x: Tensor, number: int) -> Tensor:
            raise RuntimeError("no such\nkernel image")

        return peers.Linear(call, 2, 1)

    fake = peers.Contestant("fake", "torch", fails)
    monkeypatch.setitem(gpu_contests.LINEARS, "w4a8", (peers.BASELINE, fake))
    rows = rows_of("w4a8", "o", 4)
    assert rows["fake"].reason == "RuntimeError: no such" and rows["bf16 cuBLAS"].reason is None


@pytest.mark.parametrize(
    "operation, layer", [("rmsnorm", "hidden"), ("hadamard", "heads"), ("quantise", "hidden")]
)
def test_a_pass_meets_a_copy_of_its_bytes(operation: str, layer: str) -> None:
    rows = rows_of(operation, layer, 64)
    copy, ours = rows["copy of the same bytes"], rows["ours a4"]
    assert next(iter(rows)) == copy.name
    assert ours.bytes == 64 * (3 * 256 + (8 if operation == "rmsnorm" else 4)) == copy.bytes
    assert ours.speed == 0.5 and ours.multiply_adds == 0  # the second contestant of the stand-in clock


@pytest.mark.parametrize("size", [1, 1000, 10**6, 50 * 2**20, 10**9])
def test_operands_rotate_through_four_times_the_cache(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MOST_SETS", 2048)
    l2 = 50 * 2**20
    count = sets_needed(size, l2)
    assert 2 <= count <= 2048
    assert count * size >= 4 * l2 or count == 2048
    assert (count - 1) * size < 4 * l2 or count == 2


def test_every_call_of_a_pass_has_its_own_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MOST_SETS", 64)
    contest = next(gpu_bench.contests(("llama-3-8b", "w4a8", "o"), [128], gpu_bench.BY, L2, CPU))
    for name in ("bf16 cuBLAS", "ours w4a8", "torch._int_mm alone"):
        made = contest.entrants[name][1]()
        assert made.rotated >= timing.ROTATED_L2 * L2
        inputs = [call.args[0] for call in made.calls]  # type: ignore[attr-defined]
        assert len({id(each) for each in inputs}) == len(made.calls) >= 2


def test_few_rows_stay_where_the_kernel_before_left_them() -> None:
    contest = next(gpu_bench.contests(("llama-3-8b", "w4a8", "o"), [4], gpu_bench.BY, L2, CPU))
    made = contest.entrants["bf16 cuBLAS"][1]()
    assert len({id(call.args[0]) for call in made.calls}) == 1  # type: ignore[attr-defined]
    assert [call.args[1] for call in made.calls] == list(range(len(made.calls)))  # type: ignore[attr-defined]


def test_the_widest_shape_comes_first_and_has_the_passes() -> None:
    todo = gpu_bench.units(["smollm2-135m", "wide"], ["w4a16", "hadamard"], None)
    linears = [(shape, "w4a16", layer) for shape in ("wide", "smollm2-135m") for layer in TINY.linears()]
    passes = [("wide", "hadamard", layer) for layer in ("heads", "hidden", "intermediate")]
    assert todo == linears + passes
    assert gpu_bench.units(["wide"], ["w4a8", "rmsnorm"], ["qkv", "hidden"]) == [
        ("wide", "w4a8", "qkv"),
        ("wide", "rmsnorm", "hidden"),
    ]


def test_a_run_is_written_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_bench, "_chosen", lambda device: device)
    rates = {"copy": 1.0, "read": 1.0, "bf16": 1.0, "int8": 1.0}
    monkeypatch.setattr(gpu_bench, "measure_gpu_limits", lambda device: (LIMITS, rates))
    monkeypatch.setattr(gpu_bench, "machine", lambda device: {"device": "a GPU", "l2_bytes": L2})
    monkeypatch.setattr(gpu_bench, "smi", lambda fields, device: {"pstate": "P0"})
    out = tmp_path / "made" / "run.json"
    asked = gpu_bench.Options(
        ["llama-3-8b"], ["w4a16", "rmsnorm"], ["o", "hidden"], [1, 4], gpu_bench.BY, 3, 0, "abc", out
    )
    gpu_bench.run(asked, "the command", {"code": "def"}, CPU)
    record: dict[str, Any] = json.loads(out.read_text())
    assert record["command"] == "the command" and record["commit"] == "abc"
    assert record["machine"] == {"code": "def", "device": "a GPU", "l2_bytes": L2}
    assert record["before"] == record["after"] == {"pstate": "P0"}
    found = {(row["operation"], row["layer"], row["rows"]) for row in record["results"]}
    assert found == {
        (operation, layer, count)
        for operation, layer in (("linear w4a16 g128", "o"), ("rmsnorm + quantise", "hidden"))
        for count in (1, 4)
    }
    assert len(out.read_text().splitlines()) < len(record["results"]) + 60
    assert capsys.readouterr().out.count("\n") == len(record["results"]) + 2


def test_a_machine_without_a_gpu_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert bench.main(["--device", "cuda", "--operations", "w4a8"]) == 2
    assert "this machine has none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--operations", "linear"), "'linear': choose among w4a8"),
        (("--by", "marlin"), "'marlin': choose among ours"),
        (("--prepare", "-1"), "--prepare"),
    ],
)
def test_a_mistake_on_a_gpu_is_one_line(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["--device", "cuda", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_machine_state_is_empty_where_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench.shutil, "which", lambda name: None)
    assert gpu_bench.smi(gpu_bench.STATE, CPU) == {}
    assert len(tuning.table_sha256()) == 64
    assert peers.version("no-such-package") == "not installed" and peers.version("torch")


def test_humming_is_called_as_its_documentation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    class Layer(torch.nn.Module):
        humming_config = "the configuration"

        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.options = options
            self.register_buffer("locks", torch.zeros(4, dtype=torch.int32))

        def load_from_unquantized(self, w: Tensor) -> None:
            self.weight = torch.nn.Parameter(w.to(torch.int32), requires_grad=False)

        def transform(self) -> None:
            self.weight_scale = torch.nn.Parameter(torch.ones(len(self.weight), 1), requires_grad=False)

    def forward(config: str, **operands: Any) -> Tensor:
        assert config == "the configuration"
        calls.append(operands)
        return torch.zeros(len(operands["inputs"]), 8)

    def tuned(config: str, shape_m: int, device: torch.device) -> dict[str, int]:
        return {"rows": shape_m}

    codes = torch.zeros(3, 32, dtype=torch.int8), torch.ones(3, 1)
    quantised = types.SimpleNamespace(humming_forward=forward, may_quant_input=lambda config, x: codes)
    monkeypatch.setitem(sys.modules, "humming.layer", types.SimpleNamespace(HummingLayer=Layer))
    monkeypatch.setitem(sys.modules, "humming.forward", quantised)
    monkeypatch.setitem(sys.modules, "humming.tune", types.SimpleNamespace(get_heuristics_config=tuned))
    w, x = torch.randn(8, 32, dtype=torch.bfloat16), torch.randn(3, 32, dtype=torch.bfloat16)
    for inside in (False, True):
        calls.clear()
        linear = peers.humming("int8", inside=inside)(w, 1)
        for number in range(linear.copies):
            linear.call(linear.inputs(x), number)
        assert all((call["input_scale"] is None) is inside for call in calls)
        assert all(call["inputs"].dtype == (torch.bfloat16 if inside else torch.int8) for call in calls)
        assert all(call["tuning_config"] == {"rows": 3} for call in calls)
        for name in ("weight", "weight_scale", "locks"):
            assert len({call[name].data_ptr() for call in calls}) == linear.copies == 2
        assert linear.weight_bytes == 4 * 8 * 32 + 4 * 8
