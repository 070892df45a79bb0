"""Launches of what was compiled before, on a GPU: the same results as triton's own launches, for operands of
many forms in turns, without asking triton again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import ops
from kernels.kv_reference import kv_rows
from kernels.reference import PackedWeight, Quantised, pack_weight, quantise
from tests.equality import same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda", 0)
if torch.cuda.is_available() and (reason := ops.no_kernels_on(CUDA)) is not None:
    pytest.skip(reason, allow_module_level=True)
triton = pytest.importorskip("triton")

BF16 = torch.bfloat16
ROWS = (1, 5, 16, 17, 40, 100, 300)


def draw(*shape: int, seed: int = 0, place: int = 0, device: torch.device = CUDA) -> Tensor:
    """Numbers in bfloat16 that begin `place` elements behind a multiple of 16 bytes."""
    size = torch.Size(shape).numel()
    numbers = torch.randn(place + size, generator=torch.Generator().manual_seed(seed))
    return numbers.to(device, BF16)[place:].view(shape)


def weight(outputs: int, inputs: int, groups: int = 1, device: torch.device = CUDA) -> PackedWeight:
    q = quantise(
        draw(outputs, inputs, seed=1, device=device).float(), 4, symmetric=True, group=inputs // groups
    )
    return pack_weight(q.codes, q.scale, None, 4)


def codes(x: Tensor) -> Quantised:
    return ops.quantise(x, 8, symmetric=True)


def calls(device: torch.device = CUDA) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Operations on operands of many forms: rows, strides, and places in memory."""
    w, grouped = weight(320, 256, device=device), weight(320, 256, groups=2, device=device)
    gain, bias = draw(256, seed=2, device=device), draw(320, seed=3, device=device)
    for rows in ROWS:
        for place in (0, 8, 3):
            x = draw(rows, 256, seed=rows, place=place, device=device)
            gate, up = draw(rows, 512, seed=rows + 1, place=place, device=device).chunk(2, dim=-1)
            q = codes(x)
            shifted = torch.empty(rows * 256 + 16, dtype=torch.int8, device=device)[place:]
            moved = Quantised(shifted[: rows * 256].view(rows, 256).copy_(q.codes), q.scale, None, None, 8)
            made: dict[str, Callable[[], Any]] = {
                "quantise": partial(ops.quantise, x, 4, symmetric=True),
                "quantise, gate,": partial(ops.quantise, up, 8, gate=gate, symmetric=False),
                "gated": partial(ops.gated, gate, up),
                "norm": partial(ops.rmsnorm, x, add=x, eps=1e-5, gain=gain),
                "norm, codes": partial(ops.rmsnorm_quantise, x, eps=1e-5, keep=16, bits=8, symmetric=True),
                "hadamard": partial(ops.hadamard_quantise, x, size=256, bits=4, symmetric=True),
                "linear": partial(ops.linear, moved, w, bias=bias, dtype=BF16),
                "linear a16": partial(ops.linear, x, grouped, dtype=BF16),
                "kv": partial(through_the_cache, x),
            }
            yield from ((f"{name} {rows} rows at {place}", call) for name, call in made.items())


def through_the_cache(x: Tensor) -> Tensor:
    """Attention of rows [T, 256] to themselves, as 2 query heads and one of keys and of values of 64."""
    query, key, value = x.view(1, -1, 4, 64).split((2, 1, 1), dim=2)
    count = x.shape[0]
    angle = torch.zeros(1, 1, count, 32, dtype=BF16, device=x.device)
    keys, values = (kv_rows(1, 1, 512, 64, 8, symmetric=False, device=x.device) for _ in range(2))
    for start in (0, count % 7):  # every row that is read has been written
        turned = ops.rope_append(query, key, value, angle + 1, angle, keys, values, start)
    return ops.kv_attention(turned, keys, values, count % 7 + count)


@contextmanager
def by_triton_alone() -> Iterator[None]:
    """Inside, nothing that was compiled is launched but by triton, as if no form had come twice."""
    from kernels.triton.launching import Launch

    def launched(self: Any, *pointers: Any) -> None:
        with torch.cuda.device(self._device):
            self._kernel[self._grid](*pointers, *self._numbers, **self._keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__call__", launched)
        yield


def parts(result: Any) -> list[Tensor | None]:
    """The tensors of a result, in order."""
    if result is None or isinstance(result, Tensor):
        return [result]
    if isinstance(result, Quantised):
        return [result.codes, result.scale, result.zero]
    return [part for one in result for part in parts(one)]


def alike(a: Any, b: Any) -> bool:
    return all(same(x, y) for x, y in zip(parts(a), parts(b), strict=True))


@torch.no_grad()
def test_forms_in_turns_give_what_triton_s_own_launches_give() -> None:
    made = list(calls())
    with by_triton_alone():
        wanted = {name: call() for name, call in made}
    for turn in (made, made[::-1], made):
        for name, call in turn:
            assert alike(call(), wanted[name]), name


@torch.no_grad()
def test_triton_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Decoding's attention is launched by triton; so is what reads numbers between multiples of 16 bytes.
    chosen = [call for name, call in calls() if " at 3" not in name and "kv 1 rows" not in name]
    for call in chosen * 2:
        call()

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("triton looked for a kernel")

    monkeypatch.setattr(triton.JITFunction, "run", run)
    for call in chosen:
        call()


@torch.no_grad()
def test_graphs_are_captured_from_launches_of_what_was_compiled() -> None:
    x, w = draw(40, 256, seed=9), weight(320, 256)
    stream = torch.cuda.Stream()

    def chain() -> Tensor:
        q = ops.rmsnorm_quantise(x, add=x, eps=1e-5, bits=8, symmetric=True).codes
        return ops.linear(q, w, dtype=BF16)

    wanted = chain().clone()
    with torch.cuda.stream(stream), ops.weights_at_rest():
        chain(), chain()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), ops.weights_at_rest():
        y = chain()
    for _ in range(3):
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert same(y, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.no_grad()
def test_devices_in_turns() -> None:
    second = torch.device("cuda", 1)
    for (name, call), (_, other) in zip(calls(), calls(second), strict=True):
        for _ in range(2):
            assert alike(call(), other()), name
