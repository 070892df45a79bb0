"""Merged projections against the linears that they were made of.

Weights, codes and integer products are equal to the bit. Floating-point products of the CPU's library are
not, nor is its SiLU, which rounds differently where rows lie apart: whole decoders are compared in float64.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.reference import dequantise_weight
from methods.bits import LinearSpec
from methods.checkpoint import Checkpoint, from_transformers
from methods.decoder import Block, Decoder, parts_of
from methods.execution import merge_projections
from methods.footprint import effective_bits, memory, model_bits
from methods.graphs import Decoding
from methods.linear import Linear, project
from methods.packed_checkpoint import write_packed
from methods.pipeline import set_quantisers
from tests import families
from tests.methods.small_checkpoint import planned, run, save

IDS = families.tokens(2, 21, seed=41)
MASK = torch.arange(21) >= torch.tensor([[0], [6]])
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "w4a4kv4": ("w4a4kv4", {}),
    "w4a16 in groups": ("w4a16g8", {}),
    "asymmetric": ("w4a8kv8", {"activation_symmetric": False, "weight_symmetric": False}),
    "groups of both": ("w4a4g16", {"activation_group": 8}),
    "static ranges": ("w4a8kv8", {"activation_static": True, "kv_static": True}),
    "weights stay": ("w16a8kv4", {}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {name: save(tmp_path_factory.mktemp(name), name) for name in families.SMALL}


def packed(checkpoint: Checkpoint, method: str, bits: str, **settings: Any) -> Decoder:
    return run(checkpoint, method, bits, dtype=torch.float64, execution="int4", **settings).decoder


def merged(decoder: Decoder) -> Decoder:
    """A copy with everything merged."""
    other = copy.deepcopy(decoder)
    assert merge_projections(other) == []
    assert merge_projections(other) == [], "a second time there is nothing left to merge"
    assert other.merged
    assert not decoder.merged
    return other


def difference(one: Decoder, other: Decoder) -> float:
    """Of logits as a whole, padded, and through a cache; the largest."""
    caches = one.new_cache(), other.new_cache()
    mask = {"mask": MASK}
    passes: list[tuple[Tensor, dict[str, Any], dict[str, Any]]] = [
        (IDS, {}, {}),
        (IDS, mask, mask),
        (IDS[:, :9], {"cache": caches[0]}, {"cache": caches[1]}),
        (IDS[:, 9:10], {"cache": caches[0]}, {"cache": caches[1]}),
    ]
    return max(families.relative(other(ids, **second), one(ids, **first)) for ids, first, second in passes)


@pytest.mark.parametrize("name", families.NAMES)
def test_plain_decoders_of_every_family(name: str) -> None:
    decoder = from_transformers(families.model(name))
    assert difference(decoder, merged(decoder)) < 1e-12


@pytest.mark.parametrize("name", families.SMALL)
def test_packed_decoders_of_every_family(checkpoints: dict[str, Checkpoint], name: str) -> None:
    decoder = packed(checkpoints[name], "quarot:rounding=rtn", "w4a4kv4")
    assert difference(decoder, merged(decoder)) < 1e-9


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_quantiser(checkpoints: dict[str, Checkpoint], setting: str) -> None:
    bits, settings = SETTINGS[setting]
    decoder = packed(checkpoints["llama-biases"], "rtn", bits, **settings)
    other = merged(decoder)
    assert difference(decoder, other) < 1e-9
    for model in (decoder, other):
        model.residual_scaling = True
    assert difference(decoder, other) < 1e-9


@pytest.mark.parametrize("keep", [0, 8])
@pytest.mark.parametrize("name", ["llama-biases", "qwen3-qk-norm"])
@pytest.mark.parametrize("bits", ["w4a8", "w4a4g16", "w4a16g8", "w16a16kv4"])
def test_outputs_of_the_parts_stand_one_behind_the_other(
    checkpoints: dict[str, Checkpoint], bits: str, name: str, keep: int
) -> None:
    def change(_: str, spec: LinearSpec) -> LinearSpec:
        group = 8 if spec.group and keep else spec.group
        return dataclasses.replace(spec, keep=keep, group=group) if spec.bits < 16 else spec

    decoder = planned(checkpoints[name], bits, change, execution="int4").decoder
    exact = bits in ("w4a8", "w4a4g16")
    x = torch.randn(3, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for block, twin in zip(decoder.layers, merged(decoder).layers, strict=True):
        assert isinstance(block, Block)
        assert isinstance(twin, Block)
        for half, joined in ((block.self_attn, twin.self_attn), (block.mlp, twin.mlp)):
            want = torch.cat(project(x, half.readers), dim=-1)
            (got,) = project(x, joined.readers)
            assert len(half.readers) > 1
            assert torch.equal(got, want) if exact and not keep else families.relative(got, want) < 1e-6
            assert torch.equal(weight_of(joined.readers), weight_of(half.readers))


def weight_of(linears: Sequence[Linear]) -> Tensor:
    """The weights [out, in] that linears stand for, one below the other."""
    parts = []
    for linear in linears:
        weight = linear.weight if linear.packed is None else dequantise_weight(linear.packed)
        parts.append(weight if linear.kept is None else torch.cat((linear.kept, weight), dim=1))
    return torch.cat(parts)


def test_names_and_order() -> None:
    decoder = merged(from_transformers(families.model("llama-biases")))
    names = [name for name, _ in decoder.linears()]
    leaves = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert names[:4] == [f"layers.0.{leaf}" for leaf in leaves]
    assert parts_of(names[0]) == tuple(f"layers.0.self_attn.{part}_proj" for part in "qkv")
    assert parts_of(names[1]) == (names[1],)
    with pytest.raises(AttributeError, match="q_proj"):
        _ = decoder.layers[0].self_attn.q_proj  # type: ignore[union-attr]


def test_what_differs_stays_apart(checkpoints: dict[str, Checkpoint]) -> None:
    """One linear with other bits, a packed one beside plain ones, another clip ratio, groups across."""

    def apart(decoder: Decoder) -> str:
        twin = copy.deepcopy(decoder)
        (note,) = merge_projections(twin)
        assert twin.merged
        ids = IDS[:, :1]  # one token: nothing is amplified from layer to layer by attention
        assert families.relative(twin(ids), decoder(ids)) < 1e-2
        return note

    def wider(name: str, spec: LinearSpec) -> LinearSpec:
        return dataclasses.replace(spec, bits=8) if name.endswith("v_proj") else spec

    checkpoint = checkpoints["llama-biases"]
    note = apart(planned(checkpoint, "w4a4", wider, execution="int4").decoder)
    assert note == "layers 0, 1: not merged, q_proj and k_proj and v_proj: weights are quantised differently"

    def plain(name: str, spec: LinearSpec) -> LinearSpec:
        return dataclasses.replace(spec, bits=16) if name.endswith("0.mlp.up_proj") else spec

    note = apart(planned(checkpoint, "w4a16", plain, execution="int4").decoder)
    assert note == "layers 0: not merged, gate_proj and up_proj: inputs are quantised differently"

    def clipped(name: str, spec: LinearSpec) -> LinearSpec:
        if not name.endswith("k_proj") or spec.activation is None:
            return spec
        return dataclasses.replace(spec, activation=dataclasses.replace(spec.activation, clip=0.5))

    note = apart(planned(checkpoint, "w4a4", clipped, execution="int4").decoder)
    assert "inputs are quantised differently" in note

    decoder = run(checkpoint, "rtn", "w4a4").decoder
    notes = merge_projections(decoder)
    assert all("rounded weights are not packed" in note for note in notes)
    assert not decoder.merged

    decoder = from_transformers(families.model("llama-biases"))
    decoder.layers[1].self_attn.k_proj.observer = lambda _: None  # type: ignore[union-attr]
    assert merge_projections(decoder) == [
        "layers 1: not merged, q_proj and k_proj and v_proj: somebody watches an input"
    ]


@pytest.mark.parametrize("bits", ["w4a4kv4", "w3a16g8", "w16a16"])
def test_memory_is_that_of_the_parts(checkpoints: dict[str, Checkpoint], bits: str) -> None:
    method = "float" if bits == "w16a16" else "rtn"
    result = run(checkpoints["llama-biases"], method, bits, execution="int4")
    other = merged(result.decoder)
    assert memory(other, result.plan) == memory(result.decoder, result.plan)
    assert effective_bits(other, result.plan) == effective_bits(result.decoder, result.plan)
    assert model_bits(other, result.plan) == model_bits(result.decoder, result.plan)


def test_a_merged_decoder_is_not_written_and_not_planned(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    result = run(checkpoints["llama-biases"], "rtn", "w4a4kv4", execution="int4")
    other = merged(result.decoder)
    with pytest.raises(ValueError, match="projections are merged cannot be written"):
        write_packed(tmp_path / "packed", other, checkpoints["llama-biases"].folder, {})
    assert not (tmp_path / "packed").exists()
    with pytest.raises(ValueError, match="merged: set quantisers before"):
        set_quantisers(other, result.plan)


def test_steps_of_a_merged_decoder(checkpoints: dict[str, Checkpoint]) -> None:
    decoder = packed(checkpoints["qwen3-qk-norm"], "quarot:rounding=rtn", "w4a4kv4")

    def logits(model: Decoder) -> Tensor:
        decoding = Decoding(model, 2, 21)
        decoding.prefill(IDS[:, :12], MASK[:, :12])
        return torch.stack([decoding.step(IDS[:, place]) for place in range(12, 21)])

    assert families.relative(logits(merged(decoder)), logits(decoder)) < 1e-9
