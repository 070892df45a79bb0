"""The criterion for half precision holds where nothing is wrong, and says where something is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch

from methods.checkpoint import Checkpoint
from methods.decoder import Block, Decoder
from methods.execution import merge_projections, pack_decoder
from tests import families
from tests.half_precision import errors, exact_twin, faults
from tests.methods.small_checkpoint import run, save

IDS = families.tokens(2, 24, seed=3)
NAMES = ("llama-biases", "mistral-window", "qwen3-qk-norm")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {name: save(tmp_path_factory.mktemp(name), name) for name in NAMES}


def twins(checkpoint: Checkpoint, method: str, bits: str, dtype: torch.dtype) -> tuple[Decoder, Decoder]:
    simulated = run(checkpoint, method, bits, dtype=dtype).decoder
    packed = copy.deepcopy(simulated)
    pack_decoder(packed)
    return simulated, packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("method", "bits"),
    [
        ("rtn", "w4a16g8"),
        ("rtn", "w4a8kv8"),
        ("quarot:rounding=rtn", "w4a4kv4"),
        ("quad:rounding=rtn", "w4a4kv4"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_the_executions_agree(
    checkpoints: dict[str, Checkpoint], name: str, method: str, bits: str, dtype: torch.dtype
) -> None:
    simulated, packed = twins(checkpoints[name], method, bits, dtype)
    assert faults(simulated, packed, IDS) == []
    merge_projections(packed)
    assert faults(simulated, packed, IDS) == []


def test_the_exact_twin_multiplies_what_the_codes_stand_for(checkpoints: dict[str, Checkpoint]) -> None:
    """In float64 the int4 execution is the twin's equal, so its error is next to nothing."""
    simulated, packed = twins(checkpoints["llama-biases"], "rtn", "w4a8kv8", torch.bfloat16)
    exact = exact_twin(simulated)
    found = errors(exact, copy.deepcopy(packed).to(torch.float64), IDS)
    assert max(found.values()) < 1e-6
    assert min(errors(exact, simulated, IDS).values()) > 1e-4


def scale(decoder: Decoder) -> None:
    linear = dict(decoder.linears())["layers.1.mlp.up_proj"]
    assert linear.packed is not None
    linear.packed.scale.mul_(1.05)


def bias(decoder: Decoder) -> None:
    dict(decoder.linears())["layers.1.self_attn.o_proj"].bias = None


def codes(decoder: Decoder) -> None:
    """Nibbles change places."""
    linear = dict(decoder.linears())["layers.1.mlp.down_proj"]
    assert linear.packed is not None
    held = linear.packed.packed
    held.copy_((held << 4) | (held >> 4))


def clip(decoder: Decoder) -> None:
    block = decoder.layers[1]
    assert isinstance(block, Block)
    assert block.self_attn.kv is not None
    block.self_attn.kv = dataclasses.replace(block.self_attn.kv, clip=0.7)


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (scale, "layers.1.mlp"),
        (bias, "layers.1.self_attn"),
        (codes, "layers.1.mlp"),
        (clip, "layers.1.self_attn"),
    ],
)
def test_what_is_wrong_is_named(
    checkpoints: dict[str, Checkpoint], spoil: Callable[[Decoder], None], where: str
) -> None:
    simulated, packed = twins(checkpoints["llama-biases"], "rtn", "w4a8kv8", torch.bfloat16)
    spoil(packed)
    assert any(fault.startswith(f"{where}:") for fault in faults(simulated, packed, IDS))


def test_a_number_that_is_none_is_a_fault(checkpoints: dict[str, Checkpoint]) -> None:
    simulated, packed = twins(checkpoints["llama-biases"], "rtn", "w4a8kv8", torch.bfloat16)
    assert packed.norm.weight is not None
    packed.norm.weight.fill_(float("nan"))
    assert any(fault.startswith("logits:") for fault in faults(simulated, packed, IDS))
