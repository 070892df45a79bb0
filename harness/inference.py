"""What is concluded from several estimates: averages over tasks and seeds, many comparisons, power."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import norm as normal
from scipy.stats import t as student

from harness.stats import Estimate, mean

ALPHA, POWER = 0.05, 0.80


@dataclass(frozen=True)
class Spread:
    """One quantity measured with several seeds: `over` is its mean over seeds with the error that seeds make
    (t with seeds - 1 degrees of freedom), `sd` the spread between seeds, `sampling` the standard error that
    the documents make, which all seeds share and which no number of seeds shrinks."""

    seeds: int
    over: Estimate
    sd: float
    sampling: float


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Plain mean of independent estimates (tasks share no documents), with Satterthwaite's df."""
    if len(estimates) == 1:
        return estimates[0]
    variances = [estimate.stderr**2 for estimate in estimates]
    value = sum(estimate.value for estimate in estimates) / len(estimates)
    df = _satterthwaite(variances, [estimate.df for estimate in estimates])
    return Estimate(value, math.sqrt(sum(variances)) / len(estimates), df)


def spread(estimates: Sequence[Estimate]) -> Spread:
    """Seed variance and sampling variance of one quantity, apart.

    The sampling error of the mean over seeds is taken as the mean of the seeds' standard errors: never too
    small, since the standard deviation of a mean is at most the mean of the standard deviations.
    """
    over = mean([estimate.value for estimate in estimates])
    sampling = sum(estimate.stderr for estimate in estimates) / len(estimates)
    return Spread(len(estimates), over, over.stderr * math.sqrt(len(estimates)), sampling)


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over seeds with both errors of `spread` joined; one seed's estimate as it is."""
    if len(estimates) == 1:
        return estimates[0]
    found = spread(estimates)
    variances = [found.sampling**2, found.over.stderr**2]
    df = _satterthwaite(variances, [min(estimate.df for estimate in estimates), found.over.df])
    return Estimate(found.over.value, math.sqrt(sum(variances)), df)


def as_one_more(estimates: Sequence[Estimate], least_sd: float = 0.0) -> Estimate | None:
    """Mean difference of one value to n random draws, each of `estimates` the difference to a draw; its
    error is that of a value which is itself one more draw (sd sqrt(1 + 1/n), t with n - 1 degrees of
    freedom), joined with the documents'. None for fewer than two draws, which have no spread. least_sd: below
    which the spread of the draws is taken for chance."""
    if len(estimates) < 2:
        return None
    found = spread(estimates)
    variances = [found.sampling**2, max(found.sd, least_sd) ** 2 * (1 + 1 / found.seeds)]
    df = _satterthwaite(variances, [min(estimate.df for estimate in estimates), found.over.df])
    return Estimate(found.over.value, math.sqrt(sum(variances)), df)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Scandinavian Journal of Statistics 6, 65, 1979): the chance that any of them
    falls below alpha where nothing differs is at most alpha.

    A p-value that is NaN stays NaN and still counts as a comparison.
    """
    n = len(p_values)
    order = sorted(range(n), key=lambda i: 2.0 if math.isnan(p_values[i]) else p_values[i])
    adjusted, running = [math.nan] * n, 0.0
    for place, index in enumerate(order):
        if not math.isnan(p_values[index]):
            running = max(running, min(1.0, (n - place) * p_values[index]))
            adjusted[index] = running
    return adjusted


def detectable(stderr: float, df: float = math.inf) -> float:
    """Smallest true difference that a two-sided test at `ALPHA` sees with probability `POWER`, given the
    standard error of the difference (Student's t; for infinite df 2.80 standard errors)."""
    return float(student.ppf(1 - ALPHA / 2, df) + student.ppf(POWER, df)) * stderr


def documents_for(difference: float, flips: float) -> float:
    """How many independent documents of one task make an accuracy's `difference` detectable, where a share
    `flips` of them changes between right and wrong: the standard error of the paired difference over n
    documents is then sqrt(flips / n) (McNemar; Connor 1987)."""
    z = float(normal.ppf(1 - ALPHA / 2) + normal.ppf(POWER))
    return flips * (z / difference) ** 2


def _satterthwaite(variances: Sequence[float], dfs: Sequence[float]) -> float:
    """Degrees of freedom of a sum of variance estimates (Satterthwaite 1946); NaN where one is unknown or
    has none, as of a single document."""
    parts = [(variance, df) for variance, df in zip(variances, dfs, strict=True) if variance]
    if any(math.isnan(variance) or df == 0 for variance, df in parts):
        return math.nan
    weight = sum(variance**2 / df for variance, df in parts)
    return sum(variances) ** 2 / weight if weight else math.inf
