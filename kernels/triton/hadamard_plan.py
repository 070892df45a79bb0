"""How the Hadamard kernel cuts a row: tiles, products, warps, registers, and the matrices of its products.

Everything about a transform that is known before a row is read, and nothing that runs on the device.
"""

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.hadamard import hadamard_factors, hadamard_matrix, is_known_order

# Elements of a row, padded, that registers hold, and tiles that a program unrolls.
_MOST_ELEMENTS, _MOST_TILES = 32768, 16


@dataclass(frozen=True)
class Plan:
    """How a row is cut: blocks * J tiles of A x B, padded to powers of two; which products there are."""

    blocks: int
    A: int
    J: int
    B: int
    slow: bool
    fast: bool

    @property
    def padded(self) -> tuple[int, int]:
        return max(triton.next_power_of_2(self.A), 16), max(triton.next_power_of_2(self.B), 16)

    @property
    def elements(self) -> int:
        """Of a row, with padding."""
        return self.padded[0] * self.padded[1] * self.blocks * self.J

    @property
    def fits(self) -> bool:
        """Whether the registers of a program hold a row."""
        return self.blocks * self.J <= _MOST_TILES and self.elements <= _MOST_ELEMENTS

    @property
    def warps(self) -> int:
        """A power of two, and no more than there are tiles of 16 rows: a left operand in registers belongs to
        one warp."""
        most = min(self.padded[0] // 16, 16) if self.fast else 8
        wanted = max(min(self.elements // 1024, most), 4 if self.padded[0] >= 64 else 1)
        return 1 << (wanted.bit_length() - 1)

    @property
    def permuted(self) -> bool:
        """Whether the matrices are permuted so that results lie in registers as they are stored."""
        return self.slow and self.fast and self.padded == (16 * self.warps, 64)

    @property
    def programs(self) -> int:
        """As many as fit the registers of a multiprocessor."""
        return max(min(16 // self.warps, _MOST_ELEMENTS // self.elements), 1)

    @property
    def stages(self) -> int:
        return 3 if self.elements <= 4096 else 1

    def options(self, programs: int) -> dict[str, int]:
        """For the compiler: no more registers than let so many programs run side by side.

        Raises ValueError where the widest product's sums, and the 26 that the assembler wants beside them, do
        not fit in those.
        """
        registers = min(65536 // (32 * self.warps * programs) // 8 * 8, 255)
        needed = min(self.J * self.padded[0] * self.padded[1] // (32 * self.warps), 128) + 26
        if registers < needed:
            raise ValueError(
                f"{programs} programs of {self.warps} warps on a multiprocessor leave a thread {registers} "
                f"registers, and this transform takes {needed} at least"
            )
        return {"num_warps": self.warps, "maxnreg": registers}


@lru_cache(maxsize=256)
def plan(n: int, size: int, inner: int, height: int = 128) -> Plan | None:
    """How rows of n are cut, or None where the core of the matrix is too large for one product.

    height: rows of a tile at most, unless the core has more.
    """
    core, power = hadamard_factors(size)
    blocks = n // (size * inner)
    if inner == 1 and size <= 128:
        return Plan(1, blocks, 1, size, slow=False, fast=True)
    fast = 1 if inner > 1 else min(64 if size >= 1024 else 32 if size >= 512 else 16, power)
    while blocks > 1 and fast > 16 and size // (fast // 2) <= height:
        fast //= 2  # many low tiles would leave a long row to few warps, whose registers do not hold it
    middle = 1
    while size // (fast * middle) > height and core * fast * middle * 2 <= size:
        middle *= 2
    slow = size // (fast * middle)
    if slow > 256:
        return None
    return Plan(blocks, slow, middle, inner if inner > 1 else fast, slow=True, fast=inner == 1)


def unsupported_transform(n: int, size: int, inner: int, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why rows of n cannot be so transformed, or None."""
    if size < 1 or inner < 1 or n % (size * inner):
        return f"blocks of {size} x {inner} in rows of {n}"
    if not is_known_order(size):
        return f"a Hadamard matrix of order {size}, which is not known"
    where = plan(n, size, inner)
    if where is None:
        return f"a Hadamard matrix of order {size}, whose core is {hadamard_factors(size)[0]}"
    if not where.fits:
        return f"rows of {n} in blocks of {size} x {inner}, which registers do not hold"
    if where.slow and where.A > 128 and dtype == torch.float32:
        return (
            f"float32 rows for a Hadamard matrix of order {size}, whose core is {hadamard_factors(size)[0]}"
        )
    return None


@cache  # for good: a captured CUDA graph holds their addresses
def matrices(size: int, cut: Plan, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """The slow matrix, transposed, the fast one, both padded with zeros, and what to multiply results by.

    The first one's entries are the power of two not above 1 / sqrt(size), so that sums stay as small as x.
    """
    order_slow = cut.A if cut.slow else 1
    order_fast = cut.B if cut.fast else 1
    part = 2.0 ** -math.ceil(math.log2(size) / 2)
    narrow = torch.bfloat16 if dtype == torch.float32 else dtype
    with torch.inference_mode(False):
        slow, fast = torch.zeros(cut.padded[0], cut.padded[0]), torch.zeros(cut.padded[1], cut.padded[1])
        if cut.slow:
            slow[: cut.A, : cut.A] = hadamard_matrix(order_slow).T * part
        if cut.fast:
            fast[: cut.B, : cut.B] = hadamard_matrix(order_fast) * (1.0 if cut.slow else part)
        if cut.permuted:  # see `ordered` in hadamard_tiles
            slow = slow.unflatten(0, (2, -1, 8)).transpose(0, 1).flatten(0, 2)
            fast = fast.unflatten(1, (4, 8, 2)).transpose(1, 2).flatten(1)
        # Beside the slow product, the fast one takes bfloat16 terms. Both are complete when this returns: a
        # launch that overlaps reads them without waiting.
        slow, fast = slow.to(narrow).to(device), fast.to(torch.bfloat16 if cut.slow else narrow).to(device)
    return slow, fast, 1.0 / (part * math.sqrt(size))


def shape_constants(
    cut: Plan, n: int, norm: float, stages: int, dtype: torch.dtype, paired: bool = True
) -> dict[str, Any]:
    """The kernel's constants for rows of n so cut.

    norm: what `matrices` gives. stages: rows in shared memory. paired: rows start at multiples of four bytes,
    and the next may wait in registers.
    """
    lines = triton.next_power_of_2(triton.cdiv(n * dtype.itemsize, 128))
    joined = cut.J if cut.slow and cut.padded[1] == cut.B and dtype != torch.float32 else 1
    return {
        "AHEAD": stages == 1 and paired and cut.slow and cut.blocks * cut.J == joined
        and dtype != torch.float32 and cut.B % 2 == 0,
        "STAGES": stages, "LINES": 0 if stages > 2 or triton.knobs.runtime.interpret else lines,
        "BLOCKS": cut.blocks, "A": cut.A, "J": cut.J, "B": cut.B,
        "A_PAD": cut.padded[0], "B_PAD": cut.padded[1],
        "JOINED": joined,
        "ORDERED": not cut.permuted, "SLOW": cut.slow, "FAST": cut.fast, "NORM": norm != 1.0,
    }  # fmt: skip
