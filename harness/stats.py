"""Statistics over sample rows: standard errors, paired differences, flips, recovery, averages over tasks.

All cells of a run answer the same documents, so two cells are compared document by document: what makes
a document hard cancels, and the difference is known far better than either number (Miller 2024,
"Adding Error Bars to Evals", arXiv 2411.00640). Samples are the unit of everything here:

- a task's row: {"doc_id": int, "doc_hash": str, "metrics": {name: number}, "cluster": str or null}, one per
  document, and of multiple choice also "choices": [log-likelihood of each], "gold": index of the right one;
- a perplexity row: {"window": int, "passage": int, "nll": nats, "tokens": int}, one per piece of a source
  passage inside a scored window.

Tokens of one passage are not independent, nor are questions about one text, so passages and clusters are
what is resampled. A score that is not finite makes the numbers that rest on it NaN: it never drops out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from scipy.stats import norm as normal
from scipy.stats import t as student

from harness import resample

Row = Mapping[str, Any]
CONFIDENCE = 0.95
"""Of every interval."""
_ROUNDING = 1e-12
"""Share of the terms of a sum below which the rest that they leave is rounding, and counts as 0."""


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error (NaN: unknown) and the degrees of freedom behind that error.

    Where a better way than Student's t is known, its interval and its p-value of "the true value is 0"
    stand in `bounds` and `p`.
    """

    value: float
    stderr: float = math.nan
    df: float = math.inf
    bounds: tuple[float, float] | None = None
    p: float | None = None

    def p_value(self) -> float:
        """Two-sided p-value of "the true value is 0"; NaN when the error is unknown."""
        if self.p is not None:
            return self.p
        if math.isnan(self.value) or math.isnan(self.stderr):
            return math.nan
        if self.stderr == 0:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * student.sf(abs(self.value) / self.stderr, self.df))

    def interval(self) -> tuple[float, float]:
        """The interval that covers the true value with probability `CONFIDENCE`; NaN when unknown."""
        if self.bounds is not None:
            return self.bounds
        if math.isnan(self.stderr):
            return math.nan, math.nan
        half = float(student.ppf(0.5 + CONFIDENCE / 2, self.df)) * self.stderr
        return self.value - half, self.value + half


@dataclass(frozen=True)
class Paired:
    """Difference of a mean, rows minus reference, over the same n documents; `test` names what its p-value
    comes from. For a right-or-wrong metric `lost` counts documents that turned from right to wrong, `gained`
    the reverse (together the flips); both are None otherwise."""

    difference: Estimate
    n: int
    test: str
    lost: int | None = None
    gained: int | None = None


def mean(values: Sequence[float]) -> Estimate:
    """Mean and its standard error s/sqrt(n), s with n - 1 (central limit theorem; lm-eval's rule)."""
    if len(values) == 0:
        raise ValueError("the mean of no values: at least one is needed")
    data = np.asarray(values, dtype=np.float64)
    stderr = float(data.std(ddof=1) / math.sqrt(data.size)) if data.size > 1 else math.nan
    return Estimate(float(data.mean()), stderr, data.size - 1)


def ratio(totals: NDArray[np.float64], weights: NDArray[np.float64]) -> Estimate:
    """sum(totals) / sum(weights) over m independent clusters, both [m].

    The standard error is the spread of the ratio over resampled clusters. Interval and p-value are the
    symmetric bootstrap-t's: every resample's deviation is divided by the resample's own standard error
    (delta method, Cochran, Sampling Techniques, ch. 6), and the ratio is judged by how such quotients spread.
    That covers a skewed mean of few clusters far better than percentiles do (Hall 1988, Annals of Statistics
    16, 927). p = (1 + resamples at least as extreme) / (1 + resamples) (Davison and Hinkley 1997, ch. 4).

    A resample without a spread of its own, such as one cluster drawn m times, is infinitely extreme. Where
    more than one in twenty is, as with two or three clusters, that bounds nothing: interval and p-value are
    then Student's t over the delta method's standard error with m - 1 degrees of freedom.
    """
    m, total = len(totals), float(weights.sum())
    value = float(totals.sum()) / total
    if m == 1 or math.isnan(value):
        return Estimate(value, math.nan, m - 1)
    rest = totals - value * weights
    rest[np.abs(rest) <= _ROUNDING * np.abs(totals)] = 0
    parts = np.column_stack([rest, rest**2, rest * weights, weights**2, np.ones(m)])
    deviation, square, cross, weight, inverse = resample.ratio_bootstrap(parts, weights).T
    spread = square - 2 * deviation * cross + deviation**2 * weight
    # What cancels leaves rounding, which differs between machines; divided by it, a quotient has any size.
    spread[spread <= _ROUNDING * (square + deviation**2 * weight)] = 0
    errors = np.sqrt(inverse * spread / (m - 1))
    extreme = np.where(deviation == 0, 0.0, np.inf)
    quotients = np.divide(np.abs(deviation), errors, out=extreme, where=errors > 0)
    own = math.sqrt(m / (m - 1) * float(rest @ rest)) / total
    seen = abs(value) / own if own > 0 else 0.0 if value == 0 else math.inf
    reach = float(np.sort(quotients)[math.ceil(CONFIDENCE * (1 + len(quotients))) - 1])
    if math.isinf(reach):
        by_t = Estimate(value, own, m - 1)
        return replace(by_t, stderr=float(deviation.std(ddof=1)), bounds=by_t.interval(), p=by_t.p_value())
    # Ties count as extreme, however they are rounded.
    p = (1 + int((quotients >= seen * (1 - 1e-9) - 1e-9).sum())) / (1 + len(quotients))
    half = reach * own if own > 0 else 0.0
    return Estimate(value, float(deviation.std(ddof=1)), m - 1, (value - half, value + half), p)


def at_boundary(value: float, n: int) -> float:
    """Standard error of an accuracy of exactly 0 or 1 over n documents, where s/sqrt(n) would claim
    certainty: that of the share with two successes and two failures added (Agresti and Coull 1998)."""
    share = (value * n + 2) / (n + 4)
    return math.sqrt(share * (1 - share) / (n + 4))


def mcnemar_exact(lost: int, gained: int) -> float:
    """McNemar's exact two-sided p-value: under no difference a flip goes either way with probability 1/2
    (McNemar 1947, in its binomial form)."""
    flips = lost + gained
    return float(binomtest(lost, flips, 0.5).pvalue) if flips else 1.0


def mcnemar_clustered(net: Sequence[int]) -> float:
    """McNemar's test for documents in clusters: under no difference the net change of a whole cluster
    (answers gained minus lost) could as well have had the other sign. Exact: the distribution of the sum over
    all choices of signs. With one document a cluster it is `mcnemar_exact`."""
    sizes = [abs(int(change)) for change in net if change]
    reach, seen = sum(sizes), abs(int(sum(net)))
    chances = np.zeros(2 * reach + 1)
    chances[reach] = 1.0
    for size in sizes:  # the sum never leaves [-reach, reach], so nothing wraps around
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2
    return min(1.0, float(chances[np.abs(np.arange(-reach, reach + 1)) >= seen].sum()))


def flip_error(lost: int, gained: int, n: int) -> tuple[float, tuple[float, float]]:
    """Standard error and interval of an accuracy's change over n documents, with half a document added to
    each of the four ways that a pair can turn out (Agresti and Min 2005, Statistics in Medicine 24, 729): it
    covers well where flips are few and does not shrink to a point where there are none."""
    net, size = gained - lost, n + 2
    stderr = math.sqrt(lost + gained + 1 - net**2 / size) / size
    half = float(normal.ppf(0.5 + CONFIDENCE / 2)) * stderr
    return stderr, (max(-1.0, net / size - half), min(1.0, net / size + half))


def document_mean(rows: Sequence[Row], metric: str) -> Estimate:
    """Mean of a metric over documents; clusters are resampled where documents share one."""
    values = [_metric(row, metric) for row in rows]
    clusters = _clusters(rows)
    if clusters is None:
        return mean(values)
    totals, weights = resample.by_cluster(clusters, values, [1.0] * len(values)).T
    found = ratio(totals, weights)
    return Estimate(found.value, found.stderr, found.df)


def paired_mean(reference: Sequence[Row], rows: Sequence[Row], metric: str) -> Paired:
    """Paired difference of the mean of `metric`.

    Right or wrong: p by McNemar's exact test, by its clustered form where documents share a cluster, and the
    interval of `flip_error` or, clustered, Student's t over the bootstrap's error. Other metrics: paired
    t, or the bootstrap over clusters.

    Raises ValueError unless both have the same documents (doc_id and doc_hash), each with that metric.
    """
    pairs = _join(reference, rows, ("doc_id",), "doc_hash")
    before, after = (np.array([_metric(row, metric) for row in side]) for side in zip(*pairs, strict=True))
    change, n = after - before, len(pairs)
    clusters = _clusters([row for row, _ in pairs])
    if clusters is None:
        difference, test = mean(change), "paired t"
    else:
        totals, weights = resample.by_cluster(clusters, change, np.ones(n)).T
        difference, test = ratio(totals, weights), "bootstrap over clusters"
    if not np.isin(np.concatenate([before, after]), (0.0, 1.0)).all():
        return Paired(difference, n, test)
    lost, gained = int((change < 0).sum()), int((change > 0).sum())
    floor, bounds = flip_error(lost, gained, n)
    if clusters is None:
        difference = replace(difference, bounds=bounds, p=mcnemar_exact(lost, gained))
        test = "McNemar exact"
    else:
        p = mcnemar_clustered([round(total) for total in totals])
        difference = replace(difference, bounds=None, p=p)
        test = "McNemar exact, clustered"
    if difference.stderr == 0:  # all changed alike: no certainty
        difference = replace(difference, stderr=floor)
    return Paired(difference, n, test, lost, gained)


def log_perplexity(rows: Sequence[Row]) -> Estimate:
    """Mean negative log-likelihood per token in nats, passages resampled."""
    return ratio(*_passages(rows, [_number(row["nll"]) for row in rows]))


def paired_log_perplexity(reference: Sequence[Row], rows: Sequence[Row]) -> Estimate:
    """Paired difference of log-perplexity, passages resampled.

    Raises ValueError unless both have the same (window, passage) rows with the same tokens.
    """
    pairs = _join(reference, rows, ("window", "passage"), "tokens")
    change = [_number(other["nll"]) - _number(first["nll"]) for first, other in pairs]
    return ratio(*_passages([row for row, _ in pairs], change))


def increase(reference: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The rows of a text with what their negative log-likelihood has risen by, as `nll`.

    Raises ValueError unless both have the same (window, passage) rows with the same tokens.
    """
    pairs = _join(reference, rows, ("window", "passage"), "tokens")
    return [{**other, "nll": _number(other["nll"]) - _number(first["nll"])} for first, other in pairs]


def gold_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of a multiple-choice task with one metric, "gold": the log-likelihood of the right answer.

    Raises ValueError, naming documents, where a row does not say which choice is right.
    """
    bad = [row["doc_id"] for row in rows if not _has_gold(row)]
    if bad:
        raise ValueError(f"no right answer among the choices of doc_id {_some(bad)}")
    return [{**row, "metrics": {"gold": row["choices"][row["gold"]]}} for row in rows]


def paired_gold(reference: Sequence[Row], rows: Sequence[Row]) -> Paired:
    """Paired difference of the mean log-likelihood of the right answer (nats); ValueError as in `gold_rows`
    and `paired_mean`."""
    found = paired_mean(gold_rows(reference), gold_rows(rows), "gold")
    return replace(found, lost=None, gained=None)


def recovery(reference: Sequence[Row], rows: Sequence[Row], metric: str, chance: float) -> Estimate:
    """(accuracy - chance) / (reference's accuracy - chance).

    The interval is the percentiles of the quotient when documents, or their clusters, are resampled, both
    accuracies on the same draws; the standard error is the delta method's. It means something only where
    the reference is well above chance.
    """
    pairs = _join(reference, rows, ("doc_id",), "doc_hash")
    first, other = ([_metric(row, metric) for row in side] for side in zip(*pairs, strict=True))
    clusters = _clusters([row for row, _ in pairs]) or range(len(first))
    table = resample.by_cluster(clusters, first, other, [1.0] * len(first))
    gained, above = (sum(side) - len(side) * chance for side in (other, first))
    value = gained / above if above else math.nan
    m = len(table)
    if m < 2 or math.isnan(value):
        return Estimate(value)
    rest = table[:, 1] - chance * table[:, 2] - value * (table[:, 0] - chance * table[:, 2])
    stderr = math.sqrt(m / (m - 1) * float(rest @ rest)) / abs(above)
    # Equal clusters are interchangeable: their number is drawn, not each of them.
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    generator = np.random.default_rng(resample.SEED)
    draws = generator.multinomial(m, counts / m, size=resample.RESAMPLES) @ kinds
    over, under = draws[:, 1] / draws[:, 2] - chance, draws[:, 0] / draws[:, 2] - chance
    with np.errstate(divide="ignore", invalid="ignore"):
        quotients = np.where(under > 0, over / under, np.inf)
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(np.quantile(quotients, q, method="nearest")) for q in (tail, 1 - tail))
    return Estimate(value, stderr, m - 1, (low, high))


def _clusters(rows: Sequence[Row]) -> list[str] | None:
    """Each document's cluster; None where no two documents share one."""
    names = [
        f"cluster {c}" if (c := row.get("cluster")) is not None else f"alone {row['doc_id']}" for row in rows
    ]
    return names if len(set(names)) < len(names) else None


def _passages(rows: Sequence[Row], sums: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if not rows:
        raise ValueError("perplexity of no rows: at least one passage is needed")
    empty = [row["passage"] for row in rows if not row["tokens"] > 0]
    if empty:
        raise ValueError(f"no tokens in passage {_some(empty)}")
    totals, tokens = resample.by_cluster(
        [row["passage"] for row in rows], sums, [row["tokens"] for row in rows]
    ).T
    return totals, tokens


def _join(
    reference: Sequence[Row], rows: Sequence[Row], key: tuple[str, ...], equal: str
) -> list[tuple[Row, Row]]:
    """Pairs of rows with the same key, in the key's order; the field `equal` must be there and agree."""
    first, second = _by_key(reference, key), _by_key(rows, key)
    if not first or not second:
        raise ValueError("a comparison needs samples on both sides: one side has none")
    name = ", ".join(key)
    if first.keys() != second.keys():
        only, other = sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys())
        raise ValueError(
            f"the samples are not of the same documents: {len(only)} of {len(first)} in the reference alone, "
            f"{len(other)} of {len(second)} not in it ({name}: {_some([*only, *other])})"
        )
    for identity, row in second.items():
        ours, theirs = row.get(equal), first[identity].get(equal)
        if ours is None or ours != theirs:
            raise ValueError(f"{equal} differs at {name} {identity}: {theirs} in the reference, {ours} here")
    return [(first[identity], second[identity]) for identity in sorted(first)]


def _by_key(rows: Sequence[Row], key: tuple[str, ...]) -> dict[tuple[Any, ...], Row]:
    result: dict[tuple[Any, ...], Row] = {}
    for place, row in enumerate(rows):
        lacking = [field for field in key if field not in row]
        if lacking:
            raise ValueError(f"sample row {place + 1} has no {lacking[0]}")
        identity = tuple(row[field] for field in key)
        if identity in result:
            raise ValueError(f"two sample rows with {', '.join(key)} {identity}")
        result[identity] = row
    return result


def _has_gold(row: Row) -> bool:
    gold, choices = row.get("gold"), row.get("choices")
    return isinstance(gold, int) and isinstance(choices, list) and 0 <= gold < len(choices)


def _metric(row: Row, metric: str) -> float:
    if metric not in row["metrics"]:
        raise ValueError(f"no metric {metric!r} in the sample of doc_id {row['doc_id']}")
    value = row["metrics"][metric]
    if value is not None and not isinstance(value, int | float):
        raise ValueError(f"metric {metric!r} of doc_id {row['doc_id']} is no number: {value!r}")
    return _number(value)


def _number(value: float | None) -> float:
    """JSON has no NaN: a record may hold null for it."""
    return math.nan if value is None else float(value)


def _some(names: Sequence[Any]) -> str:
    shown = ", ".join(
        str(name[0] if isinstance(name, tuple) and len(name) == 1 else name) for name in names[:3]
    )
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
