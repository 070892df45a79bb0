"""`python -m kernels.tune`: measure the table of tuning choices (kernels/tuning.json) on this GPU.

Every candidate of a linear's file runs at every shape. First a pool of processes runs each once, which leaves
what they compile in Triton's cache on disk; then this process alone times them, by replays of CUDA graphs
over copies of the weight, none of which the GPU's L2 cache still holds. Candidates of an integer linear must
agree bit for bit, those of a floating-point one within the rounding of its results; one that does not ends
the run. What does not compile, or needs more than the GPU has, is left out with a line.
"""

import argparse
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import TimeoutError as PoolTimeoutError
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import ops, tuning
from kernels.command import run_command
from kernels.reference import PackedWeight, Quantised

# (outputs, inputs) of a block's merged linears: Llama-3-8B's, and the default model's.
SHAPES = (
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    *((960, 576), (576, 576), (3072, 576), (576, 1536)),
)
HEADS = ((128256, 4096), (49152, 576))
"""Of the same models; no method quantises them."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
MOST_LAUNCHES = 16
FIRST, FINAL, FINALISTS = 3, 9, 4
"""Replays of every candidate, and of the best few when they are timed again in turns."""
AT_REST = 64
"""Rows up to which launches say that weights are at rest, as those of a decoding graph do."""
A16_GROUP = 128
WARMING = 1.0
"""Seconds of matrix products before the first timing: a GPU that has waited for compilers clocks low."""
STALLED = 45.0
"""Seconds without a compiled job after which the jobs that are left have brought down their processes."""


@dataclass(frozen=True)
class Operation:
    """How a linear's file is tuned: the rows it is meant for, whether it takes floating-point inputs, and
    whether weights are packed, or in bfloat16. shapes: of weights."""

    rows: tuple[int, ...]
    floating: bool = False
    packed: bool = True
    shapes: tuple[tuple[int, int], ...] = SHAPES


OPERATIONS = {
    "linear_few": Operation(tuple(rows for rows in ROWS if rows <= 32)),
    "linear_many": Operation(tuple(rows for rows in ROWS if rows >= 16)),
    "linear_a16": Operation(tuple(rows for rows in ROWS if rows <= 64), floating=True),
    "linear_dense": Operation(
        tuple(rows for rows in ROWS if rows <= ops.FEW_ROWS),
        floating=True,
        packed=False,
        shapes=(*SHAPES, *HEADS),
    ),
}


@dataclass(frozen=True)
class Job:
    """One candidate at one number of rows and inputs, and all numbers of outputs."""

    operation: str
    choice: Any
    rows: int
    inputs: int
    outputs: tuple[int, ...]


def jobs(
    operations: Sequence[str], rows: Sequence[int], shapes: Sequence[tuple[int, int]] | None
) -> Iterator[Job]:
    """What is to be compiled. shapes: of weights, None for each operation's own.

    Neighbours differ in their choice and not in their rows alone: many a kernel serves several numbers of
    rows, and should not be compiled by two processes at once."""
    for operation in operations:
        module = _module(operation)
        for count in rows:
            if count not in OPERATIONS[operation].rows:
                continue
            wanted: dict[tuple[int, Any], list[int]] = {}
            for outputs, inputs in OPERATIONS[operation].shapes if shapes is None else shapes:
                for choice in module.candidates(count, outputs, inputs):
                    wanted.setdefault((inputs, choice), []).append(outputs)
            for (inputs, choice), found in wanted.items():
                yield Job(operation, choice, count, inputs, tuple(found))


def operands(
    operation: str, rows: int, outputs: int, inputs: int
) -> tuple[Tensor | Quantised, PackedWeight | Tensor]:
    """Random ones on the GPU; all codes occur."""
    device = torch.device("cuda")
    random = torch.Generator(device).manual_seed(rows * outputs + inputs)
    if not OPERATIONS[operation].packed:
        x = torch.randn(rows, inputs, device=device, generator=random).bfloat16()
        values = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=device)
        return x, values.normal_(std=inputs**-0.5, generator=random)
    groups = 1
    if OPERATIONS[operation].floating and inputs % A16_GROUP == 0:
        groups = inputs // A16_GROUP
    w = PackedWeight(
        torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device, generator=random),
        torch.rand(outputs, groups, device=device, generator=random) + 0.5,
        None,
        bits=4,
        inputs=inputs,
        signed=True,
    )
    if OPERATIONS[operation].floating:
        return torch.randn(rows, inputs, device=device, generator=random).bfloat16(), w
    codes = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8, device=device, generator=random)
    scale = torch.rand(rows, 1, device=device, generator=random) + 0.5
    return Quantised(codes, scale, None, None, 8), w


def launch(operation: str, x: Tensor | Quantised, w: PackedWeight | Tensor, choice: Any) -> Tensor:
    rows = (x if isinstance(x, Tensor) else x.codes).shape[0]
    if isinstance(w, Tensor):
        product: Tensor = _module(operation).dense(x, w, choice=choice, overlapped=rows <= AT_REST)
        return product
    y: Tensor = _module(operation).linear(
        x, w, dtype=torch.bfloat16, choice=choice, weights_at_rest=rows <= AT_REST
    )
    return y


def compile_job(job: Job) -> tuple[Job, str | None]:
    """Run a job once at each of its shapes. Returns it with the reason why it cannot, or None."""
    for outputs in job.outputs:
        x, w = operands(job.operation, job.rows, outputs, job.inputs)
        beside = {"dtype": torch.bfloat16} if OPERATIONS[job.operation].packed else {}
        reason = _module(job.operation).unsupported(x, w, **beside)
        if reason is None:
            reason = _failure(partial(launch, job.operation, x, w, job.choice))
        if reason is not None:
            return job, reason
    torch.cuda.synchronize()
    return job, None


def _failure(call: Callable[[], object]) -> str | None:
    """The compiler's reason why a launch is not possible; other errors pass."""
    from triton.errors import TritonError

    try:
        call()
    except TritonError as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    except RuntimeError as error:
        if "PassManager" not in str(error):
            raise
        return str(error)
    return None


def precompile(todo: Sequence[Job], processes: int, seconds: float) -> set[Job]:
    """Compile in a pool; returns the jobs that ran. Those that take longer are left out with a line."""
    until = time.monotonic() + seconds
    done: set[Job] = set()
    failed: dict[tuple[str, Any, str], list[Job]] = {}
    with get_context("spawn").Pool(processes) as pool:
        results = pool.imap_unordered(compile_job, todo)
        for _ in todo:
            try:
                job, reason = results.next(max(min(until - time.monotonic(), STALLED), 0.01))
            except PoolTimeoutError:
                late = len(todo) - len(done) - sum(map(len, failed.values()))
                print(f"left out: {late} jobs, not compiled in time (--compile-seconds) or at all")
                break
            if reason is None:
                done.add(job)
            else:
                failed.setdefault((job.operation, job.choice, reason), []).append(job)
        pool.terminate()
    for (operation, choice, reason), jobs_left in failed.items():
        where = ", ".join(f"{job.rows}x{job.inputs}" for job in jobs_left)
        print(f"left out: {operation} {choice} at rows x inputs {where}: {reason}")
    return done


@dataclass(frozen=True)
class Tuned:
    """The choice for a shape: its seconds, and the default's where that was among the candidates."""

    choice: Any
    seconds: float
    default: float | None


def tune_shape(operation: str, choices: Sequence[Any], rows: int, outputs: int, inputs: int) -> Tuned:
    """Check and time these choices. Raises ArithmeticError where two disagree."""
    x, w = operands(operation, rows, outputs, inputs)
    copies = [w]
    flush = torch.empty(4 * _l2_bytes(), dtype=torch.int8, device="cuda")
    while len(copies) < min(MOST_LAUNCHES, math.ceil(flush.nbytes / _stored(w).nbytes)):
        copies.append(_copy(w))
    want = launch(operation, x, w, choices[0])
    # All run before the first is captured: what a kernel keeps between launches then no longer grows.
    for choice in choices:
        check(operation, choices[0], want, choice, launch(operation, x, w, choice))
    pool = torch.cuda.graph_pool_handle()
    graphs = {}
    for choice in choices:
        calls = [partial(launch, operation, x, copy, choice) for copy in copies]
        graphs[choice] = _captured(calls, pool)
    first = _timed(graphs, FIRST, flush, len(copies))
    finalists = sorted(first, key=first.__getitem__)[:FINALISTS]
    seconds = _timed({choice: graphs[choice] for choice in finalists}, FINAL, flush, len(copies))
    best = min(seconds, key=seconds.__getitem__)
    default = tuning.untuned(operation, rows, outputs, inputs)
    return Tuned(best, seconds[best], seconds.get(default, first.get(default)))


def _stored(w: PackedWeight | Tensor) -> Tensor:
    return w if isinstance(w, Tensor) else w.packed


def _copy(w: PackedWeight | Tensor) -> PackedWeight | Tensor:
    if isinstance(w, Tensor):
        return w.clone()
    return PackedWeight(w.packed.clone(), w.scale.clone(), None, w.bits, w.inputs, w.signed, w.axis)


def check(operation: str, one: Any, want: Tensor, other: Any, found: Tensor) -> None:
    """Raises ArithmeticError where the results of two choices are not those of one operation."""
    if OPERATIONS[operation].floating:
        difference = (found.double() - want.double()).norm() / want.double().norm()
        same = float(difference) < 2.0**-7
    else:
        same = torch.equal(found, want)
    if not same:
        raise ArithmeticError(f"{operation} {tuple(want.shape)}: {other} and {one} differ")


def _captured(calls: Sequence[Callable[[], object]], pool: Any) -> Any:
    """A graph of these calls. `torch.cuda.graph` would collect garbage before each, which takes longer."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(pool=pool)
        for call in calls:
            call()
        graph.capture_end()
    return graph


def _timed(graphs: dict[Any, Any], replays: int, flush: Tensor, launches: int) -> dict[Any, float]:
    """Seconds of a launch by choice: medians over replays, in turns. The L2 is first written over, which
    also gives the processor time to have the replay ready."""
    seconds: dict[Any, list[float]] = {choice: [] for choice in graphs}
    for graph in graphs.values():
        graph.replay()
    for _ in range(replays):
        for choice, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            seconds[choice].append(start.elapsed_time(stop) / 1e3 / launches)
    return {choice: statistics.median(values) for choice, values in seconds.items()}


def warm() -> None:
    """Bring the GPU to the clocks that it keeps under load."""
    x = torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda")
    until = time.monotonic() + WARMING
    while time.monotonic() < until:
        torch.matmul(x, x)
        torch.cuda.synchronize()


def tune(todo: Sequence[Job], done: set[Job], table: tuning.Table, out: Path) -> int:
    """Time what was compiled, shape by shape, and write each choice as it is found. Entries of other shapes
    and GPUs stay as they are in `table`. Returns how many were found."""
    written = 0
    entries = table.setdefault(tuning.gpu_name(torch.device("cuda")), {})
    shapes: dict[tuple[str, int, int, int], list[Any]] = {}
    for job in todo:
        for outputs in job.outputs:
            choices = shapes.setdefault((job.operation, job.rows, outputs, job.inputs), [])
            if job in done:
                choices.append(job.choice)
    if done:
        warm()
    print("operation, rows x outputs x inputs: µs (default µs), TB/s of weights, TOPS: choice")
    for (operation, rows, outputs, inputs), choices in shapes.items():
        key = tuning.shape_key(rows, outputs, inputs)
        if not choices:
            print(f"{operation} {key}: nothing to time")
            continue
        best = tune_shape(operation, choices, rows, outputs, inputs)
        entries.setdefault(operation, {})[key] = asdict(best.choice)
        tuning.write_table(table, out)
        written += 1
        default = "not timed" if best.default is None else f"{best.default * 1e6:.2f}"
        size = outputs * inputs
        moved = size / 2 if OPERATIONS[operation].packed else 2 * size
        print(
            f"{operation} {key}: {best.seconds * 1e6:.2f} ({default}), {moved / 1e12 / best.seconds:.2f}, "
            f"{2 * rows * size / 1e12 / best.seconds:.0f}: {best.choice}",
            flush=True,
        )
    return written


def opened(out: Path) -> tuning.Table:
    """The table to add to: that of `out` or, where that is no file yet, the project's. Raises ValueError for
    a damaged one, OSError where `out` cannot be written."""
    table = tuning.read_table(out if out.exists() else tuning.TABLE)
    out.parent.mkdir(parents=True, exist_ok=True)
    trial = out.with_name(f"{out.name}.partial")
    trial.touch()
    trial.unlink()
    return table


def _module(operation: str) -> Any:
    return importlib.import_module(f"kernels.triton.{operation}")


def _l2_bytes() -> int:
    return int(torch.cuda.get_device_properties("cuda").L2_cache_size)


def _shape(text: str) -> tuple[int, int]:
    try:
        outputs, inputs = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a shape is <outputs>x<inputs>, got {text!r}") from None
    return outputs, inputs


def main(argv: Sequence[str] | None = None) -> int:
    """The command: compile, time, write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.tune", description="Measure kernels/tuning.json."
    )
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="OUTPUTSxINPUTS")
    parser.add_argument("--out", type=Path, default=tuning.TABLE)
    parser.add_argument("--processes", type=int, default=max(1, (cpu_count() or 1) - 2))
    parser.add_argument("--compile-seconds", type=float, default=100.0, help="leave out what takes longer")
    options = parser.parse_args(argv)
    if unknown := [rows for rows in options.rows if rows not in ROWS]:
        return _refuse(f"--rows {unknown[0]}: tuned rows are {', '.join(map(str, ROWS))}")
    if not any(rows in OPERATIONS[name].rows for name in options.operations for rows in options.rows):
        return _refuse("none of these operations is for so many rows")
    if not torch.cuda.is_available():
        return _refuse("tuning needs a CUDA GPU")
    if (reason := ops.no_kernels_on(torch.device("cuda", torch.cuda.current_device()))) is not None:
        return _refuse(reason)
    out = options.out.resolve()
    try:
        table = opened(out)
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    began = time.monotonic()
    todo = list(jobs(options.operations, options.rows, options.shapes))
    done = precompile(todo, options.processes, options.compile_seconds)
    print(f"{len(done)} of {len(todo)} jobs compiled in {time.monotonic() - began:.0f} s", flush=True)
    try:
        written = tune(todo, done, table, out)
    except ArithmeticError as error:
        print(f"quantgrid: {error}; the table ends before this shape", file=sys.stderr)
        return 1
    except OSError as error:
        return _refuse(str(error))
    if not written:
        return _refuse("nothing could be timed")
    print(f"{options.out}: {written} choices after {time.monotonic() - began:.0f} s")
    return 0


def _refuse(reason: str) -> int:
    print(f"quantgrid: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    run_command(main)
