"""What the quantising kernels share on the device: scales, IEEE division, rounding half to even.

The rules are those of `reference`, to the bit, for one range a row. In the order of their use:

    scale = symmetric_scale(largest(abs(x)), ...)    or scale, zero = asymmetric_scale(low, high, ...)
    recipe = rounding(scale, zero, ...)              a handful of numbers a row
    byte = codes(x, recipe, ...)                     int32, of which the low byte counts

A row costs its numbers once and an element about eight instructions. Kernels that call this are compiled with
`enable_fp_fusion=False`: a product and a sum that are written apart are rounded apart.
"""

import triton
import triton.language as tl

# Added to a float32 below 2^22 in magnitude, it leaves the nearest whole number (half to even) in its bits.
_SHIFT = tl.constexpr(12582912.0)
_INFINITY = tl.constexpr(float("inf"))
# The interpreter knows no assembly.
_ASSEMBLY = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def larger(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):  # type: ignore[no-untyped-def]
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """The maximum of float32 x along an axis, which stays with length 1; NaN where x has one."""
    return tl.reduce(x, axis, larger, keep_dims=True)


@triton.jit
def smallest(x, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """The minimum, likewise."""
    return tl.reduce(x, axis, smaller, keep_dims=True)


@triton.jit
def narrow(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 x in bfloat16, float16 or float32, two conversions to an instruction.

    Where the result is widened again, the compiler would convert one by one, at an eighth of the speed.
    """
    if _ASSEMBLY and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.bfloat16, True, 2)
    elif _ASSEMBLY and dtype == tl.float16:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.float16, True, 2)
    else:
        return x.to(dtype)


@triton.jit
def widen(x):  # type: ignore[no-untyped-def]
    """16-bit or float32 x in float32; bfloat16 by one instruction an element, not the compiler's two."""
    if _ASSEMBLY and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], tl.float32, True, 2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def gated(gate, up):  # type: ignore[no-untyped-def]
    """silu(gate) * up, silu and product each rounded to their dtype.

    With the hardware's exponential and, for 16-bit numbers, its reciprocal, each within 2^-22 of the true
    one; the exponent is rounded by 2^-24 of itself. So silu errs by (4 + |gate|) 2^-22 of itself at most
    before it is rounded. For a gate below -88.7, where float32's e^-gate is infinite, it is -0.
    """
    g = widen(gate)
    if _ASSEMBLY and gate.dtype != tl.float32:
        # As 1/4 over e/4 + 1/4: so no finite e has a reciprocal that the instruction takes for 0.
        sigmoid = tl.inline_asm_elementwise(
            "{.reg .f32 t; fma.rn.f32 t, $1, 0fBFB8AA3B, 0fC0000000; ex2.approx.ftz.f32 t, t; "
            "add.rn.f32 t, t, 0f3E800000; rcp.approx.ftz.f32 t, t; mul.rn.f32 $0, t, 0f3E800000;}",
            "=f,f", [g], tl.float32, True, 1,
        )  # fmt: skip
        silu = narrow(g * sigmoid, gate.dtype)
    else:
        silu = narrow(tl.div_rn(g, 1.0 + tl.exp(0.0 - g)), gate.dtype)
    return narrow(widen(silu) * widen(up), gate.dtype)


@triton.jit
def scaled_rows(x, recipe):  # type: ignore[no-untyped-def]
    """bfloat16 x times the factors of its rows, in float32; 0 in rows without a finite scale.

    Three instructions for two elements. bfloat16 holds the product as float32 does: the factor is a power of
    two, and what underflows lies far below half a code.
    """
    factor, _, reciprocal, _, _, _ = recipe
    even = tl.where(reciprocal != 0.0, 0x1044, 0x4444)
    odd = tl.where(reciprocal != 0.0, 0x3244, 0x4444)
    return tl.inline_asm_elementwise(
        "{.reg .b32 t; mul.rn.bf16x2 t, $2, $3; prmt.b32 $0, t, 0, $4; prmt.b32 $1, t, 0, $7;}",
        "=f,=f,r,r,r,r,r,r",
        [x, factor.to(tl.bfloat16), even, odd],
        tl.float32,
        True,
        2,
    )


@triton.jit
def _larger_pair(a, b):  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise("max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def largest_magnitude(x):  # type: ignore[no-untyped-def]
    """The largest magnitude of each row of x, float32 [rows, 1]; NaN where the row has one."""
    if _ASSEMBLY and x.dtype == tl.bfloat16:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        pairs = tl.inline_asm_elementwise(
            "{.reg .b32 t; mov.b32 t, {$1, $2}; and.b32 $0, t, 0x7fff7fff;}",
            "=r,h,h",
            [even, odd],
            tl.int32,
            True,
            1,
        )
        pair = tl.reduce(pairs, 1, _larger_pair, keep_dims=True)
        odd = (pair & -65536).to(tl.float32, bitcast=True)
        return larger((pair << 16).to(tl.float32, bitcast=True), odd)
    else:
        return largest(tl.abs(widen(x)), 1)


@triton.jit
def symmetric_scale(peak, clip, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale of rows whose largest magnitude is peak."""
    LEVELS: tl.constexpr = (1 << (BITS - 1)) - 1
    scale = tl.div_rn(peak * clip, LEVELS * 1.0)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def asymmetric_scale(low, high, clip, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale and zero-point of rows from low to high, extended to contain 0."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    low = smaller(low, 0.0) * clip
    high = larger(high, 0.0) * clip
    scale = tl.div_rn(high - low, LEVELS * 1.0)
    empty = scale == 0.0
    scale = tl.where(empty, 2.0 / LEVELS, scale)
    zero = (tl.div_rn(tl.where(empty, 1.0, -low), scale) + _SHIFT) - _SHIFT
    return scale, smaller(larger(zero, 0.0), LEVELS * 1.0)


@triton.jit
def scale_and_zero(  # type: ignore[no-untyped-def]
    low, high, clip, given_scale, given_zero,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """Scale and zero-point of rows from their extremes. Where the range is symmetric or static (given), high
    is the largest magnitude, and low does not count."""
    if STATIC:
        return tl.where(high == high, given_scale, high), given_zero
    elif SYMMETRIC:
        return symmetric_scale(high, clip, BITS), tl.zeros_like(high)
    else:
        return asymmetric_scale(low, high, clip, BITS)


@triton.jit
def rounding(scale, zero, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """What `codes` needs of a row: factor, divisor, reciprocal, low, high, zero.

    factor: a power of two that brings x and the scale together into the middle of the exponents, where no
    step of a division underflows. divisor: the scale times factor, reciprocal: 1 / divisor, rounded once.
    low, high: x times factor is clamped to them, so that nothing needs clamping after the division: the
    quotients of the outermost codes lie within a rounding error of those codes. Both are 0 for a row without
    a finite scale, whose codes thereby all are 0. zero: int32.
    """
    size = tl.abs(scale)
    factor = tl.where(size < 2.0**-60, 2.0**100, tl.where(size > 2.0**60, 2.0**-64, 1.0))
    # A static scale of 0 divides everything but 0 to infinity: any number far below x does the same.
    finite = size < _INFINITY
    divisor = tl.where(finite, tl.where(scale == 0.0, 2.0**-60, scale * factor), 1.0)
    reciprocal = tl.where(finite, tl.div_rn(1.0, divisor), 0.0)
    span = tl.where(finite, divisor, 0.0)
    if SYMMETRIC:
        first = span * -(1 << (BITS - 1))
        last = span * ((1 << (BITS - 1)) - 1)
        whole = tl.zeros_like(scale).to(tl.int32)
    else:
        first = span * -zero
        last = span * (((1 << BITS) - 1) - zero)
        whole = tl.where((scale == scale) & (zero == zero), zero, 0.0).to(tl.int32)
        first = tl.where(zero == zero, first, 0.0)
        last = tl.where(zero == zero, last, 0.0)
    # A negative scale, which only a static range can have, swaps the ends.
    return factor, divisor, reciprocal, tl.minimum(first, last), tl.maximum(first, last), whole


@triton.jit
def quotient(x, divisor, reciprocal):  # type: ignore[no-untyped-def]
    """x / divisor rounded once, in three instructions, given the reciprocal rounded once (Markstein 1990).

    x r is off by at most 1.5 units in the last place, and x - q s is a float32 but for its last bit. So
    adding its share gives a sum within 2^-22 units of the true quotient before it is rounded: rounding errs
    only where the true quotient is that close to the middle between two numbers. Numbers of 8 or 11
    significant bits over any float32 never are, where it would change a code:
    tests/kernels/test_triton_fused.py tries them all. A divisor of 0 with a reciprocal of 0 stands for an
    infinite one.
    """
    q = x * reciprocal
    return tl.fma(tl.fma(q, 0.0 - divisor, x), reciprocal, q)


@triton.jit
def codes(x, recipe, SYMMETRIC: tl.constexpr, CLAMP: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The code of each x in the low byte of an int32. WIDE: x has more than 11 significant bits. x may be
    bfloat16, which costs fewer instructions than the same numbers in float32.

    CLAMP may be False where the range is dynamic, symmetric, unclipped, and of a 16-bit x: then no quotient
    rounds to more than the largest code, even where the scale is so small that it has few bits itself.
    """
    factor, divisor, reciprocal, low, high, zero = recipe
    # Then no NaN can reach a code.
    CLEAN: tl.constexpr = CLAMP or (_ASSEMBLY and x.dtype == tl.bfloat16)
    if _ASSEMBLY and x.dtype == tl.bfloat16:
        x = scaled_rows(x, recipe)
    else:
        x = x.to(tl.float32) * factor
    if CLAMP:
        # Both drop a NaN in favour of the bound, which is 0 in the rows that have one.
        x = tl.minimum(tl.maximum(x, low), high)
    if WIDE:
        q = tl.div_rn(x, divisor)
    else:
        q = quotient(x, divisor, reciprocal)
    if CLEAN:
        whole = (q + _SHIFT).to(tl.int32, bitcast=True)
    elif not _ASSEMBLY:
        whole = (tl.where(q == q, q, 0.0) + _SHIFT).to(tl.int32, bitcast=True)
    else:
        # Makes 0 of NaN, which is what Inf and NaN times the reciprocal 0 of their rows are.
        whole = tl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [q], tl.int32, True, 1)
    if SYMMETRIC:
        return whole
    return whole + zero


@triton.jit
def nearest(x, scale, zero, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes of x as whole float32 numbers, as `weight_reference.to_codes` has them, NaN for NaN."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    low = 0.0 - (1 << (BITS - 1)) if SYMMETRIC else 0.0 - zero
    # Clamped before it is rounded: the same between whole bounds, and small enough for the shift.
    q = (smaller(larger(tl.div_rn(x, scale), low), low + LEVELS) + _SHIFT) - _SHIFT
    return q if SYMMETRIC else q + zero


@triton.jit
def dequantised(whole, scale, zero, SYMMETRIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """The values that such codes stand for."""
    return whole * scale if SYMMETRIC else (whole - zero) * scale
