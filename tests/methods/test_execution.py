"""Int4 execution against the simulated decoder, in float64, where the order of sums flips no code."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels import ops
from methods.bits import Bits, LinearSpec
from methods.checkpoint import Checkpoint
from methods.decoder import Decoder
from methods.errors import UserError
from methods.execution import pack_decoder
from methods.footprint import effective_bits, memory, model_bits
from methods.generate import generate
from methods.method import Context
from methods.pipeline import Quantised, quantise
from methods.registry import parse_method
from tests import families
from tests.families import relative
from tests.methods.small_checkpoint import planned, run, save

IDS = families.tokens(2, 21, seed=41)
LEFT_PADDED = torch.arange(21) >= torch.tensor([[0], [6]])

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "w4a4kv4": ("w4a4kv4", {}),
    "w4a8kv8": ("w4a8kv8", {}),
    "3-bit weights in groups": ("w3a16g8", {}),
    "2-bit keys": ("w8a8kv2", {}),
    "asymmetric everywhere": ("w4a4kv4", {"activation_symmetric": False, "weight_symmetric": False}),
    "symmetric keys": ("w5a6kv3", {"kv_symmetric": True}),
    "groups of both": ("w4a4kv4g16", {"activation_group": 8}),
    "static ranges": ("w4a8kv8", {"activation_static": True, "kv_static": True}),
    "static, asymmetric": (
        "w4a8kv4",
        {"activation_static": True, "kv_static": True, "activation_symmetric": False},
    ),
    "weights stay": ("w16a8kv4", {}),
    "cache alone": ("w16a16kv4", {}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {name: save(tmp_path_factory.mktemp(name), name) for name in families.SMALL}


def twins(checkpoint: Checkpoint, method: str, bits: str, **settings: Any) -> tuple[Decoder, Decoder]:
    """The same quantised model, simulated and packed, in float64."""
    simulated = run(checkpoint, method, bits, dtype=torch.float64, **settings).decoder
    packed = run(checkpoint, method, bits, dtype=torch.float64, execution="int4", **settings).decoder
    return simulated, packed


def cached(decoder: Decoder, steps: tuple[int, ...], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of IDS, read in parts through a cache."""
    cache, parts, start = decoder.new_cache(), [], 0
    for step in steps:
        seen = None if mask is None else mask[:, : start + step]
        parts.append(decoder(IDS[:, start : start + step], mask=seen, cache=cache))
        start += step
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", families.SMALL)
def test_every_family_computes_what_was_simulated(checkpoints: dict[str, Checkpoint], name: str) -> None:
    simulated, packed = twins(checkpoints[name], "quarot:rounding=rtn", "w4a4kv4")
    assert relative(packed(IDS), simulated(IDS)) < 1e-9
    expected = simulated(IDS, mask=LEFT_PADDED)[LEFT_PADDED]
    assert relative(packed(IDS, mask=LEFT_PADDED)[LEFT_PADDED], expected) < 1e-9
    assert relative(cached(packed, (8, 1, 1, 11), LEFT_PADDED)[LEFT_PADDED], expected) < 1e-9


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_quantiser_computes_what_was_simulated(
    checkpoints: dict[str, Checkpoint], setting: str
) -> None:
    bits, settings = SETTINGS[setting]
    simulated, packed = twins(checkpoints["llama-biases"], "rtn", bits, **settings)
    assert relative(packed(IDS), simulated(IDS)) < 1e-9
    assert relative(cached(packed, (5, 1, 1, 14)), packed(IDS)) < 1e-9


def test_weight_only_is_equal_to_the_last_bit(checkpoints: dict[str, Checkpoint]) -> None:
    for bits in ("w4a16", "w3a16g16"):
        simulated = run(checkpoints["llama3-scaled-rope"], "rtn", bits).decoder
        packed = run(checkpoints["llama3-scaled-rope"], "rtn", bits, execution="int4").decoder
        assert torch.equal(packed(IDS), simulated(IDS))


@pytest.mark.parametrize("keep", [8, 13])
@pytest.mark.parametrize("bits", ["w4a4kv4", "w4a16"])
def test_kept_columns_stay_in_full_precision(
    checkpoints: dict[str, Checkpoint], keep: int, bits: str
) -> None:
    def change(_: str, spec: LinearSpec) -> LinearSpec:
        return dataclasses.replace(spec, keep=keep)

    simulated = planned(checkpoints["llama-biases"], bits, change).decoder
    before = {name: linear.weight[:, :keep].clone() for name, linear in simulated.linears()}
    packed = copy.deepcopy(simulated)
    pack_decoder(packed)
    for name, linear in packed.linears():
        assert linear.kept is not None
        assert torch.equal(linear.kept, before[name])
        assert linear.shape == dict(simulated.linears())[name].shape
        assert linear.weight.numel() == 0
    # float32 and a deep model of random weights: codes may flip, so compare what one block makes of one input
    state = simulated.embed(IDS)
    want = simulated.through(simulated.layers[0], state).stream  # type: ignore[arg-type]
    got = packed.through(packed.layers[0], state).stream  # type: ignore[arg-type]
    assert relative(got, want) < 1e-2 if bits == "w4a4kv4" else torch.equal(got, want)


def test_residual_scaling_is_the_same_in_both(checkpoints: dict[str, Checkpoint]) -> None:
    simulated, packed = twins(checkpoints["llama-biases"], "rtn", "w4a8kv8")
    for decoder in (simulated, packed):
        decoder.residual_scaling = True
    assert relative(packed(IDS), simulated(IDS)) < 1e-9


def test_the_cache_is_truncated_copied_and_grown(checkpoints: dict[str, Checkpoint]) -> None:
    _, packed = twins(checkpoints["llama-biases"], "rtn", "w4a4kv4")
    whole = packed(IDS)
    cache = packed.new_cache()
    packed(IDS[:, :9], cache=cache)
    held = cache.nbytes
    copied = cache.clone(room=3)
    packed(IDS.flip(1)[:, :5], cache=cache)  # another continuation, which outgrows the room
    assert cache.nbytes > held
    assert copied.length == 9
    assert relative(packed(IDS[:, 9:], cache=copied), whole[:, 9:]) < 1e-9
    cache.truncate(9)
    assert relative(packed(IDS[:, 9:], cache=cache), whole[:, 9:]) < 1e-9


def test_generation_goes_through_the_packed_cache(checkpoints: dict[str, Checkpoint]) -> None:
    simulated, packed = twins(checkpoints["llama3-scaled-rope"], "quarot:rounding=rtn", "w4a4kv4")
    options: dict[str, Any] = {"max_new_tokens": 12, "mask": LEFT_PADDED}
    ops.reset_implementations()
    assert generate(packed, IDS, **options) == generate(simulated, IDS, **options)
    ran = ops.implementations()
    blocks, steps = len(packed.layers), 12
    assert ran["kv_attention kv4"] == {"reference": blocks * steps}
    assert ran["rope_append kv4"] == {"reference": blocks * steps}
    assert sum(ran["linear w4a4"].values()) == 7 * blocks * steps
    assert ran["rmsnorm_quantise a4"] == {"reference": 2 * blocks * steps}
    assert ran["hadamard_quantise a4"] == {"reference": blocks * steps}, (
        "down_proj; six heads: none before o_proj"
    )
    assert ran["quantise a4"] == {"reference": blocks * steps}


def test_a_packed_model_is_copied_and_moved_whole(checkpoints: dict[str, Checkpoint]) -> None:
    packed = run(checkpoints["llama-biases"], "rtn", "w4a8kv8", execution="int4").decoder
    other = copy.deepcopy(packed).to("cpu").to(torch.float32)
    assert torch.equal(other(IDS), packed(IDS))
    moved = copy.deepcopy(packed).to("meta")
    for _, linear in moved.linears():
        assert linear.packed is not None
        assert {linear.packed.packed.device.type, linear.packed.scale.device.type} == {"meta"}


def test_codes_are_seen_as_they_ran(checkpoints: dict[str, Checkpoint]) -> None:
    packed = run(checkpoints["llama-biases"], "rtn", "w4a4kv4", execution="int4").decoder
    seen: dict[str, list[Any]] = {}
    for name, linear in packed.linears():
        linear.code_observer = seen.setdefault(name, []).append
    rows: list[tuple[int, int]] = []
    for block in packed.layers:
        block.self_attn.code_observer = lambda keys, values, *span: rows.append(span)  # type: ignore[union-attr]
    packed(IDS)
    # q, k and v read the same codes, which are made once and shown by the first; gate and up likewise.
    readers = ("q_proj", "o_proj", "gate_proj", "down_proj")
    assert {name: len(codes) for name, codes in seen.items()} == {
        name: int(name.endswith(readers)) for name in seen
    }
    assert all(int(codes[0].codes.abs().max()) <= 8 for codes in seen.values() if codes)
    assert rows == [(0, 21)] * len(packed.layers)


@pytest.mark.parametrize("bits", ["w4a4kv4", "w3a16g8", "w8a8kv8", "w16a16kv4", "w16a16"])
def test_measured_memory_is_what_the_layout_says(checkpoints: dict[str, Checkpoint], bits: str) -> None:
    checkpoint = checkpoints["llama3-scaled-rope"]
    method = "float" if bits == "w16a16" else "rtn"
    result = run(checkpoint, method, bits, execution="int4")
    parsed = Bits.parse(bits)
    shapes = [linear.shape for _, linear in result.decoder.linears()]
    if parsed.quantises_weights:
        values = sum(out * inputs for out, inputs in shapes)
        scales = sum(out * (inputs // parsed.group if parsed.group else 1) for out, inputs in shapes)
        per_scale = 4 if parsed.quantises_activations else 8  # weight-only is asymmetric
        expected = values * parsed.weight / 8 + scales * per_scale
    else:
        expected = sum(out * inputs for out, inputs in shapes) * 4
    found = memory(result.decoder, result.plan)
    assert found.linears.measured == expected
    config = result.decoder.config
    heads = 2 * config.layers * config.kv_heads
    row = config.head_dim * parsed.kv / 8 + 5 if parsed.quantises_kv else config.head_dim * 4
    assert found.kv_token.measured == heads * row  # 5: a float32 scale and a zero-point of a byte
    computed = effective_bits(result.decoder, result.plan)["kv"] / 8
    assert found.kv_token.computed == heads * config.head_dim * computed
    assert found.linears.computed + found.rest.computed == model_bits(result.decoder, result.plan) / 8
    others = result.decoder.embed_tokens.numel() + result.decoder.lm_head.weight.numel()
    norms = sum(p.numel() for name, p in result.decoder.named_parameters() if "norm" in name)
    assert found.rest.measured == 4 * (others + norms)


@pytest.mark.parametrize("method", ["rtn", "quad:rank=2;rounding=rtn"])
def test_memory_does_not_depend_on_the_execution_where_it_is_computed(
    checkpoints: dict[str, Checkpoint], method: str
) -> None:
    found = [
        memory(result.decoder, result.plan)
        for execution in ("simulate", "int4")
        for result in [run(checkpoints["llama-biases"], method, "w4a4kv4", execution=execution)]
    ]
    assert found[0].packed == found[1].packed == found[1].linears.measured
    for part in ("linears", "rest", "kv_token"):
        assert getattr(found[0], part).computed == getattr(found[1], part).computed
    assert found[0].linears.measured > 8 * found[1].linears.measured
    assert found[0].rest == found[1].rest


def test_weights_of_16_bits_are_named(checkpoints: dict[str, Checkpoint]) -> None:
    result = run(checkpoints["llama-biases"], "rtn", "w16a8", execution="int4")
    assert any("14 linears have 16-bit weights" in note for note in result.notes)
    clean: Callable[[str], Quantised] = lambda bits: run(  # noqa: E731
        checkpoints["llama-biases"], "rtn", bits, execution="int4"
    )
    assert clean("w4a8").notes == clean("w4a16").notes == clean("w16a16kv4").notes == []


def test_unknown_execution(checkpoints: dict[str, Checkpoint]) -> None:
    with pytest.raises(UserError, match="execution 'int5': choose one of simulate, int4"):
        quantise(
            checkpoints["llama-biases"],
            parse_method("rtn"),
            Bits.parse("w4a4"),
            Context(),
            execution="int5",
        )
