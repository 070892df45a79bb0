"""Caches of more elements than 32 bits count: what is written, and attended to, at their far end.

At most 20 GB of a GPU's memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import kv_reference, ops
from kernels.kv_reference import PackedRows, Rows, kv_rows
from tests.equality import same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytest.importorskip("triton", reason="needs triton")

BF16 = torch.bfloat16
WIDTH, GROUP, COUNT = 128, 4, 3
"""Channels of a head, query heads to a key, and positions that are written."""
NEEDED = 24 * 10**9
ROUNDING = 2.0**-6
"""Of a result: that of its probabilities and of itself to bfloat16, with room."""
CASES = [
    # bits, batch, heads, capacity: offsets are large in sequences and heads, or within one head
    (4, 5, 8, 2**20),
    (4, 1, 1, 2**25 + 2**20),
    (16, 5, 8, 2**19),
    (16, 1, 1, 2**24 + 2**19),
]


@pytest.fixture(autouse=True)
def room_on_the_gpu() -> Iterator[None]:
    torch.cuda.empty_cache()
    if (free := torch.cuda.mem_get_info()[0]) < NEEDED:
        pytest.skip(f"{free:,} bytes of the GPU are free")
    yield
    torch.cuda.empty_cache()


def zeros(batch: int, heads: int, capacity: int, bits: int) -> Rows:
    """Rows that stand for zeros."""
    if bits == 16:
        return torch.zeros(batch, heads, capacity, WIDTH, dtype=BF16, device="cuda")
    rows = kv_rows(batch, heads, capacity, WIDTH, bits, symmetric=False, device="cuda")
    for part in parts(rows):
        part.zero_()
    return rows


def parts(rows: Rows) -> list[Tensor]:
    if isinstance(rows, Tensor):
        return [rows]
    assert rows.zero is not None
    return [rows.codes, rows.scale, rows.zero]


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to("cuda", BF16)


def written(keys: Rows, values: Rows, start: int | Tensor) -> Tensor:
    """The queries that come back, once COUNT positions stand at `start`."""
    batch, heads = parts(keys)[0].shape[:2]
    merged = random(batch, COUNT, heads * (GROUP + 2), WIDTH)
    angles = torch.arange(COUNT * WIDTH // 2, device="cuda").view(1, 1, COUNT, WIDTH // 2) / 7
    query, key, value = merged.split((heads * GROUP, heads, heads), dim=2)
    return ops.rope_append(
        query, key, value, angles.cos().to(BF16), angles.sin().to(BF16), keys, values, start
    )


def expected(query: Tensor, keys: Rows, values: Rows, zeros_besides: int) -> Tensor:
    """Attention in float64 to the COUNT rows of a small cache and to as many rows of zeros besides, whose
    scores are 0."""
    k, v = (
        (kv_reference.kv_dequantise(rows, COUNT, torch.float64) if isinstance(rows, PackedRows) else rows)
        .double()
        .repeat_interleave(GROUP, 1)
        for rows in (keys, values)
    )
    weights = (query.double() @ k.transpose(-1, -2) / WIDTH**0.5).exp()
    return weights @ v / (weights.sum(-1, keepdim=True) + zeros_besides)


@pytest.mark.parametrize(("bits", "batch", "heads", "capacity"), CASES)
def test_the_far_end_of_a_large_cache(bits: int, batch: int, heads: int, capacity: int) -> None:
    large, small = ([zeros(batch, heads, room, bits) for _ in range(2)] for room in (capacity, COUNT))
    assert parts(large[0])[0].numel() > 2**31
    ops.reset_implementations()
    want = written(small[0], small[1], 0)
    far = capacity - COUNT
    for start in (far, torch.tensor(far, device="cuda")):
        for rows in large:
            for part in parts(rows):
                part[:, :, far:].zero_()
        assert same(written(large[0], large[1], start), want)
        for found, of in zip(large, small, strict=True):
            for part, other in zip(parts(found), parts(of), strict=True):
                assert same(part[:, :, far:], other)
                assert int(part.count_nonzero()) == int(other.count_nonzero()), "nothing else is written"
    query = want[:, :, :1].contiguous()
    mask = torch.zeros(1, 1, 1, capacity, dtype=torch.bool, device="cuda")
    mask[..., far:] = True
    there = torch.tensor(capacity, device="cuda")
    for seen, length, besides in ((None, capacity, far), (mask, there, 0)):
        exact = expected(query, small[0], small[1], besides)
        attended = ops.kv_attention(query, large[0], large[1], length, mask=seen)
        assert float((attended.double() - exact).norm()) <= ROUNDING * float(exact.norm())
    ran = {name for counts in ops.implementations().values() for name in counts}
    assert ran == {"triton"}


@pytest.mark.parametrize(("bits", "batch", "heads", "capacity"), [case for case in CASES if case[0] < 16])
def test_the_far_end_of_a_large_cache_is_dequantised(
    bits: int, batch: int, heads: int, capacity: int
) -> None:
    """As a prompt behind it needs it."""
    from kernels.triton.kv_dequantise import kv_dequantise

    large, small = (zeros(batch, heads, room, bits) for room in (capacity, COUNT))
    assert isinstance(large, PackedRows) and isinstance(small, PackedRows)
    for part, other in zip(parts(large), parts(small), strict=True):
        drawn = torch.randint(1, 9, other.shape, device="cuda").to(other.dtype)
        other.copy_(drawn)
        part[:, :, -COUNT:] = drawn
    found = kv_dequantise(large, capacity, BF16)
    assert same(found[:, :, -COUNT:], kv_reference.kv_dequantise(small, COUNT, BF16))
