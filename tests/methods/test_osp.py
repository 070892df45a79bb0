"""OSP's checkpoints are recognised, others refused; published kurtosis, by closed forms and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from methods.bits import Bits
from methods.checkpoint import Checkpoint, from_transformers, open_checkpoint
from methods.decoder import Block, Decoder
from methods.errors import NotApplicableError, UserError
from methods.ffn_hadamard import FFNHadamard
from methods.kurtosis import excess_by_layer, published_excess, token_kurtosis
from methods.linear import OnlineHadamard
from methods.method import Artifact, Context
from methods.osp import KURTOSIS_BOUND, OSP, objection, token_excess
from methods.pipeline import quantise
from methods.registry import parse_method
from tests import families
from tests.families import reference_logits, relative

NAME = "llama3-scaled-rope"
IDS = families.tokens(2, 24, seed=9)


def saved(
    folder: Path, change: Callable[[transformers.PreTrainedModel], None], recipe: str | None = None
) -> Checkpoint:
    """A checkpoint as the hub has them, its weights changed."""
    model = families.build(families.config(NAME), torch.float32)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    if recipe is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantgrid_recipe": recipe}))
    return open_checkpoint(str(folder))


def constant(model: torch.nn.Module, scale: float = 1.7) -> None:
    """Norm vectors that repeat one value, each norm its own, as published OSP checkpoints have them."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith("norm.weight"):
            parameter.fill_(scale + 0.1 * number)


def outlier(model: torch.nn.Module) -> None:
    constant(model)
    model.get_parameter("model.embed_tokens.weight")[:, 5] = 40.0


def test_constant_norms_and_low_kurtosis_are_taken(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, constant)
    model = checkpoint.load()
    assert 0 <= token_excess(model) < KURTOSIS_BOUND
    assert objection(model) is None
    quantised = quantise(checkpoint, parse_method("osp"), Bits.parse("w4a4kv4"), Context())
    plain = quantise(checkpoint, parse_method("rtn"), Bits.parse("w4a4kv4"), Context())
    assert torch.equal(quantised.decoder(IDS), plain.decoder(IDS)), "there is nothing left to transform"
    assert "by its norms and its kurtosis" in quantised.notes[0]


@pytest.mark.parametrize(
    ("change", "recipe", "said"),
    [
        (lambda model: None, None, "the gains of this one's layers.0.input_layernorm differ"),
        (outlier, None, "its norms|norms are constant but its excess kurtosis is"),
        (constant, "muon+ssnorm", r"trained by the recipe muon\+ssnorm"),
        (constant, "adam", "trained by the recipe adam"),
    ],
    ids=["gains", "kurtosis", "another recipe", "adam"],
)
def test_others_are_refused(
    change: Callable[[transformers.PreTrainedModel], None], recipe: str | None, said: str, tmp_path: Path
) -> None:
    checkpoint = saved(tmp_path, change, recipe)
    for method in ("osp", "osp+ffn_hadamard", "osp:rounding=gptq"):
        with pytest.raises(NotApplicableError, match=said) as caught:
            quantise(
                checkpoint,
                parse_method(method),
                Bits.parse("w4a4kv4"),
                Context(),
                calibration=families.tokens(2, 8),
            )
        assert len(str(caught.value).splitlines()) == 1


def test_the_configs_word_is_taken_for_models_trained_here(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, outlier, "osp")
    assert objection(checkpoint.load()) is None
    assert OSP().notes(checkpoint.load())[0] == "recognised by its config"


def test_it_composes_with_what_comes_behind(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, constant)
    calibration = families.tokens(4, 24, seed=2)
    for method in ("osp+quarot", "osp+kurtail:steps=2;tokens=16;batch=8", "osp+ffn_hadamard:rounding=gptq"):
        found = quantise(
            checkpoint, parse_method(method), Bits.parse("w4a4kv4"), Context(), calibration=calibration
        )
        bare = quantise(
            checkpoint,
            parse_method(method.removeprefix("osp+")),
            Bits.parse("w4a4kv4"),
            Context(),
            calibration=calibration,
        )
        assert torch.equal(found.decoder(IDS), bare.decoder(IDS))
    with pytest.raises(UserError, match="hidden seam"):
        parse_method("quarot+ffn_hadamard")


@pytest.mark.parametrize("name", families.NAMES)
def test_ffn_hadamard_leaves_the_function_and_mixes_the_hidden_channels(name: str) -> None:
    model = from_transformers(families.model(name))
    seen: list[torch.Tensor] = []

    def hidden(model: Decoder) -> torch.Tensor:
        seen.clear()
        block = model.layers[0]
        assert isinstance(block, Block)
        block.mlp.down_proj.observer = seen.append
        logits = model(IDS)
        block.mlp.down_proj.observer = None
        assert relative(logits, reference_logits(families.model(name), IDS)) <= 1e-9
        return seen[0]

    before = hidden(model)
    untouched = {
        key: value.clone() for key, value in model.state_dict().items() if "down_proj.weight" not in key
    }
    after = hidden(FFNHadamard().transform(model, Artifact()))
    now = model.state_dict()
    assert {key for key in now if "down_proj.weight" not in key} == untouched.keys()
    for key, value in untouched.items():  # gains of norms among them
        assert torch.equal(now[key], value), key
    transform = model.get_submodule("layers.0.mlp").hidden_transform
    assert isinstance(transform, OnlineHadamard)
    torch.testing.assert_close(after, transform(before), rtol=0, atol=1e-9)
    assert not torch.allclose(after, before, atol=1e-3)


# Kurtosis


def test_published_kurtosis_is_what_its_script_computes() -> None:
    rows = np.random.default_rng(0).standard_t(4, size=(50, 64)) + 0.3
    expected = np.maximum((rows**4).mean(1) / rows.std(1, ddof=1) ** 4 - 3, 0)
    np.testing.assert_allclose(published_excess(torch.tensor(rows)).numpy(), expected, rtol=1e-12)
    centred = torch.tensor(rows - rows.mean(1, keepdims=True))
    both = token_kurtosis(centred) * (63 / 64) ** 2 - 3
    torch.testing.assert_close(published_excess(centred), both.clamp(min=0))


def test_one_channel_among_many_has_the_kurtosis_of_their_number() -> None:
    row = torch.zeros(1, 400)
    row[0, 17] = 3.0
    assert float(token_kurtosis(row)) == pytest.approx(400, rel=0.01)
    assert float(published_excess(row)) == pytest.approx(397, rel=0.01)


@pytest.mark.parametrize("alone", [False, True])
def test_hidden_states_are_those_of_transformers(alone: bool) -> None:
    reference = families.model(NAME)
    ids = IDS.reshape(-1, 1) if alone else IDS
    with torch.no_grad():
        states = reference(ids, output_hidden_states=True).hidden_states
    expected = [float(published_excess(state).mean()) for state in states]
    found = excess_by_layer(from_transformers(reference), IDS, alone)
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(found) == reference.config.num_hidden_layers + 1
