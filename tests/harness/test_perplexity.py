"""Perplexity by the papers' protocol: windows, their passages, scores and standard errors."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness import perplexity, resample
from harness.perplexity import PassageRow, draw, score, summary, windows
from methods.calibration import Corpus, evaluation_text
from methods.checkpoint import Checkpoint, from_transformers, open_checkpoint
from methods.decoder import Decoder
from methods.errors import UserError
from tests import families
from tests.harness.tokenizers import byte_tokenizer

TEXTS = (
    "A first passage, of two lines.\nHere is the second.",
    "x",
    " Starts and ends with blanks \n",
    "Ünïcode: 東京, emoji 🦙 and a tab\t.",
    "The last one ends without a full stop",
)


def corpus(*texts: str) -> Corpus:
    return Corpus("made", "evaluation", texts, "", "")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return from_transformers(families.model("llama-gqa-tied"))


def bytes_of(tokenizer: Any, ids: list[int]) -> bytes:
    """The exact bytes that byte-level tokens stand for (decode would replace parts of characters)."""
    table = {char: value for value, char in _byte_characters().items()}
    return bytes(table[char] for token in tokenizer.convert_ids_to_tokens(ids) for char in token)


def _byte_characters() -> dict[int, str]:
    """The printable stand-in of each byte in a byte-level tokenizer (GPT-2's table)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in kept]
    return {value: chr(value) for value in kept} | {value: chr(256 + i) for i, value in enumerate(others)}


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_every_token_knows_its_passage(trim_offsets: bool, bos: bool) -> None:
    """The tokens of a passage spell out that passage and the separator behind it, to the byte."""
    tokenizer = byte_tokenizer(adds_bos=bos, trim_offsets=trim_offsets)
    cut = windows(tokenizer, corpus(*TEXTS), 2)
    ids, passages = cut.tokens.flatten(), cut.passages.flatten()
    if bos:
        assert (ids == tokenizer.bos_token_id).nonzero().tolist() == [[0]]
        assert int(passages[0]) == 0
        ids, passages = ids[1:], passages[1:]
    else:
        assert tokenizer.bos_token_id not in ids
    assert bool((passages.diff() >= 0).all())
    for index, text in enumerate(TEXTS[:-1]):
        assert bytes_of(tokenizer, ids[passages == index].tolist()) == (text + "\n\n").encode()
    whole = "\n\n".join(TEXTS).encode()
    assert whole.startswith(bytes_of(tokenizer, ids.tolist()))  # at most one token was left over


def test_default_models_windows_spell_out_the_passages(checkpoint: Checkpoint) -> None:
    texts = evaluation_text("wikipedia").texts[:60]
    tokenizer = checkpoint.tokenizer
    cut = windows(tokenizer, corpus(*texts), 1024)
    ids, passages = cut.tokens.flatten(), cut.passages.flatten()
    assert cut.tokens.shape == cut.passages.shape == (len(cut), 1024)
    assert len(cut) == len(tokenizer("\n\n".join(texts), verbose=False)["input_ids"]) // 1024
    for index in range(int(passages[-1])):
        assert bytes_of(tokenizer, ids[passages == index].tolist()) == (texts[index] + "\n\n").encode()


def test_windows_do_not_overlap_and_the_tail_is_dropped() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("\n\n".join(TEXTS), add_special_tokens=False)["input_ids"]
    for length in (2, 7, 50):
        cut = windows(tokenizer, corpus(*TEXTS), length)
        assert cut.length == length
        assert len(cut) == len(ids) // length
        assert cut.tokens.flatten().tolist() == ids[: len(cut) * length]


def test_too_little_text_and_too_short_windows_are_refused() -> None:
    with pytest.raises(UserError, match="too few for one window of 1000"):
        windows(byte_tokenizer(), corpus(*TEXTS), 1000)
    with pytest.raises(UserError, match="at least 2"):
        windows(byte_tokenizer(), corpus(*TEXTS), 1)


@given(n=st.integers(1, 60), limit=st.integers(1, 80), seed=st.integers(0, 50))
def test_draw_is_sorted_distinct_and_nested(n: int, limit: int, seed: int) -> None:
    drawn = draw(n, limit, seed)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == min(n, limit)
    assert all(0 <= index < n for index in drawn)
    assert set(drawn) <= set(draw(n, limit + 1, seed))
    assert draw(n, None, seed) == list(range(n))


def test_draw_depends_on_the_seed_and_refuses_an_empty_draw() -> None:
    assert len({tuple(draw(50, 10, seed)) for seed in range(5)}) == 5
    with pytest.raises(UserError, match="at least 1"):
        draw(50, 0, 0)


@pytest.mark.parametrize("chunk", [3, 16, 256])
def test_score_equals_transformers(decoder: Decoder, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64 log-softmax of transformers' logits of whole windows; chunk boundaries make no difference."""
    monkeypatch.setattr(perplexity, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, families.VOCABULARY, (4, 40), generator=generator)
    passages = torch.randint(0, 9, (4, 40), generator=generator).flatten().sort().values.view(4, 40)
    cut = perplexity.Windows(tokens, passages)
    rows = score(decoder, cut, [3, 1])

    logits = families.reference_logits(families.model("llama-gqa-tied"), tokens)
    expected: dict[tuple[int, int], list[float]] = {}
    for window in (3, 1):
        logp = logits[window].log_softmax(-1)
        for position in range(1, 40):
            key = window, int(passages[window, position])
            value = -float(logp[position - 1, tokens[window, position]])
            expected.setdefault(key, []).append(value)
    assert [(row.window, row.passage) for row in rows] == list(expected)
    for row, values in zip(rows, expected.values(), strict=True):
        assert row.tokens == len(values)
        assert row.nll == pytest.approx(math.fsum(values), rel=1e-9)


def test_a_window_is_scored_alone() -> None:
    """Bit for bit the same, whichever windows are scored with it."""
    decoder = from_transformers(families.model("llama-gqa-tied", torch.float32))
    cut = windows(byte_tokenizer(), corpus(*TEXTS), 16)
    cut = dataclasses.replace(cut, tokens=cut.tokens % families.VOCABULARY)
    together = score(decoder, cut, range(len(cut)))
    alone = [row for index in reversed(range(len(cut))) for row in score(decoder, cut, [index])]
    assert sorted(together, key=lambda row: (row.window, row.passage)) == sorted(
        alone, key=lambda row: (row.window, row.passage)
    )


def test_progress_is_reported(decoder: Decoder) -> None:
    cut = perplexity.Windows(torch.full((3, 4), 5), torch.zeros(3, 4, dtype=torch.long))
    seen: list[tuple[int, int]] = []
    score(decoder, cut, [0, 2], lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_half_precision_is_summed_in_float64(decoder: Decoder) -> None:
    """A bfloat16 model's log-probabilities are not rounded to bfloat16."""
    cut = perplexity.Windows(families.tokens(1, 60, seed=3), torch.zeros(1, 60, dtype=torch.long))
    half = from_transformers(families.model("llama-gqa-tied")).to(torch.bfloat16)
    (row,) = score(half, cut, [0])
    logits = half(cut.tokens[:, :-1])[0].double()
    expected = -logits.log_softmax(-1).gather(-1, cut.tokens[0, 1:, None]).sum()
    assert row.nll == pytest.approx(float(expected), rel=1e-6)


def test_summary_by_hand() -> None:
    rows = [
        PassageRow(0, 0, 6.0, 2),
        PassageRow(0, 1, 3.0, 3),
        PassageRow(4, 1, 5.0, 1),  # the same passage goes on in another window: one cluster
        PassageRow(4, 2, 2.0, 4),
    ]
    found = summary(rows)
    totals = [(6.0, 2), (8.0, 4), (2.0, 4)]
    # Every way to draw three passages of three, each as likely as the others.
    draws = [
        sum(nll for nll, _ in drawn) / sum(tokens for _, tokens in drawn)
        for drawn in itertools.product(totals, repeat=3)
    ]
    metrics = found["metrics"]
    assert metrics["log_perplexity"]["value"] == pytest.approx(1.6)
    assert metrics["log_perplexity"]["stderr"] == pytest.approx(np.std(draws), rel=0.02)
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp(1.6))
    assert metrics["perplexity"]["stderr"] == pytest.approx(np.std(np.exp(draws)), rel=0.03)
    assert not metrics["perplexity"]["higher_is_better"]
    assert (found["tokens"], found["windows"], found["passages"]) == (10, 2, 3)
    assert "windows of 6 tokens" in found["protocol"]
    assert "joined by blank lines" in found["protocol"]
    assert "kl" not in found


def test_summary_does_not_depend_on_the_order_of_scoring() -> None:
    """To the last bit, where a passage lies in several windows."""
    nll = np.random.default_rng(0).normal(300, 50, (8, 9))
    rows = [
        PassageRow(window, passage, float(nll[window, passage]), 90) for window, passage in np.ndindex(8, 9)
    ]
    assert summary(reversed(rows)) == summary(rows)
    by_passage = sorted(rows, key=lambda row: (row.passage, -row.window))
    assert summary(by_passage) == summary(rows)


def test_standard_error_agrees_with_simulation() -> None:
    """Passages of uneven length with an effect of their own: the mean stderr is the estimate's spread."""
    generator = np.random.default_rng(0)

    def experiment() -> list[PassageRow]:
        sizes = generator.integers(20, 200, 60)
        effects = generator.normal(3.0, 0.5, 60)
        noise = generator.normal(0, 1, 60) * np.sqrt(sizes)
        return [
            PassageRow(0, index, float(size * effect + wobble), int(size))
            for index, (size, effect, wobble) in enumerate(zip(sizes, effects, noise, strict=True))
        ]

    experiments = [experiment() for _ in range(2000)]
    values = [sum(row.nll for row in rows) / sum(row.tokens for row in rows) for rows in experiments]
    metrics = [summary(rows)["metrics"] for rows in experiments[:40]]
    errors = [metric["log_perplexity"]["stderr"] for metric in metrics]
    assert [metric["log_perplexity"]["value"] for metric in metrics] == pytest.approx(values[:40])
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.06)
    relative = [metric["perplexity"]["stderr"] / metric["perplexity"]["value"] for metric in metrics]
    assert np.mean(relative) == pytest.approx(np.mean(errors), rel=0.02)


def test_the_stored_rows_give_the_standard_error_again() -> None:
    """What a report resamples from the rows is what the cell's record says."""
    rows = [PassageRow(0, index, 3.0 * index + index % 3, 1 + index) for index in range(12)]
    stored = json.loads(json.dumps([row.sample() for row in reversed(rows)]))
    names = ("passage", "nll", "tokens")
    totals, tokens = resample.by_cluster(*([row[name] for row in stored] for name in names)).T
    draws = resample.ratio_bootstrap(totals[:, None], tokens)
    assert summary(rows)["metrics"]["log_perplexity"]["stderr"] == float(draws.std(ddof=1))


def test_divergence_of_rows_by_hand() -> None:
    rows = [
        PassageRow(0, 0, 2.0, 2, (0.0, 0.5), 1),
        PassageRow(0, 1, 3.0, 3, (0.25, 0.0, 0.75), 2),
        PassageRow(1, 1, 9.0, 5),  # not compared
    ]
    found = summary(rows)
    assert found["kl"]["mean"] == pytest.approx(1.5 / 5)
    assert (found["kl"]["median"], found["kl"]["max"]) == (0.25, 0.75)
    assert found["top1_agreement"]["value"] == pytest.approx(3 / 5)
    assert found["kl_windows"] == 1
    # Two passages: (0, 0), (0, 1), (1, 0), (1, 1) are drawn with equal probability.
    assert found["kl"]["stderr"] == pytest.approx(np.std([1 / 4, 0.3, 0.3, 1 / 3]), rel=0.03)
    assert found["top1_agreement"]["stderr"] == pytest.approx(np.std([1 / 2, 0.6, 0.6, 2 / 3]), rel=0.03)
    assert summary(rows[:1])["kl"]["stderr"] is None
    assert rows[1].sample() == {"window": 0, "passage": 1, "nll": 3.0, "tokens": 3, "kl": 1.0, "agree": 2}
    assert rows[2].sample() == {"window": 1, "passage": 1, "nll": 9.0, "tokens": 5}


def test_summary_of_one_passage_a_ruined_model_and_nothing() -> None:
    assert summary([PassageRow(0, 7, 4.0, 2)])["metrics"]["perplexity"]["stderr"] is None
    ruined = summary([PassageRow(0, 0, 1e4, 1), PassageRow(0, 1, 2e4, 1)])["metrics"]
    assert ruined["perplexity"]["value"] == math.inf
    assert ruined["perplexity"]["stderr"] is None
    assert ruined["log_perplexity"]["value"] == pytest.approx(1.5e4)
    with pytest.raises(UserError, match="no perplexity windows"):
        summary([])


def test_default_models_perplexity(checkpoint: Checkpoint) -> None:
    """19.15 on the first 6 x 1024 tokens, found with an independent prototype."""
    cut = windows(checkpoint.tokenizer, evaluation_text("wikipedia"), 1024)
    found = summary(score(checkpoint.load(), cut, range(6)))
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(19.15, rel=0.005)
    assert found["tokens"] == 6 * 1023
