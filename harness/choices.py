"""Methods that give more bits to some matrices: what of a run they are compared with, and how.

A choice of matrices is compared, on the same documents, with its base (the rounding alone, of the same bits
and groups) and with its control (as many matrices of each type, drawn at random, a draw a seed). The
question of the control is whether the choice differs from one more draw: with the mean of n draws of
standard deviation s it then differs by s sqrt(1 + 1/n), however exactly that mean is known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness import inference
from harness.evidence import over, paired_rows
from harness.records import Cell, Column, Model, Row
from harness.stats import Estimate

BOOSTS = ("sensiboost", "kurtboost")
SIZES = "draws with other numbers of matrices than the choice"


@dataclass(frozen=True)
class Choice:
    """A boosted row, its base and its control. to_base, control_to_base: differences of log-perplexity.
    draws: that of the choice to each draw, by seed."""

    row: Row
    base: Row
    control: Row | None
    to_base: Estimate | None
    control_to_base: Estimate | None
    draws: Mapping[int, Estimate]

    @property
    def method(self) -> str:
        return next(name for name in _parts(self.row) if name in BOOSTS)

    @property
    def to_control(self) -> Estimate | None:
        return inference.as_one_more(list(self.draws.values()))


@dataclass(frozen=True)
class Pooled:
    """All choices of a method at one width of weights that have a control, as one: they share the matrices
    that were chosen, and those that were drawn. p: Holm's over all that is pooled."""

    method: str
    bits: int
    choices: tuple[Choice, ...]
    draws: int
    difference: Estimate
    p: float = math.nan


def is_boosted(row: Row) -> bool:
    return _boost(row.first) is not None


def is_control(row: Row) -> bool:
    return (_boost(row.first) or {}).get("choice") == "random"


def boosted_linears(cell: Cell) -> list[str]:
    """Names of the linears that have another quantiser than most."""
    return [name for some in planned(cell) for name in some["linears"] or ()]


def planned(cell: Cell) -> list[dict[str, Any]]:
    """How many linears share which quantiser."""
    found: list[dict[str, Any]] = (cell.record.get("diagnostics") or {}).get("weights") or []
    return found


def choices_of(model: Model, column: Column, problems: dict[str, None]) -> list[Choice]:
    """The boosted rows that have a base; what does not pair is added to `problems`."""

    def difference(reference: Row | None, row: Row | None) -> Estimate | None:
        if reference is None or row is None:
            return None
        seeds = over(paired_rows(reference.usable, row, [column], problems), [column])
        return inference.over_seeds(seeds) if seeds else None

    rows = [row for row in model.rows if is_boosted(row)]
    found = []
    for row in rows:
        base = next((other for other in model.rows if _is_base(other, row)), None)
        if is_control(row) or base is None:
            continue
        control = next((other for other in rows if is_control(other) and _same_choice(other, row)), None)
        draws = {} if control is None else _draws(row, control, column, problems)
        if control is not None:  # of its cells, those of the choice's size
            same = tuple(cell for cell in control.usable if cell.seed in draws)
            control = Row(control.label, same) if same else None
        found.append(Choice(row, base, control, difference(base, row), difference(base, control), draws))
    return found


def pooled(choices: Sequence[Choice]) -> list[Pooled]:
    """By method and bits of weights, over the draws that all its choices have."""
    groups: dict[tuple[str, int], list[Choice]] = {}
    for choice in choices:
        if choice.draws and boosted_linears(choice.row.first):
            groups.setdefault((choice.method, choice.row.first.bits.weight), []).append(choice)
    found = []
    for (method, bits), members in groups.items():
        seeds = [seed for seed in members[0].draws if all(seed in member.draws for member in members)]
        means = [inference.spread([member.draws[seed] for member in members]) for seed in seeds]
        dfs = [min(member.draws[seed].df for member in members) for seed in seeds]
        estimates = [
            Estimate(mean.over.value, mean.sampling, df) for mean, df in zip(means, dfs, strict=True)
        ]
        # Rows share their draws, whose effects add up; where these cancel in a mean, it is by chance.
        apart = [[member.draws[seed] for seed in seeds] for member in members] if len(seeds) > 1 else []
        least = math.hypot(*(inference.spread(row).sd for row in apart)) / len(members)
        difference = inference.as_one_more(estimates, least)
        if difference is not None:
            found.append(Pooled(method, bits, tuple(members), len(seeds), difference))
    adjusted = inference.holm([one.difference.p_value() for one in found])
    return [
        Pooled(one.method, one.bits, one.choices, one.draws, one.difference, p)
        for one, p in zip(found, adjusted, strict=True)
    ]


def rivals(model: Model, base: Row) -> list[Row]:
    """What else a base's bits could be spent on: other roundings alone, where the base is one."""
    if _transforms(base):
        return []
    return [
        row
        for row in model.rows
        if row.bits == base.bits
        and row is not base
        and not row.first.is_float
        and not is_boosted(row)
        and not _transforms(row)
    ]


def _draws(row: Row, control: Row, column: Column, problems: dict[str, None]) -> dict[int, Estimate]:
    """The difference to each draw that has as many matrices of each type as its choice."""
    found: dict[int, Estimate] = {}
    others = []
    for cell in control.usable:
        alike = [one for one in row.usable if len(row.usable) == 1 or one.seed == cell.seed]
        if alike and _sizes(alike[0]) != _sizes(cell):
            others.append(str(cell.seed))
        elif alike:
            pairs = paired_rows([cell], Row(row.label, (alike[0],)), [column], problems)
            for estimate in over(pairs, [column]):
                found[cell.seed] = estimate
    if others:
        problems[f"{row.bits} {row.label}: {SIZES}, seeds {', '.join(others)}"] = None
    return found


def _sizes(cell: Cell) -> Counter[str]:
    return Counter(name.split(".", 2)[2] for name in boosted_linears(cell))


def _parts(row: Row) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = row.first.record["method"].get("options") or {}
    return parts


def _boost(cell: Cell) -> dict[str, Any] | None:
    """Options of the boosting part of a cell's method."""
    parts = cell.record["method"].get("options") or {}
    return next((options for name, options in parts.items() if name in BOOSTS), None)


def _same_choice(control: Row, row: Row) -> bool:
    """Whether two rows differ in how matrices are chosen alone."""

    def rest(some: Row) -> dict[str, dict[str, Any]]:
        return {name: {k: v for k, v in part.items() if k != "choice"} for name, part in _parts(some).items()}

    return control.bits == row.bits and rest(control) == rest(row)


def _is_base(other: Row, row: Row) -> bool:
    """Whether a row is another without its boosting part, rounded alike."""
    boost, plain_rounding = _boost(row.first), next(iter(_parts(other).values()), {})
    own, theirs = row.first.record["method"], other.first.record["method"]
    return (
        other.bits == row.bits
        and not other.first.is_float
        and boost is not None
        and not is_boosted(other)
        and own.get("rounding") == theirs.get("rounding")
        and _transforms(row) == _transforms(other)
        and all(boost.get(key) == plain_rounding.get(key) for key in ("group_axis", "meta", "preset"))
    )


def _transforms(row: Row) -> dict[str, dict[str, Any]]:
    """The parts of a method that neither boost nor round alone, by their options but the rounding."""
    return {
        name: {key: value for key, value in part.items() if key != "rounding"}
        for name, part in _parts(row).items()
        if name not in (*BOOSTS, "hqq", "gptq", "rtn")
    }
