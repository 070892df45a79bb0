"""The packed layout, stated byte by byte in Python integers, and its round trips."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.packing import pack, packed_width, unpack

BITS = range(2, 9)


def bytes_of(codes: list[int], bits: int, signed: bool) -> list[int]:
    """The packed row of `codes`."""
    stored = [code - (0 if signed else 2 ** (bits - 1)) for code in codes] + [0] * (-len(codes) % 8)
    row: list[int] = []
    below = bits
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        below -= width  # the bits of a code that lie below this plane
        stride = len(stored) * width // 8
        for k in range(stride):
            byte = 0
            for part in range(8 // width):
                field = (stored[k + part * stride] % 2**bits // 2**below) % 2**width
                byte += field * 2 ** (width * part)
            row.append(byte)
    return row


def code_range(bits: int, signed: bool) -> range:
    low = -(2 ** (bits - 1)) if signed else 0
    return range(low, low + 2**bits)


def test_known_rows() -> None:
    nibbles = torch.tensor([0, 1, 2, 3, 7, -1, -8, -2], dtype=torch.int8)
    assert pack(nibbles, 4).tolist() == [0x70, 0xF1, 0x82, 0xE3]
    assert pack((nibbles + 8).to(torch.uint8), 4).tolist() == [0x70, 0xF1, 0x82, 0xE3]
    pairs = torch.tensor([0, 1, -2, -1, 1, 0, -1, -2], dtype=torch.int8)
    assert pack(pairs, 2).tolist() == [0b11_01_10_00, 0b10_00_11_01]
    threes = torch.tensor([3, -4, 0, 0, 0, 0, 0, 0], dtype=torch.int8)  # 0b011, 0b100
    assert pack(threes, 3).tolist() == [0b00_00_00_01, 0b00_00_00_10, 0b00000001]
    whole = torch.tensor([1, -1, -128, 127], dtype=torch.int8)
    assert pack(whole, 8).tolist() == [1, 255, 128, 127, 0, 0, 0, 0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [True, False])
def test_every_code_in_every_place(bits: int, signed: bool) -> None:
    codes = list(code_range(bits, signed))
    dtype = torch.int8 if signed else torch.uint8
    for n in (1, 2, 7, 8, 9, 16, 23):
        # Row r holds all codes in turn from code r on, so that each code comes by each place.
        rows = torch.tensor([[codes[(r + i) % len(codes)] for i in range(n)] for r in range(len(codes))])
        packed = pack(rows.to(dtype), bits)
        assert packed.dtype == torch.uint8 and packed.shape == (len(codes), packed_width(n, bits))
        assert packed.shape[1] == -(-n // 8) * bits
        assert torch.equal(unpack(packed, bits, n, signed=signed), rows.to(dtype))
        for r in range(0, len(codes), 1 if bits < 6 else 37):
            assert packed[r].tolist() == bytes_of(rows[r].tolist(), bits, signed)


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_is_a_row_of_codes(bits: int) -> None:
    packed = torch.arange(256).repeat(8 * bits).reshape(-1, 8 * bits).roll(3, 1).to(torch.uint8)
    for signed in (True, False):
        assert torch.equal(pack(unpack(packed, bits, 64, signed=signed), bits), packed)


@pytest.mark.parametrize("n", [1, 8, 13, 128, 520])  # short and long rows are unpacked differently
def test_the_halves_of_four_bits(n: int) -> None:
    codes = torch.randint(-8, 8, (5, n), generator=torch.Generator().manual_seed(n)).to(torch.int8)
    padded = torch.nn.functional.pad(codes, (0, -n % 8)).int()
    half = padded.shape[1] // 2
    packed = pack(codes, 4)
    high = (packed & 0xF0).view(torch.int8)
    assert torch.equal(high.int(), 16 * padded[:, half:])
    assert torch.equal(((packed & 15).int() ^ 8) - 8, padded[:, :half])
    assert torch.equal(unpack(packed, 4, n), codes)


@st.composite
def code_tensors(draw: st.DrawFn) -> tuple[Tensor, int, bool]:
    bits, signed = draw(st.sampled_from(list(BITS))), draw(st.booleans())
    shape = (*draw(st.lists(st.integers(0, 3), max_size=3)), draw(st.integers(0, 150)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    span = code_range(bits, signed)
    codes = torch.randint(span.start, span.stop, shape, generator=generator)
    return codes.to(torch.int8 if signed else torch.uint8), bits, signed


@given(code_tensors(), st.booleans())
def test_round_trip(case: tuple[Tensor, int, bool], strided: bool) -> None:
    codes, bits, signed = case
    before = codes.clone()
    given_codes = codes.transpose(0, -1).contiguous().transpose(0, -1) if strided else codes
    packed = pack(given_codes, bits)
    assert torch.equal(packed, pack(codes, bits)) and torch.equal(codes, before)
    wider = torch.stack((packed, packed), dim=-1)[..., 0]  # a view with gaps
    for rows in (packed, wider):
        assert torch.equal(unpack(rows, bits, codes.shape[-1], signed=signed), codes)
    other = unpack(packed, bits, codes.shape[-1], signed=not signed).int()
    shift = 2 ** (bits - 1)
    assert torch.equal(other, codes.int() + (shift if signed else -shift))


@pytest.mark.parametrize("bits", BITS)
def test_packing_copies(bits: int) -> None:
    codes = torch.ones(2, 16, dtype=torch.int8)
    packed = pack(codes, bits)
    before = packed.clone()
    codes.zero_()
    assert torch.equal(packed, before)


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("signed", [True, False])
def test_codes_out_of_range_are_refused(bits: int, signed: bool) -> None:
    span = code_range(bits, signed)
    dtype = torch.int8 if signed else torch.uint8
    for bad in (span.start - 1, span.stop):
        if bad >= 0 or signed:
            with pytest.raises(ValueError, match=f"codes of {bits} bits lie in"):
                pack(torch.tensor([0, bad], dtype=dtype), bits)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="int8 or uint8"):
        pack(torch.zeros(8, dtype=torch.int32), 4)
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"2 to 8, got {bits}"):
            pack(torch.zeros(8, dtype=torch.int8), bits)
        with pytest.raises(ValueError, match=f"2 to 8, got {bits}"):
            packed_width(8, bits)
    with pytest.raises(ValueError, match="rows of 8"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 4, 9)
    with pytest.raises(ValueError, match=r"torch\.int8"):
        unpack(torch.zeros(2, 4, dtype=torch.int8), 4, 8)
