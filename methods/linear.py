"""The decoder's linear layer and the online transforms in front of it.

One class serves every state a linear passes through: plain, rounded (its weight is then the dequantised
weight, its integer codes are kept beside it), with a quantised input, and packed (the codes alone remain, and
the int4 layer runs it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from kernels import ops
from kernels.pass_reference import online_hadamard
from kernels.reference import (
    PackedWeight,
    Quantised,
    Quantiser,
    fake_quantise,
    pack_weight,
)
from methods.bits import ActivationSpec, LinearSpec
from methods.gradients import straight_through


@dataclass(frozen=True)
class QuantisedWeight:
    """Integer form of a weight, [out, in - keep]: value = (codes - zero) * scale.

    codes: int8 (symmetric) or uint8 (asymmetric), [out, in - keep]. scale and zero: of each code's group, in
    the shape of `methods.groups.held_shape`; zero is None where symmetric and may be fractional (HQQ).
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
        if self.spec.axis == 0:
            return per_group.repeat(self.codes.shape[0] // per_group.shape[0], 1)
        return per_group.repeat_interleave(self.codes.shape[1] // per_group.shape[1], 1)


@dataclass(frozen=True)
class QuantisedInput:
    """What a packed linear multiplies: the first `keep` channels as they are, [..., keep] or None, and the
    codes of the rest, [..., in - keep]. dtype: of the activations, hence of the output."""

    codes: Quantised
    kept: Tensor | None
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """[..., in - keep]."""
        return self.codes.codes.shape


class Linear(nn.Module):
    """y = x Wᵀ (+ bias), times a scale per row where one is given.

    weight: [out, in]; bias: [out] or None. `activation` quantises the input, all but its first `keep`
    channels; static ranges live in the buffers `input_scale` and `input_zero` (each a scalar).
    `observer`, where set, is shown every unquantised input [..., in]; `code_observer` every quantised one
    that a packed linear runs on.

    `pack` ends the simulation: `packed` takes the place of the weight, which is then empty, and `kept`
    [out, keep] holds the kept columns in the weight's dtype.
    """

    input_scale: Tensor | None
    input_zero: Tensor | None
    kept: Tensor | None

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None
        self.activation: ActivationSpec | None = None
        self.keep = 0
        self.quantised: QuantisedWeight | None = None
        self.packed: PackedWeight | None = None
        self.observer: Callable[[Tensor], None] | None = None
        self.code_observer: Callable[[Quantised], None] | None = None
        for name in ("input_scale", "input_zero", "kept"):
            self.register_buffer(name, None)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), kept columns included, packed or not."""
        if self.packed is not None:
            return self.packed.packed.shape[0], self.keep + self.packed.inputs
        return self.weight.shape[0], self.weight.shape[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        """Packed codes move with the module, as parameters and buffers do; those of a simulated weight, which
        nothing computes with, stay."""
        super()._apply(fn, recurse)
        if self.packed is not None:
            self.packed = _moved(self.packed, fn(self.packed.packed).device)
        return self

    def set_weight(self, weight: Tensor) -> None:
        """Replace the weight; its shape may differ (a widened residual stream)."""
        self.weight = nn.Parameter(weight, requires_grad=False)

    def round_to(self, quantised: QuantisedWeight) -> None:
        """Take rounded weights for all but the kept columns."""
        self.quantised = quantised
        self.keep = quantised.spec.keep
        rounded = quantised.dequantise().to(self.weight.dtype)
        self.set_weight(torch.cat((self.weight[:, : self.keep], rounded), dim=1) if self.keep else rounded)

    def pack(self) -> None:
        """Keep the rounded weight as packed codes and drop everything else of it."""
        self.take_packed(self.packed_weight(), self.weight[:, : self.keep].clone() if self.keep else None)

    def packed_weight(self) -> PackedWeight:
        """The rounded weight as packed codes, without the kept columns."""
        if self.quantised is None:
            raise ValueError("only a rounded weight can be packed")
        codes, spec = self.quantised.to(self.weight.device), self.quantised.spec
        return pack_weight(
            codes.codes,
            codes.scale.clone(),  # it may be a part of a larger tensor
            None if codes.zero is None else codes.zero.clone(),
            spec.bits,
            spec.axis,
            colsum=self.activation is not None and not self.activation.symmetric,
        )

    def take_packed(self, packed: PackedWeight, kept: Tensor | None) -> None:
        """Become the linear of `packed` [out, in - keep] and the kept columns [out, keep]."""
        self.packed, self.kept, self.quantised = packed, kept, None
        self.set_weight(self.weight.new_empty(0))

    def quantise_input(
        self,
        x: Tensor | QuantisedInput,
        online: OnlineHadamard | None = None,
        gate: Tensor | None = None,
    ) -> Tensor | QuantisedInput:
        """silu(gate) * x (x alone without a gate), each [..., in], behind its online transform, as this
        linear sees it: quantised per token, or by the static range; in codes where the linear is packed, else
        fake-quantised."""
        if isinstance(x, QuantisedInput):
            return x
        coded = self.packed is not None and self.activation is not None
        if coded and self.observer is None:  # one operation where it can be
            options = self.input_quantiser()
            if online is not None:
                kept, codes = ops.hadamard_quantise(
                    x, gate=gate, size=online.size, inner=online.inner, keep=self.keep, **options
                )
                return self.observed(QuantisedInput(codes, kept, x.dtype))
            if not self.keep:
                codes = ops.quantise(x, gate=gate, **options)
                return self.observed(QuantisedInput(codes, None, x.dtype))
        x = _transformed(x, online, gate)
        if self.observer is not None:
            self.observer(x)
        if self.activation is None:
            return x
        options = self.input_quantiser()
        kept, part = (x[..., : self.keep], x[..., self.keep :]) if self.keep else (None, x)
        if coded:
            return self.observed(QuantisedInput(ops.quantise(part, **options), kept, x.dtype))
        part = straight_through(part, partial(fake_quantise, **options))
        return part if kept is None else torch.cat((kept, part), dim=-1)

    def input_quantiser(self) -> Quantiser:
        """The arguments with which `kernels.reference.quantise` quantises this linear's input."""
        spec = self.activation
        assert spec is not None
        if spec.static and self.input_scale is None:
            raise ValueError("a static input range is asked for, and none has been set")
        return {
            "bits": spec.bits,
            "symmetric": spec.symmetric,
            "clip": 1.0 if spec.static else spec.clip,  # a static range has been clipped when it was found
            "group": spec.group,
            "scale": self.input_scale,
            "zero": self.input_zero,
        }

    def observed(self, x: QuantisedInput) -> QuantisedInput:
        if self.code_observer is not None:
            self.code_observer(x.codes)
        return x

    def shares_input_with(self, other: Linear) -> bool:
        """Whether both quantise one input to the same numbers."""
        return (
            self.activation == other.activation
            and self.keep == other.keep
            and self.input_scale is other.input_scale
            and self.input_zero is other.input_zero
            and (self.packed is None) == (other.packed is None)
        )

    def apply_to(self, x: Tensor | QuantisedInput, row_scale: Tensor | None = None) -> Tensor:
        """The matrix product alone, for an input that is already quantised."""
        if self.packed is not None:
            kept = None
            if isinstance(x, QuantisedInput):
                operand: Tensor | Quantised = x.codes
                kept = x.kept
            else:
                operand = x[..., self.keep :] if self.keep else x
                kept = x[..., : self.keep] if self.keep else None
            return ops.linear(
                operand,
                self.packed,
                x_keep=kept,
                w_keep=self.kept,
                row_scale=row_scale,
                bias=self.bias,
                dtype=x.dtype,
            )
        assert isinstance(x, Tensor)
        y = ops.dense(x, self.weight, self.bias)
        return y if row_scale is None else (y * row_scale).to(y.dtype)

    def forward(
        self,
        x: Tensor | QuantisedInput,
        row_scale: Tensor | None = None,
        online: OnlineHadamard | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """x: [..., in]; row_scale: [..., 1]; online: a transform of x that runs before it is quantised; gate:
        [..., in], x becomes silu(gate) * x before that."""
        return self.apply_to(self.quantise_input(x, online, gate), row_scale)


def _moved(packed: PackedWeight, device: torch.device) -> PackedWeight:
    return replace(
        packed,
        packed=packed.packed.to(device),
        scale=packed.scale.to(device),
        zero=None if packed.zero is None else packed.zero.to(device),
        colsum=None if packed.colsum is None else packed.colsum.to(device),
    )


def _transformed(x: Tensor, online: OnlineHadamard | None, gate: Tensor | None) -> Tensor:
    if online is not None:
        y: Tensor = online(x, gate=gate)
        return y
    return x if gate is None else ops.gated(gate, x)


def project(x: Tensor | QuantisedInput, linears: Sequence[Linear]) -> list[Tensor]:
    """Outputs of several linears that read one input x [..., in]; equal quantisers run once."""
    results: list[Tensor] = []
    previous: tuple[Linear, Tensor | QuantisedInput] | None = None
    for linear in linears:
        if previous is None or not linear.shares_input_with(previous[0]) or linear.observer is not None:
            previous = (linear, linear.quantise_input(x))
        results.append(linear.apply_to(previous[1]))
    return results


def fused_quantiser(linears: Sequence[Linear]) -> Linear | None:
    """The first of several linears that read one normalised input, where one fused RMSNorm and quantiser can
    serve them all: they are packed, quantise alike, and nobody watches the input in between."""
    first = linears[0]
    fused = all(
        linear.packed is not None
        and linear.activation is not None
        and linear.observer is None
        and (linear is first or linear.shares_input_with(first))
        for linear in linears
    )
    return first if fused else None


class OnlineHadamard(nn.Module):
    """A Hadamard transform computed at run time on [..., n], n = blocks * size * inner.

    Each of the `blocks` parts is viewed [size, inner] and transformed along `size`: inner = 1 is the
    transform of contiguous channels (R4), inner = head_dim mixes the same channel of all heads (the
    cross-head transform of QuaRot). Half-precision inputs are transformed in float32. `packed`: in int4
    execution it is an operation of the int4 layer.
    """

    def __init__(self, size: int, inner: int = 1) -> None:
        super().__init__()
        self.size = size
        self.inner = inner
        self.packed = False

    def forward(self, x: Tensor, inverse: bool = False, gate: Tensor | None = None) -> Tensor:
        """x: [..., n]; gate: [..., n], x becomes silu(gate) * x first."""
        if self.packed and not inverse:
            return ops.hadamard(x, gate=gate, size=self.size, inner=self.inner)
        return online_hadamard(x if gate is None else ops.gated(gate, x), self.size, self.inner, inverse)

    def extra_repr(self) -> str:
        return f"size={self.size}, inner={self.inner}"
