"""Both executions of every registered method agree; and where one is tampered with, parity says so."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from harness import parity
from harness.agreement import Agreement, Codes, Output, Running, compare_codes
from harness.markdown import compact
from harness.odd_models import NAMES
from harness.parity import (
    Case,
    Subject,
    cases,
    methods_of_registry,
    odd_settings,
    odd_subject,
    open_subject,
    twins,
)
from harness.parity_report import write_report
from harness.side_by_side import compare
from harness.stats import Estimate
from kernels import kv_reference, ops, recorded, reference
from kernels.kv_reference import PackedRows
from kernels.reference import PackedWeight, Quantised
from methods import registry
from methods.bits import Bits, LinearSpec, QuantiserSettings
from methods.checkpoint import DEFAULT_MODEL
from methods.decoder import Block, Decoder
from methods.errors import UserError
from methods.linear import Linear
from methods.method import Artifact, Method, Plan
from methods.pipeline import Pipeline
from methods.registry import parse_method

CPU = torch.device("cpu")
METHODS, SPECIAL = methods_of_registry()


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return {name: odd_subject(name, tmp_path_factory.mktemp(name), length=24) for name in NAMES}


def agreement(subject: Subject, method: str, case: Case, **options: Any) -> Agreement:
    return compare(*twins(subject, parse_method(method), case, CPU), subject.windows, **options)


def exact(found: Agreement) -> None:
    """In float64 nothing but the last digits of floats may differ."""
    assert found.faults == []
    codes = [*found.weights, *found.inputs, *found.cache, found.decode]
    assert all(each.unequal == 0 and each.scale < 1e-12 for each in codes)
    assert all(output.difference < 1e-12 for output in (*found.outputs, *found.stepped))
    assert abs(found.running.difference.value) < 1e-9
    assert found.generated[0] == found.generated[1] > 0


def chosen(name: str) -> list[Any]:
    """Every registered method and rounding with a third of a model's cases, and one method with all."""
    group = 8 if name == "odd-g8" else None
    every = cases(odd_settings(), group, small=True)
    return [
        pytest.param(method, case, id=f"{method}-{place}-{case.bits}")
        for method in METHODS
        for place, case in enumerate(every)
        if method == METHODS[0] or place % 3 == 1
    ]


@pytest.mark.parametrize("method, case", chosen("odd"))
def test_every_method_agrees_where_no_width_is_round(
    subjects: dict[str, Subject], method: str, case: Case
) -> None:
    exact(agreement(subjects["odd"], method, case))


@pytest.mark.parametrize("method, case", chosen("odd-g8"))
def test_every_method_agrees_in_groups_and_behind_a_window(
    subjects: dict[str, Subject], method: str, case: Case
) -> None:
    exact(agreement(subjects["odd-g8"], method, case))


def test_the_registry_is_what_is_compared() -> None:
    """A method is compared, or has declared that it needs a special checkpoint."""
    names = {text.partition(":")[0] for text in METHODS}
    assert names | set(SPECIAL) | {"float"} == registry.method_classes().keys()
    assert {"rtn", "gptq", "quarot:rounding=rtn", "quarot:rounding=gptq"} <= set(METHODS)


# What later methods may do: mixed widths, kept columns, axis 0, a residual scale


@dataclass(frozen=True, kw_only=True)
class Mixed(Method):
    """Linears of one input that quantise it differently, kept columns, 16-bit weights, a residual scale."""

    name: ClassVar[str] = "mixed"
    scaled: bool = False

    def transform(self, model: Decoder, artifact: Artifact) -> Decoder:
        model.residual_scaling = self.scaled
        return model

    def plan(
        self, model: Decoder, bits: Bits, settings: QuantiserSettings, artifact: Artifact, base: Plan
    ) -> Plan:
        return Plan({name: self._spec(name, spec) for name, spec in base.linears.items()}, base.kv)

    def _spec(self, name: str, spec: LinearSpec) -> LinearSpec:
        assert spec.activation is not None
        changes: dict[str, dict[str, Any]] = {
            "v_proj": {"activation": dataclasses.replace(spec.activation, bits=7)},
            "k_proj": {"bits": 16},
            "up_proj": {"keep": 5},
            "gate_proj": {"keep": 5},
            "down_proj": {"activation": None, "axis": 0},
        }
        return dataclasses.replace(spec, **changes.get(name.rpartition(".")[2], {}))


@pytest.mark.parametrize("scaled", [False, True])
def test_what_later_methods_may_plan(subjects: dict[str, Subject], scaled: bool) -> None:
    subject = subjects["odd"]
    case = Case(Bits.parse("w4a4kv4"), subject.base, "float64")
    found = compare(*twins(subject, Pipeline("mixed", (Mixed(scaled=scaled),)), case, CPU), subject.windows)
    exact(found)
    seen = {codes.name for codes in found.inputs}
    quantised = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
    assert seen == {f"layers.{layer}.{name} input" for layer in (0, 1) for name in quantised}


# The default model


def test_quarot_agrees_on_a_window_of_the_default_model(tmp_path: Path) -> None:
    """In float64, where chance makes no ties: not one of 28 million codes may differ."""
    subject = open_subject(DEFAULT_MODEL, tmp_path, windows=1, length=256)
    settings = dataclasses.replace(subject.base, weight_search=False)
    case = Case(Bits.parse("w4a4kv4"), settings, "float64")
    found = agreement(subject, "quarot:rounding=rtn", case, few=1, new_tokens=2)
    exact(found)
    assert (len(found.weights), len(found.inputs), len(found.cache)) == (210, 120, 30)
    assert found.running.tokens == 255


# Parity must fail where it should


Twins = tuple[Decoder, Decoder]


@pytest.fixture(scope="module")
def pair(subjects: dict[str, Subject]) -> Twins:
    """A simulated decoder and its twin, which tests change in copies only."""
    case = Case(Bits.parse("w4a4kv4"), subjects["odd"].base, "float64")
    return twins(subjects["odd"], parse_method("rtn"), case, CPU)


def faults(pair: Twins, subjects: dict[str, Subject]) -> str:
    return "\n".join(compare(*pair, subjects["odd"].windows, new_tokens=1).faults)


def block_of(decoder: Decoder, layer: int) -> Block:
    block = decoder.layers[layer]
    assert isinstance(block, Block)
    return block


def flipped_code(linear: Linear, form: PackedWeight) -> None:
    packed = form.packed.clone()
    packed[5, 3] ^= 1
    linear.packed = dataclasses.replace(form, packed=packed)


def another_scale(linear: Linear, form: PackedWeight) -> None:
    scale = form.scale.clone()
    scale[2] *= 1 + 1e-9
    linear.packed = dataclasses.replace(form, scale=scale)


def unpacked(linear: Linear, form: PackedWeight) -> None:
    linear.packed = None
    linear.set_weight(reference.dequantise_weight(form))


def unquantised_input(linear: Linear, form: PackedWeight) -> None:
    linear.activation = None


@pytest.mark.parametrize(
    "change, said",
    [
        (flipped_code, "mlp.down_proj weight: 1 of 1,584 codes differ, by 1 at most"),
        (another_scale, "mlp.down_proj weight: 0 of 1,584 codes differ, by 0 at most; scales by inf"),
        (unpacked, "layers.1.mlp.down_proj: rounded, not packed"),
        (unquantised_input, "layers.1.mlp.down_proj: its input was not quantised to codes"),
    ],
)
def test_a_changed_linear_is_found(
    pair: Twins, subjects: dict[str, Subject], change: Callable[[Linear, PackedWeight], None], said: str
) -> None:
    twin = copy.deepcopy(pair[1])
    linear = block_of(twin, 1).mlp.down_proj
    assert linear.packed is not None
    change(linear, linear.packed)
    assert said in faults((pair[0], twin), subjects)


def test_a_decoder_that_is_not_packed_is_found(pair: Twins, subjects: dict[str, Subject]) -> None:
    found = faults((pair[0], pair[0]), subjects)
    assert "the decoder's execution is 'simulate'" in found
    assert "layers.0.values: not held as codes" in found


def test_another_head_shows_in_the_log_perplexity_alone(pair: Twins, subjects: dict[str, Subject]) -> None:
    twin = copy.deepcopy(pair[1])
    twin.lm_head.weight = torch.nn.Parameter(twin.lm_head.weight * 1.2, requires_grad=False)
    found = faults((pair[0], twin), subjects)
    assert found.startswith("log-perplexity differs by")
    assert "\n" not in found


def floor(quantised: Quantised, x: Tensor) -> Quantised:
    """Codes rounded down."""
    codes = (x.unflatten(-1, (quantised.scale.shape[-1], -1)) / quantised.scale.unsqueeze(-1)).floor()
    return dataclasses.replace(quantised, codes=codes.flatten(-2).clamp(-8, 7).to(torch.int8))


def test_rounding_down_is_found(
    pair: Twins, subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantise = ops.quantise
    monkeypatch.setattr(ops, "quantise", lambda x, **options: floor(quantise(x, **options), x))
    found = faults(pair, subjects)
    assert "layers.0.self_attn.o_proj input" in found
    assert "layers.1.mlp.down_proj input" in found
    assert "layers.0.self_attn.q_proj input" not in found  # quantised by the fused operation


def test_another_input_scale_is_found(
    pair: Twins, subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = ops.rmsnorm_quantise

    def changed(x: Tensor, **options: Any) -> Any:
        found = fused(x, **options)
        return found._replace(codes=dataclasses.replace(found.codes, scale=found.codes.scale * 1.002))

    monkeypatch.setattr(ops, "rmsnorm_quantise", changed)
    assert "layers.1.mlp.gate_proj input: 0 of 864 codes differ, by 0 at most; scales by 0.002" in faults(
        pair, subjects
    )


def test_a_dropped_zero_point_is_found(
    pair: Twins, subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    append = kv_reference.kv_append

    def changed(rows: PackedRows, x: Tensor, start: int, **options: Any) -> None:
        append(rows, x, start, **options)
        assert rows.zero is not None
        rows.zero[:, :, start : start + x.shape[2]] = 0

    monkeypatch.setattr(kv_reference, "kv_append", changed)
    found = faults(pair, subjects)
    assert "layers.0 keys and values" in found
    assert "layers.1 keys and values" in found


@pytest.mark.parametrize("moved", [1, -1])
def test_rows_written_to_another_position_are_found(
    pair: Twins, subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    append = kv_reference.kv_append

    def changed(rows: PackedRows, x: Tensor, start: int, **options: Any) -> None:
        fits = 0 < start < rows.codes.shape[2] - x.shape[2]
        append(rows, x, start + moved if fits else start, **options)

    monkeypatch.setattr(kv_reference, "kv_append", changed)
    assert "all codes through the cache" in faults(pair, subjects)


def test_attention_to_stale_rows_is_found(
    pair: Twins, subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest row is read as the one before it, as if the append had come too late."""
    attend = ops.kv_attention

    def changed(query: Tensor, keys: PackedRows, values: PackedRows, length: int, **options: Any) -> Tensor:
        if query.shape[2] < length:
            keys, values = (
                dataclasses.replace(rows, codes=rows.codes.clone(), scale=rows.scale.clone())
                for rows in (keys, values)
            )
            for rows in (keys, values):
                rows.codes[:, :, length - 1] = rows.codes[:, :, length - 2]
                rows.scale[:, :, length - 1] = rows.scale[:, :, length - 2]
        return attend(query, keys, values, length, **options)

    monkeypatch.setattr(ops, "kv_attention", changed)
    found = faults(pair, subjects)
    assert "all codes through the cache" in found
    assert "layers.1.self_attn output through the cache differs by" in found


def test_the_last_product_of_a_layer_is_seen(
    pair: Twins, subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No quantiser sees what the MLP writes to the stream before the next layer, which is fed anew."""
    linear = ops.linear

    def changed(x: Quantised, weight: PackedWeight, **options: Any) -> Tensor:
        return linear(x, weight, **options) * (1.02 if weight.inputs == 44 else 1.0)

    monkeypatch.setattr(ops, "linear", changed)
    assert "layers.0.mlp output differs by" in faults(pair, subjects)


# Verdicts


def quantised(codes: list[list[int]], scale: list[float], zero: list[float] | None = None) -> Quantised:
    kind = torch.int8 if zero is None else torch.uint8
    zeros = None if zero is None else torch.tensor(zero, dtype=torch.float64)[:, None]
    scales = torch.tensor(scale, dtype=torch.float64)[:, None]
    return Quantised(torch.tensor(codes, dtype=kind), scales, zeros, None, 4)


def test_codes_are_what_the_scale_multiplies() -> None:
    first = quantised([[0, 3, 9], [1, 2, 3]], [0.5, 1.0], [4.0, 0.0])
    tie = quantised([[1, 4, 10], [1, 2, 3]], [0.5, 1.0], [5.0, 0.0])
    dropped = quantised([[0, 3, 9], [1, 2, 3]], [0.5, 1.0], [0.0, 0.0])
    assert compare_codes("tie", first, tie) == Codes("tie", 6, 0, 0, 0.0)
    assert compare_codes("dropped", first, dropped) == Codes("dropped", 6, 3, 4, 0.0)


def test_rows_that_are_no_numbers_must_be_so_in_both() -> None:
    first = quantised([[7, -8], [1, 2]], [math.nan, 1.0])
    assert compare_codes("both", first, quantised([[0, 0], [1, 2]], [math.nan, 1.0])) == Codes("both", 2)
    one = compare_codes("one", first, quantised([[7, -8], [1, 2]], [3.0, 1.0]))
    assert one.scale == math.inf
    assert one.fault() is not None


def test_another_shape_is_a_fault() -> None:
    found = compare_codes("shape", quantised([[1, 2]], [1.0]), quantised([[1, 2], [1, 2]], [1.0, 1.0]))
    assert found.fault() is not None


@pytest.mark.parametrize(
    "unequal, largest, scale, ok",
    [(0, 0, 0.0, True), (1, 1, 9e-4, True), (2, 1, 0.0, False), (1, 2, 0.0, False), (0, 0, 2e-3, False)],
)
def test_thresholds_of_codes(unequal: int, largest: int, scale: float, ok: bool) -> None:
    assert (Codes("some", 10_000, unequal, largest, scale).fault() is None) == ok


@pytest.mark.parametrize("difference, ok", [(0.0, True), (0.01, True), (0.011, False), (math.nan, False)])
def test_threshold_of_outputs(difference: float, ok: bool) -> None:
    assert (Output("some", difference).fault() is None) == ok


@pytest.mark.parametrize(
    "value, stderr, passages, ok",
    [
        (0.039, 0.02, 9, True),
        (-0.039, 0.014, 9, True),
        (0.041, 0.02, 9, False),  # more than 1 %
        (-0.031, 0.01, 9, False),  # more than three standard errors
        (3e-6, 1e-7, 9, True),  # float32 cannot tell it from none
        (0.0, 0.0, 9, True),
        (0.01, 0.0, 9, False),
        (0.03, math.nan, 1, True),
        (0.05, math.nan, 1, False),
        (0.03, math.nan, 9, False),
        (math.nan, math.nan, 9, False),
        (math.inf, math.nan, 9, False),
    ],
)
def test_thresholds_of_the_log_perplexity(value: float, stderr: float, passages: int, ok: bool) -> None:
    running = Running(4.0, Estimate(value, stderr), 100, 2, passages)
    assert (running.fault() is None) == ok


def test_more_windows_are_scored_only_where_the_first_do_not_agree(
    pair: Twins, subjects: dict[str, Subject]
) -> None:
    windows = subjects["odd"].windows
    assert compare(*pair, windows, few=1, new_tokens=1).running.windows == 1
    twin = copy.deepcopy(pair[1])
    twin.lm_head.weight = torch.nn.Parameter(twin.lm_head.weight * 1.2, requires_grad=False)
    found = compare(pair[0], twin, windows, few=1, new_tokens=1).running
    assert (found.windows, found.tokens) == (2, 2 * (windows.length - 1))
    assert found.fault() is not None


# The command


def test_the_command_writes_results_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = tmp_path / "parity.json", tmp_path / "parity.md"
    given = ["--models", "odd", "--methods", "rtn", "--bits", "w4a4kv4", "w16a16kv4", "w3a3", "--quiet"]
    assert parity.main([*given, "--out", str(out), "--report", str(report)]) == 0
    assert "all 4 rows agree" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["complete"]
    settings = [(row["bits"], row["setting"]) for row in record["rows"]]
    static = "activation_static=True, kv_symmetric=True, kv_static=True"
    assert settings == [("w4a4kv4", ""), ("w4a4kv4", static), ("w16a16kv4", ""), ("w3a3", "")]
    assert record["rows"][2]["inputs"] is None
    assert record["rows"][3]["cache"] is None
    assert record["rows"][0]["implementations"]["rope_append kv4"]["reference"] > 0
    assert compact(write_report(record, None)) == report.read_text()
    again = tmp_path / "again.md"
    assert parity.main(["--render", str(out), "--report", str(again)]) == 0
    assert again.read_text() == report.read_text()


def test_the_command_fails_where_executions_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quantise = ops.quantise
    monkeypatch.setattr(ops, "quantise", lambda x, **options: floor(quantise(x, **options), x))
    given = ["--models", "odd", "--methods", "rtn", "--bits", "w8a4", "--quiet"]
    assert parity.main([*given, "--report", str(tmp_path / "report.md")]) == 1
    assert "1 of 1 rows differ" in capsys.readouterr().out
    assert (
        "- odd, `rtn` w8a4  float64: layers.0.self_attn.o_proj input" in (tmp_path / "report.md").read_text()
    )


def test_only_what_the_simulation_refuses_as_well_is_not_applicable(
    subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("no such operation")

    subject, pipeline = subjects["odd"], parse_method("rtn")
    group = Case(Bits.parse("w4a16g104"), subject.base, "float64")
    row = parity.measure(subject, pipeline, group, CPU)
    assert row["status"] == "n/a"
    assert row["faults"][0].startswith("group size 104 does not divide the ")
    monkeypatch.setattr("methods.pipeline.pack_decoder", refuse)
    row = parity.measure(subject, pipeline, Case(Bits.parse("w4a16"), subject.base, "float64"), CPU)
    assert row["status"] == "differs"
    assert row["faults"] == ["the int4 execution refuses what the simulation runs: no such operation"]


def test_a_comparison_that_fails_is_a_row_that_differs(
    subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr(parity, "compare", fail)
    subject = subjects["odd"]
    case = Case(Bits.parse("w4a16"), subject.base, "float64")
    row = parity.measure(subject, parse_method("rtn"), case, CPU)
    assert (row["status"], row["faults"]) == ("differs", ["IndexError: out of range"])


@pytest.mark.parametrize(
    "given, said",
    [
        (["--models", "nowhere"], "model 'nowhere'"),
        (["--models", "odd", "--methods", "quarrot"], "did you mean 'quarot'"),
        (["--models", "odd", "--bits", "four"], "bits 'four'"),
        (["--windows", "0"], "give at least 1 window"),
        (["--render", "nowhere.json"], "no results that can be read"),
        (["--render", "results/reference/gate.json"], "not the results of harness/parity.py"),
        (["--models", "odd", "--report", "README.md/report.md"], "README.md"),
    ],
)
def test_mistakes_are_told_in_a_line(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main(given) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


# What the project vouches for


def test_the_committed_table_is_what_its_results_give(root: Path) -> None:
    record = recorded.read(root / "results" / "reference" / "parity.json.xz")
    assert compact(write_report(record, None)) == (root / "reports" / "parity.md").read_text()
    assert record["complete"]
    assert {row["status"] for row in record["rows"]} == {"agrees"}
    held = {row["method"] for row in record["rows"] if row["model"] == DEFAULT_MODEL}
    assert {"rtn", "gptq", "quarot:rounding=rtn", "quarot:rounding=gptq"} <= held
    text = (root / "reports" / "parity.md").read_text()
    missing = {name.partition(":")[0] for name in [*METHODS, *SPECIAL]} - {
        name.partition(":")[0] for name in held
    }
    [line] = [line for line in text.splitlines() if line.startswith(f"Not compared on {DEFAULT_MODEL}")]
    assert all(f"`{name}`" in line for name in missing)
