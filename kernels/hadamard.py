"""Hadamard matrices of every order that can be built without a table, and the fast transform by them.

A Hadamard matrix H has entries +-1 and H Hᵀ = n I. An order n is built here as had_K ⊗ H_{2^m}: n = K · 2^m
with the smallest K that a construction below reaches, H_{2^m} Sylvester's matrix in natural order, K on the
slow index. K = 1 for powers of two; otherwise had_K is the first that exists of

* Paley I (Paley 1933): order q + 1 for a prime power q ≡ 3 (mod 4); not symmetric;
* Paley II: order 2 (q + 1) for a prime power q ≡ 1 (mod 4); symmetric;
* had_a ⊗ had_b for a · b = K, a the smallest.

Two valid constructions give different, equally good rotations, so the choice is part of a method's definition
and must not depend on anything but n. Orders that need a search (92, 172, 428, ...) are unknown here, but a
larger K may serve their multiples (11008 = 172 · 64 = 344 · 32); where none does, `largest_known_divisor`
gives the block size of the block-diagonal fallback.

Because most had_K are not symmetric, the orientation matters: the transform of a row vector x is x H / √n and
its inverse is y Hᵀ / √n. Weights are merged with the same functions, never with a second convention.
"""

import math
from functools import cache
from itertools import product

import torch
from torch import Tensor

# Small matmuls by factors of at most 64 beat both one dense matmul and butterflies on a CPU.
_LARGEST_FACTOR_BITS = 6


def hadamard_matrix(n: int) -> Tensor:
    """The Hadamard matrix of order n, unscaled.

    Returns a new float64 tensor [n, n] of +-1; n² · 8 bytes, so large n belong to `hadamard_transform`.
    Raises ValueError when no construction of this module reaches n.
    """
    k, power = hadamard_factors(n)
    return torch.kron(_core_matrix(k), _sylvester(power.bit_length() - 1)).to(torch.float64)


def is_known_order(n: int) -> bool:
    """Whether `hadamard_matrix(n)` exists."""
    return _split(n) is not None


def hadamard_factors(n: int) -> tuple[int, int]:
    """The pair (K, 2^m), n = K · 2^m, behind the matrix of order n. Raises ValueError when unknown."""
    split = _split(n)
    if split is None:
        raise ValueError(f"no Hadamard matrix of order {n} is known here")
    return split


@cache
def largest_known_divisor(n: int) -> int:
    """The largest divisor of n that is a known order: n itself where possible, 1 for odd n.

    This is the block size b of the fallback, the block-diagonal matrix of n / b copies of H_b. A larger block
    spreads an outlier over more channels, so the largest is the best (13696 = 107 · 128 gets 128, 14 gets 2).
    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"a Hadamard matrix needs a positive order, got {n}")
    small = [b for b in range(1, math.isqrt(n) + 1) if n % b == 0]
    return next(b for b in sorted({*small, *(n // b for b in small)}, reverse=True) if is_known_order(b))


def hadamard_transform(x: Tensor, block: int | None = None, inverse: bool = False) -> Tensor:
    """x times the orthonormal Hadamard matrix along the last axis: y = x · blockdiag(H_b) / √b.

    x: [..., n], any floating dtype, device and strides; differentiable. `block`: b, a known order that
    divides n; None means n. `inverse`: multiply by Hᵀ instead, which undoes the transform. Returns a new
    tensor [..., n] in x's dtype. float64 and float32 are computed as they are; narrower types in float32 and
    rounded once, because a sum of n terms overflows float16 and loses bits in bfloat16. Raises ValueError
    when x is not floating point, b does not divide n, or b is not a known order.
    """
    n = x.shape[-1]
    b = n if block is None else block
    if not x.is_floating_point():
        raise ValueError(f"the Hadamard transform needs a floating-point tensor, got {x.dtype}")
    if b < 1 or n % b:
        raise ValueError(f"Hadamard blocks of {b} do not divide the last axis of {n}")
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    *slow, fast = _factors(b, dtype, x.device, inverse)
    # A row of A ⊗ B times x, seen as a matrix X[slow, fast], is Aᵀ X B: no transposition ever moves memory.
    inner = fast.shape[0]
    y = x.to(dtype).reshape(-1, inner) @ fast
    for factor in reversed(slow):
        y = factor.T @ y.view(-1, factor.shape[0], inner)
        inner *= factor.shape[0]
    return y.view(x.shape).to(x.dtype)


@cache  # for good: a captured CUDA graph holds their addresses
def _factors(b: int, dtype: torch.dtype, device: torch.device, inverse: bool) -> tuple[Tensor, ...]:
    """Matrices whose Kronecker product, slow to fast, is H_b / √b (or its transpose)."""
    k, power = hadamard_factors(b)
    bits = power.bit_length() - 1
    parts = math.ceil(bits / _LARGEST_FACTOR_BITS)
    sizes = [bits // parts + (i >= parts - bits % parts) for i in range(parts)]
    # Callers may be in inference mode; tensors made there could never meet autograd, and these are kept.
    with torch.inference_mode(False):
        matrices = [_core_matrix(k)] if k > 1 or not sizes else []
        matrices = [m.T if inverse else m for m in matrices] + [_sylvester(size) for size in sizes]
        factors = [m.to(torch.float64) for m in matrices]
        factors[-1] = factors[-1] / math.sqrt(b)
        return tuple(f.to(dtype=dtype, device=device).contiguous() for f in factors)


@cache
def _split(n: int) -> tuple[int, int] | None:
    if n < 1:
        return None
    odd = n // (n & -n)
    if odd == 1:
        return 1, n
    k = 4 * odd  # a Hadamard matrix of order > 2 has an order divisible by 4
    while n % k == 0:
        if _recipe(k) is not None:
            return k, n // k
        k *= 2
    return None


@cache
def _recipe(k: int) -> tuple[str, int] | None:
    """How had_K is made: a construction's name and its parameter (Paley: q; Kronecker: the first factor)."""
    if k % 4 == 0 and _prime_power(k - 1):  # K - 1 ≡ 3 (mod 4)
        return "paley one", k - 1
    q = k // 2 - 1
    if k % 4 == 0 and q % 4 == 1 and _prime_power(q):
        return "paley two", q
    for a in range(4, math.isqrt(k) + 1, 4):
        if k % a == 0 and _recipe(a) is not None and _recipe(k // a) is not None:
            return "kronecker", a
    return None


@cache
def _core_matrix(k: int) -> Tensor:
    """had_K as int8 [k, k]; shared, not to be written to."""
    if k == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    recipe = _recipe(k)
    assert recipe is not None
    construction, parameter = recipe
    if construction == "kronecker":
        return torch.kron(_core_matrix(parameter), _core_matrix(k // parameter))
    return _paley_one(parameter) if construction == "paley one" else _paley_two(parameter)


def _sylvester(bits: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.int8)
    for _ in range(bits):
        h = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), h)
    return h


def _paley_one(q: int) -> Tensor:
    s = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, -1, _jacobsthal(q)
    return s + torch.eye(q + 1, dtype=torch.int8)


def _paley_two(q: int) -> Tensor:
    c = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    c[0, 1:], c[1:, 0], c[1:, 1:] = 1, 1, _jacobsthal(q)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(c, _sylvester(1)) + torch.kron(torch.eye(q + 1, dtype=torch.int8), diagonal)


def _jacobsthal(q: int) -> Tensor:
    """χ(a_j - a_i) for the elements a of GF(q): 0 where equal, 1 for squares, -1 for the rest. int8 [q, q].

    Element i of GF(p^k) is the polynomial whose coefficients are the digits of i in base p.
    """
    p, k = _prime_power(q) or (0, 0)
    chi = torch.full((q,), -1, dtype=torch.int8)
    chi[0] = 0
    chi[_powers_of_x(p, k)[::2]] = 1  # squares are the even powers of a generator
    element = torch.arange(q)
    difference = torch.zeros(q, q, dtype=torch.int64)
    for digit in range(k):
        a = element // p**digit % p
        difference += (a[None, :] - a[:, None]) % p * p**digit
    return chi[difference]


def _powers_of_x(p: int, k: int) -> list[int]:
    """1, x, x², ... in GF(p^k) = GF(p)[x] / f, as element numbers.

    f is the first monic polynomial of degree k modulo which x has order p^k - 1. Then every nonzero residue
    is a power of x, hence invertible, so that f needs no test of its own.
    """
    order = p**k - 1
    for f in product(range(p), repeat=k):  # f[i] is the coefficient of x^i
        one = (1,) + (0,) * (k - 1)
        a = one
        powers: list[int] = []
        while len(powers) <= order:
            powers.append(sum(c * p**i for i, c in enumerate(a)))
            a = tuple((c - a[-1] * g) % p for c, g in zip((0, *a[:-1]), f, strict=True))
            if a == one:
                break
        if len(powers) == order:
            return powers
    raise AssertionError(f"GF({p}^{k}) has no generator, so {p} is not prime")


@cache
def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None
