"""The operations that methods call, each run by the implementation that fits and counted by its name.

Signatures and results are those of `reference`, `pass_reference`, `kv_reference` and `weight_reference`,
which run wherever no kernel does. On a CUDA GPU of compute capability 9, where triton is installed, an
operation runs as a Triton kernel (kernels/triton) unless that refuses the operands. The account tells the two
apart: "triton", and "reference (why no kernel ran)". What neither can run raises. Names carry the widths:
"linear w4a16", "kv_attention kv4".

Which implementation runs does not change what `quantise` returns without a gate, nor the integer products of
linears, nor, without kept channels, a linear of quantised inputs: they are the same to the last bit, as
long as the zero-points of its inputs are codes (`linear_many`). What it may change are the last bits of
floating-point sums: of a linear with floating-point inputs or weights or with kept channels, of a root mean
square and of a Hadamard transform; and, where a gate is applied, the last bit of few of its products. With
these go the scales and some of the codes, by one, that are then rounded from them. Kernels are chosen by the
number of rows too, so there a row's last bits may depend on how many rows stand beside it. A weight's range
is found among the same ones, but of two that are worth the same it may be the other; the columns of a GPTQ
block may differ in their last bits before they are rounded.
"""

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Unpack

import torch
from torch import Tensor

from kernels import integer, kv_reference, pass_reference, reference, weight_reference
from kernels.kv_reference import PackedRows, Rows
from kernels.pass_reference import Normalised, Normed
from kernels.reference import PackedWeight, Quantised, Quantiser
from kernels.refusals import UnsupportedError

FEW_ROWS = 16
"""Rows of a linear's codes, and of floats beside a 16-bit weight, up to which reading the weight takes the
time."""
FEW_A16_ROWS = 64
"""Rows of a linear's floats up to which reading the 4-bit weight for every 16 of them takes less time than
writing it in 16 bits."""
CAPABILITY = 9
"""Major compute capability that the kernels are written for: Hopper."""
TRITON = ("3.6",)
"""Versions of triton that the kernels are written for."""

# The files of kernels/triton by operation, but for linears.
_FILES = {
    "dense": "linear_dense",
    "quantise": "quantise",
    "gated": "gated",
    "rmsnorm": "rmsnorm_quantise",
    "rmsnorm_quantise": "rmsnorm_quantise",
    "hadamard": "hadamard_quantise",
    "hadamard_quantise": "hadamard_quantise",
    "rope_append": "kv_append",
    "kv_attention": "kv_attention",
    "find_range": "find_range",
    "gptq_block": "gptq_block",
}

Calls = dict[str, Counter[str]]
"""How often each implementation ran, by operation."""

_counts: Calls = {}
_account = ContextVar("account", default=_counts)
_reference_only = ContextVar("reference_only", default=False)
_at_rest = ContextVar("weights_at_rest", default=False)


def implementations() -> dict[str, dict[str, int]]:
    """Which implementation ran each operation, and how often, since the last reset."""
    return {name: dict(counts) for name, counts in sorted(_counts.items())}


def reset_implementations() -> None:
    """Start counting anew."""
    _counts.clear()


@contextmanager
def counted_apart() -> Iterator[Calls]:
    """Gives what is called inside, which the account does not show: of a CUDA graph that is captured, since
    then nothing runs. `count_replay` enters it."""
    calls: Calls = {}
    token = _account.set(calls)
    try:
        yield calls
    finally:
        _account.reset(token)


def count_replay(calls: Calls) -> None:
    """Enter calls once more: of a CUDA graph that was captured with them and is replayed."""
    for name, counts in calls.items():
        _counts.setdefault(name, Counter()).update(counts)


@contextmanager
def reference_only() -> Iterator[None]:
    """Inside, the reference runs on GPUs too: what kernels are compared with."""
    with _set(_reference_only):
        yield


@contextmanager
def weights_at_rest() -> Iterator[None]:
    """Inside, kernels are launched before those in front of them have ended, for whose results they wait;
    linears fetch their weights meanwhile, and norms their gains, on the promise that no work that is still
    queued writes them. Whoever captures a CUDA graph of a model whose weights stay as they are can give it.
    Graphs captured on one stream, with this or without, are to be replayed one after another: they share
    working memory."""
    with _set(_at_rest):
        yield


def quantise(
    x: Tensor,
    bits: int,
    *,
    gate: Tensor | None = None,
    symmetric: bool,
    clip: float = 1.0,
    group: int | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> Quantised:
    """`pass_reference.quantise`: of x, or of silu(gate) * x."""
    keywords = {"symmetric": symmetric, "clip": clip, "group": group, "scale": scale, "zero": zero}
    q: Quantised = _run(pass_reference, "quantise", f" a{bits}", x, bits, gate=gate, **keywords)
    return q


def linear(
    x: Tensor | Quantised,
    w: PackedWeight,
    *,
    x_keep: Tensor | None = None,
    w_keep: Tensor | None = None,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.linear`; the reference says by which routes its integer products were formed."""
    name = f"linear w{w.bits}a{16 if isinstance(x, Tensor) else x.bits}"
    keywords: dict[str, Any] = {"x_keep": x_keep, "w_keep": w_keep, "row_scale": row_scale, "bias": bias}
    keywords["dtype"] = dtype
    reason = _no_kernel_for(x if isinstance(x, Tensor) else x.codes)
    if reason is None:
        try:
            kernel = _kernels(linear_kernel(x, w, x_keep))
            y: Tensor = kernel.linear(x, w, **keywords, weights_at_rest=_at_rest.get())
        except UnsupportedError as refused:
            reason = refused.reason
    if reason is not None:
        before = integer.routes_taken.copy()
        y = reference.linear(x, w, **keywords)
        taken = " and ".join(sorted(integer.routes_taken - before))
        reason = "; ".join(part for part in (reason, taken) if part)
    _count(name, reason)
    return y


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference.dense`: a kernel's up to FEW_ROWS rows, and the library's product for more."""
    if x.numel() <= FEW_ROWS * x.shape[-1]:
        found: Tensor = _run(reference, "dense", "", x, weight, bias)
        return found
    y, reason = reference.dense(x, weight, bias), _no_kernel_for(x)
    _count("dense", f"more than {FEW_ROWS} rows" if reason is None else reason)
    return y


def linear_kernel(x: Tensor | Quantised, w: PackedWeight, x_keep: Tensor | None = None) -> str:
    """The file of kernels/triton that is meant for a linear of x.

    Many rows of floating-point inputs, or some beside kept channels or with groups of weights that the kernel
    for few rows does not take, meet a dequantised weight in one dense product.
    """
    if isinstance(x, Tensor):
        few = x_keep is None and x.numel() <= FEW_A16_ROWS * x.shape[-1]
        few = few and _kernels("linear_a16").takes_groups(w)
        return "linear_a16" if few else "dequantise"
    return "linear_few" if x.codes.numel() <= FEW_ROWS * x.codes.shape[-1] else "linear_many"


def rmsnorm(
    x: Tensor,
    *,
    add: Tensor | None = None,
    eps: float,
    divisor: int | None = None,
    gain: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Normed:
    """`pass_reference.rmsnorm`: of x, or of its sum with `add`."""
    keywords = {"add": add, "eps": eps, "divisor": divisor, "gain": gain, "row_scale": row_scale}
    result: Normed = _run(pass_reference, "rmsnorm", "", x, **keywords)
    return result


def rmsnorm_quantise(
    x: Tensor,
    *,
    add: Tensor | None = None,
    eps: float,
    divisor: int | None = None,
    gain: Tensor | None = None,
    row_scale: Tensor | None = None,
    keep: int = 0,
    **quantiser: Unpack[Quantiser],
) -> Normalised:
    """`pass_reference.rmsnorm_quantise`: of x, or of its sum with `add`."""
    keywords = {"add": add, "eps": eps, "divisor": divisor, "gain": gain, "row_scale": row_scale}
    result: Normalised = _run(
        pass_reference, "rmsnorm_quantise", f" a{quantiser['bits']}", x, **keywords, keep=keep, **quantiser
    )
    return result


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`pass_reference.gated`: silu(gate) * up."""
    y: Tensor = _run(pass_reference, "gated", "", gate, up)
    return y


def hadamard(x: Tensor, *, gate: Tensor | None = None, size: int, inner: int = 1) -> Tensor:
    """`pass_reference.hadamard`: the transform alone, of x or of silu(gate) * x."""
    y: Tensor = _run(pass_reference, "hadamard", "", x, gate=gate, size=size, inner=inner)
    return y


def hadamard_quantise(
    x: Tensor,
    *,
    gate: Tensor | None = None,
    size: int,
    inner: int = 1,
    keep: int = 0,
    **quantiser: Unpack[Quantiser],
) -> tuple[Tensor | None, Quantised]:
    """`pass_reference.hadamard_quantise`: of x, or of silu(gate) * x."""
    keywords = {"gate": gate, "size": size, "inner": inner, "keep": keep}
    result: tuple[Tensor | None, Quantised] = _run(
        pass_reference, "hadamard_quantise", f" a{quantiser['bits']}", x, **keywords, **quantiser
    )
    return result


def rope_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Rows,
    values: Rows,
    start: int | Tensor,
    *,
    hadamard: bool = False,
    clip: float = 1.0,
) -> Tensor:
    """`kv_reference.rope_append`."""
    operands = (query, key, value, cos, sin, keys, values, start)
    width, options = f" kv{_kv_bits(keys)}", {"hadamard": hadamard, "clip": clip}
    out: Tensor = _run(kv_reference, "rope_append", width, *operands, **options)
    return out


def kv_append(rows: PackedRows, x: Tensor, start: int | Tensor, *, clip: float = 1.0) -> None:
    """`kv_reference.kv_append`."""
    kv_reference.kv_append(rows, x, start, clip=clip)
    reason = _no_kernel_for(x)
    _count(f"kv_append kv{rows.bits}", "no kernel" if reason is None else reason)


def kv_attention(
    query: Tensor, keys: Rows, values: Rows, length: int | Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """`kv_reference.kv_attention`."""
    operands, width = (query, keys, values, length), f" kv{_kv_bits(keys)}"
    out: Tensor = _run(kv_reference, "kv_attention", width, *operands, mask=mask)
    return out


def find_range(rows: Tensor, bits: int, symmetric: bool, search: bool) -> tuple[Tensor, Tensor | None]:
    """`weight_reference.find_range`."""
    operands = (rows, bits, symmetric, search)
    found: tuple[Tensor, Tensor | None] = _run(weight_reference, "find_range", f" w{bits}", *operands)
    return found


def gptq_block(
    weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    """`weight_reference.gptq_block`."""
    operands = (weight, factor, scale, zero, bits)
    found: tuple[Tensor, Tensor] = _run(weight_reference, "gptq_block", f" w{bits}", *operands)
    return found


def _kv_bits(rows: Rows) -> int:
    """The width of codes; 16 stands for floats."""
    return rows.bits if isinstance(rows, PackedRows) else 16


def refusal(operation: str, *operands: Any, **keywords: Any) -> str | None:
    """Why no kernel can run an operation with these operands on a GPU of capability 9, in a phrase; None
    where one can."""
    file = kernel_file(operation, *operands, **keywords)
    reason: str | None = _kernels(file).unsupported(*operands, **keywords) if file else "no kernel"
    return reason


def kernel_file(operation: str, *operands: Any, **keywords: Any) -> str | None:
    """The file of kernels/triton that is meant for an operation, None where there is none."""
    if operation == "linear":
        return linear_kernel(operands[0], operands[1], keywords.get("x_keep"))
    return _FILES.get(operation)


def _no_kernel_for(x: Tensor) -> str | None:
    """Why none is to run where x lies: empty where kernels are no question, None where one may."""
    if not x.is_cuda:
        return ""
    return "asked for" if _reference_only.get() else no_kernels_on(x.device)


def _run(definitions: ModuleType, operation: str, width: str, /, *operands: Any, **keywords: Any) -> Any:
    """The kernel of that name, or where it refuses the operands, its definition. width: of codes, as the
    account names it behind the operation."""
    reason = _no_kernel_for(operands[0])
    if reason is None:
        try:
            kernel = getattr(_kernels(_FILES[operation]), operation)
            result = kernel(*operands, **keywords, overlapped=_at_rest.get())
        except UnsupportedError as refused:
            reason = refused.reason
    if reason is not None:
        result = getattr(definitions, operation)(*operands, **keywords)
    _count(operation + width, reason)
    return result


@cache
def _kernels(file: str) -> Any:
    return importlib.import_module(f"kernels.triton.{file}")


@cache
def no_kernels_on(device: torch.device) -> str | None:
    """Why no kernel can run on a GPU, None where some can."""
    if (reason := unfit_triton()) is not None:
        return reason
    if torch.version.cuda is None:
        return "the GPU is none of NVIDIA's"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major == CAPABILITY else f"kernels are for sm_{CAPABILITY}0, this is sm_{major}{minor}"


def unfit_triton() -> str | None:
    """Why the kernels cannot be compiled here, None where they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    version: str = importlib.import_module("triton").__version__
    if version.rsplit(".", 1)[0] in TRITON:
        return None
    return f"kernels are for triton {' and '.join(TRITON)}, this is {version}"


@contextmanager
def _set(switch: ContextVar[bool]) -> Iterator[None]:
    token = switch.set(True)
    try:
        yield
    finally:
        switch.reset(token)


def _count(name: str, reason: str | None) -> None:
    """reason: why no kernel ran, or how the reference did; None where a kernel ran."""
    implementation = "triton" if reason is None else f"reference ({reason})" if reason else "reference"
    account = _account.get()
    counts = account.get(name)
    if counts is None:
        counts = account.setdefault(name, Counter())
    counts[implementation] += 1
