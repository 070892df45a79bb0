"""Do the executions of one quantised model agree in bfloat16 or float16, where no two codes need be equal?

Half precision rounds every activation to 8 or 11 bits before a quantiser sees it, so the two executions,
which round at other places, hand it other numbers, and codes near a tie differ; equality, as in
harness/agreement.py, means nothing there. What both mean to compute is known, though: the simulated decoder
in float64, on the very weights that the codes stand for. Each execution has an error against it, and that of
the int4 execution may be `FACTOR` times that of the simulation in the same dtype:

* of what attention and MLP of each layer add to the stream, all given one state, so that no difference is
  amplified from layer to layer;
* of the logits, each running free; and of the int4 execution's logits through its KV cache, token by token.

Errors are root mean squares over tokens, relative to the size of what is compared. Both executions round the
same numbers equally often or, in int4, less often (integer sums are exact, weights are not rounded to the
dtype), so their errors are of one size; twice leaves room for the chance in which codes tip over, and for
nothing that has gone wrong: a wrong scale or zero-point, or a lost bias, moves what a half-layer adds by far
more than half precision does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from methods.decoder import MLP, Attention, Block, Decoder, RMSNorm, State, attention_mask
from methods.graphs import Decoding

Half = tuple[RMSNorm, Attention | MLP]

FACTOR = 2.0
"""Largest error of the int4 execution as a multiple of the simulation's."""


@torch.no_grad()
def faults(simulated: Decoder, packed: Decoder, ids: Tensor) -> list[str]:
    """What is wrong, a line each, on token ids [B, T], T at least 2; empty where nothing is. Both decoders
    are of one quantised model, in one half-precision dtype; the packed one may have merged projections."""
    exact = exact_twin(simulated)
    allowed, found = errors(exact, simulated, ids), errors(exact, packed, ids)
    allowed["logits through the cache"] = allowed["logits"]
    found["logits through the cache"] = _relative(_stepped(packed, ids), exact(ids))
    return [
        f"{name}: an error of {found[name]:.2g}, more than {FACTOR:g} times the simulation's {limit:.2g}"
        for name, limit in allowed.items()
        if not found[name] <= FACTOR * limit
    ]


def exact_twin(simulated: Decoder) -> Decoder:
    """The same decoder in float64, its rounded weights those that the codes stand for."""
    exact = copy.deepcopy(simulated).to(torch.float64)
    for (_, linear), (_, given) in zip(exact.linears(), simulated.linears(), strict=True):
        codes = given.quantised
        if codes is None:
            continue
        codes = codes.to(linear.weight.device)
        zero = None if codes.zero is None else codes.zero.double()
        weight = type(codes)(codes.codes, codes.scale.double(), zero, codes.spec).dequantise()
        linear.set_weight(torch.cat((linear.weight[:, : linear.keep], weight), dim=1))
    return exact


@torch.no_grad()
def errors(exact: Decoder, decoder: Decoder, ids: Tensor) -> dict[str, float]:
    """By name, the error of what each half-layer adds, given the state that `exact` has there, and of the
    logits of ids [B, T]."""
    found = {}
    state = exact.embed(ids)
    for (name, half), (_, twin) in zip(_halves(exact), _halves(decoder), strict=True):
        rounded = state.stream.to(decoder.dtype)
        scale = state.scale
        narrow = None if scale is None else scale.to(torch.promote_types(decoder.dtype, torch.float32))
        got = _half(decoder, twin, State(rounded, narrow))
        want = _half(exact, half, State(rounded.double(), None if narrow is None else narrow.double()))
        found[name] = _relative(_added(got), _added(want))
        state = _half(exact, half, state)
    found["logits"] = _relative(decoder(ids), exact(ids))
    return found


def _halves(decoder: Decoder) -> Iterator[tuple[str, Half]]:
    for index, block in enumerate(decoder.layers):
        assert isinstance(block, Block)
        yield f"layers.{index}.self_attn", (block.input_layernorm, block.self_attn)
        yield f"layers.{index}.mlp", (block.post_attention_layernorm, block.mlp)


def _half(decoder: Decoder, norm_and_branch: Half, state: State) -> State:
    """The state behind half a layer, for whole sequences."""
    norm, branch = norm_and_branch
    if not isinstance(branch, Attention):
        return state.step(norm, branch)
    length, device = state.base.shape[1], state.base.device
    mask = attention_mask(length, 0, None, branch.window, device)
    return state.step(norm, branch, decoder.angles(torch.arange(length, device=device)[None]), mask, None)


def _added(state: State) -> Tensor:
    assert state.branch is not None
    return state.branch


def _stepped(decoder: Decoder, ids: Tensor) -> Tensor:
    """Logits of ids [B, T], all but the first token read one by one."""
    decoding = Decoding(decoder, *ids.shape)
    parts = [decoding.prefill(ids[:, :1])]
    parts += [decoding.step(ids[:, place]).clone() for place in range(1, ids.shape[1])]
    return torch.stack(parts, dim=1)


def _relative(got: Tensor, want: Tensor) -> float:
    """Root mean square over tokens of |got - want| as a share of that of |want|; NaN where one is NaN."""
    return float((got.double() - want).norm() / want.norm())
