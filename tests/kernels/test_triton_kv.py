"""The kernels of the KV cache without a GPU: what they refuse, how they split the context, what the compiler
makes of them, and what they compute when Triton interprets them (interpreted_kv.py)."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from kernels import compiled, recorded  # noqa: E402
from kernels.kv_reference import PackedRows, Rows, kv_rows  # noqa: E402
from kernels.triton import kv_append, kv_attention, kv_dequantise  # noqa: E402
from kernels.triton.kv_attention import Choice, splits_of  # noqa: E402

RECORD = Path(__file__).resolve().parents[2] / "results" / "reference" / "kernels-sm90.json.xz"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)  # then CPU tensors are taken


def rows(bits: int = 4, width: int = 64, capacity: int = 32, **more: Any) -> PackedRows:
    return kv_rows(2, 2, capacity, width, bits, symmetric=more.pop("symmetric", False), **more)


def bf16(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


@pytest.mark.usefixtures("interpreted")
def test_attention_that_cannot_run() -> None:
    query, held = bf16(2, 4, 1, 64), rows()
    static = rows(scale=torch.ones(1), zero=torch.ones(1))
    floats = bf16(2, 2, 32, 64)
    cases: list[tuple[tuple[Any, ...], Tensor | None, str | None]] = [
        ((query, held, held, 32), None, None),
        ((query, floats, floats, torch.tensor(3)), None, None),
        ((query, static, static, 1), torch.ones(1, 1, 1, 9, dtype=torch.bool), None),
        ((query.float(), held, held, 8), None, "torch.float32 queries"),
        ((bf16(2, 4, 1, 80), held, held, 8), None, "heads of 80 channels"),
        ((bf16(2, 34, 1, 64), held, held, 8), None, "17 query heads to a key (up to 16 fit)"),
        ((bf16(2, 3, 1, 64), held, held, 8), None, "keys [2, 2, 32, 32] and values"),
        ((query, held, rows(8), 8), None, "keys and values quantised in different ways"),
        ((query, held, static, 8), None, "keys and values quantised in different ways"),
        ((query, held, rows(symmetric=True), 8), None, "zero-points of keys or values alone"),
        ((query, held, floats, 8), None, "packed keys or values beside others"),
        ((query, floats.half(), floats, 8), None, "rows in torch.float16 for queries in torch.bfloat16"),
        ((query, floats[..., 1:], floats, 8), None, "rows [2, 2, 32, 63] for queries [2, 4, 1, 64]"),
        ((query, rows(3), rows(3), 8), None, "rows of 3 bits"),
        ((query, held, held, 33), None, "33 of 32 positions"),
        ((query, held, held, torch.tensor([3])), None, "a length in torch.int64 [1]"),
        ((query, held, held, 9), torch.ones(1, 1, 1, 8, dtype=torch.bool), "a mask [1, 1, 1, 8] for 9 pos"),
        ((query, held, held, 8), torch.zeros(1, 1, 1, 8), "a mask in torch.float32 [1, 1, 1, 8]"),
        ((bf16(2, 4, 3, 64), held, held, 8), None, None),
        ((bf16(2, 4, 3, 64), held, held, torch.tensor(8)), None, "a length on the device for 3 positions"),
        ((bf16(2, 4, 3, 64), floats, floats, 8), None, "several positions of floats, which PyTorch attends"),
    ]
    for operands, mask, phrase in cases:
        reason = kv_attention.unsupported(*operands, mask=mask)
        assert reason is None if phrase is None else (reason or "").startswith(phrase), (phrase, reason)
    with pytest.raises(ValueError, match="the Triton kernel does not take rows of 3 bits"):
        kv_attention.kv_attention(query, rows(3), rows(3), 8)
    seen = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    for length, mask, phrase in ((33, None, "33 of 32 positions"), (0, None, "0 of 32"), (9, seen, "a mask")):
        with pytest.raises(ValueError, match=phrase):  # of one form with lengths that are taken
            kv_attention.kv_attention(query, held, held, length, mask=mask)


@pytest.mark.usefixtures("interpreted")
def test_appending_that_cannot_run() -> None:
    def given(width: int = 64, count: int = 3) -> list[Tensor]:
        heads = bf16(2, count, 8, width).split((4, 2, 2), dim=2)
        return [*heads, *(bf16(1, 1, count, width // 2) for _ in range(2))]

    held: Rows = rows()
    floats: Rows = bf16(2, 2, 32, 64)
    static = rows(scale=torch.ones(1), zero=torch.ones(1))
    cases: list[tuple[list[Any], dict[str, Any], str | None]] = [
        ([*given(), held, held, 0], {"hadamard": True, "clip": 0.9}, None),
        ([*given(), floats, floats, torch.tensor(0)], {}, None),
        ([*given(80), held, held, 0], {}, "heads of 80 channels"),
        ([*given(), held, held, 30], {}, "3 positions at 30 in room for 32"),
        ([*given(), held, floats, 0], {}, "keys of 4 and values of 16 bits"),
        ([*given(), rows(6), rows(6), 0], {}, "rows of 6 bits"),
        ([*given(), held, held, 0], {"clip": 0.0}, "a clip ratio of 0.0"),
        ([*given(), static, static, 0], {"clip": 0.5}, "a clip ratio with a static range"),
        ([*given(), rows(width=128), rows(width=128), 0], {}, "rows [2, 2, 32, 64] of 128 for 2 x 2"),
        ([*given()[:3], *given(count=4)[3:], held, held, 0], {}, "angles [1, 1, 4, 32] for queries"),
    ]  # fmt: skip
    for operands, keywords, phrase in cases:
        reason = kv_append.unsupported(*operands, **keywords)
        assert reason is None if phrase is None else (reason or "").startswith(phrase), (phrase, reason)
    reason = kv_dequantise.unsupported(rows(), 33, torch.bfloat16)
    assert reason == "33 of 32 positions"
    assert kv_dequantise.unsupported(rows(), 3, torch.float64) == "torch.float64 results"


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("place", ["codes", "scale", "zero", "poisoned"])
def test_rows_on_another_device_and_gradients_are_refused(place: str) -> None:
    held = rows(scale=torch.ones(1), zero=torch.ones(1)) if place == "poisoned" else rows()
    query, angles = bf16(2, 4, 1, 64), bf16(1, 1, 1, 32)
    q, k, v = bf16(2, 1, 8, 64).split((4, 2, 2), dim=2)

    def reasons(other: Rows, same: Rows) -> set[str | None]:
        found = [kv_attention.unsupported(query, *both, 8) for both in ((other, same), (same, other))]
        found += [
            kv_append.unsupported(q, k, v, angles, angles, *both, 0)
            for both in ((other, same), (same, other))
        ]
        if isinstance(other, PackedRows):
            found.append(kv_dequantise.unsupported(other, 8, torch.bfloat16))
        return set(found)

    assert reasons(held, held) == {None}
    several, gradients = {"operands on several devices"}, {"inputs that need gradients"}
    elsewhere = replace(held, **{place: getattr(held, place).to("meta")})
    assert reasons(elsewhere, held) == several
    if place == "scale":
        assert reasons(replace(held, scale=held.scale.clone().requires_grad_()), held) == gradients
        floats = bf16(2, 2, 32, 64)
        assert reasons(floats.to("meta"), floats) == several
        assert reasons(floats.clone().requires_grad_(), floats) == gradients


def test_a_cpu_tensor_is_refused_by_name() -> None:
    assert kv_attention.unsupported(bf16(2, 4, 1, 64), rows(), rows(), 8) == "rows on the CPU"
    angles = bf16(1, 1, 1, 32)
    heads = bf16(2, 1, 8, 64).split((4, 2, 2), dim=2)
    unsupported: Any = kv_append.unsupported
    assert unsupported(*heads, angles, angles, rows(), rows(), 0) == "a tensor on the CPU"


def test_registers_hold_as_many_programs_as_are_counted_on() -> None:
    """Those on record for sm_90, of which a multiprocessor has 65536."""
    if not RECORD.exists():
        pytest.skip("no record of compiled kernels")
    found = 0
    for entry in recorded.read(RECORD)["triton"].values():
        for name, facts in entry["kernels"].items():
            kind = re.match(r"kv_attention (?:kv|bf)(\d+), D (\d+)(.*)", name)
            if kind is None:
                continue
            found += 1
            dtype = torch.float16 if "float16" in kind[3] else torch.bfloat16
            choice = kv_attention.default(int(kind[1]), int(kind[2]), dtype)
            assert facts["registers"] * 32 * choice.warps * choice.programs <= 65536, name
    assert found >= 9


@pytest.mark.parametrize("pairs", [1, 3, 8, 24, 64, 192, 256, 1000])
@pytest.mark.parametrize("length", [1, 100, 1024, 32768, 131072])
def test_splits_fill_the_gpu(pairs: int, length: int) -> None:
    choice, multiprocessors = Choice(), 132
    splits = splits_of(length, pairs, choice, multiprocessors)
    steps = -(-length // (choice.positions * choice.warps))
    assert 1 <= splits <= min(steps, kv_attention.MOST_SPLITS)
    slots = multiprocessors * choice.programs
    rounds = -(-splits * pairs // slots) * -(-steps // splits)
    # No more than a third above what as many programs as there is room for would take, one step besides.
    even = steps * pairs / slots
    most = kv_attention.MOST_SPLITS * pairs
    assert rounds <= max(even, steps * pairs / most) * 4 / 3 + 2


def test_the_kernels_compile_without_spills() -> None:
    listed = [c for module in (kv_append, kv_attention, kv_dequantise) for c in module.compilations()]
    assert len({c.name for c in listed}) == len(listed)
    for compilation in listed[:1] + [c for c in listed if c.name.endswith(("kv4, D 128", "bf16, D 128"))]:
        facts = compiled.facts(compilation)
        assert facts.missing == () and facts.stack == facts.spill_loads == facts.spill_stores == 0


def test_interpreted_kernels() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.interpreted_kv"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["append", "dequantise", "attention"]
