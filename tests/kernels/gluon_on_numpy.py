"""Just enough of Gluon for Triton's interpreter to run some files of kernels/triton: tensors have no layouts
here, so what is tested is which numbers meet, and not where they lie. Inline assembly is run, word by word.

`install` has to be called before any other module imports such a file, in a process of its own.
"""

import importlib
import re
import sys
from types import ModuleType
from typing import Any

import numpy as np
import triton
import triton.experimental
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

_NUMBER = re.compile(r"\$(\d+)")


class Layout:
    """Stands for every layout, and for their parents."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @property
    def parent(self) -> "Layout":
        return self


class Shared:
    """Shared memory that holds one tensor."""

    def __init__(self, dtype: Any, shape: Any, layout: Any, value: Any) -> None:
        self.value = value

    def load(self, layout: Any) -> Any:
        return self.value


def install(file: str, *beside: str) -> None:
    """Import a file of kernels/triton with this in the place of Gluon, and make the calls for dependent
    launches nothing. beside: files whose device functions it uses."""
    importlib.import_module("kernels.triton.launching")  # which needs Gluon's descriptors
    # The interpreter reads annotations as text.
    plain = triton.runtime.jit._normalize_ty
    triton.runtime.jit._normalize_ty = lambda kind: plain(
        kind.removeprefix("gl.") if isinstance(kind, str) else kind
    )
    language = ModuleType("triton.experimental.gluon.language")
    for name in (
        *(
            "program_id",
            "load",
            "store",
            "minimum",
            "maximum",
            "where",
            "exp2",
            "abs",
            "cdiv",
            "join",
            "split",
        ),
        *("permute", "expand_dims"),
    ):
        setattr(language, name, _late(name))
    for name in ("constexpr", "float64", "float32", "bfloat16", "float16", "int64", "int32", "int16"):
        setattr(language, name, getattr(tl, name))
    for name in (
        *("NVMMADistributedLayout", "BlockedLayout", "DistributedLinearLayout", "SliceLayout"),
        *("DotOperandLayout", "SwizzledSharedLayout"),
    ):
        setattr(language, name, Layout)
    given: dict[str, Any] = {
        "static_range": range,
        "arange": lambda start, end, layout=None: tl.arange(start, end),
        "zeros": lambda shape, dtype, layout=None: tl.zeros(shape, dtype),
        "full": lambda shape, value, dtype, layout=None: tl.full(shape, value, dtype),
        "convert_layout": lambda x, layout, assert_trivial=False: x,
        "sum": lambda x, axis: tl.sum(x, axis),
        "max": lambda x, axis: tl.max(x, axis),
        "allocate_shared_memory": Shared,
        "inline_asm_elementwise": assembled,
    }
    for name, value in given.items():
        setattr(language, name, value)
    gluon = ModuleType("triton.experimental.gluon")
    gluon.language, gluon.jit = language, triton.jit  # type: ignore[attr-defined]
    gluon.constexpr_function = lambda function: function  # type: ignore[attr-defined]
    ampere = ModuleType("triton.experimental.gluon.language.nvidia.ampere")
    ampere.mma_v2 = lambda a, b, c: tl.dot(a, b, c)  # type: ignore[attr-defined]

    stand_ins = {
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": language,
        "triton.experimental.gluon.language.nvidia": ModuleType("nvidia"),
        "triton.experimental.gluon.language.nvidia.ampere": ampere,
    }
    real = {name: importlib.import_module(name) for name in stand_ins}
    triton.experimental.gluon = gluon
    sys.modules |= stand_ins
    kernels: Any = importlib.import_module(f"kernels.triton.{file}")
    kernels.gdc_wait = kernels.gdc_launch_dependents = lambda: None
    for name in (file, *beside):
        used: Any = importlib.import_module(f"kernels.triton.{name}")
        used.tl = tl  # the interpreter looks for it where a function is defined
    triton.experimental.gluon = real["triton.experimental.gluon"]
    sys.modules |= real


def _late(name: str) -> Any:
    """The function of `tl` of that name when it is called: the interpreter replaces them."""
    return lambda *arguments, **keywords: getattr(tl, name)(*arguments, **keywords)


def assembled(
    assembly: Any, constraints: str, arguments: list[Any], dtype: Any, is_pure: bool, pack: int
) -> Any:
    """The result, or the results, of assembly on 32-bit words, or four bytes at once; conversions of floats
    by name."""
    text = getattr(assembly, "value", assembly)
    if text.startswith("cvt.rn."):
        return arguments[0].to(dtype)
    if text.startswith("shl.b32 $0, $2, 16;"):
        return arguments[0].to(tl.float32)
    if text.startswith("bar.warp.sync"):
        return arguments[0]
    if text.startswith("movmatrix"):
        return _turned(arguments[0])
    if dtype == tl.int8:
        return _of_bytes(text, arguments[0])
    kinds = dtype if isinstance(dtype, tuple) else (dtype,)
    shape = np.broadcast_shapes(*(x.handle.data.shape for x in arguments))
    registers: dict[str, np.ndarray] = {
        f"${len(kinds) + i}": np.broadcast_to(x.handle.data, shape).view(np.uint32)
        for i, x in enumerate(arguments)
    }
    _execute(text, registers)
    results = tuple(
        tl.tensor(
            TensorHandle(np.ascontiguousarray(registers[f"${i}"]).view(np.int32), tl.int32),
            tl.block_type(tl.int32, list(shape)),
        )
        for i in range(len(kinds))
    )
    return results if isinstance(dtype, tuple) else results[0]


def _execute(text: str, registers: dict[str, np.ndarray]) -> None:
    for line in re.sub(r"\{|\}|\.reg[^;]*;", "", text).replace("\n", " ").split(";"):
        if line.strip():
            name, operands = line.strip().split(None, 1)
            target, *sources = (each.strip() for each in operands.split(","))
            values = [registers[s] if s in registers else np.uint32(int(s, 0)) for s in sources]
            registers[target] = _instruction(name, values)


def _of_bytes(text: str, x: Any) -> Any:
    """Of one operand, four of whose numbers make a word."""
    registers = {"$1": np.ascontiguousarray(x.handle.data).view(np.uint32)}
    _execute(text, registers)
    found = np.ascontiguousarray(registers["$0"]).view(np.int8)
    return tl.tensor(TensorHandle(found, tl.int8), tl.block_type(tl.int8, list(x.shape)))


def _turned(x: Any) -> Any:
    """`movmatrix`: what lies where its layout says that 8 x 8 numbers of the last two dimensions lie is what
    lies across the diagonal."""
    data = x.handle.data
    lead, (rows, columns) = data.shape[:-2], data.shape[-2:]
    blocks = data.reshape(*lead, rows // 8, 8, columns // 8, 8)
    turned = np.ascontiguousarray(np.swapaxes(blocks, -3, -1)).reshape(data.shape)
    return tl.tensor(TensorHandle(turned, x.handle.dtype), x.type)


def _instruction(name: str, values: list[Any]) -> np.ndarray:
    if name == "mov.b32":
        return np.asarray(values[0])
    if name == "shr.u32":
        return np.asarray(values[0] >> values[1])
    if name == "shl.b32":
        return np.asarray(values[0] << values[1])
    if name == "and.b32":
        return np.asarray(values[0] & values[1])
    if name == "xor.b32":
        return np.asarray(values[0] ^ values[1])
    if name == "lop3.b32":
        a, b, c, table = values
        found = np.uint32(0)
        for row in range(8):
            if int(table) >> row & 1:
                bits = [x if row >> 2 - i & 1 else ~x for i, x in enumerate((a, b, c))]
                found = found | (bits[0] & bits[1] & bits[2])
        return np.asarray(found)
    assert name == "prmt.b32", name
    a, b, selector = values
    parts = [x >> np.uint32(8 * i) & np.uint32(255) for x in (a, b) for i in range(4)]
    chosen = [parts[int(selector) >> 4 * i & 7] << np.uint32(8 * i) for i in range(4)]
    return np.asarray(chosen[0] | chosen[1] | chosen[2] | chosen[3])
