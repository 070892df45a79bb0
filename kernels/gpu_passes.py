"""The passes in front of linears that `kernels.bench` times on a GPU: the quantiser alone, behind RMSNorm and
behind the online Hadamard transform, each beside a copy of as many bytes as it reads and writes.

What this project's kernels return is compared with the reference before it is timed.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.contests import EPS
from kernels.gpu_contests import GpuContest, Made, kernel
from kernels.timing import nbytes, sets_needed, tensors

# How far a scale, relatively, and how large a share of the codes may be from the reference's.
CLOSE, FEW_CODES = 2.0**-7, 0.01


def fused(
    operation: str,
    layer: str,
    n: int,
    inner: int,
    rows: Sequence[int],
    by: Sequence[str],
    l2: int,
    device: torch.device,
) -> Iterator[GpuContest]:
    """A pass over rows of n values in bf16 beside a copy of as many bytes as it reads and writes. inner: as
    in `reference.online_hadamard`."""
    size = n // inner
    ways: dict[str, dict[str, tuple[str, Callable[[Tensor], Any]]]] = {
        "quantise": {
            "ours a4": ("ours", lambda x: kernel("quantise")(x, 4, symmetric=True)),
            "ours a8": ("ours", lambda x: kernel("quantise")(x, 8, symmetric=True)),
            "humming a8": ("humming", lambda x: _humming_input(x, None)),
        },
        "rmsnorm + quantise": {
            "ours a4": (
                "ours",
                lambda x: kernel("rmsnorm_quantise")(x, eps=EPS, bits=4, symmetric=True),
            ),
            "F.rms_norm": ("torch", lambda x: F.rms_norm(x, (n,), None, EPS)),
        },
        "hadamard + quantise": {
            "ours a4": (
                "ours",
                lambda x: kernel("hadamard_quantise")(x, size=size, inner=inner, bits=4, symmetric=True),
            ),
        },
    }
    if inner == 1:
        ways["hadamard + quantise"] |= {
            "humming a8": ("humming", lambda x: _humming_input(x, n)),
            "fast_hadamard_transform": (
                "fast-hadamard-transform",
                lambda x: importlib.import_module("fast_hadamard_transform").hadamard_transform(x, n**-0.5),
            ),
        }
    references: dict[str, Callable[[Tensor, int], Any]] = {
        "quantise": lambda x, bits: reference.quantise(x, bits, symmetric=True),
        "rmsnorm + quantise": lambda x, bits: reference.rmsnorm_quantise(
            x, eps=EPS, bits=bits, symmetric=True
        ),
        "hadamard + quantise": lambda x, bits: reference.hadamard_quantise(
            x, size=size, inner=inner, bits=bits, symmetric=True
        ),
    }
    for count in rows:
        # bf16 in; codes and a float32 scale for each row out; RMSNorm also returns its rms.
        moved = count * (3 * n + (8 if operation == "rmsnorm + quantise" else 4))
        sets = sets_needed(moved, l2)
        entrants: dict[str, tuple[str, Callable[[], Made]]] = {
            "copy of the same bytes": ("torch", partial(_copying, moved // 2, sets, device))
        }
        for name, (package, way) in ways[operation].items():
            if package in by:
                check = references[operation] if package == "ours" else None
                bits = 8 if name.endswith("a8") else 4
                entrants[name] = (package, partial(_passing, way, count, n, sets, device, check, bits))
        entrants["kernel over the same bytes"] = ("torch", partial(_streaming, moved // 2, sets, device))
        yield GpuContest(operation, layer, count, n, n, entrants)


def _copying(half: int, sets: int, device: torch.device) -> Made:
    width = -(-half // 16) * 16
    sources = torch.randint(-128, 128, (sets, width), dtype=torch.int8, device=device)
    targets = torch.empty_like(sources)
    calls = [partial(targets[number, :half].copy_, sources[number, :half]) for number in range(sets)]
    return Made(calls, 2 * half, 2 * sets * half, {})


def _streaming(half: int, sets: int, device: torch.device) -> Made:
    """A copy may be the driver's own; this is a kernel that reads and writes as much."""
    words = -(-half // 4)
    sources = torch.randint(-(2**31), 2**31, (sets, words), dtype=torch.int32, device=device)
    targets = torch.empty_like(sources)
    calls = [partial(torch.bitwise_not, sources[number], out=targets[number]) for number in range(sets)]
    return Made(calls, 8 * words, 8 * sets * words, {})


def _passing(
    way: Callable[[Tensor], Any],
    rows: int,
    n: int,
    sets: int,
    device: torch.device,
    check: Callable[[Tensor, int], Any] | None,
    bits: int,
) -> Made:
    """check: the same pass by the reference; raises ArithmeticError where a row is not as it says."""
    x = torch.randn(sets, rows, n, dtype=torch.bfloat16, device=device)
    calls = [partial(way, x[number]) for number in range(sets)]
    result = calls[0]()
    if check is not None:
        for row in dict.fromkeys((0, rows - 1)):
            wanted = tensors(check(x[0, row : row + 1].cpu(), bits))
            for part, want in zip(tensors(result), wanted, strict=True):
                _as_the_reference(part[row : row + 1].cpu(), want)
    moved = x[0].nbytes + nbytes(result)
    return Made(calls, moved, sets * moved, {}, exact=check is not None)


def _as_the_reference(found: Tensor, wanted: Tensor) -> None:
    """Codes may be one apart where sums of another order end on the other side of a half, which is rare."""
    if found.is_floating_point():
        same = torch.allclose(found.float(), wanted.float(), rtol=CLOSE, atol=0.0)
    else:
        apart = (found.int() - wanted.int()).abs()
        same = int(apart.max()) <= 1 and float((apart > 0).float().mean()) < FEW_CODES
    if not same:
        raise ArithmeticError("its result is wrong: it is not the reference's")


def _humming_input(x: Tensor, hadamard: int | None) -> Any:
    return importlib.import_module("humming.ops").process_input(
        x, quant_mode="dynamic_token", quant_dtype="int8", hadamard_block_size=hadamard
    )
