"""Tuning of kept columns and scales: the network is the decoder's, gradients are right, stops are free."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods import artifacts, attention, linear, tuning
from methods.bits import Bits, QuantiserSettings
from methods.checkpoint import Checkpoint
from methods.decoder import Decoder
from methods.descent import Schedule
from methods.errors import UserError
from methods.method import Artifact, Context
from methods.pipeline import Quantised, quantise
from methods.registry import parse_method
from methods.tuning import KEPT, SCALE, adjust, codes_of, next_token_loss, pieces, quantised_logits, trainable
from tests import families
from tests.families import relative
from tests.methods.small_checkpoint import run, save

IDS = families.tokens(2, 20, seed=41)
TEXT = families.tokens(12, 24, seed=32)
TUNED = "quad:rank=8;tune=true;steps=6;rate=1e-3;window=12;batch=2;sequences=4;rounding=rtn"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {name: save(tmp_path_factory.mktemp(name), name) for name in families.SMALL}


def rounded(
    checkpoint: Checkpoint, bits: str, method: str = "quad:rank=8;rounding=rtn", **settings: Any
) -> Decoder:
    return run(checkpoint, method, bits, dtype=torch.float64, **settings).decoder


def tuned(
    checkpoint: Checkpoint,
    method: str = TUNED,
    bits: str = "w4a4kv4",
    *,
    cache: Path | None = None,
    dtype: torch.dtype = torch.float32,
    execution: str = "simulate",
    **settings: Any,
) -> Quantised:
    return quantise(
        checkpoint,
        parse_method(method),
        Bits.parse(bits),
        Context(cache=cache),
        settings=QuantiserSettings(**settings),
        calibration=TEXT,
        dtype=dtype,
        execution=execution,
    )


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("w4a4kv4", {}),
    ("w4a16g8", {}),
    ("w4a8kv8", {"activation_symmetric": False, "weight_symmetric": False}),
    ("w4a8kv8", {"activation_static": True, "kv_static": True}),
]


@pytest.mark.parametrize(("bits", "settings"), SETTINGS)
def test_the_network_tuned_is_the_network_evaluated(
    checkpoints: dict[str, Checkpoint], bits: str, settings: dict[str, Any]
) -> None:
    model = rounded(checkpoints["llama-biases"], bits, **settings)
    got = quantised_logits(model, IDS, trainable(model), codes_of(model))
    assert relative(got, model(IDS)) < 1e-12
    loss = next_token_loss(model, IDS, trainable(model), codes_of(model))
    want = F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert float(loss) == pytest.approx(float(want))


@pytest.mark.parametrize("name", families.SMALL)
def test_that_holds_for_every_family(checkpoints: dict[str, Checkpoint], name: str) -> None:
    model = rounded(checkpoints[name], "w4a4kv4")
    parameters = trainable(model)
    assert relative(quantised_logits(model, IDS, parameters, codes_of(model)), model(IDS)) < 1e-12
    shapes = {name: linear.shape for name, linear in model.linears()}
    assert {key: tensor.shape for key, tensor in parameters.items() if key.startswith(KEPT)} == {
        KEPT + name: (out, 8)
        for name, (out, _) in shapes.items()
        if "o_proj" not in name and "down" not in name
    }
    assert {key: tensor.shape for key, tensor in parameters.items() if key.startswith(SCALE)} == {
        SCALE + name: (out, 1) for name, (out, _) in shapes.items()
    }


def gradients(model: Decoder, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    next_token_loss(model, IDS, leaves, codes_of(model)).backward()
    found = {name: leaf.grad for name, leaf in leaves.items()}
    assert all(gradient is not None and float(gradient.norm()) > 0 for gradient in found.values())
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def test_gradients_are_the_slopes_of_the_loss(checkpoints: dict[str, Checkpoint]) -> None:
    """Weights alone quantised, so that the loss is smooth: central differences along random directions."""
    model = rounded(checkpoints["llama-biases"], "w4a16")
    parameters, codes = trainable(model), codes_of(model)
    found = gradients(model, parameters)
    generator = torch.Generator().manual_seed(3)
    for name in (
        "scale layers.0.self_attn.k_proj",
        "kept layers.1.mlp.up_proj",
        "scale layers.1.mlp.down_proj",
    ):
        direction = torch.randn(parameters[name].shape, generator=generator, dtype=torch.float64)
        direction *= 1e-5 * parameters[name].abs().mean()
        ends = [
            float(
                next_token_loss(model, IDS, {**parameters, name: parameters[name] + sign * direction}, codes)
            )
            for sign in (1, -1)
        ]
        assert (ends[0] - ends[1]) / 2 == pytest.approx(float((found[name] * direction).sum()), rel=1e-4)


def test_quantisers_pass_gradients_straight_through(checkpoints: dict[str, Checkpoint]) -> None:
    """The same as with each quantiser replaced by x + (its error as a constant), by torch's own rules."""
    model = rounded(checkpoints["llama-biases"], "w4a4kv4")

    def shifted(x: Tensor, quantise: Callable[[Tensor], Tensor]) -> Tensor:
        return x + (quantise(x.detach()) - x).detach()

    got = gradients(model, trainable(model))
    with (
        mock.patch.object(linear, "straight_through", shifted),
        mock.patch.object(attention, "straight_through", shifted),
    ):
        want = gradients(model, trainable(model))
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)


def test_windows_of_all_sequences_come_first() -> None:
    ids = torch.arange(14).view(2, 7)
    assert pieces(ids, 3).tolist() == [[0, 1, 2], [7, 8, 9], [3, 4, 5], [10, 11, 12]]
    assert pieces(ids, 7).tolist() == ids.tolist()


def test_tuning_lowers_the_loss_and_leaves_the_model_alone(checkpoints: dict[str, Checkpoint]) -> None:
    model = rounded(checkpoints["llama-biases"], "w4a4kv4")
    before, codes = copy.deepcopy(model.state_dict()), codes_of(model)
    rows, held_out = families.tokens(2, 16, seed=8), families.tokens(1, 16, seed=9)
    schedule = Schedule(25, {KEPT: 3e-3, SCALE: 3e-3})
    with torch.enable_grad():
        first, again = (tuning.tune(model, rows, held_out, schedule, 2, Context()) for _ in range(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert first.meta["tuned_on"]["after"] < first.meta["tuned_on"]["before"] - 0.1
    assert first.meta["loss"][-1] < first.meta["loss"][0] - 0.1
    assert first.meta["held_out"]["windows"] == 1
    assert first.meta["tokens"] == {"seen": 25 * 2 * 16, "different": 2 * 16}
    assert first.meta["measured"]["tune_steps"] == 25
    assert {key: value for key, value in first.meta.items() if key != "measured"} == {
        key: value for key, value in again.meta.items() if key != "measured"
    }
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in first.tensors.items())
    sizes = first.meta["parameters"]
    assert sizes == {
        "kept": sum(8 * out for name, (out, _) in shapes_of(model).items() if reads(name)),
        "scale": sum(out for out, _ in shapes_of(model).values()),
    }
    # Taken over, the loss is what was measured; codes stay, and behind them scales alone have changed.
    old = {name: linear.weight.clone() for name, linear in model.linears()}
    adjust(model, first.tensors)
    with torch.no_grad():
        logits = model(held_out)[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
    assert float(loss) == pytest.approx(first.meta["held_out"]["after"], rel=1e-9)
    for name, found in model.linears():
        assert found.quantised is not None
        assert torch.equal(found.quantised.codes, codes[name].codes)
        ratio = found.weight[:, found.keep :] / old[name][:, found.keep :]
        spread = (ratio - found.quantised.scale / codes[name].scale).nan_to_num().abs().max()
        assert float(spread) < 1e-9
        assert not torch.equal(found.weight, old[name])


@pytest.mark.parametrize("at_once", [1, 40, 10**6])
def test_a_step_is_the_mean_over_its_windows(checkpoints: dict[str, Checkpoint], at_once: int) -> None:
    """However many pass together; the first again behind the last."""
    model = rounded(checkpoints["llama-biases"], "w4a4kv4")
    rows = families.tokens(3, 16, seed=8)
    with mock.patch.object(tuning, "AT_ONCE", at_once), torch.enable_grad():
        found = tuning.tune(model, rows, rows[:1], Schedule(2, {KEPT: 1e-9, SCALE: 1e-9}), 5, Context())
    losses = [float(next_token_loss(model, row[None], trainable(model), codes_of(model))) for row in rows]
    first, second = found.meta["loss"]
    assert first == pytest.approx((2 * losses[0] + 2 * losses[1] + losses[2]) / 5, rel=1e-6)
    assert second == pytest.approx((2 * losses[2] + 2 * losses[0] + losses[1]) / 5, rel=1e-3)


def shapes_of(model: Decoder) -> dict[str, tuple[int, int]]:
    return {name: linear.shape for name, linear in model.linears()}


def reads(name: str) -> bool:
    return not name.endswith(("o_proj", "down_proj"))


def test_changes_of_another_model_are_refused(checkpoints: dict[str, Checkpoint]) -> None:
    model = rounded(checkpoints["llama-biases"], "w4a4kv4")
    with pytest.raises(ValueError, match="other kept columns"):
        adjust(model, {"scale layers.0.mlp.up_proj": torch.zeros(1)})


# In the pipeline


@pytest.mark.parametrize(("bits", "settings"), SETTINGS)
def test_a_tuned_model_runs_packed(
    checkpoints: dict[str, Checkpoint], bits: str, settings: dict[str, Any]
) -> None:
    simulated, packed = (
        tuned(checkpoints["llama-biases"], bits=bits, dtype=torch.float64, execution=execution, **settings)
        for execution in ("simulate", "int4")
    )
    assert relative(packed.decoder(IDS), simulated.decoder(IDS)) < 1e-9
    plain = tuned(
        checkpoints["llama-biases"],
        "quad:rank=8;sequences=4;rounding=rtn",
        bits,
        dtype=torch.float64,
        **settings,
    )
    assert relative(simulated.decoder(IDS), plain.decoder(IDS)) > 1e-3
    facts = simulated.learned["quad"]
    measured = {"device", "capture_seconds", "tune_seconds", "tune_steps", "learn_peak_bytes"}
    assert set(facts["measured"]) == measured
    assert facts["tuning"]["tokens"] == {"seen": 6 * 2 * 12, "different": 6 * 2 * 12}
    assert simulated.seconds["tune"] > 0


class _Stopped(BaseException):
    """As if the process had been killed."""


def test_a_stopped_tuning_goes_on_where_it_was(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    checkpoint, real = checkpoints["llama-linear-rope"], tuning.next_token_loss
    calls: list[int] = []

    def stopping(*arguments: Any) -> Tensor:
        calls.append(len(calls))
        if len(calls) == 6:  # in the sixth step, behind the snapshot of the fifth
            raise _Stopped
        return real(*arguments)

    want = tuned(checkpoint, cache=tmp_path / "one")
    with mock.patch.object(tuning, "next_token_loss", stopping), pytest.raises(_Stopped):
        tuned(checkpoint, cache=tmp_path / "two")
    assert len(list((tmp_path / "two").glob("*.unfinished.safetensors"))) == 1
    with mock.patch.object(tuning, "next_token_loss", side_effect=real) as spy:
        got = tuned(checkpoint, cache=tmp_path / "two")
    assert spy.call_count == 1 + 8, "one step, and the loss before and after on two windows of two texts"
    assert got.learned["quad"]["measured"]["tune_steps"] == 1
    assert got.learned["quad"]["tuning"] == want.learned["quad"]["tuning"]
    assert torch.equal(got.decoder(IDS), want.decoder(IDS))
    assert not list((tmp_path / "two").glob("*.unfinished.safetensors"))
    with mock.patch.object(tuning, "next_token_loss", side_effect=AssertionError("tuned again")):
        assert torch.equal(tuned(checkpoint, cache=tmp_path / "two").decoder(IDS), want.decoder(IDS))


def test_what_is_tuned_is_kept_by_bits_quantisers_and_rounding(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    checkpoint = checkpoints["llama-linear-rope"]
    variants: list[tuple[str, str, dict[str, Any]]] = [
        (TUNED, "w4a4kv4", {}),
        (TUNED, "w4a8", {}),
        (TUNED, "w4a4kv4", {"activation_clip": 0.8}),
        (TUNED.replace("rtn", "gptq"), "w4a4kv4", {}),
        (TUNED.replace("rtn", "gptq") + ";damp=0.1", "w4a4kv4", {}),
    ]
    for number, (method, bits, settings) in enumerate(variants, start=1):
        tuned(checkpoint, method, bits, cache=tmp_path, **settings)
        records = [json.loads(path.read_text())["content"] for path in tmp_path.glob("*.json")]
        kinds = ["rounded" in record["about"] for record in records]
        assert kinds.count(True) == number
        assert kinds.count(False) == 1, "the decomposition is one for all"


def test_what_ships_is_found_by_code_of_any_age(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    checkpoint, shipped = checkpoints["llama-linear-rope"], tmp_path / "shipped"
    want = tuned(checkpoint, cache=tmp_path / "cache")
    shipped.mkdir()
    for path in (tmp_path / "cache").glob("*.json"):
        about = json.loads(path.read_text())["content"]["about"]
        found = artifacts.load(tmp_path / "cache", path.stem)
        assert found is not None
        artifacts.save(shipped, artifacts.portable_key(about), found, about)
    with (
        mock.patch.object(artifacts, "SHIPPED", shipped),
        mock.patch.object(artifacts, "_code_sha256", return_value="another"),
        mock.patch.object(tuning, "next_token_loss", side_effect=AssertionError("tuned again")),
    ):
        assert torch.equal(tuned(checkpoint, cache=tmp_path / "empty").decoder(IDS), want.decoder(IDS))
        with pytest.raises(AssertionError, match="tuned again"):
            tuned(checkpoint, bits="w4a8", cache=tmp_path / "empty")


def test_refusals(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["llama-linear-rope"]
    with pytest.raises(UserError, match="tuning needs quantised weights"):
        tuned(checkpoint, bits="w16a4")
    with pytest.raises(UserError, match="2 calibration sequences or more beside those of rounding, not 1"):
        tuned(checkpoint, TUNED.replace("sequences=4", "sequences=11"))


def test_a_method_that_tunes_nothing_changes_nothing() -> None:
    method = parse_method("rtn").parts[0]
    assert not method.tunes
    assert dataclasses.astuple(method) == dataclasses.astuple(parse_method("rtn").parts[0])
    assert method.tune_rounded(mock.sentinel.model, TEXT, Context(), None) == Artifact()
