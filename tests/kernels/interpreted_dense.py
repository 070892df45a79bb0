"""The linear of weights that are not quantised as Triton interprets it, beside float64: a program of its own,
because a process either compiles or interprets. tests/kernels/test_linear_dense.py runs it with
TRITON_INTERPRET=1.
"""

import torch
from torch import Tensor

from tests.kernels import gluon_on_numpy

gluon_on_numpy.install("linear_dense", "few_rows")

from kernels.triton import linear_dense  # noqa: E402
from kernels.triton.linear_dense import Choice  # noqa: E402
from tests.kernels.interpreted_fused import complete_the_interpreter  # noqa: E402


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_close(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    """Within one rounding to the result's type and float32's error for a sum of so many products."""
    want, size = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    if bias is not None:
        want, size = want + bias.double(), size + bias.double().abs()
    bound = want.abs() * torch.finfo(y.dtype).eps / 2 + size * x.shape[-1] * 2.0**-24
    assert y.dtype == x.dtype and bool(((y.double() - want).abs() <= bound).all())


def interpret() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for rows, outputs, inputs, choice in (
            (1, 16, 64, Choice()),
            (3, 17, 200, Choice(warps=4, ahead=2)),
            (16, 40, 520, Choice(32, 4, 3, 2)),
            (9, 70, 1032, Choice(64, 16, 1, 1)),
            (5, 1, 8, Choice()),
        ):
            x, w = draw(rows, inputs, dtype=dtype), draw(outputs, inputs, dtype=dtype)
            bias = draw(outputs, dtype=dtype) if rows > 1 else None
            y = linear_dense.dense(x, w, bias, choice=choice, overlapped=rows % 2 == 0)
            assert_close(y, x, w, bias)
            # Views of something wider, of which nothing else may be read.
            wide = torch.full((rows, inputs + 24), float("nan"), dtype=dtype)
            wide[:, 16 : 16 + inputs] = x
            apart = wide[:, 16 : 16 + inputs].view(1, rows, inputs)
            assert torch.equal(linear_dense.dense(apart, w, bias, choice=choice)[0], y)
            one = linear_dense.dense(x[0], w, bias, choice=choice)
            assert torch.equal(one, y[0]) and one.shape == (outputs,)


if __name__ == "__main__":
    complete_the_interpreter()
    interpret()
    print("dense")
