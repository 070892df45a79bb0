"""The kernels of the KV cache as Triton interprets them, beside the reference: a program of its own, because
a process either compiles or interprets. tests/kernels/test_triton_kv.py runs it with TRITON_INTERPRET=1.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from tests.kernels import gluon_on_numpy

gluon_on_numpy.install("kv_decode", "kv_operands", "kv_ranges")

from kernels import kv_reference  # noqa: E402
from kernels.kv_reference import PackedRows, Rows, kv_rows  # noqa: E402
from kernels.triton import kv_append, kv_attention, kv_dequantise  # noqa: E402
from tests.equality import same  # noqa: E402
from tests.kernels.interpreted_fused import complete_the_interpreter  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAN = float("nan")

# Their arguments come in lists here.
append: Any = kv_append.rope_append
append_reference: Any = kv_reference.rope_append
attend: Any = kv_attention.kv_attention


def random(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def room(
    batch: int, heads: int, capacity: int, width: int, bits: int, symmetric: bool = False,
    static: bool = False, dtype: torch.dtype = BF16,
) -> Rows:  # fmt: skip
    """Rows that hold the worst: codes of any kind, and NaN."""
    if bits == 16:
        return torch.full((batch, heads, capacity, width), NAN, dtype=dtype)
    ranges: dict[str, Any] = {}
    if static:
        ranges["scale"] = torch.tensor(0.3)
        ranges["zero"] = None if symmetric else torch.tensor(7.0)
    rows = kv_rows(batch, heads, capacity, width, bits, symmetric=symmetric, **ranges)
    for part in (rows.codes, rows.zero, rows.poisoned):
        if part is not None and part.dim():
            part.view(torch.uint8).fill_(1)
    if not static:
        rows.scale.fill_(NAN)
    return rows


def parts(rows: Rows) -> list[Tensor]:
    if isinstance(rows, Tensor):
        return [rows]
    return [x for x in (rows.codes, rows.scale, rows.zero, rows.poisoned) if x is not None]


def interpret_append() -> None:
    """RoPE, codes and all that belongs to them are the reference's to the bit; behind the Hadamard transform,
    too, where its float32 is exact, as it is for whole numbers and 1 / √64."""
    cases = [
        (4, 128, BF16, False, False, True), (4, 64, BF16, True, False, True),
        (8, 64, FP16, False, True, True), (4, 128, FP32, True, True, False),
        (16, 64, BF16, False, False, False), (8, 128, FP32, False, False, True),
        (16, 128, FP16, False, False, True),
    ]  # fmt: skip
    for number, (bits, width, dtype, symmetric, static, hadamard) in enumerate(cases):
        for (batch, count, query_heads, heads), at in itertools.product(
            ((1, 1, 4, 2), (2, 5, 3, 3), (2, 3, 16, 8)), (0, 2)
        ):
            merged = random(batch, count, query_heads + 2 * heads, width, seed=number, dtype=dtype)
            angles = random(batch, 1, count, width // 2, seed=5)
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
            if hadamard:
                merged = (merged * 3).round()
                cos, sin = (random(1, 1, count, width // 2, seed=s).sign().to(dtype) for s in (1, 2))
            merged[0, 0, query_heads + heads, 3] = float("inf")
            merged[-1, -1, -1] = 0.0
            query, key, value = merged.split((query_heads, heads, heads), dim=2)
            found, want = (
                [room(batch, heads, count + 3, width, bits, symmetric, static, dtype) for _ in range(2)]
                for _ in range(2)
            )
            clip = 1.0 if static else 0.9
            start = torch.tensor(at) if number % 2 else at
            operands = (query, key, value, cos, sin)
            out = append(*operands, *found, start, hadamard=hadamard, clip=clip)
            ours = append_reference(*operands, *want, start, hadamard=hadamard, clip=clip)
            if hadamard and width == 128:  # 1 / √128 is no float
                torch.testing.assert_close(out, ours, equal_nan=True)
                a_keys, b_keys = (held(each[0], at + count)[:, :, at:] for each in (found, want))
                far = (a_keys - b_keys).abs() > b_keys.abs().nan_to_num().amax(-1, keepdim=True) / 100
                assert float(far.float().mean()) < 0.01, cases[number]
            else:
                assert same(out, ours), (cases[number], batch)
                assert all(same(x, y) for x, y in zip(parts(found[0]), parts(want[0]), strict=True))
            for x, y in zip(parts(found[1]), parts(want[1]), strict=True):
                assert same(x, y), (cases[number], batch, count, at)


def held(rows: Rows, length: int) -> Tensor:
    if isinstance(rows, PackedRows):
        return kv_reference.kv_dequantise(rows, length, FP32)
    return rows[:, :, :length]


def written(rows: Rows, x: Tensor) -> None:
    if isinstance(rows, PackedRows):
        kv_reference.kv_append(rows, x, 0)
    else:
        rows[:, :, : x.shape[2]] = x


def interpret_dequantise() -> None:
    for bits, width, symmetric, static, dtype in itertools.product(
        (4, 8), (64, 128), (True, False), (True, False), (BF16, FP32)
    ):
        rows = room(2, 2, 75, width, bits, symmetric, static)
        assert isinstance(rows, PackedRows)
        x = random(2, 2, 70, width, seed=bits)
        x[0, 1, 3, 5] = NAN
        kv_reference.kv_append(rows, x, 0)
        for length in (1, 66, 70):
            found = kv_dequantise.kv_dequantise(rows, length, dtype)
            assert same(found, kv_reference.kv_dequantise(rows, length, dtype)), (bits, width, symmetric)


def attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
    """In float64: query [B, Hq, 1, D], seen [B or 1, 1, 1, S]."""
    group = query.shape[1] // key.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = query.double() @ k.transpose(-1, -2) / query.shape[-1] ** 0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, -float("inf"))
    return scores.softmax(-1) @ v


def interpret_attention() -> None:
    kv_attention._multiprocessors = lambda device: 3  # type: ignore[assignment]
    cases = [
        (4, 128, BF16, False, False), (4, 64, BF16, True, False), (4, 64, FP16, False, True),
        (8, 64, BF16, False, False), (8, 128, FP16, True, True), (16, 64, BF16, True, False),
        (16, 128, FP16, True, False), (4, 128, FP16, False, False),
    ]  # fmt: skip
    for number, (bits, width, dtype, symmetric, static) in enumerate(cases):
        for (batch, heads, group, capacity, length), masked in itertools.product(
            ((1, 2, 4, 160, 133), (2, 1, 1, 75, 75), (1, 1, 9, 256, 1)), (False, True)
        ):
            # Of sizes far apart, where the dtype holds them: no product may leave the range of float32.
            size = 2.0 ** (30 if masked else -30) if dtype == BF16 else 1.0
            query = random(batch, heads * group, 1, width, seed=number, dtype=dtype) * size
            rows = [room(batch, heads, capacity, width, bits, symmetric, static, dtype) for _ in range(2)]
            for seed, (each, factor) in enumerate(zip(rows, (1 / size, size), strict=True)):
                written(each, random(batch, heads, length, width, seed=seed, dtype=dtype) * factor)
            mask = None
            if masked:
                mask = random(batch, 1, 1, capacity, seed=9) > 0.3
                mask[..., 0] = True
            choice = kv_attention.Choice(positions=(16, 32)[number % 2], warps=(1, 2)[number // 2 % 2])
            given = torch.tensor(length) if number % 3 else length
            seen = mask if mask is None or number % 3 else mask[..., :length]
            found = attend(query, *rows, given, mask=seen, choice=choice)
            key, value = (held(each, length) for each in rows)
            want = attention(query, key, value, None if mask is None else mask[..., :length])
            error = float((found.double() - want).abs().max() / want.abs().max())
            assert error < {BF16: 2.0**-7, FP16: 2.0**-10}[dtype], (cases[number], batch, masked, error)


if __name__ == "__main__":
    complete_the_interpreter()
    for name, run in (
        ("append", interpret_append), ("dequantise", interpret_dequantise), ("attention", interpret_attention)
    ):  # fmt: skip
        run()
        print(name, flush=True)
