"""The learner of orthogonal matrices, against closed forms and scipy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from methods.errors import UserError
from methods.orthogonal import (
    BOUND,
    Objective,
    Recipe,
    cayley,
    fixed_point,
    minimise,
    orthogonalise,
    orthogonality_error,
    tangent,
)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(size, size, seed=seed)).Q


def towards(target: Tensor) -> Objective:
    """‖P - target‖², whose minimum over orthogonal P is scipy's solution of the Procrustes problem."""

    def objective(step: int, matrices: list[Tensor]) -> float:
        loss = (matrices[0] - target.to(matrices[0])).square().sum()
        loss.backward()
        return float(loss.detach())

    return objective


@given(st.integers(2, 40), st.integers(0, 1000), st.floats(0.01, 1.0))
def test_the_fixed_point_is_the_cayley_transform(size: int, seed: int, share: float) -> None:
    y, free = orthogonal(size, seed), gaussian(size, size, seed=seed + 1)
    skew = free - free.T
    skew *= share / np.abs(skew.numpy()).sum(0).max()
    half = skew.numpy() / 2
    want = scipy.linalg.inv(np.eye(size) - half) @ (np.eye(size) + half) @ y.numpy()
    assert np.abs(fixed_point(y, skew, 60).numpy() - want).max() <= 1e-10
    assert np.abs(cayley(y, skew).numpy() - want).max() <= 1e-10
    assert orthogonality_error(torch.from_numpy(want)) <= 1e-12


def test_the_tangent_is_the_gradient_along_the_group() -> None:
    """To first order a step along W changes the loss by what autograd says of the closed form."""
    y, gradient = orthogonal(7, 0), gaussian(7, 7, seed=1)
    skew = tangent(y, -gradient.T)
    assert torch.allclose(skew, -skew.T)
    alpha = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = (cayley(y, alpha * skew).mT * gradient).sum()
    (slope,) = torch.autograd.grad(loss, alpha)
    assert float(slope) == pytest.approx(-float(skew.square().sum()), rel=1e-10)


RULES = [
    Recipe("sgd", 120, 0.2),
    Recipe("sgd", 120, 0.1, momentum=0.5),
    Recipe("adam", 400, 0.2, "linear", 0.9),
]


@pytest.mark.parametrize("recipe", RULES)
def test_it_finds_the_nearest_orthogonal_matrix(recipe: Recipe) -> None:
    """Orthogonal Procrustes: scipy's solution through the singular value decomposition."""
    start = orthogonal(12, 3)
    target = start @ torch.linalg.matrix_exp(0.3 * tangent(start, gaussian(12, 12, seed=5)) / 4)
    target = target + 0.05 * gaussian(12, 12, seed=6)
    want, _ = scipy.linalg.orthogonal_procrustes(np.eye(12), target.numpy())
    (found,), _ = minimise([start], towards(target), recipe, seed=0, dtype=torch.float64)
    assert np.abs(start.numpy() - want).max() > 0.1
    assert np.abs(found.numpy() - want).max() < 2e-3


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_a_batch_is_its_matrices_one_by_one(rule: str) -> None:
    starts = torch.stack([orthogonal(6, seed) for seed in range(3)])
    targets = torch.stack([orthogonal(6, seed) for seed in range(10, 13)])
    recipe = Recipe(rule, 25, 0.3, momentum=0.9)
    (together,), log = minimise([starts], towards(targets), recipe, seed=1, dtype=torch.float64)
    for start, target, found in zip(starts, targets, together, strict=True):
        (alone,), _ = minimise([start], towards(target), recipe, seed=1, dtype=torch.float64)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-12)
    assert len(log.alpha) == 25


def test_single_precision_stays_near_orthogonal_and_ends_there() -> None:
    """Steps as long as the cap allows along planes, in which the iteration converges slowest."""
    generator = torch.Generator().manual_seed(0)

    def restless(step: int, matrices: list[Tensor]) -> float:
        plane = torch.zeros(128, 128)
        row, column = torch.randperm(128, generator=generator)[:2]
        plane[row, column] = 1
        (matrices[0] * (matrices[0].detach() @ plane)).sum().backward()
        return 0.0

    (found,), log = minimise([orthogonal(128, 0)], restless, Recipe("sgd", 250, 1e6), seed=0)
    assert max(log.error) > 1e-6
    carried = [error for step, error in enumerate(log.error) if step not in log.retracted]
    assert max(carried) <= BOUND
    assert log.retracted
    assert found.dtype == torch.float64
    assert orthogonality_error(found) <= 1e-12


def test_retractions_are_thrown_by_the_seed_alone() -> None:
    def run(seed: int, steps: int = 300) -> tuple[Tensor, list[int]]:
        torch.manual_seed(len(str(seed)))
        recipe = Recipe("adam", steps, 0.1)
        (found,), log = minimise([orthogonal(5, 0)], towards(orthogonal(5, 9)), recipe, seed=seed)
        return found, log.retracted

    first, again, other = run(1), run(1), run(22)
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1] != other[1]
    assert 0 < len(first[1]) < 12  # three are expected


def test_float32_is_multiplied_whole_whatever_is_set() -> None:
    """Else GPUs multiply in TensorFloat-32, and some processors in bfloat16, where a user has allowed it."""
    seen, found = [], []

    def objective(step: int, matrices: list[Tensor]) -> float:
        seen.append(torch.get_float32_matmul_precision())
        return towards(orthogonal(40, 1))(step, matrices)

    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            found += minimise([orthogonal(40, 0)], objective, Recipe("adam", 5, 0.1), seed=0)[0]
            assert torch.get_float32_matmul_precision() == precision
        finally:
            torch.set_float32_matmul_precision(before)
    assert seen == ["highest"] * 10
    assert torch.equal(found[0], found[1])


def test_the_clip_is_joint() -> None:
    """With one large gradient the small one is scaled down with it, as the published recipe does."""
    starts = [orthogonal(4, 0), orthogonal(4, 1)]
    directions = [gaussian(4, 4, seed=2), 1e-3 * gaussian(4, 4, seed=3)]

    def linear(step: int, matrices: list[Tensor]) -> float:
        loss = sum((m * d).sum() for m, d in zip(matrices, directions, strict=True))
        assert isinstance(loss, Tensor)
        loss.backward()
        return float(loss.detach())

    clip, norm = 0.01, math.hypot(*(float(d.norm()) for d in directions))
    found, log = minimise(starts, linear, Recipe("sgd", 1, 0.5, clip=clip), seed=0, dtype=torch.float64)
    assert log.gradient == [pytest.approx(norm)]
    for start, direction, moved in zip(starts, directions, found, strict=True):
        skew = 0.5 * tangent(start.T, -direction.T * clip / norm)
        torch.testing.assert_close(moved, cayley(start.T, skew).T, rtol=0, atol=1e-9)


def test_the_step_is_capped_by_the_one_norm() -> None:
    (_,), log = minimise(
        [orthogonal(9, 0)],
        towards(100 * orthogonal(9, 1)),
        Recipe("sgd", 3, 1e6),
        seed=0,
        dtype=torch.float64,
    )
    skew = tangent(orthogonal(9, 0).T, -(2 * (orthogonal(9, 0) - 100 * orthogonal(9, 1))).T)
    assert log.alpha[0] == pytest.approx(1 / float(skew.abs().sum(0).max()), rel=1e-6)


def test_schedules() -> None:
    rates = {
        schedule: [Recipe("sgd", 4, 2.0, schedule).rate_at(step) for step in range(4)]
        for schedule in ("constant", "linear", "cosine")
    }
    assert rates["constant"] == [2.0] * 4
    assert rates["linear"] == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates["cosine"] == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])


@given(st.integers(2, 30), st.integers(0, 100))
def test_orthogonalising_leaves_an_orthogonal_matrix_alone(size: int, seed: int) -> None:
    matrix = orthogonal(size, seed)
    torch.testing.assert_close(orthogonalise(matrix), matrix, rtol=0, atol=1e-12)
    near = orthogonalise(matrix.to(torch.float32))
    assert orthogonality_error(near) <= 1e-12
    torch.testing.assert_close(near, matrix, rtol=0, atol=1e-5)


def test_refusals() -> None:
    for wrong in ({"rule": "sdg"}, {"schedule": "step"}, {"steps": 0}, {"rate": 0.0}, {"rate": math.nan}):
        with pytest.raises(UserError):
            Recipe(**{"rule": "sgd", "steps": 1, "rate": 1.0, **wrong})  # type: ignore[arg-type]

    def constant(step: int, matrices: list[Tensor]) -> float:
        return 1.0

    def broken(step: int, matrices: list[Tensor]) -> float:
        return math.nan

    start = orthogonal(3, 0)
    with pytest.raises(UserError, match="does not depend on them"):
        minimise([start], constant, Recipe("sgd", 2, 1.0), seed=0)
    with pytest.raises(UserError, match="not finite at step 0: lower the rate"):
        minimise([start], broken, Recipe("sgd", 2, 1.0), seed=0)
