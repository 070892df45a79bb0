"""The results of harness/parity.py: what a row holds, and the Markdown table made of all rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import agreement, store
from harness.agreement import Agreement, Codes, Output
from harness.markdown import compact, plain, table
from methods.bits import QuantiserSettings
from methods.registry import method_classes

SCHEMA = 1
THRESHOLDS = {
    "equal": agreement.EQUAL,
    "largest": agreement.LARGEST,
    "scale": agreement.SCALE,
    "handed": agreement.HANDED,
    "output": agreement.OUTPUT,
    "perplexity": agreement.PERPLEXITY,
    "errors": agreement.ERRORS,
}
_FAULTS = 20
_HEAD = (
    *("bits", "method", "setting", "weight codes"),
    *("activation codes (%)", "off by", "KV codes (%)", "off by", "scales", "output"),
    *("decode codes (%)", "decode output"),
    *("log-perplexity", "difference", "%", "std. errors", "tokens", "same greedy tokens", "executions"),
)
_GUIDE = """\
Every row is one quantised model, run twice: simulated, with floats that stand for codes, and in int4, with \
packed weights, packed KV cache and integer products. Both must do the same.

- **Weight codes**: all equal, with equal scales and zero-points, and so are the weights that they stand for.
- **Activation and KV codes**: attention and MLP of each layer are given the state that the simulation has \
there. Shown is the linear input, or the layer's keys and values, with the *least* share of equal codes, and \
the largest difference of two codes anywhere; required are {equal:.2%} and {largest}. A code is what its \
scale multiplies: code minus zero-point. **Scales**: the largest relative difference, at most {scale:g}.
- **Output** of these halves of a layer: root mean square over tokens of the difference, relative to what \
the half adds to the stream; at most {output:g} in the worst.
- **Decode**: the int4 halves once more through a KV cache, prefilled and then extended in steps, against \
themselves without a cache; the same limits.
- **Log-perplexity** (nats per token): each execution on its own states. The difference (int4 minus \
simulated) is at most {perplexity:.0%} of it, and at most {errors:g} paired standard errors, which are over \
passages. A row that misses this is scored on more windows: what rounding does shrinks with them, a bias \
does not.
- **Same greedy tokens** before the first that differs, out of those generated; for information.

A dash: nothing of the kind is quantised. In float32 a value at a tie between two codes goes either way, \
because the simulation sums rounded products and the int4 execution integers; a network of 4-bit activations \
amplifies each such flip from layer to layer, hence the differences of log-perplexity. In float64 only exact \
ties are left, which sums of small integers can produce; where there is none, the executions agree in every \
code, and in log-perplexity to the last digits."""

_HANDED = """\
A fused norm and quantiser sums in another order than the simulation, and a value at a tie goes the other \
way; then every key and value of that token, or its input of down_proj, moves by up to a step. Such a token \
is counted here and goes on with the simulation's codes, so that what stands behind is judged on every \
token. At most {handed:g} of the codes behind norms may differ, over all layers, with and without a cache. \
In {none} of {rows} rows none does."""


def changes_text(settings: QuantiserSettings, base: QuantiserSettings) -> str:
    """The fields that differ from `base`, as name=value; empty where none does."""
    other = dataclasses.asdict(base)
    return ", ".join(
        f"{key}={value}" for key, value in dataclasses.asdict(settings).items() if value != other[key]
    )


def row_of(found: Agreement) -> dict[str, Any]:
    """What the results file holds of one comparison."""
    faults, running = found.faults, found.running
    more = [f"and {len(faults) - _FAULTS} more"] if len(faults) > _FAULTS else []
    return {
        "status": "differs" if faults else "agrees",
        "faults": [*faults[:_FAULTS], *more],
        "weights": _pooled(found.weights),
        "inputs": _pooled(found.inputs),
        "cache": _pooled(found.cache),
        "handed": dataclasses.asdict(found.handed),
        "output": _worst_output(found.outputs),
        "decode": _pooled([found.decode] if found.decode.n else []),
        "decode_output": _worst_output(found.stepped),
        "running": {
            "simulated": running.simulated,
            "difference": running.difference.value,
            "stderr": running.difference.stderr,
            "relative": running.relative,
            "errors": running.errors,
            "tokens": running.tokens,
            "windows": running.windows,
            "passages": running.passages,
        },
        "generated": dict(zip(("tokens", "same"), found.generated, strict=True)),
        "implementations": found.implementations,
    }


def _pooled(several: Sequence[Codes]) -> dict[str, Any] | None:
    if not several:
        return None
    worst = min(several, key=lambda codes: codes.share)
    return {
        "n": sum(codes.n for codes in several),
        "unequal": sum(codes.unequal for codes in several),
        "largest": max(codes.largest for codes in several),
        "scale": max(codes.scale for codes in several),
        "worst": {"name": worst.name, "share": worst.share},
    }


def _worst_output(several: Sequence[Output]) -> dict[str, Any]:
    # NaN is worse than any number.
    worst = max(several, key=lambda output: math.inf if math.isnan(output.difference) else output.difference)
    return dataclasses.asdict(worst)


# Markdown


def write_report(record: dict[str, Any], path: Path | None) -> str:
    """The report of a results file, written to `path` where one is given."""
    text = "\n\n".join(_sections(record)) + "\n"
    if path is not None:
        store.write_text(path, compact(text))
    return text


def _sections(record: dict[str, Any]) -> list[str]:
    rows = record["rows"]
    differing = [row for row in rows if row["status"] == "differs"]
    compared = sum(row["status"] != "n/a" for row in rows)
    verdict = f"{len(differing)} of {compared} rows differ" if differing else f"All {compared} rows agree"
    text = ["# Parity of the simulated and the int4 execution", f"**{verdict}.**"]
    if not record["complete"]:
        text.append("The run was not finished.")
    text += _lacking(record)
    text.append(_GUIDE.format(**record["thresholds"]))
    for model in record["models"]:
        own = [row for row in rows if row["model"] == model["name"]]
        for dtype in dict.fromkeys(row["dtype"] for row in own):
            lines = [_line(row) for row in own if row["dtype"] == dtype]
            text += [f"## {model['name']}, {dtype}", table(_HEAD, lines)]
    text += _handed(rows, record["thresholds"])
    text += ["## Differences", _faults(differing)]
    text += _refused([row for row in rows if row["status"] == "n/a"], record["left_out"])
    text += ["## What ran", _implementations(rows)]
    return [*text, "## Settings", *_settings(record)]


def _lacking(record: dict[str, Any]) -> list[str]:
    """The registered methods that these results do not have, of each model."""
    lines = []
    for model in record["models"]:
        held = {row["method"].partition(":")[0] for row in record["rows"] if row["model"] == model["name"]}
        missing = sorted(method_classes().keys() - held - {"float", *record["left_out"]})
        if missing:
            lines.append(f"Not compared on {model['name']}: {', '.join(f'`{name}`' for name in missing)}.")
    return lines


def _line(row: dict[str, Any]) -> list[str]:
    names = [row["bits"], f"`{row['method']}`", row["setting"] or "–"]
    if "running" not in row:
        return [*names, *["–"] * (len(_HEAD) - len(names) - 1), row["status"]]
    running, generated = row["running"], row["generated"]
    codes = [row["inputs"], row["cache"], row["decode"]]
    shown = _small(running["difference"], "+.2g")
    return [
        *names,
        _all_equal(row["weights"]),
        *_equal(row["inputs"]),
        *_equal(row["cache"]),
        _worst([kind["scale"] for kind in codes if kind]),
        _small(row["output"]["difference"]),
        _equal(row["decode"])[0],
        _small(row["decode_output"]["difference"]),
        _number(running["simulated"], ".4f"),
        shown,
        _small(100 * running["relative"] if running["relative"] is not None else None, "+.2g"),
        "–" if running["stderr"] is None or shown == "0" else _number(running["errors"], "+.1f"),
        f"{running['tokens']:,}",
        f"{generated['same']} of {generated['tokens']}",
        "agree" if row["status"] == "agrees" else "**differ**",
    ]


def _all_equal(codes: dict[str, Any] | None) -> str:
    if codes is None:
        return "–"
    return "equal" if not codes["unequal"] and codes["scale"] == 0 else f"{codes['unequal']:,} differ"


def _equal(codes: dict[str, Any] | None) -> tuple[str, str]:
    """The least share in percent, rounded down, and the largest difference."""
    if codes is None:
        return "–", "–"
    share = math.floor(1e6 * codes["worst"]["share"]) / 1e4
    return ("100" if not codes["unequal"] else f"{share:.4f}"), str(codes["largest"])


def _worst(scales: Sequence[float | None]) -> str:
    if not scales:
        return "–"
    return "not finite" if None in scales else _small(max(scale for scale in scales if scale is not None))


def _small(value: float | None, form: str = ".1g") -> str:
    """A small number; below what float64 can tell from 0, that."""
    return "0" if value is not None and abs(value) < 1e-12 else _number(value, form)


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:{form}}"


def _faults(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"- {row['model']}, `{row['method']}` {row['bits']} {row['setting']} {row['dtype']}: {plain(fault)}"
        for row in rows
        for fault in row["faults"]
    ]
    return "\n".join(lines) or "none"


def _handed(rows: Sequence[dict[str, Any]], thresholds: dict[str, float]) -> list[str]:
    """Nothing for records of before such tokens were counted: made on CPUs, where there are none."""
    counted = [row for row in rows if "handed" in row]
    if not counted:
        return []
    lines = [
        [row["model"], row["dtype"], row["bits"], f"`{row['method']}`", row["setting"] or "–"]
        + [f"{row['handed'][key]:,}" for key in ("codes", "of_codes", "tokens", "of_tokens")]
        for row in counted
        if row["handed"]["codes"]
    ]
    head = ["model", "dtype", "bits", "method", "setting", "codes", "of", "tokens", "of"]
    text = _HANDED.format(handed=thresholds["handed"], none=len(counted) - len(lines), rows=len(counted))
    return ["## Ties behind norms", text, *([table(head, lines)] if lines else [])]


def _refused(rows: Sequence[dict[str, Any]], left_out: Sequence[str]) -> list[str]:
    lines = [f"- {row['model']}, `{row['method']}` {row['bits']}: {plain(row['faults'][0])}" for row in rows]
    lines += [f"- `{name}` needs a special checkpoint, to be given with it" for name in left_out]
    return ["## Not applicable", "\n".join(lines)] if lines else []


def _implementations(rows: Sequence[dict[str, Any]]) -> str:
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for operation, implementations in row.get("implementations", {}).items():
            for name in implementations:
                counts[operation, name] = counts.get((operation, name), 0) + 1
    lines = [[*key, count] for key, count in sorted(counts.items())]
    return table(["what", "value", "rows"], lines) if lines else "nothing"


def _settings(record: dict[str, Any]) -> list[str]:
    models = [
        [
            model["name"],
            f"{model['label']}, sha256 {model['sha256'][:12]}",
            f"{model['windows']} of {model['length']} tokens"
            + (f", {model['more']} where needed" if model["more"] > model["windows"] else ""),
            model["base"] or "defaults",
        ]
        for model in record["models"]
    ]
    samples, length = record["calibration"]
    facts = {key: value for key, value in record["environment"].items() if value is not None}
    facts |= {"calibration (all but the random models)": f"{samples} sequences of {length} tokens, seed 0"}
    facts |= {key: record[key] for key in ("command", "commit", "date")}
    seconds = sum(row.get("seconds", 0.0) for row in record["rows"])
    facts["minutes"] = f"{seconds / 60:.0f}"
    return [
        table(["model", "text", "windows", "quantiser"], models),
        table(["setting", "value"], [[key, value] for key, value in facts.items()]),
    ]
