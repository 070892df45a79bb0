"""The fused quantising kernels without a GPU: what they refuse, the arithmetic of their division, what the
compiler makes of them, and what they compute when Triton interprets them (interpreted_fused.py)."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

from kernels import compiled  # noqa: E402
from kernels.triton import gated as gated_module  # noqa: E402
from kernels.triton import hadamard_quantise as hadamard_module  # noqa: E402
from kernels.triton import quantise as quantise_module  # noqa: E402
from kernels.triton import rmsnorm_quantise as rmsnorm_module  # noqa: E402
from tests.kernels.interpreted_fused import fused  # noqa: E402

MODULES = {
    "gated": gated_module,
    "quantise": quantise_module,
    "rmsnorm_quantise": rmsnorm_module,
    "hadamard_quantise": hadamard_module,
}


# What is refused.


def test_a_cpu_tensor_is_refused_by_name() -> None:
    x = torch.zeros(2, 64)
    with pytest.raises(ValueError, match="the Triton kernel does not take a tensor on the CPU"):
        quantise_module.quantise(x, 4, symmetric=True)
    assert rmsnorm_module.unsupported(x, eps=0.0, bits=4, symmetric=True) == "a tensor on the CPU"
    assert hadamard_module.unsupported(x, size=64) == "a tensor on the CPU"


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        ({"bits": 9}, "9 bits"),
        ({"clip": 0.0}, "a clip ratio of 0.0"),
        ({"group": 16}, "groups of 16 in a row of 64"),
        ({"zero": torch.zeros(1)}, "a static zero-point without its scale"),
        ({"scale": torch.ones(1), "clip": 0.9}, "a clip ratio with a static range"),
        ({"scale": torch.ones(1), "zero": torch.ones(1)}, "a static zero-point, which"),
        ({"scale": torch.ones(3, 1)}, r"a static scale \[3, 1\] for rows \[2, 64\]"),
        ({"scale": torch.ones(64)}, r"a static scale \[64\] for rows \[2, 64\]"),
        ({}, None),
        ({"scale": torch.ones(2, 1)}, None),
    ],
)
def test_quantisers_that_do_not_fit(
    arguments: dict[str, Any], phrase: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)  # then CPU tensors are taken
    quantiser = {"bits": 4, "symmetric": True, **arguments}
    x = torch.zeros(2, 64)
    for reason in (
        quantise_module.unsupported(x, **quantiser),
        rmsnorm_module.unsupported(x, eps=0.0, **quantiser),
        hadamard_module.unsupported(x, size=64, **quantiser),
    ):
        assert reason is None if phrase is None else re.match(phrase, reason or "")


def test_inputs_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    plain: dict[str, Any] = {"bits": 4, "symmetric": True}
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    wide = torch.zeros(1, 40000)
    assert quantise_module.unsupported(x.double(), **plain) == "torch.float64 inputs"
    assert quantise_module.unsupported(wide, **plain) == "rows of 40000 values (1 to 32768 fit)"
    norm = rmsnorm_module.unsupported
    assert norm(x, eps=0.0, keep=64, **plain) == "64 kept of 64 channels"
    assert norm(x, eps=0.0, gain=torch.ones(64), **plain) == "a torch.float32 gain for torch.bfloat16 inputs"
    assert norm(x, eps=0.0, gain=x[0, :3], **plain) == "a gain [3] for 64 channels"
    assert norm(x, eps=0.0, row_scale=torch.ones(2), **plain) == "a scale of rows [2] for an input [2, 64]"
    wide_rows = torch.zeros(2, 128, dtype=torch.bfloat16)
    assert norm(x, eps=0.0, add=x.float()) == "a torch.float32 summand for torch.bfloat16 inputs"
    assert norm(x, eps=0.0, add=x[:1], **plain) == "a summand [1, 64] for an input [2, 64]"
    for reason in (
        quantise_module.unsupported(x, gate=wide_rows, **plain),
        gated_module.unsupported(wide_rows, x),
        hadamard_module.unsupported(x, gate=wide_rows, size=64),
        hadamard_module.unsupported(x, gate=wide_rows, size=64, **plain),
    ):
        assert reason == "a gate [2, 128] for an input [2, 64]"
    assert gated_module.unsupported(x.half(), x) == "a torch.float16 gate for torch.bfloat16 inputs"
    assert gated_module.unsupported(x.double(), x.double()) == "torch.float64 inputs"
    assert norm(x, eps=0.0, add=wide_rows[:, 64:]) is None and norm(x, eps=0.0) is None
    with pytest.raises(ValueError, match="the Triton kernel does not take rows of 40000 values"):
        gated_module.gated(wide, wide)
    transform = hadamard_module.unsupported
    assert transform(x, size=48) == "blocks of 48 x 1 in rows of 64"
    assert transform(torch.zeros(1, 92), size=92) == "a Hadamard matrix of order 92, which is not known"
    assert "of order 11008, whose core is 344" in (transform(torch.zeros(1, 11008), size=11008) or "")
    assert "which registers do not hold" in (transform(torch.zeros(1, 32 * 512), size=512) or "")
    assert "float32 rows" in (transform(torch.zeros(1, 18944), size=18944) or "")
    assert transform(torch.zeros(1, 18944, dtype=torch.bfloat16), size=18944) is None
    with pytest.raises(ValueError, match="does not take a Hadamard matrix of order 92"):
        hadamard_module.hadamard(torch.zeros(1, 92), size=92)


def test_inputs_that_need_gradients_are_refused_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes carry none, and a kernel would drop the kept channels' without a word."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    x, gain, row_scale = torch.zeros(2, 64), torch.ones(64), torch.ones(2, 1)
    plain: dict[str, Any] = {"bits": 4, "symmetric": True}
    learned: Any = (
        {"gain": gain.clone().requires_grad_()},
        {"row_scale": row_scale.clone().requires_grad_()},
        {"add": x.clone().requires_grad_()},
    )

    ones = torch.ones(2, 64)

    def gates(x: torch.Tensor, gate: torch.Tensor) -> tuple[str | None, ...]:
        return (
            gated_module.unsupported(gate, x),
            quantise_module.unsupported(x, gate=gate, **plain),
            hadamard_module.unsupported(x, gate=gate, size=64),
        )

    def reasons(x: torch.Tensor, extra: tuple[dict[str, Any], ...]) -> set[str | None]:
        return {
            quantise_module.unsupported(x, **plain),
            hadamard_module.unsupported(x, size=64, **plain),
            hadamard_module.unsupported(x, size=64),
            *(other for pair in ((x, ones), (ones, x)) for other in gates(*pair)),
            *(rmsnorm_module.unsupported(x, eps=0.0, **some, **plain) for some in extra),
        }

    needs = x.clone().requires_grad_()
    assert reasons(needs, ({},)) == {"inputs that need gradients"}
    assert {rmsnorm_module.unsupported(x, eps=0.0, **some, **plain) for some in learned} == {
        "inputs that need gradients"
    }
    one: Any = torch.ones(1)
    shifted: dict[str, Any] = {"bits": 4, "symmetric": False}
    ranges: Any = {
        "scale": {"scale": one.clone().requires_grad_(), "zero": one},
        "zero-point": {"scale": one, "zero": one.clone().requires_grad_()},
    }

    def of_range(static: dict[str, Any]) -> set[str | None]:
        return {
            quantise_module.unsupported(x, **static, **shifted),
            rmsnorm_module.unsupported(x, eps=0.0, **static, **shifted),
            hadamard_module.unsupported(x, size=64, **static, **shifted),
        }

    for name, static in ranges.items():
        assert of_range(static) == {f"a static {name} that needs gradients"}
    with torch.no_grad():
        assert reasons(needs, ({}, *learned)) == {None}
        assert set().union(*map(of_range, ranges.values())) == {None}
    with torch.inference_mode():
        assert reasons(needs, ({}, *learned)) == {None}


# The division of 16-bit numbers.


def test_a_quotient_of_16_bit_numbers_rounds_to_the_code_of_the_true_one() -> None:
    """All significands of float16, which hold those of bfloat16, over every float32 that gives a quotient
    within some units in the last place of the middle between two codes. Further away, an error of two cannot
    matter.
    """
    x = np.arange(1024, 2048, dtype=np.float64)[:, None]
    assert all(quotients_equal(x, code + 0.5, 16) for code in range(256))


@pytest.mark.parametrize("bits", [8, 11])
def test_a_quotient_of_16_bit_numbers_rounds_to_the_16_bit_number_of_the_true_one(bits: int) -> None:
    """The same beside the middles of neighbouring numbers of 8 or 11 significant bits, as RMSNorm rounds."""
    x = np.arange(2 ** (bits - 1), 2**bits, dtype=np.float64)[:, None]
    middles = range(2**bits + 1, 2 ** (bits + 1), 2)
    assert all(quotients_equal(x, float(middle), 3) for middle in middles)


def quotients_equal(x: np.ndarray, middle: float, reach: int) -> bool:
    """Whether the kernels' quotient of x and every float32 within `reach` of x / middle is the true one."""
    near = (x / middle).astype(np.float32)
    steps = np.arange(-reach, reach + 1, dtype=np.int32)[None, :]
    s = (near.view(np.int32) + steps).view(np.float32).astype(np.float64)
    r = (1.0 / s).astype(np.float32).astype(np.float64)
    q = (x * r).astype(np.float32).astype(np.float64)
    q = fused(fused(q, -s, np.broadcast_to(x, s.shape)), r, q)
    return np.array_equal(q, (x / s).astype(np.float32))


# What the compiler makes of them.


def facts_of(name: str, overlapped: bool = False) -> tuple[compiled.Compilation, compiled.Facts]:
    found = compiled.compilations()[name]
    if overlapped:
        found = replace(found, constexprs={**found.constexprs, "OVERLAPPED": True})
    return found, compiled.facts(found)


@pytest.mark.parametrize(
    ("name", "n", "registers", "instructions"),
    [
        ("quantise bf16-4096-a4", 4096, 64, 18),
        ("quantise bf16-14336-a4", 14336, 64, 20),
        ("rmsnorm_quantise bf16-4096", 4096, 64, 28),
        ("gated bf16", 2048, 32, 18),
        ("gated fp16", 2048, 32, 18),
        ("quantise bf16-14336-a4-gate", 14336, 64, 34),
        ("rmsnorm_quantise bf16-4096-add", 4096, 64, 34),
        ("rmsnorm_quantise bf16-4096-add-floats", 4096, 64, 28),
        ("rmsnorm_quantise bf16-4096-add-scaled-static", 4096, 64, 40),
        ("hadamard_quantise bf16-8192-gate", 8192, 128, 32),
        ("hadamard_quantise bf16-14336-gate", 14336, 128, 32),
        ("hadamard_quantise bf16-14336-gate-clip", 14336, 128, 35),
        ("hadamard_quantise bf16-4096", 4096, 102, 17),
        ("hadamard_quantise bf16-4096-32x128", 4096, 102, 28),
        ("hadamard_quantise bf16-14336", 14336, 128, 19),
    ],
)
def test_what_decides_the_speed(name: str, n: int, registers: int, instructions: int) -> None:
    """No spills, registers for enough rows at once, and fewer instructions an element (of the loop over rows,
    or the whole program) than a multiprocessor issues while the memory delivers one: 29 for a pass that reads
    two bytes and writes one, 48 with a gate and 58 to 77 with a sum or floats."""
    compilation, facts = facts_of(name)
    assert facts.spill_loads == facts.spill_stores == 0 and not facts.missing
    assert facts.registers <= registers
    threads = 32 * compilation.options["num_warps"]
    assert (facts.loop or facts.instructions) * threads / n < instructions


@pytest.mark.parametrize("module", MODULES)
def test_an_overlapping_launch_waits_before_it_reads_rows(module: str) -> None:
    found = next(iter(MODULES[module].compilations()))
    found = replace(
        found,
        constexprs={**found.constexprs, "OVERLAPPED": True},
        options={**found.options, "launch_pdl": True},
    )
    ptx = compiled._compile(found).asm["ptx"]
    wait, launch = ptx.index("griddepcontrol.wait"), ptx.index("griddepcontrol.launch_dependents")
    assert wait < launch
    first = min(match.start() for match in re.finditer(r"ld\.global|cp\.async\.c[ag]|st\.global", ptx))
    if module == "hadamard_quantise":  # its matrices are at rest
        first = ptx.index("cp.async.c")
        assert "st.global" not in ptx[:wait]
    assert wait < first


FEW = {
    "quantise bf16-14336-a4-gate": 1,
    "rmsnorm_quantise bf16-4096-add-few-rows": 1,
    "rmsnorm_quantise bf16-4096-add-floats-few-rows": 0,
    "gated bf16-few-rows": 1,
}


@pytest.mark.parametrize("name", FEW)
def test_all_but_a_gain_is_read_behind_the_wait(name: str) -> None:
    """Of few rows the gain, which is at rest, is fetched before."""
    found = compiled.compilations()[name]
    constants = {**found.constexprs, "OVERLAPPED": True}
    found = replace(found, constexprs=constants, options={**found.options, "launch_pdl": True})
    facts = compiled.facts(found)
    assert facts.spill_loads == facts.spill_stores == 0 and not facts.missing
    ptx = compiled._compile(found).asm["ptx"]
    before, behind = ptx.split("griddepcontrol.wait")
    assert "st.global" not in before and ("ld.global" not in before) == bool(FEW[name])
    assert behind.index("ld.global") < behind.index("griddepcontrol.launch_dependents")
    assert len(re.findall("ld.global", behind.split("griddepcontrol.launch_dependents")[1])) == 0


# What they compute: in a process of its own, because a process either compiles or interprets.


def test_interpreted_kernels_equal_the_reference() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.interpreted_fused"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["quantise", "rmsnorm", "gated", "hadamard", "dequantise"]
