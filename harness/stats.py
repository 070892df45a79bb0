"""Statistics over sample rows: standard errors, paired differences, flips, averages over tasks and seeds.

All cells of a run answer the same documents, so two cells are compared document by document: what makes
a document hard cancels, and the difference is known far better than either number (Miller 2024,
"Adding Error Bars to Evals", arXiv 2411.00640). Samples are the unit of everything here:

- a task's row: {"doc_id": int, "doc_hash": str, "metrics": {name: number}}, one per document;
- a perplexity row: {"window": int, "passage": int, "nll": nats, "tokens": int}, one per piece of a source
  passage inside a scored window. Tokens of one passage are not independent, so passages are the clusters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as student

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error (NaN: unknown) and the degrees of freedom behind that error."""

    value: float
    stderr: float = math.nan
    df: float = math.inf

    def p_value(self) -> float:
        """Two-sided p-value of "the true value is 0" by Student's t; NaN when the error is unknown."""
        if math.isnan(self.value) or math.isnan(self.stderr):
            return math.nan
        if self.stderr == 0:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * student.sf(abs(self.value) / self.stderr, self.df))

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The t interval (normal for infinite df) that covers the true value with this probability."""
        if math.isnan(self.stderr):
            return math.nan, math.nan
        half = float(student.ppf(0.5 + confidence / 2, self.df)) * self.stderr
        return self.value - half, self.value + half


@dataclass(frozen=True)
class Paired:
    """Difference of a metric's mean, rows minus reference, over the same documents.

    For a right-or-wrong metric `lost` counts documents that turned from right to wrong, `gained` the
    reverse (together the flips), and `mcnemar` is the exact p-value; all three are None otherwise.
    """

    difference: Estimate
    n: int
    lost: int | None = None
    gained: int | None = None
    mcnemar: float | None = None


def mean(values: Sequence[float]) -> Estimate:
    """Mean and its standard error s/sqrt(n), s with n - 1 (central limit theorem; lm-eval's rule)."""
    if len(values) == 0:
        raise ValueError("the mean of no values: at least one is needed")
    data = np.asarray(values, dtype=np.float64)
    stderr = float(data.std(ddof=1) / math.sqrt(data.size)) if data.size > 1 else math.nan
    return Estimate(float(data.mean()), stderr, data.size - 1)


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


def paired_mean(reference: Sequence[Row], rows: Sequence[Row], metric: str) -> Paired:
    """Paired difference of the mean of `metric`, with the standard error of the per-document differences.

    Raises ValueError unless both have the same documents (doc_id and doc_hash), each with that metric.
    """
    pairs = _join(reference, rows, ("doc_id",), "doc_hash")
    before, after = (np.array([_metric(row, metric) for row in side]) for side in zip(*pairs, strict=True))
    difference = mean(after - before)
    if not np.isin(np.concatenate([before, after]), (0.0, 1.0)).all():
        return Paired(difference, len(pairs))
    lost, gained = int((before > after).sum()), int((after > before).sum())
    return Paired(difference, len(pairs), lost, gained, mcnemar_exact(lost, gained))


def log_perplexity(rows: Sequence[Row]) -> Estimate:
    """Mean negative log-likelihood per token in nats, with a standard error clustered over passages.

    Ratio estimator R = sum(nll) / sum(tokens); by the delta method its variance over n clusters is
    n/(n-1) * sum((nll_i - R tokens_i)^2) / sum(tokens)^2 (Cochran, Sampling Techniques, 3rd ed., ch. 6).
    """
    return _ratio(rows, [_number(row["nll"]) for row in rows])


def paired_log_perplexity(reference: Sequence[Row], rows: Sequence[Row]) -> Estimate:
    """Paired difference of log-perplexity, rows minus reference, clustered over passages like
    `log_perplexity`; `interval()` is its t interval.

    Raises ValueError unless both have the same (window, passage) rows with the same tokens.
    """
    pairs = _join(reference, rows, ("window", "passage"), "tokens")
    return _ratio([row for _, row in pairs], [_number(b["nll"]) - _number(a["nll"]) for a, b in pairs])


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Plain mean of independent estimates (tasks share no documents), with Satterthwaite's df."""
    variances = [estimate.stderr**2 for estimate in estimates]
    value = sum(estimate.value for estimate in estimates) / len(estimates)
    df = _satterthwaite(variances, [estimate.df for estimate in estimates])
    return Estimate(value, math.sqrt(sum(variances)) / len(estimates), df)


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over seeds of one quantity.

    The seeds share their documents, so averaging does not shrink the sampling error: it is taken as the
    mean of the seeds' standard errors (never too small: the standard deviation of a mean is at most the
    mean of the standard deviations). To it is added the error of the mean over seeds, s^2 / seeds.
    """
    if len(estimates) == 1:
        return estimates[0]
    seeds = mean([estimate.value for estimate in estimates])
    sampling = sum(estimate.stderr for estimate in estimates) / len(estimates)
    variances = [sampling**2, seeds.stderr**2]
    df = _satterthwaite(variances, [min(estimate.df for estimate in estimates), seeds.df])
    return Estimate(seeds.value, math.sqrt(sum(variances)), df)


def _satterthwaite(variances: Sequence[float], dfs: Sequence[float]) -> float:
    """Degrees of freedom of a sum of variance estimates (Satterthwaite 1946)."""
    if any(math.isnan(variance) for variance in variances):
        return math.nan
    weight = sum(v**2 / df for v, df in zip(variances, dfs, strict=True) if v)
    return sum(variances) ** 2 / weight if weight else math.inf


def _ratio(rows: Sequence[Row], sums: Sequence[float]) -> Estimate:
    clusters: dict[int, np.ndarray] = {}
    for row, total in zip(rows, sums, strict=True):
        cluster = clusters.setdefault(row["passage"], np.zeros(2))
        cluster += (total, row["tokens"])
    if not clusters:
        raise ValueError("perplexity of no rows: at least one passage is needed")
    totals, tokens = np.array([clusters[passage] for passage in sorted(clusters)]).T
    ratio = float(totals.sum() / tokens.sum())
    n = len(clusters)
    if n == 1:
        return Estimate(ratio, math.nan, 0)
    residuals = totals - ratio * tokens
    return Estimate(ratio, math.sqrt(n / (n - 1) * float(residuals @ residuals)) / float(tokens.sum()), n - 1)


def _join(
    reference: Sequence[Row], rows: Sequence[Row], key: tuple[str, ...], equal: str
) -> list[tuple[Row, Row]]:
    """Pairs of rows with the same key, in the key's order; the field `equal` must be there and agree."""
    first, second = _by_key(reference, key), _by_key(rows, key)
    if not first or not second:
        raise ValueError("a comparison needs samples on both sides: one side has none")
    name = ", ".join(key)
    if first.keys() != second.keys():
        only, other = first.keys() - second.keys(), second.keys() - first.keys()
        raise ValueError(
            f"the samples are not of the same documents: {len(only)} of {len(first)} in the reference alone, "
            f"{len(other)} of {len(second)} in the other alone (by {name})"
        )
    for identity, row in second.items():
        ours, theirs = row.get(equal), first[identity].get(equal)
        if ours is None or ours != theirs:
            raise ValueError(f"{equal} differs at {name} {identity}: {theirs} in the reference, {ours} here")
    return [(first[identity], second[identity]) for identity in sorted(first)]


def _by_key(rows: Sequence[Row], key: tuple[str, ...]) -> dict[tuple[Any, ...], Row]:
    result: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        identity = tuple(row[field] for field in key)
        if identity in result:
            raise ValueError(f"two sample rows with {', '.join(key)} {identity}")
        result[identity] = row
    return result


def _metric(row: Row, metric: str) -> float:
    if metric not in row["metrics"]:
        raise ValueError(f"no metric {metric!r} in the sample of doc_id {row['doc_id']}")
    return _number(row["metrics"][metric])


def _number(value: float | None) -> float:
    """JSON has no NaN: a record may hold null for it."""
    return math.nan if value is None else float(value)
