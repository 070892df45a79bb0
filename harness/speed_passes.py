"""Prefill and decode of several decoders, timed in turns: what `python -m harness.speed --shape` measures.

Decoding is timed at a given context without a prefill of it: the cache is filled with random rows, since no
time depends on what they say, and the step is the CUDA graph that a user's decoding replays. A prefill runs
as it does for a user, launched by the host, so its time is the time to the first token, sampling aside.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.power import Meter
from kernels.kv_reference import PackedRows
from kernels.timing import Timing
from methods.cache import FixedCache
from methods.decoder import Decoder
from methods.graphs import Decoding

STEPS = 16
"""Tokens of one timed decoding, for each sequence, behind one that is not timed."""
ALIGNED = 64
"""The cache's capacity is a multiple of it, so that kernels are compiled once for all contexts."""
CHUNK_TOKENS = 32768
"""Tokens of all sequences that go through the decoder at once in a prefill."""
SLOW = 0.5
"""Seconds from which on a prefill is timed in two turns only."""
SETTLING = 0.5
"""Seconds of a pass before its energy is measured, and within which a driver's counter moves."""


@dataclass
class Pass:
    """One decoder's part in a comparison. rewind(): as it was before. call(): a step of all sequences, or a
    prefill, of which there is room for `calls` (and for one step more) after a rewind. peak: bytes that it
    took beside those of all that was there before, None on a CPU. eager: why a step is no graph, None where
    it is one."""

    rewind: Callable[[], object]
    call: Callable[[], object]
    calls: int
    peak: int | None
    eager: str | None

    def play(self) -> None:
        """All calls."""
        self.rewind()
        for _ in range(self.calls):
            self.call()


def capacity(context: int) -> int:
    """Room for a context and what is decoded behind it."""
    return -(-(context + STEPS + 1) // ALIGNED) * ALIGNED


def decode_pass(decoder: Decoder, batch: int, context: int) -> Pass:
    """Decoding behind `context` random positions, played once. Raises torch.OutOfMemoryError, and UserError
    where the cache does not fit."""
    device = decoder.device
    base = _reset_peak(device)
    decoding = Decoding(decoder, batch, capacity(context))
    fill(decoding.cache, context)
    tokens = _tokens(decoder, batch, 1)

    def rewind() -> None:
        decoding.truncate(context)

    found = Pass(rewind, lambda: decoding.step(tokens), STEPS, None, None)
    found.play()
    found.peak, found.eager = _peak(device, base), decoding.eager
    return found


def prefill_pass(decoder: Decoder, batch: int, context: int) -> Pass:
    """A prefill of `context` tokens for each sequence, played once. Raises as `decode_pass`."""
    device = decoder.device
    base = _reset_peak(device)
    decoding = Decoding(decoder, batch, capacity(context))
    ids = _tokens(decoder, batch, context)
    found = Pass(decoding.reset, lambda: decoding.prefill(ids, chunk=CHUNK_TOKENS), 1, None, None)
    found.play()
    found.peak = _peak(device, base)
    return found


def fill(cache: FixedCache, length: int) -> None:
    """Let the cache hold `length` random positions in every layer; its clock is set by a truncation."""
    for pair in cache.rows:
        for rows in pair:
            if isinstance(rows, PackedRows):
                rows.codes.random_(0, 256)
                if rows.poisoned is not None:
                    rows.poisoned.zero_()
                else:
                    rows.scale.fill_(4.0 / 2**rows.bits)
                    if rows.zero is not None:
                        rows.zero.fill_(2 ** (rows.bits - 1))
            else:
                rows.normal_()
    cache.length = length


def _tokens(decoder: Decoder, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (batch, length), generator=generator)
    return ids.to(decoder.device)


def decode_timings(passes: Mapping[str, Pass], turns: int, device: torch.device) -> dict[str, Timing]:
    """Seconds of one step, on a GPU by its own clock, in each of `turns` turns after one that is not
    counted."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(turns + 1):
        for name, one in passes.items():
            one.rewind()
            one.call()  # hides what the host does for the others
            seconds[name].append(_timed(one.call, one.calls, device))
    return {name: Timing(tuple(values[1:])) for name, values in seconds.items()}


def _timed(call: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds of a call, of `times` one after another."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - begin) / times
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    for _ in range(times):
        call()
    ended.record()
    ended.synchronize()
    return float(started.elapsed_time(ended)) / 1e3 / times


def prefill_timings(passes: Mapping[str, Pass], turns: int, device: torch.device) -> dict[str, Timing]:
    """Seconds of a prefill from the call to its logits, of those that take SLOW or more in two turns. Every
    pass has been played once."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(turns):
        for name, one in passes.items():
            if turn >= 2 and min(seconds[name]) >= SLOW:
                continue
            one.rewind()
            seconds[name].append(_elapsed(one.call, device))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def joules(one: Pass, least: float, meter: Meter | None, device: torch.device) -> float | None:
    """Energy of one call of a pass, played without a pause from one change of the meter's number to another,
    at least `least` seconds later: a driver's counter moves a few times a second, and what it adds up lags
    behind. None without a meter, where energy was not to be measured (least 0) and where the number did not
    move."""
    if meter is None or least <= 0:
        return None
    begin, _ = _played(one, min(least, SETTLING), meter, meter.read(), device)
    end, times = _played(one, least, meter, begin, device)
    used = end - begin
    return used / (times * one.calls) if used > 0 and math.isfinite(used) else None


def _played(one: Pass, least: float, meter: Meter, number: float, device: torch.device) -> tuple[float, int]:
    """The meter's number just after it has changed, `least` seconds or more after the call, and how often the
    pass was played until then. The number as it was where it does not move."""
    started, times = time.perf_counter(), 0
    while True:
        one.play()
        _synchronise(device)
        times += 1
        now, taken = meter.read(), time.perf_counter() - started
        if (now != number and taken >= least) or taken >= least + SETTLING:
            return now, times
        number = now


def released(passes: dict[str, Pass], device: torch.device) -> None:
    """Drop the passes, their caches and graphs."""
    passes.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def speed(timing: Timing, first: Timing | None, together: bool) -> float | None:
    """The first one's time as a multiple of this one's: within each turn where they took turns."""
    if first is None:
        return None
    if not together:
        return first.median / timing.median
    common = min(len(first.seconds), len(timing.seconds))
    return Timing(first.seconds[:common]).ratio(Timing(timing.seconds[:common]))


def groups(needs: Mapping[str, int], room: int) -> list[list[str]]:
    """What takes turns: names in order, as many together as fit the room. needs: bytes of each, none of which
    is larger than the room."""
    found: list[tuple[list[str], int]] = []
    for name, need in needs.items():
        for place, (members, taken) in enumerate(found):
            if taken + need <= room:
                found[place] = ([*members, name], taken + need)
                break
        else:
            found.append(([name], need))
    return [members for members, _ in found]


def _elapsed(call: Callable[[], object], device: torch.device) -> float:
    _synchronise(device)
    begin = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - begin


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device, base: int) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - base
