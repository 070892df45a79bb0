"""Which implementation runs what: the table that `python -m kernels` prints.

Nothing in it is written by hand but the list of what is asked. The CPU's column is found by running the
operation on small operands, the GPU's by asking its kernel about operands that have shapes and dtypes and no
memory, so it is the same on every machine that has triton.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import ops
from kernels.kv_reference import Rows, kv_rows
from kernels.packing import packed_width
from kernels.reference import PackedWeight, Quantised

OUTPUTS = 64
MANY = ops.FEW_ROWS + 1

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One question: can this operation run with such operands? build: the arguments of the operation of that
    name in `ops`, on the default device."""

    operation: str
    operands: str
    build: Callable[[], Arguments]


@dataclass(frozen=True)
class Answer:
    """implementation: "triton (<file>)" or "reference", empty where the operands are refused. reason: why it
    is not the kernel, or why it is nothing."""

    implementation: str
    reason: str = ""

    def __str__(self) -> str:
        parts = (self.implementation or "refused", self.reason)
        return ": ".join(part for part in parts if part)


def cases() -> Iterator[Case]:
    """Every question, in the order of the table."""
    for operands, keywords in _LINEARS.items():
        yield Case("linear", operands, partial(_linear, **keywords))
    for operands, keywords in _DENSE.items():
        yield Case("dense", operands, partial(_dense, **keywords))
    for operands, keywords in {**_ROWS, **_GATED}.items():
        yield Case("quantise", operands, partial(_quantise, **keywords))
    for operands, keywords in _FLOATS.items():
        yield Case("gated", operands, partial(_gated, **keywords))
    for operands, keywords in {**_FLOATS, **_NORMS}.items():
        yield Case("rmsnorm", operands, partial(_rmsnorm, **keywords))
    for operands, keywords in {**_ROWS, **_NORMS, "64 kept channels": {"keep": 64}}.items():
        yield Case("rmsnorm_quantise", operands, partial(_rmsnorm_quantise, **keywords))
    for operands, keywords in _HADAMARDS.items():
        yield Case("hadamard_quantise", operands, partial(_hadamard_quantise, **keywords))
    for operands, keywords in _TRANSFORMS.items():
        yield Case("hadamard", operands, partial(_hadamard, **keywords))
    for operands, keywords in {**_CACHES, **_APPENDED}.items():
        yield Case("rope_append", operands, partial(_rope_append, **keywords))
    for operands, keywords in {**_CACHES, **_ATTENDED}.items():
        yield Case("kv_attention", operands, partial(_kv_attention, **keywords))
    for bits in (4, 8):
        yield Case("kv_append", f"{bits} bits", partial(_kv_append, bits))
    for operands, keywords in {**_WEIGHTS, "rows of 65536": {"n": 65536}}.items():
        yield Case("find_range", operands, partial(_find_range, **keywords))
    for operands, keywords in {**_WEIGHTS, "a block of 512 columns": {"n": 512}}.items():
        yield Case("gptq_block", operands, partial(_gptq_block, **keywords))


def on_cpu(case: Case) -> Answer:
    """Runs the case; `ops` counts anew."""
    operands, keywords = case.build()
    ops.reset_implementations()
    try:
        getattr(ops, case.operation)(*operands, **keywords)
    except ValueError as error:
        return Answer("", str(error))
    finally:
        counts = ops.implementations()
        ops.reset_implementations()
    ((name,),) = counts.values()
    return Answer(name.split(" (")[0])  # by which route integers are multiplied depends on the processor


def on_cuda(case: Case) -> Answer:
    """Asks the kernels for sm_90; needs triton, but no GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("cuda"), warnings.catch_warnings():
        # Kernels ask how tensors are aligned; those without memory are, at address 0.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        operands, keywords = case.build()
        reason = ops.refusal(case.operation, *operands, **keywords)
    if reason is None:
        return Answer(f"triton ({ops.kernel_file(case.operation, *operands, **keywords)})")
    cpu = on_cpu(case)
    return Answer("reference", reason) if cpu.implementation else cpu


def table() -> str:
    """All answers as Markdown."""
    lines = ["| operation | operands | CPU | CUDA, sm_90 |", "| --- | --- | --- | --- |"]
    for case in cases():
        lines.append(f"| {case.operation} | {case.operands} | {on_cpu(case)} | {on_cuda(case)} |")
    return "\n".join(lines)


_BF16, _F16, _F32, _F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

_LINEARS: dict[str, dict[str, Any]] = {
    "w4a8, 1 row": {},
    f"w4a8, {ops.FEW_ROWS} rows": {"rows": ops.FEW_ROWS},
    f"w4a8, {MANY} rows": {"rows": MANY},
    "w4a4, 1 row": {"bits": 4},
    f"w4a4, {MANY} rows": {"bits": 4, "rows": MANY},
    f"w4a4, {MANY} rows, 64 kept bfloat16 channels": {"bits": 4, "rows": MANY, "keep": 64},
    "w4a8, 1 row, 64 kept bfloat16 channels": {"keep": 64},
    "w4a8, 1 row, 16 kept float32 channels": {"keep": 16, "kept": _F32},
    "w4a8, 1 row, bias and row scale": {"bias": True, "row_scale": True},
    f"w4a8, {MANY} rows, bias and row scale": {"rows": MANY, "bias": True, "row_scale": True},
    "w4a8, 1 row, float32 result": {"dtype": _F32},
    "w4a8, 1 row, float64": {"dtype": _F64, "scales": _F64},
    "w4a8, 1 row, K = 14336": {"inputs": 14336},
    "w4a8, 1 row, K = 576": {"inputs": 576},
    "w4a8, 1 row, K = 100": {"inputs": 100},
    f"w4a8, {MANY} rows, K = 576": {"rows": MANY, "inputs": 576},
    "w4a8, weights in groups of 128": {"group": 128},
    "w4a8, weights with zero-points": {"zero": True},
    "w4a8, inputs with zero-points": {"symmetric": False, "sums": True},
    "w4a4, inputs with zero-points": {"bits": 4, "symmetric": False, "sums": True},
    f"w4a8, {MANY} rows, inputs with zero-points": {"rows": MANY, "symmetric": False, "sums": True},
    "w4a8, inputs with zero-points, no sums of codes": {"symmetric": False},
    "w4a8, inputs in groups of 128": {"input_group": 128},
    "w4a8, weights in groups along axis 0": {"axis": 0},
    "w3a8, 1 row": {"weight_bits": 3},
    "w8a8, 1 row": {"weight_bits": 8},
    "w4a16, 1 row of bfloat16, groups of 128": {"bits": 16, "group": 128},
    f"w4a16, {ops.FEW_A16_ROWS} rows of bfloat16, groups of 128": {
        "bits": 16,
        "group": 128,
        "rows": ops.FEW_A16_ROWS,
    },
    "w4a16, 1 row of float16, groups of 128": {"bits": 16, "group": 128, "x": _F16, "dtype": _F16},
    "w4a16, 1 row of float32": {"bits": 16, "x": _F32, "dtype": _F32},
    "w4a16, 1 row, groups of 64 with zero-points": {"bits": 16, "group": 64, "zero": True},
    "w4a16, 1 row, groups of 32": {"bits": 16, "group": 32},
    "w4a16, 1 row, K = 576, groups of 64": {"bits": 16, "group": 64, "inputs": 576},
    "w4a16, 1 row, one scale an output": {"bits": 16},
    "w4a16, 1 row, groups along axis 0": {"bits": 16, "axis": 0},
    "w4a16, 1 row, 64 kept channels": {"bits": 16, "keep": 64},
    f"w4a16, {ops.FEW_A16_ROWS + 1} rows of bfloat16, groups of 128": {
        "bits": 16,
        "group": 128,
        "rows": ops.FEW_A16_ROWS + 1,
    },
    "w4a16, 1024 rows": {"bits": 16, "group": 128, "rows": 1024},
    "w4a16, 1024 rows, groups of 64 with zero-points": {"bits": 16, "group": 64, "rows": 1024, "zero": True},
    "w4a16, 1024 rows, groups of 8": {"bits": 16, "group": 8, "rows": 1024},
    "w4a16, 1024 rows of float32": {"bits": 16, "group": 128, "rows": 1024, "x": _F32, "dtype": _F32},
    "w4a16, 1024 rows, 64 kept channels": {"bits": 16, "rows": 1024, "keep": 64},
    "w3a16, 1 row, groups of 128": {"bits": 16, "group": 128, "weight_bits": 3},
}

_DENSE: dict[str, dict[str, Any]] = {
    "1 row of bfloat16": {},
    f"{ops.FEW_ROWS} rows of bfloat16": {"rows": ops.FEW_ROWS},
    f"{MANY} rows of bfloat16": {"rows": MANY},
    "1 row of float16": {"x": _F16},
    "1 row of float32": {"x": _F32},
    "1 row, bias": {"bias": True},
    "1 row, K = 14336": {"inputs": 14336},
    "1 row, K = 100": {"inputs": 100},
}

_ROWS: dict[str, dict[str, Any]] = {
    "bfloat16 to 8 bits": {},
    "bfloat16 to 4 bits": {"bits": 4},
    "bfloat16 to 3 bits": {"bits": 3},
    "float16": {"x": _F16},
    "float32": {"x": _F32},
    "float64": {"x": _F64},
    "with zero-points": {"symmetric": False},
    "static range": {"static": True},
    "static range with zero-points": {"static": True, "symmetric": False},
    "groups of 128": {"group": 128},
    "n = 14336": {"n": 14336},
    "n = 577": {"n": 577},
}

_GATED: dict[str, dict[str, Any]] = {"with a gate, halves of rows": {"gate": True}}

_FLOATS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float16": {"x": _F16},
    "float32": {"x": _F32},
    "float64": {"x": _F64},
    "n = 14336": {"n": 14336},
    "n = 577": {"n": 577},
}

_NORMS: dict[str, dict[str, Any]] = {
    "gain": {"gain": True},
    "row scale": {"row_scale": True},
    "of a sum with a row scale": {"add": True, "row_scale": True},
    "of a sum": {"add": True},
}

_TRANSFORMS: dict[str, dict[str, Any]] = {
    "size 4096, bfloat16": {},
    "size 14336 = 28 x 512": {"n": 14336, "size": 14336},
    "size 11008 = 172 x 64": {"n": 11008, "size": 11008},
    "size 1536 = 12 x 128": {"n": 1536, "size": 1536},
    "size 576 = 36 x 16": {"n": 576, "size": 576},
    "blocks of 128 in 4096": {"size": 128},
    "across 32 heads of 128": {"size": 32, "inner": 128},
    "across 9 heads of 64: none is known": {"n": 576, "size": 9, "inner": 64},
    "size 14336 with a gate, halves of rows": {"n": 14336, "size": 14336, "gate": True},
    "float16": {"x": _F16},
    "float32": {"x": _F32},
    "float64": {"x": _F64},
}

_HADAMARDS: dict[str, dict[str, Any]] = {
    **_TRANSFORMS,
    "4 bits": {"bits": 4},
    "with zero-points": {"symmetric": False},
    "groups of 128": {"group": 128},
    "static range with zero-points": {"static": True, "symmetric": False},
    "64 kept channels": {"keep": 64},
}


def _linear(
    *,
    rows: int = 1,
    inputs: int = 4096,
    bits: int = 8,
    weight_bits: int = 4,
    x: torch.dtype = _BF16,
    dtype: torch.dtype = _BF16,
    scales: torch.dtype = _F32,
    group: int | None = None,
    axis: int = 1,
    zero: bool = False,
    symmetric: bool = True,
    input_group: int | None = None,
    keep: int = 0,
    kept: torch.dtype = _BF16,
    bias: bool = False,
    row_scale: bool = False,
    sums: bool = False,
) -> Arguments:
    """Of a linear whose weight has `weight_bits` and whose inputs have `bits`, 16 for floating point."""
    groups = (inputs // (group or inputs), OUTPUTS) if axis == 1 else (inputs, 2)
    w = PackedWeight(
        torch.zeros(OUTPUTS, packed_width(inputs, weight_bits), dtype=torch.uint8),
        torch.ones(groups, dtype=scales).t(),
        torch.zeros(groups, dtype=scales).t() if zero else None,
        weight_bits,
        inputs,
        signed=not zero,
        axis=axis,
        colsum=torch.zeros(groups, dtype=torch.int32).t() if sums else None,
    )
    keywords: dict[str, Any] = {"dtype": dtype}
    if keep:
        keywords |= {"x_keep": _floats(rows, keep, dtype=kept), "w_keep": _floats(OUTPUTS, keep, dtype=kept)}
    if bias:
        keywords["bias"] = _floats(OUTPUTS, dtype=dtype)
    if row_scale:
        keywords["row_scale"] = _floats(rows, 1, dtype=_F32)
    if bits == 16:
        return (_floats(rows, inputs, dtype=x), w), keywords
    input_groups = (rows, inputs // (input_group or inputs))
    q = Quantised(
        torch.zeros(rows, inputs, dtype=torch.int8 if symmetric else torch.uint8),
        torch.ones(input_groups, dtype=scales),
        None if symmetric else torch.zeros(input_groups, dtype=scales),
        input_group,
        bits,
    )
    return (q, w), keywords


def _dense(*, rows: int = 1, inputs: int = 4096, x: torch.dtype = _BF16, bias: bool = False) -> Arguments:
    operands = _floats(rows, inputs, dtype=x), _floats(OUTPUTS, inputs, dtype=x)
    return operands, {"bias": _floats(OUTPUTS, dtype=x) if bias else None}


def _quantiser(
    bits: int = 8, symmetric: bool = True, static: bool = False, group: int | None = None
) -> dict[str, Any]:
    keywords: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "group": group}
    if static:
        keywords["scale"] = torch.ones(1)
        keywords["zero"] = None if symmetric else torch.zeros(1)
    return keywords


def _quantise(*, n: int = 4096, x: torch.dtype = _BF16, gate: bool = False, **quantiser: Any) -> Arguments:
    rows, gates = _halves(n, x)
    return (rows,), {"gate": gates if gate else None, **_quantiser(**quantiser)}


def _gated(*, n: int = 4096, x: torch.dtype = _BF16) -> Arguments:
    return _halves(n, x), {}


def _rmsnorm(
    *,
    n: int = 4096,
    x: torch.dtype = _BF16,
    gain: bool = False,
    row_scale: bool = False,
    add: bool = False,
) -> Arguments:
    keywords: dict[str, Any] = {"eps": 1e-5}
    if gain:
        keywords["gain"] = _floats(n, dtype=x)
    if row_scale:
        keywords["row_scale"] = _floats(8, 1, dtype=_F32)
    if add:
        keywords["add"] = _floats(8, n, dtype=x)
    return (_floats(8, n, dtype=x),), keywords


def _rmsnorm_quantise(
    *,
    n: int = 4096,
    x: torch.dtype = _BF16,
    keep: int = 0,
    gain: bool = False,
    row_scale: bool = False,
    add: bool = False,
    **quantiser: Any,
) -> Arguments:
    operands, keywords = _rmsnorm(n=n, x=x, gain=gain, row_scale=row_scale, add=add)
    return operands, {**keywords, "keep": keep, **_quantiser(**quantiser)}


def _hadamard(
    *, n: int = 4096, x: torch.dtype = _BF16, size: int = 4096, inner: int = 1, gate: bool = False
) -> Arguments:
    rows, gates = _halves(n, x)
    return (rows,), {"gate": gates if gate else None, "size": size, "inner": inner}


def _hadamard_quantise(
    *,
    n: int = 4096,
    x: torch.dtype = _BF16,
    size: int = 4096,
    inner: int = 1,
    gate: bool = False,
    keep: int = 0,
    **quantiser: Any,
) -> Arguments:
    operands, keywords = _hadamard(n=n, x=x, size=size, inner=inner, gate=gate)
    return operands, {**keywords, "keep": keep, **_quantiser(**quantiser)}


_CACHES: dict[str, dict[str, Any]] = {
    "4 bits, heads of 128": {},
    "4 bits, heads of 64": {"width": 64},
    "4 bits, heads of 80": {"width": 80},
    "3 bits": {"bits": 3},
    "8 bits": {"bits": 8},
    "4 bits, symmetric, static range": {"symmetric": True, "static": True},
    "4 bits, static range": {"static": True},
    "bfloat16": {"bits": 16},
    "float16, 4 bits": {"dtype": _F16},
    "float32, 4 bits": {"dtype": _F32},
}

_APPENDED: dict[str, dict[str, Any]] = {
    "4 bits, online Hadamard": {"hadamard": True},
    "4 bits, 512 positions": {"count": 512},
    "float64, 4 bits": {"dtype": _F64},
}

_ATTENDED: dict[str, dict[str, Any]] = {
    "4 bits, 32 query heads to a key": {"group": 32},
    "4 bits, a mask": {"masked": True},
    "4 bits, 512 positions at once": {"count": 512},
    "bfloat16, 512 positions at once": {"bits": 16, "count": 512},
}


def _rope_append(
    *, bits: int = 4, width: int = 128, count: int = 1, dtype: torch.dtype = _BF16, hadamard: bool = False,
    **rows: Any,
) -> Arguments:  # fmt: skip
    merged = _floats(1, count, 8, width, dtype=dtype)
    angles = _floats(1, 1, count, width // 2, dtype=dtype)
    keys, values = (_kv_rows(bits, width, dtype, **rows) for _ in range(2))
    heads = merged.split((4, 2, 2), dim=2)
    return (*heads, angles, angles, keys, values, 0), {"hadamard": hadamard}


def _kv_append(bits: int) -> Arguments:
    return (_kv_rows(bits, 64, _BF16), _floats(1, 2, 1, 64), 0), {}


def _kv_attention(
    *, bits: int = 4, width: int = 128, count: int = 1, group: int = 2, masked: bool = False,
    dtype: torch.dtype = _BF16, **rows: Any,
) -> Arguments:  # fmt: skip
    keys, values = (_kv_rows(bits, width, dtype, **rows) for _ in range(2))
    mask = torch.ones(1, 1, count, 512, dtype=torch.bool) if masked else None
    return (_floats(1, 2 * group, count, width, dtype=dtype), keys, values, 512), {"mask": mask}


def _kv_rows(
    bits: int, width: int, dtype: torch.dtype, symmetric: bool = False, static: bool = False
) -> Rows:
    if bits == 16:
        return _floats(1, 2, 512, width, dtype=dtype)
    scale = torch.ones(1) if static else None
    zero = torch.zeros(1) if static and not symmetric else None
    shape, wide = (1, 2, 512, width), torch.promote_types(dtype, _F32)
    device = torch.empty(0).device
    return kv_rows(*shape, bits, symmetric=symmetric, scale=scale, zero=zero, dtype=wide, device=device)


_WEIGHTS: dict[str, dict[str, Any]] = {
    "float32, 4 bits": {},
    "with zero-points, 8 bits": {"bits": 8, "symmetric": False},
    "float64": {"dtype": _F64},
}


def _find_range(n: int = 128, bits: int = 4, symmetric: bool = True, dtype: torch.dtype = _F32) -> Arguments:
    return (_floats(8, n, dtype=dtype), bits, symmetric, True), {}


def _gptq_block(n: int = 128, bits: int = 4, symmetric: bool = True, dtype: torch.dtype = _F32) -> Arguments:
    weight = _floats(8, n, dtype=dtype)
    return (weight, _floats(n, n, dtype=dtype), weight, None if symmetric else weight, bits), {}


def _halves(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two [8, n], as one product gives both."""
    left, right = _floats(8, 2 * n, dtype=dtype).chunk(2, dim=-1)
    return left, right


def _floats(*shape: int, dtype: torch.dtype = _BF16) -> Tensor:
    return torch.ones(*shape, dtype=dtype)
