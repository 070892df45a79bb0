"""The linears for few rows, as far as no GPU is needed: what they refuse, what may be chosen, and what the
one for codes computes when Triton interprets it (interpreted_few.py)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import compiled
from kernels.reference import PackedWeight, Quantised, pack_weight, quantise

pytest.importorskip("triton", reason="needs triton")

from kernels.sass import parse_sass
from kernels.triton import dequantise, linear_a16, linear_few, linear_many
from kernels.triton.few_rows import tokens


def weight(outputs: int = 24, inputs: int = 512, group: int | None = None, bits: int = 4) -> PackedWeight:
    q = quantise(torch.randn(outputs, inputs), bits, symmetric=True, group=group)
    return pack_weight(q.codes, q.scale, None, bits)


def codes(rows: int = 3, inputs: int = 512) -> Quantised:
    return quantise(torch.randn(rows, inputs), 8, symmetric=True)


def floats(rows: int = 3, inputs: int = 512, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(rows, inputs, dtype=dtype)


KEPT = torch.zeros(3, 16, dtype=torch.bfloat16)
SHIFTED = quantise(torch.randn(3, 512), 8, symmetric=False)
SUMMED = pack_weight(torch.ones(24, 512, dtype=torch.int8), torch.ones(24, 1), None, 4, colsum=True)
UNSIGNED = pack_weight(torch.zeros(24, 512, dtype=torch.uint8), torch.ones(24, 1), torch.ones(24, 1), 4)
ALONG_OUTPUTS = pack_weight(torch.zeros(24, 512, dtype=torch.int8), torch.ones(2, 512), None, 4, axis=0)


@pytest.mark.parametrize(
    ("x", "w", "others", "phrase"),
    [
        (codes(), weight(), {}, None),
        (codes(64), weight(), {}, None),
        (codes(65), weight(), {}, "65 rows"),
        (codes(inputs=48), weight(inputs=48), {}, "K = 48 is no multiple of 32"),
        (codes(inputs=96), weight(), {}, "an input of 96 channels for a weight of 512"),
        (codes(), weight(bits=3), {}, "3-bit weights"),
        (codes(), weight(group=128), {}, "groups of weights"),
        (codes(), UNSIGNED, {}, "zero-points"),
        (SHIFTED, weight(), {}, "zero-points and a weight without the sums of its codes"),
        (SHIFTED, SUMMED, {}, None),
        (replace(SHIFTED, zero=torch.zeros(())), SUMMED, {}, r"zero-points \(\) in torch\.float32"),
        (replace(SHIFTED, zero=torch.zeros(3, 1).double()), SUMMED, {}, r"zero-points \(3, 1\) in"),
        (replace(SHIFTED, zero=None), SUMMED, {}, "torch.uint8 inputs without zero-points"),
        (replace(codes(), zero=torch.zeros(3, 1)), SUMMED, {}, "torch.int8 inputs with zero-points"),
        (quantise(torch.randn(3, 512), 8, symmetric=True, group=64), weight(), {}, "groups of inputs"),
        (codes(), weight(), {"dtype": torch.float64}, r"torch\.float64 results"),
        (codes(), weight(), {"x_keep": KEPT, "w_keep": KEPT.new_zeros(24, 16)}, None),
        (codes(), weight(), {"x_keep": KEPT, "w_keep": KEPT.new_zeros(24, 32)}, "that do not fit"),
        (codes(), weight(), {"x_keep": KEPT}, "kept channels without both"),
        (codes(), weight(), {"x_keep": KEPT.float(), "w_keep": torch.zeros(24, 16)}, "kept channels in"),
        (codes(), weight(), {"x_keep": KEPT[:, :8], "w_keep": KEPT.new_zeros(24, 8)}, "8 kept channels"),
        (codes(), weight(), {"bias": torch.zeros(3)}, r"bias \(3,\) that does not fit"),
        (codes(), weight(), {"bias": torch.zeros(24, dtype=torch.float64)}, "bias in"),
        (codes(), weight(), {"row_scale": torch.ones(1, 1)}, "row_scale"),
        (replace(codes(), scale=torch.ones(1, 1)), weight(), {}, "input scales"),
        (
            codes(),
            replace(weight(), packed=weight(inputs=1024).packed[:, :256]),
            {},
            "not contiguous and aligned",
        ),
        (codes(), replace(weight(), scale=torch.ones(3, 1)), {}, "for 24 outputs"),
        (codes(1, 65536), weight(2, 65536), {}, "a weight of 2 x 65536"),
        (floats(), weight(), {}, None),
        (floats(), weight(group=128), {}, None),
        (floats().requires_grad_(), weight(), {}, "need gradients"),
        (floats(), UNSIGNED, {}, None),
        (floats(dtype=torch.float32), weight(), {}, r"inputs in torch\.float32"),
        (floats(), weight(group=32), {}, "groups of 32"),
        (floats(inputs=384), weight(inputs=384, group=128), {}, "divide K / 2 = 192"),
        (floats(), ALONG_OUTPUTS, {}, "groups along axis 0"),
        (floats(100), weight(), {}, "100 rows"),
        (floats(), weight(), {"x_keep": KEPT, "w_keep": KEPT.new_zeros(24, 16)}, "kept channels beside"),
    ],
)
def test_what_is_refused_is_named(
    x: Any, w: PackedWeight, others: dict[str, Any], phrase: str | None
) -> None:
    module: Any = linear_few if isinstance(x, Quantised) else linear_a16
    others = {"dtype": torch.bfloat16, **others}
    reason = module.unsupported(x, w, **others)
    if phrase is None:
        assert reason is None
        return
    with pytest.raises(ValueError, match=phrase):
        module.linear(x, w, **others)


def test_scales_of_another_type_are_refused() -> None:
    double = replace(weight(), scale=torch.ones(24, 1, dtype=torch.float64))
    for reason in (
        linear_few.unsupported(codes(), double, dtype=torch.float32),
        linear_a16.unsupported(floats(), double, dtype=torch.float32),
    ):
        assert reason == "scales that are not float32"


def elsewhere(x: torch.Tensor) -> torch.Tensor:
    return x.to("meta")


@pytest.mark.parametrize(
    "place",
    ["packed", "scale", "zero", "colsum", "x", "x.zero", "x_keep", "w_keep", "row_scale", "bias"],
)
@pytest.mark.parametrize(
    "module, x, w",
    [
        (linear_few, codes(), weight()),
        (linear_many, codes(), weight()),
        (linear_few, SHIFTED, SUMMED),
        (linear_many, SHIFTED, SUMMED),
        (linear_a16, floats(), UNSIGNED),
        (dequantise, floats(), UNSIGNED),
    ],
)
def test_operands_on_several_devices_and_gradients_are_refused(
    module: Any, x: Any, w: PackedWeight, place: str
) -> None:
    """Whichever operand it is: no kernel reads another GPU's memory, and none has a gradient."""
    if ("keep" in place and module is linear_a16) or (place == "zero" and w.zero is None):
        return
    if place in ("colsum", "x.zero") and x is not SHIFTED:
        return
    given: dict[str, Any] = {"bias": torch.zeros(24), "row_scale": torch.ones(3, 1)}
    if "keep" in place:
        given |= {"x_keep": KEPT, "w_keep": KEPT.new_zeros(24, 16)}
    if module is dequantise:
        given["bias"] = given["bias"].bfloat16()
    assert module.unsupported(x, w, dtype=torch.bfloat16, **given) is None

    def reason(change: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
        if place == "x":
            other = change(x) if isinstance(x, torch.Tensor) else replace(x, scale=change(x.scale))
            return module.unsupported(other, w, dtype=torch.bfloat16, **given)
        if place == "x.zero":
            return module.unsupported(replace(x, zero=change(x.zero)), w, dtype=torch.bfloat16, **given)
        if place in ("packed", "scale", "zero", "colsum"):
            fields: dict[str, Any] = {place: change(getattr(w, place))}
            held = replace(w, **fields)
            return module.unsupported(x, held, dtype=torch.bfloat16, **given)
        return module.unsupported(x, w, dtype=torch.bfloat16, **{**given, place: change(given[place])})

    assert reason(elsewhere) == "operands on several devices"
    if place not in ("packed", "colsum"):  # whole numbers
        assert reason(lambda t: t.clone().requires_grad_()) == "inputs that need gradients"
        with torch.no_grad():
            assert reason(lambda t: t.clone().requires_grad_()) is None


def test_each_takes_its_own_kind_of_inputs() -> None:
    assert linear_few.unsupported(floats(), weight(), dtype=torch.float32) == "floating-point inputs"
    assert linear_a16.unsupported(codes(), weight(), dtype=torch.float32) == "quantised inputs"


@pytest.mark.parametrize("rows", [1, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("inputs", [576, 1536, 4096, 14336])
def test_candidates_are_as_many_as_can_be_tried_and_fit(rows: int, inputs: int) -> None:
    for module in (linear_few, linear_a16):
        choices: Any = module.candidates(rows, 4096, inputs)
        assert len(choices) <= 24 and len(set(choices)) == len(choices)
        for choice in choices:
            pieces = -(-inputs // 2 // (getattr(choice, "piece", 64) * choice.warps))
            if held := getattr(choice, "held", 0):
                assert 1 <= held <= pieces and rows <= module.MOST_TOKENS and choice.ahead >= 1
            else:
                assert 1 <= choice.ahead <= pieces and 1 <= choice.x_ahead <= pieces
            shared = 4 * choice.warps * choice.outputs * tokens(rows, module.MOST_TOKENS)
            assert shared <= 227 * 1024


@pytest.mark.parametrize(
    "changes",
    [
        {"outputs": 8},
        {"warps": 1},
        {"warps": 3},
        {"ahead": 0},
        {"registers": 64},
        {"piece": 32},
        {"held": -1},
    ],
)
def test_impossible_choices_of_the_16_bit_linear_are_known(changes: dict[str, int]) -> None:
    assert linear_a16.Choice().fits() and not replace(linear_a16.Choice(), **changes).fits()


HELD = linear_a16.Choice(warps=16, ahead=2, registers=128, held=1)


def test_x_is_held_for_few_rows_whose_partial_sums_find_room() -> None:
    fitted = linear_a16._fitted
    assert fitted(HELD, 16, 4096, 4096, 128) == HELD
    assert fitted(HELD, 16, 4096, 14336, 128) == HELD
    assert fitted(replace(HELD, held=9), 1, 4096, 4096, 128).held == 1  # there is no second piece
    assert fitted(HELD, 16, 512, 512, 64).piece == 64
    assert fitted(HELD, 17, 4096, 4096, 128).held == 0
    assert fitted(HELD, 16, 10**6, 4096, 128).held == 1  # no partial sums at all
    streamed = fitted(HELD, 16, 10**6, 14336, 128)
    assert streamed.held == 0 and 1 <= streamed.ahead <= 4


@pytest.mark.parametrize("processors", [1, 7, 132])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 32), (300, 576), (4096, 4096), (28672, 4096), (4096, 14336)]
)
def test_programs_that_hold_x_share_all_blocks(outputs: int, inputs: int, processors: int) -> None:
    for choice in linear_a16.candidates(16, 4096, 4096):
        if not choice.held:
            continue
        slices, teams = linear_a16._dealt(choice, outputs, inputs, processors)
        assert (slices - 1) * choice.warps * choice.piece * choice.held < inputs // 2
        assert slices * choice.warps * choice.piece * choice.held >= inputs // 2
        assert 1 <= teams <= -(-outputs // 16)
        resident = 65536 // (choice.warps * 32 * choice.registers)
        assert teams == 1 or slices * teams <= resident * processors
        assert slices == 1 or teams <= 2 * processors  # a counter each


@pytest.mark.parametrize("inputs", [4096, 14336])
def test_the_next_blocks_are_on_their_way_while_one_is_multiplied(inputs: int) -> None:
    """In the machine code's loop, each block's products come before the loads that take its registers, and
    those before the next block's products."""
    made = compiled._compile(linear_a16.compilation("held", 16, 4096, inputs, HELD, group=128))
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(made.asm["cubin"])
        code = parse_sass(compiled._tool("nvdisasm", "-c", str(binary)))
    kinds = {"HMMA.16816.F32.BF16": "p", "LDG.E.128.STRONG.GPU": "w", "ACQBULK": "|", "BAR.SYNC": "b"}
    found = (kind for line in code for name, kind in kinds.items() if line.name.startswith(name))
    first, rest = "".join(found).split("|")
    assert first == 2 * "wwww"
    assert rest.startswith(2 * (32 * "p" + "wwww" + "bb"))
    assert rest.count("w") == 8 and rest.count("p") == 64


def test_the_interpreted_kernel() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.interpreted_few"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parent.parent.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["few"]
