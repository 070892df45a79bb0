"""Learning orthogonal matrices: descent along Cayley transforms, which leave a matrix orthogonal.

Cayley SGD and Cayley Adam are Algorithms 1 and 2 of Li, Li and Todorovic 2020 (arXiv 2002.01113). With Y the
transpose of the matrix P that is learned, G the gradient of the loss by P and V = -Gᵀ (or what momentum and
Adam make of it), a skew-symmetric W and the step α move

    W = Ŵ - Ŵᵀ,   Ŵ = V Yᵀ - Y (Yᵀ V Yᵀ) / 2        α = min(rate, 1 / ‖W‖₁)
    Y(α) = (I - α/2 W)⁻¹ (I + α/2 W) Y              the Cayley transform, orthogonal where Y is
    Y ← Y(0) + α/2 W (Y(0) + Y)                     its fixed point, iterated from Y(0) + α W Y(0)

The iteration is cut off after a few rounds, in the working precision, so Y drifts. Its error max|YYᵀ - I|
is logged at every step; with a chance of 1/101 per step (the authors' code), and wherever a step leaves more
than `BOUND`, Y is made orthogonal again by a QR decomposition. float32 is multiplied as float32, on GPUs too:
TensorFloat-32 would leave an error of the size of `BOUND` at every step. Two departures from the authors'
code: the iteration begins at the tangent and not at the raw gradient, and the coin is thrown by a generator
of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from methods.device import float32_products
from methods.errors import UserError

BOUND = 1e-3
"""Largest error max|YYᵀ - I| that a matrix may carry into the next step."""
RETRACT_CHANCE = 1 / 101
RULES = ("sgd", "adam")
SCHEDULES = ("constant", "linear", "cosine")

Objective = Callable[[int, list[Tensor]], float]
"""(step, matrices): adds the loss's gradient to `.grad` of each matrix [..., n, n], returns the loss."""


@dataclass(frozen=True)
class Recipe:
    """How to descend. rate: upper bound of α at the first step, from which `schedule` goes down to 0.
    clip: largest norm of the joint gradient of all matrices (None: as it is). momentum: β₁ of Adam."""

    rule: str
    steps: int
    rate: float
    schedule: str = "constant"
    momentum: float = 0.0
    second: float = 0.99
    clip: float | None = None
    iterations: int = 5

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserError(f"rule {self.rule!r}: choose one of {', '.join(RULES)}")
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule {self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if self.steps < 1 or not self.rate > 0 or not math.isfinite(self.rate):
            raise UserError(f"steps {self.steps}, rate {self.rate:g}: both must be positive")

    def rate_at(self, step: int) -> float:
        """The bound of α at step 0, 1, ..."""
        done = step / self.steps
        shares = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.rate * shares[self.schedule]


@dataclass
class Log:
    """One number per step: the loss before it, the joint gradient's norm before clipping, the largest α, and
    the largest max|YYᵀ - I| that it left; and the steps (counted from 0) behind which a QR followed."""

    loss: list[float] = field(default_factory=list)
    gradient: list[float] = field(default_factory=list)
    alpha: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    retracted: list[int] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)


def minimise(
    starts: Sequence[Tensor],
    objective: Objective,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    report: Callable[[int, int], None] | None = None,
) -> tuple[list[Tensor], Log]:
    """Descend from orthogonal `starts`, each [n, n] or a batch [..., n, n] whose matrices move apart from
    each other (own α, own second moment; the clip is joint), computing in `dtype`.

    Returns the matrices, float64 on the CPU, orthogonal to 1e-12, and the log. The same arguments give the
    same matrices on one machine. Raises UserError where the loss is not finite, or does not depend on the
    matrices at all.
    """
    with float32_products("highest"):
        return _descend(starts, objective, recipe, seed, device, dtype, report)


def _descend(
    starts: Sequence[Tensor],
    objective: Objective,
    recipe: Recipe,
    seed: int,
    device: torch.device | str | None,
    dtype: torch.dtype,
    report: Callable[[int, int], None] | None,
) -> tuple[list[Tensor], Log]:
    generator = torch.Generator().manual_seed(seed)
    matrices = [start.to(device=device, dtype=dtype, copy=True) for start in starts]
    moving = [_Moments(torch.zeros_like(matrix)) for matrix in matrices]
    log = Log()
    for step in range(recipe.steps):
        leaves = [matrix.requires_grad_() for matrix in matrices]
        loss = objective(step, leaves)
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(f"learning rotations: the loss is not finite at step {step}: lower the rate")
        if norm == 0 and step == 0:
            raise UserError("learning rotations: the loss does not depend on them, nothing can be learned")
        coin = float(torch.rand((), generator=generator, dtype=torch.float64)) < RETRACT_CHANCE
        scale = 1.0 if recipe.clip is None else min(1.0, recipe.clip / (norm + 1e-6))
        moved = [
            advance(matrix.detach(), scale * gradient, moment, recipe, recipe.rate_at(step), step + 1)
            for matrix, gradient, moment in zip(matrices, gradients, moving, strict=True)
        ]
        error = max(orthogonality_error(matrix) for matrix, _ in moved)
        if coin or not error <= BOUND:
            log.retracted.append(step)
            matrices = [orthogonalise(matrix).to(dtype) for matrix, _ in moved]
        else:
            matrices = [matrix for matrix, _ in moved]
        log.loss.append(loss)
        log.gradient.append(norm)
        log.alpha.append(max(alpha for _, alpha in moved))
        log.error.append(error)
        if report is not None:
            report(step + 1, recipe.steps)
    return [orthogonalise(matrix).cpu() for matrix in matrices], log


@dataclass
class _Moments:
    """What the steps so far leave behind: V [..., n, n] and, for Adam, ‖G‖² averaged per matrix."""

    first: Tensor
    second: Tensor | float = 0.0


@torch.no_grad()
def advance(
    matrix: Tensor, gradient: Tensor, moments: _Moments, recipe: Recipe, rate: float, count: int
) -> tuple[Tensor, float]:
    """One step, the `count`-th, of matrices P [..., n, n]; updates `moments`, returns the new P, not exactly
    orthogonal, and the largest α."""
    y = torch.nn.functional.normalize(matrix, dim=-1).mT  # the authors' code: rows of unit length
    if recipe.rule == "sgd":
        moments.first = recipe.momentum * moments.first - gradient.mT
        direction, spread, unbias = moments.first, torch.ones((), dtype=y.dtype, device=y.device), 1.0
    else:
        beta, gamma = recipe.momentum, recipe.second
        moments.first = beta * moments.first - (1 - beta) * gradient.mT
        squared = gradient.square().sum((-2, -1), keepdim=True)
        moments.second = gamma * moments.second + (1 - gamma) * squared
        unbias = 1 - beta**count
        spread = (moments.second / (1 - gamma**count) + 1e-8).sqrt()
        direction = moments.first / unbias
    skew = tangent(y, direction) / spread
    alpha = (1 / (skew.abs().sum(-2).amax(-1) + 1e-8)).clamp(max=rate)[..., None, None]
    moments.first = skew @ y * spread * unbias
    return fixed_point(y, alpha * skew, recipe.iterations).mT.contiguous(), float(alpha.max())


def tangent(y: Tensor, direction: Tensor) -> Tensor:
    """The skew-symmetric W [..., n, n] whose W Y is the part of `direction` that keeps Y orthogonal."""
    across = direction @ y.mT
    across = across - y @ (y.mT @ across) / 2
    return across - across.mT


def fixed_point(y: Tensor, skew: Tensor, iterations: int) -> Tensor:
    """Y(1) of the Cayley transform along `skew` (αW), by so many iterations; converges where ‖αW‖ < 2."""
    half = skew / 2
    moved = y + skew @ y
    for _ in range(iterations):
        moved = y + half @ (y + moved)
    return moved


def cayley(y: Tensor, skew: Tensor) -> Tensor:
    """What `fixed_point` converges to, in closed form: (I - αW/2)⁻¹ (I + αW/2) Y."""
    half = skew / 2
    eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    return torch.linalg.solve(eye - half, y + half @ y)


def orthogonality_error(matrix: Tensor) -> float:
    """max|PPᵀ - I| over a batch of matrices [..., n, n], in their dtype."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return float((matrix @ matrix.mT - eye).abs().amax())


def orthogonalise(matrix: Tensor) -> Tensor:
    """The orthogonal factor, float64 [..., n, n], of matrices that are nearly so: QR of the transpose with
    positive diagonal, which leaves an orthogonal matrix alone."""
    q, r = torch.linalg.qr(matrix.detach().to(torch.float64).mT)
    return (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT.contiguous()
