"""What papers report, as data: methods/published/*.json, one file a paper, read, checked and shown.

Nothing of it was measured here. A number is kept as it is printed, so that its precision stays: "5.50" is not
"5.5", and "1e5" has one digit. Each table and each claim names the document that was read; what of a paper
was not read stands under `unread`. What the authors of SensiBoost and KurtBoost measured of single layers
lies beside it as CSV (methods/published/boost, harness/layers.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path, PurePath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from harness.markdown import compact, table
from harness.store import os_reason, write_text
from methods.bits import Bits
from methods.checkpoint import DEFAULT_MODEL
from methods.errors import UserError
from methods.method import Method
from methods.registry import parse_method

FOLDER = Path(__file__).resolve().parent.parent / "methods" / "published"
HEADLINE = """\
What papers say of their methods and of others', on their models. **None of it was measured here.** No two \
tables share a protocol, so compare within one table alone. Brackets behind a perplexity hold its change \
over that table's float row in percent, behind an accuracy the change in points; `method` is how the row is \
written here, where this project has it. A dash is a number that is not there or was not taken over."""
PARAMETERS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
}
"""Of the models of the tables, where they are known: folders bear any name."""
_STORED_BESIDES = 1e-5
"""Share of a checkpoint's numbers that may be no parameters, such as the frequencies of rotary embeddings."""
Metric = Literal[
    "perplexity", "accuracy", "excess kurtosis", "change of perplexity (%)", "change of memory (%)"
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _number(text: str) -> str:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text!r} is not a finite number")
    return text


def _bits(text: str) -> str:
    if str(Bits.parse(text)) != text:
        raise ValueError(f"bits {text!r}: write {Bits.parse(text)}")
    return text


def _method(text: str) -> str:
    parse_method(text)
    return text


class Source(_Strict):
    """Where numbers were read. table: its number in that document (None: it has none, or it is not recorded);
    place: what to look for there."""

    document: str = Field(min_length=1)
    url: str = Field(pattern=r"^https://")
    table: str | None
    place: str = Field(min_length=1)

    @property
    def text(self) -> str:
        where = f"{self.table}: {self.place}" if self.table else self.place
        return f"[{self.document}]({self.url}), {where}"


class Protocol(_Strict):
    """How a table's numbers were measured. context: tokens of a window (None: not stated, or no windows)."""

    metric: Metric
    dataset: str = Field(min_length=1)
    context: int | None = Field(ge=1)
    weights: str = Field(min_length=1)
    activations: str = Field(min_length=1)
    kv_cache: str = Field(min_length=1)
    rounding: str = Field(min_length=1)

    @property
    def text(self) -> str:
        windows = "not stated" if self.context is None else f"{self.context:,} tokens"
        context = f"context: {windows}; " if self.metric == "perplexity" or self.context else ""
        return (
            f"{self.metric.capitalize()}; data: {self.dataset}; {context}weights: {self.weights}; "
            f"activations: {self.activations}; KV cache: {self.kv_cache}; rounding: {self.rounding}."
        )


class Column(_Strict):
    """A model: as it is called in the table, and its id on the hub, by which it is known here."""

    name: str = Field(min_length=1)
    hub: str | None

    def is_(self, model: Mapping[str, Any]) -> bool:
        """Whether the model of a cell's record is this one: it was opened by its hub id, or is the default
        model, whose files are checked; or a folder or a file is called as it is there, has as many
        parameters, and its weights were not rounded before."""
        name = str(model["name"]).rstrip("/").lower()
        if self.hub is None or name == self.hub.lower():
            return self.hub is not None
        path, hub = PurePath(name), PurePath(self.hub.lower())
        if path.stem != hub.name if path.suffix == ".gguf" else path.name != hub.name:
            return False
        if name == DEFAULT_MODEL:
            return True
        known = PARAMETERS.get(self.hub)
        near = known is not None and math.isclose(model["parameters"], known, rel_tol=_STORED_BESIDES)
        return near and not model.get("pre_quantised")


class Row(_Strict):
    """A line of a table. method: as it is written here (None: not a method of this project); values: of the
    table's models, as printed."""

    name: str = Field(min_length=1)
    method: str | None
    bits: str
    note: str = ""
    values: tuple[str | None, ...]

    @field_validator("bits")
    @classmethod
    def _canonical(cls, value: str) -> str:
        return _bits(value)

    @field_validator("method")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return value if value is None else _method(value)

    @field_validator("values")
    @classmethod
    def _numbers(cls, values: tuple[str | None, ...]) -> tuple[str | None, ...]:
        if not any(values):
            raise ValueError("a row without a number")
        return tuple(value if value is None else _number(value) for value in values)

    def stands_for(self, bits: str, method: Mapping[str, Any]) -> bool:
        """Whether it is of the bits and the method of a cell's record: of the same parts with the same
        options of their own, rounded alike. What the table's protocol says besides may differ."""
        if self.method is None or self.bits != bits:
            return False
        mine = parse_method(self.method)
        if mine.is_float or method.get("name") != mine.name or method.get("rounding") != mine.rounding:
            return mine.is_float and method.get("name") == mine.name
        options: Mapping[str, Mapping[str, Any]] = method.get("options") or {}
        return all(
            getattr(part, name) == value
            for part in mine.parts
            for name, value in options.get(part.name, {}).items()
            if name in _own_options(part)
        )


def _own_options(part: Method) -> set[str]:
    return {field.name for field in fields(part)} - {field.name for field in fields(Method)}


class Table(_Strict):
    """A table of a paper, or of what its authors published beside it."""

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    title: str = Field(min_length=1)
    source: Source
    protocol: Protocol
    models: tuple[Column, ...] = Field(min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _whole(self) -> Table:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"table {self.id}: a model stands twice")
        lines = [(row.name, row.bits) for row in self.rows]
        if len(set(lines)) < len(lines):
            raise ValueError(f"table {self.id}: a row stands twice")
        low, high = {"perplexity": (1.0, math.inf), "accuracy": (0.0, 100.0)}.get(
            self.protocol.metric, (-math.inf, math.inf)
        )
        for row in self.rows:
            if len(row.values) != len(names):
                raise ValueError(f"table {self.id}: {row.name}: {len(row.values)} of {len(names)} values")
            for value in filter(None, row.values):
                if not low <= float(value) <= high:
                    raise ValueError(f"table {self.id}: {row.name}: {value} is no {self.protocol.metric}")
        return self

    def row(self, method: str, bits: str) -> Row | None:
        """The first row that is written so here, None where there is none."""
        return next((row for row in self.rows if (row.method, row.bits) == (method, bits)), None)

    def value_of(self, method: str, bits: str, model: str) -> float:
        """The number of that row, NaN where there is none."""
        row = self.row(method, bits)
        return math.nan if row is None else self.value(row, model)

    def printed(self, row: Row, model: str) -> str | None:
        """A number as printed; `model`: as the table calls it."""
        return row.values[[column.name for column in self.models].index(model)]

    def value(self, row: Row, model: str) -> float:
        """The number, NaN where there is none."""
        return float(self.printed(row, model) or "nan")

    def change(self, row: Row, against: Row, model: str) -> float:
        """From one row to another: of perplexity in percent, of all else the difference; NaN where either
        number is missing."""
        value, base = self.value(row, model), self.value(against, model)
        return 100 * (value / base - 1) if self.protocol.metric == "perplexity" else value - base

    @property
    def base(self) -> Row | None:
        """The row of the float model."""
        return next((row for row in self.rows if row.method == "float"), None)


class Claim(_Strict):
    """What a paper says in words: between `low` and `high` of `unit`, `method` against another."""

    method: str
    against: str
    metric: str = Field(min_length=1)
    low: str
    high: str
    unit: Literal["%", "% of it", "times"]
    bits: str | None
    models: str = Field(min_length=1)
    note: str = ""
    source: Source

    @field_validator("method", "against")
    @classmethod
    def _known(cls, value: str) -> str:
        return _method(value)

    @field_validator("low", "high")
    @classmethod
    def _numbers(cls, value: str) -> str:
        return _number(value)

    @field_validator("bits")
    @classmethod
    def _canonical(cls, value: str | None) -> str | None:
        return value if value is None else _bits(value)

    @property
    def text(self) -> str:
        between = self.low if self.low == self.high else f"{self.low} to {self.high}"
        bits = f" at {self.bits}" if self.bits else ""
        note = f" ({self.note})" if self.note else ""
        return (
            f"`{self.method}` against `{self.against}`{bits}: {self.metric} {between} {self.unit}{note}; "
            f"models: {self.models}; {self.source.text}"
        )


class Paper(_Strict):
    """A paper: what was read of it, and what was not. methods: those here that are its."""

    title: str = Field(min_length=1)
    authors: str = Field(min_length=1)
    arxiv: str | None = Field(pattern=r"^\d{4}\.\d{5}$")
    methods: tuple[str, ...]
    unread: str = ""
    claims: tuple[Claim, ...] = ()
    tables: tuple[Table, ...] = ()

    @field_validator("methods")
    @classmethod
    def _known(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_method, values))

    @model_validator(mode="after")
    def _says_something(self) -> Paper:
        ids = [found.id for found in self.tables]
        if len(set(ids)) < len(ids):
            raise ValueError("two tables of one id")
        if not (self.tables or self.claims or self.unread):
            raise ValueError("neither a table nor a claim, and not why")
        return self

    def table(self, id_: str) -> Table:
        return next(found for found in self.tables if found.id == id_)


@functools.cache
def papers(folder: Path = FOLDER) -> dict[str, Paper]:
    """Every paper by the name of its file. Raises UserError, one line, for a file that cannot be read."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def read(path: Path) -> Paper:
    """One file. Raises UserError, one line, where it is damaged or says what cannot be."""
    try:
        return Paper.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {os_reason(error)}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        reason = " ".join(first["msg"].removeprefix("Value error, ").split())
        raise UserError(f"{path}: {where + ': ' if where else ''}{reason}") from error


def render(found: Mapping[str, Paper]) -> str:
    """All papers as Markdown: equal data give equal text."""
    text = ["# What papers report", HEADLINE]
    for paper in found.values():
        text += [f"## {paper.title}", _about(paper)]
        if paper.claims:
            text.append("\n".join(f"- {claim.text}" for claim in paper.claims))
        for part in paper.tables:
            text += [f"### {part.title}", f"{part.source.text}. {part.protocol.text}", _lines(part)]
            notes = [f"- {row.name}, {row.bits}: {row.note}" for row in part.rows if row.note]
            text += ["\n".join(notes)] if notes else []
    return "\n\n".join(text).rstrip() + "\n"


def write(out: Path) -> Path:
    """published.md, of all papers, in a folder; returns its path. Raises UserError, one line."""
    path, text = out / "published.md", render(papers())
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, compact(text))
    except OSError as error:
        raise UserError(f"{path}: {os_reason(error)}") from error
    return path


def _about(paper: Paper) -> str:
    cited = f"{paper.authors}, arXiv {paper.arxiv}" if paper.arxiv else paper.authors
    here = f" Here: {', '.join(f'`{name}`' for name in paper.methods)}." if paper.methods else ""
    return f"{cited}.{here} {paper.unread}".rstrip()


def _lines(part: Table) -> str:
    head = ["what", "bits", "method", *(model.name for model in part.models)]
    lines = [
        [
            *(row.name, row.bits, f"`{row.method}`" if row.method else "–"),
            *(_shown(part, row, model.name) for model in part.models),
        ]
        for row in part.rows
    ]
    return table(head, lines)


def _shown(part: Table, row: Row, model: str) -> str:
    printed = part.printed(row, model)
    if printed is None:
        return "–"
    change = math.nan if part.base in (None, row) else part.change(row, part.base, model)
    return printed if math.isnan(change) else f"{printed} ({change_text(change)})"


def change_text(change: float) -> str:
    """A change in percent or points: "+11.5", "−2.0"; a collapse with one digit, "+4e4"."""
    if not math.isfinite(change):
        return "–"
    if abs(change) < 1000:
        return f"{change:+.1f}"
    mantissa, _, exponent = f"{change:+.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
