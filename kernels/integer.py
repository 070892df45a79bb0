"""Exact integer matrix products, by whichever route the device computes exactly.

Three routes give the int32 product of int8 matrices:

    torch._int_mm    int8 dot products. Not every device computes them exactly: x86 CPUs without VNNI add
                     pairs of products in saturating 16-bit arithmetic, which is wrong where b has 8 bits. So
                     a probe runs worst-case operands once for each device and pair of widths, and decides.
    float32 matmul   exact while no partial sum can pass 2^24. On the CPU alone: elsewhere float32 may mean
                     TF32.
    float64 matmul   exact for whatever fits int32.

CUDA's `torch._int_mm` takes only M > 16 and K and N divisible by 8; other shapes are padded with zeros.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def int_matmul(a: Tensor, b: Tensor, *, a_bits: int, b_bits: int) -> Tensor:
    """a bᵀ exactly: int8 [M, K] and int8 [N, K] to int32 [M, N].

    a_bits, b_bits: the widths of the signed codes in a and b. Raises ValueError where a sum of K products
    could leave int32 (K > 131071 for 8 x 8 bits) and for other dtypes or shapes.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise ValueError(f"integer products take int8 matrices, got {a.dtype} and {b.dtype}")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a [M, K] and b [N, K] are needed, got {tuple(a.shape)} and {tuple(b.shape)}")
    name = route(a.shape[1], a_bits, b_bits, a.device)
    product = ROUTES[name](a, b)
    routes_taken[name] += 1
    return product


routes_taken: Counter[str] = Counter()
"""Products formed by each route. Sums of rows, which are products with ones, count as well."""


def centred_matmul(
    a: Tensor,
    b: Tensor,
    *,
    a_bits: int,
    b_bits: int,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    b_sum: Tensor | None = None,
) -> Tensor:
    """Σ_k (a - a_zero)(b - b_zero): the product D of `int_matmul`, corrected for zero-points.

        D - a_zero Σb - Σa b_zero + K a_zero b_zero

    a_zero: [M], b_zero: [N], both in the dtype that `centred_dtype` chose, which is the result's (int32
    without zero-points). b_sum: int32 [N], the sums of b's rows, formed here where None.
    """
    product = int_matmul(a, b, a_bits=a_bits, b_bits=b_bits)
    zero = a_zero if a_zero is not None else b_zero
    if zero is None:
        return product
    product = product.to(zero.dtype)
    if a_zero is not None:
        _subtract(product, a_zero, (row_sums(b, b_bits) if b_sum is None else b_sum).to(zero.dtype))
    if b_zero is not None:
        a_sum = row_sums(a, a_bits).to(zero.dtype)
        _subtract(product, a_sum if a_zero is None else a_sum - a.shape[1] * a_zero, b_zero)
    return product


def centred_dtype(
    k: int, a_bits: int, b_bits: int, a_zero: Tensor | None, b_zero: Tensor | None
) -> torch.dtype:
    """The dtype in which `centred_matmul` is exact: int32 where all zero-points (floating point here) are
    whole numbers and no term can leave int32; otherwise float64, exact for whole numbers below 2^53."""
    size = float(k)
    for zero, bits in ((a_zero, a_bits), (b_zero, b_bits)):
        largest = float(2 ** (bits - 1))
        if zero is not None and zero.numel():
            if not torch.equal(zero, zero.round()):  # NaN is no whole number either
                return torch.float64
            largest += float(zero.abs().max())
        size *= largest
    return torch.int32 if size <= 2**31 - 1 else torch.float64


def row_sums(codes: Tensor, bits: int) -> Tensor:
    """The sums of the rows of int8 [R, K] as int32 [R]: a product with ones, the fastest way to form them."""
    ones = torch.ones(1, codes.shape[1], dtype=torch.int8, device=codes.device)
    return int_matmul(codes, ones, a_bits=bits, b_bits=2).squeeze(1)


def _subtract(product: Tensor, column: Tensor, row: Tensor) -> None:
    """product -= column ⊗ row. Integers in one pass; floating point must not fuse the two roundings, or an
    element's value would depend on its place in a vector register."""
    if product.dtype == torch.int32:
        product.addcmul_(column[:, None], row[None, :], value=-1)
    else:
        product.sub_(column[:, None] * row[None, :])


def route(k: int, a_bits: int, b_bits: int, device: torch.device) -> str:
    """The name in ROUTES of the way in which `int_matmul` computes products over K = k.

    Raises ValueError where a sum could leave int32.
    """
    largest = k << (a_bits + b_bits - 2)
    if largest > 2**31 - 1:
        raise ValueError(f"a sum of {k} products of {a_bits} by {b_bits} bits can overflow int32")
    if _int_mm_is_exact(device, a_bits, b_bits):
        return "torch._int_mm"
    return "float32 matmul" if device.type == "cpu" and largest <= 2**24 else "float64 matmul"


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ by `torch._int_mm`, in a shape that the device takes."""
    m, n = a.shape[0], b.shape[0]
    if a.is_cuda:
        a, b = padded_for_cuda(a, b)
    elif a.shape[1] == 1:
        a, b = F.pad(a, (0, 1)), F.pad(b, (0, 1))
    # A view of b: a transposed copy makes the product several times slower.
    return torch._int_mm(_row_major(a), _row_major(b).t())[:m, :n]


def _row_major(codes: Tensor) -> Tensor:
    """codes [R, C] with strides (>= C, 1). On the CPU torch takes the row length from the strides, which mean
    nothing where a dimension has one element, and then leaves the result unwritten (pytorch issue 195066);
    padding K = 1 has the same reason."""
    rows, columns = codes.shape
    if codes.stride(1) == 1 and codes.stride(0) >= columns:
        return codes
    return codes.contiguous().as_strided((rows, columns), (columns, 1))


def padded_for_cuda(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a and b with zeros behind them up to a shape that CUDA's `torch._int_mm` takes."""
    rows, columns, depth = max(17 - a.shape[0], 0), -b.shape[0] % 8, -a.shape[1] % 8
    a = F.pad(a, (0, depth, 0, rows)) if rows or depth else a
    return a, F.pad(b, (0, depth, 0, columns)) if columns or depth else b


def float32_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ by a float32 matmul; exact while no partial sum can pass 2^24."""
    return (a.to(torch.float32) @ b.to(torch.float32).t()).to(torch.int32)


def float64_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ by a float64 matmul; exact wherever the result fits int32."""
    return (a.to(torch.float64) @ b.to(torch.float64).t()).to(torch.int32)


ROUTES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch._int_mm": int_mm,
    "float32 matmul": float32_matmul,
    "float64 matmul": float64_matmul,
}


def is_exact(
    product: Callable[[Tensor, Tensor], Tensor], device: torch.device, a_bits: int, b_bits: int
) -> bool:
    """Whether `product` gives a bᵀ exactly for the worst operands of these widths, in ragged shapes.

    The operands are constant extremes, which drive every partial sum as far as it goes, and random extremes.
    """
    generator = torch.Generator().manual_seed(0)
    for m, n, k in ((3, 2, 1), (1, 3, 5), (1, 40, 256), (17, 9, 67), (40, 33, 515)):
        for a_end in _ends(a_bits):
            for b_end in _ends(b_bits):
                a = _extremes(m, k, a_end, generator)
                b = _extremes(n, k, b_end, generator)
                want = (a.double() @ b.double().t()).to(torch.int32)
                try:
                    got = product(a.to(device), b.to(device))
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError:  # the device has no such product
                    return False
                if got.dtype != torch.int32 or not torch.equal(got.cpu(), want):
                    return False
    return True


@cache
def _int_mm_is_exact(device: torch.device, a_bits: int, b_bits: int) -> bool:
    return is_exact(int_mm, device, a_bits, b_bits)


def _ends(bits: int) -> tuple[tuple[int, int], ...]:
    """Pairs of codes that fill a matrix: all least, all greatest, both at random."""
    least, greatest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return (least, least), (greatest, greatest), (least, greatest)


def _extremes(rows: int, columns: int, ends: tuple[int, int], generator: torch.Generator) -> Tensor:
    which = torch.randint(2, (rows, columns), generator=generator)
    return torch.tensor(ends, dtype=torch.int8)[which]
