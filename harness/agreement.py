"""Whether two executions of one quantised model agree: what was compared, and the thresholds to be met.

harness/side_by_side.py measures, harness/parity.py runs the matrix of methods and bit-widths.

A code that is compared is the integer that the scale multiplies: code minus zero-point. A zero-point at a
rounding tie moves every code of its row together with itself, and no value. Rows that hold a NaN must hold
one in both executions; their codes mean nothing and are left out.

In float32 the codes cannot all be equal. The simulation adds up rounded products and the int4 execution
integers, so what reaches the next quantiser differs in its last digits, and a value at a tie between two
codes goes either way, about one in a million. The thresholds allow for that and for nothing else. In float64
no value comes as near to a tie by chance; what is left are exact ties, such as a row whose largest value is
minus its smallest, from sums of small integers and weights that lie on a lattice.

A code that went the other way moves all that is computed from it by up to a step: behind a norm, every key
and value of that token. That is no fault of the quantisers there, and thresholds that forgave it would
forgive theirs. So a token whose codes behind a norm differ is compared, counted, and goes on with the
simulation's codes; the quantisers behind are then judged on every token by the same thresholds, and such
tokens must be as rare as ties are. On a CPU both executions compute a norm alike and there are none; a fused
kernel sums in another order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from harness.stats import Estimate
from kernels.reference import Quantised

EQUAL = 0.9999
"""Least share of equal codes: of one linear's input, of one layer's keys and values."""
LARGEST = 1
"""Largest difference of two codes."""
SCALE = 1e-3
"""Largest relative difference of two scales."""
HANDED = 1e-5
"""Largest share of codes behind norms, of all layers together, that differ and are replaced."""
OUTPUT = 0.01
"""Largest difference of a half-layer's output, relative to what it adds (root mean square over tokens)."""
PERPLEXITY = 0.01
"""Largest difference of the log-perplexity, relative to the simulated one."""
ERRORS = 3.0
"""Largest difference of the log-perplexity in paired standard errors."""
RESOLUTION = 1e-6
"""Relative difference of log-perplexities that float32 cannot tell from none."""


@dataclass(frozen=True)
class Codes:
    """Two executions' codes of one thing: how many there are, how many differ and by how much at most, and
    the largest relative difference of their scales (infinite where only one is a number)."""

    name: str
    n: int = 0
    unequal: int = 0
    largest: int = 0
    scale: float = 0.0

    @property
    def share(self) -> float:
        """Of equal codes; 1 where there are none."""
        return 1 - self.unequal / self.n if self.n else 1.0

    def fault(self, equal: float = EQUAL, largest: int = LARGEST, scale: float = SCALE) -> str | None:
        """What is wrong, in a line; None where nothing is."""
        if self.share >= equal and self.largest <= largest and self.scale <= scale:
            return None
        return (
            f"{self.name}: {self.unequal:,} of {self.n:,} codes differ, by {self.largest} at most; "
            f"scales by {self.scale:.2g} of themselves at most"
        )

    def joined(self, other: Codes) -> Codes:
        """Both together, under this name."""
        return Codes(
            self.name,
            self.n + other.n,
            self.unequal + other.unequal,
            max(self.largest, other.largest),
            max(self.scale, other.scale),
        )


def compare_codes(name: str, first: Quantised, second: Quantised) -> Codes:
    """Codes [..., n] of equal shape and groups, against each other."""
    if first.codes.shape != second.codes.shape or first.scale.shape != second.scale.shape:
        return Codes(name, first.codes.numel(), first.codes.numel(), 2**first.bits, math.inf)
    scale, other = first.scale.double(), second.scale.double()
    numbers = ~(scale.isnan() & other.isnan())
    apart = ((other - scale).abs() / scale.abs())[numbers].nan_to_num(nan=math.inf, posinf=math.inf)
    difference = (_levels(second) - _levels(first)).abs()[numbers]
    return Codes(
        name,
        difference.numel(),
        int((difference != 0).sum()),
        int(difference.max()) if difference.numel() else 0,
        float(apart.max()) if apart.numel() else 0.0,
    )


def differing_tokens(first: Quantised, second: Quantised) -> Tensor:
    """Of codes [..., T, n] of equal shape and groups: bool [..., T], the tokens of which any code differs."""
    numbers = ~(first.scale.isnan() & second.scale.isnan())
    return ((_levels(second) != _levels(first)) & numbers.unsqueeze(-1)).flatten(-2).any(-1)


def _levels(q: Quantised) -> Tensor:
    """[..., G, n / G]: the integers that the scales multiply."""
    codes = q.codes.int().unflatten(-1, (q.scale.shape[-1], -1))
    return codes if q.zero is None else codes - q.zero.nan_to_num().long().unsqueeze(-1)


@dataclass(frozen=True)
class Handed:
    """Tokens that went on with the simulation's codes behind a norm, of how many, counted once for each norm
    and pass; and the codes among them that differed, of all behind norms."""

    tokens: int = 0
    of_tokens: int = 0
    codes: int = 0
    of_codes: int = 0

    def fault(self) -> str | None:
        """As `Codes.fault`."""
        if self.codes <= HANDED * self.of_codes:
            return None
        return (
            f"behind norms {self.codes:,} of {self.of_codes:,} codes differ, more than ties explain: "
            f"{self.tokens:,} of {self.of_tokens:,} tokens had to be given the simulation's"
        )

    def joined(self, other: Handed) -> Handed:
        """Both together."""
        return Handed(
            self.tokens + other.tokens,
            self.of_tokens + other.of_tokens,
            self.codes + other.codes,
            self.of_codes + other.of_codes,
        )


@dataclass(frozen=True)
class Output:
    """The output of half a layer: root mean square over tokens of |second - first| / |first - input|."""

    name: str
    difference: float

    def fault(self) -> str | None:
        """As `Codes.fault`."""
        if self.difference <= OUTPUT:
            return None
        return f"{self.name} differs by {self.difference:.2g} of what this half of the layer adds"


@dataclass(frozen=True)
class Running:
    """Log-perplexity (nats per token) of the simulation, and by how much that of the int4 execution differs,
    each on its own states; the standard error is paired, passages resampled."""

    simulated: float
    difference: Estimate
    tokens: int
    windows: int
    passages: int

    @property
    def relative(self) -> float:
        """The difference as a share of the simulated log-perplexity."""
        return self.difference.value / self.simulated

    @property
    def errors(self) -> float:
        """The difference in standard errors; NaN where these are unknown, as of a single passage."""
        value, stderr = self.difference.value, self.difference.stderr
        return value / stderr if stderr else (math.inf if value else 0.0)

    def fault(self) -> str | None:
        """As `Codes.fault`."""
        if abs(self.relative) <= RESOLUTION:
            return None
        # Written so that NaN fails, but for the standard error of a single passage.
        single = self.passages == 1 and math.isnan(self.errors)
        if abs(self.relative) <= PERPLEXITY and (abs(self.errors) <= ERRORS or single):
            return None
        return (
            f"log-perplexity differs by {self.difference.value:+.3g} nats from {self.simulated:.4g} "
            f"({self.relative:+.2%}, {self.errors:+.1f} standard errors)"
        )


@dataclass(frozen=True)
class Agreement:
    """What was found; nothing of a kind of which nothing is quantised.

    missing: what should have been compared and was not there. decode, stepped: codes of all layers, and their
    outputs, through a KV cache against the same layers without one. handed: of both. generated: greedy tokens
    of both, and how many are the same before the first that is not, for information. implementations: per
    operation, which implementation the int4 execution ran, and how often.
    """

    weights: tuple[Codes, ...]
    inputs: tuple[Codes, ...]
    cache: tuple[Codes, ...]
    outputs: tuple[Output, ...]
    decode: Codes
    stepped: tuple[Output, ...]
    running: Running
    generated: tuple[int, int]
    handed: Handed = Handed()
    missing: tuple[str, ...] = ()
    implementations: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """Everything that is wrong, a line each; empty where the executions agree."""
        found = [
            *self.missing,
            *(codes.fault(equal=1.0, largest=0, scale=0.0) for codes in self.weights),
            *(codes.fault() for codes in (*self.inputs, *self.cache, self.decode)),
            self.handed.fault(),
            *(output.fault() for output in (*self.outputs, *self.stepped)),
            self.running.fault(),
        ]
        return [fault for fault in found if fault is not None]
