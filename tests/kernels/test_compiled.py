"""The Triton kernels compiled for sm_90, on any machine: nothing spills, the instructions that were meant are
there, and the numbers on record are those found. Small kernels and hand-written code test the instrument."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import compiled, ops, recorded, tuning

if (reason := ops.unfit_triton()) is not None:
    pytest.skip(reason, allow_module_level=True)
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("triton interprets its kernels here", allow_module_level=True)

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.compiled import Compilation, Facts
from kernels.sass import largest_loop, parse_sass

RECORD = Path(__file__).resolve().parents[2] / "results" / "reference" / "kernels-sm90.json.xz"
RECORDED: dict[str, Any] = recorded.read(RECORD) if RECORD.exists() else {"triton": {}}
NAMES = sorted({name for entry in RECORDED["triton"].values() for name in entry["kernels"]})


@pytest.fixture(scope="module")
def found() -> dict[str, Facts]:
    """The facts of every compilation; each is compiled once for all tests of this file."""
    return compiled.measure(compiled.compilations(), processes=2)


def test_the_record_holds_exactly_the_compilations_that_are_listed() -> None:
    assert sorted(compiled.compilations()) == NAMES
    for version, entry in RECORDED["triton"].items():
        assert sorted(entry["kernels"]) == NAMES, version
    assert {name.split(" ")[0] for name in NAMES} >= {"linear_few", "linear_many", "linear_a16"}


STACKED = {
    "hadamard_quantise bf16-14336-gate-keep": 88,
    "hadamard_quantise bf16-18944-gate": 104,
    "hadamard_quantise fp32-8192-gate": 96,
}
"""Bytes of a thread that a transform spills whose row, with a gate's, is more than registers hold."""


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_fits_and_is_made_of_what_was_meant(found: dict[str, Facts], name: str) -> None:
    facts = found[name]
    assert facts.stack <= STACKED.get(name, 0), (facts.spill_loads, facts.spill_stores)
    assert facts.registers <= compiled.MAX_REGISTERS
    assert facts.shared <= compiled.MAX_SHARED
    assert facts.missing == ()
    assert facts.loop <= facts.instructions


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_on_record_are_those_found(found: dict[str, Facts], name: str) -> None:
    entry = RECORDED["triton"].get(triton.__version__)
    if entry is None:
        pytest.skip(f"nothing is on record for triton {triton.__version__}")
    now = compiled.record({name: found[name]})["triton"][triton.__version__]["kernels"][name]
    assert now == entry["kernels"][name], "record it: python -m kernels.compiled --out " + RECORD.name


def tuned() -> dict[str, Compilation]:
    """What the tuning table makes of the linears: every kernel once, by the first shape that has it."""
    found: dict[str, tuple[str, Compilation]] = {}
    for operations in tuning.read_table().values():
        for operation, shapes in operations.items():
            module: Any = importlib.import_module(f"kernels.triton.{operation}")
            for key, values in shapes.items():
                rows, outputs, inputs = map(int, key.split("x"))
                choice = tuning.with_values(module.Choice(), values, key)
                if operation == "linear_many":  # whose kernel is not made for a size
                    made = module._compilation(key, choice, rows=rows)
                else:
                    groups = {"group": 128} if operation == "linear_a16" else {}
                    made = module.compilation(key, rows, outputs, inputs, choice, **groups)
                constants = {name: value for name, value in made.constexprs.items() if name != "STRIDE"}
                found.setdefault(f"{operation} {constants} {made.options}", (f"{operation} {key}", made))
    return dict(found.values())


TUNED = tuned()
SPILLED = {
    "linear_a16 16x4096x4096": 8,
    "linear_a16 16x4096x14336": 184,
    "linear_few 1x4096x14336": 16,
    "linear_few 4x4096x14336": 16,
}
"""Bytes of a thread that choices spill which are the fastest in spite of that. Others have none to lose."""


@pytest.mark.parametrize("name", TUNED)
def test_a_tuned_kernel_compiles_and_spills_no_more_than_is_known(name: str) -> None:
    facts = compiled.facts(TUNED[name])
    assert facts.missing == ()
    assert facts.registers <= compiled.MAX_REGISTERS and facts.shared <= compiled.MAX_SHARED
    assert facts.stack <= SPILLED.get(name, 0), (facts.spill_loads, facts.spill_stores)


def test_known_spills_are_of_tuned_kernels() -> None:
    assert set(SPILLED) <= set(TUNED)


@triton.jit
def _product(x, y, out, m, n, k, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.program_id(0) * 64 + tl.arange(0, 64)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    total = tl.zeros((64, 128), tl.int32)
    for start in range(0, k, STEP):
        inputs = start + tl.arange(0, STEP)
        a = tl.load(x + rows[:, None] * k + inputs[None, :])
        b = tl.load(y + columns[None, :] * k + inputs[:, None])
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    tl.store(out + rows[:, None] * n + columns[None, :], total)


@triton.jit
def _many_live(x, out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    values = tl.load(x + at)
    tl.store(out + at, tl.sort(values))


@gluon.jit
def _doubled(x, out):  # type: ignore[no-untyped-def]
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    at = gl.arange(0, 512, layout=layout)
    gl.store(out + at, 2 * gl.load(x + at))


def meta(*shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


SIGNATURE = {"x": "*i8", "y": "*i8", "out": "*i32", "m": "i32", "n": "i32", "k": "i32"}


def product(expect: tuple[str, ...] = (), **options: int) -> Compilation:
    attrs = compiled.divisible(_product, SIGNATURE, "n", "k")
    return Compilation(
        "product", _product, SIGNATURE, {"STEP": 128}, {"num_warps": 4, **options}, attrs, expect
    )


class TestInstrument:
    """On kernels of this file."""

    def test_facts_of_a_matrix_product(self) -> None:
        facts = compiled.facts(product(("IGMMA.64x128x32.S8.S8", "LDGSTS.E"), num_stages=3))
        assert facts.missing == () and facts.spill_loads == facts.spill_stores == facts.stack == 0
        assert facts.mnemonics["IGMMA"] % 4 == 0  # 128 inputs a step, 32 an instruction
        assert facts.shared == 3 * (64 + 128) * 128
        assert 4 < facts.loop < facts.instructions and facts.registers <= 255
        assert compiled.facts(product(("HGMMA", "IGMMA"))).missing == ("HGMMA",)

    def test_a_launch_compiles_what_its_arguments_would(self) -> None:
        arguments = (meta(100, 4096), meta(256, 4096), meta(100, 256, dtype=torch.int32), 100, 256, 4096)
        launched = compiled.launch("product", _product, *arguments, STEP=128, num_warps=4)
        assert {name: kind for name, kind in launched.signature.items() if kind != "constexpr"} == SIGNATURE
        assert launched.constexprs == {"STEP": 128}
        assert compiled.facts(launched) == compiled.facts(product())

    def test_what_the_launcher_knows_of_alignment_changes_the_code(self) -> None:
        unaligned = Compilation("product", _product, SIGNATURE, {"STEP": 128}, {"num_warps": 4})
        aligned = compiled.facts(product())
        assert compiled.facts(unaligned).mnemonics != aligned.mnemonics

    def test_spills_are_seen(self) -> None:
        facts = compiled.facts(
            Compilation(
                "sort",
                _many_live,
                {"x": "*i32", "out": "*i32"},
                {"SIZE": 1024},
                {"num_warps": 1, "maxnreg": 32},
            )
        )
        assert facts.spill_stores > 0 and facts.spill_loads > 0 and facts.registers <= 32

    def test_gluon_kernels_compile(self) -> None:
        facts = compiled.facts(
            Compilation(
                "doubled", _doubled, {"x": "*fp32", "out": "*fp32"}, {}, expect=("LDG.E.128", "STG.E.128")
            )
        )
        assert facts.missing == () and facts.mnemonics["LDG"] == 1 and facts.loop == 0

    @pytest.mark.parametrize(
        ("signature", "constexprs", "message"),
        [
            ({name: SIGNATURE[name] for name in "xy"}, {"STEP": 64}, "out has neither a type nor a value"),
            (SIGNATURE, {}, "STEP has neither"),
            (SIGNATURE | {"z": "i32"}, {"STEP": 64}, "no argument z"),
        ],
    )
    def test_a_signature_that_does_not_fit_is_refused(
        self, signature: dict[str, str], constexprs: dict[str, int], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            compiled.facts(Compilation("product", _product, signature, constexprs))


def test_an_interpreted_kernel_is_not_compiled() -> None:
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"):
        compiled.facts(Compilation("product", object(), {}, {}))


def sass(*lines: str) -> str:
    """As nvdisasm writes it: labels at the margin, instructions behind their addresses."""
    text, address = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return "\n".join([*text, ".L_x_9:", f"        /*{address:04x}*/  BRA `(.L_x_9);", "  /*fff0*/  NOP;"])


def body(count: int) -> list[str]:
    return ["IMAD R0, R0, R0, RZ"] * count


@pytest.mark.parametrize(
    ("lines", "loop", "instructions"),
    [
        ([*body(3), "EXIT"], 0, 4),
        ([*body(3), ".L_x_0:", *body(20), "@!P0 BRA `(.L_x_0)", "EXIT"], 21, 25),
        # An outer loop of 20 + 21 + 1 + 5 around an inner one: the inner counts.
        (
            [
                ".L_x_0:",
                *body(20),
                ".L_x_1:",
                *body(20),
                "@P1 BRA `(.L_x_1)",
                *body(5),
                "@P0 BRA.U `(.L_x_0)",
            ],
            *(21, 47),
        ),
        # A wait inside a loop is no loop.
        (
            [".L_x_0:", *body(30), ".L_x_1:", "SYNCS R0, [R1]", "@!P1 BRA `(.L_x_1)", "@P0 BRA `(.L_x_0)"],
            *(33, 33),
        ),
        # A part of the loop stands behind the end, and jumps back into it.
        (
            [
                *(
                    ".L_x_0:",
                    *body(20),
                    "@P1 BRA `(.L_x_2)",
                    ".L_x_1:",
                    *body(2),
                    "@P0 BRA `(.L_x_0)",
                    "EXIT",
                ),
                *(".L_x_2:", *body(10), "BRA `(.L_x_1)"),
            ],
            *(35, 36),
        ),
        # Jumps back without a loop: to code that is reached around the one who jumps.
        ([*body(2), "@P0 BRA `(.L_x_1)", ".L_x_0:", *body(40), "EXIT", ".L_x_1:", "BRA `(.L_x_0)"], 0, 45),
    ],
)
def test_the_largest_innermost_loop_is_found(lines: list[str], loop: int, instructions: int) -> None:
    code = parse_sass(sass(*lines))
    assert len(code) == instructions
    assert largest_loop(code) == loop


def facts_of(registers: int) -> Facts:
    return Facts(registers, 0, 0, 0, 1024, 100, 50, {"IGMMA": 4, "LOP3": 9})


def test_a_record_keeps_other_versions_of_triton_for_the_same_code_alone() -> None:
    old = compiled.record({"b": facts_of(10), "a": facts_of(20)})
    entry = old["triton"][triton.__version__]
    assert list(entry["kernels"]) == ["a", "b"] and "missing" not in entry["kernels"]["a"]
    others = {"0.1": entry, "0.2": entry | {"code": "another"}}
    new = compiled.record({"a": facts_of(30)}, {"arch": "sm_90", "triton": others | old["triton"]})
    assert list(new["triton"]) == ["0.1", triton.__version__]
    assert new["triton"]["0.1"] == entry
    assert new["triton"][triton.__version__]["kernels"] == {"a": entry["kernels"]["a"] | {"registers": 30}}


def test_a_record_of_some_keeps_the_others_of_the_same_code() -> None:
    old = compiled.record({"b": facts_of(10), "a": facts_of(20)})
    new = compiled.record({"a": facts_of(30), "c": facts_of(40)}, old, partial=True)
    kernels = new["triton"][triton.__version__]["kernels"]
    assert {name: kept["registers"] for name, kept in kernels.items()} == {"a": 30, "b": 10, "c": 40}
    assert list(kernels) == ["a", "b", "c"]
    old["triton"][triton.__version__]["code"] = "another"
    with pytest.raises(ValueError, match="other code"):
        compiled.record({"a": facts_of(30)}, old, partial=True)


class TestCommand:
    """`python -m kernels.compiled`, with facts that are not found anew."""

    @pytest.fixture(autouse=True)
    def known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        some = {name: facts_of(number) for number, name in enumerate(("linear a", "linear b"))}
        monkeypatch.setattr(compiled, "compilations", lambda: dict(some))
        monkeypatch.setattr(compiled, "measure", lambda names, processes: {n: some[n] for n in names})

    def test_one_is_recorded_beside_the_others(self, tmp_path: Path) -> None:
        out = tmp_path / "made" / "record.json"
        assert compiled.main(["--out", str(out)]) == 0
        whole = out.read_text()
        assert compiled.main(["--only", "b", "--out", str(out)]) == 0
        assert out.read_text() == whole

    def test_what_matches_nothing_is_an_error(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert compiled.main(["--only", "x", "--out", str(tmp_path / "record.json")]) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())

    @pytest.mark.parametrize("text", ["[", "[]", "{}", '{"triton": {"3": {}}}', '{"triton": {"3": []}}'])
    def test_a_damaged_record_is_one_line_and_stays(
        self, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "record.json"
        out.write_text(text)
        assert compiled.main(["--out", str(out)]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and captured.out == "" and out.read_text() == text

    def test_a_missing_instruction_is_a_failure(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lacking = dataclasses.replace(facts_of(1), missing=("IMMA",))
        monkeypatch.setattr(compiled, "measure", lambda names, processes: {"linear a": lacking})
        assert compiled.main([]) == 1
        assert "linear a: no IMMA" in capsys.readouterr().err


def test_the_table_names_what_matters() -> None:
    lines = compiled.table({"linear_few a": facts_of(10)}).splitlines()
    assert lines[2] == "| linear_few a | 10 | 0 | 1024 | 100 | 50 | 4 IGMMA |"


def test_nothing_here_needs_triton_until_it_compiles() -> None:
    code = "import sys; import kernels.compiled, kernels.ops, kernels.tune, kernels.support; "
    code += "assert 'triton' not in sys.modules, 'imported'"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=RECORD.parents[2]
    )
    assert done.returncode == 0, re.sub(r"\s+", " ", done.stderr)
