"""How fast a cell's model is and what memory it takes, on a small workload of one sequence.

A prefill of some tokens, and decoding behind them one token at a time, as `methods.graphs` runs it: on a GPU
by a CUDA graph, with projections merged but for those of simulated weights. It shows beside accuracy what a
method costs on this machine; `python -m harness.speed` measures what a decoder can do.

Cheap on purpose: on a GPU less than a second beside what is compiled; elsewhere a shorter workload, of which
nothing is begun again once LEAST_SECONDS have passed, so a model that is slow there is run once.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from harness.environment import PeakMemory, processor
from harness.neighbours import busier, neighbours
from harness.store import Record
from methods.decoder import Decoder
from methods.execution import merge_projections
from methods.graphs import Decoding

WORKLOAD = {"cuda": (512, 32), "cpu": (128, 8)}
"""Tokens of the prefill, and those decoded behind them, by type of device."""
REPEATS = 3
LEAST_SECONDS = 1.0


@torch.no_grad()
def speed_record(decoder: Decoder, memory: PeakMemory) -> Record:
    """{"device", "neighbours", "prefill_tokens", "decoded_tokens", "prefill_tokens_per_second",
    "decode_tokens_per_second", "peak_memory_bytes", "eager"}: who else used the machine when it began
    or ended (`neighbours.neighbours`), the larger; the best of a few runs; on a GPU the most that was
    allocated meanwhile, weights included; why steps ran without a graph. {"device", "neighbours", "reason"}
    where that failed.

    The decoder's projections are merged for it, so it comes last.
    """
    device = decoder.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    about: Record = {"device": name, "neighbours": neighbours(device)}
    try:
        with memory.apart() as peak:
            about |= _measured(decoder)
        about["neighbours"] = busier(about["neighbours"], neighbours(device))
        return about | {"peak_memory_bytes": peak()}
    except Exception as error:  # noqa: BLE001 - a cell's numbers do not hang on its speed
        return about | {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _measured(decoder: Decoder) -> Record:
    merge_projections(decoder)
    device, room = decoder.device, decoder.config.max_positions
    prompt, decoded = WORKLOAD["cuda" if device.type == "cuda" else "cpu"]
    decoded = max(1, min(decoded, room // 2))
    prompt = max(1, min(prompt, room - decoded))
    decoding = Decoding(decoder, 1, prompt + decoded)
    ids = (torch.arange(prompt, device=device) % decoder.config.vocab_size)[None]

    def prefill() -> None:
        decoding.reset()
        decoding.prefill(ids)

    def decode() -> None:
        decoding.truncate(prompt)
        for _ in range(decoded):
            decoding.step(ids[:, 0])

    if device.type == "cuda":  # what is compiled and captured is no part of it
        prefill()
        decode()
    return {
        "prefill_tokens": prompt,
        "decoded_tokens": decoded,
        "prefill_tokens_per_second": prompt / _best(prefill, device),
        "decode_tokens_per_second": decoded / _best(decode, device),
        "eager": decoding.eager,
    }


def _best(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of the fastest of a few runs."""
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < LEAST_SECONDS:
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
