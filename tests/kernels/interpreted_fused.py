"""The fused quantising kernels, and the one that dequantises weights, as Triton interprets them, beside the
reference: a program of its own, because a process either compiles or interprets.
tests/kernels/test_triton_fused.py runs it with TRITON_INTERPRET=1.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import pass_reference, reference
from kernels.reference import PackedWeight, Quantised, pack_weight
from kernels.triton import dequantise as dequantise_module
from kernels.triton import gated as gated_module
from kernels.triton import hadamard_quantise as hadamard_module
from kernels.triton import quantise as quantise_module
from kernels.triton import rmsnorm_quantise as rmsnorm_module
from kernels.triton import rounding
from tests.equality import same, same_codes

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


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


def complete_the_interpreter() -> None:
    """Give Triton 3.6's interpreter the device's arithmetic where its own differs: bfloat16 rounds to
    nearest, products of it are products of numbers, fma rounds once, and plain minima and maxima drop NaN.
    The extremes of rows are numpy's, which keep a NaN as well and need no call of Python for each element."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter
    from triton.runtime.interpreter import TensorHandle

    patch, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    cast, reduce = builder.cast_impl, interpreter.ReduceOps.generic_reduce

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

    def extreme(self: Any, values: Any) -> Any:
        for combine, numpys in ((rounding.larger, np.max), (rounding.smaller, np.min)):
            if self.combine_fn is combine:
                return self.min_max(values, val_reduce_op=numpys)
        return reduce(self, values)

    def once(self: Any, a: Any, b: Any, c: Any) -> Any:
        numbers = np.broadcast_arrays(*(h.data.astype(np.float64) for h in (a, b, c)))
        return TensorHandle(fused(*numbers).astype(np.float32), c.dtype.scalar)

    interpreter._patch_lang_tensor, interpreter.ReduceOps.generic_reduce = patched, extreme
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
            {"add": random(11, 200, seed=5, dtype=dtype)[:, 100:196], "keep": 8},
            {"add": x.flip(0), "gain": gain},
            {"add": x.flip(0), "gain": gain, "row_scale": row_scale, "keep": 8},
            {"add": random(11, 96, seed=6, dtype=dtype), "row_scale": row_scale},
        ]
        for case in cases:
            quantiser: dict[str, Any] = {"bits": 4, "symmetric": True, "clip": 0.9}
            keep, floats = case.get("keep", 0), {k: v for k, v in case.items() if k != "keep"}
            stream, kept, q, rms, scale = rmsnorm_module.rmsnorm_quantise(x, eps=1e-5, **case, **quantiser)
            want = pass_reference.rmsnorm(x, eps=1e-5, **floats)
            torch.testing.assert_close(rms, want.rms, equal_nan=True)
            # Given the rms, the rest is the reference's to the bit.
            total = x if "add" not in case else x + case["add"]
            goes_on(case, total, stream, rms, scale)
            assert (stream is x) == (case.keys().isdisjoint({"add", "row_scale"}))
            y = normalised(total, rms, case.get("gain"))
            assert same(kept, y[:, :keep] if keep else None)
            assert same_codes(q, reference.quantise(y[:, keep:], **quantiser)), (dtype, case)
            apart = rmsnorm_module.rmsnorm(x, eps=1e-5, **floats)
            torch.testing.assert_close(apart.rms, want.rms, equal_nan=True)
            y = normalised(total, apart.rms, case.get("gain"))
            goes_on(case, total, apart.stream, apart.rms, apart.row_scale)
            assert same(apart.normalised, y), (dtype, case)
        scale, zero = torch.tensor(0.1), torch.tensor(5.0)
        quantisers: list[dict[str, Any]] = [
            {"bits": 8, "symmetric": True, "scale": scale},
            {"bits": 4, "symmetric": False},
            {"bits": 4, "symmetric": False, "scale": scale, "zero": zero},
            {"bits": 8, "symmetric": False, "scale": scale / 9, "zero": 20 * zero},
        ]
        ways: list[tuple[int, dict[str, Any]]] = [(1, {}), (0, {"add": x.flip(0), "row_scale": row_scale})]
        for quantiser in quantisers:
            for keep, case in ways:
                found = rmsnorm_module.rmsnorm_quantise(x, eps=1e-5, keep=keep, **case, **quantiser)
                y = ((x + case["add"] if case else x) / found.rms).to(dtype)
                assert same(found.kept, y[:, :1] if keep else None)
                assert same_codes(found.codes, reference.quantise(y[:, keep:], **quantiser)), quantiser


def goes_on(case: dict[str, Any], total: Tensor, stream: Tensor, rms: Tensor, scale: Tensor | None) -> None:
    """The stream behind a norm, and its scale."""
    if "row_scale" in case:
        assert same(stream, normalised(total, rms, None)) and same(scale, case["row_scale"] / rms)
    else:
        assert same(stream, total) and scale is None


def normalised(stream: Tensor, rms: Tensor, gain: Tensor | None) -> Tensor:
    y = (stream / rms).to(stream.dtype)
    return y if gain is None else y * gain


# n, size, inner, kept channels
GATED = [(1024, 1024, 1, 64), (256, 256, 1, 0), (56, 28, 1, 0), (96, 12, 4, 5)]


def interpret_gated() -> None:
    """Gate and product are halves of merged rows."""
    for dtype in DTYPES:
        for n, size, inner, keep in GATED[:: 1 if dtype == torch.bfloat16 else 3]:
            plain, hard = torch.cat([random(11, n, seed=1, dtype=dtype), hard_rows(n, dtype)], 1).chunk(2, 1)
            for gate, up in ((hard, plain), (plain, hard)):
                y = gated_module.gated(gate, up)
                as_the_reference(y, gate, up)
                quantiser: dict[str, Any] = {"bits": 8, "symmetric": True, "clip": 0.9}
                # The passes form the same product.
                found = quantise_module.quantise(up, gate=gate, **quantiser)
                assert same_codes(found, reference.quantise(y, **quantiser)), (dtype, n)
                shape: dict[str, Any] = {"size": size, "inner": inner}
                transformed = hadamard_module.hadamard(up, gate=gate, **shape)
                assert same(transformed, hadamard_module.hadamard(y, **shape)), (dtype, n)
                kept, q = hadamard_module.hadamard_quantise(up, gate=gate, keep=keep, **shape, **quantiser)
                want_kept, want = hadamard_module.hadamard_quantise(y, keep=keep, **shape, **quantiser)
                assert same(kept, want_kept) and same_codes(q, want), (dtype, n)


def as_the_reference(y: Tensor, gate: Tensor, up: Tensor) -> None:
    """Infinities and NaN where torch has them. The others within two roundings of the true product, and few
    of 16 bits different from torch's."""
    want = pass_reference.gated(gate, up)
    finite = want.isfinite()
    assert torch.equal(finite, y.isfinite()) and same(y[~finite], want[~finite])
    found, torchs, gate, up = (t[finite].double() for t in (y, want, gate, up))
    exact = gate * torch.sigmoid(gate) * up
    about = torch.finfo(y.dtype)
    half = about.eps / 2
    lost = 2.0**-22 * (4 + gate.abs()) + 2.01 * half
    tiny = about.smallest_normal * about.eps * (1.01 + up.abs())
    # Beyond -88 float32's exponential ends.
    assert bool(((found - exact).abs() <= lost * exact.abs() + tiny).where(gate > -88, True).all())
    if y.dtype != torch.float32:
        assert int((found != torchs).sum()) <= max(1e-3 * found.numel(), 2)


# Each takes another way through the kernel: n, size, inner, and what is chosen.
TRANSFORMS: list[tuple[int, int, int, dict[str, int]]] = [
    (56, 28, 1, {}),  # the fast product alone, its columns padded
    (512, 128, 1, {}),
    (256, 256, 1, {}),  # both, the matrices in their order
    (576, 576, 1, {}),  # a core of 36, padded to 64
    (1024, 1024, 1, {}),  # the matrices permuted
    (1024, 1024, 1, {"stages": 1, "programs": 1}),  # ... and the next row in registers
    (1536, 1536, 1, {"stages": 1, "height": 64}),  # ... with a core of 12
    (2048, 2048, 1, {"stages": 1, "height": 16}),  # ... in two tiles beside each other
    (2048, 2048, 1, {"stages": 3, "height": 16}),
    (6144, 2048, 1, {}),  # three blocks, each a high and narrow tile
    (1024, 128, 4, {}),  # across channels, two blocks
    (864, 24, 36, {"stages": 1}),  # columns padded, and the next row in registers
    (96, 12, 4, {}),  # two blocks of padded rows
]


def interpret_hadamard() -> None:
    for dtype in DTYPES:
        for n, size, inner, fields in TRANSFORMS[:: 1 if dtype == torch.bfloat16 else 3]:
            choice = hadamard_module.Choice(**fields)
            x = hard_rows(n, dtype)
            y = hadamard_module.hadamard(x, size=size, inner=inner, choice=choice)
            plain = x[[0, 1, 2, 3, 7, 10]]
            exact = pass_reference.online_hadamard(plain.double(), size, inner)
            error, own = (
                (out.double() - exact).abs().amax(-1)
                for out in (y[[0, 1, 2, 3, 7, 10]], pass_reference.online_hadamard(plain, size, inner))
            )
            where = (dtype, n, size, inner, fields)
            assert bool((error <= 1.1 * own + 2.0**-17 * exact.abs().amax(-1)).all()), (where, error, own)
            for keep, quantiser in list(quantised_how(n))[: 6 if dtype == torch.bfloat16 else 3]:
                kept, q = hadamard_module.hadamard_quantise(
                    x, size=size, inner=inner, keep=keep, choice=choice, **quantiser
                )
                assert same(kept, y[:, :keep] if keep else None), where
                want = reference.quantise(y[:, keep:], **quantiser)
                assert same_codes(without_infinities(q), without_infinities(want)), (where, keep, quantiser)
        rows_between_pairs(dtype)
        kept_blocks_stay_alone(dtype)


def quantised_how(n: int) -> Iterator[tuple[int, dict[str, Any]]]:
    yield 0, {"bits": 4, "symmetric": True}
    yield n // 3, {"bits": 4, "symmetric": True, "clip": 0.9}
    yield 0, {"bits": 8, "symmetric": False, "clip": 0.8}
    yield 5, {"bits": 4, "symmetric": False}
    yield 0, {"bits": 8, "symmetric": False, "scale": torch.tensor(0.05), "zero": torch.tensor(100.0)}
    yield 0, {"bits": 8, "symmetric": True, "scale": torch.tensor(0.05)}


def without_infinities(q: Quantised) -> Quantised:
    """A row without a finite scale is NaN to every linear; which kind it is depends on the padding."""
    lost = ~q.scale.isfinite()
    nan = torch.tensor(float("nan"))
    zero = None if q.zero is None else q.zero.where(~lost, nan)
    return Quantised(q.codes, q.scale.where(~lost, nan), zero, q.group, q.bits)


def rows_between_pairs(dtype: torch.dtype) -> None:
    """Rows that start between multiples of four bytes, by their step or by their beginning, that lie apart,
    and that are all the same one: their codes are those of the same rows side by side."""
    base = random(6, 1026, dtype=dtype)
    odd = base.flatten()[: 6 * 1025].view(6, 1025)
    for rows in (odd[:, :1024], odd[:, 1:], base[:, 1:1025], base[:, 2:], base[::2, :1024], base[:1, :1024]):
        for view in (rows, rows[:1].expand(6, 1024)):
            for stages in (1, 2):
                choice = hadamard_module.Choice(stages=stages, programs=1)
                found, want = (
                    hadamard_module.hadamard_quantise(x, size=1024, choice=choice, bits=4, symmetric=True)[1]
                    for x in (view, view.clone(memory_format=torch.contiguous_format))
                )
                assert same_codes(found, want), (dtype, view.stride(), stages)


def kept_blocks_stay_alone(dtype: torch.dtype) -> None:
    """NaN and Inf in a block that is kept do not reach the others, nor does what they make of its padding."""
    for n, size, inner, keep in ((56, 28, 1, 28), (96, 12, 4, 48), (1152, 576, 1, 576)):
        for poison in (float("nan"), float("inf")):
            x = random(3, n, dtype=dtype)
            clean = hadamard_module.hadamard_quantise(
                x, size=size, inner=inner, keep=keep, bits=4, symmetric=True
            )
            x[1, 3] = poison
            kept, q = hadamard_module.hadamard_quantise(
                x, size=size, inner=inner, keep=keep, bits=4, symmetric=True
            )
            assert kept is not None and not bool(kept[1].isfinite().all())
            assert same_codes(q, clean[1]), (dtype, n, size, inner)


def weights() -> Iterator[PackedWeight]:
    """All codes; groups up to whole rows; zero-points; scales that overflow and that vanish."""
    g = torch.Generator().manual_seed(5)
    for n, k, group in ((3, 32, 32), (5, 96, 16), (33, 64, 64), (7, 576, 64), (9, 1056, 1056), (4, 512, 128)):
        scale = torch.exp(4 * torch.randn(n, k // group, generator=g))
        scale[0, 0], scale[1, -1], scale[2, 0] = 6e4, 1e-41, float("nan")
        signed = torch.randint(-8, 8, (n, k), generator=g, dtype=torch.int8)
        yield pack_weight(signed, scale, None, 4)
        for zero in (torch.randn(scale.shape, generator=g) * 8, torch.full_like(scale, 8.0)):
            yield pack_weight((signed + 8).to(torch.uint8), scale, zero, 4)


def interpret_dequantise() -> None:
    for w in weights():
        for dtype in (torch.bfloat16, torch.float16):
            want = reference.dequantise_weight(w, dtype)
            for packed in (16, 4096):
                choice = dequantise_module.Choice(packed=packed)
                found = dequantise_module.dequantise(w, dtype, choice=choice)
                assert same(found, want), (w.packed.shape, w.group, w.signed, dtype)
            x = random(35, w.inputs, dtype=dtype)
            others: dict[str, Any] = {
                "bias": random(len(want), dtype=dtype),
                "row_scale": random(35, 1).abs(),
                "x_keep": random(35, 3, dtype=dtype),
                "w_keep": random(len(want), 3, dtype=dtype),
            }
            for keywords in ({}, others):
                y = dequantise_module.linear(x, w, dtype=torch.float32, **keywords)
                assert same(y, reference.linear(x, w, dtype=torch.float32, **keywords))


if __name__ == "__main__":
    complete_the_interpreter()
    interpret_quantise()
    print("quantise")
    interpret_rmsnorm()
    print("rmsnorm")
    interpret_gated()
    print("gated")
    interpret_hadamard()
    print("hadamard")
    interpret_dequantise()
    print("dequantise")
