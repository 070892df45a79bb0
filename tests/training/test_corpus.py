"""What is trained on: no duplicates, nothing that an evaluation reads; tokens that decode to their text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from methods import assets
from methods.calibration import evaluation_text, load_corpus, ngram_hashes
from methods.errors import UserError
from tests.training import small_data
from training import corpus, prepare, sources, tokens

WORDS = [f"w{i}" for i in range(2000)]


def sentence(start: int, count: int = 20) -> str:
    return " ".join(WORDS[(start * 37 + i * i) % len(WORDS)] for i in range(count))


def ngrams(text: str, n: int = 13) -> Iterator[tuple[str, ...]]:
    """Runs of words, found without hashes."""
    words = re.findall(r"\w+", text.casefold())
    return zip(*(words[i:] for i in range(n)), strict=False)


def test_repeated_and_evaluated_paragraphs_go() -> None:
    evaluated = sentence(1, 30)
    documents = [
        f"{sentence(2)}\n\n{sentence(3)}",
        f"{sentence(3).upper()}!\n\nNotes\n\n{sentence(4)}",
        f"Notes\n \n{sentence(5)} {evaluated[40:]}\n\n    {sentence(6)}",
    ]
    text = corpus.build([("one", documents)], ngram_hashes([evaluated]))
    kept = "\n\n".join(text.train + text.held_out)
    assert kept.casefold().count(sentence(3).casefold()) == 1
    assert sentence(5) not in kept
    assert kept.count("Notes") == 2, "short lines may repeat"
    assert f"    {sentence(6)}" in kept, "indentation stays"
    counts = text.counts["one"]
    assert counts["repeated"] == len(sentence(3)) + 1
    assert counts["barred"] == len(f"{sentence(5)} {evaluated[40:]}")


def test_a_run_of_words_across_two_paragraphs_is_found() -> None:
    evaluated = sentence(1, 20)
    first, second = " ".join(evaluated.split()[:10]), " ".join(evaluated.split()[10:])
    document = f"{first}\n\n{second}"
    assert not any(corpus.shares(part, ngram_hashes([evaluated])) for part in (first, second))
    text = corpus.build([("one", [document, sentence(8)])], ngram_hashes([evaluated]))
    assert text.train + text.held_out == [sentence(8)]


def test_held_out_text_shares_nothing_with_the_rest() -> None:
    documents = [f"{sentence(i)}\n\n{sentence(i // 3 + 5000, 15)} and {sentence(i)[:9]}" for i in range(600)]
    text = corpus.build([("one", documents)], np.zeros(0, np.uint64))
    assert 1 <= len(text.held_out) <= 20
    known = {gram for document in text.train for gram in ngrams(document)}
    assert not any(gram in known for document in text.held_out for gram in ngrams(document))
    again = corpus.build([("one", documents)], np.zeros(0, np.uint64))
    assert (again.train, again.held_out) == (text.train, text.held_out)


def test_default_text_shares_no_13_words_with_any_evaluation() -> None:
    """The source that comes near them, checked without the hashes that cleaned it."""
    passages = list(sources.BUILT_IN[0].read())
    text = corpus.build([("passages", passages[::6])], corpus.excluded())
    assert sum(map(len, text.train)) > 1_000_000
    evaluated = {
        gram for name in ("wikipedia", "news") for t in evaluation_text(name).texts for gram in ngrams(t)
    }
    evaluated |= {gram for t in load_corpus("boolq", "tuning").texts for gram in ngrams(t)}
    for member in set(assets.BENCHMARKS.members) - {"BoolQ/combined.jsonl"}:
        for line in assets.benchmark_file(member).read_text().split("\n"):
            row = json.loads(line) if line.strip() else {}
            evaluated |= {g for value in row.values() if isinstance(value, str) for g in ngrams(value)}
    shared = [
        gram for document in text.train + text.held_out for gram in ngrams(document) if gram in evaluated
    ]
    assert not shared
    dirty = [gram for document in passages[::6] for gram in ngrams(document) if gram in evaluated]
    assert dirty, "there was something to clean"


def test_markup_becomes_text() -> None:
    html = (
        "<p>Sets  the <code>size</code> &amp; shape.</p><ul><li> <p>One &lt;b&gt;</p> </li><li>two</li></ul>"
    )
    assert sources.plain(html) == "Sets the size & shape.\n\nOne <b>\n\ntwo"
    description = {"a": {"documentation": "x", "b": [{"documentation": "y"}]}, "documentation": {"c": 1}}
    assert list(sources.strings_under(description, "documentation")) == ["x", "y"]
    cut = list(sources.pieces(["a" * 3000, " ", "b" * 2000, "c"]))
    assert cut == ["a" * 3000 + "\n\n" + "b" * 2000, "c"]


def test_tokens_decode_to_their_text(tmp_path: Path) -> None:
    data = small_data.write(tmp_path / "data")
    tokenizer = Tokenizer.from_file(str(tmp_path / "data" / tokens.TOKENIZER))
    strange = "A naïve café 東京 1984\n\n\tdef f(x): return x\x00"
    ids = tokens.encode(tokenizer, ["one", strange])
    assert ids.dtype == torch.uint16
    assert (
        tokenizer.decode(ids.tolist(), skip_special_tokens=False) == f"{tokens.END}one{tokens.END}{strange}"
    )
    assert tokenizer.token_to_id(tokens.END) == 0
    assert data.parts["train"].to(torch.int64).eq(0).sum() == 8 * len(small_data.texts())
    rows = data.windows("train", 16, 5)
    assert rows.shape == (5, 16)
    whole = data.parts["train"].long()
    cut = whole[: whole.numel() // 16 * 16]
    assert torch.equal(data.windows("train", 16, 10**9).flatten(), cut)


def test_damaged_and_foreign_data_is_refused(tmp_path: Path) -> None:
    data = small_data.write(tmp_path / "data")
    with pytest.raises(UserError, match="is not empty"):
        small_data.write(tmp_path / "data")
    with pytest.raises(UserError, match="no 'recipes' text: "):
        data.windows("recipes", 8, 1)
    with pytest.raises(UserError, match="less held_out text than one window"):
        data.windows("held_out", 10**7, 1)
    about = json.loads((data.folder / tokens.ABOUT).read_text())
    about["tokens"]["train"] += 1
    (data.folder / tokens.ABOUT).write_text(json.dumps(about))
    with pytest.raises(UserError, match="train has not the tokens on record"):
        tokens.read(data.folder)
    (data.folder / tokens.TOKENS).write_bytes(b"nothing")
    with pytest.raises(UserError, match="is damaged"):
        tokens.read(data.folder)


def test_own_files_become_a_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated = sentence(77, 30)
    monkeypatch.setattr(corpus, "excluded", lambda: ngram_hashes([evaluated]))
    rows = [
        {"text": f"{sentence(i, 60)}\n\n{evaluated if i % 2 else sentence(i + 9000)}"} for i in range(400)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "--out",
        str(tmp_path / "data"),
        "--text",
        str(tmp_path / "own.jsonl"),
        "--vocabulary",
        "600",
    ]
    assert prepare.main([*arguments, "--most", "9000"]) == 0
    data = tokens.read(tmp_path / "data")
    counts = {name: part.numel() for name, part in data.parts.items()}
    assert counts["train"] == 9000
    assert min(counts.values()) > 100
    assert (counts["wikipedia"], counts["tuning"]) == (64_000, 64_000)
    assert data.about["available_tokens"] > 9000
    counted = data.about["characters"]["own files"]
    assert counted["barred"] == len(evaluated) + len(sentence(77, 60)), "the passage, and a longer one"
    assert counted["repeated"] == 199 * len(evaluated)
    tokenizer = Tokenizer.from_file(str(tmp_path / "data" / tokens.TOKENIZER))
    text = tokenizer.decode(data.parts["train"].tolist(), skip_special_tokens=False)
    documents = text.split(tokens.END)[1:-1]
    assert len(documents) > 20
    originals = {f"{sentence(i, 60)}\n\n{sentence(i + 9000)}" for i in range(0, 400, 2)}
    originals |= {sentence(i, 60) for i in range(1, 400, 2)}
    assert set(documents) <= originals
    assert prepare.main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err


def test_own_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n')
    assert list(sources.local([tmp_path])) == ["one", "two", "three"]
    with pytest.raises(UserError, match="no such file"):
        list(sources.local([tmp_path / "c.txt"]))
