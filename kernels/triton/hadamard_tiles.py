"""What the Hadamard kernel does with the tiles of a row in registers, beside its products."""

import triton
import triton.language as tl

from kernels.triton.rounding import narrow, widen


@triton.jit
def terms(x, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 x as a sum of bfloat16 numbers: 2 hold 17 bits of it, 3 all of them."""
    term = narrow(x, tl.bfloat16)
    terms = (term,)
    for _ in tl.static_range(COUNT - 1):
        x = x - widen(term)
        term = narrow(x, tl.bfloat16)
        terms = terms + (term,)  # type: ignore[assignment]
    return terms


@triton.jit
def apart(pairs, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The 16-bit numbers in int32 pairs [rows, j, n], as [rows, 2 j n]."""
    numbers = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).to(dtype, bitcast=True)
    return tl.reshape(numbers, [pairs.shape[0], 2 * pairs.shape[1] * pairs.shape[2]])


@triton.jit
def halves(x):  # type: ignore[no-untyped-def]
    """The left and the right half of a tile: other names for the same registers."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def butterfly(a, other, LAST: tl.constexpr, norm, NORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of two tiles, or, in the place of the last of them, the difference; with NORM, times norm."""
    if NORM:
        factor = tl.full((1, 1), 0.0, tl.float32) + norm
        if LAST:
            return tl.fma(a, 0.0 - factor, other * factor)
        else:
            return tl.fma(other, factor, a * factor)
    elif LAST:
        return other - a
    else:
        return a + other


@triton.jit
def ordered(x, ORDERED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile whose rows and columns come as the matrices of `matrices` gave them, by channel.

    A thread of the products holds two columns of every eight, and of their rows one of every eight. So
    ordered, its columns are sixteen neighbours, and it holds what a store of 16 bytes takes.
    """
    if ORDERED:
        return x
    else:
        parts = tl.reshape(x, [x.shape[0] // 16, 2, 8, 8, 4, 2])
        return tl.reshape(tl.permute(parts, (1, 0, 2, 4, 3, 5)), [x.shape[0], x.shape[1]])


@triton.jit
def prefetched(there):  # type: ignore[no-untyped-def]
    """Bring the lines that these pointers lie in into the L2 cache."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [there], tl.int32, False, 1)
