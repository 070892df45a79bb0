"""How codes of 2 to 8 bits lie in memory: rows of bit planes.

A row of n codes of b bits is padded with stored code 0 to n', the next multiple of 8, and takes n' b / 8
bytes. Stored codes are two's complement. Unsigned codes u are stored as u - 2^(b-1) (their top bit flipped),
so that there is one format, whose codes are signed.

The b bits of a code are cut into planes by b's binary expansion, the widest first and holding the most
significant bits:

    b       2   3     4   5     6     7        8
    planes  2   2, 1  4   4, 1  4, 2  4, 2, 1  8

A plane of w bits stores 8 / w codes a byte, with stride m = n' w / 8 (the plane's bytes): byte k holds codes
k, k + m, k + 2m, ... from the least significant bits up. The planes of a row follow each other. In 4 bits the
low nibble of byte k is code k and its high nibble is code k + n'/2: the low and the high nibbles of a run of
bytes are two contiguous runs of codes, which no kernel has to interleave, and a byte with its low nibble
cleared, read as int8, is 16 times the code of the high nibble. Groups of g codes lie alike in both halves
only where g divides n'/2: elsewhere (576 codes in groups of 64) a kernel's tiles along a row are at most
gcd(g, n'/2) bytes for each half to have one scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes from which on a row's halves are better written in place than joined by a copy.
_LONG_ROW = 64


def packed_width(n: int, bits: int) -> int:
    """Bytes of a packed row of n codes."""
    return (n + 7) // 8 * _checked(bits)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [..., n] into uint8 [..., packed_width(n, bits)].

    codes: int8 in [-2^(b-1), 2^(b-1) - 1], or uint8 in [0, 2^b - 1]. Raises ValueError for other dtypes and
    for codes outside their range.
    """
    _checked(bits)
    if codes.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"codes are int8 or uint8, got {codes.dtype}")
    low, high = (0, 2**bits - 1) if codes.dtype == torch.uint8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if bits < 8 and codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        raise ValueError(
            f"codes of {bits} bits lie in [{low}, {high}], got {int(codes.min())} to {int(codes.max())}"
        )
    return pack_unchecked(codes, bits)


def pack_unchecked(codes: Tensor, bits: int) -> Tensor:
    """`pack` for codes that a quantiser has just clamped to their range; it reads nothing back."""
    stored = codes ^ 2 ** (bits - 1) if codes.dtype == torch.uint8 else codes.view(torch.uint8)
    stored = F.pad(stored, (0, -codes.shape[-1] % 8))
    planes, remaining = [], bits
    for width in _planes(bits):
        remaining -= width
        field = (stored >> remaining) & (2**width - 1)
        plane, *others = field.chunk(8 // width, dim=-1)
        for part, other in enumerate(others, start=1):
            plane = plane | other << part * width
        planes.append(plane)
    return torch.cat(planes, dim=-1)


def unpack(packed: Tensor, bits: int, n: int, *, signed: bool = True) -> Tensor:
    """The codes [..., n] of uint8 rows [..., packed_width(n, bits)]: int8, or uint8 where not `signed`.

    Raises ValueError for rows of another dtype or width.
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_width(n, bits):
        raise ValueError(
            f"{n} codes of {bits} bits are uint8 rows of {packed_width(n, bits)}, "
            f"got {packed.dtype} rows of {packed.shape[-1]}"
        )
    if bits == 8:
        stored = packed.view(torch.int8)
    elif bits == 4 and packed.shape[-1] >= _LONG_ROW:
        stored = _unpack_nibbles(packed)
    else:
        stored = _unpack_planes(packed, bits)
    if not signed:
        top = 2 ** (bits - 1)
        stored = stored.view(torch.uint8) ^ 128 if bits == 8 else (stored + top).view(torch.uint8)
    return stored[..., :n]


def _unpack_planes(packed: Tensor, bits: int) -> Tensor:
    values: Tensor | None = None
    start, remaining = 0, bits
    for width in _planes(bits):
        remaining -= width
        stop = start + packed.shape[-1] // bits * width
        plane = packed[..., start:stop].contiguous()
        parts = [(plane >> shift).bitwise_and_(2**width - 1) for shift in range(0, 8, width)]
        field = torch.cat(parts, dim=-1)
        field = field.bitwise_left_shift_(remaining) if remaining else field
        values = field if values is None else values.bitwise_or_(field)
        start = stop
    assert values is not None
    top = 2 ** (bits - 1)
    return values.bitwise_xor_(top).view(torch.int8).sub_(top)  # extends the sign


def _unpack_nibbles(packed: Tensor) -> Tensor:
    """`_unpack_planes` for long rows of 4 bits, without the copy that joins the halves."""
    half = packed.shape[-1]
    stored = torch.empty(*packed.shape[:-1], 2 * half, dtype=torch.int8, device=packed.device)
    low, high = stored[..., :half], stored[..., half:]
    pairs = packed.view(torch.int8)
    torch.bitwise_right_shift(pairs, 4, out=high)
    torch.bitwise_xor(pairs, 8, out=low)
    low.bitwise_and_(15).sub_(8)
    return stored


def _checked(bits: int) -> int:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    return bits


def _planes(bits: int) -> list[int]:
    """Widths of the bit planes, the most significant first."""
    return [width for width in (8, 4, 2, 1) if bits & width]
