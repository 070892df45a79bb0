"""`python -m kernels.bench`: time each operation of the int4 layer beside what it competes with.

Every operation runs at the shapes of real models and in turns with its peers: floating-point products and the
bare integer product for linears, a copy for what is bound by memory, floating-point attention for the packed
cache. Beside each time stands its floor: the bytes that the operation must move and the multiply-adds that it
must do, at limits measured in the same run.

On a GPU (`--device cuda`) the Triton kernels compete instead, with cuBLAS in bf16 and with the packages that
are installed beside them: see `gpu_contests` and `peers`. `python -m kernels.roofline` makes a report of its
JSON.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import gpu_bench, gpu_contests
from kernels.command import run_command
from kernels.contests import OPERATIONS, SHAPES, Contest
from kernels.timing import Limits, Timing, Work, duration, interleaved, measure_limits, nbytes, spread

LEAST_SECONDS = 0.01
TOKENS = (1, 256)
TURNS, GPU_TURNS = 5, 10
CONTEXT = 2048
# Options that mean nothing elsewhere.
ON_A_CPU, ON_A_GPU = ("context", "threads"), ("layers", "by", "prepare", "commit")
NOTE = """\
x first: the median over turns of the time as a multiple of the first implementation's in the same turn. \
x floor below 1: the operands stayed in a cache."""


@dataclass(frozen=True)
class Result:
    """How one run did: seconds of each turn, the median over turns of its time as a multiple of the first
    run's, and its floor in seconds."""

    shape: str
    operation: str
    tokens: int
    implementation: str
    seconds: tuple[float, ...]
    ratio: float
    floor: float


@torch.inference_mode()
def measure(
    shapes: Sequence[str],
    operations: Sequence[str],
    tokens: Sequence[int],
    context: int,
    turns: int,
    limits: Limits,
    device: torch.device,
) -> Iterator[Result]:
    """Every operation at every shape and number of tokens, attention at one alone."""
    for shape in shapes:
        for operation in operations:
            for count in tokens[:1] if operation == "attention" else tokens:
                for contest in OPERATIONS[operation](SHAPES[shape], count, context, device):
                    yield from _timed(shape, contest, turns, limits, device)


def _timed(
    shape: str, contest: Contest, turns: int, limits: Limits, device: torch.device
) -> Iterator[Result]:
    calls = {name: run.call for name, run in contest.runs.items()}
    timings = interleaved(calls, turns, device, LEAST_SECONDS)
    first = next(iter(timings.values()))
    for name, timing in timings.items():
        run = contest.runs[name]
        floor = limits.floor(Work(nbytes(*run.operands, run.call(0)), run.multiply_adds))
        yield Result(
            shape, contest.operation, contest.tokens, name, timing.seconds, timing.ratio(first), floor
        )


def markdown(results: Sequence[Result], turns: int) -> str:
    """One table for each shape."""
    lines: list[str] = []
    for shape in dict.fromkeys(result.shape for result in results):
        lines += [
            f"{shape}, {turns} turns",
            "",
            "| operation | tokens | implementation | median | fastest to slowest | x first | floor "
            "| x floor |",
            "|:--|--:|:--|--:|--:|--:|--:|--:|",
        ]
        for result in results:
            if result.shape == shape:
                timing = Timing(result.seconds)
                cells = [result.operation, result.tokens, result.implementation, duration(timing.median)]
                cells += [spread(timing), f"{result.ratio:.2f}", duration(result.floor)]
                lines.append(f"| {' | '.join(map(str, cells))} | {timing.median / result.floor:.1f} |")
        lines.append("")
    return "\n".join([*lines, NOTE])


def machine(device: torch.device) -> dict[str, Any]:
    """What the times depend on, the sources of this package included."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).resolve().parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return {
        "code": digest.hexdigest()[:16],
        "torch": torch.__version__,
        "platform": platform.platform(terse=True),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description="Time the operations of the int4 layer beside their peers.",
    )
    result.add_argument("--shapes", nargs="+", metavar="SHAPE", default=list(SHAPES), help=", ".join(SHAPES))
    result.add_argument(
        "--operations",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(OPERATIONS)}; on a GPU {', '.join(gpu_bench.OPERATIONS)} (default: all)",
    )
    result.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        metavar="N",
        help=f"rows of x (default: {list_of(TOKENS)}; on a GPU {list_of(gpu_contests.ROWS)})",
    )
    result.add_argument(
        "--context", type=int, metavar="N", help=f"positions in the KV cache, on a CPU (default: {CONTEXT})"
    )
    result.add_argument("--repeat", type=int, metavar="N", help="turns (default: 5; on a GPU 10)")
    result.add_argument("--threads", type=int, metavar="N", help="CPU threads, on a CPU")
    result.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    result.add_argument("--out", type=Path, metavar="FILE", help="also write everything as JSON")
    gpu = result.add_argument_group("on a GPU")
    gpu.add_argument("--layers", nargs="+", metavar="NAME", help="only these linears or passes, such as qkv")
    gpu.add_argument(
        "--by",
        nargs="+",
        metavar="PACKAGE",
        help=f"who takes part beside cuBLAS (default: {', '.join(gpu_bench.BY)})",
    )
    gpu.add_argument("--prepare", type=int, metavar="N", help="compile everything first, in N processes")
    gpu.add_argument("--commit", help="the commit of these sources, where they are not in git")
    return result


def list_of(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def run(arguments: argparse.Namespace, command: str) -> None:
    """Raises ValueError for options that do not fit, OSError where the file cannot be written."""
    on_gpu = arguments.device.startswith("cuda")
    operations: Sequence[str] = list(gpu_bench.OPERATIONS if on_gpu else OPERATIONS)
    for kind, given, known in (
        ("shape", arguments.shapes, list(SHAPES)),
        ("operation", arguments.operations or [], operations),
        ("package", arguments.by or [], list(gpu_bench.BY)),
    ):
        for name in given:
            if name not in known:
                raise ValueError(f"{kind} {name!r}: choose among {', '.join(known)}")
    for name in ON_A_CPU if on_gpu else ON_A_GPU:
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name}: only {'on a CPU' if on_gpu else 'with --device cuda'}")
    for name in ("tokens", "context", "repeat", "threads"):
        value = getattr(arguments, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            raise ValueError(f"--{name}: give at least 1")
    if (arguments.prepare or 0) < 0:
        raise ValueError("--prepare: give a number of processes, or 0")
    device = _device(arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    operations = arguments.operations or operations
    if on_gpu:
        asked = gpu_bench.Options(
            arguments.shapes,
            operations,
            arguments.layers,
            arguments.tokens,
            arguments.by or gpu_bench.BY,
            arguments.repeat or GPU_TURNS,
            arguments.prepare or 0,
            arguments.commit,
            arguments.out,
        )
        gpu_bench.run(asked, command, machine(device), device)
        return
    tokens, turns = arguments.tokens or TOKENS, arguments.repeat or TURNS
    limits = measure_limits(device, (torch.float32, torch.bfloat16, torch.int8))
    rates = {str(dtype)[6:]: rate for dtype, rate in limits.multiply_adds_per_second.items()}
    about = machine(device)
    print("; ".join(f"{name} {value}" for name, value in about.items()))
    print(f"limits: {limits.bytes_per_second / 1e9:.1f} GB/s; multiply-adds: ", end="")
    print(", ".join(f"{name} {rate / 1e9:.0f} G/s" for name, rate in rates.items()), end="\n\n")
    given = (arguments.shapes, operations, tokens, arguments.context or CONTEXT, turns)
    results = list(measure(*given, limits, device))
    print(markdown(results, turns))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "command": command,
            "machine": about,
            "limits": {
                "bytes_per_second": limits.bytes_per_second,
                "multiply_adds_per_second": rates,
            },
            "results": [asdict(result) for result in results],
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device {text!r}: this machine has none; give cpu, cuda or cuda:N") from error
    return device


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(given)
    threads = torch.get_num_threads()
    try:
        run(arguments, f"python -m kernels.bench {shlex.join(given)}".strip())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    run_command(main)
