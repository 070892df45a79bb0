"""What a pass over a decoder must move and multiply at the least, and the bytes that a decoder and its KV
cache take: numbers that are counted, not measured."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.packing import packed_width
from kernels.timing import Work, nbytes, tensors
from methods.bits import KVSpec
from methods.decoder import Block, Decoder, DecoderConfig


def work(decoder: Decoder, tokens: int, past: int, cached_bytes: float, batch: int = 1) -> Work:
    """The least that a pass over `batch` sequences of `tokens` tokens behind `past` needs: weights and KV
    cache moved once, and the products of linears and attention, those of the head for the last token of each
    sequence; all else, activations and online transforms too, counts for nothing. cached_bytes: those of one
    position of one sequence in the cache of all layers."""
    config, float_type = decoder.config, decoder.dtype
    counts = {float_type: decoder.lm_head.weight.numel() * batch}
    total = nbytes(decoder.lm_head.weight)
    for _, linear in decoder.linears():
        integer = linear.packed is not None and linear.activation is not None
        dtype = torch.int8 if integer else float_type
        outputs, inputs = linear.shape
        counts[dtype] = counts.get(dtype, 0) + outputs * inputs * tokens * batch
        total += nbytes(linear.weight, linear.packed, linear.kept)
    for extra, times in ((decoder.embed_in, tokens), (decoder.embed_out, 1)):
        if extra is not None:
            counts[float_type] += extra.weight.numel() * times * batch
            total += nbytes(extra.weight)
    for block in decoder.layers:
        assert isinstance(block, Block)
        window = block.self_attn.window or past + tokens
        pairs = sum(min(window, past + position + 1) for position in range(tokens))
        counts[float_type] += 2 * config.heads * config.head_dim * pairs * batch
        total += round(min(window, past + tokens) * cached_bytes * batch / config.layers)
    return Work(total, counts)


def decoder_bytes(decoder: Decoder) -> int:
    """Bytes of all that a decoder holds, each tensor once: weights, codes, scales, embedding, norms. Of one
    without storage, those that it would hold."""
    held: list[Tensor] = [*decoder.parameters(), *decoder.buffers()]
    for _, linear in decoder.linears():
        held += tensors(linear.packed)
    return sum({id(tensor): tensor.nbytes for tensor in held}.values())


def kv_bytes(config: DecoderConfig, kv: KVSpec | None, dtype: torch.dtype) -> int:
    """Bytes of one position of one sequence in the KV cache of all layers: a row each of keys and values in
    every KV head. kv: None for rows in `dtype`. A packed row has its codes and, dynamic, a scale of four
    bytes (eight of a float64 model) and, asymmetric, a zero-point of one; static, a flag of one."""
    if kv is None:
        row = config.head_dim * dtype.itemsize
    else:
        row = packed_width(config.head_dim, kv.bits)
        row += 1 if kv.static else max(4, dtype.itemsize) + (not kv.symmetric)
    return 2 * config.layers * config.kv_heads * row
