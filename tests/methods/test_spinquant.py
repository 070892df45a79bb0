"""SpinQuant: the network that it descends on is the one that is evaluated, and descending moves it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods.bits import Bits, QuantiserSettings
from methods.checkpoint import from_transformers
from methods.decoder import Block, Decoder
from methods.errors import UserError
from methods.kurtail import KurTail
from methods.learned_rotations import Pair, pair_of, quarot_pair
from methods.linear import OnlineHadamard
from methods.method import Artifact, Context, default_plan
from methods.orthogonal import orthogonality_error, tangent
from methods.pipeline import set_quantisers
from methods.registry import parse_method
from methods.rounding import round_weights
from methods.spinquant import PAPER_TOKENS, SpinQuant
from methods.straight_through import Simulation, next_token_loss, quantised_logits
from tests import families
from tests.families import reference_logits, relative

IDS = families.tokens(2, 14, seed=21)
CALIBRATION = families.tokens(6, 24, seed=32)
FEW = SpinQuant(steps=2)


def decoder(name: str, dtype: torch.dtype = torch.float64) -> Decoder:
    return from_transformers(families.model(name, dtype))


def random_pair(model: Decoder) -> Pair:
    """Orthogonal matrices that are no Hadamard matrices."""
    generator = torch.Generator().manual_seed(5)

    def orthogonal(*shape: int) -> Tensor:
        return torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q

    config = model.config
    width, head = config.hidden_size, config.head_dim
    return Pair(orthogonal(width, width), orthogonal(config.layers, head, head))


CASES = [("w16a4kv4", {}), ("w16a4kv4", {"online": False}), ("w16a8", {}), ("w4a4kv4", {}), ("w3a6kv8g8", {})]


@pytest.mark.parametrize("bits, options", CASES)
@pytest.mark.parametrize("name", families.NAMES)
def test_the_network_learned_on_is_the_network_evaluated(
    name: str, bits: str, options: dict[str, Any]
) -> None:
    """The differentiable network in the model's own basis, and merged rotations in the quantised decoder."""
    if bits != "w16a4kv4" and name not in families.SMALL:
        pytest.skip("large weights take long, and small ones say the same")
    method = SpinQuant(**options)
    plain, pair, width = decoder(name), random_pair(decoder(name)), Bits.parse(bits)
    simulation = Simulation.of(width, *method._online(plain))
    with torch.no_grad():
        got = quantised_logits(plain, IDS, pair.residual, pair.values, simulation)
        artifact = Artifact({"residual": pair.residual, "values": pair.values})
        merged = method.transform(decoder(name), artifact)
        plan = default_plan(merged, width, QuantiserSettings())
        if width.quantises_weights:
            round_weights(merged, plan.linears, "rtn", Context())
        set_quantisers(merged, plan)
        want = merged(IDS)
    assert relative(got, want) <= 1e-9
    assert relative(got, reference_logits(families.model(name), IDS)) > 1e-4
    loss = next_token_loss(plain, IDS, pair.residual, pair.values, simulation)
    assert float(loss) == pytest.approx(
        float(F.cross_entropy(want[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))
    )


def test_gradients_are_those_of_the_same_network_without_rounding() -> None:
    """Straight through: with each quantiser replaced by x + (its error as a constant), autograd agrees."""
    model, bits = decoder("llama-biases"), Bits.parse("w16a4kv4")
    pair = random_pair(model)
    simulation = Simulation.of(bits, *FEW._online(model))

    class Shifted(Simulation):
        def activation(self, x: Tensor) -> Tensor:
            return x + (simulation.activation(x) - x).detach()

        def cached(self, x: Tensor) -> Tensor:
            return x + (simulation.cached(x) - x).detach()

    shifted = Shifted(simulation.linear, simulation.kv, simulation.query_key, simulation.hidden)
    gradients = []
    for network in (simulation, shifted):
        leaves = [pair.residual.clone().requires_grad_(), pair.values.clone().requires_grad_()]
        next_token_loss(model, IDS, leaves[0], leaves[1], network).backward()
        assert leaves[0].grad is not None
        assert leaves[1].grad is not None
        gradients.append((leaves[0].grad, leaves[1].grad))
    for got, want in zip(*gradients, strict=True):
        assert float(want.norm()) > 1e-3
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_a_cpu_multiplies_whole_numbers_while_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a user has set, which then stands again. (tests/gpu has what a GPU does.)"""
    seen = []

    def loss(*arguments: Any) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return next_token_loss(*arguments)

    monkeypatch.setattr("methods.spinquant.next_token_loss", loss)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        FEW.learn(decoder("llama-biases", torch.float32), CALIBRATION, Context(seed=3))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen.count("highest") == FEW.recipe.steps * (FEW.batch or 1)


def along_the_group(loss: Tensor, leaves: list[Tensor]) -> list[float]:
    """The largest part of each gradient that leaves its matrices orthogonal."""
    found = torch.autograd.grad(loss, leaves, retain_graph=True)
    return [float(tangent(m.detach().mT, g.mT).abs().max()) for m, g in zip(leaves, found, strict=True)]


def test_without_quantisation_the_loss_is_constant() -> None:
    model = decoder("llama-biases")
    pair = random_pair(model)
    simulation = dataclasses.replace(Simulation.of(Bits.parse("w16a8kv8"), *FEW._online(model)), kv=None)
    simulation = dataclasses.replace(
        simulation, linear=dataclasses.replace(simulation.linear, activation=None), query_key=None
    )
    leaves = [pair.residual.requires_grad_(), pair.values.requires_grad_()]
    loss = next_token_loss(model, IDS, leaves[0], leaves[1], simulation)
    slopes = along_the_group(loss, leaves)
    assert max(slopes) < 1e-12
    quantised = Simulation.of(Bits.parse("w16a4kv4"), *FEW._online(model))
    slopes = along_the_group(next_token_loss(model, IDS, leaves[0], leaves[1], quantised), leaves)
    assert min(slopes) > 1e-3
    want = reference_logits(families.model("llama-biases"), IDS)
    exact = float(F.cross_entropy(want[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))
    assert float(loss.detach()) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("name", families.NAMES)
def test_function_is_preserved_and_the_rotations_move(name: str) -> None:
    model = decoder(name)
    before = copy.deepcopy(model.state_dict())
    artifact = FEW.learn(model, CALIBRATION, Context(seed=3))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    pair, (start, _) = pair_of(artifact), FEW._start(model, CALIBRATION, Context(seed=3))
    assert artifact.meta["log"]["R1 and R2"]["gradient"][0] > 1e-3
    for matrix, first in ((pair.residual, start.residual), (pair.values, start.values)):
        assert orthogonality_error(matrix) <= 1e-12
        assert float((matrix - first).norm()) > 1e-3
    assert torch.equal(start.residual, quarot_pair(model, 3).residual), "pairs with QuaRot of the seed"
    rotated = FEW.transform(model, artifact)
    assert relative(rotated(IDS), reference_logits(families.model(name), IDS)) <= 1e-9


@pytest.mark.parametrize("name", families.SMALL)
def test_float32_error_is_at_most_three_times_the_plain_one(name: str) -> None:
    ids = families.tokens(2, 60, seed=5)
    plain = decoder(name, torch.float32)
    exact = copy.deepcopy(plain).double()(ids)
    own = relative(plain(ids), exact)
    artifact = FEW.learn(plain, CALIBRATION, Context(seed=3))
    assert relative(FEW.transform(plain, artifact)(ids), exact) <= 3 * own


def test_learning_lowers_the_loss_and_repeats() -> None:
    """On the very sequences that it descends on, of a model with two large channels; the same seed gives the
    same bytes."""
    source = families.build(families.config("llama-biases"), torch.float32)
    for layer in source.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight[[3, 50]] *= 10
    model = from_transformers(source)
    method = SpinQuant(steps=40, batch=2, rate=5.0)
    ids = families.tokens(2, 40, seed=8)
    first, other = (method.learn(model, ids, Context(seed=seed)) for seed in (1, 2))
    assert all(a.meta["loss"]["after"] < a.meta["loss"]["before"] - 0.15 for a in (first, other))
    assert not torch.equal(other.tensors["residual"], first.tensors["residual"])
    torch.manual_seed(5)
    again = method.learn(model, ids, Context(seed=1))
    assert first.meta["log"] == again.meta["log"]
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in first.tensors.items())


def test_tokens_seen_are_counted() -> None:
    model = decoder("llama-linear-rope", torch.float32)
    meta = SpinQuant(steps=4, batch=2, window=10).learn(model, CALIBRATION, Context()).meta
    assert meta["tokens"] == {"seen": 80, "different": 60, "paper": 800 * 2048}
    assert PAPER_TOKENS == 1_638_400
    assert len(meta["log"]["R1 and R2"]["loss"]) == 4


def test_a_batch_is_the_mean_of_its_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of them pass the network together."""
    model = decoder("llama-linear-rope")
    meta = SpinQuant(steps=1, batch=6).learn(model, CALIBRATION, Context()).meta
    pair, _ = SpinQuant()._start(model, CALIBRATION, Context())
    simulation = Simulation.of(Bits.parse("w16a4kv4"), *FEW._online(model))
    want = next_token_loss(model, CALIBRATION, pair.residual, pair.values, simulation)
    assert meta["log"]["R1 and R2"]["loss"] == [pytest.approx(float(want))]
    monkeypatch.setattr("methods.spinquant._AT_ONCE", 2 * CALIBRATION.shape[1])
    apart = SpinQuant(steps=1, batch=6).learn(model, CALIBRATION, Context()).meta
    for fact in ("loss", "gradient"):
        assert apart["log"]["R1 and R2"][fact] == pytest.approx(meta["log"]["R1 and R2"][fact], rel=1e-9)


def test_only_r1_and_without_online_transforms() -> None:
    model = decoder("llama-biases", torch.float32)
    method = SpinQuant(steps=2, values=False, online=False)
    artifact = method.learn(model, CALIBRATION, Context(seed=3))
    assert set(artifact.meta["log"]) == {"R1"}
    torch.testing.assert_close(pair_of(artifact).values, quarot_pair(model, 3).values)
    block = method.transform(model, artifact).layers[0]
    assert isinstance(block, Block)
    assert block.mlp.hidden_transform is block.self_attn.rotation is None
    block = FEW.transform(decoder("llama-biases", torch.float32), artifact).layers[0]
    assert isinstance(block, Block)
    assert isinstance(block.mlp.hidden_transform, OnlineHadamard)
    assert isinstance(block.self_attn.rotation, OnlineHadamard)
    assert block.self_attn.output_transform is None, "nothing mixes heads"


def test_starting_at_kurtail() -> None:
    model = decoder("llama-biases", torch.float32)
    method = SpinQuant(start="kurtail", steps=1)
    start, _ = method._start(model, CALIBRATION, Context(seed=3))
    want = pair_of(KurTail().learn(model, CALIBRATION, Context(seed=3)))
    assert torch.equal(start.residual, want.residual)
    assert torch.equal(start.values, want.values)
    artifact = method.learn(model, CALIBRATION, Context(seed=3))
    assert float((pair_of(artifact).residual - start.residual).norm()) > 0
    assert len(artifact.meta["start"]["log"]["R1"]["loss"]) == KurTail().recipe.steps
    measured = artifact.meta["measured"]
    assert measured["start_seconds"] > measured["start_learn_seconds"] > 0


def test_presets() -> None:
    paper = SpinQuant(preset="paper")
    assert paper.calibration_shape() == (800, 2048)
    assert SpinQuant().calibration_shape() == (32, 512)
    assert (paper.recipe.steps, paper.recipe.rate, paper.recipe.clip) == (100, 1.5, 1.0)
    assert paper.rounding_tokens(torch.zeros(800, 2)).shape == (128, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learn_bits=w4a16", "does not depend on R1"),
        ("learn_bits=w16a16kv4", "does not depend on R1"),
        ("learn_bits=4bit", "write w<bits>a<bits>"),
        ("start=random", "choose one of hadamard, kurtail"),
        ("steps=0", "must be positive"),
        ("batch=0", "at least 1"),
        ("window=1", "at least 2"),
        ("clip=0", "positive norm"),
        ("schedule=step", "choose one of constant"),
    ],
)
def test_refusals(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_method(f"spinquant:{text}")


def test_the_clip_can_be_left_out() -> None:
    method = parse_method("spinquant:clip=none").parts[0]
    assert isinstance(method, SpinQuant)
    assert method.recipe.clip is None
