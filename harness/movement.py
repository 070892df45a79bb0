"""How far a task's numbers have moved from a reference, and how far harmless changes move them.

A 4-bit model is chaotic: one ulp in its embedding turns some values into neighbouring codes, and after a few
layers every log-likelihood differs. So a rerun is not compared with one recorded run but with the centre of
several that are equally right, the outcomes of harmless changes, and what it may differ by is how far each of
those lies from the centre of the others. An outcome that agrees with another to the last bit (documents in
another order, another number of threads) is the same outcome and counts once: it would make the spread look
smaller than it is.

Three statistics of a cell on a task, all per token on perplexity tasks and per document elsewhere:

- mean: change of the mean score. Sensitive to loss, blind to what helps here and hurts there.
- typical: mean over documents of how far a document's log-likelihoods moved. A change of the arithmetic that
  costs nothing on average shows here: documents are moved by it beside what chaos moves them.
- rms: the same as a root mean square, which sees a few documents that moved far.

For generated text the last two give way to the share of answers that differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from harness import resample

Floats = NDArray[np.float64]

RTOL = 1e-4
"""Of a float cell's log-likelihoods."""
SMALL = 0.1
"""Log-likelihoods below this (nats) are compared as if they were this: an absolute tolerance of 1e-5."""
FALSE_ALARM = 0.01
"""Chance that a harmless change fails a whole gate, by the rule for one kind of machine."""
MARGIN = 1.25
"""A tolerance is at least this times the largest move seen."""


@dataclass(frozen=True)
class Document:
    """A document as a reference knows it. `content` and `prompt` are what must not differ; documents of one
    `cluster` are not independent; `weight` is its tokens, 1 where a task counts documents."""

    key: str
    content: str
    prompt: str
    cluster: str
    weight: int


@dataclass(frozen=True)
class Outcome:
    """What one run says of n documents.

    scores: [n], the number whose mean is compared, higher is better. values: [k], the log-likelihoods of all
    documents, those of one beside each other; `owner` [k] says whose. answers: [n] digests of generated text.
    """

    scores: Floats
    values: Floats
    owner: NDArray[np.int64]
    answers: tuple[str, ...] | None = None

    def same(self, other: Outcome) -> bool:
        return (
            np.array_equal(self.scores, other.scores)
            and np.array_equal(self.values, other.values)
            and self.answers == other.answers
        )


@dataclass(frozen=True)
class Move:
    """How far an outcome lies from a centre. `documents` [n]: how far each document's log-likelihoods moved,
    root mean square over them, divided by the root of its tokens (a sum of independent moves grows so)."""

    statistics: dict[str, float]
    documents: Floats


@dataclass(frozen=True)
class Tolerance:
    """The largest harmless value of a statistic, what was seen of it (least and most), and how often."""

    bound: float
    least: float
    most: float
    outcomes: int


def distinct(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that differ from all before them."""
    found: list[Outcome] = []
    for outcome in outcomes:
        if not any(outcome.same(other) for other in found):
            found.append(outcome)
    return found


def measure(outcome: Outcome, others: Sequence[Outcome], weights: Floats) -> Move:
    """How far an outcome lies from the centre of others. weights: [n]."""
    change = outcome.scores - np.mean([other.scores for other in others], axis=0)
    difference = outcome.values - np.mean([other.values for other in others], axis=0)
    n = len(weights)
    counts = np.bincount(outcome.owner, minlength=n)
    squares = np.bincount(outcome.owner, difference**2, minlength=n) / counts
    documents = np.sqrt(squares / weights)
    statistics = {"mean": float(change.sum() / weights.sum())}
    if outcome.answers is None:
        statistics |= {"typical": float(documents.mean()), "rms": float(np.sqrt((documents**2).mean()))}
    else:
        differ = [a != b for other in others for a, b in _pairs(outcome.answers, other.answers)]
        statistics["answers"] = sum(differ) / len(differ)
    return Move(statistics, documents)


def _pairs(answers: tuple[str, ...], others: tuple[str, ...] | None) -> Iterator[tuple[str, str]]:
    return zip(answers, others or (), strict=True)


def tolerances(outcomes: Sequence[Outcome], weights: Floats, chance: float) -> dict[str, Tolerance]:
    """What a further harmless change may do, from distinct outcomes of harmless ones.

    The one-sided prediction bound for one more value, mean + t sd sqrt(1 + 1/n) with Student's t of n - 1
    degrees of freedom (Hahn 1969, Journal of the American Statistical Association 64, 878), at a chance of
    `chance` to be passed; two-sided about zero for the mean. `MARGIN` times the largest value seen, if that
    is more, and at least what a float cell's tolerance would be. The values are those of each outcome against
    the centre of the others, a little farther off than the centre of all that a rerun is measured by.
    """
    floor = _floor(outcomes[0], weights)
    if len(outcomes) == 1:
        return {name: Tolerance(bound, 0.0, 0.0, 1) for name, bound in floor.items()}
    moves = [measure(out, _without(outcomes, i), weights).statistics for i, out in enumerate(outcomes)]
    n = len(moves)
    found = {}
    for name, least in floor.items():
        seen = np.array([move[name] for move in moves])
        two_sided = name == "mean"
        t = float(student.ppf(1 - chance / 2 if two_sided else 1 - chance, n - 1))
        # Distance from the centre of the others is n / (n - 1) times that from the centre of all.
        spread = float(seen.std(ddof=1)) * ((n - 1) / n if two_sided else 1.0) * math.sqrt(1 + 1 / n)
        bound = t * spread + (0.0 if two_sided else float(seen.mean()))
        largest = float(np.abs(seen).max())
        found[name] = Tolerance(max(bound, MARGIN * largest, least), float(seen.min()), float(seen.max()), n)
    return found


def _without(outcomes: Sequence[Outcome], index: int) -> list[Outcome]:
    return [outcome for i, outcome in enumerate(outcomes) if i != index]


def _floor(outcome: Outcome, weights: Floats) -> dict[str, float]:
    """What `RTOL` on every log-likelihood would allow, and one answer: that few runs changed none does not
    mean that none ever changes one."""
    origin = Outcome(np.zeros_like(outcome.scores), np.zeros_like(outcome.values), outcome.owner)
    size = measure(Outcome(np.abs(outcome.scores), outcome.values, outcome.owner), [origin], weights)
    floor = {name: RTOL * value for name, value in size.statistics.items()}
    return floor if outcome.answers is None else {"mean": floor["mean"], "answers": 1 / len(weights)}


def relative(outcome: Outcome, recorded: Outcome) -> Floats:
    """[n]: the largest change among a document's log-likelihoods, relative to the recorded one."""
    change = np.abs(outcome.values - recorded.values) / np.maximum(np.abs(recorded.values), SMALL)
    worst = np.zeros(len(recorded.scores))
    np.maximum.at(worst, recorded.owner, change)
    return worst


@dataclass(frozen=True)
class Test:
    """A one-sided test of "the mean score has not fallen" at level `alpha`.

    change: of the mean. It fails below `threshold`. detectable: the fall that it sees with the stated power.
    n: independent clusters. source: what its error comes from, "documents" or "harmless changes".
    """

    change: float
    threshold: float
    detectable: float
    p: float
    n: int
    source: str


def fall(
    outcome: Outcome,
    outcomes: Sequence[Outcome],
    documents: Sequence[Document],
    alpha: float,
    power: float,
) -> Test:
    """Test a run on another kind of machine against the centre of the reference's distinct outcomes.

    Paired: what makes a document hard cancels. The error of the mean change is that of a ratio of totals over
    clusters (Cochran, Sampling Techniques, ch. 6), or the spread of the mean over harmless changes if that is
    larger: where rounding itself is chaotic, all documents share one draw of the weights, and no number of
    them shows how far another draw lies. Student's t.
    """
    weights = np.array([document.weight for document in documents], dtype=np.float64)
    change = outcome.scores - np.mean([other.scores for other in outcomes], axis=0)
    totals = resample.by_cluster([document.cluster for document in documents], change, weights)
    m, total = len(totals), float(weights.sum())
    value = float(change.sum()) / total
    rest = totals[:, 0] - value * totals[:, 1]
    error = math.sqrt(m / (m - 1) * float(rest @ rest)) / total if m > 1 else math.inf
    df, source = m - 1, "documents"
    k = len(outcomes)
    if k > 1:
        means = [float(other.scores.sum()) / total for other in outcomes]
        between = float(np.std(means, ddof=1)) * math.sqrt(1 + 1 / k)
        if between > error or m == 1:
            error, df, source = between, k - 1, "harmless changes"
    if error == 0 or math.isinf(error):
        p = 1.0 if value >= 0 or math.isinf(error) else 0.0
        return Test(value, -error, error, p, m, source)
    t = float(student.ppf(1 - alpha, df))
    detectable = (t + float(student.ppf(power, df))) * error
    return Test(value, -t * error, detectable, float(student.cdf(value / error, df)), m, source)
