"""The fused quantising kernels without a GPU: what they refuse, the arithmetic of their division, how they
cut rows, what the compiler makes of them, and what they compute when Triton interprets them.

Run as a program, the file is the interpreted part: an interpreting process cannot compile.
"""

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
from torch import Tensor

from kernels import reference
from kernels.hadamard import hadamard_factors, hadamard_matrix
from kernels.reference import Quantised

triton = pytest.importorskip("triton")

from kernels import compiled  # noqa: E402
from kernels.triton import hadamard_quantise as hadamard_module  # noqa: E402
from kernels.triton import quantise as quantise_module  # noqa: E402
from kernels.triton import rmsnorm_quantise as rmsnorm_module  # noqa: E402

MODULES = {
    "quantise": quantise_module,
    "rmsnorm_quantise": rmsnorm_module,
    "hadamard_quantise": hadamard_module,
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


def same_codes(a: Quantised, b: Quantised) -> bool:
    return (a.group, a.bits) == (b.group, b.bits) and all(
        same(x, y) for x, y in ((a.codes, b.codes), (a.scale, b.scale), (a.zero, b.zero))
    )


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
    transform = hadamard_module.unsupported
    assert transform(x, size=48) == "blocks of 48 x 1 in rows of 64"
    assert transform(torch.zeros(1, 92), size=92) == "a Hadamard matrix of order 92, which is not known"
    assert "of order 11008, whose core is 344" in (transform(torch.zeros(1, 11008), size=11008) or "")
    assert "which registers do not hold" in (transform(torch.zeros(1, 32 * 512), size=512) or "")
    assert "float32 rows" in (transform(torch.zeros(1, 18944), size=18944) or "")
    assert transform(torch.zeros(1, 18944, dtype=torch.bfloat16), size=18944) is None
    with pytest.raises(ValueError, match="does not take a Hadamard matrix of order 92"):
        hadamard_module.hadamard(torch.zeros(1, 92), size=92)


# The division of 16-bit numbers.


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c for float32 numbers, held in float64, rounded to float32 once.

    The product is exact in float64. The sum is rounded to odd first, which cannot change the second rounding.
    """
    product = a * b
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    even = total.view(np.int64) % 2 == 0
    toward = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    return np.where((lost != 0) & even, toward, total).astype(np.float32).astype(np.float64)


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


# How rows are cut.


@pytest.mark.parametrize(
    ("n", "size", "inner"),
    [
        *[(1 << bits, 1 << bits, 1) for bits in range(1, 16)],
        *[(n, n, 1) for n in (28, 576, 1536, 3584, 5120, 8960, 12288, 13824, 14336, 18944, 28672)],
        *[(4096, 32, 128), (3584, 28, 128), (4096, 128, 1), (13696, 128, 1), (8192, 1024, 1), (864, 24, 36)],
        (4096, 512, 4),
    ],
)
def test_plans_cover_the_row_with_the_matrix_of_its_order(n: int, size: int, inner: int) -> None:
    assert hadamard_module.unsupported_transform(n, size, inner) is None
    cut = hadamard_module.plan(n, size, inner)
    assert cut is not None
    assert cut.blocks * cut.A * cut.J * cut.B == n
    assert cut.options(cut.programs)["maxnreg"] >= 64
    assert cut.elements <= 32768 and 1 <= cut.warps <= 16 and cut.warps.bit_count() == 1
    if cut.slow and cut.fast:
        assert size == cut.A * cut.J * cut.B
        assert hadamard_factors(cut.A)[0] == hadamard_factors(size)[0]
        if size <= 4096:
            parts = hadamard_matrix(cut.A), hadamard_matrix(cut.J * cut.B)
            assert torch.equal(torch.kron(*parts), hadamard_matrix(size))


def test_more_programs_than_registers_hold_are_refused_by_their_number() -> None:
    cut = hadamard_module.plan(14336, 14336, 1)
    assert cut is not None
    with pytest.raises(ValueError, match="3 programs of 8 warps on a multiprocessor leave a thread 80"):
        cut.options(3)


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
        ("hadamard_quantise bf16-4096", 4096, 102, 17),
        ("hadamard_quantise bf16-4096-32x128", 4096, 102, 28),
        ("hadamard_quantise bf16-14336", 14336, 128, 19),
    ],
)
def test_what_decides_the_speed(name: str, n: int, registers: int, instructions: int) -> None:
    """No spills, registers for enough rows at once, and fewer instructions an element (of the loop over rows,
    or the whole program) than the 29 that a multiprocessor issues while the memory delivers one."""
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


# What they compute: in a process of its own, because a process either compiles or interprets.


def test_interpreted_kernels_equal_the_reference() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parent.parent.parent
    environment["PYTHONPATH"] = str(root)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__], env=environment, capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["quantise", "rmsnorm", "hadamard"]


def complete_the_interpreter() -> None:
    """Give Triton 3.6's interpreter the device's arithmetic where its own differs: bfloat16 rounds to
    nearest, products of it are products of numbers, fma rounds once, and plain minima and maxima drop NaN."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter
    from triton.runtime.interpreter import TensorHandle

    patch, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(handle: Any) -> np.ndarray:
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data.astype(np.float32)
        return (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def converted(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(source), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            narrow = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return TensorHandle(narrow.view(torch.uint16).numpy().reshape(source.data.shape), tl.bfloat16)
        return cast(self, source, target)

    def product(self: Any, a: Any, b: Any, c: Any, *_: Any) -> Any:
        return TensorHandle(widened(a) @ widened(b) + c.data, c.dtype.scalar)

    def once(self: Any, a: Any, b: Any, c: Any) -> Any:
        numbers = np.broadcast_arrays(*(h.data.astype(np.float64) for h in (a, b, c)))
        return TensorHandle(fused(*numbers).astype(np.float32), c.dtype.scalar)

    interpreter._patch_lang_tensor = patched
    builder.cast_impl = builder.create_fp_ext = builder.create_fp_trunc = converted
    builder.create_fp_to_fp = lambda self, source, target, _: converted(self, source, target)
    builder.create_dot, builder.create_fma = product, once
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


def hard_rows(n: int, dtype: torch.dtype) -> Tensor:
    """Plain, zero, outlier, tiny, NaN, Inf, halves (many ties); the smallest and the largest numbers."""
    x = random(11, n, dtype=torch.float64) * 3
    x[1], x[2, 3] = 0.0, 1e4
    x[3] *= 1e-6
    x[4, 5], x[5, 6], x[6, 7] = float("nan"), float("inf"), -float("inf")
    x[7] = torch.randint(-14, 15, (n,), generator=torch.Generator().manual_seed(1)) / 2
    x[7, 0] = -7.0
    x[8] = x[7] * torch.finfo(dtype).smallest_normal / 16
    x[9] = x[7] / 8 * torch.finfo(dtype).max
    x[10, 1:] = 0.0
    return x.to(dtype)


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def interpret_quantise() -> None:
    one = torch.tensor(0.3)
    for dtype in DTYPES:
        x = hard_rows(100, dtype)
        for bits in (2, 4, 8):
            quantisers: list[dict[str, Any]] = [
                {"symmetric": True},
                {"symmetric": True, "clip": 0.9},
                {"symmetric": False},
                {"symmetric": False, "clip": 0.8},
                {"symmetric": True, "scale": one},
                {"symmetric": False, "scale": one, "zero": torch.tensor(2.0)},
                {"symmetric": True, "scale": torch.rand(11, 1) + 0.1},
            ]
            for quantiser in quantisers:
                found = quantise_module.quantise(x, bits, **quantiser)
                assert same_codes(found, reference.quantise(x, bits, **quantiser)), (dtype, bits, quantiser)
        for shape in ((0, 8), (8,), (2, 3, 33), (70, 5)):
            x = random(*shape, dtype=dtype)
            found = quantise_module.quantise(x, 4, symmetric=True)
            assert same_codes(found, reference.quantise(x, 4, symmetric=True)), shape
        x = random(6, 64, dtype=dtype)
        for view in (x[::2, :48], x.T):
            found = quantise_module.quantise(view, 4, symmetric=True)
            assert same_codes(found, reference.quantise(view, 4, symmetric=True))


def interpret_rmsnorm() -> None:
    for dtype in DTYPES:
        x, gain = hard_rows(96, dtype), random(96, seed=3, dtype=dtype)
        row_scale = random(11, 1, seed=4).abs()
        cases: list[dict[str, Any]] = [
            {},
            {"gain": gain, "keep": 8},
            {"gain": gain[:1], "row_scale": row_scale, "divisor": 90},
        ]
        for case in cases:
            quantiser: dict[str, Any] = {"bits": 4, "symmetric": True, "clip": 0.9}
            kept, q, rms = rmsnorm_module.rmsnorm_quantise(x, eps=1e-5, **case, **quantiser)
            torch.testing.assert_close(
                rms, reference.rmsnorm_quantise(x, eps=1e-5, **case, **quantiser)[2], equal_nan=True
            )
            # Given the rms, the rest is the reference's to the bit.
            y = (x / rms).to(dtype)
            y = y * case["gain"] if "gain" in case else y
            keep = case.get("keep", 0)
            assert same(kept, y[:, :keep] if keep else None)
            assert same_codes(q, reference.quantise(y[:, keep:], **quantiser)), (dtype, case)


def interpret_hadamard() -> None:
    Choice = hadamard_module.Choice
    cases = [
        *[(64, 64, 1, 0), (1536, 1536, 1, 16), (576, 576, 1, 0), (7168, 7168, 1, 0), (1024, 32, 32, 5)],
        *[(864, 24, 36, 0), (512, 128, 1, 0), (56, 28, 1, 0), (1024, 512, 1, 0), (4096, 512, 4, 0)],
    ]
    for dtype in DTYPES:
        for n, size, inner, keep in cases:
            x = random(3, n, dtype=dtype)
            where = (dtype, n, size, inner)
            y = hadamard_module.hadamard(x, size=size, inner=inner)
            exact = reference.online_hadamard(x.double(), size, inner)
            error, own = (
                float((out.double() - exact).abs().max())
                for out in (y, reference.online_hadamard(x, size, inner))
            )
            assert error <= 1.1 * own, (where, error, own)
            quantiser: dict[str, Any] = {"bits": 4, "symmetric": True}
            kept, q = hadamard_module.hadamard_quantise(x, size=size, inner=inner, keep=keep, **quantiser)
            assert same(kept, y[:, :keep] if keep else None), where
            assert same_codes(q, reference.quantise(y[:, keep:], **quantiser)), where
        # A row that waits in registers, tiles beside each other, rows that start between such pairs.
        x = random(7, 7169, dtype=dtype)
        for rows in (x[:, 1:], x[:, 1:].contiguous()):
            exact = reference.online_hadamard(rows.double(), 7168)
            for choice in (Choice(stages=1), Choice(stages=1, height=64), Choice(stages=2, height=64)):
                y = hadamard_module.hadamard(rows, size=7168, choice=choice)
                own = (reference.online_hadamard(rows, 7168).double() - exact).abs().max()
                assert float((y.double() - exact).abs().max()) <= 1.1 * float(own), (dtype, choice)


if __name__ == "__main__":
    complete_the_interpreter()
    interpret_quantise()
    print("quantise")
    interpret_rmsnorm()
    print("rmsnorm")
    interpret_hadamard()
    print("hadamard")
