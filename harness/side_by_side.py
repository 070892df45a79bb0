"""A simulated decoder and its packed twin, compared weight by weight, layer by layer, then as a whole.

* Weights: the packed codes, scales and zero-points are those that rounding gave, and stand for the very
  weights that the simulation multiplies.
* Inputs of linears, keys and values: attention and MLP of each layer are run by both executions on the state
  that the simulation has there, and attention on the simulation's keys and values, so that a code that
  differs is not counted again in all that depends on it. The simulation's codes are
  `kernels.reference.quantise` of what its quantisers were given. Those of the int4 execution are the ones
  that its operations ran on; none is computed again.
* Outputs of these halves.
* Decode: the same halves through a KV cache, prefilled and then extended in steps.
* Running free: log-perplexity of both, each on its own states, and greedy generation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from harness import execution, perplexity, stats
from harness.agreement import (
    Agreement,
    Codes,
    Handed,
    Output,
    Running,
    compare_codes,
    differing_tokens,
)
from harness.perplexity import Windows
from harness.stats import Row
from kernels import ops
from kernels.kv_reference import PackedRows, kv_append
from kernels.packing import unpack
from kernels.reference import Quantised, dequantise_weight, quantise
from methods.cache import KVCache
from methods.decoder import Attention, Block, Decoder, State, attention_mask
from methods.generate import generate
from methods.linear import Linear
from methods.rounding import SITES

STEPS = (1, 1, 3, 1, 2)
"""Tokens at a time behind the prefill of the decode check."""
HALVES = ("self_attn", "mlp")
CACHE = ("keys", "values")


@torch.no_grad()
def compare(
    simulated: Decoder, packed: Decoder, windows: Windows, *, few: int | None = None, new_tokens: int = 8
) -> Agreement:
    """Compare the two executions of one quantised model.

    windows: all are scored by both decoders; but where the log-perplexities of the first `few` agree, only
    those. The first window, of more than `sum(STEPS)` tokens, goes through the layers side by side, and
    `new_tokens` tokens are generated behind its first half.
    """
    missing = [] if packed.execution == "int4" else [f"the decoder's execution is {packed.execution!r}"]
    weights = _weights(simulated, packed, missing)
    ops.reset_implementations()
    layers = _layers(simulated, packed, windows.tokens[:1].to(simulated.device))
    running = _running(simulated, packed, windows, len(windows) if few is None else few)
    prompt = windows.tokens[:1, : max(1, windows.length // 2)].to(simulated.device)
    first, second = (generate(model, prompt, max_new_tokens=new_tokens)[0] for model in (simulated, packed))
    return Agreement(
        weights,
        tuple(layers.inputs),
        tuple(layers.cache),
        tuple(layers.outputs),
        layers.decode,
        tuple(layers.stepped),
        running,
        (len(first), _common(first, second)),
        layers.handed,
        (*missing, *layers.missing),
        execution.implementations(),
    )


def _weights(simulated: Decoder, packed: Decoder, missing: list[str]) -> tuple[Codes, ...]:
    """Of every rounded linear: codes; where scales, zero-points, kept columns or the weights that the codes
    stand for differ, the difference of scales is infinite."""
    found = []
    for (name, linear), (_, twin) in zip(simulated.linears(), packed.linears(), strict=True):
        rounded, form = linear.quantised, twin.packed
        if rounded is None or form is None:
            if rounded is not None or form is not None:
                missing.append(f"{name}: {'rounded, not packed' if form is None else 'packed, not rounded'}")
            elif not torch.equal(linear.weight, twin.weight):
                missing.append(f"{name}: not rounded, and the weights differ")
            continue
        codes = unpack(form.packed, form.bits, form.inputs, signed=form.signed)
        if codes.shape != rounded.codes.shape:
            missing.append(f"{name}: weight codes {list(codes.shape)}, not {list(rounded.codes.shape)}")
            continue
        apart = (codes.short() - rounded.codes.to(codes.device).short()).abs()
        keep = linear.keep
        equal = (
            _same(dequantise_weight(form).to(linear.weight.dtype), linear.weight[:, keep:])
            and _same(twin.kept, linear.weight[:, :keep] if keep else None)
            and _same(form.scale, rounded.scale)
            and _same(form.zero, rounded.zero)
        )
        unequal, largest = int((apart != 0).sum()), int(apart.max())
        found.append(Codes(f"{name} weight", apart.numel(), unequal, largest, 0.0 if equal else math.inf))
    return tuple(found)


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two tensors are equal, wherever they lie: a rounded weight stays at home."""
    if first is None or second is None:
        return first is second
    return torch.equal(first, second.to(first.device))


@dataclass
class _Layers:
    """What all layers have shown."""

    inputs: list[Codes] = field(default_factory=list)
    cache: list[Codes] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    decode: Codes = field(default_factory=lambda: Codes("all codes through the cache"))
    stepped: list[Output] = field(default_factory=list)
    handed: Handed = field(default_factory=Handed)
    missing: list[str] = field(default_factory=list)


def _layers(simulated: Decoder, packed: Decoder, ids: Tensor) -> _Layers:
    """Pass a window [1, T] through the simulated half-layers, and the state before each through its twin."""
    found = _Layers()
    state = simulated.embed(ids)
    for index in range(simulated.config.layers):
        block, twin, stem = _block(simulated, index), _block(packed, index), f"layers.{index}"
        seen: set[str] = set()
        for half in HALVES:
            with _quantised_values(block) as given:
                after = _run(simulated, index, half, state)
            wanted = {name: _simulated_codes(block, name, x) for name, x in given.items()}
            with _packed_codes(twin, given, wanted) as ran:
                got = _run(packed, index, half, state)
            with _packed_codes(twin, given, wanted) as again:
                stepped = _run_in_steps(packed, index, half, state)
            cache = Codes(f"{stem} keys and values")
            for name, codes in ran.items():
                if name not in given:
                    found.missing.append(f"{stem}.{name}: quantised in the int4 execution alone")
                    continue
                compared = compare_codes(f"{stem}.{name} input", wanted[name], codes)
                if name in CACHE:
                    cache = cache.joined(compared)
                else:
                    found.inputs.append(compared)
                if name in _behind_norms(twin):
                    for taken in (codes, again[name]):
                        found.handed = found.handed.joined(_handed(wanted[name], taken))
                found.decode = found.decode.joined(compare_codes(name, codes, again[name]))
            found.cache += [cache] if cache.n else []
            found.outputs.append(_output(f"{stem}.{half} output", state, after, got))
            found.stepped.append(_output(f"{stem}.{half} output through the cache", state, got, stepped))
            seen |= ran.keys()
            state = after
        found.missing += [f"{stem}.{name}" for name in _unseen(block, twin, seen)]
    if not torch.equal(simulated.states(ids).stream.nan_to_num(), state.stream.nan_to_num()):
        found.missing.append(
            "the halves of the layers, one behind the other, are not what the decoder computes"
        )
    return found


def _block(decoder: Decoder, index: int) -> Block:
    block = decoder.layers[index]
    assert isinstance(block, Block)
    return block


def _run(
    decoder: Decoder, index: int, half: str, state: State, start: int = 0, cache: KVCache | None = None
) -> State:
    """The state [1, T, hidden] behind one half of a layer, as `Block.forward` in `Decoder.states` computes it
    without padding; `start` positions lie in the cache."""
    block, length, device = _block(decoder, index), state.stream.shape[1], state.stream.device
    if half == "mlp":
        return state.step(block.post_attention_layernorm, block.mlp)
    mask = attention_mask(length, start, None, block.self_attn.window, device)
    positions = torch.arange(start, start + length, device=device)[None]
    return state.step(block.input_layernorm, block.self_attn, decoder.angles(positions), mask, cache)


def _run_in_steps(decoder: Decoder, index: int, half: str, state: State) -> State:
    """The same through a cache: most positions at once, the last in `STEPS`."""
    cache, start, parts = decoder.new_cache(), 0, []
    for step in (state.stream.shape[1] - sum(STEPS), *STEPS):
        parts.append(_run(decoder, index, half, state[:, start : start + step], start, cache))
        start += step
    scales = [part.scale for part in parts if part.scale is not None]
    return State(torch.cat([part.stream for part in parts], 1), torch.cat(scales, 1) if scales else None)


def _output(name: str, before: State, first: State, second: State) -> Output:
    """Two states behind half a layer, against what it adds to the state before it."""
    added = (first.stream - before.stream).double().nan_to_num()
    apart = (second.stream - first.stream).double()
    apart = apart.masked_fill(first.stream.isnan() & second.stream.isnan(), 0.0)
    rows = apart.norm(dim=-1) / added.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
    return Output(name, float(rows.square().mean().sqrt()))


@contextmanager
def _quantised_values(block: Block) -> Iterator[dict[str, Tensor]]:
    """What the quantisers of a simulated layer are given while the context is open: linear inputs, by the
    name of the linear, and keys and values [1, H, T, D]."""
    given: dict[str, Tensor] = {}
    attention = block.self_attn
    linears = {name: linear for name, linear in block.linears() if linear.activation is not None}
    for name, linear in linears.items():
        linear.observer = partial(given.__setitem__, name)
    if attention.kv is not None:
        attention.kv_observer = lambda *values: given.update(zip(CACHE, values, strict=True))
    try:
        yield given
    finally:
        attention.kv_observer = None
        for linear in linears.values():
            linear.observer = None


def _simulated_codes(block: Block, name: str, x: Tensor) -> Quantised:
    """The codes that the simulation's floats stand for, by the arguments of its fake quantisers."""
    if name not in CACHE:
        linear = dict(block.linears())[name]
        return quantise(x[..., linear.keep :], **linear.input_quantiser())
    attention, spec = block.self_attn, block.self_attn.kv
    assert spec is not None
    scale, zero = (
        (attention.k_scale, attention.k_zero) if name == "keys" else (attention.v_scale, attention.v_zero)
    )
    return quantise(x, spec.bits, symmetric=spec.symmetric, clip=_clip(attention), scale=scale, zero=zero)


def _clip(attention: Attention) -> float:
    """A static range has been clipped when it was found."""
    return 1.0 if attention.kv is None or attention.kv.static else attention.kv.clip


def _behind_norms(block: Block) -> dict[str, Linear]:
    """The linears that read the normalised stream: another quantiser of their half stands behind them."""
    readers = (*block.self_attn.readers, *block.mlp.readers)
    return {name: linear for name, linear in block.linears() if any(linear is reader for reader in readers)}


def _handed(wanted: Quantised, codes: Quantised) -> Handed:
    """What `_hand_over` has to do."""
    if not _alike(wanted, codes):
        return Handed()  # a fault of the codes themselves
    tokens, compared = differing_tokens(wanted, codes), compare_codes("", wanted, codes)
    return Handed(int(tokens.sum()), tokens.numel(), compared.unequal, compared.n)


def _hand_over(codes: Quantised, wanted: Quantised, static: bool) -> None:
    """Put the wanted codes [..., T, n] in the place of those of the tokens of which any differs."""
    tokens = differing_tokens(wanted, codes)
    codes.codes[tokens] = wanted.codes[tokens]
    if not static:  # a static range is one number, and the same in both
        codes.scale[tokens] = wanted.scale[tokens]
        if codes.zero is not None and wanted.zero is not None:
            codes.zero[tokens] = wanted.zero[tokens]


def _alike(first: Quantised, second: Quantised) -> bool:
    """Whether two hold codes of one form, so that one's can stand in the place of the other's."""
    forms = ((q.codes.shape, q.codes.dtype, q.scale.shape, q.zero is None) for q in (first, second))
    return len(set(forms)) == 1


def _tokens(q: Quantised, start: int, stop: int) -> Quantised:
    """The tokens start:stop of codes [..., T, n]."""
    zero = None if q.zero is None else q.zero[..., start:stop, :]
    return replace(q, codes=q.codes[..., start:stop, :], scale=q.scale[..., start:stop, :], zero=zero)


@contextmanager
def _packed_codes(
    block: Block, given: Mapping[str, Tensor], wanted: Mapping[str, Quantised]
) -> Iterator[dict[str, Quantised]]:
    """The codes that a packed layer makes while the context is open, joined along the tokens: of linear
    inputs, by the name of the first linear that reads them, and of keys and values. Keys and values are then
    written anew, from what the simulation was `given`; behind a norm, a token whose codes are not those
    `wanted` gets these."""
    parts: dict[str, list[Quantised]] = {}
    behind = _behind_norms(block)

    def keep(name: str, codes: Quantised) -> None:
        parts.setdefault(name, []).append(codes)

    def keep_input(name: str, codes: Quantised) -> None:
        start = sum(part.codes.shape[-2] for part in parts.get(name, ()))
        if name not in behind or name not in wanted:
            keep(name, codes)
            return
        zero = None if codes.zero is None else codes.zero.clone()
        keep(name, replace(codes, codes=codes.codes.clone(), scale=codes.scale.clone(), zero=zero))
        part = _tokens(wanted[name], start, start + codes.codes.shape[-2])
        activation = behind[name].activation
        assert activation is not None
        if _alike(part, codes):
            _hand_over(codes, part, activation.static)

    def keep_rows(keys: PackedRows, values: PackedRows, start: int, stop: int) -> None:
        for name, rows in zip(CACHE, (keys, values), strict=True):
            keep(name, _unpacked(rows, start, stop))
            if name in given:
                kv_append(rows, given[name][:, :, start:stop], start, clip=_clip(block.self_attn))

    for name, linear in block.linears():
        linear.code_observer = partial(keep_input, name)
    block.self_attn.code_observer = keep_rows
    codes: dict[str, Quantised] = {}
    try:
        yield codes
    finally:
        block.self_attn.code_observer = None
        for _, linear in block.linears():
            linear.code_observer = None
    codes |= {name: _joined(several) for name, several in parts.items()}


def _unpacked(rows: PackedRows, start: int, stop: int) -> Quantised:
    """The positions start:stop of packed keys or values as codes [B, H, T, D] with a scale for each row."""

    def each_row(part: Tensor) -> Tensor:
        return part[:, :, start:stop, None].clone() if part.dim() else part.expand(*codes.shape[:-1], 1)

    codes = unpack(rows.codes[:, :, start:stop], rows.bits, rows.width, signed=rows.zero is None)
    scale = each_row(rows.scale)
    if rows.poisoned is not None:
        scale = scale.masked_fill(each_row(rows.poisoned), math.nan)
    return Quantised(codes, scale, None if rows.zero is None else each_row(rows.zero), None, rows.bits)


def _joined(parts: Sequence[Quantised]) -> Quantised:
    """Codes of consecutive tokens [..., T, n] as one tensor."""
    zeros = [part.zero for part in parts if part.zero is not None]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts], -2),
        scale=torch.cat([part.scale for part in parts], -2),
        zero=torch.cat(zeros, -2) if zeros else None,
    )


def _unseen(block: Block, twin: Block, seen: Collection[str]) -> list[str]:
    """What the simulated layer quantises and the packed one showed no codes of. Linears that quantise one
    input alike show it once; the inputs of unrounded linears stay in floating point."""
    linears, twins = dict(block.linears()), dict(twin.linears())
    found = []
    for site in SITES:
        for name in site:
            if linears[name].activation is None or linears[name].quantised is None or name in seen:
                continue
            if not any(other in seen and twins[name].shares_input_with(twins[other]) for other in site):
                found.append(f"{name}: its input was not quantised to codes")
    if block.self_attn.kv is not None:
        found += [f"{name}: not held as codes" for name in CACHE if name not in seen]
    return found


def _running(simulated: Decoder, packed: Decoder, windows: Windows, few: int) -> Running:
    """Log-perplexities over the first `few` windows; over all where those do not agree."""
    rows: list[Row] = []
    other: list[Row] = []
    for begin, end in ((0, few), (few, len(windows))):
        for model, into in ((simulated, rows), (packed, other)):
            into += [row.sample() for row in perplexity.score(model, windows, range(begin, end))]
        tokens = sum(row["tokens"] for row in rows)
        running = Running(
            math.fsum(row["nll"] for row in rows) / tokens,
            stats.paired_log_perplexity(rows, other),
            tokens,
            end,
            len({row["passage"] for row in rows}),
        )
        if end == len(windows) or running.fault() is None:
            break
    return running


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((place for place, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))
