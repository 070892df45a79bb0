"""harness/stats.py against scipy, exhaustive enumeration and simulation."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness import resample, stats
from harness.stats import Estimate
from tests.harness.rows import Rows, passage_rows, task_rows

outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40)


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


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_mcnemar_of_clusters_by_enumeration(net: list[int]) -> None:
    """Of all 2^m ways to choose the sign of each cluster's change, the share at least as lopsided."""
    seen = abs(sum(net))
    ways = [
        abs(sum(s * k for s, k in zip(way, net, strict=True)))
        for way in itertools.product((-1, 1), repeat=len(net))
    ]
    expected = sum(way >= seen for way in ways) / len(ways)
    assert stats.mcnemar_clustered(net) == pytest.approx(expected)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (3, 0), (2, 7), (40, 61), (300, 240)])
def test_mcnemar_of_clusters_of_one_is_mcnemars(lost: int, gained: int) -> None:
    net = [-1] * lost + [1] * gained + [0] * 5
    assert stats.mcnemar_clustered(net) == pytest.approx(stats.mcnemar_exact(lost, gained))


@given(outcomes)
def test_paired_mean_counts_flips_with_scipys_error(pairs: list[tuple[bool, bool]]) -> None:
    before, after = np.array(pairs, dtype=float).T
    paired = stats.paired_mean(task_rows(before), task_rows(after), "acc")
    assert paired.difference.value == pytest.approx(after.mean() - before.mean())
    assert paired.lost == sum(a and not b for a, b in pairs)
    assert paired.gained == sum(b and not a for a, b in pairs)
    assert paired.test == "McNemar exact"
    flips = [paired.lost, paired.gained]
    assert paired.difference.p_value() == pytest.approx(
        scipy.stats.binomtest(flips[0], sum(flips)).pvalue if sum(flips) else 1
    )
    low, high = paired.difference.interval()
    assert -1 <= low < high <= 1
    if len(set(after - before)) > 1:
        assert paired.difference.stderr == pytest.approx(scipy.stats.sem(after - before))
    else:
        assert paired.difference.stderr > 0, "no flip seen is no certainty"


def test_flip_interval_covers() -> None:
    """Enumerated, not simulated: every way that 25 documents can split into lost, gained and neither."""
    n, lost_rate, gained_rate = 25, 0.12, 0.04
    covered = 0.0
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            chance = scipy.stats.multinomial.pmf(
                [lost, gained, n - lost - gained], n, [lost_rate, gained_rate, 0.84]
            )
            low, high = stats.flip_error(lost, gained, n)[1]
            covered += chance * (low <= gained_rate - lost_rate <= high)
    assert 0.94 < covered < 0.98


@given(st.lists(st.floats(0, 1), min_size=3, max_size=30), st.integers(0, 10**6))
def test_other_metrics_are_a_paired_t_test(before: list[float], seed: int) -> None:
    after = np.array(before) + np.random.default_rng(seed).normal(0, 1, len(before))
    paired = stats.paired_mean(task_rows(before, "f1"), task_rows(after, "f1"), "f1")
    reference = scipy.stats.ttest_rel(after, before)
    assert paired.test == "paired t"
    assert paired.difference.p_value() == pytest.approx(reference.pvalue)
    assert paired.difference.interval() == pytest.approx(tuple(reference.confidence_interval(0.95)))


@given(outcomes, st.randoms(use_true_random=False))
def test_paired_mean_ignores_order_and_swaps_sign(pairs: list[tuple[bool, bool]], rng: random.Random) -> None:
    before, after = (task_rows(side) for side in zip(*pairs, strict=True))
    there, back = stats.paired_mean(before, after, "acc"), stats.paired_mean(after, before, "acc")
    assert (there.lost, there.gained) == (back.gained, back.lost)
    assert there.difference.p_value() == back.difference.p_value()
    assert there.difference.value == -back.difference.value
    assert there.difference.interval() == pytest.approx(
        [-bound for bound in back.difference.interval()[::-1]]
    )
    rng.shuffle(after)
    assert stats.paired_mean(before, after, "acc") == there


def test_a_metric_that_is_not_right_or_wrong_has_no_flips() -> None:
    paired = stats.paired_mean(task_rows([0.5, 1.0], "f1"), task_rows([0.75, 0.5], "f1"), "f1")
    assert (paired.lost, paired.gained) == (None, None)
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
    with pytest.raises(ValueError, match=r"1 of 3 in the reference alone, 0 of 2 not in it \(doc_id: 2\)"):
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

    with pytest.raises(ValueError, match="no tokens in passage 1"):
        stats.log_perplexity(passage_rows([3, 4], [5, 0]))
    with pytest.raises(ValueError, match="sample row 2 has no doc_id"):
        stats.paired_mean(rows, [rows[0], {"metrics": {}}], "acc")
    words = task_rows([1, 0, 1])
    words[2]["metrics"]["acc"] = "yes"
    with pytest.raises(ValueError, match="metric 'acc' of doc_id 2 is no number: 'yes'"):
        stats.document_mean(words, "acc")


def test_log_perplexity_of_equal_passages_is_scipys_bootstrap_of_the_mean() -> None:
    nll = np.random.default_rng(2).gamma(3, 10, 40)
    estimate = stats.log_perplexity(passage_rows(nll, [10] * 40))
    reference = scipy.stats.bootstrap((nll / 10,), np.mean, n_resamples=20000, rng=np.random.default_rng(1))
    assert estimate.value == pytest.approx(nll.mean() / 10)
    assert estimate.stderr == pytest.approx(reference.standard_error, rel=0.03)
    assert estimate.df == 39


def test_bootstrap_t_written_out() -> None:
    """Interval and p-value against a plain loop over resamples drawn another way."""
    rng = np.random.default_rng(8)
    tokens = rng.integers(20, 300, 12)
    change = tokens * rng.normal(0.05, 0.12, 12)

    def ratio_and_error(y: np.ndarray, w: np.ndarray) -> tuple[float, float]:
        value = y.sum() / w.sum()
        return value, math.sqrt(len(y) / (len(y) - 1) * ((y - value * w) ** 2).sum()) / w.sum()

    value, error = ratio_and_error(change, tokens)
    quotients = []
    for _ in range(20000):
        draw = rng.integers(0, 12, 12)
        other, own = ratio_and_error(change[draw], tokens[draw])
        quotients.append(abs(other - value) / own)
    estimate = stats.paired_log_perplexity(passage_rows(np.zeros(12), tokens), passage_rows(change, tokens))
    low, high = estimate.interval()
    assert (low + high) / 2 == pytest.approx(value)
    assert (high - low) / 2 == pytest.approx(np.quantile(quotients, 0.95) * error, rel=0.04)
    p = np.mean(np.array(quotients) >= abs(value) / error)
    assert estimate.p_value() == pytest.approx(p, abs=0.015)
    assert 0.02 < p < 0.6, "a p-value that says something"


@given(
    st.lists(st.tuples(st.floats(-9, 9), st.integers(1, 99)), min_size=2, max_size=3),
    st.floats(-3, 3),
)
@example([(1.0, 10), (2.0, 10)], 0.0)
@settings(max_examples=40)
def test_two_or_three_clusters_have_students_interval(
    passages: list[tuple[float, int]], shift: float
) -> None:
    """One in two or one in nine resamples is a single cluster, which has no spread: no bootstrap-t then."""
    totals, weights = np.array(passages).T
    totals = totals + shift * weights
    estimate = stats.ratio(totals, weights)
    value, m = totals.sum() / weights.sum(), len(totals)
    spread = math.sqrt(m / (m - 1) * ((totals - value * weights) ** 2).sum()) / weights.sum()
    low, high = scipy.stats.t.interval(0.95, m - 1, 0, 1)
    expected = (value + low * spread, value + high * spread)
    assert estimate.interval() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    if spread > 1e-9:
        assert estimate.p_value() == pytest.approx(2 * scipy.stats.t.sf(abs(value) / spread, m - 1), rel=1e-6)


def test_equal_clusters_are_students_sample() -> None:
    estimate = stats.ratio(np.array([1.0, 2.0, 4.0]), np.full(3, 10.0))
    reference = scipy.stats.ttest_1samp([0.1, 0.2, 0.4], 0)
    assert estimate.interval() == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert estimate.p_value() == pytest.approx(reference.pvalue)


@pytest.mark.parametrize(
    ("totals", "weights"), [([1, 2, 4, 3], [10] * 4), ([0.3, 0.1, 0.7, -0.2], [3, 7, 9, 5])]
)
def test_four_clusters_by_enumeration(totals: list[float], weights: list[int]) -> None:
    """All 256 resamples, in exact arithmetic: four of them are a single cluster and infinitely extreme."""
    y, w = [Fraction(str(x)) for x in totals], [Fraction(x) for x in weights]

    def squares(draw: tuple[int, ...]) -> tuple[Fraction, Fraction]:
        whole = sum((w[i] for i in draw), Fraction(0))
        value = sum((y[i] for i in draw), Fraction(0)) / whole
        rest = sum(((y[i] - value * w[i]) ** 2 for i in draw), Fraction(0))
        return value, Fraction(4, 3) * rest / whole**2

    value, own = squares((0, 1, 2, 3))
    quotients = []
    for draw in itertools.product(range(4), repeat=4):
        other, error = squares(draw)
        quotients.append(math.sqrt((other - value) ** 2 / error) if error else math.inf)
    assert sum(map(math.isinf, quotients)) == 4
    estimate = stats.ratio(np.array(totals, dtype=float), np.array(weights, dtype=float))
    low, high = estimate.interval()
    reach = (high - low) / 2 / math.sqrt(own)
    # The quantile of 10,000 draws lies between those of the enumerated resamples around it.
    assert np.quantile(quotients, 0.94) * 0.999 <= reach <= np.quantile(quotients, 0.96) * 1.001 < 50
    seen = abs(float(value)) / math.sqrt(own)
    share = np.mean([quotient >= seen * (1 - 1e-9) for quotient in quotients])
    assert estimate.p_value() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("m", [2, 3, 4, 6])
def test_the_order_of_summation_changes_nothing(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resampled sums off by a few units in the last place, as another machine's are."""
    plain, noise = resample.ratio_bootstrap, np.random.default_rng(0)

    def elsewhere(totals: np.ndarray, weights: np.ndarray) -> np.ndarray:
        found = plain(totals, weights)
        return found * (1 + 4e-16 * noise.integers(-2, 3, found.shape))

    rng = np.random.default_rng(m)
    for totals, weights in (
        (np.arange(1.0, m + 1), np.full(m, 10.0)),
        (rng.normal(0.1, 0.3, m), rng.integers(20, 300, m).astype(float)),
        (np.full(m, 0.3), np.full(m, 7.0)),
    ):
        here = stats.ratio(totals, weights)
        with monkeypatch.context() as patched:
            patched.setattr("harness.resample.ratio_bootstrap", elsewhere)
            there = stats.ratio(totals, weights)
        assert there.interval() == pytest.approx(here.interval(), rel=1e-9, abs=1e-12)
        assert there.p_value() == pytest.approx(here.p_value(), rel=1e-9)
        assert max(map(abs, here.interval())) < 30 * (abs(totals) / weights).max()


def test_a_p_value_of_resamples_is_never_zero() -> None:
    rows = passage_rows(np.full(30, 30.0), np.full(30, 10))
    worse = passage_rows(np.random.default_rng(0).normal(60, 1, 30), np.full(30, 10))
    assert stats.paired_log_perplexity(rows, worse).p_value() == 1 / 10001
    assert stats.paired_log_perplexity(rows, rows) == Estimate(0.0, 0.0, 29, (0.0, 0.0), 1.0)


@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(1, 99)), min_size=3, max_size=12))
@settings(max_examples=25)
def test_swapping_sides_swaps_the_sign(passages: list[tuple[float, int]]) -> None:
    change, tokens = zip(*passages, strict=True)
    first, second = passage_rows([0.0] * len(change), tokens), passage_rows(change, tokens)
    there, back = stats.paired_log_perplexity(first, second), stats.paired_log_perplexity(second, first)
    assert there.value == -back.value
    assert there.stderr == pytest.approx(back.stderr)
    assert there.p_value() == pytest.approx(back.p_value(), abs=2e-4)
    assert there.interval() == pytest.approx([-bound for bound in back.interval()[::-1]])


def simulated(rng: np.random.Generator, passages: int) -> tuple[Rows, Rows, list[np.ndarray]]:
    """Unequal passages, hard and easy ones; the change differs by passage and is 0.1 nats on average."""
    tokens = rng.integers(20, 300, passages)
    before = tokens * rng.normal(3.0, 0.4, passages)
    after = before + tokens * rng.normal(0.1, 0.2, passages)
    return passage_rows(before, tokens), passage_rows(after, tokens), [before, after, tokens]


def test_errors_of_log_perplexity_are_those_of_resampled_passages() -> None:
    rng = np.random.default_rng(7)
    first, second, (before, after, tokens) = simulated(rng, 60)
    draws = rng.integers(0, 60, (20000, 60))
    totals = tokens[draws].sum(1)
    single = (before[draws].sum(1) / totals).std()
    paired = ((after - before)[draws].sum(1) / totals).std()
    assert stats.log_perplexity(first).stderr == pytest.approx(single, rel=0.03)
    difference = stats.paired_log_perplexity(first, second)
    assert difference.stderr == pytest.approx(paired, rel=0.03)
    assert difference.value == pytest.approx((after.sum() - before.sum()) / tokens.sum())
    assert difference.stderr < stats.log_perplexity(first).stderr / 1.5, "pairing is there to gain precision"


@pytest.mark.parametrize("skewed", [False, True])
def test_the_interval_covers_the_truth_and_p_agrees(skewed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 95 % interval of the paired difference holds the true value in about 95 % of simulated runs of few
    passages, skewed or not; and it leaves 0 out where p is below 5 %."""
    monkeypatch.setattr("harness.resample.ratio_bootstrap", partial(resample.ratio_bootstrap, resamples=999))
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(800):
        tokens = rng.integers(20, 300, 20)
        harm = 0.1 + (0.15 * (rng.standard_exponential(20) - 1) if skewed else rng.normal(0, 0.15, 20))
        found = stats.paired_log_perplexity(
            passage_rows(np.zeros(20), tokens), passage_rows(tokens * harm, tokens)
        )
        low, high = found.interval()
        hits += low <= 0.1 <= high
        assert (low > 0 or high < 0) == (found.p_value() <= 0.05)
    assert 0.92 < hits / 800 < 0.98


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
    assert math.isnan(first.stderr) == (len(passages) == 1), "one passage says nothing of its spread"


def test_not_finite_scores_stay_visible() -> None:
    rows = passage_rows([3, 4], [5, 6])
    rows[0]["nll"] = None
    assert math.isnan(stats.log_perplexity(rows).value)
    assert math.isnan(stats.paired_log_perplexity(rows, passage_rows([3, 4], [5, 6])).p_value())
    lost = stats.paired_mean(task_rows([1, 0]), task_rows([math.nan, 0]), "acc")
    assert math.isnan(lost.difference.value) and math.isnan(lost.difference.p_value())
    assert math.isnan(stats.recovery(task_rows([1, 0]), task_rows([math.nan, 0]), "acc", 0.1).value)


@given(st.floats(-5, 5), st.floats(0.01, 5), st.integers(1, 200))
def test_interval_and_p_value_agree(value: float, stderr: float, df: int) -> None:
    estimate = Estimate(value, stderr, df)
    low, high = estimate.interval()
    assert (low > 0 or high < 0) == (estimate.p_value() < 0.05)
    assert all(math.isnan(bound) for bound in Estimate(value).interval())
