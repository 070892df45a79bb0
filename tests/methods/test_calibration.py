"""Calibration text: nothing of it stands in the evaluation text, and windows are what the tokenizer says."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from methods import assets, calibration
from methods.calibration import Corpus, load_corpus, token_windows
from methods.errors import UserError


@pytest.fixture(scope="session")
def real() -> dict[str, Corpus]:
    """The four real texts."""
    return {
        "calibration": load_corpus("boolq", "calibration"),
        "tuning": load_corpus("boolq", "tuning"),
        "wikipedia": calibration.evaluation_text("wikipedia"),
        "news": calibration.evaluation_text("news"),
    }


def corpus(*texts: str) -> Corpus:
    return Corpus("made", "calibration", texts, "", "")


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One token a word, and a [BOS] in front unless encoding is told to add no special tokens."""
    vocabulary = {word: index for index, word in enumerate(["[BOS]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[BOS]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[BOS]")


# The default corpus


@lru_cache(maxsize=8)
def plain_ngrams(texts: tuple[str, ...], n: int = 13) -> set[tuple[str, ...]]:
    """13-grams of words as white space parts them, without hashing: another definition, another program.
    Shared: do not change."""
    found = set()
    for text in texts:
        words = text.lower().split()
        found |= {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    return found


def test_no_13_gram_is_shared_by_any_two_texts(
    real: dict[str, Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each text is hashed once for all of its pairs.
    monkeypatch.setattr(calibration, "ngram_hashes", lru_cache(calibration.ngram_hashes))
    grams = {name: plain_ngrams(text.texts) for name, text in real.items()}
    for first in grams:
        for second in grams:
            if first < second:
                assert not grams[first] & grams[second], (first, second)
                assert calibration.overlap(real[first], real[second]) == 0
    assert calibration.contamination(real["calibration"]) == 0
    assert calibration.contamination(real["tuning"]) == 0


def test_the_uncleaned_passages_would_be_contaminated(real: dict[str, Corpus]) -> None:
    rows = assets.benchmark_file("BoolQ/combined.jsonl").read_text("utf-8").splitlines()
    raw = corpus(*(json.loads(row)["passage"] for row in rows))
    evaluated = plain_ngrams(real["wikipedia"].texts)
    assert len(plain_ngrams(raw.texts) & evaluated) == len(evaluated)  # all of dev stands in it
    assert calibration.contamination(raw) > 200_000


def test_no_passage_is_of_an_article_that_dev_is_about(real: dict[str, Corpus]) -> None:
    rows = assets.benchmark_file("BoolQ/dev.jsonl").read_text("utf-8").splitlines()
    titles = {json.loads(row)["title"].lower() for row in rows}
    combined = assets.benchmark_file("BoolQ/combined.jsonl").read_text("utf-8").splitlines()
    titled = dict(reversed(json.loads(row)["passage"].split(" -- ", 1)) for row in combined)
    for text in (*real["calibration"].texts, *real["tuning"].texts):
        assert titled[text].lower() not in titles


def test_sizes(real: dict[str, Corpus]) -> None:
    assert {name: len(text.texts) for name, text in real.items()} == {
        "calibration": 7162,
        "tuning": 800,
        "wikipedia": 2938,
        "news": 999,
    }
    assert sum(map(len, real["calibration"].texts)) > 4_000_000
    for text in real.values():
        assert len(set(text.texts)) == len(text.texts)
        assert all(passage.strip() for passage in text.texts)


def test_the_stored_corpus_is_built_again_when_damaged(
    real: dict[str, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {name: assets.benchmark_file(name) for name in assets.BENCHMARKS.members}
    monkeypatch.setattr(assets, "benchmark_file", members.__getitem__)
    monkeypatch.setenv("QUANTGRID_HOME", str(tmp_path))
    built = []
    parts = {"calibration": ["one"], "tuning": ["two", "three"]}

    def build() -> dict[str, list[str]]:
        built.append(1)
        return parts

    monkeypatch.setattr(calibration, "_clean_boolq", build)
    assert load_corpus("boolq").texts == ("one",)
    assert load_corpus("boolq", "tuning").texts == ("two", "three")
    assert len(built) == 1
    (stored,) = (tmp_path / "calibration").iterdir()
    for damaged in (stored.read_text().replace("three", "thref"), stored.read_text()[:-20], "", "[1]\n"):
        stored.write_text(damaged)
        assert load_corpus("boolq", "tuning").texts == ("two", "three")
    assert len(built) == 5


def test_the_hash_follows_the_texts(real: dict[str, Corpus]) -> None:
    assert len({text.sha256 for text in real.values()}) == 4
    assert calibration._texts_sha256(["ab", "c"]) != calibration._texts_sha256(["a", "bc"])


# Overlap

word = st.sampled_from(["a", "b", "c"])
texts = st.lists(st.lists(word, max_size=12).map(" ".join), max_size=4)


@given(texts, texts, st.integers(1, 5))
def test_overlap_equals_a_count_with_python_sets(first: list[str], second: list[str], n: int) -> None:
    expected = len(plain_ngrams(tuple(first), n) & plain_ngrams(tuple(second), n))
    assert calibration.overlap(corpus(*first), corpus(*second), n) == expected


def test_overlap_ignores_case_spacing_and_punctuation() -> None:
    a = corpus("The quick, brown fox -- jumps over the lazy dog and runs away again today.")
    b = corpus("the  quick brown\nfox jumps OVER the lazy dog; and runs away again today!")
    assert calibration.overlap(a, b) == 2
    assert calibration.overlap(a, b, 14) == 1
    assert calibration.overlap(a, corpus("The quick, brown fox", "jumps over the lazy dog and runs")) == 0


# Windows


def test_windows_are_runs_of_the_text_without_special_tokens() -> None:
    words = [f"w{i}" for i in range(50)]
    tokenizer = word_tokenizer(words)
    text = corpus(" ".join(words[:20]), " ".join(words[20:]))
    windows = token_windows(text, tokenizer, samples=40, length=7, seed=3)
    assert windows.shape == (40, 7)
    assert windows.dtype == torch.int64
    assert torch.equal(windows.diff(dim=1), torch.ones(40, 6, dtype=torch.int64))  # w0 is token 1, w1 token 2
    assert len(set(windows[:, 0].tolist())) == 40
    assert windows.min() >= 1
    assert windows.max() <= 50


def test_texts_are_joined_by_blank_lines() -> None:
    seen = []

    def tokenizer(text: str, **_: object) -> dict[str, list[int]]:
        seen.append(text)
        return {"input_ids": [1, 2, 3]}

    token_windows(corpus("one", "two"), tokenizer, samples=1, length=3, seed=0)  # type: ignore[arg-type]
    assert seen == ["one\n\ntwo"]


def test_windows_depend_on_the_seed_and_on_nothing_else() -> None:
    words = [f"w{i}" for i in range(500)]
    tokenizer, text = word_tokenizer(words), corpus(" ".join(words))
    torch.manual_seed(1)
    first = token_windows(text, tokenizer, samples=4, length=8, seed=0)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, token_windows(text, tokenizer, samples=4, length=8, seed=0))
    assert not torch.equal(first, token_windows(text, tokenizer, samples=4, length=8, seed=1))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_too_little_text_is_told_with_numbers() -> None:
    tokenizer, text = word_tokenizer(["a"]), corpus("a " * 10)
    assert token_windows(text, tokenizer, samples=3, length=8, seed=0).shape == (3, 8)
    with pytest.raises(UserError, match="has 10 tokens, too few for 4 different windows of 8: at least 11"):
        token_windows(text, tokenizer, samples=4, length=8, seed=0)
    with pytest.raises(UserError, match="samples=0"):
        token_windows(text, tokenizer, samples=0, length=8, seed=0)


# Text of the user


def test_paragraphs_rows_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("first\nstill first\n\n \nsecond\n\n")
    (tmp_path / "a.jsonl").write_text(
        '{"text": "row \\u00e9", "id": 1}\n\n{"text": " "}\n{"text": "row 2"}\n'
    )
    (tmp_path / "ignored.md").write_text("not text of the user")
    assert load_corpus(str(tmp_path / "b.txt")).texts == ("first\nstill first", "second")
    assert load_corpus(str(tmp_path / "a.jsonl")).texts == ("row é", "row 2")
    assert load_corpus(str(tmp_path)).texts == ("row é", "row 2", "first\nstill first", "second")


def test_a_users_tuning_split_is_a_tenth_that_calibration_lacks(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("\n\n".join(f"document {i}" for i in range(109)))
    parts = {split: load_corpus(str(path), split).texts for split in ("calibration", "tuning")}
    assert len(parts["tuning"]) == 10
    assert sorted(parts["calibration"] + parts["tuning"]) == sorted(f"document {i}" for i in range(109))
    assert parts["tuning"] == load_corpus(str(path), "tuning").texts
    path.write_text("only one document")
    assert load_corpus(str(path)).texts == ("only one document",)
    with pytest.raises(UserError, match="has 1 documents; its tuning split needs at least 10"):
        load_corpus(str(path), "tuning")


def test_a_users_copy_of_the_evaluation_text_is_counted(tmp_path: Path, real: dict[str, Corpus]) -> None:
    (tmp_path / "mine.txt").write_text(real["news"].texts[0].upper().replace("\n", " "))
    mine = load_corpus(str(tmp_path / "mine.txt"))
    words = len(calibration.ngram_hashes(real["news"].texts[:1]))
    assert calibration.contamination(mine) == words > 0


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", '{"text": "ok"}\n{"txt": "no"}\n', 'line 2: expected a JSON object with a text "text"'),
        ("x.jsonl", '{"text": 5}\n', 'line 1: "text" is not a text'),
        ("x.jsonl", "[1, 2]\n", "line 1: expected a JSON object"),
        ("x.jsonl", "{broken\n", "line 1: expected a JSON object"),
        ("x.txt", " \n\n ", "holds no text"),
        ("x.md", "text", "neither a .txt file"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        load_corpus(str(tmp_path / name))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read .*latin\.txt as UTF-8"):
        load_corpus(str(tmp_path / "latin.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.txt or \.jsonl file"):
        load_corpus(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"'wikitext': did you mean 'wikitext2'\? known are boolq, wikitext2"):
        load_corpus("wikitext")
    with pytest.raises(UserError, match="unknown split 'train': known are calibration, tuning"):
        load_corpus("boolq", "train")
    with pytest.raises(UserError, match="unknown evaluation text"):
        calibration.evaluation_text("dev")


# Text from a hub


def test_without_a_hub_the_message_offers_what_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nwith details")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name in ("wikitext2", "c4", "pile"):
        with pytest.raises(UserError, match=rf"{name}.* needs a hub.*Couldn't reach the hub\).*'boolq'"):
            load_corpus(name)


def test_wikitext_lines_become_articles(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "",
        " = Robert = \n",
        "",
        " He acts . \n",
        " = = Career = = \n",
        " Long . \n",
        " = X = \n",
        " . \n",
    ]
    asked: list[Any] = []

    def load_dataset(*arguments: str, **options: str) -> dict[str, list[str]]:
        asked.append((arguments, options))
        return {"text": lines}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load_corpus("wikitext2").texts
    assert found == ("= Robert = \n He acts . \n = = Career = = \n Long .", "= X = \n .")
    assert asked == [(("Salesforce/wikitext",), {"name": "wikitext-2-raw-v1", "split": "train"})]
