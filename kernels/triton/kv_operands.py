"""Rows of a KV cache as operands of `mma.m16n8k16`: codes become 16-bit floats, and none changes its lane.

Everything is done on words of 32 bits, by inline assembly: what a loop carries from step to step would take a
register for each byte otherwise, and twice the instructions to unpack. The layouts are those of `kv_decode`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def _codes(bits: int, source: str, outs: list[str]) -> list[str]:
    """The codes of the lower bytes of a word's halves, then those of the higher bytes; with 4 bits behind
    them the same of the high nibbles, 16 times as large.

    A code, its top bit flipped so that it is no less than 0, stands in the lowest bits of a 16-bit float:
    which as a subnormal number, or one of the first normal ones, is that code times the smallest float.
    """
    lines = [f"shr.u32 w, {source}, 8;"]
    fields = (("0x000f000f", "0x00080008"), ("0x00f000f0", "0x00800080"))
    for field, top in fields if bits == 4 else [("0x00ff00ff", "0x00800080")]:
        lines += [f"lop3.b32 {outs.pop(0)}, {word}, {field}, {top}, 0x6a;" for word in (source, "w")]
    return lines


def _assembly(*lines: str) -> gl.constexpr:
    return gl.constexpr("{ .reg .b32 a, b, u, v, w;\n" + "\n".join(lines) + "\n}")


def _of_keys(bits: int) -> gl.constexpr:
    """Of a word: bytes 0 and 2, bytes 1 and 3; with 4 bits low nibbles, then high ones."""
    outs = [f"${i}" for i in range(16 // bits)]
    return _assembly(f"mov.b32 a, ${len(outs)};", *_codes(bits, "a", outs))


def _of_values(bits: int) -> gl.constexpr:
    """Of the words of two positions: byte 0 of both, 1, 2, 3; with 4 bits low nibbles, then high ones."""
    outs = [f"${i}" for i in range(32 // bits)]
    first, second = outs[0:2] + outs[4:6], outs[2:4] + outs[6:8]
    return _assembly(
        f"mov.b32 a, ${len(outs)}; mov.b32 b, ${len(outs) + 1};",
        "prmt.b32 u, a, b, 0x5410; prmt.b32 v, a, b, 0x7632;",
        *_codes(bits, "u", first),
        *_codes(bits, "v", second),
    )


KEYS_4, KEYS_8, VALUES_4, VALUES_8 = _of_keys(4), _of_keys(8), _of_values(4), _of_values(8)
VALUES_16 = _assembly("mov.b32 a, $2; mov.b32 b, $3; prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632;")


@gluon.jit
def _apart(pairs, dtype: gl.constexpr):
    """The two 16-bit numbers in each int32 along a new last axis: other names for the same registers."""
    return gl.join(pairs.to(gl.int16), (pairs >> 16).to(gl.int16)).to(dtype, bitcast=True)


@gluon.jit
def right_queries(rows, CHUNK: gl.constexpr, CODES: gl.constexpr, layout: gl.constexpr):
    """Queries [warp, query, element] in `row_layout` as the right operand, in the order of `left_keys`."""
    W: gl.constexpr = rows.type.shape[0]
    Q: gl.constexpr = rows.type.shape[1]
    E: gl.constexpr = rows.type.shape[2]
    parts = rows.reshape([W, Q, E // (4 * CHUNK), 4, CHUNK // 4, 2, 2])
    if CODES:
        b = gl.permute(parts, [0, 2, 4, 6, 3, 5, 1])
    else:
        b = gl.permute(parts, [0, 2, 4, 5, 3, 6, 1])
    return gl.convert_layout(b.reshape([W, E, Q]), layout, assert_trivial=True)


@gluon.jit
def _operand_of_keys(pairs, dtype: gl.constexpr, layout: gl.constexpr):
    """Pairs [warp, position, piece, lane, word, two] as the left operand [warp, position, element]."""
    W: gl.constexpr = pairs.type.shape[0]
    N: gl.constexpr = pairs.type.shape[1]
    E: gl.constexpr = pairs.numel // (W * N) * 2
    a = gl.permute(_apart(pairs, dtype), [0, 1, 2, 4, 5, 3, 6])
    return gl.convert_layout(a.reshape([W, N, E]), layout, assert_trivial=True)


@gluon.jit
def left_keys(words, CHUNK: gl.constexpr, BITS: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr):
    """Keys [warp, position, word] in `row_layout` as left operands, one for each half of rows of 4 bits.

    In a chunk of 16 codes, the element 4 j + 2 d + c of lane q is number 16 j + 8 c + 2 q + d of the
    operand; in one of 8 floats it is 4 j + 2 c + d.
    """
    W: gl.constexpr = words.type.shape[0]
    N: gl.constexpr = words.type.shape[1]
    E: gl.constexpr = words.type.shape[2]
    if BITS == 16:
        return (_operand_of_keys(words.reshape([W, N, E // (4 * CHUNK), 4, CHUNK // 2, 2]), dtype, layout),)
    else:
        parts = words.reshape([W, N, E // (4 * CHUNK), 4, CHUNK])
        if BITS == 8:
            x, y = gl.inline_asm_elementwise(
                KEYS_8, "=r,=r,r", [parts], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
            )
            return (_operand_of_keys(gl.join(x, y), dtype, layout),)
        else:
            x, y, z, w = gl.inline_asm_elementwise(
                KEYS_4, "=r,=r,=r,=r,r", [parts], dtype=(gl.int32,) * 4, is_pure=True, pack=1
            )
            low = _operand_of_keys(gl.join(x, y), dtype, layout)
            return (low, _operand_of_keys(gl.join(z, w), dtype, layout))


@gluon.jit
def _operand_of_values(pairs, dtype: gl.constexpr, layout: gl.constexpr):
    """Pairs [warp, lane, two, piece, eight, word, byte or float] as the left operand
    [warp, channel, position]. What lane g of eight holds as number i of piece x is channel
    (x CHUNK + i) 8 + g."""
    W: gl.constexpr = pairs.type.shape[0]
    T: gl.constexpr = pairs.type.shape[2]
    E: gl.constexpr = pairs.numel // (W * 4 * T)
    a = gl.permute(_apart(pairs, dtype), [0, 3, 5, 6, 4, 2, 1, 7])
    return gl.convert_layout(a.reshape([W, E, 8 * T]), layout, assert_trivial=True)


@gluon.jit
def _joined(a, b, c, d):
    """Four tensors along a new last axis."""
    parts = gl.join(gl.join(a, c), gl.join(b, d))
    S: gl.constexpr = a.type.shape
    return parts.reshape([S[0], S[1], S[2], S[3], S[4], S[5], 4])


@gluon.jit
def left_values(words, CHUNK: gl.constexpr, BITS: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr):
    """Values [warp, position, word] in `value_layout` as left operands, one for each half of rows of 4 bits.
    Only registers are renamed."""
    W: gl.constexpr = words.type.shape[0]
    N: gl.constexpr = words.type.shape[1]
    E: gl.constexpr = words.type.shape[2]
    parts = words.reshape([W, 4, 2, N // 8, E // (8 * CHUNK), 8, CHUNK])
    first, second = gl.split(gl.permute(parts, [0, 1, 3, 4, 5, 6, 2]))
    if BITS == 16:
        x, y = gl.inline_asm_elementwise(
            VALUES_16, "=r,=r,r,r", [first, second], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
        return (_operand_of_values(gl.join(x, y), dtype, layout),)
    elif BITS == 8:
        x, y, z, w = gl.inline_asm_elementwise(
            VALUES_8, "=r,=r,=r,=r,r,r", [first, second], dtype=(gl.int32,) * 4, is_pure=True, pack=1
        )
        return (_operand_of_values(_joined(x, y, z, w), dtype, layout),)
    else:
        x, y, z, w, p, q, r, s = gl.inline_asm_elementwise(
            VALUES_4, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [first, second], dtype=(gl.int32,) * 8,
            is_pure=True, pack=1,
        )  # fmt: skip
        low = _operand_of_values(_joined(x, y, z, w), dtype, layout)
        return (low, _operand_of_values(_joined(p, q, r, s), dtype, layout))


@gluon.jit
def right_weights(weights, layout: gl.constexpr):
    """16-bit weights [warp, position, query] of scores' layout as the right operand: lane 4 g + q, which has
    those of queries 2 q and 2 q + 1 for a position g of eight, gets those of positions 2 q and 2 q + 1 for
    query g."""
    W: gl.constexpr = weights.type.shape[0]
    N: gl.constexpr = weights.type.shape[1]
    Q: gl.constexpr = weights.type.shape[2]
    turned = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [weights], weights.dtype, False, 2
    )
    b = gl.permute(turned.reshape([W, N // 8, 8, Q // 8, 8]), [0, 1, 4, 3, 2])
    return gl.convert_layout(b.reshape([W, N, Q]), layout, assert_trivial=True)


@gluon.jit
def narrow(x, dtype: gl.constexpr):
    """float32 x in 16 bits, two to an instruction: the compiler would convert one by one, far slower."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], gl.bfloat16, True, 2)
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], gl.float16, True, 2)


@gluon.jit
def widen(x):
    """bfloat16 x in float32."""
    return gl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], gl.float32, True, 2
    )
