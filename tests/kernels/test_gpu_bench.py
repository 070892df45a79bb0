"""The GPU benchmark on a CPU: what takes part, what rotates, what is written; the clock and the graphs are
stand-ins.

The kernels are stand-ins too: the reference under their names.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import (
    bench,
    contests,
    gpu_bench,
    gpu_contests,
    pass_reference,
    peers,
    reference,
    timing,
    tuning,
    weight_reference,
)
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
        "quantise": {"quantise": chosen_too(pass_reference.quantise)},
        "gated": {"gated": pass_reference.gated},
        "linear_few": {"linear": at_rest_too(reference.linear)},
        "linear_many": {"linear": at_rest_too(reference.linear)},
        "linear_a16": {"linear": at_rest_too(reference.linear)},
        "dequantise": {"linear": at_rest_too(reference.linear)},
        "rmsnorm_quantise": {
            "rmsnorm_quantise": chosen_too(pass_reference.rmsnorm_quantise),
            "rmsnorm": chosen_too(pass_reference.rmsnorm),
        },
        "hadamard_quantise": {"hadamard_quantise": pass_reference.hadamard_quantise},
        "gptq_block": {"gptq_block": weight_reference.gptq_block},
        "find_range": {"find_range": weight_reference.find_range},
    }
    for operation, functions in kernels.items():
        module = types.ModuleType(operation)
        for name, function in functions.items():
            setattr(module, name, function)
        module.Choice = dict  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"kernels.triton.{operation}", module)
    for package in ("humming.layer", "humming.ops", "gemlite.core", "bitsandbytes", "mslk"):
        monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    monkeypatch.setattr(gpu_bench, "recorded", played)
    monkeypatch.setattr(gpu_bench, "replayed", clocked)
    monkeypatch.setattr(timing, "MOST_SETS", 5)
    with torch.no_grad():
        yield


def at_rest_too(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, w, *, weights_at_rest=False, choice=None, **rest: linear(x, w, **rest)


def chosen_too(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *operands, overlapped=False, choice=None, **rest: run(*operands, **rest)


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
    launches = (", weights at rest", ", plain")
    many = {"ours w4a4", *(f"ours w4a4 + quantise{launch}" for launch in launches)}
    between = few | {"ours w4a8, few-row kernel"}
    always = {"ours w4a8", "ours w4a8, default choice"}
    always |= {f"ours w4a8 + quantise{launch}" for launch in launches}
    expected = always | {1: few, 64: between, 128: many}[count]
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


@pytest.mark.parametrize("layer, weights", [("o", 1), ("up, down", 2)])
def test_a_chain_runs_linears_one_behind_the_other(layer: str, weights: int) -> None:
    rows = rows_of("chain", layer, 4)
    assert list(rows) == [each.name for each in gpu_contests.CHAIN]
    for name, row in rows.items():
        if not name.startswith("humming"):
            assert row.reason is None and row.error is not None and row.error < 0.4
            assert row.multiply_adds == (4 * 256 * 256 if weights == 1 else 2 * 4 * 256 * 512)
    assert rows["humming w4a8 + quantise"].reason is not None
    assert rows_of("chain", layer, 128) == {}


def test_the_default_choice_is_that_of_a_shape_without_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    few = types.ModuleType("linear_few")

    def linear(x: Any, w: Any, *, choice: Any, weights_at_rest: bool, **rest: Any) -> Tensor:
        given.append(choice)
        return reference.linear(x, w, **rest)

    few.linear, few.default = linear, lambda *shape: shape  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels.triton.linear_few", few)
    contest = next(gpu_bench.contests(("llama-3-8b", "w4a8", "qkv"), [4], gpu_bench.BY, L2, CPU))
    for name in ("ours w4a8, default choice", "ours w4a8"):
        contest.entrants[name][1]()
    assert set(given) == {(4, 512, 256), None}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("change, off", [(0.0, False), (1e-3, None), (0.5, True), (float("nan"), True)])
def test_a_replay_that_differs_is_found(exact: bool, change: float, off: bool | None) -> None:
    made = torch.randn(100, 8)
    codes = torch.randint(-8, 8, (100, 8), dtype=torch.int8)
    replayed = made.clone()
    replayed[-1] += change
    calls = [lambda: (made, None, [codes])] * 3
    replay = Replay(lambda: None, 3, eager=False, results=[calls[0](), calls[1](), (replayed, None, [codes])])
    assert timing.differs(replay, calls, exact) is (exact if off is None else off)
    replay = Replay(lambda: None, 3, eager=False, results=[(made, None, [-codes])] * 3)
    assert timing.differs(replay, calls, exact)
    assert not timing.differs(Replay(lambda: None, 3, eager=True), calls, exact)


def test_what_a_replay_got_wrong_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(calls: Sequence[Callable[[], object]], device: torch.device) -> Replay:
        first = calls[0]()
        results = [torch.zeros_like(first) if isinstance(first, Tensor) else first] * len(calls)
        return Replay(lambda: None, len(calls), eager=False, results=results)

    monkeypatch.setattr(gpu_bench, "recorded", wrong)
    row = rows_of("w4a8", "o", 4)["ours w4a8"]
    assert row.reason == "its replayed result differs" and row.seconds == () and row.speed is None


def test_a_pass_that_is_not_the_references_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = types.ModuleType("hadamard_quantise")
    wrong.hadamard_quantise = lambda x, *, size, inner, **rest: (  # type: ignore[attr-defined]
        None,
        reference.quantise(x, **rest),
    )
    monkeypatch.setitem(sys.modules, "kernels.triton.hadamard_quantise", wrong)
    row = rows_of("hadamard", "hidden", 4)["ours a4"]
    assert row.reason is not None and "not the reference's" in row.reason


def test_a_call_that_raises_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(w: Tensor, l2: int) -> peers.Linear:
        def call(x: Tensor, number: int) -> Tensor:
            raise RuntimeError("no such\nkernel image")

        return peers.Linear(call, 2, 1)

    fake = peers.Contestant("fake", "torch", fails)
    monkeypatch.setitem(gpu_contests.LINEARS, "w4a8", (peers.BASELINE, fake))
    rows = rows_of("w4a8", "o", 4)
    assert rows["fake"].reason == "RuntimeError: no such" and rows["bf16 cuBLAS"].reason is None


# By operation and layer: bytes of a row of n numbers, a multiple of n and a rest, by pass.
PASSES = {
    ("quantise", "hidden"): {"quantise": (3, 4)},
    ("quantise", "intermediate"): {"quantise": (3, 4), "gate + quantise": (5, 4), "gate": (6, 0)},
    ("rmsnorm", "hidden"): {
        "rmsnorm + quantise": (3, 8),
        "sum + rmsnorm + quantise": (7, 8),
        "sum + rmsnorm": (8, 4),
    },
    ("hadamard", "heads"): {"hadamard + quantise": (3, 4)},
    ("hadamard", "intermediate"): {"hadamard + quantise": (3, 4), "gate + hadamard + quantise": (5, 4)},
}


@pytest.mark.parametrize("operation, layer", PASSES)
@pytest.mark.parametrize("count", [64, 65])
def test_a_pass_meets_a_copy_of_its_bytes(operation: str, layer: str, count: int) -> None:
    unit = ("llama-3-8b", operation, layer)
    n = 512 if layer == "intermediate" else 256
    found = {}
    for contest in gpu_bench.contests(unit, [count], gpu_bench.BY, L2, CPU):
        copy, ours, *others = gpu_bench.timed(unit[0], contest, 3, LIMITS, L2, CPU)
        assert copy.name == "copy of the same bytes" and ours.name in ("ours", "ours a4")
        assert ours.reason is None and ours.bytes == copy.bytes and ours.bytes is not None
        assert ours.speed == 0.5 and ours.multiply_adds == 0  # the second contestant of the stand-in clock
        assert all(row.reason is None for row in others if row.by in ("ours", "torch"))
        assert any("a thread" in row.name for row in others) == (
            count <= 64 and operation != "hadamard" and contest.operation != "gate"
        )
        found[contest.operation] = divmod(ours.bytes // count, n)
    assert found == PASSES[operation, layer]


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


@pytest.mark.parametrize(("operation", "width"), [("gptq_block", 128), ("find_range", 512)])
def test_rounding_meets_the_reference(operation: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(operation, "down", 1)
    assert list(rows) == ["reference", "ours"]
    for row in rows.values():
        assert row.reason is None and (row.rows, row.outputs, row.inputs) == (256, 256, width)
    results = 256 * width * (1 + 4) if operation == "gptq_block" else 256 * 4
    operands = 256 * width * 4 * (2 if operation == "gptq_block" else 1)
    assert rows["ours"].bytes == operands + results + (4 * 128 * 128 if operation == "gptq_block" else 0)
    assert ("llama-3-8b", operation, "gate_up") in gpu_bench.units(["llama-3-8b"], [operation], None)
    original = getattr(weight_reference, operation)
    wrong = types.ModuleType(operation)
    setattr(wrong, operation, lambda *operands: tuple(-2 * t for t in original(*operands) if t is not None))
    monkeypatch.setitem(sys.modules, f"kernels.triton.{operation}", wrong)
    reason = rows_of(operation, "down", 1)["ours"].reason
    assert reason is not None and "wrong" in reason


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
    assert record["replays_compared"] is True
    assert record["command"] == "the command" and record["commit"] == "abc"
    assert record["machine"] == {"code": "def", "device": "a GPU", "l2_bytes": L2}
    assert record["before"] == record["after"] == {"pstate": "P0"}
    found = {(row["operation"], row["layer"], row["rows"]) for row in record["results"]}
    assert found == {
        (operation, layer, count)
        for operation, layer in (
            ("linear w4a16 g128", "o"),
            *((name, "hidden") for name in PASSES["rmsnorm", "hidden"]),
        )
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
        (("--context", "9"), "--context: only on a CPU"),
        (("--threads", "2"), "--threads: only on a CPU"),
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
    monkeypatch.setattr(gpu_bench, "gpu_id", str)
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


def test_nvidia_smi_is_asked_for_the_gpu_that_torch_means(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def answers(command: list[str], **rest: Any) -> Any:
        asked.append(command)
        return types.SimpleNamespace(stdout="P0, 1980 MHz\n")

    found = types.SimpleNamespace(uuid="01234567-89ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(gpu_bench.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu_bench.subprocess, "run", answers)
    device = torch.device("cuda", 1)
    assert gpu_bench.smi("pstate,clocks.sm", device) == {"pstate": "P0", "clocks.sm": "1980 MHz"}
    assert asked[0][-2:] == ["-i", "GPU-01234567-89ab"]
    del found.uuid
    assert gpu_bench.gpu_id(device) == "1"


def test_changed_sources_are_not_called_a_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    assert gpu_bench.commit_here(tmp_path) is None
    git("init")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "one.py").write_text("")
    git("add", ".")
    git("commit", "-m", "one")
    clean = gpu_bench.commit_here(tmp_path / "kernels")
    assert clean is not None and len(clean) == 40
    (tmp_path / "notes").write_text("")
    assert gpu_bench.commit_here(tmp_path / "kernels") == clean
    (tmp_path / "kernels" / "one.py").write_text("1")
    assert gpu_bench.commit_here(tmp_path / "kernels") == f"{clean}+changes"
