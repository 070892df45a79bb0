"""FPTQuant as a whole on tiny models: learning, stopping and going on, what is kept, both executions."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from kernels import ops
from methods import fptquant
from methods.bits import Bits
from methods.checkpoint import Checkpoint, from_transformers
from methods.decoder import Block
from methods.errors import UserError
from methods.fptquant import FPTQuant
from methods.generate import generate
from methods.method import Artifact, Context
from methods.online import OnlinePart, online_parts
from methods.packed_checkpoint import load_packed, write_packed
from methods.pipeline import quantise
from methods.registry import parse_method
from methods.student import SITES, learned_ranges
from tests import families
from tests.families import reference_logits, relative
from tests.methods.small_checkpoint import CALIBRATION, run, save

IDS = families.tokens(2, 14, seed=41)
QUICK = "local_steps=3;steps=4;window=16;rounding=rtn"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {name: save(tmp_path_factory.mktemp(name), name) for name in families.SMALL}


def learner(**options: Any) -> FPTQuant:
    return FPTQuant(**{"local_steps": 3, "steps": 4, "window": 16, **options})


def learned(method: FPTQuant, **context: Any) -> Artifact:
    return method.learn(from_transformers(families.model("llama-biases")), CALIBRATION, Context(**context))


# Learning


@pytest.mark.parametrize("static", [True, False])
def test_both_stages_lower_their_loss(static: bool) -> None:
    decoder = from_transformers(families.model("llama-biases"))
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    seen: list[str] = []
    method = learner(local_steps=25, steps=25, batch=2, static=static)
    found = method.learn(
        decoder, CALIBRATION, Context(progress=lambda stage, done, total: seen.append(stage))
    )
    local, end = found.meta["local"]["loss"], found.meta["end to end"]
    assert sum(local[-5:]) < sum(local[:5])
    assert end["after"] < end["before"]
    assert len(end["loss"]) == 25
    assert found.meta["condition"] <= method.condition
    assert any(stage.startswith("local stage, loss ") for stage in seen)
    assert any(stage == f"end to end, divergence {end['loss'][-1]:.4f}" for stage in seen)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())
    assert all(torch.isfinite(tensor).all() for tensor in found.tensors.values())


def test_without_a_rate_ranges_learn_alone() -> None:
    first = fptquant.initial(from_transformers(families.model("llama-biases")).config, FPTQuant().switches, 0)
    found = learned(learner(local_steps=0, rate=0.0))
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in first.items())
    end = found.meta["end to end"]
    assert end["after"] < end["before"]


def test_every_transform_learns_when_all_are_on() -> None:
    first = fptquant.initial(from_transformers(families.model("llama-biases")).config, FPTQuant().switches, 0)
    for stages in ({"steps": 0}, {"local_steps": 0}):
        found = learned(learner(**stages)).tensors
        still = [name for name, tensor in first.items() if torch.equal(found[name], tensor)]
        assert still == ["residual.signs"]


def test_the_seed_draws_the_rotation_and_the_order() -> None:
    one, same, other = (learned(learner(), seed=seed).tensors for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["residual.signs"], other["residual.signs"])


@pytest.mark.parametrize("bits", ["w4a4kv4", "w16a8", "w16a4kv4"])
@pytest.mark.parametrize("static", [True, False])
def test_what_is_learned_preserves_the_function(bits: str, static: bool) -> None:
    model = families.model("llama-biases")
    decoder = from_transformers(model)
    method = learner(learn_bits=bits, static=static)
    artifact = method.learn(decoder, CALIBRATION, Context())
    assert relative(method.transform(decoder, artifact)(IDS), reference_logits(model, IDS)) <= 1e-9
    assert ("range.low" in artifact.tensors) == static


@pytest.mark.parametrize("stage", ["local", "end to end"])
def test_stopped_learning_goes_on_to_the_same_end(tmp_path: Path, stage: str) -> None:
    method = learner(local_steps=8, steps=8)
    want = learned(method)
    calls = 0

    def stop(name: str, done: int, total: int) -> None:
        nonlocal calls
        calls += name.startswith("local" if stage == "local" else "end")
        if calls == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned(method, cache=tmp_path, progress=stop)
    assert list(tmp_path.iterdir())
    steps: list[tuple[str, int]] = []
    found = learned(
        method, cache=tmp_path, progress=lambda name, done, total: steps.append((name.split(",")[0], done))
    )
    first = "local stage" if stage == "local" else "end to end"
    assert next(done for name, done in steps if name == first) == 6  # of five steps kept
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in want.tensors.items())
    assert found.meta["end to end"]["loss"] == want.meta["end to end"]["loss"]
    assert not list(tmp_path.iterdir())


def test_other_options_do_not_continue_a_stopped_learning(tmp_path: Path) -> None:
    def stop(name: str, done: int, total: int) -> None:
        if name.startswith("local") and done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned(learner(local_steps=8), cache=tmp_path, progress=stop)
    other = learner(local_steps=8, local_rate=0.05)
    steps: list[int] = []
    learned(other, cache=tmp_path, progress=lambda name, done, total: steps.append(done))
    assert steps[0] == 1


# Ranges


def test_learned_ranges_serve_the_widths_they_were_learned_at(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["llama-biases"]
    sites: dict[str, list[bool]] = {}
    for bits in ("w4a4kv4", "w4a8kv4", "w4a8kv8"):
        tokens = [CALIBRATION, CALIBRATION.flip(0)]  # the learned ranges do not come from these
        method = parse_method(f"fptquant:{QUICK}").parts[0]
        artifact = learned_on(checkpoint, method)
        with mock.patch.object(FPTQuant, "learn", return_value=artifact):
            a, b = (
                quantise(
                    checkpoint,
                    parse_method(f"fptquant:{QUICK}"),
                    Bits.parse(bits),
                    Context(),
                    calibration=t[:3],
                ).decoder
                for t in tokens
            )
        first, second = a.layers[0], b.layers[0]
        assert isinstance(first, Block)
        assert isinstance(second, Block)
        pairs = (
            (first.self_attn.q_proj.input_scale, second.self_attn.q_proj.input_scale),
            (first.self_attn.v_scale, second.self_attn.v_scale),
        )
        sites[bits] = [bool(torch.equal(x, y)) for x, y in pairs if x is not None and y is not None]
    assert sites == {"w4a4kv4": [True, True], "w4a8kv4": [False, True], "w4a8kv8": [False, False]}


def learned_on(checkpoint: Checkpoint, method: Any) -> Artifact:
    found = method.learn(checkpoint.load(torch.float32), CALIBRATION, Context())
    assert isinstance(found, Artifact)
    return found


def test_quantisers_are_static_and_asymmetric_or_the_grids(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["llama-biases"]
    static = run(checkpoint, f"fptquant:{QUICK}", "w4a4kv4")
    assert static.plan.static
    for spec in static.plan.linears.values():
        assert spec.activation is not None
        assert (spec.activation.static, spec.activation.symmetric) == (True, False)
        assert spec.symmetric
    for _, linear in static.decoder.linears():
        assert linear.input_scale is not None
        assert linear.input_zero is not None
    dynamic = run(checkpoint, f"fptquant:static=false;{QUICK}", "w4a4kv4")
    plain = run(checkpoint, "quarot:rounding=rtn", "w4a4kv4")
    assert dynamic.plan == plain.plan
    assert all(linear.input_scale is None for _, linear in dynamic.decoder.linears())
    assert any("static" in note for note in static.notes)
    assert not any("static" in note for note in dynamic.notes)


@pytest.mark.parametrize("method", ["static", "quarot:rounding=rtn+static", "quarot+static"])
def test_static_makes_another_method_static(checkpoints: dict[str, Checkpoint], method: str) -> None:
    checkpoint = checkpoints["qwen3-qk-norm"]
    result = run(checkpoint, method, "w4a8kv8")
    assert result.plan.static
    assert (len(online_parts(result.decoder)) > 0) == ("quarot" in method)
    dynamic = run(checkpoint, method.removesuffix("+static").replace("static", "rtn"), "w4a8kv8")
    assert 0 < relative(result.decoder(IDS), dynamic.decoder(IDS)) < 0.2  # eight bits are close to none


# Execution


@pytest.mark.parametrize("static", ["true", "false"])
@pytest.mark.parametrize("name", families.SMALL)
def test_int4_execution_computes_what_was_simulated(
    checkpoints: dict[str, Checkpoint], name: str, static: str
) -> None:
    method = f"fptquant:static={static};{QUICK}"
    simulated, packed = (
        run(checkpoints[name], method, "w4a4kv4", dtype=torch.float64, execution=execution).decoder
        for execution in ("simulate", "int4")
    )
    assert relative(packed(IDS), simulated(IDS)) < 1e-9
    cache = packed.new_cache()
    parts = [packed(part, cache=cache) for part in IDS.split([5, 1, 8], dim=1)]
    assert relative(torch.cat(parts, 1), simulated(IDS)) < 1e-9


def test_the_streams_scale_is_in_the_epilogue(checkpoints: dict[str, Checkpoint]) -> None:
    """Both writers of a layer get it as the row scale of their product, RMSNorm as that of its epsilon."""
    decoder = run(checkpoints["llama-biases"], f"fptquant:{QUICK}", "w4a4kv4", execution="int4").decoder
    with (
        mock.patch.object(ops, "linear", wraps=ops.linear) as products,
        mock.patch.object(ops, "rmsnorm_quantise", wraps=ops.rmsnorm_quantise) as norms,
    ):
        decoder(IDS)
    layers = decoder.config.layers
    scaled = [call for call in products.call_args_list if call.kwargs["row_scale"] is not None]
    assert len(products.call_args_list) == 7 * layers
    assert len(scaled) == 2 * layers
    assert all(call.kwargs["row_scale"].shape == (2, 14, 1) for call in scaled)
    assert [call.kwargs["row_scale"] is not None for call in norms.call_args_list] == [True] * 2 * layers


def test_online_parts(checkpoints: dict[str, Checkpoint]) -> None:
    def parts(method: str) -> list[OnlinePart]:
        return online_parts(run(checkpoints["llama3-scaled-rope"], method, "w4a4kv4").decoder)

    config = checkpoints["llama3-scaled-rope"].config
    hidden = OnlinePart("down_proj's input", config.layers, 160, 32)
    assert parts(f"fptquant:{QUICK}") == [hidden, OnlinePart("residual stream", 2 * config.layers, 96, None)]
    assert parts(f"fptquant:hadamard=false;tokens=false;{QUICK}") == []
    assert {part.seam for part in parts("quarot:rounding=rtn")} >= {"query and key", "down_proj's input"}


def test_packed_and_back(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Ranges, the stream's scale and gains per head are saved with the model."""
    for name in ("llama-biases", "qwen3-qk-norm"):
        checkpoint = checkpoints[name]
        decoder = run(checkpoint, f"fptquant:{QUICK}", "w4a4kv4", execution="int4").decoder
        (tmp_path / name).mkdir()
        write_packed(tmp_path / name, decoder, checkpoint.folder, {})
        again = load_packed(tmp_path / name)
        assert again.residual_scaling
        assert torch.equal(again(IDS), decoder(IDS))
        assert generate(again, IDS, max_new_tokens=3) == generate(decoder, IDS, max_new_tokens=3)


# What is shipped


def test_ranges_in_half_precision_are_those_of_their_logarithms() -> None:
    tensors = learned(learner()).tensors
    half = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    whole = {name: tensor.to(torch.float32) for name, tensor in half.items()}
    widths = dict.fromkeys(SITES, 4)
    found, expected = learned_ranges(half, widths), learned_ranges(whole, widths)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("learn_bits=w4a16", "give quantised activations"),
        ("steps=-1", "steps -1: give at least 0"),
        ("window=1", "window 1: give at least 2"),
        ("rate=-1", "rate -1: give a positive number, or 0"),
        ("range_rate=0", "range_rate 0: give a positive number"),
        ("condition=1", "condition 1: give a number above 1"),
        ("learn_bits=w4", "bits 'w4'"),
    ],
)
def test_options_are_checked(options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_method(f"fptquant:{options}")
    with pytest.raises(UserError, match="both transform"):
        parse_method("fptquant+quarot")


def test_float_linears_stay_float(checkpoints: dict[str, Checkpoint]) -> None:
    result = run(checkpoints["llama-biases"], f"fptquant:{QUICK}", "w4a16")
    assert not result.plan.static
    assert all(linear.activation is None for _, linear in result.decoder.linears())
