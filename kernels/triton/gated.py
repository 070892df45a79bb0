"""The gate of an MLP alone: silu(gate) * up, one read of each, one write."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import tuning
from kernels.compiled import Compilation
from kernels.triton.launching import Launch, by_form
from kernels.triton.quantise import (
    DTYPES,
    check,
    compilation,
    rows_of,
    unsupported_beside,
    unsupported_input,
    warps,
)  # fmt: skip
from kernels.triton.rounding import gated as product


@dataclass(frozen=True)
class Choice:
    """block: values of a row that a program takes, where rows are many. few: the same for at most 64 rows,
    which want all multiprocessors at once. elements: values that a thread holds."""

    block: int = 2048
    few: int = 512
    elements: int = 8


@triton.jit
def _gated(  # type: ignore[no-untyped-def]
    gate, x, out, n, gate_stride, stride, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr
):
    if OVERLAPPED:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(gate + row * gate_stride + column, column < n, other=0.0)
    up = tl.load(x + row * stride + column, column < n, other=0.0)
    if OVERLAPPED:
        gdc_launch_dependents()
    tl.store(out + row * n + column, product(factor, up), column < n)


def gated(gate: Tensor, up: Tensor, *, choice: Choice | None = None, overlapped: bool = False) -> Tensor:
    """`pass_reference.gated` on the GPU, contiguous; `rounding.gated` says how close.

    gate, up: [..., n], bfloat16, float16 or float32, n up to 32768. choice and overlapped as in `quantise`.
    Raises ValueError, naming what does not fit, where `unsupported` does.
    """
    launch = _launch(gate, up, choice, overlapped)
    y = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    if launch is not None:
        launch(rows_of(gate), rows_of(up), y)
    return y


@by_form
def _launch(gate: Tensor, up: Tensor, choice: Choice | None, overlapped: bool) -> Launch | None:
    """None where there are no rows."""
    check(unsupported(gate, up))
    gates, ups = rows_of(gate), rows_of(up)
    m, n = ups.shape
    if not m:
        return None
    choice = choice or tuning.lookup("gated", up.device, m, n, n, Choice())
    block = min(choice.block if m > 64 else choice.few, max(triton.next_power_of_2(n), 32))
    return Launch(
        _gated,
        (m, triton.cdiv(n, block)),
        (n, gates.stride(0), ups.stride(0)),
        {"BLOCK": block, "OVERLAPPED": overlapped},
        {"num_warps": warps(block, choice.elements), "enable_fp_fusion": False, "launch_pdl": overlapped},
        up.device,
    )


def unsupported(gate: Tensor, up: Tensor) -> str | None:
    """Why `gated` cannot run here, in a phrase, or None."""
    return unsupported_input(up, 0, gate) or unsupported_beside(up, "gate", gate)


def compilations() -> Iterator[Compilation]:
    """What stands for this kernel in the compile tests."""
    for name, dtype, block in (
        ("bf16", torch.bfloat16, Choice().block),
        ("bf16-few-rows", torch.bfloat16, Choice().few),
        ("fp16", torch.float16, Choice().block),
        ("fp32", torch.float32, Choice().block),
    ):
        pointer = f"*{DTYPES[dtype]}"
        yield compilation(
            f"gated-{name}",
            _gated,
            {"gate": pointer, "x": pointer, "out": pointer},
            {"BLOCK": block, "OVERLAPPED": False},
            {"num_warps": warps(block, Choice().elements)},
            ("LDG.E.128", "STG.E.128"),
        )
