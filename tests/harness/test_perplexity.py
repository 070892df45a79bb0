"""Perplexity by the papers' protocol: windows, their passages, scores and standard errors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness import perplexity
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
    mean = 16 / 10
    residual = [6 - 2 * mean, 8 - 4 * mean, 2 - 4 * mean]
    error = math.sqrt(3 / 2 * sum(value**2 for value in residual)) / 10
    metrics = found["metrics"]
    assert metrics["log_perplexity"]["value"] == pytest.approx(mean)
    assert metrics["log_perplexity"]["stderr"] == pytest.approx(error)
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp(mean))
    assert metrics["perplexity"]["stderr"] == pytest.approx(math.exp(mean) * error)
    assert not metrics["perplexity"]["higher_is_better"]
    assert (found["tokens"], found["windows"], found["passages"]) == (10, 2, 3)
    assert "windows of 6 tokens" in found["protocol"]
    assert "joined by blank lines" in found["protocol"]


def test_standard_error_agrees_with_simulation() -> None:
    """Passages of uneven length with an effect of their own: the mean stderr is the estimate's spread."""
    generator = np.random.default_rng(0)

    def experiment() -> tuple[float, float]:
        sizes = generator.integers(20, 200, 60)
        effects = generator.normal(3.0, 0.5, 60)
        noise = generator.normal(0, 1, 60) * np.sqrt(sizes)
        rows = [
            PassageRow(0, index, float(size * effect + wobble), int(size))
            for index, (size, effect, wobble) in enumerate(zip(sizes, effects, noise, strict=True))
        ]
        metric = summary(rows)["metrics"]["log_perplexity"]
        return metric["value"], metric["stderr"]

    values, errors = np.array([experiment() for _ in range(2000)]).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.06)


def test_summary_of_one_passage_a_ruined_model_and_nothing() -> None:
    assert summary([PassageRow(0, 7, 4.0, 2)])["metrics"]["perplexity"]["stderr"] is None
    ruined = summary([PassageRow(0, 0, 1e4, 1), PassageRow(0, 1, 2e4, 1)])["metrics"]
    assert ruined["perplexity"]["value"] == math.inf
    assert ruined["log_perplexity"]["value"] == pytest.approx(1.5e4)
    with pytest.raises(UserError, match="no perplexity windows"):
        summary([])


def test_default_models_perplexity(checkpoint: Checkpoint) -> None:
    """19.15 on the first 6 x 1024 tokens, found with an independent prototype."""
    cut = windows(checkpoint.tokenizer, evaluation_text("wikipedia"), 1024)
    found = summary(score(checkpoint.load(), cut, range(6)))
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(19.15, rel=0.005)
    assert found["tokens"] == 6 * 1023
