"""python -m harness.compare --within: what agrees with a run on another machine, and what does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from harness import compare
from harness.stats import Estimate
from harness.within import ALPHA, LIMIT, MARGIN, allowance
from tests.harness.runs import edit, perplexity_task, rewrite, rows_of, write_cell

CELLS = (("float", "w16a16"), ("rtn", "w4a16"), ("gptq", "w4a16"))


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("cpu", "gpu"):
        for row, bits in CELLS:
            write_cell(tmp_path / name, row, bits)
    return tmp_path / "cpu", tmp_path / "gpu"


def cell_of(run: Path, row: str) -> Path:
    return next(p.parent for p in run.glob("*/cell.json") if f'"row": "{row}"' in p.read_text())


def judged(capsys: pytest.CaptureFixture[str], runs: tuple[Path, Path]) -> tuple[int, str]:
    status = compare.main([*map(str, runs), "--within"])
    return status, capsys.readouterr().out


def outside(text: str) -> list[str]:
    return [line for line in text.splitlines() if "**outside**" in line]


def change_nll(folder: Path, change: Callable[[np.ndarray], np.ndarray], is_float: bool = False) -> None:
    """Give a cell other nats per token on one perplexity task."""
    rows = rows_of(folder, "perplexity_wikipedia")
    tokens = np.array([row["tokens"] for row in rows])
    nats = change(np.array([row["nll"] for row in rows]) / tokens)
    entry, rows = perplexity_task(nats, tokens, is_float)
    rewrite(folder, "perplexity_wikipedia", rows, metrics=entry["metrics"])


def test_a_run_agrees_with_itself(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    status, text = judged(capsys, runs)
    # Five tasks of three cells; questions of the quantised ones by score and by right answer.
    assert (status, text.splitlines()[-1]) == (0, "within bounds: all 21 comparisons of 3 cells")


@pytest.mark.parametrize("moved, status", [(0.5e-4, 0), (2e-4, 1)])
def test_a_float_cell_by_every_log_likelihood(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], moved: float, status: int
) -> None:
    def one(nats: np.ndarray) -> np.ndarray:
        return nats * (1 + moved * (np.arange(len(nats)) == 3))

    change_nll(cell_of(runs[1], "float"), one, is_float=True)
    found, text = judged(capsys, runs)
    assert found == status
    assert len(outside(text)) == status


@pytest.mark.parametrize("moved, status", [(0.009, 0), (-0.009, 0), (0.012, 1), (-0.012, 1)])
def test_a_log_perplexity_that_moves_everywhere_is_no_chance(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], moved: float, status: int
) -> None:
    change_nll(cell_of(runs[1], "rtn"), lambda nats: nats * (1 + moved))
    found, text = judged(capsys, runs)
    assert found == status
    assert [("rtn" in line, "log-perplexity" in line) for line in outside(text)] == [(True, True)] * status


@pytest.mark.parametrize("size, status", [(0.03, 0), (0.06, 1)])
def test_beyond_the_margin_chance_counts_up_to_a_limit(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], size: float, status: int
) -> None:
    """Passages move by far more than their mean does, either way."""

    def scattered(nats: np.ndarray) -> np.ndarray:
        noise = np.where(np.arange(len(nats)) % 2, 0.5, -0.5)
        tokens = np.array(
            [row["tokens"] for row in rows_of(cell_of(runs[0], "gptq"), "perplexity_wikipedia")]
        )
        noise += size * (nats @ tokens) / tokens.sum() - (noise @ tokens) / tokens.sum()
        return nats + noise

    change_nll(cell_of(runs[1], "gptq"), scattered)
    found, text = judged(capsys, runs)
    assert f"({size:+.2%})" in text
    assert found == status
    assert len(outside(text)) == status


@pytest.mark.parametrize("lost, gained, status", [(9, 9, 0), (4, 0, 0), (30, 2, 1), (2, 30, 1)])
def test_answers_may_differ_both_ways(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], lost: int, gained: int, status: int
) -> None:
    folder = cell_of(runs[1], "rtn")
    rows = rows_of(folder, "piqa_local")
    for old, new, count in ((1.0, 0.0, lost), (0.0, 1.0, gained)):
        for row in [row for row in rows if row["metrics"]["acc"] == old and "moved" not in row][:count]:
            row |= {"metrics": {"acc": new}, "moved": True}
    rewrite(folder, "piqa_local", rows)
    found, text = judged(capsys, runs)
    assert found == status
    assert [("piqa_local" in line, "score" in line) for line in outside(text)] == [(True, True)] * status


def test_right_answers_that_all_lose_are_seen_where_no_answer_changes(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cell_of(runs[1], "gptq")
    rows = rows_of(folder, "mmlu_local")
    for place, row in enumerate(rows):
        row["choices"][row["gold"]] -= 0.01 + 0.001 * (place % 3)
    rewrite(folder, "mmlu_local", rows)
    found, text = judged(capsys, runs)
    assert found == 1
    assert ["right answer" in line for line in outside(text)] == [True]


def test_what_the_other_machine_failed_at_is_outside(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(cell_of(runs[1], "rtn"), lambda record: record["tasks"].pop("boolq_local"))
    write_cell(runs[0], "quarot", "w4a16")
    found, text = judged(capsys, runs)
    assert found == 1
    assert [line.endswith("boolq_local: not finished in B") for line in outside(text)] == [True]
    assert "- smollm2-135m-instruct, quarot, w4a16, seed 0: only in A" in text
    assert text.splitlines()[-1] == "OUTSIDE: 0 of 19 comparisons of 3 cells, 1 not finished"


@given(
    reference=st.floats(0.5, 12),
    error=st.floats(0, 1),
    passages=st.integers(2, 200),
    tests=st.integers(1, 99),
)
def test_the_allowance(reference: float, error: float, passages: int, tests: int) -> None:
    alpha = ALPHA / tests
    allowed = allowance(reference, Estimate(0.0, error, passages - 1), alpha)
    assert MARGIN * reference <= allowed <= LIMIT * reference
    inside = MARGIN * reference < allowed < LIMIT * reference
    if inside:
        p = 2 * scipy.stats.t.sf(allowed / error, passages - 1)
        assert p == pytest.approx(alpha, rel=1e-6)
    assert allowance(reference, Estimate(0.0, math.nan, 0), alpha) == MARGIN * reference
