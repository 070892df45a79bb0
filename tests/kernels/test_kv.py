"""The packed KV cache: what it holds is what the simulated path multiplies."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.hadamard import hadamard_matrix
from kernels.kv_reference import (
    PackedRows,
    Rows,
    kv_append,
    kv_attention,
    kv_dequantise,
    kv_resize,
    kv_rows,
    rope_append,
    rotate,
)
from kernels.packing import packed_width
from kernels.pass_reference import online_hadamard
from kernels.reference import fake_quantise
from methods.decoder import attention_mask
from tests.equality import same

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ranges(symmetric: bool, static: bool) -> dict[str, Any]:
    if not static:
        return {}
    scale = {"scale": torch.tensor(0.2)}
    return scale if symmetric else {**scale, "zero": torch.tensor(3.0)}


def room(like: Tensor, capacity: int, bits: int, symmetric: bool, static: bool) -> PackedRows:
    batch, heads, _, width = like.shape
    rows = kv_rows(
        batch,
        heads,
        capacity,
        width,
        bits,
        symmetric=symmetric,
        dtype=torch.promote_types(like.dtype, torch.float32),
        **ranges(symmetric, static),
    )
    for part in (rows.codes, rows.zero, rows.poisoned):  # what has not been written must not matter
        if part is not None and part.dim():
            part.view(torch.uint8).fill_(1)
    if rows.scale.dim():
        rows.scale.fill_(NAN)
    return rows


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("width", [1, 5, 63, 64, 80, 128])
def test_the_cache_holds_what_is_simulated(bits: int, symmetric: bool, static: bool, width: int) -> None:
    x = random(2, 3, 6, width, seed=bits) + 0.3
    x[0, 0, 0] = 0.0
    clip = 1.0 if static else 0.95
    rows = room(x, 9, bits, symmetric, static)
    kv_append(rows, x, 0, clip=clip)
    assert rows.codes.shape == (2, 3, 9, packed_width(width, bits)) and rows.codes.dtype == torch.uint8
    for dtype in DTYPES:
        given_x = x.to(dtype)
        held = room(given_x, 9, bits, symmetric, static)
        kv_append(held, given_x, 0, clip=clip)
        want = fake_quantise(given_x, bits, symmetric=symmetric, clip=clip, **ranges(symmetric, static))
        got = kv_dequantise(held, 6, dtype)
        assert got.dtype == dtype and torch.equal(got, want)
        assert torch.equal(kv_dequantise(held, 4, dtype), want[:, :, :4])


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.integers(2, 8),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_pieces_equal_the_whole(
    lengths: list[int], bits: int, symmetric: bool, static: bool, backwards: bool
) -> None:
    total = sum(lengths)
    x = random(2, 2, total, 13) if total else torch.empty(2, 2, 0, 13)
    whole, pieces = (room(x, total + 2, bits, symmetric, static) for _ in range(2))
    kv_append(whole, x, 0)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    order = list(zip(starts, lengths, strict=True))
    for start, length in reversed(order) if backwards else order:
        kv_append(pieces, x[:, :, start : start + length], start)
    assert torch.equal(
        kv_dequantise(pieces, total, torch.float32), kv_dequantise(whole, total, torch.float32)
    )
    for a, b in ((whole.codes, pieces.codes), (whole.scale, pieces.scale), (whole.zero, pieces.zero)):
        if a is not None and b is not None:
            assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))  # nothing beside them was touched


def test_positions_are_overwritten_in_place() -> None:
    x, y = random(1, 2, 5, 8), random(1, 2, 2, 8, seed=1)
    rows = room(x, 5, 4, False, False)
    kv_append(rows, x, 0)
    before = kv_dequantise(rows, 5, torch.float32)
    kv_append(rows, y, 2)
    after = kv_dequantise(rows, 5, torch.float32)
    assert torch.equal(after[:, :, [0, 1, 4]], before[:, :, [0, 1, 4]])
    assert torch.equal(after[:, :, 2:4], fake_quantise(y, 4, symmetric=False))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_poisoned_head_touches_no_other(symmetric: bool, static: bool, bad: float) -> None:
    x = random(2, 3, 4, 16)
    rows = room(x, 4, 4, symmetric, static)
    kv_append(rows, x, 0)
    clean = kv_dequantise(rows, 4, torch.float32)
    x[1, 2, 3, 5] = bad
    kv_append(rows, x[:, :, 3:], 3)
    got = kv_dequantise(rows, 4, torch.float32)
    assert same(got, fake_quantise(x, 4, symmetric=symmetric, **ranges(symmetric, static)))
    saturates = static and bad == bad
    assert got[1, 2, 3].isfinite().all() if saturates else got[1, 2, 3].isnan().all()
    got[1, 2, 3] = clean[1, 2, 3]
    assert torch.equal(got, clean)
    if rows.zero is not None and not static and not saturates:
        assert rows.zero[1, 2, 3] == 0
    kv_append(rows, clean[:, :, 3:], 3)  # and is gone when it is overwritten
    assert kv_dequantise(rows, 4, torch.float32).isfinite().all()


def test_a_poisoned_row_touches_no_other_head_or_sequence() -> None:
    query, key = random(2, 4, 5, 8, seed=1), random(2, 2, 5, 8)
    rows = room(key, 5, 4, False, False)
    kv_append(rows, key, 0)
    clean = kv_attention(query, rows, rows, 5)
    key[0, 1, 3, 0] = NAN
    kv_append(rows, key, 0)
    got = kv_attention(query, rows, rows, 5)
    assert torch.equal(got[1], clean[1]) and torch.equal(got[0, :2], clean[0, :2])
    assert got[0, 2:, 3:].isnan().all()


def attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention in float64, head by head; allowed: bool [B, T, S]."""
    out = torch.empty(query.shape, dtype=torch.float64)
    shared = query.shape[1] // key.shape[1]
    for b, h in itertools.product(range(query.shape[0]), range(query.shape[1])):
        k, v = key[b, h // shared].double(), value[b, h // shared].double()
        scores = query[b, h].double() @ k.t() / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~allowed[b], -INF).softmax(-1)
        out[b, h] = weights @ v
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (9, 3), (4, 1)])
@pytest.mark.parametrize("width", [5, 64, 80])
@pytest.mark.parametrize(
    ("bits", "symmetric", "static"), [(4, False, False), (4, True, True), (3, False, True)]
)
def test_attention_against_float64(
    heads: int, kv_heads: int, width: int, bits: int, symmetric: bool, static: bool
) -> None:
    batch, total = 2, 11
    query = random(batch, heads, total, width, seed=1)
    key, value = random(batch, kv_heads, total, width), random(batch, kv_heads, total, width, seed=2)
    options: dict[str, Any] = {"symmetric": symmetric, **ranges(symmetric, static)}
    held = fake_quantise(key, bits, **options), fake_quantise(value, bits, **options)
    keys, values = (room(x, total + 3, bits, symmetric, static) for x in (key, value))
    causal = torch.ones(total, total, dtype=torch.bool).tril().expand(batch, -1, -1)
    # The prompt, then single steps, against the whole at once.
    kv_append(keys, key[:, :, :7], 0)
    kv_append(values, value[:, :, :7], 0)
    outputs = [kv_attention(query[:, :, :7], keys, values, 7)]
    for step in range(7, total):
        kv_append(keys, key[:, :, step : step + 1], step)
        kv_append(values, value[:, :, step : step + 1], step)
        outputs.append(kv_attention(query[:, :, step : step + 1], keys, values, step + 1))
    got = torch.cat(outputs, dim=2)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), attention(query, *held, causal), rtol=1e-4, atol=1e-5)
    # Padding, a sliding window and a continuation, by the decoder's own masks.
    real = torch.ones(batch, total, dtype=torch.bool)
    real[0, :3] = False
    for window, start, padding in ((None, 0, real), (4, 0, None), (4, 6, real), (3, total - 1, None)):
        mask = attention_mask(total - start, start, padding, window, torch.device("cpu"))
        assert mask is not None
        got = kv_attention(query[:, :, start:], keys, values, total, mask=mask)
        allowed = mask[:, 0].expand(batch, -1, -1)
        want = attention(query[:, :, start:], *held, allowed)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_in_other_dtypes_and_strides(dtype: torch.dtype) -> None:
    query, key = random(1, 4, 6, 16, seed=1, dtype=dtype), random(1, 2, 6, 16, dtype=dtype)
    rows = room(key, 6, 4, False, False)
    turned = key.transpose(1, 2).contiguous().transpose(1, 2)  # as projections leave it
    with torch.inference_mode():
        kv_append(rows, turned, 0)
        got = kv_attention(query.transpose(1, 2).contiguous().transpose(1, 2), rows, rows, 6)
    held = fake_quantise(key, 4, symmetric=False)
    want = torch.nn.functional.scaled_dot_product_attention(
        query, held, held, is_causal=True, enable_gqa=True
    )
    assert got.dtype == dtype
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_moving_to_other_room(static: bool, symmetric: bool) -> None:
    x = random(2, 2, 5, 8)
    x[0, 0, 1, 0] = NAN
    rows = room(x, 5, 4, symmetric, static)
    kv_append(rows, x, 0)
    want = kv_dequantise(rows, 5, torch.float32)
    larger, smaller = kv_resize(rows, 5, 12), kv_resize(rows, 2, 2)
    kv_append(rows, torch.zeros_like(x), 0)  # the copies are independent
    assert larger.codes.shape[2] == 12 and smaller.codes.shape[2] == 2
    assert same(kv_dequantise(larger, 5, torch.float32), want)
    assert same(kv_dequantise(smaller, 2, torch.float32), want[:, :, :2])
    kv_append(larger, x[:, :, :3], 9)
    assert same(kv_dequantise(larger, 12, torch.float32)[:, :, 9:], want[:, :, :3])


def test_memory() -> None:
    """Four bits a value, and for each row a scale and a zero-point (dynamic) or a flag (static)."""

    def held(rows: PackedRows) -> int:
        parts = (rows.codes, rows.scale, rows.zero, rows.poisoned)
        return sum(part.nbytes for part in parts if part is not None and part.dim())

    x = torch.empty(1, 3, 1, 64)
    assert held(room(x, 10, 4, False, False)) == 30 * (32 + 4 + 1)
    assert held(room(x, 10, 4, True, False)) == 30 * (32 + 4)
    assert held(room(x, 10, 4, False, True)) == 30 * (32 + 1)


def test_bad_arguments() -> None:
    rows = room(torch.empty(1, 2, 0, 8), 4, 4, False, False)
    bad: list[tuple[tuple[int, ...], int]] = [
        ((1, 2, 5, 8), 0),
        ((1, 2, 2, 8), 3),
        ((1, 2, 1, 8), -1),
        ((1, 1, 1, 8), 0),
        ((1, 2, 1, 7), 0),
        ((2, 1, 8), 0),
    ]
    for shape, start in bad:
        with pytest.raises(ValueError, match=f"at {start} do not fit"):
            kv_append(rows, torch.zeros(shape), start)
    with pytest.raises(ValueError, match=r"scales of torch\.float64 do not fit"):
        kv_append(rows, torch.zeros(1, 2, 1, 8, dtype=torch.float64), 0)
    static = room(torch.empty(1, 2, 0, 8), 4, 4, False, True)
    with pytest.raises(ValueError, match="clip ratio is part of a static range"):
        kv_append(static, torch.zeros(1, 2, 1, 8), 0, clip=0.9)
    with pytest.raises(ValueError, match="needs a static scale"):
        kv_rows(1, 1, 1, 8, 4, symmetric=False, zero=torch.tensor(1.0))
    for symmetric, zero in ((True, torch.tensor(1.0)), (False, None)):
        with pytest.raises(ValueError, match="for asymmetric codes, and only for them"):
            kv_rows(1, 1, 1, 8, 4, symmetric=symmetric, scale=torch.tensor(1.0), zero=zero)
    with pytest.raises(ValueError, match="2 to 8"):
        kv_rows(1, 1, 1, 8, 1, symmetric=True)
    for length, capacity in ((5, 8), (3, 2)):
        with pytest.raises(ValueError, match="positions"):
            kv_resize(rows, length, capacity)
    with pytest.raises(ValueError, match="positions"):
        kv_dequantise(rows, 5, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("bits", [4, 16])
def test_rope_append_is_its_parts_one_after_the_other(bits: int, hadamard: bool, dtype: torch.dtype) -> None:
    batch, count, heads, kv_heads, width, at = 2, 3, 6, 2, 16, 1
    merged = random(batch, count, heads + 2 * kv_heads, width, dtype=dtype)
    query, key, value = merged.split((heads, kv_heads, kv_heads), dim=2)
    angle = random(1, 1, count, width // 2, seed=1, dtype=torch.float64)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def empty() -> Rows:
        like = key.transpose(1, 2)
        return room(like, 6, 4, False, False) if bits == 4 else torch.zeros(2, 2, 6, width, dtype=dtype)

    found, on_device, wanted = ((empty(), empty()) for _ in range(3))
    out = rope_append(query, key, value, cos, sin, *found, at, hadamard=hadamard, clip=0.9)
    again = rope_append(
        query, key, value, cos, sin, *on_device, torch.tensor(at), hadamard=hadamard, clip=0.9
    )
    assert torch.equal(out, again) and out.is_contiguous()
    # In complex numbers: the pair (i, i + D/2) turned by its angle.
    turned = []
    for x in (query, key):
        parts = x.transpose(1, 2).to(torch.float64).unflatten(-1, (2, width // 2))
        product = torch.complex(parts[..., 0, :], parts[..., 1, :]) * torch.complex(angle.cos(), angle.sin())
        both = torch.cat((product.real, product.imag), -1)
        turned.append(both @ hadamard_matrix(width) / width**0.5 if hadamard else both)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.double(), turned[0], rtol=tolerance, atol=tolerance)
    # What is written is what the operations it replaces write, to the bit.
    parts_of = [rotate(x.transpose(1, 2), cos, sin) for x in (query, key)]
    if hadamard:
        parts_of = [online_hadamard(x, width) for x in parts_of]
    assert torch.equal(out, parts_of[0])
    for rows, x in zip(wanted, (parts_of[1], value.transpose(1, 2)), strict=True):
        if isinstance(rows, PackedRows):
            kv_append(rows, x, at, clip=0.9)
        else:
            rows[:, :, at : at + count] = x
    for first, second, third in zip(found, on_device, wanted, strict=True):
        for a, b, c in zip(*(tensors_of(rows) for rows in (first, second, third)), strict=True):
            assert same(a, c) and same(b, c)


def tensors_of(rows: Rows) -> list[Tensor]:
    if isinstance(rows, Tensor):
        return [rows]
    return [part for part in (rows.codes, rows.scale, rows.zero) if part is not None]


def test_rows_of_floats_are_attended_to_and_lengths_can_be_tensors() -> None:
    query, key, value = random(2, 4, 1, 8, seed=1), random(2, 2, 9, 8), random(2, 2, 9, 8, seed=2)
    rows = room(key, 9, 4, False, False)
    kv_append(rows, key[:, :, :6], torch.tensor(0))
    mask = random(1, 1, 1, 9, seed=3) > 0
    mask[..., 0] = True
    everything = torch.ones(2, 1, 6, dtype=torch.bool)
    want = attention(query, key[:, :, :6], value[:, :, :6], everything)
    for length in (6, torch.tensor(6)):
        got = kv_attention(query, key, value, length)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
        assert torch.equal(kv_attention(query, rows, rows, length), kv_attention(query, rows, rows, 6))
    got = kv_attention(query, key, value, torch.tensor(6), mask=mask)
    want = attention(query, key[:, :, :6], value[:, :, :6], mask[:, 0, :, :6].expand(2, -1, -1))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="a length on the device for 2 positions"):
        kv_attention(query.expand(-1, -1, 2, -1), key, value, torch.tensor(6))
    with pytest.raises(ValueError, match=r"rows \(2, 2, 6, 8\) at 4 do not fit"):
        kv_append(rows, key[:, :, :6], torch.tensor(4))
