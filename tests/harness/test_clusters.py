"""Statistics of documents that share a text, of right answers and of recovery, against scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats

from harness import stats
from harness.documents import cluster_errors
from tests.harness.rows import Rows, clustered, task_rows


def test_documents_that_share_a_text_are_one_cluster() -> None:
    """Every document twice under one cluster is as much evidence as once: s/sqrt(n) would claim more."""
    rng = np.random.default_rng(4)
    once = rng.integers(0, 2, 80).astype(float)
    twice = clustered(task_rows(np.repeat(once, 2)), [f"text {i}" for i in np.repeat(np.arange(80), 2)])
    naive, honest = stats.mean(list(np.repeat(once, 2))), stats.document_mean(twice, "acc")
    assert honest.value == naive.value
    assert honest.stderr == pytest.approx(stats.mean(list(once)).stderr, rel=0.03)
    assert honest.stderr > 1.3 * naive.stderr
    assert honest.df == 79
    alone = clustered(task_rows(once), [None] * 40 + [f"text {i}" for i in range(40)])
    assert stats.document_mean(alone, "acc") == stats.mean(list(once)), "no two share one"


def test_the_recorded_error_of_clusters_is_the_same_number() -> None:
    rng = np.random.default_rng(6)
    rows = clustered(task_rows(rng.integers(0, 2, 50)), [f"{i}" for i in rng.integers(0, 20, 50)])
    recorded = cluster_errors(rows, ["acc"])["acc"]
    assert stats.document_mean(rows, "acc").stderr == pytest.approx(recorded, rel=1e-12)


def test_flips_of_one_text_count_once() -> None:
    """Six answers about one text lost together are one event, six about six texts are six."""
    before, after = np.ones(40), np.ones(40)
    after[:6] = 0
    together = [f"text {max(0, i - 5)}" for i in range(40)]
    apart = [f"text {i % 39}" for i in range(40)]
    results = [
        stats.paired_mean(clustered(task_rows(before), names), clustered(task_rows(after), names), "acc")
        for names in (together, apart)
    ]
    assert [result.test for result in results] == ["McNemar exact, clustered"] * 2
    assert [(result.lost, result.gained, result.n) for result in results] == [(6, 0, 40)] * 2
    assert [result.difference.p_value() for result in results] == [1.0, 2 * 0.5**6]
    assert results[0].difference.stderr > 1.5 * results[1].difference.stderr
    low, high = results[0].difference.interval()
    assert low < 0 < high
    same = stats.paired_mean(clustered(task_rows(before), apart), clustered(task_rows(before), apart), "acc")
    assert (same.difference.value, same.difference.p_value()) == (0.0, 1.0)
    assert same.difference.stderr > 0


def test_other_metrics_of_clusters_are_resampled() -> None:
    rng = np.random.default_rng(9)
    before, names = rng.random(60), [f"{i}" for i in np.repeat(np.arange(20), 3)]
    after = before + np.repeat(rng.normal(0.1, 0.2, 20), 3)
    paired = stats.paired_mean(
        clustered(task_rows(before, "f1"), names), clustered(task_rows(after, "f1"), names), "f1"
    )
    assert paired.test == "bootstrap over clusters"
    assert paired.difference.stderr == pytest.approx(scipy.stats.sem((after - before)[::3]), rel=0.06)


def gold_rows(likelihoods: Any, gold: Any = 1) -> Rows:
    return [
        {**row, "choices": [-9.0, float(value)], "gold": gold}
        for row, value in zip(task_rows([0] * len(likelihoods)), likelihoods, strict=True)
    ]


def test_right_answers_are_paired() -> None:
    rng = np.random.default_rng(1)
    before = rng.normal(-3, 2, 30)
    after = before - rng.normal(0.5, 0.3, 30)
    paired = stats.paired_gold(gold_rows(before), gold_rows(after))
    assert stats.document_mean(stats.gold_rows(gold_rows(before)), "gold").value == pytest.approx(
        before.mean()
    )
    assert paired.difference.p_value() == pytest.approx(scipy.stats.ttest_rel(after, before).pvalue)
    assert (paired.lost, paired.gained, paired.test) == (None, None, "paired t")
    for wrong in (2, -1, "B", None):
        with pytest.raises(
            ValueError, match="no right answer among the choices of doc_id 0, 1, 2 and 27 more"
        ):
            stats.gold_rows(gold_rows(before, wrong))


def test_recovery_is_the_quotient_on_the_same_draws() -> None:
    rng = np.random.default_rng(5)
    before = (rng.random(300) < 0.8).astype(float)
    after = np.where(rng.random(300) < 0.1, 1 - before, before)
    found = stats.recovery(task_rows(before), task_rows(after), "acc", 0.5)
    assert found.value == pytest.approx((after.mean() - 0.5) / (before.mean() - 0.5))
    reference = scipy.stats.bootstrap(
        (before, after),
        lambda f, q, axis: (q.mean(axis) - 0.5) / (f.mean(axis) - 0.5),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=10000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert found.interval() == pytest.approx((reference.low, reference.high), abs=0.015)
    quarter = (reference.high - reference.low) / 4
    assert found.stderr == pytest.approx(quarter, rel=0.1)
    assert found.df == 299
    same = stats.recovery(task_rows(before), task_rows(before), "acc", 0.5)
    assert (same.value, *same.interval()) == (1.0, 1.0, 1.0)
    doubled = [f"text {i // 2}" for i in range(300)]
    wide = stats.recovery(
        clustered(task_rows(np.repeat(before[::2], 2)), doubled),
        clustered(task_rows(np.repeat(after[::2], 2)), doubled),
        "acc",
        0.5,
    )
    narrow = stats.recovery(
        task_rows(np.repeat(before[::2], 2)), task_rows(np.repeat(after[::2], 2)), "acc", 0.5
    )
    widths = [high - low for low, high in (wide.interval(), narrow.interval())]
    assert widths[0] > 1.2 * widths[1]
    assert wide.stderr > 1.2 * narrow.stderr
