"""Grids in int4 execution: what a cell puts on record, what the report shows, and that the numbers are those
of the simulated twin. Counts and bytes are worked out here from the shapes of the small model."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import compare, costs, grid, report, store
from harness.config import load_grid
from harness.engine import run_grid
from harness.lm import DecoderLM
from methods.bits import Bits
from methods.checkpoint import open_checkpoint
from methods.method import Context
from methods.pipeline import quantise
from methods.registry import parse_method
from tests.harness.runs import settings_of, table
from tests.harness.small_grid import TASKS, save_model, write_grid

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDE = 3, 4, 2, 32, 72, 192
SHAPES = [
    *((heads * HEAD_DIM, HIDDEN) for heads in (HEADS, KV_HEADS, KV_HEADS)),
    *((HIDDEN, HEADS * HEAD_DIM), (WIDE, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE)),
]
"""(outputs, inputs) of the linears of one layer."""
LINEARS = LAYERS * len(SHAPES)
WEIGHTS = LAYERS * sum(outputs * inputs for outputs, inputs in SHAPES)
CHANNELS = LAYERS * sum(outputs for outputs, _ in SHAPES)
ENTRIES = LAYERS * 2 * KV_HEADS
"""Rows of `HEAD_DIM` in the KV cache of one token."""
METHODS = ["float", "rtn", {"method": "quarot:rounding=rtn", "bits": ["w4a4kv4"]}]
BITS = ("w4a4kv4", "w3a16g8", "w16a4kv4")
CELLS = {"float w16a16", "quarot w4a4kv4", *(f"rtn {bits}" for bits in BITS)}
WINDOWS = 2
TEXT = "perplexity_wikipedia"
MEMORY, OPERATIONS = "### Memory of the model and its KV cache", "### Implementations that ran"
Records = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Filled:
    """A run folder and its records, by method and bits."""

    out: Path
    records: Records

    def samples(self, name: str, task: str) -> bytes:
        return (self.out / self.records[name]["id"] / "samples" / f"{task}.jsonl").read_bytes()

    def measured(self, name: str, fact: str) -> dict[str, Any]:
        found: dict[str, Any] = self.records[name]["measured"][fact]
        return found

    def log_perplexity(self, name: str) -> float:
        return float(self.records[name]["tasks"][TEXT]["metrics"]["log_perplexity"]["value"])


@pytest.fixture(scope="module")
def model(opened_once: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model") / "small")


def fill(
    out: Path,
    model: str,
    *,
    methods: list[Any] | None = None,
    bits: tuple[str, ...] = BITS,
    tasks: tuple[str, ...] = TASKS,
    **fields: Any,
) -> Filled:
    """Run a grid in this process."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = write_grid(
        out.parent / f"{out.name}.yaml",
        model,
        methods=methods or METHODS,
        bits=bits,
        tasks=tasks,
        limit=WINDOWS,
        **fields,
    )
    run_grid(load_grid(path, {}), out, command="python -m harness.grid", quiet=True, isolate=False)
    found = [json.loads(path.read_text()) for path in out.glob(f"*/{store.RECORD}")]
    return Filled(out, {f"{record['method']['name']} {record['bits']}": record for record in found})


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory, model: str) -> Filled:
    return fill(tmp_path_factory.mktemp("runs") / "simulated", model)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, model: str) -> Filled:
    return fill(tmp_path_factory.mktemp("runs") / "packed", model, execution="int4")


def calls(operations: dict[str, dict[str, int]]) -> dict[str, int]:
    return {operation: sum(ways.values()) for operation, ways in operations.items()}


def test_cells_are_apart_and_float_is_one_cell_of_both(simulated: Filled, packed: Filled) -> None:
    assert set(simulated.records) == set(packed.records) == CELLS
    for name, record in packed.records.items():
        twin = simulated.records[name]
        assert record["status"] == "done", record["failure"]
        assert record["execution"] == ("simulate" if name == "float w16a16" else "int4")
        assert (record["id"] == twin["id"]) is (name == "float w16a16")
        assert record["effective_bits"] == twin["effective_bits"]


def test_weight_only_numbers_are_the_simulated_ones(simulated: Filled, packed: Filled) -> None:
    """Codes are dequantised to the very floats that the simulated path multiplies by, generation included."""
    for name in ("float w16a16", "rtn w3a16g8"):
        assert packed.records[name]["tasks"] == simulated.records[name]["tasks"]
        for task in TASKS:
            assert packed.samples(name, task) == simulated.samples(name, task)


def test_quantised_inputs_and_cache_stay_near_the_simulated_numbers(
    simulated: Filled, packed: Filled
) -> None:
    for name in ("rtn w4a4kv4", "quarot w4a4kv4"):
        loss = packed.log_perplexity(name) - packed.log_perplexity("float w16a16")
        assert abs(packed.log_perplexity(name) - simulated.log_perplexity(name)) < min(0.01, abs(loss) / 2)


def test_memory_is_what_the_shapes_say(simulated: Filled, packed: Filled) -> None:
    for name in ("rtn w4a4kv4", "quarot w4a4kv4"):
        memory, twin = packed.measured(name, "memory"), simulated.measured(name, "memory")
        # Codes and a scale a channel: 16 bits are counted, float32 is held.
        assert memory["linears"] == {
            "computed": WEIGHTS / 2 + 2 * CHANNELS,
            "measured": WEIGHTS / 2 + 4 * CHANNELS,
            "float16": 2 * WEIGHTS,
            "packed": WEIGHTS / 2 + 4 * CHANNELS,
        }
        # Codes, a float32 scale, a zero-point of a byte.
        assert memory["kv_token"] == {
            "computed": ENTRIES * (HEAD_DIM / 2 + 2 + 2),
            "measured": ENTRIES * (HEAD_DIM / 2 + 4 + 1),
            "float16": ENTRIES * HEAD_DIM * 2,
        }
        assert twin["linears"]["measured"] == 5 * WEIGHTS + 4 * CHANNELS, "float32, codes of a byte, scales"
        assert twin["linears"]["packed"] == memory["linears"]["packed"]
        assert twin["kv_token"]["measured"] == ENTRIES * HEAD_DIM * 4
        for part in ("linears", "rest", "kv_token"):
            assert memory[part]["computed"] == twin[part]["computed"]
        assert memory["rest"]["measured"] == twin["rest"]["measured"] == 2 * memory["rest"]["computed"]
    memory = packed.measured("rtn w3a16g8", "memory")
    assert memory["linears"]["computed"] == WEIGHTS * 3 / 8 + WEIGHTS / 8 * (2 + 3 / 8)
    assert memory["linears"]["measured"] == WEIGHTS * 3 / 8 + WEIGHTS / 8 * (4 + 4)
    assert memory["kv_token"]["measured"] == ENTRIES * HEAD_DIM * 4
    plain = packed.measured("float w16a16", "memory")
    assert plain["linears"] == {
        "computed": 2 * WEIGHTS,
        "measured": 4 * WEIGHTS,
        "float16": 2 * WEIGHTS,
        "packed": 4 * WEIGHTS,
    }


@pytest.mark.parametrize(
    ("name", "linear"),
    [("rtn w4a4kv4", "linear w4a4"), ("quarot w4a4kv4", "linear w4a4"), ("rtn w3a16g8", "linear w3a16")],
)
def test_every_call_is_counted(packed: Filled, name: str, linear: str) -> None:
    found = {task: calls(own) for task, own in packed.measured(name, "implementations").items()}
    assert set(found) == set(TASKS)
    assert packed.measured(name, "replays_counted")
    for task, counts in found.items():
        assert [operation for operation in counts if operation.startswith("linear")] == [linear], task
        passes = counts[linear] // LINEARS
        assert counts[linear] == passes * LINEARS
        kv = [counts.get(f"{operation} kv4") for operation in ("rope_append", "kv_attention")]
        assert kv == ([passes * LAYERS] * 2 if "kv4" in name else [None, None])
    assert found[TEXT][linear] == WINDOWS * LINEARS
    assert found["asdiv_local"][linear] > 2 * LINEARS, "a pass over the prompt, then one for each token"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([{"replays_counted": True}] * 2, "A replay of a CUDA graph counts"),
        ([{"replays_counted": True}, {}], "Replays of a CUDA graph are not among them"),
    ],
)
def test_the_report_tells_whether_replays_are_counted(flags: list[dict[str, bool]], said: str) -> None:
    """Records made before they were counted do not say."""
    operations = {"implementations": {"text": {"linear w4a4": {"triton": 3}}}}
    cells: list[Any] = [
        SimpleNamespace(record={"measured": {**operations, **flag}}, task=lambda name: {"name": name})
        for flag in flags
    ]
    assert said in costs._operations_section(cells)[-1]


def test_nothing_of_it_runs_in_simulated_and_float_cells(simulated: Filled, packed: Filled) -> None:
    assert not any(simulated.measured(name, "implementations") for name in CELLS)
    assert not packed.measured("float w16a16", "implementations")


def test_the_report_shows_execution_measured_bytes_and_implementations(packed: Filled) -> None:
    text = report.write_report(packed.out).read_text()
    assert settings_of(text)["execution"] == "int4"
    packing = {line["method"]: line["pack (s)"] for line in table(text, "## Cost")}
    assert packing.pop("float") == "–" and all(float(seconds) >= 0 for seconds in packing.values())
    lines = {(line["method"], line["bits"]): line for line in table(text, MEMORY)}
    rows = {("quarot (rtn), int4", "w4a4kv4"), *(("rtn, int4", bits) for bits in BITS)}
    assert set(lines) == {("float", "w16a16"), *rows}
    line, memory = lines["rtn, int4", "w4a4kv4"], packed.measured("rtn w4a4kv4", "memory")
    for how in ("computed", "measured"):
        for part in ("linears", "rest"):
            assert float(line[f"{part} {how} (MiB)"]) == pytest.approx(memory[part][how] / 2**20, abs=0.005)
        assert float(line[f"KV cache {how} (B/token)"]) == memory["kv_token"][how]
    ratio = (WEIGHTS / 2 + 4 * CHANNELS) / (2 * WEIGHTS)
    assert float(line["linears / float16"]) == pytest.approx(ratio, abs=6e-4)
    assert float(line["KV cache / float16"]) == pytest.approx(21 / 64, abs=6e-4)
    assert lines["float", "w16a16"]["linears / float16"] == "2.000"
    shown: dict[str, int] = {}
    for line in table(text, OPERATIONS):
        assert line["implementation"].startswith("reference")
        shown[line["operation"]] = shown.get(line["operation"], 0) + int(line["calls"].replace(",", ""))
    expected: dict[str, int] = {}
    for name in CELLS:
        for operations in packed.measured(name, "implementations").values():
            for operation, count in calls(operations).items():
                expected[operation] = expected.get(operation, 0) + count
    assert shown == expected
    assert {line["cells"] for line in table(text, OPERATIONS) if line["operation"] == "linear w4a4"} == {"2"}


def test_an_int4_run_is_compared_with_its_simulated_twin(
    simulated: Filled, packed: Filled, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([str(simulated.out), str(packed.out)]) == 0
    text = capsys.readouterr().out
    assert text.count(", seed 0**\n") == len(CELLS)
    (line,) = table(text, "Settings that differ:\n")
    assert (line["setting"], line["A"], line["B"]) == ("execution", "simulate", "int4")
    assert (
        compare.main([f"{side.out}:{side.records['rtn w4a4kv4']['id']}" for side in (simulated, packed)]) == 0
    )
    text = capsys.readouterr().out
    assert "rtn, w4a4kv4, seed 0)" in text and "rtn, w4a4kv4, seed 0, int4)" in text
    (line,) = table(text, "Settings that differ:\n")
    assert line["setting"] == "execution"


def test_tasks_that_are_kept_bring_their_counts(tmp_path: Path, model: str, packed: Filled) -> None:
    name, out = "rtn w4a4kv4", tmp_path / "out"
    cell = packed.records[name]["id"]
    shutil.copytree(packed.out / cell, out / cell)
    (out / cell / "samples" / "piqa_local.jsonl").unlink()
    found = fill(out, model, methods=["rtn"], bits=("w4a4kv4",), tasks=TASKS[1:], execution="int4")
    assert found.records[name]["tasks"] == packed.records[name]["tasks"]
    assert found.measured(name, "implementations") == packed.measured(name, "implementations")
    scored = [event["task"] for event in store.read_history(out / cell) if event["event"] == "task"]
    assert scored == [*TASKS, "piqa_local"]


def test_what_has_no_integer_product_is_said(simulated: Filled, packed: Filled) -> None:
    """Weights of 16 bits behind quantised inputs: the products stay floats, the KV cache does not."""
    name = "rtn w16a4kv4"
    (note,) = packed.records[name]["method"]["notes"]
    assert "16-bit weights" in note and "simulated" in note
    assert note in report.write_report(packed.out).read_text()
    assert simulated.records[name]["method"]["notes"] == []
    for operations in packed.measured(name, "implementations").values():
        assert set(operations) == {"dense", "rmsnorm", "rope_append kv4", "kv_attention kv4", "gated"}
    memory = packed.measured(name, "memory")
    assert memory["linears"]["measured"] == 4 * WEIGHTS
    assert memory["kv_token"] == packed.measured("rtn w4a4kv4", "memory")["kv_token"]


def test_records_without_measured_memory_have_no_such_section(tmp_path: Path, simulated: Filled) -> None:
    record = json.loads(json.dumps(simulated.records["rtn w4a4kv4"] | {"tasks": {}}))
    for fact in ("memory", "implementations"):
        del record["measured"][fact]
    store.write_record(tmp_path / "run" / record["id"], record)
    text = report.write_report(tmp_path / "run").read_text()
    assert "## Cost" in text and MEMORY not in text and OPERATIONS not in text


def test_an_execution_that_is_not_known_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_grid(tmp_path / "grid.yaml", "smollm2-135m-instruct")
    assert grid.main([str(path), "--execution", "fp4"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "execution: Input should be 'simulate' or 'int4'" in error


def test_a_packed_model_has_as_many_parameters(model: str) -> None:
    checkpoint, found = open_checkpoint(model), []
    for execution in ("simulate", "int4"):
        quantised = quantise(
            checkpoint, parse_method("rtn"), Bits.parse("w4a4"), Context(), execution=execution
        )
        found.append(DecoderLM(quantised.decoder, checkpoint.tokenizer).get_model_info())
    assert found[0] == found[1]
