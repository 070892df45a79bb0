"""The pass is the decoder's, its gradients are transformers', and absorption keeps the logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from methods.checkpoint import open_checkpoint
from methods.decoder import Decoder
from tests.training import small_data
from training.model import NextToken, final_hidden, new_model, plain, save_plain
from training.recipe import RECIPES, Shape

SHAPE = Shape(layers=3, width=48, heads=3, hidden=80)
VOCABULARY = 97
LENGTH = 24


def ids(seed: int = 0, rows: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def model(recipe: str, spread: float = 0.3) -> Decoder:
    """A model with every parameter moved at random, so that no gain is 1 and no projection orthogonal."""
    found = new_model(SHAPE.config(RECIPES[recipe], VOCABULARY, 64), seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in found.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=spread if parameter.ndim < 2 else 0.1)
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_pass_is_the_decoders(recipe: str) -> None:
    found = model(recipe).double()
    logits = torch.nn.functional.linear(final_hidden(found, ids()), found.lm_head.weight)
    torch.testing.assert_close(logits, found(ids()), rtol=0, atol=1e-11)
    assert (found.embed_in is not None) == RECIPES[recipe].projections
    assert (found.norm.weight is not None) and (found.norm.weight.numel() == 1) == RECIPES[
        recipe
    ].single_scale_norm


def llama(found: Decoder) -> transformers.LlamaForCausalLM:
    config = found.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.rms_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
        )
    ).double()
    state = {
        {"embed_tokens": "model.embed_tokens.weight", "lm_head.weight": name}.get(
            name, f"model.{name}"
        ): value
        for name, value in found.state_dict().items()
    }
    theirs.load_state_dict(state)
    return theirs


def test_loss_and_gradients_are_those_of_transformers() -> None:
    found = model("adam").double()
    theirs = llama(found)
    loss = NextToken(found)(ids())
    loss.backward()
    expected = theirs(ids(), labels=ids()).loss
    expected.backward()
    assert float(loss.detach()) == pytest.approx(
        float(expected.detach()), rel=1e-6
    )  # theirs is summed in float32
    for name, parameter in theirs.named_parameters():
        own = found.get_parameter(
            {"model.embed_tokens.weight": "embed_tokens"}.get(name, name.removeprefix("model."))
        )
        torch.testing.assert_close(own.grad, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_plain_llama_has_the_same_logits(recipe: str) -> None:
    found = model(recipe)
    before = {name: value.clone() for name, value in found.state_dict().items()}
    absorbed = plain(found)
    assert absorbed.embed_in is None and absorbed.embed_out is None
    with torch.no_grad():
        want = found(ids())
        assert float((absorbed(ids()) - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert all(torch.equal(before[name], value) for name, value in found.state_dict().items())
    for module in absorbed.modules():
        gain = getattr(module, "weight", None)
        if gain is not None and gain.ndim == 1:
            assert gain.numel() == SHAPE.width
            assert bool((gain == gain[0]).all()) == RECIPES[recipe].single_scale_norm


def test_what_is_saved_loads_in_transformers_and_here(tmp_path: Path) -> None:
    data = small_data.write(tmp_path / "data")
    found = new_model(SHAPE.config(RECIPES["osp"], data.vocabulary, 64), seed=1)
    save_plain(found, tmp_path / "model", data.folder, "osp", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    tokens = torch.tensor([checkpoint.tokenizer("The red cat sits on the hill.")["input_ids"]])
    with torch.no_grad():
        want = found(tokens)
        torch.testing.assert_close(theirs(tokens).logits, want, rtol=0, atol=1e-5)
        torch.testing.assert_close(checkpoint.load()(tokens), want, rtol=0, atol=1e-5)
    assert checkpoint.config.recipe == "osp"
    assert checkpoint.tokenizer.decode(tokens[0]) == "The red cat sits on the hill."
    assert checkpoint.tokenizer.bos_token_id == checkpoint.tokenizer.eos_token_id == 0


def test_a_seed_gives_one_start_and_projections_begin_orthogonal() -> None:
    config = SHAPE.config(RECIPES["osp"], VOCABULARY, 64)
    one, same, other = (new_model(config, seed) for seed in (1, 1, 2))
    pairs = zip(one.parameters(), same.parameters(), other.parameters(), strict=True)
    for a, b, c in pairs:
        assert torch.equal(a, b)
        assert a.ndim < 2 or not torch.equal(a, c)
    assert one.embed_in is not None
    product = one.embed_in.weight @ one.embed_in.weight.T
    torch.testing.assert_close(product, torch.eye(SHAPE.width), rtol=0, atol=1e-5)
    assert float(one.embed_tokens.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_half_precision_is_near_single() -> None:
    found = model("osp")
    single, half = (float(NextToken(found, precision)(ids()).detach()) for precision in ("fp32", "bf16"))
    assert half == pytest.approx(single, rel=0.02)
    assert half != single
