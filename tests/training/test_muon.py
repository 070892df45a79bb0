"""Muon against torch's own where both apply, and against closed forms by singular values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonalised

SHAPES = ((24, 40), (40, 24), (16, 16), (40, 24), (1, 12))


def matrices(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def moved(make: type[torch.optim.Optimizer], start: list[Tensor], steps: int, **options: Any) -> list[Tensor]:
    """Parameters behind so many steps on gradients that are the same for every optimiser."""
    params = [nn.Parameter(x.clone()) for x in start]
    optimiser = make(params, **options)
    for step in range(steps):
        for param, gradient in zip(params, matrices(100 + step, *(x.shape for x in start)), strict=True):
            param.grad = gradient
        optimiser.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_agrees_with_torch_where_both_apply(decay: float) -> None:
    rate, steps = 5e-4, 8
    start = matrices(0, *SHAPES)
    own = moved(Muon, start, steps, lr=rate, weight_decay=decay, dtype=torch.bfloat16)
    torchs = moved(
        torch.optim.Muon, start, steps, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
    )
    for before, mine, other in zip(start, own, torchs, strict=True):
        # Both round to bfloat16 (8 bits) inside, in another order.
        assert (mine - other).norm() <= 0.02 * (other - before).norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonalisation_is_a_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    (x,) = matrices(3, shape)
    got = orthogonalised(x.double())
    left, values, right = np.linalg.svd(x.double().numpy(), full_matrices=False)
    values = values / np.linalg.norm(values)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    np.testing.assert_allclose(got.numpy(), left * values @ right, atol=1e-6)
    assert got.dtype == torch.float64


def test_singular_values_of_a_gaussian_matrix_come_near_one() -> None:
    (x,) = matrices(4, (144, 384))
    values = np.linalg.svd(orthogonalised(x).numpy(), compute_uv=False)
    assert 0.6 < values.min() <= values.max() < 1.2


def test_what_has_one_shape_is_orthogonalised_together_and_each_by_itself() -> None:
    start = matrices(5, (20, 30), (30, 20), (20, 30))
    together = moved(Muon, start, 3, lr=0.01)
    for number, alone in enumerate(start):
        # The gradients of `moved` are drawn in order, so each is taken from the joint draw.
        params = [nn.Parameter(alone.clone())]
        optimiser = Muon(params, 0.01)
        for step in range(3):
            params[0].grad = matrices(100 + step, *(x.shape for x in start))[number]
            optimiser.step()
        torch.testing.assert_close(params[0].detach(), together[number], rtol=0, atol=1e-6)


def test_a_scalar_moves_by_a_fifth_of_the_rate_against_the_sign() -> None:
    for start, gradient, sign in ((1.0, 3.7, -1), (-2.0, -1e-3, 1)):
        for shape in ((), (1,)):
            param = nn.Parameter(torch.full(shape, start))
            optimiser = Muon([param], 0.05)
            for step in range(1, 4):
                param.grad = torch.full(shape, gradient)
                optimiser.step()
                assert float(param.detach()) == pytest.approx(start + sign * 0.2 * 0.05 * step, rel=1e-5)


def test_a_vector_moves_along_its_momentum_by_the_rms_of_a_matrix() -> None:
    param = nn.Parameter(torch.zeros(64))
    (gradient,) = matrices(6, (64,))
    param.grad = gradient.clone()
    Muon([param], 0.01, weight_decay=0.3).step()
    torch.testing.assert_close(param.detach(), -0.01 * 0.2 * 8 * gradient / gradient.norm())


def test_weight_decay_is_decoupled_and_other_axes_are_refused() -> None:
    param = nn.Parameter(torch.ones(4, 4))
    param.grad = torch.zeros(4, 4)
    Muon([param], 0.5, weight_decay=0.1).step()
    torch.testing.assert_close(param.detach(), torch.full((4, 4), 0.95))
    cube = nn.Parameter(torch.ones(2, 2, 2))
    cube.grad = torch.ones(2, 2, 2)
    with pytest.raises(ValueError, match="3 axes"):
        Muon([cube], 0.1).step()
