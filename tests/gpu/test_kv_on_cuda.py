"""The KV cache's kernels on a GPU: what they write is the reference's to the bit, and attention is as near to
float64 as PyTorch's own. Small enough for a memory checker:

    compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_kv_on_cuda.py -k "small or written"
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import kv_reference, ops
from kernels.kv_reference import PackedRows, Rows, kv_rows
from tests.equality import same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytest.importorskip("triton", reason="needs triton")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAN, INF = float("nan"), float("inf")
FACTOR = 1.5
"""How many times PyTorch's error, in the same dtype and over the same rows, attention may have."""


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """What the allocator hands out next is NaN, or the code -1: an element that is not written shows."""
    for size in (2**12, 2**16, 2**20, 2**24):
        torch.full((size,), -1, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()


def random(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to("cuda", dtype)


def room(
    batch: int, heads: int, capacity: int, width: int, bits: int, *, symmetric: bool = False,
    static: bool = False, dtype: torch.dtype = BF16,
) -> Rows:  # fmt: skip
    """Rows that hold the worst until they are written: NaN, and codes of any kind."""
    if bits == 16:
        return torch.full((batch, heads, capacity, width), NAN, dtype=dtype, device="cuda")
    ranges: dict[str, Any] = {}
    if static:
        ranges = {"scale": torch.tensor(0.3), "zero": None if symmetric else torch.tensor(7.0)}
    rows = kv_rows(batch, heads, capacity, width, bits, symmetric=symmetric, **ranges, device="cuda")
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


def append(rows: Rows, x: Tensor, start: int = 0) -> None:
    if isinstance(rows, PackedRows):
        kv_reference.kv_append(rows, x, start)
    else:
        rows[:, :, start : start + x.shape[2]] = x


def floats(rows: Rows, length: int) -> Tensor:
    if isinstance(rows, PackedRows):
        return kv_reference.kv_dequantise(rows, length, FP32)
    return rows[:, :, :length]


def angles(batch: int, count: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    found = random(batch, 1, count, width // 2, seed=7) * 3
    return found.cos().to(dtype), found.sin().to(dtype)


WRITTEN = [
    # bits, width, dtype, symmetric, static, hadamard, batch, tokens, query heads, heads, start
    (4, 128, BF16, False, False, False, 1, 1, 32, 8, 0),
    (4, 128, BF16, False, False, True, 3, 1, 32, 8, 5),
    (4, 64, BF16, True, False, True, 2, 7, 32, 8, 1),
    (4, 64, FP16, False, True, True, 1, 33, 9, 3, 0),
    (8, 128, BF16, False, False, False, 2, 17, 28, 4, 2),
    (8, 64, FP32, True, True, True, 1, 5, 4, 4, 3),
    (8, 128, FP16, True, False, True, 2, 3, 16, 1, 0),
    (4, 128, FP32, False, False, True, 1, 9, 8, 2, 0),
    (16, 128, BF16, False, False, True, 2, 9, 32, 8, 4),
    (16, 64, FP32, False, False, False, 1, 3, 15, 5, 0),
]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_written_is_the_reference_s(case: tuple[Any, ...], on_device: bool) -> None:
    bits, width, dtype, symmetric, static, hadamard, batch, count, query_heads, heads, at = case
    merged = random(batch, count, query_heads + 2 * heads, width, dtype=dtype)
    merged[0, 0, query_heads, 1], merged[-1, -1, -1, 2] = NAN, INF
    merged[0, 0, query_heads + heads] = 0.0
    query, key, value = merged.split((query_heads, heads, heads), dim=2)
    assert count == 1 or not query.is_contiguous()
    cos, sin = angles(batch if on_device else 1, count, width, dtype)
    start = torch.tensor(at, device="cuda") if on_device else at
    clip = 1.0 if static else 0.95

    def rows(bits: int) -> tuple[Rows, Rows]:
        options: Any = {"symmetric": symmetric, "static": static, "dtype": dtype}
        made = [room(batch, heads, at + count + 2, width, bits, **options) for _ in range(2)]
        return made[0], made[1]

    ops.reset_implementations()
    found, turned = rows(bits), rows(16)
    out = ops.rope_append(query, key, value, cos, sin, *found, start, hadamard=hadamard, clip=clip)
    again = ops.rope_append(query, key, value, cos, sin, *turned, start, hadamard=hadamard)
    assert {name for each in ops.implementations().values() for name in each} == {"triton"}
    assert same(out, again) and out.shape == (batch, query_heads, count, width) and out.is_contiguous()
    # Keys and queries as the kernel turned them, against the reference's: rounding of float32 sums apart.
    want_turned = rows(16)
    want = kv_reference.rope_append(query, key, value, cos, sin, *want_turned, start, hadamard=hadamard)
    for a, b in ((out, want), *zip(turned, want_turned, strict=True)):
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        if hadamard:
            tolerance = {BF16: 2.0**-7, FP16: 2.0**-10, FP32: 1e-5}[dtype]
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance / 8, equal_nan=True)
        else:
            assert same(a, b)
    # Codes, of what was turned, to the bit; and nothing beside them was touched.
    expected = rows(bits)
    for rows_of, x in zip(expected, turned, strict=True):
        assert isinstance(x, Tensor)
        if isinstance(rows_of, PackedRows):
            kv_reference.kv_append(rows_of, x[:, :, at : at + count], at, clip=clip)
        else:
            append(rows_of, x[:, :, at : at + count], at)
    for a_rows, b_rows in zip(found, expected, strict=True):
        assert all(same(x, y) for x, y in zip(parts(a_rows), parts(b_rows), strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("bits", "width"), [(4, 64), (4, 128), (8, 64), (8, 128)])
def test_rows_written_are_dequantised_as_by_the_reference(bits: int, width: int, dtype: torch.dtype) -> None:
    from kernels.triton.kv_dequantise import kv_dequantise

    for symmetric in (True, False):
        for static in (True, False):
            rows = room(2, 3, 203, width, bits, symmetric=symmetric, static=static)
            assert isinstance(rows, PackedRows)
            x = random(2, 3, 200, width)
            x[0, 1, 5, 3] = NAN
            append(rows, x)
            for length in (1, 64, 131, 200):
                found = kv_dequantise(rows, length, dtype)
                assert same(found, kv_reference.kv_dequantise(rows, length, dtype)), (symmetric, static)


def exact(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
    """Attention of one position in float64."""
    group = query.shape[1] // key.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = query.double() @ k.transpose(-1, -2) / query.shape[-1] ** 0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, -INF)
    return scores.softmax(-1) @ v


def checked(query: Tensor, keys: Rows, values: Rows, length: int, mask: Tensor | None, found: Tensor) -> None:
    """Against PyTorch's attention to the rows in the query's dtype, both against float64."""
    key, value = floats(keys, length), floats(values, length)
    want = exact(query, key, value, mask)
    group = query.shape[1] // key.shape[1]
    k, v = (x.to(query.dtype).repeat_interleave(group, 1) for x in (key, value))
    theirs = F.scaled_dot_product_attention(query, k, v, attn_mask=mask)
    # Of few positions, the rounding of one probability times its scale is an error of its own.
    share = torch.finfo(query.dtype).eps / 4 if length < 64 else 1e-4
    allowed = FACTOR * float((theirs.double() - want).norm()) + share * float(want.norm())
    assert found.dtype == query.dtype and found.shape == query.shape
    assert float((found.double() - want).norm()) <= allowed


def attended(
    batch: int, heads: int, group: int, width: int, capacity: int, length: int, bits: int,
    dtype: torch.dtype, **options: Any,
) -> tuple[Tensor, Rows, Rows]:  # fmt: skip
    """Queries, and rows of which `length` are written, all of them with a mean that is not 0."""
    query = random(batch, heads * group, 1, width, dtype=dtype)
    keys, values = (room(batch, heads, capacity, width, bits, dtype=dtype, **options) for _ in range(2))
    for seed, rows in enumerate((keys, values)):
        append(rows, random(batch, heads, length, width, seed=seed, dtype=dtype) + 0.5)
    return query, keys, values


SHAPES = [
    # batch, heads, group, width, capacity, length
    (1, 8, 4, 128, 4096, 4000),
    (8, 8, 4, 128, 2048, 1999),
    (3, 2, 1, 64, 640, 601),
    (2, 3, 3, 64, 333, 333),
    (1, 4, 7, 128, 1024, 17),
    (1, 1, 16, 64, 10000, 9999),
    (2, 8, 8, 128, 520, 1),
    (1, 2, 2, 128, 77, 76),
]


@pytest.mark.parametrize(
    ("bits", "dtype"), [(4, BF16), (4, FP16), (8, BF16), (8, FP16), (16, BF16), (16, FP16)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_as_exact_as_pytorch_s(shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> None:
    batch, *_, capacity, length = shape
    made: Any = attended
    query, keys, values = made(*shape, bits, dtype)
    ops.reset_implementations()
    there = torch.tensor(length, device="cuda")
    with torch.no_grad():
        found = ops.kv_attention(query, keys, values, length)
        same_bits = ops.kv_attention(query, keys, values, length)
        on_device = ops.kv_attention(query, keys, values, there)
        mask = random(batch, 1, 1, capacity, seed=3) > 0.5
        mask[..., 0] = True
        one = mask[:1]
        masked = ops.kv_attention(query, keys, values, there, mask=mask)
        masked_alike = ops.kv_attention(query, keys, values, length, mask=one[..., :length])
    assert ops.implementations() == {f"kv_attention kv{bits}": {"triton": 5}}
    assert torch.equal(found, same_bits)
    checked(query, keys, values, length, None, found)
    checked(query, keys, values, length, None, on_device)
    checked(query, keys, values, length, mask[..., :length], masked)
    checked(query, keys, values, length, one[..., :length], masked_alike)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "width"), [(4, 128), (4, 64), (8, 128)])
def test_attention_to_ranges_of_every_kind(bits: int, width: int, symmetric: bool, static: bool) -> None:
    from kernels.triton.kv_attention import Choice, kv_attention

    query, keys, values = attended(2, 2, 4, width, 700, 650, bits, BF16, symmetric=symmetric, static=static)
    for choice in (None, Choice(16, 4, 3), Choice(32, 2, 1), Choice(16, 1, 2)):
        found = kv_attention(query, keys, values, 650, choice=choice)
        checked(query, keys, values, 650, None, found)
    assert torch.equal(found, kv_attention(query, keys, values, 650, choice=choice, overlapped=True))


@pytest.mark.parametrize(("bits", "static"), [(4, False), (4, True), (8, False), (16, False)])
def test_a_nan_row_stays_with_its_head(bits: int, static: bool) -> None:
    query, keys, values = attended(2, 4, 2, 128, 300, 300, bits, BF16, static=static)
    clean = ops.kv_attention(query, keys, values, 300)
    assert bool(clean.isfinite().all())
    bad = random(2, 4, 1, 128, dtype=BF16)
    for rows, head in ((keys, 1), (values, 2)):
        x = bad.clone()
        x[1, head] = NAN
        before = [part.clone() for part in parts(rows)]
        append(rows, x, 123)
        for part, old in zip(parts(rows), before, strict=True):  # of that head alone
            if part.dim():
                part[0], part[1, :head], part[1, head + 1 :] = old[0], old[1, :head], old[1, head + 1 :]
        found = ops.kv_attention(query, keys, values, 300)
        assert bool(found[1, 2 * head : 2 * head + 2].isnan().all())
        for part, old in zip(parts(rows), before, strict=True):
            part.copy_(old)
        found[1, 2 * head : 2 * head + 2] = clean[1, 2 * head : 2 * head + 2]
        assert torch.equal(found, clean)


def test_a_query_that_sees_nothing_is_zero() -> None:
    query, keys, values = attended(2, 2, 2, 64, 100, 100, 4, BF16)
    mask = torch.zeros(2, 1, 1, 100, dtype=torch.bool, device="cuda")
    mask[1, ..., 50:] = True
    found = ops.kv_attention(query, keys, values, 100, mask=mask)
    assert bool((found[0] == 0).all())
    checked(query[1:], one(keys), one(values), 100, mask[1:], found[1:])


def one(rows: Rows) -> Rows:
    """Of the second sequence alone."""
    assert isinstance(rows, PackedRows) and rows.zero is not None
    return PackedRows(rows.codes[1:], rows.scale[1:], rows.zero[1:], rows.bits, rows.width)


@pytest.mark.parametrize("at_rest", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_captured_step_serves_all_lengths(bits: int, at_rest: bool) -> None:
    """Append and attend in one graph, replayed at one length after the other."""
    batch, heads, group, width, capacity = 2, 2, 4, 128, 500
    keys, values = (room(batch, heads, capacity, width, bits) for _ in range(2))
    merged = random(batch, 1, heads * (group + 2), width, dtype=BF16)
    cos, sin = angles(1, 1, width, BF16)
    start = torch.zeros((), dtype=torch.int64, device="cuda")

    def step() -> Tensor:
        query, key, value = merged.split((heads * group, heads, heads), dim=2)
        turned = ops.rope_append(query, key, value, cos, sin, keys, values, start, hadamard=True)
        return ops.kv_attention(turned, keys, values, start + 1)

    def run() -> Tensor:
        if at_rest:
            with ops.weights_at_rest():
                return step()
        return step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = run()
    for at in range(capacity):
        merged.copy_(random(batch, 1, heads * (group + 2), width, seed=at, dtype=BF16))
        start.fill_(at)
        graph.replay()
        if at in (0, 1, 31, 32, 130, 300, 499):
            heads_of = merged.split((heads * group, heads, heads), dim=2)
            aside = room(batch, heads, 1, width, 16), room(batch, heads, 1, width, 16)
            append_aside: Any = ops.rope_append
            query = append_aside(*heads_of, cos, sin, *aside, 0, hadamard=True)
            checked(query, keys, values, at + 1, None, out)


@pytest.mark.parametrize("group", [1, 2, 5, 16])
@pytest.mark.parametrize(("bits", "width"), [(4, 64), (4, 128), (8, 64), (16, 128)])
def test_small_attention(bits: int, width: int, group: int) -> None:
    for capacity, length in ((1, 1), (7, 6), (40, 33), (130, 130)):
        query, keys, values = attended(2, 1, group, width, capacity, length, bits, BF16)
        for given in (length, torch.tensor(length, device="cuda")):
            checked(query, keys, values, length, None, ops.kv_attention(query, keys, values, given))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_small_prompt(bits: int) -> None:
    query = random(2, 8, 70, 128, dtype=BF16)
    _, keys, values = attended(2, 2, 4, 128, 90, 70, bits, BF16)
    key, value = (floats(rows, 70).repeat_interleave(4, 1) for rows in (keys, values))
    for mask in (None, torch.ones(70, 70, dtype=torch.bool, device="cuda").tril(3)[None, None]):
        found = ops.kv_attention(query, keys, values, 70, mask=mask)
        want = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=mask, is_causal=mask is None
        )
        torch.testing.assert_close(found.float(), want, rtol=0.02, atol=0.02)
