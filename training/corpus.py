"""What is trained on and what is held out: no duplicates, and nothing that shares a 13-gram with a text that
any evaluation of this project reads.

1.  paragraphs of all documents in turn: one that has occurred before goes, and so does one that shares a
    13-gram with an evaluation text or with the text that hyper-parameters are tuned on (`excluded`);
2.  documents that still share one, across two paragraphs, go;
3.  one document in `HELD_OUT` is held out, by the digest of its text; of those, paragraphs that share a
    13-gram with the rest go, so that the loss on them is not one of memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from methods import assets
from methods.calibration import Hashes, load_corpus, ngram_hashes

HELD_OUT = 100
WORDS = 6
"""Paragraphs of fewer words may repeat: headings, brackets of code."""


@dataclass
class Text:
    """Documents to train on and documents held out; characters of each source that were kept and dropped."""

    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


def excluded() -> Hashes:
    """13-grams of every text that an evaluation reads, questions and answers included, and of the tuning
    split: sorted uint64."""
    texts = list(load_corpus("boolq", "tuning").texts)
    for member in assets.BENCHMARKS.members:
        if member == "BoolQ/combined.jsonl":  # calibration text; what of it is evaluated stands in dev
            continue
        for line in assets.benchmark_file(member).read_text("utf-8").split("\n"):
            if line.strip():
                texts += _strings(json.loads(line))
    return ngram_hashes(texts)


def _strings(value: Any) -> Iterator[str]:
    """The strings of a row: each by itself, and all together as a prompt joins them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        inner = [text for item in _values(value) for text in _strings(item)]
        yield from inner
        yield " ".join(inner)


def _values(value: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def build(sources: Iterable[tuple[str, Iterable[str]]], barred: Hashes) -> Text:
    """Documents of (name, documents) without duplicates and without anything in `barred`, parted in two."""
    text = Text()
    seen: set[bytes] = set()
    parts: tuple[list[str], list[str]] = (text.train, text.held_out)
    for name, documents in sources:
        counts = text.counts[name] = {"kept": 0, "repeated": 0, "barred": 0}
        for document in documents:
            kept = _clean(document, seen, barred, counts)
            if not kept:
                continue
            if shares(kept, barred):
                counts["barred"] += len(kept)
                continue
            counts["kept"] += len(kept)
            digest = hashlib.sha256(kept.encode("utf-8", "surrogatepass")).digest()
            parts[int.from_bytes(digest[:8], "little") % HELD_OUT == 0].append(kept)
    trained = ngram_hashes(text.train)
    held_out = ("\n\n".join(p for p in paragraphs(d) if not shares(p, trained)) for d in text.held_out)
    text.held_out = [document for document in held_out if document]
    return text


def paragraphs(document: str) -> list[str]:
    """What blank lines part; indentation stays."""
    return [part for part in re.split(r"\n(?:[ \t]*\n)+", document) if part.strip()]


def _clean(document: str, seen: set[bytes], barred: Hashes, counts: dict[str, int]) -> str:
    kept = []
    for paragraph in paragraphs(document):
        words = re.findall(r"\w+", paragraph.casefold())
        key = hashlib.blake2b(" ".join(words).encode("utf-8", "surrogatepass"), digest_size=12).digest()
        if len(words) >= WORDS and key in seen:
            counts["repeated"] += len(paragraph)
            continue
        seen.add(key)
        if shares(paragraph, barred):
            counts["barred"] += len(paragraph)
            continue
        kept.append(paragraph)
    return "\n\n".join(kept)


def shares(text: str, hashes: Hashes) -> bool:
    """Whether a text has one of these sorted 13-gram hashes."""
    if not len(hashes):
        return False
    found = ngram_hashes([text])
    places = np.minimum(np.searchsorted(hashes, found), len(hashes) - 1)
    return bool((hashes[places] == found).any())


def sha256_of(texts: Sequence[str]) -> str:
    """Hex sha256 of the texts and of where each ends."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
