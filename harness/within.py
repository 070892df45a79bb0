"""Whether a run agrees with another of the same cells, made on another machine: the bounds, in one place.

Another machine, such as a GPU, sums in another order. A float model's numbers then differ in their last
digits. A quantised model's do not stay there: range search and GPTQ choose other codes for some weights, and
an activation at a tie goes the other way. Harmless changes on one machine (an embedding moved by one ulp,
another instruction set) made log-perplexities differ by up to 1.9 % with GPTQ at w4a16 (the outcomes in
results/reference/gate.json) and 2.9 % with RTN at w4a4kv4 (results/reference/int4-harmless, noise 1 and 2),
there by more than three standard errors over passages: these share one draw of the codes. So what agrees is

- of a float cell every log-likelihood that is within `movement.RTOL` of the other's;
- of a quantised cell a log-perplexity within `MARGIN` of the other's, or within `LIMIT` of it where a paired
  test over passages cannot tell the difference from chance;
- elsewhere a mean score, and a mean log-likelihood of the right answer, where a paired test over documents
  cannot tell the difference from chance: answers may differ as long as about as many are gained as lost.

`ALPHA` is the chance that any test of a comparison errs (Bonferroni). A few documents show large differences
alone: what they would have shown stands beside each verdict of a log-perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scipy.stats import t as student

from harness import baseline, movement
from harness.agreement import PERPLEXITY as MARGIN
from harness.markdown import plain, table
from harness.records import Cell
from harness.stats import Estimate, Row

if TYPE_CHECKING:
    from harness.compare import Comparison, Line

LIMIT = 0.05
"""Largest difference of a log-perplexity, relative to it, that is ever taken for chance."""
ALPHA = 0.01
"""Chance that a comparison of equal runs finds any difference."""


@dataclass(frozen=True)
class Judged:
    """One quantity of one task of a pair of cells. `said`: the difference and its bound, in a phrase."""

    what: str
    said: str
    ok: bool


def judge(lines: Sequence[Line]) -> list[tuple[Line, Judged]]:
    """Judge B beside A on every line of a comparison; a float cell and its like, and quantised ones."""
    tests = sum(len(_tests(line)) for line in lines)
    return [(line, found) for line in lines for found in _judge(line, ALPHA / max(tests, 1))]


def _tests(line: Line) -> list[str]:
    """The tests that the line takes part in; a float cell's log-likelihoods need none."""
    if line.column.kind == "perplexity":
        return [] if line.a.is_float else ["log-perplexity"]
    if line.gold is None:
        return ["score"]
    return [] if line.a.is_float else ["score", "right answer"]


def _judge(line: Line, alpha: float) -> list[Judged]:
    tests = _tests(line)
    if not tests:
        task = line.column.task
        return [_likelihoods(line.a.samples(task), line.b.samples(task))]
    if line.column.kind == "perplexity":
        reference = line.column.estimate(line.a)
        assert reference is not None
        return [_perplexity(reference.value, line.paired.difference, alpha)]
    found = [_chance("score", line.paired.difference, alpha)]
    return found if line.gold is None else [*found, _chance("right answer", line.gold.difference, alpha)]


def verdict(comparison: Comparison, name_of: Callable[[Cell], str]) -> tuple[str, bool]:
    """What is printed of a comparison, in Markdown, and whether all is within bounds. A task that A finished
    and the same cell of B did not is outside; cells that one side lacks are only named."""
    judged, lost = judge(comparison.lines), comparison.lost
    rows = [
        [name_of(line.b), line.column.task, found.what, found.said, "within" if found.ok else "**outside**"]
        for line, found in judged
    ]
    outside = sum(not found.ok for _, found in judged)
    text = [table(["cell", "task", "what", "B beside A", ""], rows)]
    text += [f"**outside**: {plain(reason)}" for reason in lost]
    others = [f"- {plain(reason)}" for reason in comparison.left_out if reason not in lost]
    text += ["Not compared:\n" + "\n".join(others)] if others else []
    total = f"{len(judged)} comparisons of {len({id(line.b) for line in comparison.lines})} cells"
    ok = not outside and not lost
    ends = f"within bounds: all {total}" if ok else f"OUTSIDE: {outside} of {total}, {len(lost)} not finished"
    return "\n\n".join([*text, ends]), ok


def allowance(reference: float, difference: Estimate, alpha: float) -> float:
    """The largest difference (nats) from a log-perplexity that agrees with it."""
    chance = math.nan
    if difference.df >= 1:
        chance = float(student.ppf(1 - alpha / 2, difference.df)) * difference.stderr
    margin, limit = MARGIN * abs(reference), LIMIT * abs(reference)
    return margin if math.isnan(chance) else max(margin, min(limit, chance))


def _perplexity(reference: float, difference: Estimate, alpha: float) -> Judged:
    allowed, value = allowance(reference, difference, alpha), difference.value
    said = (
        f"{value:+.4f} nats ({value / reference:+.2%}), at most {allowed:.4f} ({allowed / reference:.2%}); "
        f"standard error {difference.stderr:.4f}"
    )
    return Judged("log-perplexity", said, abs(value) <= allowed)  # false for NaN


def _chance(what: str, difference: Estimate, alpha: float) -> Judged:
    p = difference.p_value()
    # One document, or two that moved alike, tell nothing: only a difference of nothing is then none.
    ok = difference.value == 0 if math.isnan(p) else p >= alpha
    return Judged(what, f"{difference.value:+.4f}, p = {p:.2g}, at least {alpha:.2g}", ok)


def _likelihoods(first: Sequence[Row], second: Sequence[Row]) -> Judged:
    outcomes = [baseline.numbers(_sorted(rows))[2] for rows in (first, second)]
    largest = float(movement.relative(outcomes[1], outcomes[0]).max())
    said = f"by {largest:.2g} of itself at most, at most {movement.RTOL:g}"
    return Judged("every log-likelihood", said, largest <= movement.RTOL)


def _sorted(rows: Sequence[Row]) -> list[dict[str, object]]:
    key = ("window", "passage") if "window" in rows[0] else ("doc_id",)
    return [dict(row) for row in sorted(rows, key=lambda row: tuple(row[name] for name in key))]
