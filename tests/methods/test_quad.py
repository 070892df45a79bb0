"""QUAD: its function stays, what is kept stays in full precision, and with rank 0 it is QuaRot."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels import support
from methods import quad, rounding
from methods.bits import Bits, QuantiserSettings
from methods.checkpoint import Checkpoint, from_transformers
from methods.decoder import Block, Decoder
from methods.errors import UserError
from methods.footprint import effective_bits, linear_bits, model_bits
from methods.gptq import Hessian
from methods.kurtosis import block_input_kurtosis
from methods.method import Artifact, Context, default_plan
from methods.packed_checkpoint import load_packed, write_packed
from methods.quad import QUAD, widened_basis
from methods.quarot import QuaRot
from methods.registry import parse_method
from methods.transforms import READERS, WRITERS
from tests import families
from tests.families import reference_logits, relative
from tests.methods.small_checkpoint import CALIBRATION, run, save

IDS = families.tokens(2, 12, seed=21)
FEW = QUAD(rank=8)


def decoder(name: str, dtype: torch.dtype = torch.float64) -> Decoder:
    return from_transformers(families.model(name, dtype))


def transformed(model: Decoder, method: QUAD = FEW, seed: int = 3) -> Decoder:
    return method.transform(model, method.learn(model, CALIBRATION, Context(seed=seed)))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    names = ("llama-biases", "qwen3-qk-norm")
    return {name: save(tmp_path_factory.mktemp(name), name) for name in names}


# The function


@pytest.mark.parametrize("name", families.NAMES)
def test_function_is_preserved_on_every_family(name: str) -> None:
    model = transformed(decoder(name))
    want = reference_logits(families.model(name), IDS)
    width = families.model(name).config.hidden_size
    assert (model.config.hidden_size, model.config.norm_divisor) == (width + 8, width)
    assert relative(model(IDS), want) <= 1e-9
    cache = model.new_cache()
    parts = [model(part, cache=cache) for part in IDS.split([7, 1, 4], dim=1)]
    assert relative(torch.cat(parts, 1), want) <= 1e-9


@pytest.mark.parametrize("options", [{"rank": 5}, {"rank": 64}, {"normalised": True}, {"online": False}])
def test_function_is_preserved_by_every_option(options: dict[str, Any]) -> None:
    for name in ("llama-linear-rope", "llama-biases"):
        model = transformed(decoder(name), dataclasses.replace(FEW, **options))
        assert relative(model(IDS), reference_logits(families.model(name), IDS)) <= 1e-9


@pytest.mark.parametrize("name", families.NAMES)
def test_float32_error_is_at_most_three_times_the_plain_one(name: str) -> None:
    ids = families.tokens(2, 60, seed=5)
    plain = decoder(name, torch.float32)
    exact = copy.deepcopy(plain).double()(ids)
    own = relative(plain(ids), exact)
    assert relative(transformed(plain)(ids), exact) <= 3 * own


def undivided(model: Decoder, divisor: int) -> None:
    model.config = dataclasses.replace(model.config, hidden_size=model.embed_tokens.shape[1])


def biases_left(directions: Tensor, seed: int) -> Tensor:
    """The second part not projected: Q is then no isometry."""
    basis = widened_basis(directions, seed)
    rank = directions.shape[1]
    return torch.cat((basis[:, :rank], widened_basis(directions[:, :0], seed)), dim=1)


@pytest.mark.parametrize(("name", "wrong"), [("widen", undivided), ("widened_basis", biases_left)])
def test_mistakes_would_show(name: str, wrong: Any) -> None:
    with mock.patch.object(quad, name, wrong):
        model = transformed(decoder("llama-biases"))
    assert relative(model(IDS), reference_logits(families.model("llama-biases"), IDS)) > 1e-4


@pytest.mark.parametrize("name", ["llama-biases", "llama-gqa-tied"])
def test_the_published_mean_subtraction_is_another_function(name: str) -> None:
    """That of transformers' model whose embedding rows have mean 0, tied or not; and the notes say so."""
    method = QUAD(rank=8, centred=True)
    model = transformed(decoder(name), method)
    source = families.build(families.config(name, tie_word_embeddings=False))
    state = families.model(name).state_dict()
    rows = state["model.embed_tokens.weight"]
    state = {**state, "model.embed_tokens.weight": rows - rows.mean(1, keepdim=True)}
    source.load_state_dict(state)
    assert relative(model(IDS), reference_logits(source, IDS)) <= 1e-9
    assert relative(model(IDS), reference_logits(families.model(name), IDS)) > 1e-3
    said = [method.notes(decoder(name))[0], FEW.notes(decoder(name))[0]]
    assert "another one already" in said[0]
    assert "not subtracted" in said[1]


def test_centred_directions_are_those_of_the_centred_stream() -> None:
    model = decoder("llama-biases")
    method = QUAD(rank=4, centred=True)
    got = method.learn(model, CALIBRATION, Context()).tensors["directions"]
    quad.centre(model)
    want = QUAD(rank=4).learn(model, CALIBRATION, Context()).tensors["directions"]
    torch.testing.assert_close(got, want)
    plain = QUAD(rank=4).learn(decoder("llama-biases"), CALIBRATION, Context()).tensors["directions"]
    assert float((plain - got).abs().max()) > 1e-3


# The basis


@pytest.mark.parametrize("rank", [0, 1, 5, 8, 16])
def test_the_basis_is_an_isometry_of_two_parts(rank: int) -> None:
    model = decoder("llama-biases")
    method = dataclasses.replace(FEW, rank=rank)
    directions = method.learn(model, CALIBRATION, Context()).tensors["directions"]
    basis = widened_basis(directions, seed=4)
    assert basis.shape == (80, 80 + rank)
    assert float((basis @ basis.T - torch.eye(80, dtype=torch.float64)).abs().max()) <= 1e-12
    # The first coordinates span the directions, and no other holds anything of them.
    torch.testing.assert_close(basis[:, :rank] @ basis[:, :rank].T, directions @ directions.T)
    assert float((directions.T @ basis[:, rank:]).abs().max() if rank else 0.0) <= 1e-12


def test_rank_zero_is_quarot(checkpoints: dict[str, Checkpoint]) -> None:
    for rounding_name in ("rtn", "gptq"):
        ours, theirs = (
            run(checkpoints["llama-biases"], f"{method}rounding={rounding_name}", "w4a4kv4").decoder
            for method in ("quad:rank=0;", "quarot:")
        )
        assert torch.equal(ours(IDS), theirs(IDS))
    rotation = QuaRot().learn(decoder("llama-biases"), None, Context(seed=3)).tensors["residual"]
    empty = torch.empty(80, 0, dtype=torch.float64)
    torch.testing.assert_close(widened_basis(empty, 3), rotation)


def test_seeds_differ_and_repeat() -> None:
    model = decoder("llama-biases")
    first, again, other = (FEW.learn(model, CALIBRATION, Context(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first.tensors["directions"], again.tensors["directions"])
    assert torch.equal(first.tensors["directions"], other.tensors["directions"]), "text alone decides"
    bases = [widened_basis(found.tensors["directions"], found.meta["seed"]) for found in (first, other)]
    assert not torch.equal(*bases)


# Quantisers


def test_what_is_kept_stays(checkpoints: dict[str, Checkpoint]) -> None:
    """Kept columns are those of the widened weight, to the bit, under both roundings; the others are codes;
    o_proj and down_proj keep nothing, and their new outputs are rounded like the others."""
    method = parse_method("quad:rank=8").parts[0]
    widened = method.transform(
        model := checkpoints["llama-biases"].load(), method.learn(model, CALIBRATION, Context())
    )
    exact = dict(widened.linears())
    for rounding_name in ("rtn", "gptq"):
        made = run(checkpoints["llama-biases"], f"quad:rank=8;rounding={rounding_name}", "w4a4kv4")
        for name, linear in made.decoder.linears():
            kept = 8 if name.endswith(READERS) else 0
            assert linear.keep == made.plan.linears[name].keep == kept
            assert linear.quantised is not None
            assert linear.quantised.codes.shape == (linear.shape[0], linear.shape[1] - kept)
            assert torch.equal(linear.weight[:, :kept], exact[name].weight[:, :kept])
            assert not torch.equal(linear.weight[:, kept:], exact[name].weight[:, kept:])
        assert dict(made.decoder.linears())["layers.0.mlp.down_proj"].shape == (88, 144)


def test_the_hessian_is_of_the_quantised_channels(checkpoints: dict[str, Checkpoint]) -> None:
    seen: list[Tensor] = []

    class Spy(Hessian):
        def add(self, inputs: Tensor) -> None:
            seen.append(inputs.detach().clone())
            super().add(inputs)

    method = QUAD(rank=8)
    model = checkpoints["llama-biases"].load(torch.float64)
    model = method.transform(model, method.learn(model, CALIBRATION, Context()))
    read: list[Tensor] = []
    first = dict(model.linears())["layers.0.self_attn.q_proj"]
    first.observer = read.append
    model(CALIBRATION[:1])
    first.observer = None
    with mock.patch.object(rounding, "Hessian", Spy):
        run(checkpoints["llama-biases"], "quad:rank=8", "w4a4kv4", dtype=torch.float64)
    torch.testing.assert_close(seen[0], read[0][..., 8:])
    assert seen[0].shape[-1] == 80


def test_modes(checkpoints: dict[str, Checkpoint]) -> None:
    def widths(method: str, bits: str) -> dict[str, int]:
        plan = run(checkpoints["llama-biases"], method, bits).plan
        found = {name.split(".", 2)[2]: spec.activation for name, spec in plan.linears.items()}
        assert all(spec is not None for spec in found.values())
        return {name: spec.bits for name, spec in found.items() if spec is not None}

    four, eight = (dict.fromkeys((*READERS, *WRITERS), width) for width in (4, 8))
    mixed = {**four, **dict.fromkeys(WRITERS, 8)}
    assert widths("quad:rounding=rtn", "w4a4") == four
    assert widths("quad:rounding=rtn;a8=true", "w4a4") == mixed
    assert widths("quad:rounding=rtn", "w4a8") == widths("quad:rounding=rtn;a8=true", "w4a8") == eight
    plan = run(checkpoints["llama-biases"], "quad:rounding=rtn;a8=true", "w4a4").plan
    specs = [plan.linears[f"layers.0.{name}"].activation for name in (READERS[0], WRITERS[0])]
    assert [spec.clip for spec in specs if spec is not None] == [0.9, 1.0], "each width's default"
    assert (
        run(checkpoints["llama-biases"], "quad:a8=true;rounding=rtn", "w4a16")
        .plan.linears["layers.0.mlp.down_proj"]
        .activation
        is None
    )


def test_kept_channels_hold_what_is_large() -> None:
    """A model with two large channels in the stream: QUAD of rank 2 leaves a rest without outliers, and what
    is measured of block inputs is that of the rest."""
    source = families.build(families.config("qwen3-qk-norm"), torch.float64)
    source.model.embed_tokens.weight[:, [3, 50]] *= 40
    for layer in source.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight *= 0.02
    plain, model = from_transformers(source), from_transformers(source)
    method = QUAD(rank=2)
    artifact = method.learn(model, CALIBRATION, Context())
    assert artifact.meta["share"] > 0.7
    assert artifact.meta["tokens"] == {"passed": CALIBRATION.numel()}
    model = method.transform(model, artifact)
    before = block_input_kurtosis(plain, IDS)
    after = block_input_kurtosis(model, IDS)
    for old, new in zip(before, after, strict=True):
        assert new.value < 3 < old.value
        assert new.spread.snr > old.spread.snr + 3
    assert all(sum(site.counts) == IDS.numel() * 192 for site in after)


@pytest.mark.parametrize("bits", ["w4a4kv4", "w4a8", "w4a16"])
@pytest.mark.parametrize("options", ["", ";a8=true", ";rank=5"])
@pytest.mark.parametrize("name", ["llama-biases", "qwen3-qk-norm"])
def test_int4_does_what_was_simulated(
    checkpoints: dict[str, Checkpoint], name: str, bits: str, options: str
) -> None:
    method = f"quad:rounding=rtn{options}" + (";rank=16" if "rank" not in options else "")
    simulated, packed = (
        run(checkpoints[name], method, bits, dtype=torch.float64, execution=execution).decoder
        for execution in ("simulate", "int4")
    )
    assert relative(packed(IDS), simulated(IDS)) < 1e-9
    linear = dict(packed.linears())["layers.0.self_attn.q_proj"]
    assert linear.kept is not None
    assert linear.kept.shape[1] == (5 if "rank" in options else 16)


def test_a_packed_model_reopens_to_the_last_bit(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    packed = run(checkpoints["llama-biases"], "quad:rounding=rtn", "w4a4kv4", execution="int4").decoder
    write_packed(tmp_path, packed, checkpoints["llama-biases"].folder, {})
    again = load_packed(tmp_path)
    assert again.config.norm_divisor == 80
    assert torch.equal(again(IDS), packed(IDS))


# Bits


def test_effective_bits_count_everything_that_is_added() -> None:
    """Of SmolLM2-135M's shape, rank 64: a third more than plain 4 bits; by hand."""
    config = families.config("llama-gqa-tied", num_hidden_layers=1)
    plain = from_transformers(families.build(config, torch.float32))
    method, bits, settings = QUAD(rank=64), Bits.parse("w4a4"), QuantiserSettings()
    base = effective_bits(plain, default_plan(plain, bits, settings))
    parameters = sum(tensor.numel() for tensor in plain.parameters())
    own = 2 * 576 * (576 + 192) + 3 * 576 * 1536
    artifact = Artifact({"directions": torch.eye(576, 64, dtype=torch.float64)}, {"seed": 0})
    model = method.transform(plain, artifact)
    plan = method.plan(model, bits, settings, artifact, default_plan(model, bits, settings))
    found = effective_bits(model, plan)
    readers, writers = 576 + 2 * 192 + 2 * 1536, 576 + 1536
    kept, widened, scales = 64 * readers * 16, 64 * writers * 4, (readers + 2 * (576 + 64)) * 16
    assert found["weight"] == pytest.approx((4 * own + kept + widened + scales) / own)
    assert (kept + widened) / (4 * own) == pytest.approx(0.33, abs=0.005)
    assert base["weight"] == pytest.approx((4 * own + (readers + 2 * 576) * 16) / own)
    quantised = 5 * (16 * 64 + 4 * 576 + 16) + (4 * 576 + 16) + (4 * 1536 + 16)
    assert found["activation"] == pytest.approx(quantised / (6 * 576 + 1536))
    every = sum(linear_bits(linear, plan.linears[name]) for name, linear in model.linears())
    assert model_bits(model, plan) == every + 2 * 16 * families.VOCABULARY * (576 + 64)
    assert parameters == own + families.VOCABULARY * 576 + 3 * 576


# Options


def test_the_default_rank_is_one_that_kernels_take() -> None:
    pytest.importorskip("triton")
    for rows in (1, 64):
        found = [
            support.on_cuda(
                support.Case("linear", "", partial(support._linear, rows=rows, bits=4, inputs=576, keep=rank))
            )
            for rank in (QUAD().rank, QUAD().rank // 2)
        ]
        assert [answer.implementation.split(" ")[0] for answer in found] == ["triton", "reference"]


def test_presets_and_calibration() -> None:
    paper, tuned = QUAD(preset="paper"), QUAD(preset="paper", tune=True)
    assert QUAD().calibration_shape() == (32, 512)
    assert paper.calibration_shape() == (128, 2048)
    assert tuned.recipe == (400, 128, 1024, 1e-5)
    samples, length = tuned.calibration_shape()
    assert (samples - 128 - quad.HELD_OUT) * length == 400 * 128 * 1024
    tokens = torch.arange(20)[:, None]
    assert QUAD().rounding_tokens(tokens) is tokens
    assert QUAD(sequences=6).rounding_tokens(tokens).tolist() == tokens[:6].tolist()
    assert QUAD(tune=True).rounding_tokens(tokens).tolist() == tokens[:10].tolist()
    assert len(tuned.rounding_tokens(torch.zeros(samples, 1))) == 128
    assert quad.DECOMPOSED == (32, 512)


def test_the_decomposition_reads_no_more_than_the_papers_text() -> None:
    method, model = QUAD(rank=2, sequences=4), decoder("llama-biases")
    with mock.patch.object(quad, "DECOMPOSED", (3, 10)):
        got = method.learn(model, CALIBRATION, Context())
    want = method.learn(model, CALIBRATION[:3, :10], Context())
    assert torch.equal(got.tensors["directions"], want.tensors["directions"])
    assert got.meta["tokens"] == {"passed": 30}
    assert method.learn(model, CALIBRATION, Context()).meta["tokens"] == {"passed": 96}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank=-1", "give 0 or more"),
        ("sequences=0", "at least 1"),
        ("tune=true;steps=0", "at least 1"),
        ("tune=true;window=1", "at least 2"),
        ("tune=true;rate=0", "positive number"),
        ("tune=true;rate=inf", "positive number"),
        ("steps=5", "without tune=true has nothing to act on"),
    ],
)
def test_refusals(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_method(f"quad:{text}")


def test_more_directions_than_channels() -> None:
    with pytest.raises(UserError, match="rank 81: the stream has 80 channels"):
        QUAD(rank=81).learn(decoder("llama-biases"), CALIBRATION, Context())


def test_it_composes_with_plans_and_not_with_rotations() -> None:
    assert parse_method("quad+rtn:rounding=rtn").rounding == "rtn"
    with pytest.raises(UserError, match="both transform the"):
        parse_method("quad+quarot")


def test_blocks_are_widened_one_at_a_time() -> None:
    model = transformed(decoder("llama-linear-rope"))
    for block in model.layers:
        assert isinstance(block, Block)
        assert block.input_layernorm.divisor == block.post_attention_layernorm.divisor == 64
        assert {linear.keep for linear in (*block.self_attn.readers, *block.mlp.readers)} == {8}
        assert block.self_attn.o_proj.keep == block.mlp.down_proj.keep == 0
    assert model.norm.divisor == 64
