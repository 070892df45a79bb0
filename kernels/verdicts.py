"""What a GPU run of `python -m kernels.bench` says of the targets in kernels/targets.py: met, missed, not
judged. Its rows, and how fast they are beside each other.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kernels.targets import (
    ATTENTION,
    BF16_ATTENTION,
    DECIDING,
    DECIDING_NOTE,
    INFORMATION,
    INFORMATION_NOTE,
    SHAPE,
    Target,
)

NEEDED = {"by", "reason", "rotated", "eager", "of_floor", "bytes", "multiply_adds"}
NOT_A_RECORD = "this is no record of a GPU run of kernels.bench"
FORMER_NAMES = {
    "ours w4a8 + quantise": "ours w4a8 + quantise, weights at rest",
    "ours w4a4 + quantise": "ours w4a4 + quantise, plain",
}
"""How contestants are called now that earlier records name without saying how they were launched."""

ATTENTION_NOTE = """\
What KV4 is compared with: the fastest of these in each turn. Heads folded: the queries of a group as if \
they were positions. Where neither way to ask flash ran, or neither to ask cuDNN, nothing is judged."""

Row = dict[str, Any]
Key = tuple[str, str, str, int, str]
"""Shape, operation, layer, rows, contestant."""
Reasons = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Point:
    """A target at one layer and number of rows. speeds: how many times as fast in each turn, empty where it
    was not measured. reason: why it is not judged although it was run for."""

    layer: str
    rows: int
    speeds: tuple[float, ...]
    reason: str | None = None

    @property
    def speed(self) -> float | None:
        return statistics.median(self.speeds) if self.speeds else None

    @property
    def place(self) -> str:
        return f"{self.layer} {self.rows}"

    def __str__(self) -> str:
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"{self.layer}, {rows}: {_times(self.speed)} (lowest turn {_times(min(self.speeds))})"


def index(record: dict[str, Any]) -> dict[Key, Row]:
    """The rows of a run by what they are about. Raises ValueError for a file of another kind, and where rows
    of one contest do not have the same turns."""
    found: dict[Key, Row] = {}
    turns: dict[tuple[str, str, str, int], int] = {}
    try:
        for given in record["results"]:
            row = {**given, "name": FORMER_NAMES.get(given["name"], given["name"])}
            contest = (row["shape"], row["operation"], row["layer"], row["rows"])
            seconds = row["seconds"]
            if seconds:
                if not all(value > 0 for value in seconds):
                    raise ValueError(f"{NOT_A_RECORD}: a time of {min(seconds)} s")
                if turns.setdefault(contest, len(seconds)) != len(seconds):
                    raise ValueError(f"{NOT_A_RECORD}: contestants of {contest} with unequal turns")
            if missing := NEEDED - set(row):
                raise ValueError(f"{NOT_A_RECORD}: a row without {', '.join(sorted(missing))}")
            found[(*contest, row["name"])] = row
    except (KeyError, TypeError) as error:
        raise ValueError(NOT_A_RECORD) from error
    return found


def speeds(ours: Row | None, *theirs: Row | None) -> tuple[float, ...]:
    """How many times as fast ours is in each turn, against the fastest of the others in it; empty where one
    of them did not run."""
    every = [ours, *theirs]
    if any(row is None or not row["seconds"] for row in every):
        return ()
    own, *others = ([*row["seconds"]] for row in every if row is not None)
    return tuple(min(turn) / a for a, turn in zip(own, zip(*others, strict=True), strict=True))


def speed(ours: Row | None, theirs: Row | None) -> float | None:
    """The median over turns of `speeds`, None where one of them did not run."""
    found = speeds(ours, theirs)
    return statistics.median(found) if found else None


def points(target: Target, rows: dict[Key, Row]) -> Iterator[Point]:
    """The target at each of its layers and numbers of rows."""
    for layer in target.layers:
        for count in target.rows:
            found = {name: rows.get((SHAPE, target.operation, layer, count, name)) for name in target.against}
            ours = rows.get((SHAPE, target.operation, layer, count, target.ours))
            if not target.needed:
                yield Point(layer, count, speeds(ours, *found.values()))
                continue
            absent = [names for names in target.needed if not any(_ran(found[name]) for name in names)]
            if absent and _ran(ours):
                why = "; ".join(f"{name}: {_absence(found[name])}" for names in absent for name in names)
                yield Point(layer, count, (), why)
                continue
            ran = [row for row in found.values() if _ran(row)]
            yield Point(layer, count, speeds(ours, *(ran or [None])))


def _ran(row: Row | None) -> bool:
    return row is not None and bool(row["seconds"])


def _absence(row: Row | None) -> str:
    """Why a contestant has no time."""
    return "not in this run" if row is None else row["reason"] or "no times"


def met(target: Target, point: Point) -> bool:
    """Whether the median reaches the target. Faster than another means faster in nine of ten turns."""
    if point.speed is None:
        return False
    if target.least == 1.0:
        return 10 * sum(speed <= 1.0 for speed in point.speeds) <= len(point.speeds)
    return point.speed >= target.least


def targets_section(rows: dict[Key, Row], reasons: Reasons) -> list[str]:
    """The targets that decide and what misses them with the reasons, then what is shown for information.
    Raises ValueError for a reason for what is not missed."""
    lines = ["## Targets", "", DECIDING_NOTE, "", *_targets(DECIDING, rows)]
    missed = [
        (target, point)
        for target in DECIDING
        for point in points(target, rows)
        if point.speed is not None and not met(target, point)
    ]
    given = {(title, place) for title, places in reasons.items() for place in places}
    if unknown := sorted(given - {(target.title, point.place) for target, point in missed}):
        raise ValueError(f"a reason for what is not missed: {', '.join(unknown[0])}")
    if missed:
        lines += ["### Missed", "", "| target | at least | missed at | why |", "|:--|--:|:--|:--|"]
    for target, point in missed:
        why = reasons.get(target.title, {}).get(point.place, "not known: no counters were read")
        lines.append(f"| {target.title} | {_times(target.least)} | {point} | {why} |")
    lines += [""] if missed else []
    return [*lines, "### For information", "", INFORMATION_NOTE, "", *_targets(INFORMATION, rows)]


def _targets(targets: Sequence[Target], rows: dict[Key, Row]) -> list[str]:
    """A table of how often each target is met, with its slowest point."""
    lines = ["| target | against | at least | aim | limit | met | slowest |", "|:--|:--|--:|--:|--:|--:|:--|"]
    operations = {key[1] for key in rows}
    absent = [target.title for target in targets if target.operation not in operations]
    unjudged: list[str] = []
    for target in targets:
        if target.title in absent:
            continue
        every = list(points(target, rows))
        measured = [point for point in every if point.speed is not None]
        slowest = min(measured, key=lambda point: point.speed or 0.0, default="not measured")
        numbers = [_times(target.least), _times(target.aim), _times(target.limit)]
        count = f"{sum(met(target, point) for point in measured)} of {len(every)}"
        refused = [point for point in every if point.reason is not None]
        unknown = len(every) - len(measured) - len(refused)
        count += f", {len(refused)} not judged" if refused else ""
        count += f", {unknown} not measured" if measured and unknown else ""
        unjudged += [f"- {target.title}, {point.place}: not judged: {point.reason}." for point in refused]
        against = " or ".join(target.against)
        lines.append(f"| {' | '.join([target.title, against, *numbers, count, str(slowest)])} |")
    lines += ["", *unjudged] + ([""] if unjudged else [])
    return (
        [*lines, f"Of operations that this run did not time: {'; '.join(absent)}.", ""] if absent else lines
    )


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.{2 if value >= 1 else 3}f}x"


def attention_section(rows: dict[Key, Row]) -> list[str]:
    """Which of the known ways to attend in bf16 ran, how often, and why others did not; empty where attention
    was not timed."""
    places = list(dict.fromkeys(key[:4] for key in rows if key[1] == ATTENTION))
    if not places:
        return []
    lines = ["## Attention in bf16", "", ATTENTION_NOTE, ""]
    lines += ["| contestant | ran | why not elsewhere |", "|:--|--:|:--|"]
    for name in BF16_ATTENTION:
        found = [rows.get((*place, name)) for place in places]
        missing: dict[str, list[str]] = {}
        for place, row in zip(places, found, strict=True):
            if not _ran(row):
                missing.setdefault(_absence(row), []).append(f"{place[2]} {place[3]}")
        ran = sum(map(_ran, found))
        why = [
            said if len(at) == len(places) else f"{said} ({', '.join(at)})" for said, at in missing.items()
        ]
        lines.append(f"| {name} | {ran} of {len(places)} | {'; '.join(why)} |")
    return [*lines, ""]
