"""The bootstrap over clusters that every resampled number of this project comes from.

Documents that share a source (passages of one text, questions about one passage) are not independent: whole
clusters are drawn with replacement, and a mean is the ratio of two totals over them (Efron and Tibshirani,
An Introduction to the Bootstrap, ch. 8; Cochran, Sampling Techniques, ch. 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
SEED = 20240404
_AT_A_TIME = 250


def ratio_bootstrap(
    totals: NDArray[np.float64],
    weights: NDArray[np.float64],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> NDArray[np.float64]:
    """Resampled values of k ratios over the same draws, so that what is computed from two of them is paired.

    Args:
        totals: [m, k], the sum of each of k quantities over the documents of each of m clusters.
        weights: [m] or [m, k], what each is divided by: documents or tokens of the cluster.

    Returns:
        float64 [resamples, k]: sum(totals) / sum(weights) over m clusters drawn with replacement.

    Raises ValueError for fewer than two clusters: nothing can be said about their spread.
    """
    m = len(totals)
    if m < 2:
        raise ValueError(f"a bootstrap over {m} cluster(s): at least 2 are needed")
    weights = weights.reshape(m, -1)
    generator = np.random.default_rng(seed)
    found = []
    for begin in range(0, resamples, _AT_A_TIME):
        size = min(_AT_A_TIME, resamples - begin)
        counts = generator.multinomial(m, np.full(m, 1 / m), size=size).astype(np.float64)
        # Not by a matrix library, whose order of summation depends on its threads.
        found.append(np.einsum("bm,mk->bk", counts, totals) / np.einsum("bm,mk->bk", counts, weights))
    return np.concatenate(found)


def by_cluster(clusters: Sequence[Any], *columns: ArrayLike) -> NDArray[np.float64]:
    """float64 [m, columns]: each column summed over the documents of a cluster, clusters in sorted order."""
    names, place = np.unique(np.asarray(clusters), return_inverse=True)
    totals = np.zeros((len(names), len(columns)))
    for index, column in enumerate(columns):
        np.add.at(totals[:, index], place, np.asarray(column, dtype=np.float64))
    return totals
