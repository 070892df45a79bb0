"""Decoding with nothing left to the host: a fixed cache, and on a CUDA GPU one captured graph a step.

A decode step of a small batch is a few hundred kernels of microseconds, which the host launches more slowly
than the GPU runs them. `Decoding` captures them once, over buffers that stay where they are: the tokens read,
the logits given, a cache with room for `capacity` positions, and a clock on the device (how many positions
are held, and the position of each sequence), which every step moves on by one. Elsewhere, and for a decoder
with an operation that waits for the host, the same step runs without a graph.
"""

from __future__ import annotations

import functools
import gc
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import ops
from kernels.waiting import waiting_refused
from methods.cache import FixedCache, Rows
from methods.decoder import Block, Decoder
from methods.errors import UserError
from methods.linear import Linear

_APART = 16
"""Entries of the clock between two that kernels read: each then begins at a multiple of 128 bytes."""


@dataclass(frozen=True)
class _Captured:
    """A step as a graph. logits: where a replay leaves them. calls: of operations in it. weights: the
    `_places` of what it reads."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor
    calls: ops.Calls
    weights: list[object]


class Decoding:
    """`batch` sequences side by side in a cache of `capacity` positions.

        logits = decoding.prefill(ids)
        while ...:
            logits = decoding.step(logits.argmax(-1))

    Quantisers must stay as they are from the first step on. A graph reads weights where they lay when it was
    captured: where they have been replaced, the first step behind a reset, or behind a prefill of nothing
    held, captures it anew; other steps do not look. Operations in a replayed graph are counted by `ops` as if
    they had been called. A step that cannot be captured warns and runs without a graph (`eager`). Raises
    UserError where the GPU has no memory for the cache. Not for several threads. Replays on several streams
    of a GPU wait for one another: graphs share the working memory of kernels.
    """

    def __init__(self, decoder: Decoder, batch: int, capacity: int) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(f"room for {batch} sequences of {capacity} positions: give at least 1 of each")
        self.decoder, self.batch, self.capacity = decoder, batch, capacity
        self.eager: str | None = "there is no GPU" if decoder.device.type != "cuda" else None
        """Why steps run without a graph, None where they need not."""
        device = decoder.device
        _refuse_too_large(decoder, batch, capacity)
        with torch.inference_mode(False), torch.no_grad():  # in-place work on the buffers stays allowed
            clock = torch.zeros(2 * _APART + batch, dtype=torch.long, device=device)
            self._clock, self._positions = clock, clock[2 * _APART :]
            self._offsets = torch.zeros_like(clock)  # from `length` to what the clock shows
            self._offsets[_APART] = 1
            self.cache = FixedCache(_rows(decoder, batch, capacity, device), clock[0], clock[_APART])
            cos, sin = decoder.angles(torch.arange(capacity, device=device)[None])
            self._cos, self._sin = cos[0, 0], sin[0, 0]
            self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
            self._real = torch.ones(batch, capacity, dtype=torch.bool, device=device)
            self._places = torch.arange(capacity, device=device).repeat(batch, 1)
        self._padded, self._looked = False, False
        self._graphs: dict[bool, _Captured] = {}
        self._pool = self._stream = None
        if self.eager is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), _capture_stream(device)
        self.reset()

    @property
    def length(self) -> int:
        """Positions held."""
        return self.cache.length

    @torch.no_grad()
    def prefill(self, ids: Tensor, mask: Tensor | None = None, *, chunk: int | None = None) -> Tensor:
        """Read ids [batch, T] behind what is held; logits [batch, vocab] of the last position.

        mask: bool [batch, T], True at real tokens; pad on the left. chunk: bounds the memory of a pass to
        `chunk` tokens a sequence; what is read at a time is as many whole sequences as that makes, or part of
        one. ValueError where there is no room; what was held stays.
        """
        start, tokens = self.length, ids.shape[1]
        if ids.shape[0] != self.batch or tokens < 1:
            raise ValueError(f"ids {tuple(ids.shape)}: must be {self.batch} sequences of at least one token")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"mask {tuple(mask.shape)}: must be {tuple(ids.shape)}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk {chunk}: give at least 1 token")
        self._need_room(tokens)
        padded, stop = self._padded or mask is not None, start + tokens
        real = self._real[:, :stop]
        if mask is not None:
            real = torch.cat((real[:, :start], mask.bool()), dim=1)
        chunk = self.batch * min(chunk or tokens, tokens)
        together = max(1, chunk // tokens)
        logits = []
        for first in range(0, self.batch, together):
            own = slice(first, first + together)
            cache = self.cache.of(own)
            cache.length = start
            for begin in range(0, tokens, chunk):
                part = ids[own, begin : begin + chunk]
                seen = real[own, : cache.length + part.shape[1]] if padded else None
                state = self.decoder.states(part, mask=seen, cache=cache)
            logits.append(self.decoder.logits(state[:, -1:])[:, 0])
        self._padded, self.cache.length = padded, stop
        if padded:
            self._real[:, :stop] = real
            self._place()
        self._looked = self._looked and start > 0
        self._set_clock()
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of each sequence, int64 [batch] or [batch, 1]; logits [batch, vocab] of the next.
        On a GPU the next step overwrites them. ValueError where there is no room."""
        self._need_room(1)
        if tokens.shape not in ((self.batch,), (self.batch, 1)):
            raise ValueError(f"tokens {tuple(tokens.shape)}: must be one for each of {self.batch} sequences")
        self.tokens.copy_(tokens.reshape(self.batch, 1))
        if not self._looked:
            self._drop_stale()
        if self.eager is None and self._padded not in self._graphs:
            self._capture()
        if self.eager is None:
            captured = self._graphs[self._padded]
            _in_turn(self.decoder.device)
            captured.graph.replay()
            ops.count_replay(captured.calls)
            logits = captured.logits
        else:
            logits = self._pass()
            self._clock.add_(1)
        self.cache.length += 1
        return logits

    def truncate(self, length: int) -> None:
        """Drop every position from `length` on, so that another continuation can be written."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} positions to {length}")
        self.cache.length = length
        if self._padded:
            self._real[:, length:] = True
            self._padded = length > 0
            self._place()
        self._looked = self._looked and length > 0
        self._set_clock()

    def reset(self) -> None:
        """Drop everything that is held; room and graph stay."""
        self.truncate(0)

    def _drop_stale(self) -> None:
        """Forget the graphs of weights that have been replaced since."""
        if self._graphs:
            now = _places(self.decoder)
            self._graphs = {key: one for key, one in self._graphs.items() if one.weights == now}
        self._looked = True

    def _need_room(self, count: int) -> None:
        if self.length + count > self.capacity:
            raise ValueError(
                f"{self.length + count} positions, and there is room for {self.capacity}: make a larger "
                "Decoding, or truncate this one"
            )

    def _place(self) -> None:
        """Count the real tokens of each sequence: their places, and how far these are behind the cache's."""
        self._places.copy_((self._real.long().cumsum(-1) - 1).clamp_(min=0))
        self._offsets[2 * _APART :] = -(~self._real).sum(-1)

    def _set_clock(self) -> None:
        """For a continuation of what is held."""
        torch.add(self._offsets, self.length, out=self._clock)

    def _pass(self) -> Tensor:
        """The step at the position that the clock shows, which stays: logits [batch, vocab]."""
        cos, sin = (table.index_select(0, self._positions)[:, None, None] for table in (self._cos, self._sin))
        self.cache.stepping = True
        try:
            state = self.decoder.flow(self.tokens, (cos, sin), self._masks(), self.cache)
            return self.decoder.logits(state)[:, 0]
        finally:
            self.cache.stepping = False

    def _masks(self) -> dict[int | None, Tensor | None]:
        """By window, the keys that this step may see, bool [batch, 1, 1, capacity]; those behind the clock's
        position are nobody's concern. None: all of them."""
        masks: dict[int | None, Tensor | None] = {}
        for window in self.decoder.windows:
            seen = self._real if self._padded else None
            if window is not None and window < self.capacity:
                near = self._positions[:, None] - self._places < window  # in real tokens
                seen = near if seen is None else near & seen
            masks[window] = None if seen is None else seen[:, None, None]
        return masks

    def _capture(self) -> None:
        """Record the step as a graph, or find out why it cannot be (`eager`). What it writes to the cache on
        the way, the first replay writes again."""
        device, stream = self.decoder.device, self._stream
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream), ops.weights_at_rest():
            self._pass()  # compiles kernels and builds what is built once
            try:
                with waiting_refused():
                    self._pass()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._give_up(error)
        torch.cuda.current_stream(device).wait_stream(stream)
        if self.eager is not None:
            return
        if not self._graphs:  # a pool ends with its last graph, though tensors in it may still be held
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # what is freed while a graph is recorded can break it
        try:
            # Other threads of the process may go on allocating. Where a capture fails to begin or to end,
            # `graph` does not leave the stream.
            with (
                torch.cuda.device(device),
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
                ops.weights_at_rest(),
                ops.counted_apart() as calls,
            ):
                logits = self._pass()
                self._clock.add_(1)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the same step runs without a graph
            torch.cuda.synchronize(device)
            self._give_up(error)
            return
        finally:
            if collecting:
                gc.enable()
        self._graphs[self._padded] = _Captured(graph, logits, calls, _places(self.decoder))

    def _give_up(self, error: RuntimeError) -> None:
        """Run steps without a graph from now on, and say so."""
        self.eager = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"decode steps run without a CUDA graph: {self.eager}", stacklevel=4)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all decodings of a GPU: kernels keep working memory for each stream they are captured on."""
    return torch.cuda.Stream(device)


_replayed_on: dict[torch.device, torch.cuda.Stream] = {}


def _in_turn(device: torch.device) -> None:
    """Let a replay on the current stream wait for the last one of this GPU, if that was on another stream."""
    current = torch.cuda.current_stream(device)
    last = _replayed_on.get(device)
    if last is not None and last != current:
        current.wait_stream(last)
    _replayed_on[device] = current


def _places(decoder: Decoder) -> list[object]:
    """Where the tensors lie that a step reads beside the cache, and of what shape and dtype they are."""
    held: list[object] = []
    for module in decoder.modules():
        held += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if isinstance(module, Linear) and module.packed is not None:
            held += vars(module.packed).values()
    return [(part.data_ptr(), part.shape, part.dtype) for part in held if isinstance(part, Tensor)]


def _rows(decoder: Decoder, batch: int, capacity: int, device: torch.device) -> list[tuple[Rows, Rows]]:
    """Room for keys and values of every layer."""
    blocks = [block for block in decoder.layers if isinstance(block, Block)]
    return [block.self_attn.new_rows(batch, capacity, decoder.dtype, device) for block in blocks]


def cache_bytes(decoder: Decoder, batch: int, capacity: int) -> int:
    """Bytes of the cache of a `Decoding`, found without memory."""
    meta = torch.device("meta")
    nothing = torch.empty((), dtype=torch.long, device=meta)
    return FixedCache(_rows(decoder, batch, capacity, meta), nothing, nothing).nbytes


def _refuse_too_large(decoder: Decoder, batch: int, capacity: int) -> None:
    if decoder.device.type != "cuda":
        return
    needed = cache_bytes(decoder, batch, capacity)
    free = torch.cuda.mem_get_info(decoder.device)[0]
    # What PyTorch holds and does not use is free, too.
    free += torch.cuda.memory_reserved(decoder.device) - torch.cuda.memory_allocated(decoder.device)
    if needed > free:
        raise UserError(
            f"the KV cache of {batch} x {capacity} positions takes {needed:,} bytes, and {free:,} bytes of "
            "the GPU are free: give fewer or shorter sequences"
        )
