"""The kernels that round weights, without a GPU: what they refuse, what the compiler makes of them, and what
they compute when Triton interprets them (interpreted_weights.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from kernels import compiled  # noqa: E402
from kernels.triton import find_range as range_module  # noqa: E402
from kernels.triton import gptq_block as block_module  # noqa: E402

# What is refused.


def operands(rows: int = 2, n: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.zeros(rows, n), torch.eye(n), torch.ones(rows, n), torch.zeros(rows, n)


def test_a_cpu_tensor_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="the Triton kernel does not take a tensor on the CPU"):
        block_module.gptq_block(*operands(), 4)
    with pytest.raises(ValueError, match="the Triton kernel does not take a tensor on the CPU"):
        range_module.find_range(torch.zeros(2, 8), 4, True, True)


def test_operands_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)  # then CPU tensors are taken
    weight, factor, scale, zero = operands()
    reason = block_module.unsupported
    assert reason(weight, factor, scale, zero, 4) is None and reason(weight, factor, scale, None, 8) is None
    assert reason(weight.double(), factor, scale, zero, 4) == "torch.float64 weights"
    assert reason(weight, factor, scale, zero.half(), 4) == "torch.float16 zero-point"
    assert reason(weight, factor[:4], scale, zero, 4) == "a factor [4, 8] for a block [2, 8]"
    assert reason(weight, factor, scale[:, :1], zero, 4) == "a scale [2, 1] for a block [2, 8]"
    assert reason(weight, factor, scale, zero, 9) == "9 bits (2 to 8 are defined)"
    assert reason(*operands(2, 300), 4) == "a block [2, 300] (of 1 to 256 columns)"
    learned = factor.clone().requires_grad_()
    assert reason(weight, learned, scale, zero, 4) == "operands that need gradients"
    with torch.no_grad():
        assert reason(weight, learned, scale, zero, 4) is None
    rows = range_module.unsupported
    assert rows(weight, 4, True, True) is None
    assert rows(weight.bfloat16(), 4, True, True) == "torch.bfloat16 weights"
    assert rows(weight, 1, True, True) == "1 bits (2 to 8 are defined)"
    assert rows(torch.zeros(1, 40000), 4, True, True) == "weights [1, 40000] (rows of 1 to 32768 values fit)"
    assert rows(learned, 4, True, True) == "inputs that need gradients"


# What the compiler makes of them.


@pytest.mark.parametrize(
    ("name", "registers", "loop"),
    [
        ("gptq_block w4", 80, 300),
        ("gptq_block w4-asymmetric", 112, 340),
        ("find_range w4-128", 96, 1340),
        ("find_range w4-14336", 64, 1000),
    ],
)
def test_what_decides_the_speed(name: str, registers: int, loop: int) -> None:
    """No spills; a column of a block's four rows, and a step of a search over 16 values a thread, in so many
    instructions."""
    facts = compiled.facts(compiled.compilations()[name])
    assert facts.spill_loads == facts.spill_stores == 0 and not facts.missing
    assert facts.registers <= registers and facts.loop <= loop


# What they compute: in a process of its own, because a process either compiles or interprets.


def test_interpreted_kernels_equal_the_reference() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.interpreted_weights"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["gptq_block", "find_range"]
