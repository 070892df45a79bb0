"""What a quantised model takes: effective bits of its plan, and bytes, computed and measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.reference import PackedWeight
from methods.bits import LinearSpec
from methods.decoder import Decoder, parts_of
from methods.hqq import META_BITS, META_GROUP
from methods.linear import Linear, QuantisedWeight
from methods.method import Plan
from methods.transforms import WRITERS

MEASURED_TOKENS = 256


@dataclass(frozen=True)
class Bytes:
    """computed: what the bit-widths promise. measured: what is held."""

    computed: float
    measured: float


@dataclass(frozen=True)
class Memory:
    """Bytes of a decoder: the weights of its quantisable linears (codes, scales, zero-points, kept columns),
    all its other tensors, and the KV cache for each token of one sequence.

    Computed as `effective_bits` counts: b bits a code, 16 for a scale and for whatever is not quantised.
    Measured on the storages that the decoder and, after a prefill of 256 tokens (or of the model's positions,
    where those are fewer), its cache hold; the cache doubles its room when it grows. A simulated decoder
    holds floats, and codes of a byte each; `packed` is what its linears hold once they are packed, which each
    was to measure it, and of a packed decoder what they do hold.
    """

    linears: Bytes
    rest: Bytes
    kv_token: Bytes
    packed: float


@torch.no_grad()
def memory(model: Decoder, plan: Plan) -> Memory:
    """Memory of a decoder whose quantisers are set, in either execution."""
    named = dict(model.linears())
    in_linears = {name: linear_bits(linear, _spec(plan, name)) / 8 for name, linear in named.items()}
    weights = _storages(tensor for linear in named.values() for tensor in _weight_tensors(linear))
    everything = _storages((*model.parameters(), *model.buffers())) | weights
    linears = Bytes(sum(in_linears.values()), sum(weights.values()))
    rest = Bytes(model_bits(model, plan) / 8 - linears.computed, sum(everything.values()) - linears.measured)

    tokens = min(MEASURED_TOKENS, model.config.max_positions)
    cache = model.new_cache()
    ids = torch.arange(tokens, device=model.device)[None] % model.config.vocab_size
    model.states(ids, cache=cache)
    values = 2 * model.config.layers * model.config.kv_heads * model.config.head_dim
    kv_token = Bytes(effective_bits(model, plan)["kv"] / 8 * values, cache.nbytes / tokens)
    return Memory(linears, rest, kv_token, sum(_packed_bytes(linear) for linear in named.values()))


def _packed_bytes(linear: Linear) -> int:
    if linear.quantised is None:
        return sum(_storages(_weight_tensors(linear)).values())
    kept = linear.weight.element_size() * linear.shape[0] * linear.keep
    return kept + sum(_storages(_tensors(linear.packed_weight())).values())


def _weight_tensors(linear: Linear) -> Iterable[Tensor]:
    parts: list[Tensor | None] = [linear.weight, linear.kept]
    for codes in (linear.quantised, linear.packed):
        if codes is not None:
            parts += _tensors(codes)
    return (part for part in parts if part is not None)


def _tensors(codes: QuantisedWeight | PackedWeight) -> list[Tensor]:
    return [part for part in vars(codes).values() if isinstance(part, Tensor)]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of every distinct storage, by its address."""
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.numel())
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _spec(plan: Plan, name: str) -> LinearSpec:
    """Of a merged linear, that of its parts: only linears of one form are merged."""
    return plan.linears.get(parts_of(name)[0], LinearSpec(bits=16))


def effective_bits(model: Decoder, plan: Plan) -> dict[str, float]:
    """Bits per quantisable weight, activation and KV entry, scales, zero-points and kept columns counted
    (16 bits a scale; `bits` bits a weight zero-point, 16 where it is fractional, 16 a KV zero-point; 8 bits
    each and 32 for 128 of them where they are quantised). Where the residual stream has been widened, per
    weight and activation of the model as it was."""
    weight_bits = weights = activation_bits = inputs = 0.0
    for name, linear in model.linears():
        spec = _spec(plan, name)
        outputs, own = _narrow_shape(model, name, linear)
        weights += outputs * own
        weight_bits += linear_bits(linear, spec)
        readers, width = len(parts_of(name)), linear.shape[1]
        inputs += readers * own
        if spec.activation is None:
            activation_bits += readers * 16 * width
        else:
            quantised = width - spec.keep
            scales = quantised / (spec.activation.group or quantised)
            overhead = (
                0.0 if spec.activation.static else 16 * scales * (1 if spec.activation.symmetric else 2)
            )
            activation_bits += readers * (16 * spec.keep + spec.activation.bits * quantised + overhead)
    kv = 16.0
    if plan.kv is not None:
        per_head = 0 if plan.kv.static else 16 * (1 if plan.kv.symmetric else 2)
        kv = plan.kv.bits + per_head / model.config.head_dim
    return {"weight": weight_bits / weights, "activation": activation_bits / inputs, "kv": kv}


def _narrow_shape(model: Decoder, name: str, linear: Linear) -> tuple[int, int]:
    """(out, in) of a linear as it was before the residual stream was widened, if it was."""
    outputs, inputs = linear.shape
    extra = model.config.hidden_size - (model.config.norm_divisor or model.config.hidden_size)
    return (outputs - extra, inputs) if name.endswith(WRITERS) else (outputs, inputs - extra)


def model_bits(model: Decoder, plan: Plan) -> float:
    """Bits of all weights: quantised linears with their scales, everything else at 16 bits, the head's own
    copy of a tied embedding included where a transform has untied it."""
    linears = dict(model.linears())
    planned = sum(linear_bits(linear, _spec(plan, name)) for name, linear in linears.items())
    counted = {id(linear.weight) for linear in linears.values()}
    rest = sum(tensor.numel() for tensor in model.parameters() if id(tensor) not in counted)
    return planned + 16.0 * rest


def linear_bits(linear: Linear, spec: LinearSpec) -> float:
    """Bits of one linear's weight by its spec, 16 for a scale and for what is kept."""
    outputs, inputs = linear.shape
    if spec.bits >= 16:
        return 16.0 * outputs * inputs
    inputs -= spec.keep
    along, across = (inputs, outputs) if spec.axis == 1 else (outputs, inputs)
    groups = across * (along / (spec.group or along))
    if spec.meta:
        per_group = 2 * META_BITS + 32 / META_GROUP
    else:
        per_group = 16 + (0 if spec.symmetric else 16 if spec.fractional else spec.bits)
    return 16.0 * outputs * spec.keep + spec.bits * outputs * inputs + per_group * groups
