"""harness/inference.py against hand-computed tables, scipy, statsmodels' published example and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from harness import inference, stats
from harness.stats import Estimate


def test_average_has_welchs_degrees_of_freedom() -> None:
    """Half the difference of two means is the average of the first and the negated second."""
    rng = np.random.default_rng(5)
    a, b = rng.normal(0, 1, 12), rng.normal(0.5, 4, 30)
    estimate = inference.average([stats.mean(list(a)), stats.mean(list(-b))])
    reference = scipy.stats.ttest_ind(a, b, equal_var=False)
    assert estimate.df == pytest.approx(reference.df)
    assert estimate.p_value() == pytest.approx(reference.pvalue)
    assert estimate.value == pytest.approx((a.mean() - b.mean()) / 2)


def test_an_average_with_a_single_document_has_no_test() -> None:
    estimate = inference.average([Estimate(0.5, 0.1, 0), Estimate(0.4, 0.1, 9)])
    assert (estimate.value, estimate.stderr) == pytest.approx((0.45, math.sqrt(0.02) / 2))
    assert math.isnan(estimate.df)
    assert math.isnan(estimate.p_value())


def test_over_seeds() -> None:
    one = Estimate(0.5, 0.1, 9)
    assert inference.over_seeds([one]) == one
    same = inference.over_seeds(
        [one, one, one]
    )  # the documents are the same: seeds do not shrink their error
    assert (same.value, same.stderr, same.df) == pytest.approx((0.5, 0.1, 9))
    apart = inference.over_seeds([Estimate(1.0, 0.0, 9), Estimate(2.0, 0.0, 9), Estimate(6.0, 0.0, 9)])
    assert apart.stderr == pytest.approx(scipy.stats.sem([1.0, 2.0, 6.0]))
    assert apart.df == 2
    assert math.isnan(inference.over_seeds([one, Estimate(0.5)]).stderr)


def test_the_error_over_seeds_is_not_too_small() -> None:
    """Simulated documents (shared by three seeds) and seeds: the stated error reaches the true one."""
    rng = np.random.default_rng(11)
    means, stated = [], []
    for _ in range(1500):
        documents = rng.normal(0, 1, 40)
        seeds = [stats.mean(list(documents + rng.normal(0, 0.3) + rng.normal(0, 0.5, 40))) for _ in range(3)]
        estimate = inference.over_seeds(seeds)
        means.append(estimate.value)
        stated.append(estimate.stderr**2)
    ratio = math.sqrt(np.mean(stated)) / np.std(means)
    assert 0.98 < ratio < 1.2


@pytest.mark.parametrize("sampling", [0.05, 1.0])
def test_a_value_like_its_draws_is_rarely_told_from_them(sampling: float) -> None:
    """Where a choice is but one more draw, 5 % of tests say otherwise, at the most; `over_seeds`, which asks
    about the mean of the draws, says so in a third of them."""
    generator = np.random.default_rng(0)
    found, naive = [], []
    for _ in range(1000):
        documents = sampling * generator.standard_normal()
        gaps = generator.standard_normal() - generator.standard_normal(5) + documents
        estimates = [Estimate(float(gap), sampling, math.inf) for gap in gaps]
        difference = inference.as_one_more(estimates)
        assert difference is not None
        found.append(difference.p_value())
        naive.append(inference.over_seeds(estimates).p_value())
    assert np.mean(np.array(found) < 0.05) < 0.065
    if sampling < 0.1:
        assert np.mean(np.array(found) < 0.05) > 0.03
        assert np.mean(np.array(naive) < 0.05) > 0.25


def test_draws_that_agree_by_chance_keep_the_least_spread() -> None:
    alike = [Estimate(-1.0, 0.1)] * 5
    free, held = inference.as_one_more(alike), inference.as_one_more(alike, least_sd=1.0)
    assert free is not None and free.stderr == pytest.approx(0.1)
    assert held is not None and held.stderr == pytest.approx(math.sqrt(0.01 + 1.2))
    assert held.value == free.value == -1.0


def test_one_draw_tells_nothing() -> None:
    assert inference.as_one_more([Estimate(1.0, 0.1)]) is None


def test_seeds_and_sampling_are_told_apart() -> None:
    """Seeds that differ on documents known exactly, and documents that differ under seeds that do not."""
    values = [1.0, 2.0, 6.0]
    seeds = inference.spread([Estimate(value, 0.0, 9) for value in values])
    reference = scipy.stats.t.interval(0.95, 2, 3.0, scipy.stats.sem(values))
    assert (seeds.seeds, seeds.sampling) == (3, 0.0)
    assert seeds.sd == pytest.approx(np.std(values, ddof=1))
    assert seeds.over.interval() == pytest.approx(reference)
    documents = inference.spread([Estimate(3.0, 0.4, 9)] * 3)
    assert (documents.sd, documents.over.stderr) == (0.0, 0.0)
    assert documents.sampling == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        # By hand: sorted, times 4, 3, 2, 1, and never below the one before.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5], [0.5]),
        ([0.9, 0.8], [1.0, 1.0]),
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
        ([], []),
    ],
)
def test_holm_by_hand(p: list[float], adjusted: list[float]) -> None:
    assert inference.holm(p) == pytest.approx(adjusted)


def test_holm_counts_what_is_not_known() -> None:
    found = inference.holm([0.01, math.nan, 0.02])
    assert found[0] == pytest.approx(0.03), "three comparisons, not two"
    assert math.isnan(found[1])
    assert found[2] == pytest.approx(0.04)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_holm_decides_as_the_step_down_procedure(p: list[float], rng: object) -> None:
    """Reject in ascending order while p <= alpha / (comparisons left), the definition of 1979."""
    adjusted = inference.holm(p)
    for alpha in (0.01, 0.05, 0.3):
        order, rejected = sorted(range(len(p)), key=p.__getitem__), set()
        for place, index in enumerate(order):
            if p[index] * (len(p) - place) > alpha:
                break
            rejected.add(index)
        assert {i for i, q in enumerate(adjusted) if q <= alpha} == rejected
    assert all(q >= first for q, first in zip(adjusted, p, strict=True))


def test_holm_keeps_the_familywise_error() -> None:
    """Six comparisons without any real difference: some mark in at most 5 % of runs, where plain p-values
    would give one in a quarter of them."""
    rng = np.random.default_rng(0)
    runs = rng.random((4000, 6))
    assert np.mean(runs.min(axis=1) <= 0.05) > 0.2
    assert np.mean([min(inference.holm(list(run))) <= 0.05 for run in runs]) == pytest.approx(0.05, abs=0.011)


def test_what_is_said_to_be_detectable_is_detected() -> None:
    """Simulated paired t-tests at the stated difference find it in 80 % of runs."""
    rng = np.random.default_rng(2)
    n = 40
    difference = inference.detectable(1 / math.sqrt(n), n - 1)
    runs = rng.normal(difference, 1, (4000, n))
    found = scipy.stats.ttest_1samp(runs, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.80, abs=0.025)


def test_documents_for_a_point_of_accuracy() -> None:
    """By hand: 10 % flips, one point: 0.1 * (1.960 + 0.842)^2 / 0.01^2; and those documents detect it."""
    needed = inference.documents_for(0.01, 0.1)
    assert needed == pytest.approx(0.1 * (1.959964 + 0.841621) ** 2 / 0.01**2, rel=1e-5)
    assert inference.detectable(math.sqrt(0.1 / needed)) == pytest.approx(0.01, rel=1e-3)
    rng = np.random.default_rng(3)
    n = 7849
    flips = rng.multinomial(n, [0.055, 0.045, 0.9], size=1500)
    found = [stats.mcnemar_exact(int(lost), int(gained)) <= 0.05 for lost, gained, _ in flips]
    assert np.mean(found) == pytest.approx(0.80, abs=0.04)
