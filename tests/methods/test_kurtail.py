"""KurTail: what it samples, what it minimises, and that the function stays; kurtosis by scipy."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from unittest import mock

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from methods import kurtail
from methods.capture import STORED, sample_blocks
from methods.checkpoint import from_transformers
from methods.decoder import Block, Decoder
from methods.errors import UserError
from methods.kurtail import KurTail, kurtosis_objective
from methods.kurtosis import BINS, REACH, block_input_kurtosis, histogram, spread
from methods.learned_rotations import pair_of, quarot_pair
from methods.linear import OnlineHadamard
from methods.method import Artifact, Context
from methods.orthogonal import orthogonality_error
from methods.quarot import QuaRot
from methods.registry import parse_method
from methods.transforms import folded
from tests import families
from tests.families import reference_logits, relative

IDS = families.tokens(2, 12, seed=21)
CALIBRATION = families.tokens(6, 24, seed=32)
QUICK = KurTail(steps=30, tokens=100)
FEW = KurTail(steps=2, tokens=20, batch=8)


def learned(
    name: str, method: KurTail = QUICK, dtype: torch.dtype = torch.float64
) -> tuple[Decoder, Artifact]:
    model = from_transformers(families.model(name, dtype))
    return model, method.learn(model, CALIBRATION, Context(seed=3))


@pytest.mark.parametrize("name", families.NAMES)
def test_function_is_preserved_on_every_family(name: str) -> None:
    model, artifact = learned(name, FEW)
    rotated = FEW.transform(model, artifact)
    want = reference_logits(families.model(name), IDS)
    assert relative(rotated(IDS), want) <= 1e-9
    cache = rotated.new_cache()
    parts = [rotated(part, cache=cache) for part in IDS.split([7, 1, 4], dim=1)]
    assert relative(torch.cat(parts, 1), want) <= 1e-9


@pytest.mark.parametrize("name", families.NAMES)
def test_float32_error_is_at_most_three_times_the_plain_one(name: str) -> None:
    ids = families.tokens(2, 60, seed=5)
    plain = from_transformers(families.model(name, torch.float32))
    exact = copy.deepcopy(plain).double()(ids)
    own = relative(plain(ids), exact)
    artifact = FEW.learn(plain, CALIBRATION, Context(seed=3))
    assert relative(FEW.transform(plain, artifact)(ids), exact) <= 3 * own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learning_leaves_the_model_alone_and_repeats(dtype: torch.dtype) -> None:
    model = from_transformers(families.model("llama-biases", dtype))
    before = copy.deepcopy(model.state_dict())
    first = QUICK.learn(model, CALIBRATION, Context(seed=3))
    torch.manual_seed(77)
    again = QUICK.learn(model, CALIBRATION, Context(seed=3))
    other = QUICK.learn(model, CALIBRATION, Context(seed=4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model(IDS).isfinite().all()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, again.tensors[name])
        assert not torch.equal(tensor, other.tensors[name])
        assert tensor.dtype == torch.float32
    assert {key: first.meta[key] for key in ("log", "sites")} == {
        key: again.meta[key] for key in ("log", "sites")
    }


def test_rotations_are_orthogonal_and_have_moved() -> None:
    model, artifact = learned("qwen3-qk-norm")
    pair, start = pair_of(artifact), quarot_pair(model, seed=3)
    for matrix, first in ((pair.residual, start.residual), (pair.values, start.values)):
        assert orthogonality_error(matrix) <= 1e-12
        assert float((matrix - first).norm() / first.norm()) > 0.05
    assert torch.equal(start.residual, QuaRot().learn(model, None, Context(seed=3)).tensors["residual"])


def test_only_r1_is_learned_where_that_is_asked() -> None:
    model, artifact = learned("llama-biases", dataclasses.replace(QUICK, values=False))
    assert set(artifact.meta["log"]) == {"R1"}
    torch.testing.assert_close(pair_of(artifact).values, quarot_pair(model, seed=3).values)


def test_online_transforms_are_quarots() -> None:
    for name in ("llama-linear-rope", "llama-gqa-tied"):
        model, artifact = learned(name, FEW)
        block = FEW.transform(model, artifact).layers[1]
        assert isinstance(block, Block)
        assert isinstance(block.mlp.hidden_transform, OnlineHadamard)
        assert isinstance(block.self_attn.rotation, OnlineHadamard)
        across = block.self_attn.output_transform
        assert (across is None) == (name == "llama-gqa-tied")  # 9 heads
    offline = dataclasses.replace(FEW, online=False)
    plain, artifact = learned("llama-biases", offline)
    block = offline.transform(plain, artifact).layers[0]
    assert isinstance(block, Block)
    assert block.mlp.hidden_transform is block.self_attn.rotation is block.self_attn.output_transform is None


# The sample


def test_the_sample_is_what_blocks_read_without_the_gain() -> None:
    """All tokens kept: the inputs of q_proj and gate_proj over the gain, and v_proj's output, by hooks on
    transformers' own model."""
    model = families.build(families.config("llama-biases"), torch.float64)
    decoder = from_transformers(model)
    every = sample_blocks(decoder, CALIBRATION, 10**6, Context())
    seen: dict[str, Tensor] = {}
    names = [f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.gate_proj")]
    for name in names:
        model.model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, inputs[0])
        )
    for i in (0, 1):
        model.model.layers[i].self_attn.v_proj.register_forward_hook(
            lambda _, __, out, i=i: seen.__setitem__(f"v {i}", out)
        )
    reference_logits(model, CALIBRATION)
    for place, name in enumerate(names):
        layer = model.model.layers[place // 2]
        norm = layer.post_attention_layernorm if "mlp" in name else layer.input_layernorm
        want = (seen[name] / norm.weight).flatten(0, 1)
        torch.testing.assert_close(every.inputs[place].double(), want, rtol=1e-3, atol=1e-4)
    for i in (0, 1):
        want = seen[f"v {i}"].flatten(0, 1).unflatten(-1, (2, 24))
        torch.testing.assert_close(every.values[i].double(), want, rtol=1e-3, atol=1e-3)


def test_the_sample_is_bounded_and_uniform() -> None:
    """Which tokens are kept, told by an embedding that counts them: over many seeds each as often as any."""
    model = from_transformers(families.model("llama-linear-rope"))
    ids = torch.arange(3, 3 + 60).view(5, 12)
    rows = model.embed(ids).stream.flatten(0, 1)
    first = (rows / rows.square().mean(-1, keepdim=True).sqrt()).to(STORED).double()
    counts = np.zeros(60)
    for seed in range(60):
        sample = sample_blocks(model, ids, 8, Context(seed=seed))
        assert sample.inputs.shape == (4, 8, 64)
        assert sample.values.shape == (2, 8, 4, 16)
        distance = torch.cdist(sample.inputs[0].double(), first)
        counts[distance.argmin(1).numpy()] += 1
    assert counts.sum() == 60 * 8, "no token twice"
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_a_folded_copy_is_the_same_function_and_a_copy() -> None:
    model = from_transformers(families.model("llama-biases"))
    block = model.layers[0]
    assert isinstance(block, Block)
    own = folded(block)
    assert own.input_layernorm.weight is None
    assert block.input_layernorm.weight is not None
    state = model.embed(IDS)
    torch.testing.assert_close(model.through(own, state).stream, model.through(block, state).stream)


def test_memory_holds_one_block_and_the_sample() -> None:
    """Folded copies are let go of one by one."""
    model = from_transformers(families.model("llama3-scaled-rope"))
    living: weakref.WeakSet[Block] = weakref.WeakSet()
    most = 0

    def counted(block: Block) -> Block:
        nonlocal most
        own = folded(block)
        living.add(own)
        most = max(most, len(living))
        return own

    with mock.patch("methods.capture.folded", counted):
        sample_blocks(model, CALIBRATION, 10, Context())
    assert most <= 2  # the last one is let go of when the next is there


# The objective


@pytest.mark.parametrize("axis, along", [("token", -1), ("channel", -2), ("tensor", None)])
@pytest.mark.parametrize("distance", ["absolute", "squared"])
def test_the_objective_is_scipys_kurtosis(axis: str, along: int | None, distance: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 40, 16, generator=generator, dtype=torch.float64) ** 3
    matrix = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q.requires_grad_()
    got = kurtosis_objective(rows, 25, axis, distance, seed=5)(0, [matrix])
    places = torch.randint(40, (25,), generator=torch.Generator().manual_seed(5))
    turned = (rows[:, places] @ matrix).detach().numpy()
    found = [scipy.stats.kurtosis(site, axis=along, fisher=False) for site in turned]
    gap = np.abs(np.array(found) - 1.8)
    assert got == pytest.approx((gap if distance == "absolute" else gap**2).mean(), rel=1e-3)  # 1e-5 on σ²
    assert matrix.grad is not None
    assert float(matrix.grad.norm()) > 0


def test_learning_lowers_kurtosis_below_the_hadamard_start() -> None:
    """A few outlier channels, as real models have them, on tokens that were not learned from."""
    source = families.build(families.config("qwen3-qk-norm"), torch.float32)
    for layer in source.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight[[3, 17, 50, 77, 100, 150]] *= 20
    source.model.embed_tokens.weight[:, [3, 17, 50, 77, 100, 150]] *= 20
    held_out = families.tokens(1, 150, seed=99)
    means = {}
    for method in (QuaRot(), KurTail(steps=60, tokens=200)):
        model = from_transformers(source)
        artifact = method.learn(model, families.tokens(8, 64, seed=7), Context(seed=0))
        found = block_input_kurtosis(method.transform(model, artifact), held_out)
        means[method.name] = sum(site.value for site in found) / len(found)
    assert means["kurtail"] < means["quarot"] - 0.1
    sites = artifact.meta["sites"]
    by = {
        rotation: np.mean(
            [s["kurtosis"] for s in sites if s["rotation"] == rotation and s["site"] != "value"]
        )
        for rotation in ("none", "start", "learned")
    }
    assert by["none"] > 20 > by["start"] > by["learned"] + 0.1
    assert artifact.meta["log"]["R1"]["loss"][-1] < artifact.meta["log"]["R1"]["loss"][0]


def test_what_the_artifact_says_of_sites() -> None:
    model, artifact = learned("llama-biases")
    sites = artifact.meta["sites"]
    assert len(sites) == 3 * 2 * 3
    sample = sample_blocks(model, CALIBRATION, QUICK.tokens or 0, Context(seed=3))
    x = sample.inputs[3].float() @ pair_of(artifact).residual.float()
    (facts,) = [s for s in sites if (s["layer"], s["site"], s["rotation"]) == (1, "mlp", "learned")]
    assert facts["kurtosis"] == pytest.approx(scipy.stats.kurtosis(x, axis=-1, fisher=False).mean(), rel=1e-5)
    assert artifact.meta["tokens"] == {"passed": 6 * 24, "kept": 100}
    few = dataclasses.replace(QUICK, sequences=2).learn(model, CALIBRATION, Context())
    assert few.meta["tokens"] == {"passed": 48, "kept": 48}


# How spread is measured


def test_spread_against_numpy_and_scipy() -> None:
    x = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 3
    found, values = spread(x), x.flatten(0, 1).numpy()
    assert found.kurtosis == pytest.approx(
        scipy.stats.kurtosis(values, axis=-1, fisher=False).mean(), rel=1e-12
    )
    rms = np.sqrt((values**2).mean(-1))
    assert found.peak == pytest.approx((np.abs(values).max(-1) / rms).mean(), rel=1e-12)
    scale = 0.9 * np.abs(values).max(-1, keepdims=True) / 7
    noise = values - scale * np.clip(np.rint(values / scale), -8, 7)
    assert found.snr == pytest.approx(10 * np.log10((values**2).sum() / (noise**2).sum()), rel=1e-9)


def test_histograms_count_every_value_once() -> None:
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[0, 0] = 1e3
    scaled = (x / x.square().mean(-1, keepdim=True).sqrt()).numpy()
    want, _ = np.histogram(np.clip(scaled, -REACH, REACH - 1e-9), bins=BINS, range=(-REACH, REACH))
    assert histogram(x).tolist() == want.tolist()
    assert int(histogram(torch.full((1, 4), 1e30)).sum()) == 4


# Options


def test_presets() -> None:
    paper = KurTail(preset="paper")
    assert KurTail().calibration_shape() == (32, 512)
    assert paper.calibration_shape() == (512, 2048)
    assert (paper.recipe.steps, KurTail().recipe.steps) == (100, 300)
    tokens = torch.zeros(512, 2)
    assert paper.rounding_tokens(tokens).shape == (128, 2)
    assert KurTail().rounding_tokens(tokens) is tokens
    assert kurtail.UNIFORM == 9 / 5


@pytest.mark.parametrize(
    "text", ["axis=row", "distance=huber", "tokens=0", "steps=0", "rate=-1", "sequences=0"]
)
def test_refusals(text: str) -> None:
    with pytest.raises(UserError):
        parse_method(f"kurtail:{text}")


def test_it_composes_with_plans_and_not_with_rotations() -> None:
    assert parse_method("kurtail+rtn:rounding=rtn").rounding == "rtn"
    for other in ("quarot", "spinquant"):
        with pytest.raises(UserError, match="both transform the"):
            parse_method(f"kurtail+{other}")
