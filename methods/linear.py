"""The decoder's linear layer and the online transforms in front of it.

One class serves every state a linear passes through: plain, rounded (its weight is then the dequantised
weight, its integer codes are kept beside it), and with a quantised input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.hadamard import hadamard_transform
from kernels.reference import fake_quantise
from methods.bits import ActivationSpec, LinearSpec


@dataclass(frozen=True)
class QuantisedWeight:
    """Integer form of a weight, [out, in - keep]: value = (codes - zero) * scale.

    codes: int8 (symmetric) or uint8 (asymmetric), [out, in - keep]. scale and zero: one per group of
    `group` consecutive entries along `axis`, [out, in/group] for axis 1, [out/group, in] for axis 0;
    zero is None where symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: LinearSpec

    def to(self, device: torch.device) -> QuantisedWeight:
        zero = None if self.zero is None else self.zero.to(device)
        return QuantisedWeight(self.codes.to(device), self.scale.to(device), zero, self.spec)

    def dequantise(self) -> Tensor:
        """The weight these codes stand for, [out, in - keep], in the dtype of `scale`."""
        scale, zero = (self._spread(part) for part in (self.scale, self.zero))
        assert scale is not None
        values = self.codes.to(scale.dtype)
        return values * scale if zero is None else (values - zero) * scale

    def _spread(self, per_group: Tensor | None) -> Tensor | None:
        if per_group is None:
            return None
        dim = self.spec.axis
        return per_group.repeat_interleave(self.codes.shape[dim] // per_group.shape[dim], dim)


class Linear(nn.Module):
    """y = x Wᵀ (+ bias), times a scale per row where one is given.

    weight: [out, in]; bias: [out] or None. `activation` quantises the input, all but its first `keep`
    channels; static ranges live in the buffers `input_scale` and `input_zero` (each a scalar).
    `observer`, where set, is shown every unquantised input [..., in].
    """

    input_scale: Tensor | None
    input_zero: Tensor | None

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None
        self.activation: ActivationSpec | None = None
        self.keep = 0
        self.quantised: QuantisedWeight | None = None
        self.observer: Callable[[Tensor], None] | None = None
        self.register_buffer("input_scale", None)
        self.register_buffer("input_zero", None)

    def set_weight(self, weight: Tensor) -> None:
        """Replace the weight; its shape may differ (a widened residual stream)."""
        self.weight = nn.Parameter(weight, requires_grad=False)

    def round_to(self, quantised: QuantisedWeight) -> None:
        """Take rounded weights for all but the kept columns."""
        self.quantised = quantised
        self.keep = quantised.spec.keep
        rounded = quantised.dequantise().to(self.weight.dtype)
        self.set_weight(torch.cat((self.weight[:, : self.keep], rounded), dim=1) if self.keep else rounded)

    def quantise_input(self, x: Tensor) -> Tensor:
        """x [..., in] as this linear sees it: fake-quantised per token, or by the static range."""
        if self.observer is not None:
            self.observer(x)
        spec = self.activation
        if spec is None:
            return x
        if spec.static and self.input_scale is None:
            raise ValueError("a static input range is asked for, and none has been set")
        part = x[..., self.keep :] if self.keep else x
        part = fake_quantise(
            part,
            spec.bits,
            symmetric=spec.symmetric,
            clip=1.0 if spec.static else spec.clip,  # a static range has been clipped when it was found
            group=spec.group,
            scale=self.input_scale,
            zero=self.input_zero,
        )
        return torch.cat((x[..., : self.keep], part), dim=-1) if self.keep else part

    def shares_input_with(self, other: Linear) -> bool:
        """Whether both quantise one input to the same numbers."""
        return (
            self.activation == other.activation
            and self.keep == other.keep
            and self.input_scale is other.input_scale
            and self.input_zero is other.input_zero
        )

    def apply_to(self, x: Tensor, row_scale: Tensor | None = None) -> Tensor:
        """The matrix product alone, for an input that is already quantised."""
        y = F.linear(x, self.weight, self.bias)
        return y if row_scale is None else (y * row_scale).to(y.dtype)

    def forward(self, x: Tensor, row_scale: Tensor | None = None) -> Tensor:
        """x: [..., in]; row_scale: [..., 1]."""
        return self.apply_to(self.quantise_input(x), row_scale)


def project(x: Tensor, *linears: Linear) -> list[Tensor]:
    """Outputs of several linears that read one input x [..., in]; equal quantisers run once."""
    results: list[Tensor] = []
    previous: tuple[Linear, Tensor] | None = None
    for linear in linears:
        if previous is None or not linear.shares_input_with(previous[0]) or linear.observer is not None:
            previous = (linear, linear.quantise_input(x))
        results.append(linear.apply_to(previous[1]))
    return results


class OnlineHadamard(nn.Module):
    """A Hadamard transform computed at run time on [..., n], n = blocks * size * inner.

    Each of the `blocks` parts is viewed [size, inner] and transformed along `size`: inner = 1 is the
    transform of contiguous channels (R4), inner = head_dim mixes the same channel of all heads (the
    cross-head transform of QuaRot). Half-precision inputs are transformed in float32.
    """

    def __init__(self, size: int, inner: int = 1) -> None:
        super().__init__()
        self.size = size
        self.inner = inner

    def forward(self, x: Tensor, inverse: bool = False) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        parts = x.to(dtype).unflatten(-1, (-1, self.size, self.inner))
        if self.inner == 1:
            out = hadamard_transform(parts.squeeze(-1), inverse=inverse).unsqueeze(-1)
        else:
            out = hadamard_transform(parts.transpose(-1, -2), inverse=inverse).transpose(-1, -2)
        return out.flatten(-3).to(x.dtype)

    def extra_repr(self) -> str:
        return f"size={self.size}, inner={self.inner}"
