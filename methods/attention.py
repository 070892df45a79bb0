"""Attention of the decoder: its projections, RoPE and online rotation, what the cache holds, and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import ops
from kernels.kv_reference import PackedRows, kv_rows, rotate
from kernels.reference import Quantiser, fake_quantise
from methods.bits import KVSpec
from methods.cache import FixedCache, KVCache, Rows
from methods.gradients import straight_through
from methods.linear import Linear, OnlineHadamard, QuantisedInput, project
from methods.norm import RMSNorm

if TYPE_CHECKING:
    from methods.decoder import DecoderConfig

Cache = KVCache | FixedCache


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE; query heads of one group are consecutive.

    `kv_observer`, where set, is shown every unquantised key and value, each [B, kv_heads, T, head_dim];
    `code_observer` the packed keys and values and the positions (from, to) just written. `packed`: keys and
    values are held, and attended to, as codes.
    """

    qkv_proj: Linear | None
    k_scale: Tensor | None
    k_zero: Tensor | None
    v_scale: Tensor | None
    v_zero: Tensor | None

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_dim = (
            layer,
            config.heads,
            config.kv_heads,
            config.head_dim,
        )
        width, head_dim = config.hidden_size, config.head_dim
        self.widths = [config.heads * head_dim, config.kv_heads * head_dim, config.kv_heads * head_dim]
        self.register_module("qkv_proj", None)  # in front, so that linears keep the order they run in
        self.q_proj = Linear(width, config.heads * head_dim, config.qkv_bias)
        self.k_proj = Linear(width, config.kv_heads * head_dim, config.qkv_bias)
        self.v_proj = Linear(width, config.kv_heads * head_dim, config.qkv_bias)
        self.o_proj = Linear(config.heads * head_dim, width, config.o_bias)
        self.q_norm = RMSNorm(head_dim, config.rms_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_eps) if config.qk_norm else None
        self.window = config.windows[layer] if config.windows else None
        self.rotation: OnlineHadamard | None = None
        self.output_transform: OnlineHadamard | None = None
        self.kv: KVSpec | None = None
        self.kv_observer: Callable[[Tensor, Tensor], None] | None = None
        self.code_observer: Callable[[PackedRows, PackedRows, int, int], None] | None = None
        self.packed = False
        for name in ("k_scale", "k_zero", "v_scale", "v_zero"):
            self.register_buffer(name, None)

    @property
    def readers(self) -> tuple[Linear, ...]:
        """The linears that read the normalised residual stream."""
        if self.qkv_proj is not None:
            return (self.qkv_proj,)
        return self.q_proj, self.k_proj, self.v_proj

    def quantise_kv(self, x: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
        """Keys or values [B, H, T, D] as the cache will hold them."""
        if self.kv is None:
            return x
        if self.kv.static and scale is None:
            raise ValueError("a static range of keys and values is asked for, and none has been set")
        options: Quantiser = {
            "bits": self.kv.bits,
            "symmetric": self.kv.symmetric,
            "clip": self._clip,
            "scale": scale,
            "zero": zero,
        }
        return straight_through(x, partial(fake_quantise, **options))

    def forward(
        self,
        x: Tensor | QuantisedInput,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """x: [B, T, hidden]; mask: bool [B or 1, 1, T, S] (True = attend) or None for plain causal. With a
        `FixedCache` that steps, S is its capacity."""
        batch, length, _ = x.shape
        outputs: Sequence[Tensor] = project(x, self.readers)
        if len(outputs) == 1:
            outputs = outputs[0].split(self.widths, dim=-1)
        query, key, value = (y.view(batch, length, -1, self.head_dim) for y in outputs)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self._appends_at_once(cache):
            out = self._append_and_attend(query, key, value, angles, mask, cache)
        else:
            out = self._attend(query, key, value, angles, mask, cache)
        out = out.transpose(1, 2).reshape(batch, length, -1)
        return self.o_proj(out, row_scale, self.output_transform)

    def _appends_at_once(self, cache: Cache | None) -> bool:
        """Whether one operation takes keys and values from the projections to where they are held: as codes,
        or as they are in a fixed cache, with nobody watching in between."""
        rotation = self.rotation
        return (
            (self.packed or (self.kv is None and isinstance(cache, FixedCache)))
            and self.kv_observer is None
            and (rotation is None or (rotation.size, rotation.inner) == (self.head_dim, 1))
        )

    def _append_and_attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """query, key, value [B, T, H, D] as projected; what attention gives, [B, heads, T, D]."""
        keys, values, start, stop = self._reserve(key, cache)
        query = ops.rope_append(
            query,
            key,
            value,
            *angles,
            keys,
            values,
            start,
            hadamard=self.rotation is not None,
            clip=self._clip,
        )
        self._show_codes(keys, values, start, stop)
        return ops.kv_attention(query, keys, values, stop, mask=mask)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """The same step by step, for simulated quantisers and for observers."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = rotate(query, *angles), rotate(key, *angles)
        if self.rotation is not None:
            query, key = self.rotation(query), self.rotation(key)
        if self.kv_observer is not None:
            self.kv_observer(key, value)
        if not self.packed:
            key = self.quantise_kv(key, self.k_scale, self.k_zero)
            value = self.quantise_kv(value, self.v_scale, self.v_zero)
            if not isinstance(cache, FixedCache):
                if cache is not None:
                    key, value = cache.append(self.layer, key, value)
                return F.scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    attn_mask=mask,
                    is_causal=mask is None and query.shape[2] > 1,
                    enable_gqa=self.heads != self.kv_heads,
                )
        keys, values, start, stop = self._reserve(key.transpose(1, 2), cache)
        for rows, x in ((keys, key), (values, value)):
            if isinstance(rows, PackedRows):
                ops.kv_append(rows, x, start, clip=self._clip)
            elif isinstance(start, Tensor):
                rows.index_copy_(2, start.view(1), x)
            else:
                rows[:, :, start:stop] = x
        self._show_codes(keys, values, start, stop)
        return ops.kv_attention(query, keys, values, stop, mask=mask)

    def _reserve(self, key: Tensor, cache: Cache | None) -> tuple[Rows, Rows, int | Tensor, int | Tensor]:
        """Where the keys and values of key [B, T, H, D] go, in the cache or in room for this pass alone; the
        first position and the one behind the last."""
        batch, length = key.shape[:2]

        def allocate(capacity: int) -> tuple[Rows, Rows]:
            return self.new_rows(batch, capacity, key.dtype, key.device)

        return (
            (*allocate(length), 0, length) if cache is None else cache.reserve(self.layer, length, allocate)
        )

    def new_rows(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Rows, Rows]:
        """Empty room for keys and for values as they are held: as codes, or as floats of `dtype`."""

        def rows(scale: Tensor | None, zero: Tensor | None) -> Rows:
            spec = self.kv
            if not self.packed or spec is None:
                # Zeros: what is masked off still takes part, with a weight of nothing.
                return torch.zeros(batch, self.kv_heads, capacity, self.head_dim, dtype=dtype, device=device)
            if spec.static and scale is None:
                raise ValueError("a static range of keys and values is asked for, and none has been set")
            return kv_rows(
                batch,
                self.kv_heads,
                capacity,
                self.head_dim,
                spec.bits,
                symmetric=spec.symmetric,
                scale=scale,
                zero=zero,
                dtype=torch.promote_types(dtype, torch.float32),
                device=device,
            )

        return rows(self.k_scale, self.k_zero), rows(self.v_scale, self.v_zero)

    @property
    def _clip(self) -> float:
        """A static range has been clipped when it was found."""
        return 1.0 if self.kv is None or self.kv.static else self.kv.clip

    def _show_codes(self, keys: Rows, values: Rows, start: int | Tensor, stop: int | Tensor) -> None:
        if self.code_observer is not None:
            assert isinstance(keys, PackedRows)
            assert isinstance(values, PackedRows)
            self.code_observer(keys, values, int(start), int(stop))


def attention_mask(
    length: int, start: int, real: Tensor | None, window: int | None, device: torch.device
) -> Tensor | None:
    """Which keys each of `length` queries after `start` cached positions may see: bool [B or 1, 1, T, S].

    None where plain causal attention (or a single query that sees everything) says the same. A padded
    query sees itself, which keeps its unused output finite.
    """
    total = start + length
    reach = total if window is None else window
    windowed = total > reach
    if real is None and not windowed and (start == 0 or length == 1):
        return None
    queries = torch.arange(start, total, device=device)[:, None]
    keys = torch.arange(total, device=device)[None, :]
    allowed = keys <= queries
    if real is None:
        if windowed:
            allowed = allowed & (queries - keys < reach)
        return allowed[None, None]
    if windowed:
        # Distance in real tokens, so that padding does not shorten the window.
        position = real.long().cumsum(-1)
        distance = position[:, start:, None] - position[:, None, :]
        allowed = allowed[None] & (distance < reach)
    else:
        allowed = allowed[None]
    allowed = allowed & real[:, None, :]
    return (allowed | (keys == queries)[None])[:, None]
