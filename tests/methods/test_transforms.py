"""Rotations leave the function alone and change everything else: on every family, one by one and together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import scipy.stats
import torch
from torch import Tensor

from methods import transforms
from methods.checkpoint import from_transformers
from methods.decoder import Block, Decoder
from methods.kurtosis import block_input_kurtosis
from methods.linear import Linear, OnlineHadamard
from methods.method import Context
from methods.quarot import QuaRot
from methods.transforms import Edit, Rotations, block_size, hadamard_rows, randomised_hadamard, rotate
from tests import families
from tests.families import reference_logits, relative

IDS = families.tokens(2, 12, seed=21)


def orthogonal(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix: neither symmetric nor a Hadamard matrix, so orientations cannot hide."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def rotations(model: Decoder, kind: str) -> Rotations:
    """One slot alone, or all together."""
    config = model.config
    shared = [orthogonal(config.head_dim, 100 + layer) for layer in range(config.layers)]
    per_head = [
        torch.stack([orthogonal(config.head_dim, 10 * layer + head) for head in range(config.kv_heads)])
        for layer in range(config.layers)
    ]
    residual = orthogonal(config.hidden_size, 1)
    query_key = OnlineHadamard(block_size(config.head_dim))
    # 9 heads have no Hadamard matrix and 14 have blocks of 2: then neighbouring heads are mixed.
    across = OnlineHadamard(block_size(config.heads), inner=config.head_dim)
    hidden = OnlineHadamard(block_size(config.intermediate_size))
    return {
        "norms": Rotations(),
        "R1": Rotations(residual=residual),
        "R2": Rotations(values=shared),
        "R2 per KV head": Rotations(values=per_head),
        "R3": Rotations(query_key=query_key),
        "cross-head": Rotations(attention_output=across),
        "R4": Rotations(hidden=hidden),
        "all": Rotations(residual, per_head, query_key, across, hidden),
    }[kind]


KINDS = ("norms", "R1", "R2", "R2 per KV head", "R3", "cross-head", "R4", "all")


def quarot(model: Decoder) -> Decoder:
    method = QuaRot()
    return method.transform(model, method.learn(model, None, Context(seed=3)))


@pytest.mark.parametrize("kind", [*KINDS, "quarot"])
@pytest.mark.parametrize("name", families.NAMES)
def test_function_is_preserved_in_float64(name: str, kind: str) -> None:
    model = families.model(name)
    decoder = from_transformers(model)
    want = reference_logits(model, IDS)
    changed = quarot(decoder) if kind == "quarot" else rotate(decoder, rotations(decoder, kind))
    assert relative(changed(IDS), want) <= 1e-9
    cache = changed.new_cache()
    parts = [changed(part, cache=cache) for part in IDS.split([7, 1, 4], dim=1)]
    assert relative(torch.cat(parts, 1), want) <= 1e-9


@pytest.mark.parametrize("name", families.NAMES)
def test_float32_error_is_at_most_three_times_the_plain_one(name: str) -> None:
    """Errors of both against the same float32 weights run in float64. Two sequences of sixty tokens: one
    unlucky logit does not decide."""
    ids = families.tokens(2, 60, seed=5)
    plain = from_transformers(families.model(name, torch.float32))
    exact = copy.deepcopy(plain).double()(ids)
    own = relative(plain(ids), exact)
    rotated = quarot(plain)
    assert rotated.dtype == torch.float32
    assert relative(rotated(ids), exact) <= 3 * own


# Mutations: each of these mistakes must break the bound by far, or the test above could not fail.


def values_transposed(edit: Edit, matrix: Tensor, kv_heads: int, heads: int) -> None:
    right = transforms_rotate_values
    wrong = copy.deepcopy(edit)
    right(wrong, matrix.mT.contiguous(), kv_heads, heads)
    right(edit, matrix, kv_heads, heads)
    edit.weights["self_attn.o_proj"] = wrong.weights["self_attn.o_proj"]


def values_without_bias(edit: Edit, matrix: Tensor, kv_heads: int, heads: int) -> None:
    bias = edit.biases["self_attn.v_proj"]
    transforms_rotate_values(edit, matrix, kv_heads, heads)
    edit.biases["self_attn.v_proj"] = bias


def heads_of_another_group(edit: Edit, matrix: Tensor, kv_heads: int, heads: int) -> None:
    transforms_rotate_values(edit, matrix, kv_heads, heads)
    output = edit.weights["self_attn.o_proj"].unflatten(1, (heads, -1))
    edit.weights["self_attn.o_proj"] = output.roll(1, dims=1).flatten(1)


def write_transposed(self: Edit, name: str, change: Tensor) -> None:
    self.weights[name] = change @ self.weights[name]
    if name in self.biases:
        self.biases[name] = self.biases[name] @ change


def write_without_bias(self: Edit, name: str, change: Tensor) -> None:
    self.weights[name] = change.T @ self.weights[name]


def read_transposed(self: Edit, name: str, change: Tensor) -> None:
    self.weights[name] = self.weights[name] @ change.T


def online_inverted(edit: Edit, name: str, transform: OnlineHadamard) -> None:
    edit.weights[name] = transform(edit.weights[name], inverse=True)


def gain_dropped(edit: Edit, norm: object, readers: tuple[str, ...]) -> None:
    norm.weight = None  # type: ignore[attr-defined]


def gain_left(edit: Edit, norm: object, readers: tuple[str, ...]) -> None:
    """Neither folded nor taken: then it stands behind a rotated norm."""


transforms_rotate_values = transforms._rotate_values
MUTATIONS: list[tuple[object, str, Callable[..., None], str, str]] = [
    (transforms, "_rotate_values", values_transposed, "llama-biases", "R2"),
    (transforms, "_rotate_values", values_without_bias, "llama-biases", "R2"),
    (transforms, "_rotate_values", heads_of_another_group, "llama-biases", "R2 per KV head"),
    (Edit, "write", write_transposed, "llama3-scaled-rope", "R1"),
    (Edit, "write", write_without_bias, "llama-biases", "R1"),
    (Edit, "read", read_transposed, "llama3-scaled-rope", "R1"),
    (transforms, "merge_online", online_inverted, "llama-gqa-tied", "R4"),  # 1536 = 12 * 128, not symmetric
    (transforms, "_fold_gain", gain_dropped, "mistral-window", "norms"),
    (transforms, "_fold_gain", gain_left, "mistral-window", "R1"),
]


@pytest.mark.parametrize(("owner", "attribute", "mistake", "name", "kind"), MUTATIONS)
def test_planted_mistakes_are_seen(
    owner: object, attribute: str, mistake: Callable[..., None], name: str, kind: str
) -> None:
    model = families.model(name)
    decoder = from_transformers(model)
    with mock.patch.object(owner, attribute, mistake):
        rotate(decoder, rotations(decoder, kind))
    assert not relative(decoder(IDS), reference_logits(model, IDS)) <= 1e-4


# What a rotation does change


def every_linear(decoder: Decoder) -> dict[str, Tensor]:
    return {name: linear.weight.clone() for name, linear in decoder.linears()}


def test_quarot_changes_every_weight_and_folds_every_norm() -> None:
    decoder = from_transformers(families.model("llama-gqa-tied"))
    before, embedding = every_linear(decoder), decoder.embed_tokens.clone()
    quarot(decoder)
    for name, weight in every_linear(decoder).items():
        assert float((weight - before[name]).norm() / before[name].norm()) > 0.5, name
    assert relative(decoder.embed_tokens, embedding) > 0.1
    assert decoder.norm.weight is None
    for block in decoder.layers:
        assert isinstance(block, Block)
        assert block.input_layernorm.weight is None
        assert block.post_attention_layernorm.weight is None
        assert isinstance(block.mlp.hidden_transform, OnlineHadamard)
        assert isinstance(block.self_attn.rotation, OnlineHadamard)
        assert block.self_attn.output_transform is None  # 9 heads


def test_tied_head_is_untied_and_said_so() -> None:
    decoder = from_transformers(families.model("llama-gqa-tied"))
    assert decoder.lm_head.weight is decoder.embed_tokens
    assert rotate(decoder, Rotations()).config.tied is False
    assert decoder.lm_head.weight.data_ptr() != decoder.embed_tokens.data_ptr()


def test_outlier_channels_are_spread() -> None:
    """Two channels of the stream 40 times the others, as real models have them; kurtosis by scipy."""
    model = families.build(families.config("llama-gqa-tied", tie_word_embeddings=False))
    outliers = [17, 300]
    model.model.embed_tokens.weight[:, outliers] *= 40
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[outliers] *= 40
        layer.mlp.down_proj.weight[outliers] *= 40
    decoder = from_transformers(model)
    seen: dict[str, list[float]] = {"before": [], "after": []}

    def watch(linear: Linear, when: str) -> None:
        def observe(x: Tensor) -> None:
            seen[when] += scipy.stats.kurtosis(x.flatten(0, -2).numpy(), axis=-1, fisher=False).tolist()

        linear.observer = observe

    for when in ("before", "after"):
        meter = [site.value for site in block_input_kurtosis(decoder, IDS)]
        for name, linear in decoder.linears():
            if name.endswith(("q_proj", "gate_proj")):
                watch(linear, when)
        decoder(IDS)
        assert sum(meter) / len(meter) == pytest.approx(sum(seen[when]) / len(seen[when]), rel=1e-9)
        if when == "before":
            assert sum(meter) / len(meter) > 50
            quarot(decoder)
    assert max(seen["after"]) < 10


def test_online_hadamards_gaussianise_the_hidden_activations() -> None:
    """R4 spreads one large channel of down_proj's input over all."""
    x = torch.zeros(3, 1536, dtype=torch.float64)
    x[:, 5] = 1.0
    spread = OnlineHadamard(1536)(x)
    assert torch.allclose(spread.abs(), torch.full_like(spread, 1536**-0.5))
    assert torch.allclose(OnlineHadamard(1536)(spread, inverse=True), x, atol=1e-12)


def test_cross_head_hadamard_is_a_kronecker_product() -> None:
    x = torch.randn(5, 12 * 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    across = hadamard_rows(torch.eye(12, dtype=torch.float64))
    want = x @ torch.kron(across, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(OnlineHadamard(12, inner=8)(x), want)
    blocks = x @ torch.kron(torch.eye(8, dtype=torch.float64), across)
    torch.testing.assert_close(OnlineHadamard(12)(x), blocks)
    half = x.to(torch.bfloat16)
    assert torch.equal(OnlineHadamard(12)(half), OnlineHadamard(12)(half.float()).to(torch.bfloat16))


@pytest.mark.parametrize("size", [64, 576, 896, 9, 14])
def test_randomised_hadamard(size: int) -> None:
    matrix = randomised_hadamard(size, seed=4)
    torch.manual_seed(123)
    assert torch.equal(randomised_hadamard(size, seed=4), matrix)
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    if size > 9:  # 9 has blocks of one: only signs
        assert not torch.equal(randomised_hadamard(size, seed=5), matrix)
    entries = matrix.abs()
    filled = entries[entries > 1e-9]
    assert torch.allclose(filled, torch.full_like(filled, block_size(size) ** -0.5))


# Traits that no family of transformers has


def test_rotating_with_single_scale_norms_and_embedding_projections() -> None:
    model = families.model("llama-biases")
    width = model.config.hidden_size
    projections = {
        f"embed_{way}.weight": orthogonal(width, seed) * 1.3 for way, seed in (("in", 7), ("out", 8))
    }
    gains = {
        name.removeprefix("model."): parameter[:1].clone()
        for name, parameter in model.named_parameters()
        if name == "model.norm.weight" or name.endswith("layernorm.weight")
    }
    decoder = families.rebuilt(
        model, {**projections, **gains}, single_scale_norm=True, embedding_projections=True
    )
    want = decoder(IDS)
    rotated = rotate(decoder, rotations(decoder, "all"))
    assert rotated.embed_in is None
    assert rotated.embed_out is None
    assert relative(rotated(IDS), want) <= 1e-9


def test_rotating_under_residual_scaling() -> None:
    model = families.model("llama-biases")
    decoder = from_transformers(model)
    decoder.residual_scaling = True
    assert relative(quarot(decoder)(IDS), reference_logits(model, IDS)) <= 1e-9


def test_a_widened_residual_basis() -> None:
    """R1 may have more columns than rows: a stream of 96 channels, normalised by its original 80."""
    model = families.model("llama-biases")
    decoder = from_transformers(model)
    wide = orthogonal(96, 9)[:80]
    rotate(decoder, Rotations(residual=wide))
    assert decoder.embed_tokens.shape[1] == 96
    norms = [decoder.norm]
    for block in decoder.layers:
        assert isinstance(block, Block)
        norms += [block.input_layernorm, block.post_attention_layernorm]
    for norm in norms:
        norm.divisor = 80
    assert relative(decoder(IDS), reference_logits(model, IDS)) <= 1e-9


def test_rotating_twice_composes() -> None:
    model = families.model("mistral-window")
    decoder = from_transformers(model)
    rotate(decoder, rotations(decoder, "R1"))
    rotate(decoder, rotations(decoder, "R2 per KV head"))
    assert relative(decoder(IDS), reference_logits(model, IDS)) <= 1e-9
