"""The KV cache of the decoder: keys (after RoPE and any online rotation) and values, as written.

`KVCache` grows with what is written. `FixedCache` has room for a number of positions from the start, and for
one position at a time it can be written to without the host: its length then lives on the device, where a
captured CUDA graph finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.kv_reference import PackedRows, kv_resize

Rows = Tensor | PackedRows
Allocate = Callable[[int], tuple[Rows, Rows]]
"""Empty room for the keys and the values of one layer, of as many positions as given."""


class KVCache:
    """Growable room for the keys and the values of each layer, [batch, kv_heads, capacity, head_dim]: as
    floats (`append`), or as packed rows that the int4 layer writes to (`reserve`).

    Floats are held as they are given: simulated quantisation happens once, before `append`.
    """

    def __init__(self, layers: int) -> None:
        self._rows: list[tuple[Rows, Rows] | None] = [None] * layers
        self._lengths = [0] * layers

    @property
    def length(self) -> int:
        """Positions held by every layer."""
        return min(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory held, room for further positions included."""
        parts = (part for pair in self._rows if pair is not None for rows in pair for part in _tensors(rows))
        storages = (part.untyped_storage() for part in parts)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, H, T, D] keys and values behind what is there; return all positions of this layer."""
        start, pair = self._lengths[layer], self._rows[layer]
        stop = start + keys.shape[2]
        if pair is None:
            held = _alone(keys), _alone(values)
        else:
            held = _floats(_grown(pair[0], start, stop)), _floats(_grown(pair[1], start, stop))
            held[0][:, :, start:stop], held[1][:, :, start:stop] = keys, values
        self._rows[layer], self._lengths[layer] = held, stop
        return held[0][:, :, :stop], held[1][:, :, :stop]

    def reserve(self, layer: int, count: int, allocate: Allocate) -> tuple[Rows, Rows, int, int]:
        """The keys and values of a layer with room for `count` more positions, which count as held from now
        on, the first of these, and the first behind them."""
        start, pair = self._lengths[layer], self._rows[layer]
        stop = start + count
        keys, values = allocate(stop) if pair is None else (_grown(rows, start, stop) for rows in pair)
        self._rows[layer], self._lengths[layer] = (keys, values), stop
        return keys, values, start, stop

    def truncate(self, length: int) -> None:
        """Drop every position from `length` on, so that another continuation can be written."""
        if length > self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} positions to {length}")
        self._lengths = [length] * len(self._lengths)

    def clone(self, room: int = 0) -> KVCache:
        """An independent copy of the positions held, with space for `room` more.

        Its memory layout depends on the length and `room` alone, not on what the original has been through:
        a matrix product may round differently for another layout.
        """
        copy = KVCache(len(self._lengths))
        copy._lengths = list(self._lengths)
        copy._rows = [
            None
            if pair is None
            else (_resized(pair[0], length, length + room), _resized(pair[1], length, length + room))
            for pair, length in zip(self._rows, self._lengths, strict=True)
        ]
        return copy


class FixedCache:
    """Room for `capacity` positions of `batch` sequences in every layer of a decoder, allocated at once.

    rows: keys and values of each layer. length: positions held by all of them. start, stop: 0-dim int64
    tensors on the device of the rows, the position that is written while `stepping` and the first behind it;
    whoever steps keeps them at `length` and `length` + 1, in place.
    """

    def __init__(
        self, rows: Sequence[tuple[Rows, Rows]], start: Tensor, stop: Tensor, length: int = 0
    ) -> None:
        self.rows = list(rows)
        self.start, self.stop = start, stop
        self.length = length
        self.stepping = False

    @property
    def capacity(self) -> int:
        return _codes(self.rows[0][0]).shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the room."""
        return sum(part.nbytes for pair in self.rows for rows in pair for part in _tensors(rows))

    def reserve(
        self, layer: int, count: int, allocate: Allocate
    ) -> tuple[Rows, Rows, int | Tensor, int | Tensor]:
        """As `KVCache.reserve`; `length` is raised by whoever reads through all layers. While `stepping`, the
        one position is named by `start` and `stop`, and nothing depends on the host."""
        keys, values = self.rows[layer]
        if self.stepping:
            return keys, values, self.start, self.stop
        if self.length + count > self.capacity:
            raise ValueError(f"{self.length + count} positions, and the cache has room for {self.capacity}")
        return keys, values, self.length, self.length + count

    def of(self, sequences: slice) -> FixedCache:
        """The room of some of the sequences, the same memory."""
        batch, rows = _codes(self.rows[0][0]).shape[0], self.rows
        if sequences.indices(batch) != (0, batch, 1):
            rows = [(_sliced(keys, sequences), _sliced(values, sequences)) for keys, values in rows]
        return FixedCache(rows, self.start, self.stop, self.length)


def _alone(x: Tensor) -> Tensor:
    """x, copied where it would keep a larger tensor alive, such as the output of merged projections."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def _sliced(rows: Rows, sequences: slice) -> Rows:
    """Some sequences of rows."""
    if isinstance(rows, Tensor):
        return rows[sequences]
    parts: dict[str, Any] = {
        name: part[sequences]
        for name, part in vars(rows).items()
        if isinstance(part, Tensor) and part.dim() > 0
    }
    return replace(rows, **parts)


def _codes(rows: Rows) -> Tensor:
    return rows if isinstance(rows, Tensor) else rows.codes


def _grown(rows: Rows, length: int, needed: int) -> Rows:
    """`rows`, of which `length` positions are held, moved to at least twice the room where it has no
    `needed` positions."""
    capacity = _codes(rows).shape[2]
    return rows if capacity >= needed else _resized(rows, length, max(2 * capacity, needed))


def _resized(rows: Rows, length: int, capacity: int) -> Rows:
    """The first `length` positions of `rows` in new room for `capacity`."""
    if isinstance(rows, PackedRows):
        return kv_resize(rows, length, capacity)
    batch, heads, _, width = rows.shape
    copy = torch.empty(batch, heads, capacity, width, dtype=rows.dtype, device=rows.device)
    copy[:, :, :length] = rows[:, :, :length]
    return copy


def _tensors(rows: Rows) -> list[Tensor]:
    """The tensors of `rows` that grow with the positions."""
    if isinstance(rows, Tensor):
        return [rows]
    return [part for part in vars(rows).values() if isinstance(part, Tensor) and part.dim() > 0]


def _floats(rows: Rows) -> Tensor:
    assert isinstance(rows, Tensor)
    return rows
