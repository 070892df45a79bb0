"""The linear for few rows of codes as Triton interprets it, beside the reference to the bit: a program of its
own, because a process either compiles or interprets. tests/kernels/test_linear_few.py runs it with
TRITON_INTERPRET=1.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

from tests.kernels import gluon_on_numpy

gluon_on_numpy.install("linear_few", "few_rows")

from kernels import reference  # noqa: E402
from kernels.reference import PackedWeight, Quantised, pack_weight  # noqa: E402
from kernels.triton import codegen, linear_few  # noqa: E402
from kernels.triton.linear_few import Choice  # noqa: E402
from tests.equality import same  # noqa: E402
from tests.kernels.interpreted_fused import complete_the_interpreter  # noqa: E402


def product(a: Any, b: Any, c: Any) -> Any:
    """int8 [warp, m, k] times int8 [warp, k, n], added to int32 c."""
    sums = np.matmul(a.handle.data.astype(np.int32), b.handle.data.astype(np.int32)) + c.handle.data
    return tl.tensor(TensorHandle(sums.astype(np.int32), tl.int32), c.type)


def codes(rows: int, inputs: int, bits: int, zero: Tensor | None, seed: int) -> Quantised:
    """Of the whole range, signed where there is no zero-point."""
    g = torch.Generator().manual_seed(seed)
    first, kind = (-(2 ** (bits - 1)), torch.int8) if zero is None else (0, torch.uint8)
    x = torch.randint(first, first + 2**bits, (rows, inputs), generator=g).to(kind)
    x[:, 0] = first
    x[0] = first + 2**bits - 1
    scale = torch.exp(3 * torch.randn(rows, 1, generator=g))
    return Quantised(x, scale, None if zero is None else zero.expand(rows, 1), None, bits)


def weight(outputs: int, inputs: int, seed: int) -> PackedWeight:
    g = torch.Generator().manual_seed(seed)
    w = torch.randint(-8, 8, (outputs, inputs), generator=g).to(torch.int8)
    w[0] = -8
    return pack_weight(w, torch.exp(3 * torch.randn(outputs, 1, generator=g)), None, 4, colsum=True)


def zero_points(rows: int, bits: int) -> list[Tensor | None]:
    """None; of all rows, in the codes, at their ends and far from them; of each row."""
    top = 2**bits - 1
    of_all = [torch.tensor([float(z)]) for z in (0, top // 3, top, -5, 2**20 + 1)]
    each = torch.arange(rows, dtype=torch.float32)[:, None] * (top // rows)
    return [None, *of_all, torch.tensor([[float("nan")]]), each]


def interpret() -> None:
    for rows, outputs, inputs, choice in (
        (1, 16, 64, Choice(warps=2, ahead=1, x_ahead=1)),
        (3, 21, 416, Choice()),
        (9, 40, 1056, Choice(32, 2, 4, 2)),
        (33, 16, 96, Choice(warps=2)),
    ):
        w = weight(outputs, inputs, seed=outputs)
        bias, row_scale = torch.randn(outputs), torch.rand(rows, 1) + 0.5
        for bits in (3, 4, 8):
            for zero in zero_points(rows, bits):
                x = codes(rows, inputs, bits, zero, seed=rows)
                for dtype, beside in (
                    (torch.float32, {}),
                    (torch.bfloat16, {"row_scale": row_scale}),
                    (torch.float16, {"row_scale": row_scale, "bias": bias}),
                ):
                    more: Any = beside
                    y = linear_few.linear(x, w, dtype=dtype, choice=choice, **more)
                    want = reference.linear(x, w, dtype=dtype, **more)
                    assert same(y, want), (rows, outputs, inputs, bits, zero, dtype)


if __name__ == "__main__":
    complete_the_interpreter()
    linear_few.mma_v2 = product
    codegen.language = tl  # type: ignore[attr-defined]  # the interpreter looks for it in a function's module
    codegen.tl = SimpleNamespace(inline_asm_elementwise=gluon_on_numpy.assembled, int8=tl.int8)
    interpret()
    print("few")
