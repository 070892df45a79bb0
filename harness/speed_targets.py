"""What whole decoders are meant to reach on one GPU, as data, and whether a record reaches it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BASELINE = "bf16"
INTEGER = (("w4a8kv8", "none"), ("w4a4kv4", "quarot"))
"""Forms with the online parts that they are of use with: without rotations nobody would run the second."""


@dataclass(frozen=True)
class Target:
    """A number of one shape, phase, batch and context, the best of some forms, against a bound. forms: with
    their online parts.

    what: "speed" (the baseline's time as a multiple of theirs), "of_floor" (the floor's share of their own
    time) or "bytes" (weights and KV cache as a share of the baseline's). least or most: the bound.
    """

    title: str
    what: str
    shape: str
    phase: str
    batch: int
    context: int
    forms: Sequence[tuple[str, str]]
    least: float | None = None
    most: float | None = None


TARGETS = (
    Target("decode, batch 1, against bf16", "speed", "llama-3-8b", "decode", 1, 1024, INTEGER, least=2.4),
    Target("prefill, 8 x 2048, against bf16", "speed", "llama-3-8b", "prefill", 8, 2048, INTEGER, least=1.4),
    Target(
        "bf16 decode, share of its floor",
        "of_floor",
        "llama-3-8b",
        "decode",
        1,
        1024,
        ((BASELINE, "none"),),
        least=0.8,
    ),
    Target(
        "weights + KV, 8 x 32768, of bf16's",
        "bytes",
        "llama-3-8b",
        "decode",
        8,
        32768,
        (("w4a8kv8", "none"), ("w4a4kv4", "none")),
        most=0.35,
    ),
)


@dataclass(frozen=True)
class Verdict:
    """A target beside the record. value: the best of its forms, None where it was not measured. reason: why
    it is not judged although it was measured."""

    title: str
    shape: str
    where: str
    bound: str
    value: float | None
    form: str | None
    met: bool | None
    reason: str | None = None


def judge(results: Sequence[Mapping[str, Any]], targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """Every target whose shape is among the results. results: rows of a record, as JSON holds them, those of
    its overhead behind the others."""
    shapes = {row["shape"] for row in results}
    return [_judged(target, results) for target in targets if target.shape in shapes]


def _judged(target: Target, results: Sequence[Mapping[str, Any]]) -> Verdict:
    here = {
        (row["form"], row["online"]): row
        for row in reversed(results)
        if (row["shape"], row["phase"], row["batch"], row["context"])
        == (target.shape, target.phase, target.batch, target.context)
    }
    values = {form: value for form in target.forms if (value := _value(target, here, form)) is not None}
    best = max if target.most is None else min
    form = best(values, key=values.__getitem__, default=None)
    value = None if form is None else values[form]
    name = form and (form[0] if form[1] == "none" else " ".join(form))
    bound = f"at least {target.least:g}" if target.least is not None else f"at most {target.most:g}"
    met, reason = None, None
    if value is not None:
        reason = _unfit_baseline(target, here)
    if value is not None and reason is None:
        met = value >= target.least if target.least is not None else value <= (target.most or 0.0)
    where = f"{target.phase} {target.batch} x {target.context}"
    return Verdict(target.title, target.shape, where, bound, value, name, met, reason)


def _unfit_baseline(target: Target, here: Mapping[tuple[str, str], Mapping[str, Any]]) -> str | None:
    """Why the baseline's time is none to judge by: without its graph it is slower than it need be, and any
    form fast beside it."""
    baseline = here.get((BASELINE, "none"))
    if baseline is None or baseline["eager"] is None or target.what == "bytes":
        return None
    return f"the steps of {BASELINE} were launched by the host ({baseline['eager']})"


def _value(
    target: Target, here: Mapping[tuple[str, str], Mapping[str, Any]], form: tuple[str, str]
) -> float | None:
    row, baseline = here.get(form), here.get((BASELINE, "none"))
    if row is None:
        return None
    if target.what == "bytes":
        if baseline is None:
            return None
        return float((row["weights"] + row["kv"]) / (baseline["weights"] + baseline["kv"]))
    if target.what == "speed":
        # Formed anew: in rows of the overhead, speeds are against the same form without online parts.
        if baseline is None or not baseline["seconds"] or not row["seconds"]:
            return None
        return statistics.median(baseline["seconds"]) / statistics.median(row["seconds"])
    value = row[target.what]
    return None if value is None else float(value)
