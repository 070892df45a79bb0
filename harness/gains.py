"""The report's section on what learning transforms brings: perplexity against QuaRot's and other learners',
beside what the papers report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from harness import inference
from harness.evidence import over, paired_rows
from harness.markdown import plain, table
from harness.published import papers
from harness.records import Column, Model, Record, Row, flags_of
from harness.stats import Estimate
from harness.tables import flag_notes
from methods.errors import UserError
from methods.registry import method_class

LEARNERS = ("kurtail", "spinquant")
STATIC = "fptquant"
GAINS = """\
Change of perplexity in percent, paired by seed and by passage, with its interval (95 %: other passages and, \
with several seeds, other seeds); below zero the method is better than what it is held against. QuaRot is \
the row of the same rounding, preset and online transforms; SpinQuant that of default options, whatever it \
starts from. FPTQuant, whose ranges are static unless it says otherwise, is held against QuaRot as it is, \
with dynamic ones, and with static ranges of least error. Paper: what KurTail's abstract says of WikiText \
and far larger models. Exploratory: not corrected for the number of comparisons."""


def gains_section(model: Model) -> list[str]:
    """Empty without learned transforms beside what they can be compared with."""
    columns, lines = model.perplexities, []
    problems: dict[str, None] = {}
    flags = ""
    for row, reference in _pairs(model):
        found = [_estimates(row, reference, column, problems) for column in columns]
        seeds = max(map(len, found), default=0)
        if seeds:
            known = _plain(row) and _option(reference, "start") in (True, "hadamard")
            said = _claimed(row, reference) if known else "–"
            shown = [change_text(inference.over_seeds(each)) if each else "–" for each in found]
            flags += flags_of(model.record, row)
            label = f"{row.label} {flags_of(model.record, row)}".strip()
            lines.append([row.bits, label, reference.label, seeds, *shown, said])
    if not lines:
        return []
    head = ["bits", "method", "against", "seeds", *(f"{column.title} (%)" for column in columns), "paper (%)"]
    lost = [f"Not compared: {'; '.join(plain(problem) for problem in problems)}."] if problems else []
    notes = flag_notes(model.record, flags)
    return ["### Does learning pay?", table(head, lines), GAINS, *notes, *lost]


def _claimed(row: Row, reference: Row) -> str:
    """What the paper of a method says of its perplexity against another, in percent."""
    paper = papers().get(_name(row))
    claims = [
        claim
        for claim in (paper.claims if paper else ())
        if (claim.method, claim.against, claim.metric) == (_name(row), _name(reference), "perplexity")
    ]
    return claims[0].low.replace("-", "−") if claims else "–"


def change_text(log: Estimate) -> str:
    """A difference of log-perplexities as percent of perplexity, with its interval."""
    if not math.isfinite(log.value):
        return "not finite"
    low, high = log.interval()
    between = f" [{_percent(low)}, {_percent(high)}]" if math.isfinite(low + high) else ""
    return _percent(log.value) + between


def change(log: Estimate) -> str:
    """A difference of log-perplexities as percent of perplexity."""
    return _percent(log.value) if math.isfinite(log.value) else "not finite"


def _percent(log: float) -> str:
    return f"{100 * math.expm1(log):+.1f}" if log < 100 else "+inf"


def _estimates(row: Row, reference: Row, column: Column, problems: dict[str, None]) -> list[Estimate]:
    return over(paired_rows(reference.usable, row, [column], problems), [column])


def _pairs(model: Model) -> Iterator[tuple[Row, Row]]:
    """(learned row, row that it is held against)."""
    rows = [row for row in model.rows if not row.first.is_float]
    for row in rows:
        beside = [other for other in rows if other.bits == row.bits and _alike(row, other)]
        if _name(row) in LEARNERS:
            drawn = [other for other in beside if _name(other) == "quarot" and _plain(other, "online")]
            drawn = [other for other in drawn if _option(other, "online") == _option(row, "online")]
            yield from ((row, other) for other in drawn[:1])
        if _name(row) == "kurtail" and _plain(row):
            yield from (
                (row, other) for other in beside if _name(other) == "spinquant" and _plain(other, "start")
            )
        if _name(row) == STATIC and _plain(row, "static"):
            for name in ("quarot", "quarot+static")[: 2 if _option(row, "static") else 1]:
                yield from [(row, other) for other in beside if _name(other) == name and _plain(other)][:1]


def _name(row: Row) -> str:
    return str(row.first.record["method"].get("name"))


def _options(row: Row) -> Record:
    """Of its leading method."""
    options: Record = (row.first.record["method"].get("options") or {}).get(_lead(row)) or {}
    return options


def _lead(row: Row) -> str:
    return _name(row).partition("+")[0]


def _option(row: Row, option: str) -> object:
    return _options(row).get(option, True)


def _alike(row: Row, other: Row) -> bool:
    return all(_options(row).get(option) == _options(other).get(option) for option in ("rounding", "preset"))


def _plain(row: Row, *aside: str) -> bool:
    """Whether the options of all its parts are the defaults, those that `aside` names apart, rounding and
    preset too."""
    ignored = {*aside, "rounding", "preset"}
    given: Record = row.first.record["method"].get("options") or {}
    for name in _name(row).split("+"):
        try:
            defaults = dataclasses.asdict(method_class(name)())
        except UserError:  # a method that is not installed here
            return False
        options = given.get(name) or {}
        if any(options.get(each, value) != value for each, value in defaults.items() if each not in ignored):
            return False
    return True
