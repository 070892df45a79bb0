"""The linear for few rows of weights that are not quantised, as far as no GPU is needed: what it refuses,
what may be chosen, what the compiler makes of it, and what it computes when Triton interprets it
(interpreted_dense.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="needs triton")

from kernels import compiled, tune
from kernels.sass import parse_sass
from kernels.triton import linear_dense
from kernels.triton.linear_dense import Choice

BF16 = torch.bfloat16
SHAPES = (*tune.OPERATIONS["linear_dense"].shapes, (4608, 3584), (3584, 18944), (2048, 2048), (16384, 2048))
"""(outputs, inputs), the widths of Qwen2.5-7B and Llama-3.2-1B among them."""
MULTIPROCESSOR = 65536, 64, 227 * 1024
"""Registers, warps, and bytes of shared memory."""


def zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


W = zeros(24, 512)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "phrase"),
    [
        (zeros(512), W, None, None),
        (zeros(2, 1, 512), W, zeros(24), None),
        (zeros(16, 512), W, None, None),
        (zeros(4, 1024)[:, ::2], W, None, None),
        (zeros(0, 512), W, None, None),
        (zeros(3, 512, dtype=torch.float16), W.half(), None, None),
        (zeros(17, 512), W, None, "more than 16 rows"),
        (zeros(3, 512, dtype=torch.float32), W.float(), None, "inputs in torch.float32"),
        (zeros(3, 512), W.half(), None, "a weight in torch.float16 for inputs in torch.bfloat16"),
        (zeros(3, 500), W, None, "inputs (3, 500) for a weight (24, 512)"),
        (zeros(3, 512), W[0], None, "inputs (3, 512) for a weight (512,)"),
        (zeros(3, 100), zeros(24, 100), None, "K = 100 is no multiple of 8"),
        (zeros(3, 512), zeros(24, 1024)[:, ::2], None, "a weight that is not contiguous"),
        (zeros(3, 512), zeros(24 * 512 + 1)[1:].view(24, 512), None, "and aligned to 16 bytes"),
        (zeros(1, 65536), zeros(2, 65536), None, "a weight of 2 x 65536"),
        (zeros(3, 512), W, zeros(1), "a bias (1,) in torch.bfloat16"),
        (zeros(3, 512), W, zeros(24, dtype=torch.float32), "a bias (24,) in torch.float32"),
        (zeros(3, 512).requires_grad_(), W, None, "need gradients"),
        (zeros(3, 512), nn.Parameter(W), None, "need gradients"),
        (zeros(3, 512), W, nn.Parameter(zeros(24)), "need gradients"),
        (zeros(3, 512).to("meta"), W, None, "operands on several devices"),
        (zeros(3, 512), W, zeros(24).to("meta"), "operands on several devices"),
    ],
)
def test_what_is_refused_is_named(x: Tensor, weight: Tensor, bias: Tensor | None, phrase: str | None) -> None:
    reason = linear_dense.unsupported(x, weight, bias)
    if phrase is None:
        assert reason is None
        return
    assert reason is not None and phrase in reason
    with pytest.raises(ValueError, match=re.escape(phrase)):
        linear_dense.dense(x, weight, bias)
    if "gradients" in phrase:
        with torch.no_grad():
            assert linear_dense.unsupported(x, weight, bias) is None


def resident(choice: Choice, rows: int) -> int:
    """Programs of a choice that one multiprocessor holds at once."""
    registers, warps, shared = MULTIPROCESSOR
    sums = 4 * choice.warps * choice.outputs * (8 if rows <= 8 else 16)
    return min(
        registers // (32 * choice.registers * choice.warps), warps // choice.warps, shared // (sums + 1024)
    )


@pytest.mark.parametrize("rows", [1, 4, 8, 9, 16])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_candidates_fit_and_request_what_a_multiprocessor_needs(rows: int, outputs: int, inputs: int) -> None:
    """40 KiB in flight cover 1.7 microseconds at a 132nd of 3.2 TB/s; or else a whole row is in flight."""
    choices = linear_dense.candidates(rows, outputs, inputs)
    assert linear_dense.default(rows, outputs, inputs) in choices or inputs < 2048
    assert len(choices) <= 24 and len(set(choices)) == len(choices)
    for choice in choices:
        steps = -(-inputs // (64 * choice.warps))
        assert choice.outputs in (16, 32, 64) and choice.warps in (4, 8, 16)
        assert 1 <= choice.ahead <= steps and 1 <= choice.x_ahead <= steps
        programs = resident(choice, rows)
        flying = programs * choice.warps * choice.ahead * choice.outputs * 128
        assert programs >= 1 and (flying >= 40 * 1024 or choice.ahead == steps), choice


def test_choices_are_fitted_to_short_rows() -> None:
    assert linear_dense._fitted(Choice(ahead=4, x_ahead=2), 576) == Choice(ahead=2, x_ahead=2)
    assert linear_dense._fitted(Choice(ahead=4, x_ahead=2), 8) == Choice(ahead=1, x_ahead=1)
    assert linear_dense._fitted(Choice(), 4096) == Choice()


def compilations() -> Iterator[compiled.Compilation]:
    yield from linear_dense.compilations()
    for rows in (1, 16):
        for _, inputs in SHAPES:
            default = linear_dense.default(rows, 4096, inputs)
            yield linear_dense.compilation(f"{rows} rows, K {inputs}", rows, 4096, inputs, default)


COMPILATIONS = {each.name: each for each in compilations()}


@pytest.mark.parametrize("name", COMPILATIONS)
def test_defaults_compile_without_spilling(name: str) -> None:
    facts = compiled.facts(COMPILATIONS[name])
    assert facts.stack == 0 and facts.missing == ()
    assert facts.registers <= COMPILATIONS[name].options["maxnreg"]


def test_a_bias_and_float16_compile() -> None:
    made = linear_dense.compilation("bias", 9, 100, 1000, Choice())
    signature = {**made.signature, **dict.fromkeys(("x_ptr", "w_ptr", "y_ptr", "bias_ptr"), "*fp16")}
    constants = {name: value for name, value in made.constexprs.items() if name != "bias_ptr"}
    other = replace(made, signature=signature, constexprs=constants, expect=())
    facts = compiled.facts(other)
    assert facts.stack == 0 and facts.mnemonics["HMMA"] > 0


@pytest.mark.parametrize(("rows", "inputs"), [(1, 4096), (1, 14336), (16, 4096), (16, 14336)])
def test_weights_are_requested_before_the_kernel_waits(rows: int, inputs: int) -> None:
    """In the machine code the loads of the pieces ahead, of 16 bytes, stand before the wait for the kernel in
    front, and no others do; the last piece is requested well before the last product."""
    choice = linear_dense.default(rows, 4096, inputs)
    made = compiled._compile(linear_dense.compilation("order", rows, 4096, inputs, choice))
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(made.asm["cubin"])
        code = parse_sass(compiled._tool("nvdisasm", "-c", str(binary)))
    kinds = {"HMMA.16816.F32.BF16": "p", "LDG.E.128.STRONG.GPU": "w", "LDG.E.128 ": "x", "ACQBULK": "|"}
    found = (kind for line in code for name, kind in kinds.items() if f"{line.name} ".startswith(name))
    first, rest = "".join(found).split("|")
    loads = choice.outputs // 8 * 2  # of a piece
    assert first == "w" * loads * choice.ahead
    steps = inputs // (64 * choice.warps)
    assert rest.count("w") == loads * (steps - choice.ahead)
    tiles = choice.outputs // 16 * (1 if rows <= 8 else 2)
    assert rest.count("p") == 4 * tiles * steps
    last = rest.rindex("w")
    assert rest[last:].count("p") <= 4 * tiles * (choice.ahead + 1)


def test_the_interpreted_kernel() -> None:
    environment: dict[str, Any] = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.interpreted_dense"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parent.parent.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["dense"]
