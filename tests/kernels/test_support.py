"""The table of what runs where: derived from the operations themselves, and complete."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from kernels import __main__, ops, support
from kernels.support import Answer, Case

if (reason := ops.unfit_triton()) is not None:
    pytest.skip(reason, allow_module_level=True)

KERNELS = Path(ops.__file__).parent / "triton"
CASES = {f"{case.operation}: {case.operands}": case for case in support.cases()}


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[Answer, Answer]]:
    """(CPU, CUDA) by case."""
    return {name: (support.on_cpu(case), support.on_cuda(case)) for name, case in CASES.items()}


def test_every_operation_is_asked_about() -> None:
    switches = {"implementations", "reset_implementations", "reference_only", "weights_at_rest"}
    switches |= {"counted_apart", "count_replay"}
    helpers = {"refusal", "linear_kernel", "kernel_file", "unfit_triton"}
    helpers |= {"contextmanager", "cache", "find_spec"}
    operations = {name for name, _ in inspect.getmembers(ops, inspect.isfunction) if not name.startswith("_")}
    assert {case.operation for case in CASES.values()} == operations - switches - helpers
    assert len(CASES) == len(list(support.cases()))


def test_answers_are_complete(answers: dict[str, tuple[Answer, Answer]]) -> None:
    for name, (cpu, cuda) in answers.items():
        assert cpu.implementation in ("reference", ""), name
        assert (cpu.implementation == "") == bool(cpu.reason), name
        if cuda.implementation.startswith("triton ("):
            file = cuda.implementation.removeprefix("triton (").removesuffix(")")
            assert (KERNELS / f"{file}.py").is_file() and not cuda.reason, name
        else:
            assert cuda.implementation == cpu.implementation and cuda.reason, name
        assert not {"\n", "|"} & set(str(cpu) + str(cuda)), name
    assert {name for name, (cpu, _) in answers.items() if not cpu.implementation} == {
        "linear: w4a8, weights in groups along axis 0",
        "hadamard: across 9 heads of 64: none is known",
        "hadamard_quantise: across 9 heads of 64: none is known",
    }


@pytest.mark.parametrize(
    ("case", "answer"),
    [
        ("linear: w4a8, 1 row", "triton (linear_few)"),
        (f"linear: w4a8, {ops.FEW_ROWS} rows", "triton (linear_few)"),
        (f"linear: w4a8, {ops.FEW_ROWS + 1} rows", "triton (linear_many)"),
        (f"linear: w4a4, {ops.FEW_ROWS + 1} rows, 64 kept bfloat16 channels", "triton (linear_many)"),
        ("linear: w4a8, inputs with zero-points", "triton (linear_few)"),
        (f"linear: w4a8, {ops.FEW_ROWS + 1} rows, inputs with zero-points", "triton (linear_many)"),
        (
            "linear: w4a8, inputs with zero-points, no sums of codes",
            "reference: inputs with zero-points and a weight without the sums of its codes",
        ),
        ("linear: w4a16, 1 row of bfloat16, groups of 128", "triton (linear_a16)"),
        (f"linear: w4a16, {ops.FEW_A16_ROWS} rows of bfloat16, groups of 128", "triton (linear_a16)"),
        (f"linear: w4a16, {ops.FEW_A16_ROWS + 1} rows of bfloat16, groups of 128", "triton (dequantise)"),
        ("linear: w4a16, 1 row, groups of 32", "triton (dequantise)"),
        ("linear: w4a16, 1 row, K = 576, groups of 64", "triton (dequantise)"),
        ("linear: w4a16, 1 row, groups of 64 with zero-points", "triton (linear_a16)"),
        ("linear: w4a16, 1 row, one scale an output", "triton (linear_a16)"),
        ("linear: w4a16, 1 row, groups along axis 0", "reference: groups along axis 0"),
        ("linear: w4a16, 1 row of float32", "reference: inputs in torch.float32"),
        ("linear: w4a16, 1024 rows, groups of 64 with zero-points", "triton (dequantise)"),
        ("linear: w4a16, 1024 rows, 64 kept channels", "triton (dequantise)"),
        ("linear: w4a8, 1 row, K = 100", "reference: K = 100 is no multiple of 32"),
        ("linear: w3a8, 1 row", "reference: 3-bit weights"),
        (
            "linear: w4a8, weights in groups along axis 0",
            "refused: axis-0 groups cannot run with quantised inputs",
        ),
        ("dense: 1 row of bfloat16", "triton (linear_dense)"),
        (f"dense: {ops.FEW_ROWS} rows of bfloat16", "triton (linear_dense)"),
        (f"dense: {ops.FEW_ROWS + 1} rows of bfloat16", f"reference: more than {ops.FEW_ROWS} rows"),
        ("dense: 1 row of float32", "reference: inputs in torch.float32"),
        ("dense: 1 row, K = 100", "reference: K = 100 is no multiple of 8"),
        ("dense: 1 row, bias", "triton (linear_dense)"),
        ("quantise: bfloat16 to 8 bits", "triton (quantise)"),
        ("quantise: with a gate, halves of rows", "triton (quantise)"),
        ("gated: bfloat16", "triton (gated)"),
        ("rmsnorm: of a sum", "triton (rmsnorm_quantise)"),
        ("rmsnorm_quantise: bfloat16 to 8 bits", "triton (rmsnorm_quantise)"),
        ("rmsnorm_quantise: of a sum", "triton (rmsnorm_quantise)"),
        ("hadamard_quantise: size 14336 with a gate, halves of rows", "triton (hadamard_quantise)"),
        ("hadamard_quantise: size 14336 = 28 x 512", "triton (hadamard_quantise)"),
        ("rmsnorm_quantise: of a sum with a row scale", "triton (rmsnorm_quantise)"),
        ("rmsnorm_quantise: static range with zero-points", "triton (rmsnorm_quantise)"),
        ("hadamard_quantise: static range with zero-points", "triton (hadamard_quantise)"),
        ("rope_append: 4 bits, static range", "triton (kv_append)"),
        ("kv_attention: 4 bits, static range", "triton (kv_attention)"),
        ("hadamard: size 4096, bfloat16", "triton (hadamard_quantise)"),
        ("kv_attention: 4 bits, heads of 128", "triton (kv_attention)"),
        ("find_range: with zero-points, 8 bits", "triton (find_range)"),
        ("find_range: float64", "reference: torch.float64 weights"),
        ("gptq_block: float32, 4 bits", "triton (gptq_block)"),
        ("gptq_block: float64", "reference: torch.float64 weights"),
        ("gptq_block: a block of 512 columns", "reference: a block [8, 512] (of 1 to 256 columns)"),
    ],
)
def test_what_is_promised_is_there(answers: dict[str, tuple[Answer, Answer]], case: str, answer: str) -> None:
    assert str(answers[case][1]) == answer


def test_many_rows_of_floats_name_their_reason(answers: dict[str, tuple[Answer, Answer]]) -> None:
    assert "groups of 8" in answers["linear: w4a16, 1024 rows, groups of 8"][1].reason
    assert "float32" in answers["linear: w4a16, 1024 rows of float32"][1].reason


def test_an_unknown_operand_is_not_answered_for() -> None:
    with pytest.raises(TypeError):
        support.on_cpu(Case("quantise", "nonsense", lambda: ((), {"nonsense": 1})))


def test_the_command_prints_the_table_or_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| operation | operands | CPU | CUDA, sm_90 |" and len(lines) == len(CASES) + 2
    assert all(line.count("|") == 5 for line in lines)
    monkeypatch.setattr(__main__, "unfit_triton", lambda: "triton is not installed")
    assert __main__.main() == 2
    found = capsys.readouterr()
    said = "quantgrid: triton is not installed: pip install --no-deps 'triton==3.6.*'\n"
    assert not found.out and found.err == said
