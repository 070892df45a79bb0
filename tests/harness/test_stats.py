"""harness/stats.py against scipy, exhaustive enumeration, the bootstrap and simulation."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from harness import stats
from harness.stats import Estimate

Rows = list[dict[str, Any]]
outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40)


def task_rows(values: Any, metric: str = "acc") -> Rows:
    return [
        {"doc_id": i, "doc_hash": f"hash{i}", "metrics": {metric: float(v)}} for i, v in enumerate(values)
    ]


def passage_rows(nll: Any, tokens: Any) -> Rows:
    return [
        {"window": 0, "passage": i, "nll": float(n), "tokens": int(t)}
        for i, (n, t) in enumerate(zip(nll, tokens, strict=True))
    ]


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=50))
def test_mean_is_scipys_sem(values: list[float]) -> None:
    estimate = stats.mean(values)
    assert estimate.value == pytest.approx(np.mean(values), rel=1e-9, abs=1e-9)
    assert estimate.stderr == pytest.approx(scipy.stats.sem(values), rel=1e-9, abs=1e-9)


def test_one_value_has_no_error_and_no_value_is_refused() -> None:
    assert math.isnan(stats.mean([3.0]).stderr)
    assert math.isnan(stats.mean([3.0]).p_value())
    with pytest.raises(ValueError, match="no values"):
        stats.mean([])


@pytest.mark.parametrize("flips", range(11))
def test_mcnemar_by_enumeration(flips: int) -> None:
    """Of all 2^n ways that n flips can go, the share at least as lopsided as the one seen."""
    ways = [abs(sum(way)) for way in itertools.product((-1, 1), repeat=flips)]
    for lost in range(flips + 1):
        seen = abs(flips - 2 * lost)
        expected = sum(way >= seen for way in ways) / len(ways)
        assert stats.mcnemar_exact(lost, flips - lost) == pytest.approx(expected)


@given(outcomes)
def test_paired_mean_is_scipys_paired_t_test(pairs: list[tuple[bool, bool]]) -> None:
    before, after = np.array(pairs, dtype=float).T
    paired = stats.paired_mean(task_rows(before), task_rows(after), "acc")
    assert paired.difference.value == pytest.approx(after.mean() - before.mean())
    assert paired.lost == sum(a and not b for a, b in pairs)
    assert paired.gained == sum(b and not a for a, b in pairs)
    if len(set(after - before)) > 1:
        reference = scipy.stats.ttest_rel(after, before)
        assert paired.difference.p_value() == pytest.approx(reference.pvalue)
        assert paired.difference.interval() == pytest.approx(tuple(reference.confidence_interval(0.95)))
    else:
        assert paired.difference.p_value() == (1.0 if (before == after).all() else 0.0)


@given(outcomes, st.randoms(use_true_random=False))
def test_paired_mean_ignores_order_and_swaps_sign(pairs: list[tuple[bool, bool]], rng: random.Random) -> None:
    before, after = (task_rows(side) for side in zip(*pairs, strict=True))
    there, back = stats.paired_mean(before, after, "acc"), stats.paired_mean(after, before, "acc")
    assert (there.lost, there.gained, there.mcnemar) == (back.gained, back.lost, back.mcnemar)
    assert there.difference.value == -back.difference.value
    rng.shuffle(after)
    assert stats.paired_mean(before, after, "acc") == there


def test_a_metric_that_is_not_right_or_wrong_has_no_flips() -> None:
    paired = stats.paired_mean(task_rows([0.5, 1.0], "f1"), task_rows([0.75, 0.5], "f1"), "f1")
    assert (paired.lost, paired.gained, paired.mcnemar) == (None, None, None)
    assert paired.difference.value == pytest.approx(-0.125)


def test_joins_refuse_what_is_not_the_same() -> None:
    rows, nll = task_rows([1, 0, 1]), passage_rows([3, 4], [5, 6])
    other = task_rows([1, 0, 1])
    other[1]["doc_hash"] = "another text"
    with pytest.raises(ValueError, match=r"doc_hash differs at doc_id \(1,\): hash1 in the reference"):
        stats.paired_mean(rows, other, "acc")
    del other[1]["doc_hash"]
    with pytest.raises(ValueError, match="doc_hash differs"):
        stats.paired_mean(rows, other, "acc")
    with pytest.raises(ValueError, match="not of the same documents: 1 of 3 in the reference alone, 0 of 2"):
        stats.paired_mean(rows, rows[:2], "acc")
    with pytest.raises(ValueError, match="two sample rows with doc_id"):
        stats.paired_mean(rows, [*rows, rows[0]], "acc")
    with pytest.raises(ValueError, match="one side has none"):
        stats.paired_mean([], rows, "acc")
    with pytest.raises(ValueError, match="no metric 'f1'"):
        stats.paired_mean(rows, rows, "f1")
    with pytest.raises(ValueError, match=r"tokens differs at window, passage \(0, 1\)"):
        stats.paired_log_perplexity(nll, passage_rows([3, 4], [5, 7]))
    with pytest.raises(ValueError, match="not of the same documents"):
        stats.paired_log_perplexity(nll, nll[:1])


@given(st.lists(st.floats(0, 100), min_size=2, max_size=30))
def test_log_perplexity_of_equal_passages_is_the_plain_mean(nll: list[float]) -> None:
    estimate = stats.log_perplexity(passage_rows(nll, [10] * len(nll)))
    assert estimate.value == pytest.approx(np.mean(nll) / 10)
    assert estimate.stderr == pytest.approx(scipy.stats.sem(nll) / 10, rel=1e-6, abs=1e-9)


def simulated(rng: np.random.Generator, passages: int) -> tuple[Rows, Rows, list[np.ndarray]]:
    """Unequal passages, hard and easy ones; the change differs by passage and is 0.1 nats on average."""
    tokens = rng.integers(20, 300, passages)
    before = tokens * rng.normal(3.0, 0.4, passages)
    after = before + tokens * rng.normal(0.1, 0.2, passages)
    return passage_rows(before, tokens), passage_rows(after, tokens), [before, after, tokens]


def test_errors_of_log_perplexity_are_the_bootstraps() -> None:
    """Resampling whole passages is the reference for the delta method, unpaired and paired."""
    rng = np.random.default_rng(7)
    first, second, (before, after, tokens) = simulated(rng, 60)
    draws = rng.integers(0, 60, (20000, 60))
    totals = tokens[draws].sum(1)
    single = (before[draws].sum(1) / totals).std()
    paired = ((after - before)[draws].sum(1) / totals).std()
    assert stats.log_perplexity(first).stderr == pytest.approx(single, rel=0.05)
    difference = stats.paired_log_perplexity(first, second)
    assert difference.stderr == pytest.approx(paired, rel=0.05)
    assert difference.value == pytest.approx((after.sum() - before.sum()) / tokens.sum())
    assert difference.stderr < stats.log_perplexity(first).stderr / 1.5, "pairing is there to gain precision"


def test_the_interval_covers_the_truth() -> None:
    """The 95 % interval of the paired difference holds the true 0.1 in about 95 % of 1500 simulated runs."""
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(1500):
        first, second, _ = simulated(rng, 25)
        low, high = stats.paired_log_perplexity(first, second).interval(0.95)
        hits += low <= 0.1 <= high
    assert 0.92 < hits / 1500 < 0.97


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 9), st.integers(1, 9)), min_size=1, max_size=20))
def test_a_passage_cut_by_windows_is_one_cluster(pieces: list[tuple[int, float, int]]) -> None:
    cut = [
        {"window": window, "passage": passage, "nll": nll, "tokens": tokens}
        for window, (passage, nll, tokens) in enumerate(pieces)
    ]
    passages = sorted({passage for passage, _, _ in pieces})
    whole = passage_rows(
        [sum(nll for p, nll, _ in pieces if p == passage) for passage in passages],
        [sum(tokens for p, _, tokens in pieces if p == passage) for passage in passages],
    )
    first, second = stats.log_perplexity(cut), stats.log_perplexity(whole)
    assert first.value == pytest.approx(second.value)
    assert first.stderr == pytest.approx(second.stderr, nan_ok=True, abs=1e-9)
    assert first.df == len(passages) - 1


def test_not_finite_scores_stay_visible() -> None:
    rows = passage_rows([3, 4], [5, 6])
    rows[0]["nll"] = None
    assert math.isnan(stats.log_perplexity(rows).value)
    assert math.isnan(stats.paired_log_perplexity(rows, passage_rows([3, 4], [5, 6])).p_value())
    assert math.isnan(stats.paired_mean(task_rows([1, 0]), task_rows([math.nan, 0]), "acc").difference.value)


def test_average_has_welchs_degrees_of_freedom() -> None:
    """Half the difference of two means is the average of the first and the negated second."""
    rng = np.random.default_rng(5)
    a, b = rng.normal(0, 1, 12), rng.normal(0.5, 4, 30)
    estimate = stats.average([stats.mean(list(a)), stats.mean(list(-b))])
    reference = scipy.stats.ttest_ind(a, b, equal_var=False)
    assert estimate.df == pytest.approx(reference.df)
    assert estimate.p_value() == pytest.approx(reference.pvalue)
    assert estimate.value == pytest.approx((a.mean() - b.mean()) / 2)


def test_over_seeds() -> None:
    one = Estimate(0.5, 0.1, 9)
    assert stats.over_seeds([one]) == one
    same = stats.over_seeds([one, one, one])  # the documents are the same: seeds do not shrink their error
    assert (same.value, same.stderr, same.df) == pytest.approx((0.5, 0.1, 9))
    apart = stats.over_seeds([Estimate(1.0, 0.0, 9), Estimate(2.0, 0.0, 9), Estimate(6.0, 0.0, 9)])
    assert apart.stderr == pytest.approx(scipy.stats.sem([1.0, 2.0, 6.0]))
    assert apart.df == 2
    assert math.isnan(stats.over_seeds([one, Estimate(0.5)]).stderr)


def test_the_error_over_seeds_is_not_too_small() -> None:
    """Simulated documents (shared by three seeds) and seeds: the stated error reaches the true one."""
    rng = np.random.default_rng(11)
    means, stated = [], []
    for _ in range(1500):
        documents = rng.normal(0, 1, 40)
        seeds = [stats.mean(list(documents + rng.normal(0, 0.3) + rng.normal(0, 0.5, 40))) for _ in range(3)]
        estimate = stats.over_seeds(seeds)
        means.append(estimate.value)
        stated.append(estimate.stderr**2)
    ratio = math.sqrt(np.mean(stated)) / np.std(means)
    assert 0.98 < ratio < 1.2


@given(st.floats(-5, 5), st.floats(0.01, 5), st.integers(1, 200))
def test_interval_and_p_value_agree(value: float, stderr: float, df: int) -> None:
    estimate = Estimate(value, stderr, df)
    low, high = estimate.interval(0.95)
    assert (low > 0 or high < 0) == (estimate.p_value() < 0.05)
    assert all(math.isnan(bound) for bound in Estimate(value).interval())
