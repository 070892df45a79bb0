"""The KV cache of the decoder: keys (after RoPE and any online rotation) and values, as written."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.kv_reference import PackedRows, kv_resize

Rows = Tensor | PackedRows


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
            held = (keys, values)
        else:
            held = _floats(_grown(pair[0], start, stop)), _floats(_grown(pair[1], start, stop))
            held[0][:, :, start:stop], held[1][:, :, start:stop] = keys, values
        self._rows[layer], self._lengths[layer] = held, stop
        return held[0][:, :, :stop], held[1][:, :, :stop]

    def reserve(
        self, layer: int, count: int, allocate: Callable[[int], tuple[PackedRows, PackedRows]]
    ) -> tuple[PackedRows, PackedRows, int]:
        """The packed keys and values of a layer with room for `count` more positions, which count as held
        from now on, and the first of these. allocate(capacity): empty keys and values."""
        start, pair = self._lengths[layer], self._rows[layer]
        stop = start + count
        if pair is None:
            keys, values = allocate(stop)
        else:
            keys, values = _packed(_grown(pair[0], start, stop)), _packed(_grown(pair[1], start, stop))
        self._rows[layer], self._lengths[layer] = (keys, values), stop
        return keys, values, start

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


def _grown(rows: Rows, length: int, needed: int) -> Rows:
    """`rows`, of which `length` positions are held, moved to at least twice the room where it has no
    `needed` positions."""
    capacity = (rows if isinstance(rows, Tensor) else rows.codes).shape[2]
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


def _packed(rows: Rows) -> PackedRows:
    assert isinstance(rows, PackedRows)
    return rows
