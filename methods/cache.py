"""The KV cache of the decoder: keys (after RoPE and any online rotation) and values, as written."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Growable buffers of keys and values, one pair a layer, each [batch, kv_heads, capacity, head_dim].

    Holds what it is given: quantising happens once, before `append`.
    """

    def __init__(self, layers: int) -> None:
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers
        self._lengths = [0] * layers

    @property
    def length(self) -> int:
        """Positions held by every layer."""
        return min(self._lengths)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, H, T, D] keys and values behind what is there; return all positions of this layer."""
        start = self._lengths[layer]
        stop = start + keys.shape[2]
        self._keys[layer] = _grown(self._keys[layer], keys, start, stop)
        self._values[layer] = _grown(self._values[layer], values, start, stop)
        self._lengths[layer] = stop
        return self._view(self._keys[layer], stop), self._view(self._values[layer], stop)

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
        for layer, length in enumerate(self._lengths):
            copy._keys[layer] = _copied(self._keys[layer], length, room)
            copy._values[layer] = _copied(self._values[layer], length, room)
        return copy

    @staticmethod
    def _view(buffer: Tensor | None, stop: int) -> Tensor:
        assert buffer is not None
        return buffer[:, :, :stop]


def _grown(buffer: Tensor | None, new: Tensor, start: int, stop: int) -> Tensor:
    """`buffer` with `new` written at start:stop, doubled first where it is too short."""
    if buffer is None and start == 0:
        return new
    assert buffer is not None
    if buffer.shape[2] < stop:
        batch, heads, _, width = new.shape
        larger = torch.empty(
            batch, heads, max(2 * buffer.shape[2], stop), width, dtype=new.dtype, device=new.device
        )
        larger[:, :, :start] = buffer[:, :, :start]
        buffer = larger
    buffer[:, :, start:stop] = new
    return buffer


def _copied(buffer: Tensor | None, length: int, room: int) -> Tensor | None:
    """The first `length` positions of `buffer` in a new one of `length + room`."""
    if buffer is None:
        return None
    batch, heads, _, width = buffer.shape
    copy = torch.empty(batch, heads, length + room, width, dtype=buffer.dtype, device=buffer.device)
    copy[:, :, :length] = buffer[:, :, :length]
    return copy
