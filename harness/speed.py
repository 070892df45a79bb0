"""`python -m harness.speed`: what a quantised decoder costs beside the float one, in time.

With `--shape`, decoders of published shapes in floating point and in 4 bits: see `speed_matrix`. Else the
methods of the registry, on a model: the float decoder and every chosen method in both executions, simulated
and int4, are timed in one process and in turns: a prefill of a window of tokens (with the logits of its
last), and decoding, one token at a time, behind that many tokens in the KV cache. Tokens are random and
ranges of weights are not searched: that changes what a model says, not what it costs. Beside each time stands
its floor: weights and KV cache moved once, at a measured bandwidth, or the multiply-adds of linears and
attention, at the measured rate of a large matrix product, whichever takes longer.

Exit status 0; 1 where --at-most is exceeded; 2 for a mistake of the user.
"""

from __future__ import annotations

import argparse
import copy
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness import environment, execution, speed_matrix, speed_report, store
from harness.markdown import table
from harness.speed_bench import PHASES
from harness.speed_matrix import BATCHES, CONTEXTS, FORMS, Options
from harness.speed_shapes import ONLINE, SHAPES
from harness.speed_work import work
from harness.store import Record, os_reason
from kernels import ops
from kernels.command import run_command
from kernels.timing import Limits, Timing, duration, interleaved, measure_limits, spread
from methods.bits import FLOAT, Bits, QuantiserSettings
from methods.checkpoint import DEFAULT_MODEL, Checkpoint, open_checkpoint
from methods.decoder import Decoder
from methods.device import parse_device
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError
from methods.execution import pack_decoder
from methods.method import Context
from methods.pipeline import Pipeline, quantise
from methods.registry import parse_method

DECODED = 8
"""Tokens of one timed decoding."""
CALIBRATION = (4, 64)
"""Sequences and tokens of the random text that methods learn from here."""
METHODS, BITS, TOKENS, TURNS = ("quarot:rounding=rtn",), ("w4a4kv4",), 1024, 5
LONGEST_PREFILL, ENERGY_SECONDS = 2.5, 1.0
OF_A_MODEL = ("model", "methods", "bits", "tokens", "at_most")
OF_A_SHAPE = (
    *("forms", "batch", "context", "phases", "online", "minutes", "longest_prefill", "energy_seconds"),
    *("no_overhead", "prepare", "commit"),
)
"""Options that mean nothing in the other mode."""
NOTE = """\
x float: the median over turns of the time as a multiple of the float decoder's in the same turn."""


@dataclass(frozen=True)
class Subject:
    """A decoder and what the tables call it."""

    method: str
    bits: str
    execution: str
    decoder: Decoder


@dataclass(frozen=True)
class Result:
    """How one decoder did in one phase.

    seconds: of each turn, for `tokens` tokens. ratio: the median over turns of its time as a multiple of the
    float decoder's. floor: seconds that its bytes or its multiply-adds (by type) take at the least.
    """

    phase: str
    method: str
    bits: str
    execution: str
    tokens: int
    seconds: tuple[float, ...]
    ratio: float
    floor: float
    bytes: int
    multiply_adds: dict[str, int]


def subjects(
    checkpoint: Checkpoint, pipelines: Sequence[Pipeline], widths: Sequence[Bits], device: torch.device
) -> list[Subject]:
    """The float decoder, then every method at every width, simulated and packed."""
    found = [Subject("float", str(FLOAT), "float", checkpoint.load(device=device))]
    text = random_tokens(checkpoint.config.vocab_size, *CALIBRATION)
    settings = QuantiserSettings(weight_search=False)
    for pipeline in pipelines:
        for bits in widths:
            made = quantise(
                checkpoint, pipeline, bits, Context(device), settings=settings, calibration=text
            ).decoder
            packed = copy.deepcopy(made)
            pack_decoder(packed)
            found += [
                Subject(pipeline.spec, str(bits), decoder.execution, decoder) for decoder in (made, packed)
            ]
    return found


def random_tokens(vocabulary: int, batch: int, length: int) -> Tensor:
    """Ids [batch, length], the same in every run."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def prefill(decoder: Decoder, ids: Tensor) -> Callable[[int], object]:
    """A run over ids [1, T] into a new KV cache."""
    return lambda _: decoder(ids, cache=decoder.new_cache(), last=1)


def decoding(decoder: Decoder, ids: Tensor) -> Callable[[int], object]:
    """A run that decodes `DECODED` tokens behind ids [1, T], whose cache is filled once."""
    cache = decoder.new_cache()
    decoder.states(ids, cache=cache)

    def decode(_: int) -> None:
        cache.truncate(ids.shape[1])
        for position in range(DECODED):
            decoder(ids[:, position % ids.shape[1]][:, None], cache=cache, last=1)

    return decode


@torch.inference_mode()
def measure(entries: Sequence[Subject], ids: Tensor, turns: int, limits: Limits) -> list[Result]:
    """Time both phases of all decoders, the float one first, on ids [1, T]."""
    results = []
    length = ids.shape[1]
    cached_bytes = [_cached_bytes(entry.decoder, ids) for entry in entries]
    for phase in PHASES:
        make = prefill if phase == "prefill" else decoding
        runs = {str(index): make(entry.decoder, ids) for index, entry in enumerate(entries)}
        timings = list(interleaved(runs, turns, ids.device).values())
        for entry, timing, cached in zip(entries, timings, cached_bytes, strict=True):
            steps, tokens, past = (1, length, 0) if phase == "prefill" else (DECODED, 1, length)
            least = work(entry.decoder, tokens, past, cached)
            counts = {
                str(dtype).removeprefix("torch."): steps * count
                for dtype, count in least.multiply_adds.items()
            }
            results.append(
                Result(
                    phase,
                    entry.method,
                    entry.bits,
                    entry.execution,
                    steps * tokens,
                    timing.seconds,
                    timing.ratio(timings[0]),
                    steps * limits.floor(least),
                    steps * least.bytes,
                    counts,
                )
            )
    return results


def _cached_bytes(decoder: Decoder, ids: Tensor) -> float:
    """Bytes of one position in the KV cache of all layers."""
    cache = decoder.new_cache()
    decoder.states(ids, cache=cache)
    return cache.nbytes / ids.shape[1]


def markdown(results: Sequence[Result]) -> str:
    """A table of each phase, times per window and per decoded token."""
    head = ["method", "bits", "execution", "median", "fastest to slowest", "x float", "tokens/s"]
    head += ["floor", "x floor"]
    parts = []
    for phase in PHASES:
        lines = []
        own = [result for result in results if result.phase == phase]
        for result in own:
            steps = 1 if phase == "prefill" else result.tokens
            timing = Timing(tuple(seconds / steps for seconds in result.seconds))
            floor = result.floor / steps
            line = [result.method, result.bits, result.execution, duration(timing.median), spread(timing)]
            line += [f"{result.ratio:.2f}", f"{result.tokens / steps / timing.median:.1f}"]
            lines.append([*line, duration(floor), f"{timing.median / floor:.2f}"])
        title = f"prefill, {own[0].tokens} tokens" if phase == "prefill" else "decode, each token"
        parts += [f"### {title}", table(head, lines)]
    return "\n\n".join([*parts, NOTE])


def too_slow(results: Sequence[Result], at_most: float) -> list[str]:
    """A line for each simulated prefill that costs more than `at_most` times the float one."""
    return [
        f"{result.method} {result.bits}: the simulated prefill costs {result.ratio:.2f}x the float one, more "
        f"than {at_most:g}x"
        for result in results
        if result.phase == "prefill" and result.execution == "simulate" and result.ratio > at_most
    ]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m harness.speed",
        description="Time whole decoders: float, simulated and int4, prefill and decode, in turns.",
    )
    result.add_argument("--repeat", type=int, metavar="N", help=f"turns (default: {TURNS})")
    result.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    result.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    result.add_argument("--out", type=Path, metavar="FILE", help="also write everything as JSON")
    model = result.add_argument_group("methods of the registry, on a model")
    model.add_argument("--model", help="default model, folder, .gguf file or hub id")
    model.add_argument("--methods", nargs="+", metavar="METHOD", help="all but float")
    model.add_argument("--bits", nargs="+", metavar="BITS")
    model.add_argument(
        "--tokens", type=int, metavar="N", help="prefill window, and context of decoding (default: 1024)"
    )
    model.add_argument(
        "--at-most",
        type=float,
        metavar="X",
        help="exit with 1 where a simulated prefill costs more than X float",
    )
    shape = result.add_argument_group("decoders of published shapes with random weights")
    shape.add_argument("--shape", nargs="+", metavar="NAME", help=", ".join(SHAPES))
    shape.add_argument("--forms", nargs="+", metavar="FORM", help=f"(default: {' '.join(FORMS)})")
    shape.add_argument("--batch", nargs="+", type=int, metavar="N", help=f"(default: {_list(BATCHES)})")
    shape.add_argument("--context", nargs="+", type=int, metavar="N", help=f"(default: {_list(CONTEXTS)})")
    shape.add_argument("--phases", nargs="+", metavar="PHASE", help=f"(default: {' '.join(PHASES)})")
    shape.add_argument(
        "--online",
        nargs="?",
        const="quarot",
        metavar="NAME",
        help=f"online parts of the 4-bit forms: {', '.join(ONLINE)} (default: none; without a name: quarot)",
    )
    shape.add_argument(
        "--no-overhead",
        action="store_true",
        default=None,
        help="leave out what each method's online parts cost",
    )
    shape.add_argument(
        "--minutes", type=float, metavar="N", help="begin nothing more after so many, but for shares"
    )
    shape.add_argument(
        "--longest-prefill",
        type=float,
        metavar="S",
        help=f"seconds by its floor (default: {LONGEST_PREFILL:g})",
    )
    shape.add_argument(
        "--energy-seconds",
        type=float,
        metavar="S",
        help=f"over which energy is measured, 0: not at all (default: {ENERGY_SECONDS:g})",
    )
    shape.add_argument("--prepare", type=int, metavar="N", help="compile everything first, in N processes")
    shape.add_argument("--commit", help="the commit of these sources, where they are not in git")
    return result


def _list(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def run(arguments: argparse.Namespace, command: str) -> int:
    shaped = arguments.shape is not None
    for name in OF_A_MODEL if shaped else OF_A_SHAPE:
        if getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: not with --shape" if shaped else f"{option}: only with --shape")
    for name in ("tokens", "repeat", "threads", "batch", "context"):
        value = getattr(arguments, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            raise UserError(f"--{name} {value}: give at least 1")
    device = parse_device(arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return _run_shapes(arguments, command, device) if shaped else _run_model(arguments, command, device)


def _run_shapes(arguments: argparse.Namespace, command: str, device: torch.device) -> int:
    options = Options(
        shapes=arguments.shape,
        forms=arguments.forms or FORMS,
        batches=arguments.batch or BATCHES,
        contexts=arguments.context or CONTEXTS,
        phases=arguments.phases or PHASES,
        online=arguments.online or "none",
        turns=arguments.repeat or TURNS,
        minutes=arguments.minutes,
        longest=LONGEST_PREFILL if arguments.longest_prefill is None else arguments.longest_prefill,
        energy=ENERGY_SECONDS if arguments.energy_seconds is None else arguments.energy_seconds,
        overhead=not arguments.no_overhead,
        prepare=arguments.prepare or 0,
        commit=arguments.commit,
        out=arguments.out,
    )
    record = speed_matrix.run(options, command, device)
    print()
    print(speed_report.report(record))
    return 0


def _run_model(arguments: argparse.Namespace, command: str, device: torch.device) -> int:
    at_most, turns = arguments.at_most, arguments.repeat or TURNS
    if at_most is not None and not at_most > 0:
        raise UserError(f"--at-most {at_most:g}: give a multiple of the float time, such as 2")
    pipelines = [parse_method(spec) for spec in arguments.methods or METHODS]
    widths = [Bits.parse(text) for text in arguments.bits or BITS]
    if any(pipeline.is_float for pipeline in pipelines) or any(bits.is_float for bits in widths):
        raise UserError("the float decoder is timed in any case: give methods and bits that quantise")
    name, tokens = arguments.model or DEFAULT_MODEL, arguments.tokens or TOKENS
    checkpoint = open_checkpoint(name)
    longest = checkpoint.config.max_positions - DECODED
    if tokens > longest:
        raise UserError(f"--tokens {tokens}: {name} has room for {longest} at most")
    entries = subjects(checkpoint, pipelines, widths, device)
    limits = measure_limits(device, (torch.float32, torch.int8))
    machine = {
        **environment.describe(device),
        "platform": environment.platform_name(),
        "load": os.getloadavg()[0],
        "bytes_per_second": limits.bytes_per_second,
        "multiply_adds_per_second": {
            str(dtype).removeprefix("torch."): rate for dtype, rate in limits.multiply_adds_per_second.items()
        },
    }
    ids = random_tokens(checkpoint.config.vocab_size, 1, tokens).to(device)
    ops.reset_implementations()
    results = measure(entries, ids, turns, limits)
    print(f"{name} on {machine['cpu']}, {heading(machine)}; {turns} turns\n")
    print(markdown(results))
    if arguments.out is not None:
        record: Record = {
            "command": command,
            "commit": environment.commit(),
            "machine": machine,
            "model": {"name": name, "sha256": checkpoint.sha256},
            "implementations": execution.implementations(),
            "results": [asdict(result) for result in results],
        }
        store.write_json(arguments.out, record)
    slow = [] if at_most is None else too_slow(results, at_most)
    for line in slow:
        print(line, file=sys.stderr)
    return 1 if slow else 0


def heading(machine: Record) -> str:
    """The machine's state and limits in one line."""
    rates = machine["multiply_adds_per_second"]
    limits = [f"{machine['bytes_per_second'] / 1e9:.1f} GB/s"]
    limits += [f"{rate / 1e9:.0f} G {name} multiply-adds/s" for name, rate in rates.items()]
    threads = machine["threads"]
    where = machine["gpu"] or f"{threads} thread{'s' if threads > 1 else ''}"
    return f"{where}, load {machine['load']:.1f}; limits: {', '.join(limits)}"


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(given)
    threads = torch.get_num_threads()
    try:
        refuse_foreign_kernels()
        return run(arguments, f"python -m harness.speed {shlex.join(given)}".strip())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {os_reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    run_command(main)
