"""Activation sensitivity and kurtosis of weights, against plain repetitions of what they say."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods import sensitivity
from methods.bits import LinearSpec
from methods.checkpoint import from_transformers
from methods.decoder import Decoder
from methods.method import Context
from methods.quarot import QuaRot
from methods.rtn import round_to_nearest
from methods.sensitivity import (
    PARTS,
    activation_sensitivity,
    aligned,
    measuring,
    of_matrices,
    pearson_kurtosis,
    rank_correlation,
    weight_kurtosis,
)
from tests import families

IDS = families.tokens(3, 20, seed=3)
ROUNDER, SPEC = measuring("rtn")


def decoder(name: str = "llama-biases") -> Decoder:
    return from_transformers(families.model(name, torch.float64))


@pytest.mark.parametrize("name", ["llama-biases", "qwen3-qk-norm", "mistral-window"])
@pytest.mark.parametrize("rotated", [False, True])
def test_by_hand(name: str, rotated: bool) -> None:
    """With copies of whole models in which one part of one layer is rounded: the output that is compared is
    what that part puts on the stream, so the stream behind it differs by just that."""
    model = decoder(name)
    if rotated:
        method = QuaRot()
        model = method.transform(model, method.learn(model, None, Context()))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = activation_sensitivity(model, IDS, Context(), rounder=ROUNDER, spec=SPEC)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(linear.observer is None for _, linear in model.linears())
    for layer in range(model.config.layers):
        for part, names in PARTS.items():
            other = copy.deepcopy(model)
            linears = dict(other.linears())
            for linear in (linears[f"layers.{layer}.{leaf}"] for leaf in names):
                linear.set_weight(round_to_nearest(linear.weight, SPEC).dequantise())
            where = "self_attn" if part.startswith("attn") else "mlp"
            outputs = []
            for one in (model, other):
                block = one.get_submodule(f"layers.{layer}.{where}")
                seen: list[torch.Tensor] = []
                hook = block.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
                one(IDS)
                hook.remove()
                outputs.append(seen[0])
            exact, rounded = outputs
            squares = (exact - rounded).square()
            assert found["mse"][part][layer] == pytest.approx(float(squares.mean()), rel=1e-9)
            normalised = float(squares.sum() / exact.abs().sum())
            assert found["normalised"][part][layer] == pytest.approx(normalised, rel=1e-9)


def test_matrices_have_the_value_of_their_part() -> None:
    parts = {part: [float(number)] for number, part in enumerate(PARTS)}
    own = of_matrices(parts, own_output=True)
    assert own == {
        **{f"self_attn.{name}_proj": [0.0] for name in "qkv"},
        "self_attn.o_proj": [1.0],
        **{f"mlp.{name}_proj": [2.0] for name in ("gate", "up")},
        "mlp.down_proj": [3.0],
    }
    assert of_matrices(parts, own_output=False) == own | {"self_attn.o_proj": [0.0]}


@given(st.integers(0, 50), st.sampled_from([1, 7, 64, 1 << 20]))
def test_kurtosis_against_scipy(seed: int, piece: int) -> None:
    weight = torch.from_numpy(np.random.default_rng(seed).standard_t(3, (24, 40))).float()
    expected = scipy.stats.kurtosis(weight.double().numpy(), axis=None, fisher=False, bias=True)
    size, sensitivity._VALUES = sensitivity._VALUES, piece
    try:
        assert pearson_kurtosis(weight) == pytest.approx(float(expected), rel=1e-9)
    finally:
        sensitivity._VALUES = size


def test_kurtosis_of_every_matrix() -> None:
    model = decoder()
    found = weight_kurtosis(model, Context())
    for name, linear in model.linears():
        _, layer, rest = name.split(".", 2)
        expected = scipy.stats.kurtosis(linear.weight.numpy(), axis=None, fisher=False)
        assert found[rest][int(layer)] == pytest.approx(float(expected), rel=1e-9)
    assert np.isnan(pearson_kurtosis(torch.ones(4, 4)))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=20))
def test_rank_correlation_against_scipy(pairs: list[tuple[int, int]]) -> None:
    first, second = ([float(pair[i]) for pair in pairs] for i in (0, 1))
    if len(set(first)) == 1 or len(set(second)) == 1:
        return
    expected = float(scipy.stats.spearmanr(first, second).statistic)
    assert rank_correlation(first, second) == pytest.approx(expected, abs=1e-9)


def test_models_of_other_depth_are_read_at_the_same_places() -> None:
    deep = [float(x) for x in range(41)]
    assert aligned([1.0, 2.0, 3.0, 4.0, 9.0], deep) == (
        [1.0, 2.0, 3.0, 4.0, 9.0],
        [0.0, 10.0, 20.0, 30.0, 40.0],
    )
    assert aligned(deep, [4.0, 3.0, 1.0]) == ([0.0, 20.0, 40.0], [4.0, 3.0, 1.0])
    assert aligned([0.0, 1.0, 4.0], [0.0, 1.0, 2.0, 6.0])[1] == [0.0, 1.5, 6.0]
    assert aligned(deep, deep) == (deep, deep)
    assert rank_correlation(*aligned(deep, [4.0, 3.0, 2.0])) == pytest.approx(-1.0)
    assert np.isnan(rank_correlation([1.0, 2.0], [1.0, 2.0]))


def test_measured_by_hqq_unless_asked() -> None:
    rounder, spec = measuring("hqq", axis=0, meta=True)
    assert (spec.bits, spec.group, spec.axis, spec.meta, spec.fractional) == (4, 64, 0, True, True)
    assert rounder(weight=torch.randn(64, 64), spec=spec).zero is not None
    assert measuring("rtn") == (
        round_to_nearest,
        LinearSpec(4, 64, symmetric=False, search=False, fractional=True),
    )
