"""Text to calibrate on, to choose hyper-parameters on and to evaluate on, and windows of tokens from it.

A number measured on text that the method has already seen says little, so the default corpus is cleaned
against the evaluation text, and what counts as "seen" is stated once, in `ngram_hashes`: two texts overlap
when they share a run of 13 words. The recipe of the default corpus "boolq" (`RECIPE` changes when it does):

1.  take the passages of BoolQ/combined.jsonl and strip the "Title -- " in front of each;
2.  drop duplicates, and passages equal to one of BoolQ/dev.jsonl (compared without case and white space);
3.  drop passages whose title is a title of dev: another piece of the same article;
4.  drop passages that share a 13-gram with a dev passage or with an XSum document;
5.  shuffle with a fixed seed: the last tenth is "tuning", the rest "calibration";
6.  drop from calibration what shares a 13-gram with tuning.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from methods import assets
from methods.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RECIPE = 1
SPLITS = ("calibration", "tuning")
NGRAM = 13
SHUFFLE_SEED = 0
TEXT_FILES = (".txt", ".jsonl")

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Corpus:
    """Texts with their provenance. `sha256` is over the texts alone, so it follows the content."""

    name: str
    split: str
    texts: tuple[str, ...]
    sha256: str
    source: str


def load_corpus(name_or_path: str = "boolq", split: str = "calibration") -> Corpus:
    """Load calibration text by name or from a local path.

    Args:
        name_or_path: "boolq" (the default, needs no hub), "wikitext2", "c4" or "pile" (need a hub), or a
            path: a .txt file (one document per paragraph, paragraphs parted by blank lines), a .jsonl file
            (one {"text": ...} per line), or a folder of such files.
        split: "tuning" is a tenth of the documents drawn by a fixed seed, "calibration" the rest. The two
            share no 13-gram for "boolq"; for other text they share no document.

    Raises:
        UserError: unknown name, missing or malformed file, no hub, or no text.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: known are {', '.join(SPLITS)}")
    if name_or_path == "boolq":
        texts = _cleaned_boolq()[split]
        return _corpus("boolq", split, texts, "BoolQ passages (Wikipedia), cleaned of the evaluation text")
    if name_or_path in _HUB:
        documents = _hub_documents(name_or_path)
        return _corpus(name_or_path, split, _part(documents, split, name_or_path), _HUB[name_or_path].source)
    path = Path(name_or_path).expanduser()
    if not path.exists():
        known = ["boolq", *_HUB]
        near = difflib.get_close_matches(name_or_path.lower(), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"no calibration text {name_or_path!r}: {hint}known are {', '.join(known)}, "
            "or the path of a .txt file, a .jsonl file or a folder of them"
        )
    part = _part(local_documents(path), split, name_or_path)
    return _corpus(path.stem, split, part, f"local path {path.name}")


@lru_cache(maxsize=2)
def evaluation_text(name: str) -> Corpus:
    """The text that perplexity is measured on.

    "wikipedia": the distinct passages of BoolQ/dev.jsonl, in file order. "news": the documents of
    XSum/test.jsonl, in file order, without the empty one.

    Raises:
        UserError: unknown name, or the data cannot be fetched.
    """
    if name == "wikipedia":
        texts = dict.fromkeys(_field("BoolQ/dev.jsonl", "passage"))
        return _corpus(name, "evaluation", texts, "distinct passages of BoolQ dev (Wikipedia)")
    if name == "news":
        texts = dict.fromkeys(text for text in _field("XSum/test.jsonl", "document") if text.strip())
        return _corpus(name, "evaluation", texts, "documents of XSum (BBC news)")
    raise UserError(f"unknown evaluation text {name!r}: known are 'wikipedia' and 'news'")


def token_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, *, samples: int, length: int, seed: int
) -> torch.Tensor:
    """Draw windows of consecutive tokens, as GPTQ and its successors do (Frantar et al. 2023, section 4).

    The texts are joined by blank lines and tokenised once, without special tokens. Windows start at distinct
    places drawn by a generator of its own, so the result depends on the arguments only; they may overlap.

    Returns:
        int64 tensor [samples, length] on the CPU.

    Raises:
        UserError: samples or length below 1, or too little text.
    """
    if samples < 1 or length < 1:
        raise UserError(f"samples and length must be at least 1, got samples={samples} and length={length}")
    tokens = _tokens(corpus, tokenizer)
    starts = tokens.numel() - length + 1
    if starts < samples:
        raise UserError(
            f"{corpus.name} ({corpus.split}) has {tokens.numel()} tokens, too few for {samples} different "
            f"windows of {length}: at least {samples + length - 1} are needed"
        )
    chosen = torch.randperm(starts, generator=torch.Generator().manual_seed(seed))[:samples]
    return tokens.unfold(0, length, 1)[chosen].contiguous()


@lru_cache(maxsize=4)  # a million tokens, drawn from anew by every cell of a grid
def _tokens(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    joined = "\n\n".join(corpus.texts)
    return torch.tensor(tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"])


def overlap(a: Corpus, b: Corpus, n: int = NGRAM) -> int:
    """Number of different n-grams of words that occur in both corpora; no n-gram spans two texts."""
    return len(np.intersect1d(ngram_hashes(a.texts, n), ngram_hashes(b.texts, n), assume_unique=True))


def contamination(corpus: Corpus) -> int:
    """Number of different 13-grams that a corpus shares with the evaluation texts (0 for the default corpus).

    The harness records it beside every result that used the corpus.
    """
    return sum(overlap(corpus, evaluation_text(name)) for name in ("wikipedia", "news"))


def ngram_hashes(texts: Iterable[str], n: int = NGRAM) -> Hashes:
    """Hashes of all n-grams of words in the texts: sorted, unique, uint64 [number of n-grams].

    A word is a run of letters, digits and underscores, case folded, so that spacing, punctuation and the
    various quotation marks make no difference. Hashes collide with a chance of about 1e-7 for the texts here,
    and then only overstate an overlap.
    """
    parts = [_text_ngrams(text, n) for text in texts]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *parts]))


def _text_ngrams(text: str, n: int) -> Hashes:
    """Polynomial hash of each n-gram of one text, modulo 2**64; uint64 [max(words - n + 1, 0)]."""
    words = np.array([_word_hash(word) for word in re.findall(r"\w+", text.casefold())], dtype=np.uint64)
    count = max(len(words) - n + 1, 0)
    total = np.zeros(count, np.uint64)
    for offset in range(n):
        total = total * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + count]
    return total


def _shares_ngram(text: str, hashes: Hashes) -> bool:
    """Whether a text has one of the sorted hashes; by bisection, as `np.isin` would sort them each time."""
    found = _text_ngrams(text, NGRAM)
    places = np.minimum(np.searchsorted(hashes, found), len(hashes) - 1)
    return bool((hashes[places] == found).any())


@lru_cache(maxsize=1 << 20)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _corpus(name: str, split: str, texts: Iterable[str], source: str) -> Corpus:
    kept = tuple(texts)
    return Corpus(name, split, kept, _texts_sha256(kept), source)


def _texts_sha256(texts: Sequence[str]) -> str:
    """Hex sha256 of the texts and of where each ends."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


def _split(documents: Sequence[str]) -> dict[str, list[str]]:
    """Part documents into calibration and tuning (a tenth, by seed); both keep the given order."""
    order = list(range(len(documents)))
    random.Random(SHUFFLE_SEED).shuffle(order)
    tuning = set(order[len(order) - len(order) // 10 :])
    return {
        "calibration": [text for index, text in enumerate(documents) if index not in tuning],
        "tuning": [text for index, text in enumerate(documents) if index in tuning],
    }


def _part(documents: Sequence[str], split: str, name: str) -> list[str]:
    part = _split(documents)[split]
    if not part:
        need = 10 if split == "tuning" else 1
        raise UserError(f"{name} has {len(documents)} documents; its {split} split needs at least {need}")
    return part


# The default corpus


def _field(member: str, field: str) -> list[str]:
    """One text field of every row of a benchmark file."""
    return _jsonl_field(assets.benchmark_file(member), field, member)


def _cleaned_boolq() -> dict[str, list[str]]:
    """The default corpus by split; built once (seconds) and kept in `home()` under the hash of its inputs."""
    inputs = ("BoolQ/combined.jsonl", "BoolQ/dev.jsonl", "XSum/test.jsonl")
    key = hashlib.sha256(f"recipe {RECIPE} ngram {NGRAM} seed {SHUFFLE_SEED}".encode())
    for member in inputs:
        key.update(assets.file_sha256(assets.benchmark_file(member)).encode())
    path = assets.home() / "calibration" / f"boolq-{key.hexdigest()[:16]}.jsonl"
    stored = _read_stored(path)
    if stored is None:
        stored = _clean_boolq()
        _write_stored(path, stored)
    return stored


def _clean_boolq() -> dict[str, list[str]]:
    """Steps 1 to 6 of the recipe in this module's docstring."""
    dev_passages = {_normalised(text) for text in _field("BoolQ/dev.jsonl", "passage")}
    dev_titles = {_normalised(title) for title in _field("BoolQ/dev.jsonl", "title")}
    news = _field("XSum/test.jsonl", "document")
    evaluated = ngram_hashes([*_field("BoolQ/dev.jsonl", "passage"), *news])

    kept: dict[str, str] = {}
    for row, titled in enumerate(_field("BoolQ/combined.jsonl", "passage"), start=1):
        title, mark, text = titled.partition(" -- ")
        if not mark or not text.strip():
            raise UserError(f"BoolQ/combined.jsonl row {row}: the passage does not read 'Title -- text'")
        key = _normalised(text)
        if key not in kept and key not in dev_passages and _normalised(title) not in dev_titles:
            kept[key] = text
    clean = [text for text in kept.values() if not _shares_ngram(text, evaluated)]

    parts = _split(clean)
    tuning = ngram_hashes(parts["tuning"])
    calibration = [text for text in parts["calibration"] if not _shares_ngram(text, tuning)]
    return {"calibration": calibration, "tuning": parts["tuning"]}


def _write_stored(path: Path, parts: dict[str, list[str]]) -> None:
    """One row with the sha256 of each split, then one row a text; appears by one rename."""
    head = {split: _texts_sha256(texts) for split, texts in parts.items()}
    rows = [json.dumps(head), *(json.dumps([split, text]) for split in parts for text in parts[split])]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, suffix=".partial") as temporary:
        written = Path(temporary) / path.name
        written.write_text("\n".join(rows) + "\n", "utf-8")
        os.replace(written, path)


def _read_stored(path: Path) -> dict[str, list[str]] | None:
    """What `_write_stored` wrote, or None when it is missing or damaged (it is then built again)."""
    if not path.is_file():
        return None
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    try:
        with path.open(encoding="utf-8") as rows:
            head = json.loads(next(rows))
            for row in rows:
                split, text = json.loads(row)
                parts[split].append(text)
        intact = all(head[split] == _texts_sha256(texts) for split, texts in parts.items())
    except (ValueError, KeyError, TypeError, StopIteration):
        return None
    return parts if intact else None


# Text of the user


def local_documents(path: Path) -> list[str]:
    """Documents of a .txt file, a .jsonl file, or all such files below a folder (in order of their names)."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_FILES and file.is_file())
        if not files:
            raise UserError(f"{path} holds no .txt or .jsonl file")
    elif path.suffix in TEXT_FILES:
        files = [path]
    else:
        raise UserError(f"{path} is neither a .txt file, a .jsonl file nor a folder of them")
    documents: list[str] = []
    for file in files:
        if file.suffix == ".jsonl":
            documents += [text for text in _jsonl_field(file, "text", str(file)) if text.strip()]
        else:
            documents += [text.strip() for text in re.split(r"\n\s*\n", _read_text(file)) if text.strip()]
    if not documents:
        raise UserError(f"{path} holds no text")
    return documents


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {error}") from error


def _jsonl_field(path: Path, field: str, name: str) -> list[str]:
    """One text field of every row of a JSONL file; blank lines are passed over."""
    texts = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[field]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{name} line {number}: expected a JSON object with a text "{field}"') from error
        if not isinstance(value, str):
            raise UserError(f'{name} line {number}: "{field}" is not a text')
        texts.append(value)
    return texts


# Text from a hub


@dataclass(frozen=True)
class HubText:
    """Arguments of `datasets.load_dataset`, and how the rows' texts become documents."""

    repository: str
    arguments: dict[str, Any]
    source: str
    documents: Callable[[Iterable[str]], list[str]]


def _articles(lines: Iterable[str]) -> list[str]:
    """WikiText comes line by line; a line " = Title = " begins an article."""
    articles: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r" = [^=].* = \n?", line):
            articles.append([])
        articles[-1].append(line)
    joined = ("".join(article).strip() for article in articles)
    return [article for article in joined if article]


def _rows(texts: Iterable[str]) -> list[str]:
    return [text for text in texts if text.strip()]


_HUB = {
    "wikitext2": HubText(
        "Salesforce/wikitext",
        {"name": "wikitext-2-raw-v1", "split": "train"},
        "WikiText-2 raw, train, by article",
        _articles,
    ),
    "c4": HubText(
        "allenai/c4",
        {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train[:20000]"},
        "C4 en, the first 20000 rows of its first train shard",
        _rows,
    ),
    "pile": HubText("NeelNanda/pile-10k", {"split": "train"}, "the first 10000 rows of the Pile", _rows),
}

HUB_CORPORA = tuple(_HUB)


def _hub_documents(name: str) -> list[str]:
    import datasets

    text = _HUB[name]
    showed = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(text.repository, **text.arguments)
    except (OSError, ValueError) as error:  # offline, unknown to a mirror, or a cache without it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"calibration text {name!r} needs a hub, and {text.repository} cannot be had from one "
            f"({reason}); use 'boolq', which needs none, or a path to local text"
        ) from error
    finally:
        if not showed:
            datasets.enable_progress_bars()
    return text.documents(rows["text"])
