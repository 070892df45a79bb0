"""The GPU half of `python -m kernels.bench`: every contest in one run, each result written as soon as it is
known.

What is written: seconds of every turn, and beside them what they are judged by, namely the floor (the limits
are measured in the same run), the time of the first contestant in the same turns, and the machine's state
before and after. Behind the last replay what it left is compared with the results of plain calls. A
contestant that cannot run, or whose results are wrong, is a row with the reason.
"""

import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from kernels import gpu_attention, gpu_rounding, peers, tuning
from kernels.contests import SHAPES
from kernels.gpu_contests import LINEARS, ROWS, GpuContest, Made, chains, linears, one_line
from kernels.gpu_passes import fused
from kernels.timing import (
    ROTATED_L2,
    Limits,
    Replay,
    Timing,
    Work,
    differs,
    duration,
    measure_gpu_limits,
    recorded,
    replayed,
)

HERE = Path(__file__).resolve().parent
LEAST_SECONDS = 0.001
OPERATIONS = (
    *("w4a8", "w4a16", "bf16", "chain", "quantise", "rmsnorm", "hadamard"),
    *("kv_attention", "rope_append", "kv_dequantise", *gpu_rounding.OPERATIONS),
)
BY = ("ours", "torch", "humming", "gemlite", "bitsandbytes", "mslk", "fast-hadamard-transform")
STATE = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,pstate"


@dataclass(frozen=True)
class Row:
    """A contestant in one contest. seconds: of one call, by turn. speed: the first contestant's time as a
    multiple of this one's, the median over turns. of_floor: the floor's share of the time. rotated: whether a
    pass over the `sets` of operands moves ROTATED_L2 times what L2 holds. eager: launched by the host, not as
    a graph. reason: why it did not run or does not count; what is then unknown is None."""

    shape: str
    operation: str
    layer: str
    rows: int
    outputs: int
    inputs: int
    name: str
    by: str
    seconds: tuple[float, ...] = ()
    speed: float | None = None
    bytes: int | None = None
    multiply_adds: int | None = None
    floor: float | None = None
    of_floor: float | None = None
    sets: int | None = None
    rotated: bool | None = None
    eager: bool | None = None
    error: float | None = None
    reason: str | None = None


Unit = tuple[str, str, str]
"""A shape's name, an operation and a layer: what is prepared together."""


def units(shapes: Sequence[str], operations: Sequence[str], layers: Sequence[str] | None) -> list[Unit]:
    """What is asked for, in the order in which it runs: the widest shape first, and chains and the passes in
    front of linears at that one alone."""
    found: list[Unit] = []
    ordered = sorted(shapes, key=lambda shape: SHAPES[shape].hidden, reverse=True)
    for shape in ordered:
        for operation in operations:
            if operation in (*LINEARS, *gpu_rounding.OPERATIONS):
                found += [(shape, operation, name) for name in SHAPES[shape].linears()]
    others = {
        "chain": ("o", "up, down"),
        "quantise": ("hidden", "intermediate"),
        "rmsnorm": ("hidden",),
        "hadamard": ("heads", "hidden", "intermediate"),
        "kv_attention": gpu_attention.ATTENTION,
        "rope_append": gpu_attention.APPENDED,
        "kv_dequantise": gpu_attention.DEQUANTISED,
    }
    for operation in operations:
        found += [(ordered[0], operation, name) for name in others.get(operation, ())]
    return [unit for unit in found if layers is None or unit[2] in layers]


def contests(
    unit: Unit, rows: Sequence[int], by: Sequence[str], l2: int, device: torch.device
) -> Iterator[GpuContest]:
    _, operation, layer = unit
    shape = SHAPES[unit[0]]
    if operation in LINEARS:
        n, k = shape.linears()[layer]
        return linears(operation, layer, n, k, rows, by, l2, device)
    if operation in gpu_rounding.OPERATIONS:
        return gpu_rounding.rounding(operation, layer, *shape.linears()[layer], by, device)
    if operation == "chain":
        weights = [shape.linears()["o"]]
        if layer == "up, down":  # an MLP without its gate
            weights = [(shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)]
        return chains(layer, weights, rows, by, l2, device)
    if operation == "rope_append":
        return gpu_attention.appending(layer, shape, rows, by, l2, device)
    if operation in ("kv_attention", "kv_dequantise"):
        of = gpu_attention.attention if operation == "kv_attention" else gpu_attention.dequantising
        return of(layer, shape, gpu_attention.CONTEXTS if tuple(rows) == ROWS else rows, by, l2, device)
    name = operation if operation == "quantise" else f"{operation} + quantise"
    width = shape.intermediate if layer == "intermediate" else shape.hidden
    inner = shape.head_dim if layer == "heads" else 1
    return fused(name, layer, width, inner, rows, by, l2, device)


def timed(
    shape: str, contest: GpuContest, turns: int, limits: Limits, l2: int, device: torch.device
) -> list[Row]:
    """One row for each contestant, in order."""
    made: dict[str, Made] = {}
    replays: dict[str, Replay] = {}
    reasons: dict[str, str] = {}
    for name, (_, make) in contest.entrants.items():
        try:
            made[name] = make()
            replays[name] = recorded(made[name].calls, device)
        except Exception as error:  # noqa: BLE001 - other people's code; the row says what it raised
            reasons[name] = one_line(error)
    timings = replayed(replays, turns, LEAST_SECONDS)
    for name, replay in replays.items():
        try:
            if differs(replay, made[name].calls, made[name].exact):
                reasons[name] = "its replayed result differs"
        except Exception as error:  # noqa: BLE001 - as above
            reasons[name] = one_line(error)
        if name in reasons:
            del timings[name]
    first = timings.get(next(iter(contest.entrants)))
    rows = []
    for name, (by, _) in contest.entrants.items():
        about: dict[str, Any] = {"reason": reasons.get(name)}
        if name in timings:
            about |= _judged(made[name], replays[name], timings[name], first, limits, l2)
        where = (contest.operation, contest.layer, contest.rows, contest.outputs, contest.inputs)
        rows.append(Row(shape, *where, name, by, **about))
    return rows


def _judged(
    made: Made, replay: Replay, timing: Timing, first: Timing | None, limits: Limits, l2: int
) -> dict[str, Any]:
    floor = limits.floor(Work(made.bytes, made.multiply_adds))
    return {
        "seconds": tuple(float(f"{value:.4g}") for value in timing.seconds),
        "speed": None if first is None else round(first.ratio(timing), 3),
        "bytes": made.bytes,
        "multiply_adds": sum(made.multiply_adds.values()),
        "floor": float(f"{floor:.4g}"),
        "of_floor": round(floor / timing.median, 3),
        "sets": len(made.calls),
        "rotated": made.rotated >= ROTATED_L2 * l2,
        "eager": replay.eager,
        "error": None if made.error is None else float(f"{made.error:.3g}"),
    }


def line(row: Row) -> str:
    """A row as it is printed while the run goes on."""
    head = f"{row.shape:13} {row.operation:20} {row.layer:12} {row.rows:5} {row.name:26}"
    if row.reason is not None:
        return f"{head} {row.reason}"
    assert row.bytes is not None and row.multiply_adds is not None
    median = statistics.median(row.seconds)
    if row.multiply_adds / row.bytes > 200:
        rate = f"{2 * row.multiply_adds / median / 1e12:7.1f} TOPS"
    else:
        rate = f"{row.bytes / median / 1e12:7.3f} TB/s"
    marks = ("" if row.rotated else " in L2") + (" eager" if row.eager else "")
    speed = "    -" if row.speed is None else f"{row.speed:5.2f}"
    return f"{head} {duration(median):>8} {rate} floor {row.of_floor:5.2f} x first {speed}{marks}"


def prepare(unit: Unit, rows: Sequence[int], by: Sequence[str], device: str) -> str:
    """Let every contestant of a unit run once, so that what it compiles lies in its cache. Returns a line."""
    os.environ.setdefault("HUMMING_MAX_PARALLEL_BUILD_WORKERS", "3")  # for each of the processes
    ready, failed = 0, 0
    torch.cuda.set_device(device)
    with torch.no_grad():
        for contest in contests(unit, rows, by, 1, torch.device(device)):
            for _, make in contest.entrants.values():
                try:
                    make().calls[-1]()
                    ready += 1
                except Exception:  # noqa: BLE001 - the timed run will say what it raised
                    failed += 1
            torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
    return f"prepared {' '.join(unit)}: {ready} ready, {failed} not"


def machine(device: torch.device) -> dict[str, Any]:
    """The GPU and every version that the times depend on."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": smi("driver_version", device).get("driver_version"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "triton": peers.version("triton"),
        "tuning": tuning.table_sha256(),
        "peers": {name: peers.version(name) for name in peers.PACKAGES},
    }


def smi(fields: str, device: torch.device) -> dict[str, str]:
    """What nvidia-smi reports, by field; empty where it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    asked = [program, f"--query-gpu={fields}", "--format=csv,noheader", "-i", gpu_id(device)]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields.split(","), (part.strip() for part in answer.split(",")), strict=False))


def gpu_id(device: torch.device) -> str:
    """nvidia-smi's name of a GPU, whose own order is not that of CUDA_VISIBLE_DEVICES."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return str(device.index or 0) if uuid is None else f"GPU-{uuid}"


def commit_here(folder: Path = HERE) -> str | None:
    """The commit of these sources, with "+changes" where they are not as committed; None outside git."""

    def git(*arguments: str) -> str:
        asked = ["git", "-C", str(folder), *arguments]
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def written(record: dict[str, Any], rows: Sequence[Row]) -> str:
    """JSON with one line for each row."""
    head = json.dumps({**record, "results": []}, indent=1)
    lines = ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
    return head.removesuffix("[]\n}") + (f"[\n{lines}\n ]\n}}\n" if rows else "[]\n}\n")


@dataclass(frozen=True)
class Options:
    """What was asked for. rows: None for ROWS. prepare: processes that compile first, 0 for none."""

    shapes: Sequence[str]
    operations: Sequence[str]
    layers: Sequence[str] | None
    rows: Sequence[int] | None
    by: Sequence[str]
    turns: int
    prepare: int
    commit: str | None
    out: Path | None


def run(options: Options, command: str, code: dict[str, Any], device: torch.device) -> None:
    """Time everything asked for. code: what identifies the sources. Raises ValueError where nothing is left
    of what was asked for, OSError where the file cannot be written."""
    device = _chosen(device)
    rows = options.rows or ROWS
    todo = units(options.shapes, options.operations, options.layers)
    if not todo:
        raise ValueError("none of these operations has a layer of such a name")
    if options.prepare:
        _prepare_all(todo, rows, options.by, options.prepare, device)
    before = smi(STATE, device)
    limits, ceilings = measure_gpu_limits(device)
    about = code | machine(device)
    l2 = about["l2_bytes"]
    record: dict[str, Any] = {
        "command": command,
        "commit": options.commit or commit_here(),
        "machine": about,
        "before": before,
        "limits": {
            "bytes_per_second": limits.bytes_per_second,
            "multiply_adds_per_second": {
                str(dtype)[6:]: rate for dtype, rate in limits.multiply_adds_per_second.items()
            },
            "measured": ceilings,
        },
        "turns": options.turns,
        "replays_compared": True,
        "after": {},
    }
    print("; ".join(f"{name} {value}" for name, value in about.items()))
    print(", ".join(f"{name} {rate / 1e12:.3f} T/s" for name, rate in ceilings.items()), flush=True)
    results: list[Row] = []
    gc.disable()  # what is collected while a graph is recorded could break it
    try:
        with torch.no_grad():
            for unit in todo:
                for contest in contests(unit, rows, options.by, l2, device):
                    for row in timed(unit[0], contest, options.turns, limits, l2, device):
                        results.append(row)
                        print(line(row), flush=True)
                    _write(options.out, record, results)
                    torch.cuda.empty_cache()
                record["after"] = smi(STATE, device)
                gc.collect()
    finally:
        gc.enable()
    _write(options.out, record, results)


def _chosen(device: torch.device) -> torch.device:
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    torch.cuda.set_device(device)
    return device


def _prepare_all(
    todo: Sequence[Unit], rows: Sequence[int], by: Sequence[str], jobs: int, device: torch.device
) -> None:
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        given: list[Callable[[], str]] = [
            pool.submit(prepare, unit, rows, by, str(device)).result for unit in todo
        ]
        for result in given:
            try:
                print(result(), flush=True)
            except Exception as error:  # noqa: BLE001 - the timed run will say what is wrong
                print(f"not prepared: {one_line(error)}", file=sys.stderr, flush=True)


def _write(out: Path | None, record: dict[str, Any], rows: Sequence[Row]) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f"{out.name}.partial")
        partial.write_text(written(record, rows))
        partial.replace(out)
