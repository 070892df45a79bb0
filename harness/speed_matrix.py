"""`python -m harness.speed --shape NAME`: decoders of published shapes in floating point and in 4 bits.

Every form (bf16, w4a16g128, w4a8kv8, w4a4kv4) at every batch and context, prefill and decode; where the time
goes; what the methods' online parts cost; what was to be reached. Combinations run in the order of their
importance, the record is written after each, and what a time limit leaves out is listed.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from harness import environment, execution, power, store
from harness.speed_bench import DTYPE, Bench, Form, Row, Shares
from harness.speed_passes import decode_pass, prefill_pass, released
from harness.speed_shapes import ONLINE, SHAPES, form_bits, online_parts, random_decoder, tiny, vocabulary
from harness.speed_targets import BASELINE, judge
from kernels import ops, tuning
from kernels.compiled import triton_version
from kernels.gpu_bench import STATE, smi
from kernels.timing import Limits, duration, measure_gpu_limits, measure_limits
from methods.errors import UserError
from methods.execution import merge_projections

SCHEMA = 1
FORMS = (BASELINE, "w4a16g128", "w4a8kv8", "w4a4kv4")
BATCHES = (1, 8, 32)
CONTEXTS = (1024, 8192, 32768)
PREFILL = (8, 2048)
"""Batch and context of the prefill that is always measured, taken apart by operation, and used for
overheads."""
PREPARED_TOKENS = 16384
"""Tokens of a prefill beyond which nothing new is compiled."""


@dataclass(frozen=True)
class Options:
    """What was asked for. minutes: after which no further combination begins, None for no limit. longest:
    seconds of a prefill's floor beyond which it is not run. energy: seconds over which energy is measured.
    overhead: whether the methods' online parts are compared. prepare: processes that compile first."""

    shapes: Sequence[str]
    forms: Sequence[str]
    batches: Sequence[int]
    contexts: Sequence[int]
    phases: Sequence[str]
    online: str
    turns: int
    minutes: float | None
    longest: float
    energy: float
    overhead: bool
    prepare: int
    commit: str | None
    out: Path | None


@dataclass(frozen=True)
class Unit:
    """What runs together. kind: "forms" (all of them against the first), "overhead" (of one form, all online
    parts against none) or "shares" (where the time of all of them goes)."""

    kind: str
    phase: str
    batch: int
    context: int
    form: str = ""

    def __str__(self) -> str:
        what = {"forms": "", "overhead": f"overhead of {self.form}, ", "shares": "shares of "}[self.kind]
        return f"{what}{self.phase} {self.batch} x {self.context}"


def checked(options: Options) -> None:
    """Raises UserError for what cannot be measured."""
    for kind, given, known in (
        ("shape", options.shapes, SHAPES),
        ("phase", options.phases, ("prefill", "decode")),
        ("online", [options.online], ONLINE),
    ):
        for name in given:
            if name not in known:
                raise UserError(f"--{kind} {name!r}: choose among {', '.join(known)}")
    for form in options.forms:
        form_bits(form)
        if form_bits(form).is_float and form != BASELINE:
            raise UserError(f"--forms {form}: the float form is called {BASELINE}")
    if options.minutes is not None and not options.minutes > 0:
        raise UserError(f"--minutes {options.minutes:g}: give a number above 0")
    for name, value in (("longest-prefill", options.longest), ("energy-seconds", options.energy)):
        if not 0 <= value < math.inf:
            raise UserError(f"--{name} {value:g}: give 0 or more")
    if options.prepare < 0:
        raise UserError(f"--prepare {options.prepare}: give a number of processes, or 0")


def units(options: Options) -> list[Unit]:
    """What is measured of a shape, the most important first: short decoding and the prefill that is always
    there; the other decodings; what online parts cost; the other prefills, short ones first. Where the time
    goes comes last, because a profiler, once it has run, may slow down what comes behind it."""
    pairs = [(batch, context) for batch in options.batches for context in options.contexts]
    pairs.sort(key=lambda pair: (math.prod(pair), pair))
    places = {"decode": (min(options.batches), min(options.contexts)), "prefill": PREFILL}
    main = [Unit("forms", phase, *place) for phase, place in places.items() if phase in options.phases]
    found = list(main)
    if "decode" in options.phases:
        found += [Unit("forms", "decode", *pair) for pair in pairs if pair != places["decode"]]
    if options.overhead:
        integer = [form for form in options.forms if form_bits(form).quantises_activations]
        for unit in main:
            found += [Unit("overhead", unit.phase, unit.batch, unit.context, form) for form in integer]
    if "prefill" in options.phases:
        found += [Unit("forms", "prefill", *pair) for pair in pairs if pair != PREFILL]
    return found + [Unit("shares", unit.phase, unit.batch, unit.context) for unit in main]


def run(options: Options, command: str, device: torch.device) -> dict[str, Any]:
    """Measure what is asked for and return the record, which is written after every combination. Raises
    UserError for what cannot be measured, OSError where the file cannot be written."""
    checked(options)
    began = time.monotonic()
    if options.prepare:
        _prepare(options, device)
    gauge = power.meter(device)
    limits, measured = _limits(device)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "commit": options.commit or environment.commit(),
        "machine": machine(device),
        "before": smi(STATE, device) if device.type == "cuda" else {},
        "limits": {
            "bytes_per_second": limits.bytes_per_second,
            "multiply_adds_per_second": {
                str(dtype)[6:]: rate for dtype, rate in limits.multiply_adds_per_second.items()
            },
            "measured": measured,
        },
        "energy": None if gauge is None else gauge.source,
        "energy_seconds": options.energy,
        "turns": options.turns,
        "shapes": {name: asdict(SHAPES[name]) for name in options.shapes},
        "results": [],
        "overhead": [],
        "shares": [],
        "not_run": [],
        "targets": [],
        "implementations": {},
        "replays_counted": True,
        "seconds": {},
        "after": {},
    }
    print("; ".join(f"{name} {value}" for name, value in record["machine"].items()), flush=True)
    ops.reset_implementations()
    gc.disable()  # what is collected while a graph is recorded could break it
    try:
        with torch.no_grad():
            for shape in options.shapes:
                bench = Bench(
                    shape,
                    SHAPES[shape],
                    device,
                    limits,
                    gauge,
                    options.turns,
                    options.longest,
                    options.energy,
                )
                for unit in units(options):
                    late = options.minutes is not None and time.monotonic() - began > 60 * options.minutes
                    begun = any(row["shape"] == shape for row in record["results"])
                    if late and not (unit.kind == "shares" and begun):  # these take seconds
                        record["not_run"].append({"shape": shape, "what": str(unit), "reason": "--minutes"})
                        continue
                    started = time.monotonic()
                    _measure(bench, unit, options, record)
                    record["seconds"][f"{shape}, {unit}"] = round(time.monotonic() - started, 2)
                    _note(record, options, device)
                bench.forget([])
    finally:
        gc.enable()
        if gauge is not None:
            gauge.close()
    _note(record, options, device)
    return record


def _measure(bench: Bench, unit: Unit, options: Options, record: dict[str, Any]) -> None:
    """Add what a unit gives to the record."""
    own = _first([bench.form(form, options.online) for form in options.forms])
    where = (unit.phase, unit.batch, unit.context)
    rows: list[Row] = []
    if unit.kind == "forms":
        rows = bench.compare(own, *where)
        record["results"] += [asdict(row) for row in rows]
    elif unit.kind == "overhead":
        rows = bench.compare([bench.form(unit.form, online) for online in ONLINE], *where, energy=False)
        record["overhead"] += [asdict(row) for row in rows]
        bench.forget(own)
    else:
        entries = bench.shares(own, *where)
        record["shares"] += [asdict(entry) for entry in entries]
        for entry in entries:
            print(share_line(entry), flush=True)
    for row in rows:
        print(line(row), flush=True)


def _first(forms: Sequence[Form]) -> list[Form]:
    """The float form before the others."""
    return sorted(forms, key=lambda form: form.name != BASELINE)


def _note(record: dict[str, Any], options: Options, device: torch.device) -> None:
    record["targets"] = [asdict(verdict) for verdict in judge([*record["results"], *record["overhead"]])]
    record["implementations"] = execution.implementations()
    record["after"] = smi(STATE, device) if device.type == "cuda" else {}
    if options.out is not None:
        store.write_json(options.out, record)


def _limits(device: torch.device) -> tuple[Limits, dict[str, float]]:
    """The limits of floors, and what was measured for them."""
    if device.type == "cuda":
        limits, measured = measure_gpu_limits(device)
        torch.cuda.empty_cache()
        return limits, measured
    return measure_limits(device, (DTYPE, torch.int8)), {}


def machine(device: torch.device) -> dict[str, Any]:
    """What the times depend on."""
    about = {
        **environment.describe(device),
        "platform": environment.platform_name(),
        "load": os.getloadavg()[0],
    }
    if device.type == "cuda":
        about |= {
            "driver": smi("driver_version", device).get("driver_version"),
            "triton": triton_version(),
            "tuning": tuning.table_sha256(),
            "gpu_bytes": torch.cuda.mem_get_info(device)[1],
        }
    return about


def line(row: Row) -> str:
    """A row as it is printed while the run goes on."""
    head = f"{row.shape:13} {row.form:10} {row.online:8} {row.phase:7} {row.batch:3} x {row.context:5}"
    if row.reason is not None:
        return f"{head} {row.reason}"
    times = sorted(row.seconds)
    text = f"{head} {duration(times[len(times) // 2]):>8} {row.tokens_per_second:10.1f} tokens/s"
    text += (
        f" {'    -' if row.speed is None else f'{row.speed:5.2f}'}x floor {row.of_floor:.2f} ({row.bound})"
    )
    text += "" if row.joules_per_token is None else f" {row.joules_per_token:.4g} J/token"
    return text + ("" if row.peak is None else f" peak {row.peak / 1e9:.1f} GB")


def share_line(entry: Shares) -> str:
    head = f"  {entry.form} {entry.phase} {entry.batch} x {entry.context}: "
    if entry.reason is not None:
        return head + entry.reason
    return head + ", ".join(f"{share.operation} {share.fraction:.0%}" for share in entry.shares)


def _prepare(options: Options, device: torch.device) -> None:
    """Compile, in several processes, every kernel that the run will need: what they compile lies in triton's
    cache."""
    every = dict.fromkeys(
        (shape, form, online)
        for shape in options.shapes
        for form in options.forms
        for online in ([options.online, *ONLINE] if options.overhead else [options.online])
        if not form_bits(form).is_float or online == options.online
        if form_bits(form).quantises_activations or online == options.online
    )
    with ProcessPoolExecutor(options.prepare, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(compiled, *which, options, str(device)) for which in every]
        for future in waiting:
            try:
                print(future.result(), flush=True)
            except Exception as error:  # noqa: BLE001 - the timed run will say what is wrong
                print(f"not prepared: {' '.join(str(error).split())[:300]}", file=sys.stderr, flush=True)


def compiled(shape: str, form: str, online: str, options: Options, device: str) -> str:
    """Run one layer of a decoder at every batch and context once. Returns a line."""
    began = time.monotonic()
    where = torch.device(device)
    config, bits = tiny(SHAPES[shape]), form_bits(form)
    part = online_parts(bits, online)
    with torch.no_grad():
        words = vocabulary(config, part, where, DTYPE)
        decoder = random_decoder(config, bits, part, words, where, DTYPE)
        merge_projections(decoder)
        for make, batch, context in _combinations(options):
            one = make(decoder, batch, context)
            released({"": one}, where)
    return f"prepared {shape} {form} {online} in {time.monotonic() - began:.0f} s"


def _combinations(options: Options) -> Iterator[tuple[Any, int, int]]:
    pairs = [(batch, context) for batch in options.batches for context in options.contexts]
    if "decode" in options.phases:
        yield from ((decode_pass, *pair) for pair in pairs)
    if "prefill" in options.phases:
        short = [pair for pair in pairs if math.prod(pair) <= PREPARED_TOKENS]
        yield from ((prefill_pass, *pair) for pair in dict.fromkeys([PREFILL, *short]))
