"""What both kernels of `linear_a16` do with a piece: unpack a weight's nibbles, and make operands of `mma`.

Byte 16 q + 4 j + 2 c + d of 64, held by lane q of four, is element 16 j + 8 c + 2 q + d of the left operand
of `mma.m16n8k16`. A nibble becomes a number without conversion: byte 0x43 above byte u = code + 8 is bfloat16
for 128 + u (0x64 and 1024 for float16), and one packed subtraction leaves the code, exactly.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def _assembly(shift: str, top: str, offset: str, pair: str) -> gl.constexpr:
    """Four nibbles, each with its top bit flipped and `top` above it, less the offset in each half word."""
    return gl.constexpr(
        f"""{{
        .reg .b32 t, u, v;
        mov.b32 t, $2; {shift}
        lop3.b32 t, t, 0x0f0f0f0f, 0x08080808, 0x6a;
        prmt.b32 u, t, {top}, 0x4140;
        prmt.b32 v, t, {top}, 0x4342;
        mov.b32 t, {offset};
        sub.{pair} $0, u, t;
        sub.{pair} $1, v, t;
        }}"""
    )


_LOW_BFLOAT16 = _assembly("", "0x43434343", "0x43084308", "bf16x2")
_HIGH_BFLOAT16 = _assembly("shr.b32 t, t, 4;", "0x43434343", "0x43084308", "bf16x2")
_LOW_FLOAT16 = _assembly("", "0x64646464", "0x64086408", "f16x2")
_HIGH_FLOAT16 = _assembly("shr.b32 t, t, 4;", "0x64646464", "0x64086408", "f16x2")


@gluon.jit
def _codes(packed, BFLOAT16: gl.constexpr, FLOAT16: gl.constexpr, like):
    """The codes of one nibble of each byte, in the type that `like` points to, laid out as `packed`."""
    if like.dtype.element_ty == gl.bfloat16:
        return gl.inline_asm_elementwise(
            BFLOAT16, "=r,=r,r", [packed], dtype=gl.bfloat16, is_pure=True, pack=4
        )
    else:
        return gl.inline_asm_elementwise(FLOAT16, "=r,=r,r", [packed], dtype=gl.float16, is_pure=True, pack=4)


@gluon.jit
def _left(codes, layout: gl.constexpr):
    """Codes [warp, row, piece] as the left operand, in the order of this file's head."""
    WARPS: gl.constexpr = codes.type.shape[0]
    ROWS: gl.constexpr = codes.type.shape[1]
    PIECE: gl.constexpr = codes.type.shape[2]
    a = gl.permute(codes.reshape([WARPS, ROWS, PIECE // 64, 4, 4, 2, 2]), [0, 1, 2, 4, 5, 3, 6])
    return gl.convert_layout(a.reshape([WARPS, ROWS, PIECE]), layout, assert_trivial=True)


@gluon.jit
def as_right(values, layout: gl.constexpr):
    """x [warp, token, piece] as the right operand [warp, piece, token], in the same order."""
    WARPS: gl.constexpr = values.type.shape[0]
    TOKENS: gl.constexpr = values.type.shape[1]
    PIECE: gl.constexpr = values.type.shape[2]
    b = gl.permute(values.reshape([WARPS, TOKENS, PIECE // 64, 4, 4, 2, 2]), [0, 2, 4, 5, 3, 6, 1])
    return gl.convert_layout(b.reshape([WARPS, PIECE, TOKENS]), layout, assert_trivial=True)


@gluon.jit
def low_codes(packed, like, layout: gl.constexpr):
    """The low nibbles of bytes [warp, row, piece] as the left operand, in the type that `like` points to."""
    return _left(_codes(packed, _LOW_BFLOAT16, _LOW_FLOAT16, like), layout)


@gluon.jit
def high_codes(packed, like, layout: gl.constexpr):
    """The high nibbles, in the same way."""
    return _left(_codes(packed, _HIGH_BFLOAT16, _HIGH_FLOAT16, like), layout)
