"""What a cell's record says of its model beside scores: the inputs of blocks, what was learned, what
runs online, to what weights were rounded and how far that moved them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from methods.kurtosis import BINS, REACH, SiteKurtosis
from methods.method import Plan
from methods.online import online_parts
from methods.pipeline import Quantised

Record = dict[str, Any]

DIGITS = 5
"""Significant digits of what is recorded: figures show fewer, and whole studies are kept."""


def site_record(site: SiteKurtosis) -> Record:
    """One site as JSON keeps it."""
    return {**dataclasses.asdict(site.spread), "counts": site.counts}


def site_key(site: SiteKurtosis) -> str:
    return f"{site.layer} {site.site}"


def describe(quantised: Quantised, before: Mapping[str, Record]) -> Record:
    """before: `site_record` of the checkpoint as it is, by `site_key`; empty where nothing was probed."""
    learned = {
        name: {key: fact for key, fact in facts.items() if key != "measured"}
        for name, facts in quantised.learned.items()
    }
    record: Record = {
        "kurtosis": [_site(site, before[site_key(site)]) for site in quantised.kurtosis],
        "histograms": _histograms(quantised.kurtosis, before),
        **({"learned": learned} if learned else {}),
        "online": [dataclasses.asdict(part) for part in online_parts(quantised.decoder)],
        "weights": weight_groups(quantised.plan),
        "weight_error": [dataclasses.asdict(error) for error in quantised.rounding_errors],
    }
    return {name: shortened(facts) for name, facts in record.items()}


def shortened(facts: Any) -> Any:
    """The same with every float of it at `DIGITS` significant digits."""
    if isinstance(facts, float):
        return float(f"{facts:.{DIGITS}g}")
    if isinstance(facts, Mapping):
        return {name: shortened(fact) for name, fact in facts.items()}
    if isinstance(facts, list | tuple):
        return [shortened(fact) for fact in facts]
    return facts


def weight_groups(plan: Plan) -> list[Record]:
    """The weight quantisers of a plan, {"bits", "group", "axis", "count", "linears"}, the most frequent
    first; that one's linears, which are all others, are not listed."""
    members: dict[tuple[int, int | None, int], list[str]] = {}
    for name, spec in plan.linears.items():
        members.setdefault((spec.bits, spec.group, spec.axis), []).append(name)
    ordered = sorted(members.items(), key=lambda item: -len(item[1]))
    return [
        {"bits": bits, "group": group, "axis": axis, "count": len(names), "linears": names if place else None}
        for place, ((bits, group, axis), names) in enumerate(ordered)
    ]


def learning_costs(quantised: Quantised) -> Record:
    """Seconds and bytes that learning took when it was done, by method."""
    return {name: facts["measured"] for name, facts in quantised.learned.items() if "measured" in facts}


def _site(site: SiteKurtosis, before: Record) -> Record:
    after = dataclasses.asdict(site.spread)
    return {
        "layer": site.layer,
        "site": site.site,
        "before": before["kurtosis"],
        "after": site.value,
        **{f"{fact}_before": before[fact] for fact in ("peak", "snr")},
        **{f"{fact}_after": after[fact] for fact in ("peak", "snr")},
    }


def _histograms(sites: Sequence[SiteKurtosis], before: Mapping[str, Record]) -> list[Record]:
    """Counts of x/rms, of all layers together: an entry for each site."""
    found: dict[str, Record] = {}
    for site in sites:
        fresh = {"site": site.site, "reach": REACH, "before": [0] * BINS, "after": [0] * BINS}
        entry = found.setdefault(site.site, fresh)
        for when, counts in (("before", before[site_key(site)]["counts"]), ("after", site.counts)):
            entry[when] = [total + count for total, count in zip(entry[when], counts, strict=True)]
    return list(found.values())
