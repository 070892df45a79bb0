"""The decomposition of the residual stream against transformers' own stream, numpy's SVD and closed forms."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methods.checkpoint import from_transformers
from methods.decomposition import principal_directions, second_moment, widening
from methods.method import Context
from tests import families

CALIBRATION = families.tokens(5, 24, seed=32)


def streams_of_transformers(name: str, ids: Tensor) -> Tensor:
    """What enters both norms of every layer, [rows, hidden], by hooks on transformers' model in float64."""
    model = families.build(families.config(name), torch.float64)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    families.reference_logits(model, ids)
    assert len(seen) == 2 * len(model.model.layers), "the final norm is not among them"
    return torch.cat(seen)


@pytest.mark.parametrize("name", families.NAMES)
def test_the_moment_is_that_of_the_stream_before_both_norms(name: str) -> None:
    decoder = from_transformers(families.model(name))
    before = copy.deepcopy(decoder.state_dict())
    x = streams_of_transformers(name, CALIBRATION)
    got = second_moment(decoder, CALIBRATION, Context())
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, x.T @ x / len(x), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(tensor, before[key]) for key, tensor in decoder.state_dict().items())


def test_normalised_rows_count_alike() -> None:
    x = streams_of_transformers("llama-biases", CALIBRATION)
    x = x / x.square().mean(1, keepdim=True).sqrt()
    decoder = from_transformers(families.model("llama-biases"))
    got = second_moment(decoder, CALIBRATION, Context(), normalised=True)
    torch.testing.assert_close(got, x.T @ x / len(x), rtol=1e-9, atol=1e-12)
    assert float(got.trace()) == pytest.approx(x.shape[1])


def test_sums_are_in_float64() -> None:
    """A float32 model with one token of huge norm: the sum of squares of the others survives beside it."""
    model = families.build(families.config("llama-linear-rope"), torch.float32)
    model.model.embed_tokens.weight[7] *= 3e4
    decoder = from_transformers(model)
    ids = families.tokens(4, 30, seed=1).masked_fill(families.tokens(4, 30, seed=1) == 7, 8)
    ids[0, 0] = 7
    exact = second_moment(copy.deepcopy(decoder).double(), ids, Context())
    got = second_moment(decoder, ids, Context())
    smallest = torch.linalg.eigvalsh(exact)[0]
    assert float((got - exact).diagonal().abs().max()) < 1e-5 * float(exact.diagonal().max())
    assert float(torch.linalg.eigvalsh(got)[0]) == pytest.approx(float(smallest), rel=1e-2)
    assert float(exact.diagonal().max() / smallest) > 1e7, "float32 sums would have lost it"


@settings(max_examples=30)
@given(width=st.integers(2, 24), data=st.data())
def test_directions_are_the_first_singular_vectors(width: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, width))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    x = torch.randn(3 * width, width, generator=generator, dtype=torch.float64)
    x *= 1.3 ** torch.arange(width, dtype=torch.float64)  # apart from each other
    directions, share = principal_directions(x.T @ x, rank)
    _, values, vectors = np.linalg.svd(x.numpy(), full_matrices=False)
    overlaps = np.abs((vectors[:rank] * directions.T.numpy()).sum(1))
    assert directions.shape == (width, rank)
    np.testing.assert_allclose(overlaps, 1, atol=1e-6)
    assert share == pytest.approx((values[:rank] ** 2).sum() / (values**2).sum())
    if rank:
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        assert bool((largest > 0).all()), "eigenvectors have no sign; ours have"
    basis = widening(directions)
    assert basis.shape == (width, width + rank)
    assert float((basis @ basis.T - torch.eye(width, dtype=torch.float64)).abs().max()) <= 1e-12
    rows = x / x.norm(dim=1, keepdim=True)
    split = rows @ basis
    torch.testing.assert_close(split.norm(dim=1), torch.ones(len(x), dtype=torch.float64))
    torch.testing.assert_close(split[:, :rank], rows @ directions)
    assert float((split[:, rank:] @ directions).abs().max() if rank else 0.0) <= 1e-12, (
        "the rest is free of them"
    )
