"""How long things take, and how long they would take at this machine's measured limits.

What is compared is timed in one process and in turns, so that a machine that slows down, or neighbours on it,
slow all of it alike. A ratio is formed within each turn, and its median taken.

On a GPU short calls are bound by the host that launches them, unless they are replayed as a CUDA graph. So
one graph holds one pass over several sets of operands, enough of them that each has left the cache (L2)
before its turn comes again.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.integer import int_mm
from kernels.waiting import waiting_refused

# More bytes than a processor's own caches hold, and matrices at which products run at their full rate; no
# larger on a CPU, where many short tries find moments in which nobody else runs.
STREAMED_BYTES = 1 << 28
MATRIX = {"cpu": 1024, "cuda": 8192}
TRIES = 10

# A pass over all sets of operands moves this many times what L2 holds; more sets than MOST_SETS take too long
# to record, and are marked where they come out too small.
ROTATED_L2, MOST_SETS = 4, 2048

# Of results that are compared with each other: rows at either end, and how far sums in another order may be
# apart, relative to their norm.
COMPARED_ROWS, ROUNDING = 32, 2.0**-7


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, in each turn."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, other: "Timing") -> float:
        """The median over turns of this one's time as a multiple of the other's."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


@dataclass(frozen=True)
class Work:
    """The least that a computation needs: bytes read and written once each, and multiply-adds by type."""

    bytes: int
    multiply_adds: Mapping[torch.dtype, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """Measured limits of a machine: bytes/s, and multiply-adds/s by type."""

    bytes_per_second: float
    multiply_adds_per_second: Mapping[torch.dtype, float]

    def floor(self, work: Work) -> float:
        """Seconds below which this machine does no such work: its bytes or its arithmetic, whichever takes
        longer. Raises KeyError for a type whose limit was not measured."""
        arithmetic = (
            count / self.multiply_adds_per_second[dtype] for dtype, count in work.multiply_adds.items()
        )
        return max(work.bytes / self.bytes_per_second, sum(arithmetic))


def interleaved(
    runs: Mapping[str, Callable[[int], object]], turns: int, device: torch.device, least: float = 0.0
) -> dict[str, Timing]:
    """Time every run in each of `turns` turns, after a turn that is not counted.

    A run is given the number of its call, so that it can take other operands than the call before, and is
    called as often in a turn as it takes to fill `least` seconds.
    """
    calls = {name: _calls(run, device, least) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns):
        for name, run in runs.items():
            begin = _clock(device)
            for call in range(turn * calls[name], (turn + 1) * calls[name]):
                run(call)
            seconds[name].append((_clock(device) - begin) / calls[name])
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def measure_limits(device: torch.device, dtypes: Iterable[torch.dtype]) -> Limits:
    """The best of several tries: memory by copying (read and written) and by a matrix-vector product (read),
    the faster of the two; arithmetic by a square matrix product of each type, int8 by `torch._int_mm`."""
    side = math.isqrt(STREAMED_BYTES // 4)
    source = torch.rand(side, side, device=device)
    target, vector = torch.empty_like(source), torch.rand(side, device=device)
    bandwidth = max(
        2 * source.nbytes / _fastest(lambda: target.copy_(source), device),
        source.nbytes / _fastest(lambda: torch.mv(source, vector), device),
    )
    rates, size = {}, MATRIX[device.type]
    for dtype in dtypes:
        if dtype == torch.int8:
            a = torch.randint(-8, 8, (size, size), dtype=dtype, device=device)
            product = partial(int_mm, a, a)
        else:
            a = torch.rand(size, size, device=device).to(dtype)
            product = partial(torch.mm, a, a.t())
        rates[dtype] = size**3 / _fastest(product, device)
    return Limits(bandwidth, rates)


def sets_needed(bytes_of_a_set: int, l2: int) -> int:
    """How many sets of operands take turns: at least two, and enough to fill L2 ROTATED_L2 times, up to
    MOST_SETS."""
    return max(2, min(MOST_SETS, -(-ROTATED_L2 * l2 // max(bytes_of_a_set, 1))))


@dataclass(frozen=True)
class Replay:
    """A pass over all sets of operands: play() puts `calls` calls on the device's stream. eager: the host
    launches each of them, because they cannot be recorded as a graph. results: of the calls in a graph, which
    every replay writes anew; none where the host launches."""

    play: Callable[[], object]
    calls: int
    eager: bool
    results: Sequence[Any] = ()


def recorded(calls: Sequence[Callable[[], object]], device: torch.device) -> Replay:
    """The calls as one CUDA graph, after two of them have built what is built once.

    The results of all calls are alive at once, so each has its own memory, like the operands. Raises what a
    call raises outside the recording; what fails in it alone is left to the host.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            with waiting_refused():
                calls[0]()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                kept = [call() for call in calls]
            finally:
                graph.capture_end()
        torch.cuda.synchronize(device)
        graph.replay()
        torch.cuda.synchronize(device)
    except Exception:  # noqa: BLE001 - whatever it is, the same calls are tried without a graph
        torch.cuda.synchronize(device)
        return Replay(lambda: [call() for call in calls], len(calls), eager=True)
    # To keep them costs nothing: a graph holds the memory of its results in any case.
    return Replay(graph.replay, len(calls), eager=False, results=kept)


def differs(replay: Replay, calls: Sequence[Callable[[], object]], exact: bool) -> bool:
    """Whether what the last replay left of its first and last call differs from what the host gets by calling
    them: in a bit, or for results that are not `exact` by more than the rounding of their sums."""
    return any(
        not _alike(replay.results[number], calls[number](), exact) for number in (0, -1) if replay.results
    )


def _alike(found: object, wanted: object, exact: bool) -> bool:
    pairs = zip(tensors(found), tensors(wanted), strict=True)
    return all(torch.equal(a, b) or (not exact and _close(a, b)) for a, b in pairs)


def _close(a: Tensor, b: Tensor) -> bool:
    """Of the first and last rows: the others take much memory as float32."""
    if a.shape != b.shape or not a.is_floating_point():
        return False
    for rows in (slice(0, COMPARED_ROWS), slice(-COMPARED_ROWS, None)):
        of_a, of_b = a[rows].float(), b[rows].float()
        if not float((of_a - of_b).norm()) <= ROUNDING * float(of_b.norm()):
            return False
    return True


def replayed(replays: Mapping[str, Replay], turns: int, least: float) -> dict[str, Timing]:
    """Time every replay in each of `turns` turns by events on the current CUDA stream.

    In a turn a replay is played once uncounted, which hides the host's work for the rest and empties the
    cache of what others left there, and then as often as it takes to fill `least` seconds.
    """

    def timed(replay: Replay, times: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        replay.play()
        begin.record()
        for _ in range(times):
            replay.play()
        end.record()
        return begin, end

    times = {}
    for name, replay in replays.items():
        begin, end = timed(replay, 1)
        end.synchronize()
        times[name] = max(1, math.ceil(least / max(begin.elapsed_time(end) / 1e3, 1e-7)))
    events = [{name: timed(replay, times[name]) for name, replay in replays.items()} for _ in range(turns)]
    torch.cuda.synchronize()
    return {
        name: Timing(
            tuple(
                turn[name][0].elapsed_time(turn[name][1]) / 1e3 / (times[name] * replay.calls)
                for turn in events
            )
        )
        for name, replay in replays.items()
    }


def measure_gpu_limits(device: torch.device) -> tuple[Limits, dict[str, float]]:
    """The limits that floors are formed with, and what was measured for them (bytes/s and multiply-adds/s).

    Memory by copying (read and written) and by a sum (read), the faster of the two. Arithmetic on random data
    by the library's square products. int8: what `torch._int_mm` reaches, or twice the bf16 rate where that is
    more, because tensor cores do int8 at twice their bf16 rate and the library stays below it.
    """
    source = torch.randn(STREAMED_BYTES, device=device)
    target = torch.empty_like(source)
    size = MATRIX["cuda"]
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    codes = torch.randint(-128, 128, (size, size), dtype=torch.int8, device=device)
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "read": lambda: source.sum(),
        "bf16": lambda: torch.mm(a, a.t()),
        "int8": lambda: torch._int_mm(codes, codes.t()),
    }
    timings = replayed({name: recorded([call], device) for name, call in calls.items()}, TRIES, 0.01)
    work = {"copy": 2 * source.nbytes, "read": source.nbytes, "bf16": size**3, "int8": size**3}
    found = {name: work[name] / timing.median for name, timing in timings.items()}
    rates = {torch.bfloat16: found["bf16"], torch.int8: max(found["int8"], 2 * found["bf16"])}
    return Limits(max(found["copy"], found["read"]), rates), found


def nbytes(*parts: object) -> int:
    """Bytes of tensors and of the tensors in tuples and dataclasses."""
    return sum(tensor.nbytes for tensor in tensors(*parts))


def tensors(*parts: object) -> list[Tensor]:
    """The tensors among these and in tuples, lists and dataclasses, in order."""
    found: list[Tensor] = []
    for part in parts:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, tuple | list):
            found += tensors(*part)
        elif dataclasses.is_dataclass(part):
            found += tensors(*(getattr(part, member.name) for member in dataclasses.fields(part)))
    return found


def duration(seconds: float) -> str:
    """In the unit that suits, with three digits: "12.3 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{_digits(seconds / scale)} {unit}"
    return f"{_digits(seconds / 1e-6)} µs"


def spread(timing: Timing) -> str:
    """The fastest and the slowest turn."""
    return f"{duration(min(timing.seconds))} to {duration(max(timing.seconds))}"


def _digits(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def _calls(run: Callable[[int], object], device: torch.device, least: float) -> int:
    run(0)  # builds what is built once
    begin = _clock(device)
    run(1)
    return max(1, math.ceil(least / max(_clock(device) - begin, 1e-9)))


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    return min(interleaved({"": lambda _: call()}, TRIES, device)[""].seconds)


def _clock(device: torch.device) -> float:
    """Seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
