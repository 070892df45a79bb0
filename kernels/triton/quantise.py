"""Quantising rows: one read of x, one write of the codes.

A program holds one row, or several where rows are short, in registers: it reduces them to a scale and rounds
them against it. What the host does for a quantiser is here, for kernels with something in front of it too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Unpack

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import tuning
from kernels.compiled import Compilation, divisible
from kernels.reference import Quantised, Quantiser
from kernels.refusals import UnsupportedError
from kernels.triton.launching import Launch, by_form
from kernels.triton.rounding import codes, gated, largest, rounding, scale_and_zero, smallest

# Of one row, in registers.
LARGEST_ROW = 32768
# What the kernels read, by Triton's names.
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Choice:
    """elements: values that a thread holds, where rows are many. few: the same for at most 64 rows, which
    want all threads at once. tile: values that a program takes, of up to 16 rows where they are short."""

    elements: int = 32
    few: int = 8
    tile: int = 4096


@triton.jit
def _quantise(  # type: ignore[no-untyped-def]
    x, gate, out, scales, zeros, given_scale, given_zero,
    rows, n, stride, gate_stride, scale_step, zero_step, clip,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, STATIC: tl.constexpr, CLAMP: tl.constexpr,
    GATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    if OVERLAPPED:
        gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    start = row.to(tl.int64)
    inside = (row < rows) & (column < n)
    raw = tl.load(x + start * stride + column, inside, other=0.0)
    if GATE:
        factor = tl.load(gate + start * gate_stride + column, inside, other=0.0)
    if OVERLAPPED:
        gdc_launch_dependents()
    if GATE:
        raw = gated(factor, raw)
    wide = raw.to(tl.float32)
    low = tl.zeros((ROWS, 1), tl.float32)
    fixed_scale, fixed_zero = low, low
    if STATIC:
        fixed_scale = tl.load(given_scale + start * scale_step, row < rows, other=1.0)
        if not SYMMETRIC:
            fixed_zero = tl.load(given_zero + start * zero_step, row < rows, other=0.0)
    if SYMMETRIC or STATIC:
        high = largest(tl.abs(wide), 1)
    else:
        low, high = smallest(wide, 1), largest(wide, 1)
    scale, zero = scale_and_zero(low, high, clip, fixed_scale, fixed_zero, BITS, SYMMETRIC, STATIC)
    byte = codes(wide, rounding(scale, zero, BITS, SYMMETRIC), SYMMETRIC, CLAMP, raw.dtype == tl.float32)
    tl.store(out + start * n + column, byte.to(out.dtype.element_ty), inside)
    tl.store(scales + start, scale, row < rows)
    if not SYMMETRIC and not STATIC:
        tl.store(zeros + start, zero, row < rows)


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
    choice: Choice | None = None,
    overlapped: bool = False,
) -> Quantised:
    """`pass_reference.quantise` on the GPU: to the bit, but for few products with a gate (`rounding.gated`).

    x, gate: [..., n], bfloat16, float16 or float32, n up to 32768. choice: None takes the table's.
    overlapped: launch the kernel before the one in front of it on the stream has ended; it waits for that
    one's results.
    Raises ValueError, naming what does not fit, where `unsupported` does.
    """
    quantiser: Quantiser = {
        "bits": bits, "symmetric": symmetric, "clip": clip, "group": group, "scale": scale, "zero": zero
    }  # fmt: skip
    launch = _launch(x, gate, choice, overlapped, **quantiser)
    q = Results(x.shape[:-1], x.shape[-1], x.device, quantiser)
    if launch is not None:
        rows = rows_of(x)
        launch(rows, rows if gate is None else rows_of(gate), *q.pointers())
    return q.quantised()


@by_form
def _launch(
    x: Tensor, gate: Tensor | None, choice: Choice | None, overlapped: bool, **quantiser: Unpack[Quantiser]
) -> Launch | None:
    """None where there are no rows."""
    check(unsupported(x, gate=gate, **quantiser))
    rows = rows_of(x)
    gates = rows if gate is None else rows_of(gate)
    m, n = rows.shape
    if not m:
        return None
    choice = choice or tuning.lookup("quantise", x.device, m, n, n, Choice())
    block = max(triton.next_power_of_2(n), 16)
    many = min(max(choice.tile // block, 1), 16) if m > 64 else 1
    q = Results(x.shape[:-1], n, x.device, quantiser)
    return Launch(
        _quantise,
        (triton.cdiv(m, many),),
        (m, n, rows.stride(0), gates.stride(0), *q.numbers()),
        {**q.constants(x.dtype), "GATE": gate is not None, "ROWS": many, "BLOCK": block,
         "OVERLAPPED": overlapped},
        {"num_warps": warps(many * block, choice.elements if m > 64 else choice.few),
         "enable_fp_fusion": False, "launch_pdl": overlapped},
        x.device,
    )  # fmt: skip


def unsupported(
    x: Tensor,
    bits: int,
    *,
    gate: Tensor | None = None,
    symmetric: bool,
    clip: float = 1.0,
    group: int | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> str | None:
    """Why `quantise` cannot run here, in a phrase, or None."""
    reason = unsupported_input(x, 0, gate) or unsupported_beside(x, "gate", gate)
    return reason or unsupported_quantiser(
        x, x.shape[-1], bits=bits, symmetric=symmetric, clip=clip, group=group, scale=scale, zero=zero
    )


def unsupported_input(x: Tensor, keep: int = 0, *others: Tensor | None) -> str | None:
    """Why no kernel of these passes can take x with its first `keep` channels kept, or None. others: operands
    that a gradient may be wanted for, beside x."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)):
        return "inputs that need gradients"
    if not x.is_cuda and not triton.knobs.runtime.interpret:
        return f"a tensor on the {x.device.type.upper()}"
    if x.dtype not in DTYPES:
        return f"{x.dtype} inputs"
    if not 0 < x.shape[-1] <= LARGEST_ROW:
        return f"rows of {x.shape[-1]} values (1 to {LARGEST_ROW} fit)"
    if not 0 <= keep < x.shape[-1]:
        return f"{keep} kept of {x.shape[-1]} channels"
    return None


def unsupported_beside(x: Tensor, name: str, other: Tensor | None) -> str | None:
    """Why a tensor of that name cannot be taken with x, number by number, or None."""
    if other is None:
        return None
    if other.dtype != x.dtype:
        return f"a {other.dtype} {name} for {x.dtype} inputs"
    if other.shape != x.shape:
        return f"a {name} {list(other.shape)} for an input {list(x.shape)}"
    return None if other.device == x.device else "operands on several devices"


def unsupported_quantiser(
    x: Tensor,
    n: int,
    *,
    bits: int,
    symmetric: bool,
    clip: float = 1.0,
    group: int | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> str | None:
    """Why the n channels of x's rows that are quantised cannot be so, or None."""
    if not 2 <= bits <= 8:
        return f"{bits} bits (2 to 8 are defined)"
    if not 0.0 < clip <= 1.0:
        return f"a clip ratio of {clip}, outside (0, 1]"
    if group is not None:
        return f"groups of {group} in a row of {n}"
    if scale is None:
        return None if zero is None else "a static zero-point without its scale"
    if clip != 1.0:
        return "a clip ratio with a static range"
    if symmetric != (zero is None):
        return "a static zero-point, which asymmetric codes need and symmetric ones cannot have"
    for name, static in (("scale", scale), ("zero-point", zero)):
        if static is not None:
            if torch.is_grad_enabled() and static.requires_grad:
                return f"a static {name} that needs gradients"
            if static.device != x.device:
                return f"a static {name} on another device"
            fits = static.dim() <= x.dim() and all(
                have in (1, want)
                for have, want in zip(static.shape[::-1], (1, *x.shape[:-1][::-1]), strict=False)
            )
            if not fits:
                return f"a static {name} {list(static.shape)} for rows {list(x.shape)}"
    return None


def check(reason: str | None) -> None:
    """Raise UnsupportedError for a reason of `unsupported`."""
    if reason is not None:
        raise UnsupportedError("the Triton kernel does not take", reason)


def rows_of(x: Tensor) -> Tensor:
    """x [..., n] as [rows, n] with neighbouring channels side by side; copied only where it must be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def warps(values: int, elements: int) -> int:
    """Warps of a program that holds so many values, so many to a thread."""
    return min(max(values // (32 * elements), 1), 32)


class Results:
    """The operands and results of a quantiser over rows of n channels, as its kernels take them."""

    def __init__(self, leading: torch.Size, n: int, device: torch.device, quantiser: Quantiser) -> None:
        self.bits, self.symmetric = quantiser["bits"], quantiser["symmetric"]
        self.clip = quantiser.get("clip", 1.0)
        static, zero = quantiser.get("scale"), quantiser.get("zero")
        self.static = static is not None
        code = torch.int8 if self.symmetric else torch.uint8
        self.codes = torch.empty(*leading, n, dtype=code, device=device)
        self.scale = torch.empty(*leading, 1, dtype=torch.float32, device=device)
        self.given_scale, self.scale_step = _given(static, self.scale)
        self.given_zero, self.zero_step = _given(zero, self.scale)
        self.zero: Tensor | None = None
        if zero is not None:
            self.zero = zero.to(torch.float32).expand(self.scale.shape)
        elif not self.symmetric:
            self.zero = torch.empty_like(self.scale)

    def pointers(self) -> tuple[Tensor, ...]:
        """out, scales, zeros, given_scale, given_zero; scales stand for what is absent and not touched."""
        zero = self.scale if self.zero is None else self.zero
        return self.codes, self.scale, zero, self.given_scale, self.given_zero

    def numbers(self) -> tuple[int, int, float]:
        """scale_step, zero_step, clip."""
        return self.scale_step, self.zero_step, self.clip

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """BITS, SYMMETRIC, STATIC, CLAMP for an x of this dtype."""
        return constants(self.bits, self.symmetric, self.static, self.clip, dtype)

    def quantised(self) -> Quantised:
        return Quantised(self.codes, self.scale, self.zero, None, self.bits)


def constants(
    bits: int, symmetric: bool, static: bool, clip: float, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """The constants of a quantiser's kernels; codes of a plain dynamic range need no clamping."""
    clamp = static or not symmetric or clip != 1.0 or dtype == torch.float32
    return {"BITS": bits, "SYMMETRIC": symmetric, "STATIC": static, "CLAMP": clamp}


def _given(static: Tensor | None, scale: Tensor) -> tuple[Tensor, int]:
    """A static number for each row as float32, and the step from row to row."""
    if static is None:
        return scale, 0
    static = static.to(torch.float32)
    return (static.reshape(1), 0) if static.numel() == 1 else (static.expand(scale.shape).reshape(-1), 1)


# Of the arguments that these passes share, for `compilations`.
SIGNATURE = {
    "rows": "i32", "n": "i32", "keep": "i32", "stride": "i32", "gate_stride": "i32", "add_stride": "i32",
    "scale_step": "i32", "zero_step": "i32", "clip": "fp32", "out": "*i8",
    "scales": "*fp32", "zeros": "*fp32", "given_scale": "*fp32", "given_zero": "*fp32",
}  # fmt: skip


def compilation(
    name: str, kernel: Any, types: dict[str, str], constexprs: dict[str, Any], options: dict[str, Any],
    expect: tuple[str, ...] = (),
) -> Compilation:  # fmt: skip
    """One for rows that start at multiples of 16 elements. types: of arguments not in SIGNATURE."""
    every = {**SIGNATURE, **types}
    taken = {key: every[key] for key in kernel.arg_names if key not in constexprs}
    even = ("n", "keep", "stride", "gate_stride", "add_stride")
    attrs = divisible(kernel, taken, *(key for key in even if key in taken))
    return Compilation(name, kernel, taken, constexprs, {"enable_fp_fusion": False, **options}, attrs, expect)


def compilations() -> Iterator[Compilation]:
    """What stands for this kernel in the compile tests."""
    cases = [
        ("bf16-4096-a4", torch.bfloat16, 4096, 4, True, 1.0, False),
        ("bf16-14336-a4", torch.bfloat16, 14336, 4, True, 1.0, False),
        ("bf16-4096-a8-clip", torch.bfloat16, 4096, 8, True, 0.9, False),
        ("fp16-4096-a4-asymmetric", torch.float16, 4096, 4, False, 1.0, False),
        ("fp32-4096-a4", torch.float32, 4096, 4, True, 1.0, False),
        ("bf16-14336-a4-gate", torch.bfloat16, 14336, 4, True, 1.0, True),
        ("fp16-8192-a8-gate", torch.float16, 8192, 8, True, 0.9, True),
        ("fp32-8192-a8-gate", torch.float32, 8192, 8, True, 1.0, True),
    ]
    for name, dtype, n, bits, symmetric, clip, gate in cases:
        block = triton.next_power_of_2(n)
        yield compilation(
            f"quantise-{name}",
            _quantise,
            {"x": f"*{DTYPES[dtype]}", "gate": f"*{DTYPES[dtype]}", "out": "*i8" if symmetric else "*u8"},
            constants(bits, symmetric, False, clip, dtype)
            | {"GATE": gate, "ROWS": 1, "BLOCK": block, "OVERLAPPED": False},
            {"num_warps": warps(block, Choice().elements)},
            ("LDG.E.128", "STG.E.128"),
        )
