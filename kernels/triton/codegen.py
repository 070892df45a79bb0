"""Device functions that the kernels share: codes to int8, by inline assembly on four bytes at once.

Arithmetic on int8 costs about ten times the instructions, and a matrix kernel then waits for it.
"""

import triton
import triton.language as tl


@triton.jit
def low_nibbles(packed):  # type: ignore[no-untyped-def]
    """16 times the signed code in the low nibble of each byte. packed, result: int8."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xf0f0f0f0; }",
        "=r,r",
        [packed],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def high_nibbles(packed):  # type: ignore[no-untyped-def]
    """16 times the signed code in the high nibble of each byte. packed, result: int8."""
    return tl.inline_asm_elementwise(
        "and.b32 $0, $1, 0xf0f0f0f0;",
        "=r,r",
        [packed],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def lowered(codes):  # type: ignore[no-untyped-def]
    """Unsigned codes of 8 bits less 128. codes: their bytes as int8; result: int8."""
    return tl.inline_asm_elementwise(
        "xor.b32 $0, $1, 0x80808080;",
        "=r,r",
        [codes],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )
