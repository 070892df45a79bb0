"""Muon (Jordan et al. 2024) as outlier-safe pre-training scales it (Park et al. 2025, arXiv 2506.19697).

    b ← g + βb        u = g + βb        p ← p (1 - lr wd) - lr 0.2 √max(rows, columns) orthogonalised(u)

`orthogonalised` drives all singular values near 1, so that an update of a matrix has a root mean square of
about 0.2 lr, as an update of AdamW's has. A vector or a scalar cannot be orthogonalised and takes u / ‖u‖ in
its place: a single-scale norm's scalar moves by exactly 0.2 lr a step, against the sign of u.

`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` is the same rule: its average of gradients is
(1 - β) times the sum here, and the orthogonalisation does not see the factor. It takes matrices only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
_STACK = 1 << 28
"""Entries of the matrices that are orthogonalised in one product at most: half a gigabyte in bfloat16."""


def orthogonalised(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., rows, columns] with its singular values driven towards 1 by five steps of a quintic
    Newton-Schulz iteration: between 0.68 and 1.15 on Gaussian matrices, by design not exactly 1.

    dtype: what it computes in; None: bfloat16 on a GPU, as published, and on the CPU, where that is slow, x's
    own. Returns x's dtype.
    """
    a, b, c = COEFFICIENTS
    if dtype is None:
        dtype = torch.bfloat16 if x.is_cuda else x.dtype
    y = x.to(dtype)
    y = y / (torch.linalg.matrix_norm(y, keepdim=True) + 1e-8).to(dtype)
    wide = y.shape[-2] > y.shape[-1]
    if wide:  # the smaller product
        y = y.mT
    for _ in range(ITERATIONS):
        square = y @ y.mT
        y = a * y + (b * square + c * square @ square) @ y
    return (y.mT if wide else y).to(x.dtype)


class Muon(torch.optim.Optimizer):
    """The rule above for matrices, vectors and scalars. lr and weight_decay are those of each group."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            for params, updates in self._updates(given, group["momentum"]):
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-group["lr"])
        return loss

    def _updates(self, params: list[Tensor], momentum: float) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Scaled updates; matrices of one shape, either way round, are orthogonalised together."""
        wanted: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in params:
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            buffer = state["momentum"].mul_(momentum).add_(p.grad)
            u = p.grad.add(buffer, alpha=momentum)
            if p.ndim < 2:
                yield [p], [u * (0.2 * max(p.numel(), 1) ** 0.5) / (u.norm() + 1e-8)]
            elif p.ndim == 2:
                wanted[min(p.shape), max(p.shape)].append((p, u))
            else:
                raise ValueError(f"a parameter of {p.ndim} axes: Muon takes matrices, vectors and scalars")
        for (short, long), pairs in wanted.items():
            many = max(1, _STACK // (short * long))
            for start in range(0, len(pairs), many):
                part = pairs[start : start + many]
                turned = [u.shape[0] > u.shape[1] for _, u in part]
                stack = torch.stack([u.mT if t else u for (_, u), t in zip(part, turned, strict=True)])
                found = orthogonalised(stack, self.dtype).mul_(0.2 * long**0.5).unbind()
                yield (
                    [p for p, _ in part],
                    [x.mT if t else x for x, t in zip(found, turned, strict=True)],
                )
