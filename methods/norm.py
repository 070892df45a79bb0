"""RMSNorm, and what it is fused with: the sum in front of it and the quantiser behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kernels import ops
from methods.linear import Linear, QuantisedInput, fused_quantiser

if TYPE_CHECKING:
    from methods.decoder import State


class RMSNorm(nn.Module):
    """x / sqrt(sum(x²)/divisor + eps) * weight.

    weight: [width], [1] (single-scale, OSP), [heads, width] (of query and key, FPTQuant), or None once folded
    into the linears behind it. Half precision is normalised in float32; float64 stays float64.
    """

    def __init__(
        self, width: int, eps: float, single_scale: bool = False, divisor: int | None = None
    ) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(
            torch.empty(1 if single_scale else width), requires_grad=False
        )
        self.eps = eps
        self.divisor = divisor

    def rms(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """[..., 1] root of the mean square of x [..., width]; eps grows with scale² where the stream
        is scaled per token, which keeps the function exact (FPTQuant)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        eps: float | Tensor = self.eps if scale is None else self.eps * scale.square()
        return (x.square().sum(-1, keepdim=True) / (self.divisor or x.shape[-1]) + eps).sqrt()

    def apply_gain(self, normalised: Tensor) -> Tensor:
        return normalised if self.weight is None else normalised * self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_gain((x / self.rms(x)).to(x.dtype))

    def into(
        self, state: State, readers: Sequence[Linear]
    ) -> tuple[Tensor, Tensor | QuantisedInput, Tensor | None]:
        """The stream that goes on, with the branch that had been left out; the stream normalised, as
        `readers` take it: in codes, by one operation, where they are packed and quantise alike; and the scale
        [..., 1] that the stream has from now on, None where it has none."""
        reader = fused_quantiser(readers)
        if reader is None:
            return self.of(state)
        stream, kept, codes, _, scale = ops.rmsnorm_quantise(
            state.base,
            add=state.branch,
            eps=self.eps,
            divisor=self.divisor,
            gain=self.weight,
            row_scale=state.scale,
            keep=reader.keep,
            **reader.input_quantiser(),
        )
        return stream, reader.observed(QuantisedInput(codes, kept, stream.dtype)), scale

    def of(self, state: State) -> tuple[Tensor, Tensor, Tensor | None]:
        """`into`, for a reader of floats."""
        stream, normalised, _, scale = ops.rmsnorm(
            state.base,
            add=state.branch,
            eps=self.eps,
            divisor=self.divisor,
            gain=self.weight,
            row_scale=state.scale,
        )
        return stream, normalised, scale
