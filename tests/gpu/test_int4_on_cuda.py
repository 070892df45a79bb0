"""Int4 execution by the reference layer on a GPU: the same codes, exact integers and logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import ops
from kernels.integer import int_matmul
from kernels.reference import dequantise, linear, pack_weight, quantise
from methods.bits import Bits, QuantiserSettings
from methods.checkpoint import Checkpoint
from methods.execution import merge_projections, pack_decoder
from methods.footprint import memory
from methods.generate import generate
from methods.method import Context
from methods.pipeline import Quantised
from methods.pipeline import quantise as quantise_model
from methods.registry import parse_method
from tests import families
from tests.half_precision import faults
from tests.methods.small_checkpoint import CALIBRATION, save

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

IDS = families.tokens(2, 24, seed=3)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {name: save(tmp_path_factory.mktemp(name), name) for name in ("llama-biases", "mistral-window")}


def run(
    checkpoint: Checkpoint, method: str, bits: str, device: str, dtype: torch.dtype, **settings: Any
) -> Quantised:
    execution = settings.pop("execution", "int4")
    return quantise_model(
        checkpoint,
        parse_method(method),
        Bits.parse(bits),
        Context(torch.device(device)),
        settings=QuantiserSettings(**settings),
        calibration=CALIBRATION,
        dtype=dtype,
        execution=execution,
    )


def draw(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 0] *= 30
    return x


@pytest.mark.parametrize("m", [1, 16, 17, 40])
@pytest.mark.parametrize(("n", "k"), [(8, 64), (5, 33), (64, 515)])
@pytest.mark.parametrize(("a_bits", "b_bits"), [(4, 4), (8, 4), (8, 8)])
def test_integer_products_are_exact(m: int, n: int, k: int, a_bits: int, b_bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (
        torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, k), generator=generator).to(torch.int8)
        for rows, bits in ((m, a_bits), (n, b_bits))
    )
    found = int_matmul(a.cuda(), b.cuda(), a_bits=a_bits, b_bits=b_bits)
    assert torch.equal(found.cpu().long(), a.long() @ b.long().T)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_codes_are_those_of_the_cpu(bits: int, group: int | None, symmetric: bool) -> None:
    x = draw(64, 96)
    x[3] = 0
    here = quantise(x, bits, symmetric=symmetric, group=group, clip=0.9)
    there = quantise(x.cuda(), bits, symmetric=symmetric, group=group, clip=0.9)
    assert torch.equal(there.codes.cpu(), here.codes)
    assert torch.equal(there.scale.cpu(), here.scale)
    weight = quantise(draw(40, 96, seed=2), 4, symmetric=True)
    for where, q in (("cpu", here), ("cuda", there)):
        packed = pack_weight(weight.codes.to(where), weight.scale.to(where), None, 4)
        y = linear(q, packed, dtype=torch.float32).cpu()
        want = dequantise(here).double() @ (weight.codes.double() * weight.scale.double()).T
        assert families.relative(y, want) < 1e-6


@pytest.mark.parametrize("name", ["llama-biases", "mistral-window"])
@pytest.mark.parametrize(
    ("method", "bits", "settings"),
    [
        ("rtn", "w4a16", {}),
        ("rtn", "w3a16g8", {}),
        ("quarot:rounding=rtn", "w4a4kv4", {}),
        ("quad:rounding=rtn", "w4a4kv4", {}),
        ("rtn", "w4a8kv4", {"activation_static": True, "kv_static": True}),
        ("rtn", "w4a4kv8", {"activation_symmetric": False, "weight_symmetric": False}),
        ("fptquant:steps=0;local_steps=0;rounding=rtn", "w4a4kv4", {}),
    ],
)
def test_the_gpu_computes_what_the_cpu_simulates(
    checkpoints: dict[str, Checkpoint], name: str, method: str, bits: str, settings: dict[str, Any]
) -> None:
    simulated = run(
        checkpoints[name], method, bits, "cpu", torch.float64, execution="simulate", **settings
    ).decoder
    packed = run(checkpoints[name], method, bits, "cuda", torch.float64, **settings).decoder
    assert families.relative(packed(IDS.cuda()).cpu(), simulated(IDS)) < 1e-9
    cache = packed.new_cache()
    parts = [packed(part.cuda(), cache=cache).cpu() for part in IDS.split((9, 1, 14), dim=1)]
    assert families.relative(torch.cat(parts, dim=1), simulated(IDS)) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("method", "bits", "settings"),
    [
        ("rtn", "w4a16g64", {}),
        ("rtn", "w4a8kv8", {}),
        ("quarot:rounding=rtn", "w4a8kv4", {}),
        ("quarot:rounding=rtn", "w4a4kv4", {}),
        ("quad:rounding=rtn", "w4a4kv4", {}),
        ("quad:rounding=rtn;a8=true", "w4a4", {}),
        ("rtn", "w4a8kv4", {"activation_static": True, "kv_static": True}),
        ("fptquant:steps=0;local_steps=0;rounding=rtn", "w4a8kv8", {}),
        ("fptquant:steps=0;local_steps=0;rounding=rtn", "w4a4kv4", {}),
        ("rtn", "w4a8kv8", {"activation_symmetric": False}),
    ],
)
@pytest.mark.parametrize("name", ["qwen3-qk-norm", "llama-gqa-tied", "qwen2-bias-tied"])
def test_half_precision_errs_no_more_than_its_simulation(
    tmp_path: Path, name: str, method: str, bits: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    """Against the simulation in float64, by half-layers, as a whole and through the cache, merged or not; the
    criterion and its factor are tests/half_precision.py's. Heads of 64 and 128 channels have kernels."""
    simulated = run(
        save(tmp_path, name), method, bits, "cuda", dtype, execution="simulate", **settings
    ).decoder
    packed = copy.deepcopy(simulated)
    pack_decoder(packed)
    ids = families.tokens(4, 48, seed=5).cuda()
    assert faults(simulated, packed, ids) == []
    assert merge_projections(packed) == []
    assert faults(simulated, packed, ids) == []


def test_bfloat16_runs_packed(checkpoints: dict[str, Checkpoint]) -> None:
    result = run(checkpoints["llama-biases"], "quarot:rounding=rtn", "w4a4kv4", "cuda", torch.bfloat16)
    ops.reset_implementations()
    assert bool(result.decoder(IDS.cuda()).isfinite().all())
    assert len(generate(result.decoder, IDS.cuda(), max_new_tokens=4)[0]) == 4
    assert {"linear w4a4", "kv_attention kv4", "rmsnorm_quantise a4"} <= ops.implementations().keys()
    found = memory(result.decoder, result.plan)
    assert found.linears.measured < 0.3 * sum(
        2 * a * b for a, b in (x.shape for _, x in result.decoder.linears())
    )
    moved = {linear.packed.packed.device.type for _, linear in result.decoder.linears() if linear.packed}
    assert moved == {"cuda"}
