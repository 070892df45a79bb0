"""FPTQuant's transforms leave the function alone for any parameters, on every family, alone and together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.kv_reference import rotate
from methods import function_preserving
from methods.checkpoint import from_transformers
from methods.decoder import Block, Decoder
from methods.function_preserving import (
    LayerChange,
    Switches,
    apply,
    condition_numbers,
    hadamard_of,
    initial,
    layer_changes,
    orthogonal,
    residual_matrix,
    turn_pairs,
)
from methods.linear import OnlineHadamard
from methods.transforms import Edit
from tests import families
from tests.families import reference_logits, relative

IDS = families.tokens(2, 12, seed=21)
CONDITION = 10.0
NAMES = tuple(field.name for field in fields(Switches))
OFF = Switches(*[False] * len(NAMES))
KINDS = {
    "none": OFF,
    **{name: Switches(**{other: other == name for other in NAMES}) for name in NAMES},
    "all": Switches(),
}
ALL_BUT = {f"all but {name}": Switches(**{name: False}) for name in NAMES}


def drawn(model: Decoder, switches: Switches, size: float = 0.3) -> dict[str, Tensor]:
    """Random parameters, far from where they start, so that no transform is an identity or symmetric."""
    found = {}
    for number, (name, tensor) in enumerate(initial(model.config, switches, seed=3).items()):
        generator = torch.Generator().manual_seed(number)
        noise = size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        found[name] = tensor.double() + (0 if name == "residual.signs" else noise)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", families.NAMES)
def test_function_is_preserved_in_float64(name: str, kind: str) -> None:
    model = families.model(name)
    decoder = from_transformers(model)
    want = reference_logits(model, IDS)
    apply(decoder, drawn(decoder, KINDS[kind]), KINDS[kind], CONDITION)
    assert relative(decoder(IDS), want) <= 1e-9
    if kind in ("none", "all"):
        cache = decoder.new_cache()
        parts = [decoder(part, cache=cache) for part in IDS.split([7, 1, 4], dim=1)]
        assert relative(torch.cat(parts, 1), want) <= 1e-9


@pytest.mark.parametrize("name", families.NAMES)
def test_float32_error_is_at_most_three_times_the_plain_one(name: str) -> None:
    ids = families.tokens(2, 60, seed=5)
    plain = from_transformers(families.model(name, torch.float32))
    exact = copy.deepcopy(plain).double()(ids)
    own = relative(plain(ids), exact)
    apply(plain, drawn(plain, Switches(), 0.1), Switches(), CONDITION)
    assert relative(plain(ids), exact) <= 3 * own


@pytest.mark.parametrize("kind", ALL_BUT)
@pytest.mark.parametrize("name", ["llama-biases", "qwen3-qk-norm"])
def test_each_can_be_left_out(name: str, kind: str) -> None:
    model = families.model(name)
    decoder = from_transformers(model)
    apply(decoder, drawn(decoder, ALL_BUT[kind]), ALL_BUT[kind], CONDITION)
    assert relative(decoder(IDS), reference_logits(model, IDS)) <= 1e-9


def test_a_switch_adds_its_own_parameters_alone() -> None:
    decoder = from_transformers(families.model("llama-biases"))
    whole = initial(decoder.config, Switches(), 0)
    parts = [initial(decoder.config, KINDS[name], 0) for name in NAMES]
    assert sorted(whole) == sorted(name for part in parts for name in part)
    assert initial(decoder.config, KINDS["tokens"], 0) == initial(decoder.config, KINDS["hadamard"], 0) == {}


# What runs online


def online(decoder: Decoder) -> list[str]:
    every = decoder.named_modules(remove_duplicate=False)
    return [name for name, module in every if isinstance(module, OnlineHadamard)]


@pytest.mark.parametrize("kind", ["none", *NAMES, "all"])
def test_only_the_parts_that_the_paper_names_run_online(kind: str) -> None:
    """One Hadamard a layer, in front of down_proj, and the stream's scale; no further parameter."""
    decoder = from_transformers(families.model("llama-gqa-tied"))
    plain = {name: tensor.shape for name, tensor in decoder.state_dict().items()}
    apply(decoder, drawn(decoder, KINDS[kind]), KINDS[kind], CONDITION)
    layers = range(decoder.config.layers)
    has = kind in ("hadamard", "all")
    assert online(decoder) == [f"layers.{layer}.mlp.hidden_transform" for layer in layers if has]
    assert decoder.residual_scaling == (kind in ("tokens", "all"))
    after = {name: tensor.shape for name, tensor in decoder.state_dict().items()}
    gains = {name for name in plain if name.endswith("norm.weight")}
    assert after == {name: shape for name, shape in plain.items() if name not in gains}
    for block in decoder.layers:
        assert isinstance(block, Block)
        assert block.self_attn.rotation is None
        assert block.self_attn.output_transform is None


@pytest.mark.parametrize(("width", "block"), [(1536, 512), (576, 64), (4096, 4096), (44, 4), (160, 32)])
def test_blocks_are_the_largest_power_of_two(width: int, block: int) -> None:
    config = mock.Mock(intermediate_size=width)
    assert hadamard_of(config).size == block


def test_the_stream_stays_of_unit_size() -> None:
    """With the per-token scale every sum is entered by a stream of unit root mean square."""
    model = families.build(families.config("llama-biases"))
    model.model.embed_tokens.weight *= 50
    decoder = from_transformers(model)
    want = reference_logits(model, IDS)
    apply(decoder, {}, KINDS["tokens"], CONDITION)
    state = decoder.embed(IDS)
    for block in decoder.layers:
        assert isinstance(block, Block)
        state = decoder.through(block, state)
        assert float(state.stream.square().mean(-1).sqrt().max()) < 3
    plain = from_transformers(model)
    stream = plain.states(IDS).stream
    assert state.scale is not None
    assert relative(state.stream / state.scale, stream) <= 1e-9
    assert relative(decoder.logits(state), want) <= 1e-9


# The matrices


@settings(max_examples=25, deadline=None)
@given(size=st.integers(2, 12), scale=st.floats(0, 30), seed=st.integers(0, 99))
def test_cayley_is_orthogonal(size: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    skew = scale * torch.randn(3, size * (size - 1) // 2, generator=generator, dtype=torch.float64)
    matrix = orthogonal(skew, size)
    assert torch.allclose(
        matrix @ matrix.mT, torch.eye(size, dtype=torch.float64).expand_as(matrix), atol=1e-9
    )
    # Some processors solve several systems in another order than one.
    torch.testing.assert_close(orthogonal(skew[1], size), matrix[1], rtol=0, atol=1e-9)
    assert torch.equal(orthogonal(0 * skew[0], size), torch.eye(size, dtype=torch.float64))


def test_cayley_is_its_definition() -> None:
    skew = torch.tensor([0.5, -2.0, 0.25], dtype=torch.float64)
    a = torch.tensor([[0, 0.5, -2.0], [-0.5, 0, 0.25], [2.0, -0.25, 0]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(orthogonal(skew, 3), torch.linalg.inv(eye - a) @ (eye + a))


def test_the_residual_basis_starts_as_quarots() -> None:
    from methods.transforms import randomised_hadamard

    decoder = from_transformers(families.model("llama-gqa-tied"))
    parameters = initial(decoder.config, Switches(), seed=4)
    found = residual_matrix({name: tensor.double() for name, tensor in parameters.items()})
    assert found is not None
    torch.testing.assert_close(found, randomised_hadamard(576, 4), rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(size=st.floats(0, 1e6), condition=st.floats(1.01, 1e4), seed=st.integers(0, 99))
def test_value_transforms_cannot_become_singular(size: float, condition: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        "value.left": torch.randn(1, 2, 28, generator=generator, dtype=torch.float64),
        "value.right": torch.randn(1, 2, 28, generator=generator, dtype=torch.float64),
        "value.spread": size * torch.randn(1, 2, 8, generator=generator, dtype=torch.float64),
    }
    (change,) = layer_changes(parameters, 1, condition)
    assert change.value is not None
    assert change.value_inverse is not None
    assert float(torch.linalg.cond(change.value).max()) <= condition * (1 + 1e-9)
    eye = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
    assert torch.allclose(change.value @ change.value_inverse, eye, atol=1e-9 * condition)
    said = condition_numbers(parameters, condition)[0]
    torch.testing.assert_close(said, torch.linalg.cond(change.value), rtol=1e-6, atol=0)


def test_scales_are_bounded() -> None:
    parameters = {"hidden.scale": torch.tensor([[1e9, -1e9, 0.1]], dtype=torch.float64)}
    hidden = layer_changes(parameters, 1, 2.0)[0].hidden
    assert hidden is not None
    assert hidden.exp().tolist() == pytest.approx([32.0, 1 / 32.0, math.exp(0.1)], rel=1e-3)


def test_pairs_are_turned_as_rope_turns_them() -> None:
    """A rotation by an angle commutes with RoPE: it equals RoPE at another position."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2 * 8, 5, generator=generator, dtype=torch.float64)
    angle = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    x = rows.unflatten(0, (2, 8)).mT[None]  # [1, heads, T, D]
    want = 3 * rotate(x, angle.cos()[None, :, None], angle.sin()[None, :, None])
    got = turn_pairs(rows, angle, torch.full_like(angle, math.log(3)))
    torch.testing.assert_close(got.unflatten(0, (2, 8)).mT[None], want)


# Mutations: each mistake must break the bound by far


def wrong(function: Callable[..., Any], **changes: Any) -> Callable[..., Any]:
    """`layer_changes` with some of its results changed."""

    def changed(*arguments: Any, **named: Any) -> list[LayerChange]:
        return [
            replace(found, **{name: change(getattr(found, name)) for name, change in changes.items()})
            for found in function(*arguments, **named)
        ]

    return changed


def angle_inverted_for_queries(edit: Edit, name: str, turn: Callable[[Tensor], Tensor]) -> None:
    """q is turned back instead of along: the inverse rotation in place of the inverse transpose."""
    if name == "self_attn.q_proj":
        rows = edit.weights[name]
        eye = torch.eye(rows.shape[0], dtype=rows.dtype)
        edit.weights[name] = turn(eye).mT @ rows
        return
    original_rows(edit, name, turn)


def biases_forgotten(edit: Edit, name: str, turn: Callable[[Tensor], Tensor]) -> None:
    edit.weights[name] = turn(edit.weights[name])


original_rows = function_preserving._rows
original_changes = function_preserving.layer_changes


@pytest.mark.parametrize(
    ("attribute", "mistake", "kind"),
    [
        ("_rows", angle_inverted_for_queries, "pre_rope"),
        ("_rows", biases_forgotten, "pre_rope"),
        ("_rows", biases_forgotten, "value"),
        ("_rows", biases_forgotten, "up_down"),
        ("layer_changes", wrong(original_changes, value_inverse=lambda x: x.mT), "value"),
        ("layer_changes", wrong(original_changes, value_inverse=lambda x: x.roll(1, 0)), "value"),
    ],
)
def test_planted_mistakes_are_seen(attribute: str, mistake: Callable[..., None], kind: str) -> None:
    model = families.model("llama-biases")
    decoder = from_transformers(model)
    parameters = drawn(decoder, KINDS[kind])
    with mock.patch.object(function_preserving, attribute, mistake):
        apply(decoder, parameters, KINDS[kind], CONDITION)
    assert not relative(decoder(IDS), reference_logits(model, IDS)) <= 1e-4
