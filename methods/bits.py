"""Bit-widths and quantiser settings: what a cell of the grid asks for, and what each linear gets.

`Bits` is the grammar users type ("w4a4kv4g128"); `ActivationSpec`, `KVSpec` and `LinearSpec` are the
resolved settings that quantisers, rounding and the decoder read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from methods.errors import UserError

_GRAMMAR = re.compile(r"w(\d+)a(\d+)(?:kv(\d+))?(?:g(\d+))?")
_FULL = 16


@dataclass(frozen=True)
class Bits:
    """Bits of weights, activations (linear inputs) and KV cache; 16 means not quantised.

    `group` is the number of consecutive input channels that share a weight scale (None: per output
    channel). `str` prints the canonical form, which `parse` reads back to an equal value.
    """

    weight: int = _FULL
    activation: int = _FULL
    kv: int = _FULL
    group: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("activation", self.activation), ("kv", self.kv)):
            if value != _FULL and not 2 <= value <= 8:
                raise UserError(f"{name} bits {value}: give 2 to 8, or 16 for not quantised")
        if self.group is not None:
            if self.weight == _FULL:
                raise UserError(f"group size {self.group} without quantised weights: drop g{self.group}")
            if self.group < 8 or self.group % 8:
                raise UserError(f"group size {self.group}: give a multiple of 8, such as 32, 64 or 128")

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Read "w4a4kv4", "w4a16", "w3a16g128" ...; a missing kv means 16.

        Raises UserError for anything else.
        """
        match = _GRAMMAR.fullmatch(text.strip().lower())
        if match is None:
            raise UserError(
                f"bits {text!r}: write w<bits>a<bits>[kv<bits>][g<group>], such as w4a4kv4 or w4a16g128"
            )
        weight, activation, kv, group = match.groups()
        return cls(int(weight), int(activation), int(kv or _FULL), int(group) if group else None)

    def __str__(self) -> str:
        kv = "" if self.kv == _FULL else f"kv{self.kv}"
        group = "" if self.group is None else f"g{self.group}"
        return f"w{self.weight}a{self.activation}{kv}{group}"

    @property
    def quantises_weights(self) -> bool:
        return self.weight != _FULL

    @property
    def quantises_activations(self) -> bool:
        return self.activation != _FULL

    @property
    def quantises_kv(self) -> bool:
        return self.kv != _FULL

    @property
    def is_float(self) -> bool:
        return not (self.quantises_weights or self.quantises_activations or self.quantises_kv)


FLOAT = Bits()


@dataclass(frozen=True)
class ActivationSpec:
    """Quantiser of a linear's input.

    Dynamic (default): a scale per token, or per token and `group` of channels. Static: one scale and
    zero-point per tensor, found by a method's `ranges` stage.
    """

    bits: int
    symmetric: bool = True
    clip: float = 1.0
    group: int | None = None
    static: bool = False


@dataclass(frozen=True)
class KVSpec:
    """Quantiser of keys (after RoPE and any online rotation) and values: one scale per token and KV
    head, over head_dim; or static per tensor."""

    bits: int
    symmetric: bool = False
    clip: float = 1.0
    static: bool = False


@dataclass(frozen=True)
class LinearSpec:
    """Everything that rounding and execution need to know of one linear.

    `bits` 16 leaves the weight alone. Groups run along the input channels for `axis` 1 and along the
    output channels for `axis` 0 (methods/groups.py). The first `keep` input columns stay in full precision,
    weight and activation. `search` looks for the clipped range of least error, as QuaRot's code does (80
    shrink steps of 1 %, exponent 2.4). `fractional`: zero-points are numbers of 16 bits and no codes; `meta`:
    scales and zero-points are quantised to 8 bits (both HQQ's).
    """

    bits: int
    group: int | None = None
    axis: int = 1
    symmetric: bool = True
    search: bool = True
    activation: ActivationSpec | None = None
    keep: int = 0
    fractional: bool = False
    meta: bool = False

    def __post_init__(self) -> None:
        if self.axis not in (0, 1):
            raise UserError(f"axis {self.axis}: give 1 (input channels) or 0 (output channels)")
        if self.axis == 0 and self.activation is not None:
            raise UserError("axis-0 groups cannot run in a GEMM grouped along the input: use axis 1 or a16")


@dataclass(frozen=True)
class QuantiserSettings:
    """The one quantiser setting that all methods of a grid share, so that rankings compare methods and
    not quantisers. None for a clip ratio takes the default of its width: 4 bits and fewer are clipped
    (0.9 activations, 0.95 KV; QuaRot's settings), wider ones are not. On the default model's tuning split
    these are the better of two choices each (QuaRot, weights in 16 bit, nats per token at clip 0.9 / 1.0:
    a4 3.342 / 3.474, a8 2.8250 / 2.8226; KV at 0.95 / 1.0: a4kv4 3.401 / 3.468, a8kv8 2.8242 / 2.8225).

    Weights are symmetric beside quantised activations and asymmetric in weight-only settings, as in
    the QuaRot paper; `weight_symmetric` overrides that. `activation_static` and `kv_static` ask for one
    range per tensor, found on calibration tokens, in place of one per token.
    """

    weight_symmetric: bool | None = None
    weight_search: bool = True
    activation_symmetric: bool = True
    activation_clip: float | None = None
    activation_group: int | None = None
    activation_static: bool = False
    kv_symmetric: bool = False
    kv_clip: float | None = None
    kv_static: bool = False

    def __post_init__(self) -> None:
        for name in ("activation_clip", "kv_clip"):
            clip = getattr(self, name)
            if clip is not None and not 0 < clip <= 1:
                raise UserError(f"{name} {clip}: give a ratio above 0 and at most 1")
        group = self.activation_group
        if group is not None:
            if group < 8 or group % 8:
                raise UserError(
                    f"activation_group {group}: give a multiple of 8, such as 128, or none for whole tokens"
                )
            if self.activation_static:
                raise UserError(
                    f"activation_group {group} with activation_static: a static range has no groups; "
                    "drop one of the two"
                )

    def static(self, bits: Bits) -> bool:
        """Whether anything at these bits has a static range, which is found on calibration tokens."""
        return (self.activation_static and bits.quantises_activations) or (
            self.kv_static and bits.quantises_kv
        )

    def linear(self, bits: Bits) -> LinearSpec:
        symmetric = self.weight_symmetric
        if symmetric is None:
            symmetric = bits.quantises_activations
        return LinearSpec(
            bits=bits.weight,
            group=bits.group,
            symmetric=symmetric,
            search=self.weight_search,
            activation=self.activation(bits.activation) if bits.quantises_activations else None,
        )

    def activation(self, bits: int) -> ActivationSpec:
        clip = self.activation_clip if self.activation_clip is not None else (0.9 if bits <= 4 else 1.0)
        return ActivationSpec(
            bits, self.activation_symmetric, clip, self.activation_group, self.activation_static
        )

    def kv(self, bits: Bits) -> KVSpec | None:
        if not bits.quantises_kv:
            return None
        clip = self.kv_clip if self.kv_clip is not None else (0.95 if bits.kv <= 4 else 1.0)
        return KVSpec(bits.kv, self.kv_symmetric, clip, self.kv_static)
