"""The rounding of weights that `kernels.bench` times on a GPU: a block of GPTQ's columns, and the search for
the range of every output, of the linears of a decoder. Ours beside the torch operations of the reference.

What this project's kernels return is compared with the reference before it is timed.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import weight_reference
from kernels.gpu_contests import GpuContest, Made, kernel
from kernels.timing import nbytes

OPERATIONS = ("gptq_block", "find_range")
COLUMNS = 128
"""Of a block, as GPTQ walks through it."""
BITS = 4
SETS = 2
"""Of operands, which take turns. Neither operation is bound by memory, so they need not leave L2."""
FEW_OTHERS = 0.01
"""The share of results that may be others than the reference's: ties, and what follows them in their rows."""


def rounding(
    operation: str, layer: str, outputs: int, inputs: int, by: Sequence[str], device: torch.device
) -> Iterator[GpuContest]:
    """One of OPERATIONS on a weight [outputs, inputs], or its block of COLUMNS; symmetric codes."""
    width = inputs if operation == "find_range" else min(COLUMNS, inputs)
    make = partial(_made, operation, outputs, width, device)
    reference = getattr(weight_reference, operation)
    entrants: dict[str, tuple[str, Callable[[], Made]]] = {"reference": ("torch", partial(make, reference))}
    if "ours" in by:
        entrants["ours"] = ("ours", partial(make, lambda *operands: kernel(operation)(*operands)))
    yield GpuContest(operation, layer, outputs, outputs, width, entrants)


def _made(operation: str, outputs: int, width: int, device: torch.device, run: Callable[..., Any]) -> Made:
    """Raises ArithmeticError where too many results are others than the reference's."""
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=device)
    weights = random(SETS, outputs, width)
    behind: tuple[Any, ...] = BITS, True, True
    if operation == "gptq_block":
        scale, _ = weight_reference.find_range(weights[0], BITS, True, False)
        behind = _factor(random(4 * width, width) @ random(width, width)), scale.expand(-1, width), None, BITS
    calls = [partial(run, weight, *behind) for weight in weights]
    found = calls[0]()
    wanted = getattr(weight_reference, operation)(weights[0], *behind)
    if float((found[0] != wanted[0]).double().mean()) > FEW_OTHERS:
        raise ArithmeticError("its result is wrong: it is not the reference's")
    moved = nbytes(weights[0], *behind, *found)
    return Made(calls, moved, SETS * moved, {}, exact=True)


def _factor(inputs: Tensor) -> Tensor:
    """GPTQ's factor for these inputs [tokens, n], in the order of rows."""
    hessian = inputs.double().T @ inputs.double() / len(inputs)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float().contiguous()
