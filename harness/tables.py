"""Numbers and tables as the report shows them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from harness import stats
from harness.records import LATTICE_GROUP, Cell, Column, Record, Row, mean_accuracy, number, overall
from harness.stats import Estimate
from methods.bits import Bits, QuantiserSettings


def flag_note(model: Record, flag: str) -> str:
    if flag == "§":
        return "§ Not ranked: a paper preset differs from the quick ones in more than the method."
    lattice = model["pre_quantised"]
    already = (
        f"this checkpoint's weights already lie on at most {lattice['levels']} levels in groups of "
        f"{lattice['group']} along the input ({lattice['fraction']:.0%} of its linears)"
    )
    if flag == "†":
        return (
            f"† Weight-only: {already}. Conclude nothing from it about weight-only methods on other models."
        )
    return (
        f"‡ Not ranked: {already}, so input-axis groups of {LATTICE_GROUP} and less can come close to them "
        "whatever the method."
    )


def flag_notes(model: Record, flags: Iterable[str]) -> list[str]:
    """What the flags mean that occur, each in a line."""
    found = "".join(flags)
    return [flag_note(model, flag) for flag in "†‡§" if flag in found]


def upstream_text(entry: Record) -> str:
    """What a task mirrors and how it departs from it; empty where the record names nothing."""
    mirrors = [f"mirrors {entry['mirrors']}"] if entry.get("mirrors") else []
    return ": ".join(
        [*mirrors, *(["; ".join(map(str, entry["differences"]))] if entry.get("differences") else [])]
    )


def quantisers_text(record: Record, bits: Bits) -> str:
    """The setting that all methods share, with what its defaults come to at this bit-width."""
    try:
        settings = QuantiserSettings(**(record.get("quantiser") or {}))
    except TypeError:  # written by another version
        return json.dumps(record["quantiser"])

    def kind(symmetric: bool, clip: float) -> str:
        return f"{'symmetric' if symmetric else 'asymmetric'}, clip {clip:g}"

    linear, kv = settings.linear(bits), settings.kv(bits)
    parts = []
    if bits.quantises_weights:
        search = ", range search" if linear.search else ""
        scale = f"groups of {linear.group}" if linear.group else "per output channel"
        parts.append(f"weights {'symmetric' if linear.symmetric else 'asymmetric'} {scale}{search}")
    if linear.activation:
        scale = f"token and {linear.activation.group} channels" if linear.activation.group else "token"
        parts.append(f"activations per {scale} {kind(linear.activation.symmetric, linear.activation.clip)}")
    if kv:
        parts.append(f"KV per token and head {kind(kv.symmetric, kv.clip)}")
    return "; ".join(parts)


def options_text(method: Record) -> str:
    """Every option of every part of a method, defaults too."""
    parts = (method.get("options") or {}).items()
    said = {
        part: ", ".join(f"{key}={value}" for key, value in (options or {}).items()) for part, options in parts
    }
    return "; ".join(f"{part}: {options}" if len(said) > 1 else options for part, options in said.items())


def calibration_text(record: Record) -> str:
    """The text that methods learned from, and whether an evaluation text shares passages with it."""
    if not record:
        return ""
    text = f"{record.get('name')}, {record.get('samples')} sequences of {record.get('length')} tokens"
    shared = record.get("shared_13_grams_with_evaluation")
    text += f", sha256 {str(record.get('sha256'))[:12]}"
    return text if shared is None else f"{text}, {shared} 13-word sequences shared with evaluation texts"


def mean_accuracy_text(row: Row, columns: Sequence[Column], interval: bool = False) -> str:
    estimate = overall(row, lambda cell: mean_accuracy(cell, columns))
    return "–" if estimate is None else _percent_between(estimate) if interval else _percent(estimate)


def value_text(row: Row, column: Column, interval: bool = False) -> str:
    """A row's number with its standard error, or with the interval that covers the true one; else why there
    is none."""
    estimate = overall(row, column.estimate)
    if estimate is None:
        return _absent(row, column)
    if column.kind == "perplexity":
        if interval:
            return _perplexity_between(_sampled(row, column, estimate))
        return _perplexity(estimate, _recorded_error(row, column))
    if column.kind == "accuracy":
        return _percent_between(estimate) if interval else _percent(estimate)
    return _plain_number(estimate)


def _sampled(row: Row, column: Column, estimate: Estimate) -> Estimate:
    """The recorded number of a single cell with the interval that its samples give; several seeds, or a cell
    without the samples of its number, keep Student's t over the recorded error."""
    if len(cells := row.with_(column)) != 1:
        return estimate
    try:
        found = stats.log_perplexity(cells[0].samples(column.task))
    except ValueError:
        return estimate
    same = math.isclose(found.value, estimate.value, rel_tol=1e-5)  # as rounded samples give
    return replace(estimate, bounds=found.interval()) if same else estimate


def _recorded_error(row: Row, column: Column) -> float:
    """Standard error of a single cell's perplexity as it stands on record; NaN of several seeds."""
    cells = row.with_(column)
    metric = cells[0].task(column.task)["metrics"].get("perplexity") or {}
    return number(metric.get("stderr")) if len(cells) == 1 else math.nan


def _absent(row: Row, column: Column) -> str:
    if all(cell.state == "n/a" for cell in row.cells):
        return "n/a"
    if any("failed" in (cell.state, cell.task(column.task).get("status")) for cell in row.cells):
        return "failed"
    return "not finished" if any(cell.state == "partial" for cell in row.cells) else "–"


def perplexity_of(estimate: Estimate) -> tuple[float, float]:
    value = _exp(estimate.value)
    return value, value * estimate.stderr


def _exp(value: float) -> float:
    return math.exp(value) if not value > 700 else math.inf


def _scale(perplexity: float) -> tuple[int, int]:
    """Decimals, and the power of ten in front of which they stand."""
    exponent = math.floor(math.log10(perplexity)) if perplexity >= 1000 else 0
    return 2 if perplexity < 100 or exponent else 1, exponent


def _perplexity(log: Estimate, recorded: float) -> str:
    """19.15 ± 0.42, 171.2 ± 3.1, 7.34e3 ± 0.21e3 (mantissa and error on one scale); without a recorded error
    that of the logarithm times the perplexity."""
    value, stderr = perplexity_of(log)
    stderr = stderr if math.isnan(recorded) else recorded
    if not math.isfinite(value):
        return "not finite"
    decimals, exponent = _scale(value)
    tail = f"e{exponent}" if exponent else ""
    return with_error(f"{value / 10**exponent:.{decimals}f}", stderr / 10**exponent, decimals, tail)


def _perplexity_between(log: Estimate) -> str:
    """19.15 [18.35, 20.01], 7.34e3 [6.95e3, 7.76e3]."""
    value = _exp(log.value)
    if not math.isfinite(value):
        return "not finite"
    decimals, exponent = _scale(value)
    tail = f"e{exponent}" if exponent else ""
    show = [_bound(_exp(x) / 10**exponent, f".{decimals}f", tail) for x in (log.value, *log.interval())]
    return show[0] + _brackets(log, show[1:])


def _percent(estimate: Estimate) -> str:
    if not math.isfinite(estimate.value):
        return "not finite"
    return with_error(f"{100 * estimate.value:.1f}", 100 * estimate.stderr, 1)


def _percent_between(estimate: Estimate) -> str:
    """36.0 [27.0, 45.0]; no share lies outside 0 and 100."""
    if not math.isfinite(estimate.value):
        return "not finite"
    bounds = [f"{100 * min(max(bound, 0.0), 1.0):.1f}" for bound in estimate.interval()]
    return f"{100 * estimate.value:.1f}" + _brackets(estimate, bounds)


def _plain_number(estimate: Estimate) -> str:
    return f"{estimate.value:.4g}" + (f" ± {estimate.stderr:.2g}" if math.isfinite(estimate.stderr) else "")


def signed(estimate: Estimate | None, kind: str, interval: bool = False, p: float | None = None) -> str:
    """A difference with sign, standard error or interval, and the mark of its p-value (`p`: another's).

    kind: "accuracy" is shown in percent, all else as it is.
    """
    if estimate is None:
        return "–"
    if not math.isfinite(estimate.value):
        return "not finite"
    scale, decimals = (100, 1) if kind == "accuracy" else (1, 4 if estimate.stderr < 0.001 else 3)
    shown = f"{scale * estimate.value:+.{decimals}f}"
    if interval:
        show = [_bound(scale * bound, f"+.{decimals}f") for bound in estimate.interval()]
        shown += _brackets(estimate, show)
    else:
        shown = with_error(shown, scale * estimate.stderr, decimals)
    return shown + mark(estimate.p_value() if p is None else p)


def mark(p: float) -> str:
    return " **" if p <= 0.01 else " *" if p <= 0.05 else ""


def p_text(p: float) -> str:
    """Two digits; below what 10,000 resamples can tell apart, only that."""
    if math.isnan(p):
        return "–"
    return "< 0.0001" if p < 0.99e-4 else f"{p:.2g}" if p < 0.995 else "1.0"


def _bound(value: float, form: str, tail: str = "") -> str:
    return f"{value:{form}}{tail}" if math.isfinite(value) else f"{'-' * (value < 0)}∞"


def _brackets(estimate: Estimate, shown: Sequence[str]) -> str:
    return "" if math.isnan(sum(map(abs, estimate.interval()))) else f" [{shown[0]}, {shown[1]}]"


def with_error(shown: str, stderr: float, decimals: int, tail: str = "") -> str:
    return f"{shown}{tail} ± {stderr:.{decimals}f}{tail}" if math.isfinite(stderr) else shown + tail


def effective_bits(cell: Cell) -> str:
    bits = cell.record.get("effective_bits") or {}
    found = [bits.get(name) for name in ("weight", "activation", "kv", "model")]
    return " / ".join("–" if value is None else f"{round(value, 2):g}" for value in found) if bits else "–"


def count_text(entry: Record, unit: str) -> str | None:
    if entry.get("n") is None:
        return None
    available = entry.get("available")
    return f"{entry['n']:,} {unit}" if available is None else f"{entry['n']:,} of {available:,} {unit}"


def distinct(values: Iterable[Any]) -> str:
    """One value, or each with the number of cells that have it; a dash where there is none."""
    counts: dict[str, int] = {}
    for value in values:
        if value not in (None, ""):
            counts[str(value)] = counts.get(str(value), 0) + 1
    if len(counts) < 2:
        return next(iter(counts), "–")
    return "; ".join(f"{value} ({count} cell{'s' * (count > 1)})" for value, count in counts.items())


def reason_text(failure: Record) -> str:
    """Kind and message; a user's mistake has a message that says it all. Long ones are cut."""
    kind = failure.get("kind") if failure.get("kind") not in ("error", "not_applicable") else None
    text = ": ".join(str(part) for part in (kind, failure.get("message")) if part) or "not recorded"
    return text if len(text) <= 400 else text[:400] + " …"


def output_text(failure: Record, lines: int = 2) -> str:
    """The last lines that a failed cell printed."""
    output = failure.get("output") or ""
    said = output.splitlines() if isinstance(output, str) else [str(line) for line in output]
    text = " / ".join([line.strip() for line in said if line.strip()][-lines:]) or "–"
    return text if len(text) <= 300 else "… " + text[-300:]
