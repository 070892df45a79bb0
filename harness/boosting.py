"""The report's section on methods that give more bits to some matrices: what they bring for what they take,
beside what else the bits could be spent on, and whether the choice matters (harness/choices.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import inference, plots
from harness.choices import (
    BOOSTS,
    Choice,
    Pooled,
    boosted_linears,
    choices_of,
    is_boosted,
    is_control,
    planned,
    pooled,
    rivals,
)
from harness.evidence import over, paired_rows
from harness.layers import CORRELATIONS, LayerValues, correlations, merged, published
from harness.markdown import plain, table
from harness.published import Paper, papers
from harness.published import Row as PublishedRow
from harness.records import Cell, Column, Model, Row, flags_of
from harness.stats import Estimate
from harness.tables import flag_notes, p_text, signed
from methods.sensitivity import Layers, of_matrices

ALPHA = 0.05
MEBIBYTE = 2**20
PUBLISHED_ROWS = {
    f"{name} {stop}": f"{method}stop={stop}"
    for name, method in (
        ("sensiboost", "sensiboost:"),
        ("kurtboost", "kurtboost:"),
        ("random", "sensiboost:choice=random;"),
    )
    for stop in (2, 3)
}
"""The authors' rows, as reports call them and as methods/published writes them."""
HEADLINE = ("sensiboost", 3, 128, 3)
"""Method, bits, group and rungs of the authors' best cell, from which their headline comes."""
LEVELS = """\
Each width's first row is the base of those under it, the rounding alone with the same groups and scales, \
and Δ is the difference of log-perplexity to it over the same passages (below zero is better, 0.01 is 1 % \
of perplexity; 95 % intervals). Draws: the mean, and the best and worst, of as many matrices of each type, \
drawn at random from those that do not stand out, the last layer left out, as the authors do. Memory is \
that of the quantised linears: by formula (bits, and 16 for a scale or a fractional zero-point, or 8 where \
those are quantised) and of the bytes that they held once packed, which counts float32 scales, padding, \
and scales that groups across outputs repeat (–: not on record)."""
CHOOSING = """\
Choice - draws is what choosing adds; below zero is better. The choice is one set of matrices, so it is \
held against the spread of the draws, as one more of them would be, and not against the precision of their \
mean. All rows of one method share the choice, and those of one seed the draw: they are no replications of \
each other, so the tests are those of the second table, where each draw's differences are averaged over a \
method's rows of one width first (and their spread is taken as no smaller than if the rows' draws were \
independent); p is corrected for all of its lines (Holm). Detectable: the smallest true effect that such a \
test would see in 80 % of runs."""
PUBLISHED_NOTE = """\
Theirs, not measured here: from the authors' repository (methods/published/boost.json), on their models by \
their protocol. Change of WikiText-2 perplexity against HQQ of the same budget in percent, for 2 and 3 \
rungs, with the change of the GPU memory that they recorded in brackets, embeddings included; `random` is \
their control, drawn without a seed. Their headline, up to 9 % less perplexity for 2 % more memory, is one \
corner of this table (Llama-3-8B, 3.13 bits, sensiboost 3; by the formula +1.81 %); at 4 bits and more the \
gains fade, and on Llama-2-13B at 3.13 bits random choices did better than theirs by sensitivity. Not to \
be set beside the numbers above."""


def boosting_section(model: Model, figures: Path, stem: str) -> list[str]:
    """Writes its figure, returns its text; empty without a boosted row."""
    rows = [row for row in model.rows if is_boosted(row)]
    if not rows:
        return []
    problems: dict[str, None] = {}
    compared: set[str] = set()
    shown = list(rows)
    text = ["### More bits where they matter"]
    explained = False
    for column in model.perplexities:
        choices = choices_of(model, column, problems)
        if not choices:
            continue
        shown += [row for base in {choice.base for choice in choices} for row in (base, *rivals(model, base))]
        compared |= {f"{choice.row.bits} {choice.row.label}" for choice in choices}
        tests = pooled(choices)
        text += [f"#### On {column.title}", _levels(model, column, choices, problems)]
        text += [] if explained else [LEVELS]
        if any(choice.draws for choice in choices):
            text += [_rows(model, choices), *([_tests(tests)] if tests else [])]
            text += [] if explained else [CHOOSING]
        text += [_verdict(choices, tests), _headline(model, column, choices)]
        explained = True
    own = [f"{row.bits} {row.label}" for row in rows if not is_control(row)]
    missing = [name for name in own if name not in compared] if model.perplexities else []
    if missing:
        text.append(
            f"Without a base (hqq, or the same rounding alone) to compare with: {plain('; '.join(missing))}."
        )
    text += [f"Not compared: {plain('; '.join(problems))}."] if problems else []
    empty = [
        f"{row.bits} {row.label}" for row in rows if not is_control(row) and not boosted_linears(row.first)
    ]
    if empty:
        text.append(f"No layer stood out, so nothing was boosted: {plain('; '.join(empty))}.")
    text += flag_notes(model.record, {flag for row in shown for flag in flags_of(model.record, row)})
    return [*filter(None, text), *_figure(model, rows, figures, stem), *published_section()]


def _levels(model: Model, column: Column, choices: Sequence[Choice], problems: dict[str, None]) -> str:
    """Every base, what else its bits could be spent on, its choices and their draws."""
    lines = []
    for base in dict.fromkeys(choice.base for choice in choices):
        own = [choice for choice in choices if choice.base is base]
        lines.append(_level(model, column, base, "", None))
        for row in rivals(model, base):
            seeds = over(paired_rows(base.usable, row, [column], problems), [column])
            lines.append(_level(model, column, row, "", inference.over_seeds(seeds) if seeds else None))
        for choice in own:
            total = sum(some["count"] for some in planned(choice.row.first))
            boosted = f"{len(boosted_linears(choice.row.first))} of {total}"
            chosen = bool(boosted_linears(choice.row.first))
            lines.append(_level(model, column, choice.row, boosted, choice.to_base if chosen else None))
            if choice.control is not None and chosen:
                lines.append(_level(model, column, choice.control, boosted, choice.control_to_base))
    head = ["bits", "method", "boosted", "bits / weight", "formula (MiB)", "packed (MiB)", column.title]
    return table([*head, "Δ to base [95 %]"], lines)


def _level(model: Model, column: Column, row: Row, boosted: str, to_base: Estimate | None) -> list[str]:
    bits = [
        cell.record["effective_bits"]["weight"] for cell in row.usable if cell.record.get("effective_bits")
    ]
    return [
        row.bits,
        f"{row.label} {flags_of(model.record, row)}".strip(),
        boosted,
        f"{sum(bits) / len(bits):.3f}" if bits else "–",
        *(_mebibytes(row, how) for how in ("computed", "packed")),
        _perplexity(column, row),
        "" if to_base is None else signed(to_base, "perplexity", interval=True, p=1.0),
    ]


def _perplexity(column: Column, row: Row) -> str:
    """Mean over seeds, with the best and worst of several."""
    found = [estimate.value for cell in row.usable if (estimate := column.estimate(cell)) is not None]
    values = sorted(math.exp(value) if value < 700 else math.inf for value in found)
    if len(values) < 2:
        return f"{values[0]:.4g}" if values else "–"
    return f"{sum(values) / len(values):.4g} ({values[0]:.4g} to {values[-1]:.4g})"


def _rows(model: Model, choices: Sequence[Choice]) -> str:
    lines = []
    for choice in choices:
        if not choice.draws or not boosted_linears(choice.row.first):
            continue
        better = sum(estimate.value < 0 for estimate in choice.draws.values())
        lines.append(
            [
                choice.row.bits,
                f"{choice.row.label} {flags_of(model.record, choice.row)}".strip(),
                f"{better} of {len(choice.draws)}",
                signed(choice.to_control, "perplexity", interval=True, p=1.0),
            ]
        )
    return table(["bits", "method", "better than draws", "choice - draws [95 %]"], lines) if lines else ""


def _tests(tests: Sequence[Pooled]) -> str:
    lines = [
        [
            f"w{test.bits}",
            test.method,
            str(len(test.choices)),
            str(test.draws),
            signed(test.difference, "perplexity", interval=True, p=test.p),
            p_text(test.p),
            f"{inference.detectable(test.difference.stderr, test.difference.df):.3f}",
        ]
        for test in tests
    ]
    head = ["bits", "method", "rows", "draws", "choice - draws [95 %]", "p (Holm)", "detectable"]
    return table(head, lines)


def _verdict(choices: Sequence[Choice], tests: Sequence[Pooled]) -> str:
    """Does boosting beat the control?"""
    if not any(boosted_linears(choice.row.first) for choice in choices):
        return "**Whether choosing beats drawing at random cannot be asked here**: nothing was chosen."
    if not tests:
        return "**Whether choosing beats drawing at random is open**: no choice has two draws of its size."
    told = [test for test in tests if test.p < ALPHA]
    better = [test for test in told if test.difference.value < 0]
    if len(better) == len(tests):
        answer = "Yes"
    elif not told:
        answer = "It cannot be told"
    else:
        worse = [test for test in told if test not in better]
        said = [f"better for {_names(better)}"] if better else []
        said += [f"worse for {_names(worse)}"] if worse else []
        said += ["the rest cannot be told"] if len(told) < len(tests) else []
        answer = "; ".join(said).capitalize()
    return (
        f"**Does choosing beat drawing at random? {answer}.** {len(tests)} tests at 5 %, corrected for each "
        "other; what cannot be told may still be there, below what the column `detectable` says."
    )


def _names(tests: Sequence[Pooled]) -> str:
    return " and ".join(f"{test.method} at {test.bits} bits" for test in tests)


def _headline(model: Model, column: Column, choices: Sequence[Choice]) -> str:
    """The authors' headline in the cell that theirs comes from."""
    method, bits, group, stop = HEADLINE
    for choice in choices:
        found = choice.row.first
        options = found.record["method"]["options"].get(method, {})
        if (found.bits.weight, found.bits.group, options.get("stop")) != (bits, group, stop):
            continue
        if choice.to_base is None or not boosted_linears(found):
            continue
        unrounded = next((row for row in model.rows if row.first.is_float), None)
        far = [_perplexity(column, row) for row in (choice.base, unrounded) if row is not None]
        low, high = (100 * math.expm1(bound) for bound in choice.to_base.interval())
        return (
            "The authors' headline is up to 9 % less perplexity for 2 % more memory, of their sensiboost at "
            f"{bits} bits in groups of {group}, {stop} rungs up. The same here, {plain(choice.row.label)}: "
            f"{100 * math.expm1(choice.to_base.value):+.1f} % [{low:+.1f}, {high:+.1f}] for "
            f"{_more(choice.base, choice.row, 'computed')} of the linears' memory by formula and "
            f"{_more(choice.base, choice.row, 'packed')} packed, from a base of perplexity "
            f"{' where float has '.join(far)}."
            + (
                ""
                if choice.draws
                else " There are no draws of its size, so whether its choice matters is open."
            )
        )
    return ""


def _figure(model: Model, rows: Sequence[Row], figures: Path, stem: str) -> list[str]:
    """Sensitivity and kurtosis of each layer, as the first row that measured them did."""
    series: dict[str, tuple[Layers, Mapping[str, Sequence[int]]]] = {}
    for row in rows:
        for name, facts in _learned(row.first).items():
            layers = _values(facts, row.first.record["method"]["options"].get(name) or {})
            if layers and name not in series and not is_control(row):
                series[name] = layers, _by_type(boosted_linears(row.first))
    if not series:
        return []
    titles = {
        "sensiboost": "activation sensitivity (4 bits, groups of 64)",
        "kurtboost": "kurtosis of weights",
    }
    shown = []
    for name in filter(series.__contains__, BOOSTS):
        layers, boosted = series[name]
        lines = merged(layers)
        marked = {
            label: sorted({layer for leaf in label.split(", ") for layer in boosted.get(leaf, ())})
            for label in lines
        }
        shown.append(plots.DepthPanel(titles[name], lines, marked))
    plots.depth_figure(figures / f"{stem}-depth.svg", shown)
    own = LayerValues(
        str(model.record["name"]),
        series["sensiboost"][0] if "sensiboost" in series else {},
        series["kurtboost"][0] if "kurtboost" in series else {},
    )
    return [
        f"![Sensitivity and kurtosis of each layer, boosted ones ringed](figures/{stem}-depth.svg)",
        "*Each line is a type of matrix; rings are the layers that the choice boosts, those whose value "
        "jumps or drops from the layer before by more than usual.*",
        correlations([own, *published()]),
        CORRELATIONS,
    ]


def published_section() -> list[str]:
    """The authors' own numbers, marked as theirs."""
    paper = papers()["boost"]
    perplexity = paper.table("wikitext2")
    lines = []
    for model in (column.name for column in perplexity.models):
        for base in (row for row in perplexity.rows if row.method == "hqq"):
            if printed := perplexity.printed(base, model):
                gains = (_their_gain(paper, base, spec, model) for spec in PUBLISHED_ROWS.values())
                lines.append([f"{model} (theirs)", base.name.removeprefix("HQQ "), printed, *gains])
    head = ["model", "bits per weight", "HQQ", *PUBLISHED_ROWS]
    return ["#### Published by the authors", table(head, lines), PUBLISHED_NOTE]


def _their_gain(paper: Paper, base: PublishedRow, spec: str, model: str) -> str:
    """Percent of perplexity against the base of the same bits, from the two perplexities where both are
    there, else as stated; with the change of memory where it is."""
    perplexity = paper.table("wikitext2")
    row = perplexity.row(spec, base.bits)
    gain = math.nan if row is None else perplexity.change(row, base, model)
    if math.isnan(gain):
        gain = paper.table("wikitext2-change").value_of(spec, base.bits, model)
    memory = paper.table("memory-change").value_of(spec, base.bits, model)
    return f"{gain:+.2f}" + ("" if math.isnan(memory) else f" ({memory:+.2f})")


def _by_type(names: Sequence[str]) -> dict[str, list[int]]:
    """ "layers.3.mlp.down_proj" as {"down": [3]}."""
    found: dict[str, list[int]] = {}
    for name in names:
        _, layer, rest = name.split(".", 2)
        found.setdefault(rest.rpartition(".")[2].removesuffix("_proj"), []).append(int(layer))
    return found


def _learned(cell: Cell) -> dict[str, dict[str, Any]]:
    learned = (cell.record.get("diagnostics") or {}).get("learned") or {}
    return {name: facts for name, facts in learned.items() if name in BOOSTS}


def _values(facts: Mapping[str, Any], options: Mapping[str, Any]) -> Layers:
    """What the layers were chosen by."""
    if "kurtosis" in facts:
        found: Layers = facts["kurtosis"]
        return found
    readings = facts.get("readings", {}).get(options.get("score", "mse"))
    own_output = options.get("own_output") or not facts.get("grouped_queries")
    return of_matrices(readings, own_output=own_output) if readings else {}


def _sizes(row: Row, how: str) -> list[float]:
    """Bytes of the linears of each cell that has them on record."""
    found = [
        ((cell.record.get("measured") or {}).get("memory") or {}).get("linears", {}).get(how)
        for cell in row.usable
    ]
    return [float(size) for size in found if size is not None]


def _mebibytes(row: Row, how: str) -> str:
    sizes = _sizes(row, how)
    size = sum(sizes) / len(sizes) / MEBIBYTE if sizes else math.nan
    return f"{size:.2f}" if size >= 10 else f"{size:.4f}" if sizes else "–"


def _more(base: Row, row: Row, how: str) -> str:
    """How many percent more the linears of a row take than the base's."""
    first, second = _sizes(base, how), _sizes(row, how)
    return f"{100 * (second[0] / first[0] - 1):+.2f} %" if first and second else "–"
