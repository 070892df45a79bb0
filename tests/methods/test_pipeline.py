"""From a saved checkpoint to a quantised decoder, against transformers with quantisers written in numpy."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from methods.bits import FLOAT, Bits, QuantiserSettings
from methods.checkpoint import Checkpoint, open_checkpoint
from methods.decoder import Block, Decoder
from methods.errors import UserError
from methods.footprint import effective_bits
from methods.method import Artifact, Context, Method, Plan
from methods.pipeline import Pipeline, Quantised, quantise
from methods.registry import parse_method
from tests import families
from tests.families import reference_logits, relative

IDS = families.tokens(2, 14, seed=31)
CALIBRATION = families.tokens(6, 24, seed=32)


def save(folder: Path, name: str) -> Checkpoint:
    """A folder as the hub has them: float32 weights and a tokenizer of one word an id."""
    families.model(name, torch.float32).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(families.VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return open_checkpoint(str(folder))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {name: save(tmp_path_factory.mktemp(name), name) for name in families.SMALL}


def run(
    checkpoint: Checkpoint,
    method: str,
    bits: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Quantised:
    pipeline = parse_method(method)
    calibration = CALIBRATION if pipeline.needs_calibration else None
    context = Context(seed=seed)
    return quantise(
        checkpoint, pipeline, Bits.parse(bits), context, calibration=calibration, dtype=dtype, **options
    )


def test_the_folder_is_whole(checkpoints: dict[str, Checkpoint]) -> None:
    assert checkpoints["llama-biases"].tokenizer("w7 w130 w3")["input_ids"] == [7, 130, 3]


@pytest.mark.parametrize("name", families.SMALL)
def test_float_is_the_checkpoint(checkpoints: dict[str, Checkpoint], name: str) -> None:
    result = run(checkpoints[name], "float", "w16a16", dtype=torch.float32)
    assert torch.equal(result.decoder(IDS), checkpoints[name].load()(IDS))
    assert (result.notes, result.rounding_errors) == ([], [])
    assert effective_bits(result.decoder, result.plan) == {"weight": 16.0, "activation": 16.0, "kv": 16.0}


# The reference: transformers in float64, its linears' inputs and its keys and values rounded by numpy


def round_rows(x: Tensor, bits: int, clip: float, symmetric: bool) -> Tensor:
    """Fake quantisation along the last axis, by the equations of QuaRot."""
    values = x.numpy()
    if symmetric:
        scale = clip * np.abs(values).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
        codes = np.clip(np.rint(values / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return torch.from_numpy(scale * codes)
    high = clip * np.maximum(values.max(-1, keepdims=True), 0)
    low = clip * np.minimum(values.min(-1, keepdims=True), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.rint(-low / scale)
    return torch.from_numpy(scale * (np.clip(np.rint(values / scale) + zero, 0, 2**bits - 1) - zero))


@contextmanager
def rounding_activations(model: Any, bits: int, clip: float) -> Iterator[None]:
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: round_rows(inputs[0], bits, clip, symmetric=True))
        for name, module in model.named_modules()
        if name.endswith("_proj")
    ]
    yield
    for hook in hooks:
        hook.remove()


@contextmanager
def rounding_keys_and_values(model: Any, bits: int, clip: float) -> Iterator[None]:
    module = sys.modules[type(model).__module__]
    rotary = module.apply_rotary_pos_emb
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def keys(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        query, key = rotary(*arguments, **options)
        return query, round_rows(key, bits, clip, symmetric=False)

    def values(_: Any, __: Any, output: Tensor) -> Tensor:
        return round_rows(output.unflatten(-1, (-1, width)), bits, clip, symmetric=False).flatten(-2)

    hooks = [m.register_forward_hook(values) for name, m in model.named_modules() if name.endswith("v_proj")]
    with mock.patch.object(module, "apply_rotary_pos_emb", keys):
        yield
    for hook in hooks:
        hook.remove()


def reference(name: str, bits: Bits) -> Tensor:
    """Logits of the float32 weights, computed in float64 with rounded activations, keys and values."""
    model = families.build(families.config(name), torch.float32).double()
    with ExitStack() as stack:
        if bits.activation < 16:
            clip = 0.9 if bits.activation <= 4 else 1.0
            stack.enter_context(rounding_activations(model, bits.activation, clip))
        if bits.kv < 16:
            clip = 0.95 if bits.kv <= 4 else 1.0
            stack.enter_context(rounding_keys_and_values(model, bits.kv, clip))
        return reference_logits(model, IDS)


@pytest.mark.parametrize("bits", ["w16a4", "w16a8", "w16a16kv4", "w16a16kv8", "w16a4kv4"])
@pytest.mark.parametrize("name", families.SMALL)
def test_activations_keys_and_values_are_quantised(
    checkpoints: dict[str, Checkpoint], name: str, bits: str
) -> None:
    result = run(checkpoints[name], "rtn", bits)
    want = reference(name, Bits.parse(bits))
    assert relative(result.decoder(IDS), want) <= 1e-9
    assert relative(checkpoints[name].load(torch.float64)(IDS), want) > 1e-4
    assert result.rounding_errors == []


@pytest.mark.parametrize("method", ["rtn", "quarot:rounding=rtn"])
@pytest.mark.parametrize("name", families.SMALL)
def test_keys_and_values_are_quantised_once(
    checkpoints: dict[str, Checkpoint], name: str, method: str
) -> None:
    """Decoding token by token equals one forward pass, and what the cache holds never changes again."""
    decoder = run(checkpoints[name], method, "w4a4kv4").decoder
    whole = decoder(IDS)
    cache = decoder.new_cache()
    steps = [decoder(IDS[:, :5], cache=cache)]
    early = cache.clone()
    steps += [decoder(IDS[:, i : i + 1], cache=cache) for i in range(5, IDS.shape[1])]
    assert relative(torch.cat(steps, 1), whole) <= 1e-9
    cache.truncate(5)
    nothing = torch.zeros(2, decoder.config.kv_heads, 0, decoder.config.head_dim, dtype=torch.float64)
    for layer in range(decoder.config.layers):
        for now, then in zip(
            cache.append(layer, nothing, nothing), early.append(layer, nothing, nothing), strict=True
        ):
            assert torch.equal(now, then)
            levels = {len(row.unique()) for row in now.flatten(0, -2)}
            assert max(levels) <= 16


# Weights


@pytest.mark.parametrize("method", ["rtn", "gptq", "quarot", "quarot:rounding=rtn"])
def test_every_linear_is_rounded(checkpoints: dict[str, Checkpoint], method: str) -> None:
    result = run(checkpoints["llama-biases"], method, "w4a4kv4")
    assert len(result.rounding_errors) == 14
    for name, linear in result.decoder.linears():
        assert linear.quantised is not None, name
        assert linear.activation == result.plan.linears[name].activation
        assert linear.activation is not None
    assert result.decoder.lm_head.quantised is None
    assert result.decoder(IDS).isfinite().all()
    assert set(result.seconds) >= {"load", "learn", "transform", "round"}


def distance(result: Quantised, exact: Tensor) -> float:
    return float((result.decoder(IDS) - exact).norm() / exact.norm())


def test_more_bits_and_better_methods_come_closer(tmp_path: Path) -> None:
    """On a model with two large channels in the stream, as real models have them."""
    model = families.build(families.config("llama3-scaled-rope"), torch.float32)
    model.model.embed_tokens.weight[:, [3, 50]] *= 30
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    exact = checkpoint.load(torch.float64)(IDS)
    by_bits = [distance(run(checkpoint, "rtn", bits), exact) for bits in ("w8a8kv8", "w6a6kv6", "w4a4kv4")]
    assert by_bits == sorted(by_bits)
    assert by_bits[0] < 0.1
    assert distance(run(checkpoint, "quarot:rounding=rtn", "w4a4kv4"), exact) < 0.8 * by_bits[-1]


def test_transforms_alone_leave_the_function(checkpoints: dict[str, Checkpoint]) -> None:
    """8-bit KV alone: rotations with hardly any quantisation behind them."""
    for name, checkpoint in checkpoints.items():
        exact = checkpoint.load(torch.float64)(IDS)
        assert distance(run(checkpoint, "quarot", "w16a16kv8"), exact) < 0.05, name


@pytest.mark.parametrize("method", ["rtn", "gptq", "quarot"])
def test_two_runs_are_identical(checkpoints: dict[str, Checkpoint], method: str) -> None:
    checkpoint = checkpoints["qwen3-qk-norm"]
    torch.manual_seed(0)
    first = run(checkpoint, method, "w4a4kv4", seed=5, dtype=torch.float32).decoder.state_dict()
    torch.manual_seed(1)
    second = run(checkpoint, method, "w4a4kv4", seed=5, dtype=torch.float32).decoder.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    other = run(checkpoint, method, "w4a4kv4", seed=6, dtype=torch.float32).decoder.state_dict()
    changed = any(not torch.equal(value, other[name]) for name, value in first.items())
    assert changed == (method == "quarot")


def test_key_rotation_runs_only_for_a_quantised_cache(checkpoints: dict[str, Checkpoint]) -> None:
    def rotated(bits: str) -> set[bool]:
        decoder = run(checkpoints["llama-biases"], "quarot:rounding=rtn", bits).decoder
        return {isinstance(b, Block) and b.self_attn.rotation is not None for b in decoder.layers}

    assert rotated("w4a4kv4") == {True}
    assert rotated("w4a4") == {False}


def test_notes_name_what_has_no_hadamard_matrix(tmp_path: Path, checkpoints: dict[str, Checkpoint]) -> None:
    nine = run(save(tmp_path, "llama-gqa-tied"), "quarot:rounding=rtn", "w16a4", dtype=torch.float32).notes
    assert [note for note in nine if "order 9 (heads)" in note]
    assert run(checkpoints["qwen3-qk-norm"], "quarot:rounding=rtn", "w16a4").notes == nine[:1]


def test_kurtosis_is_probed_before_rounding(checkpoints: dict[str, Checkpoint]) -> None:
    result = run(checkpoints["llama-biases"], "rtn", "w4a4", probe=IDS)
    plain = run(checkpoints["llama-biases"], "rtn", "w16a8", probe=IDS)
    assert [(site.layer, site.site) for site in result.kurtosis] == [
        (layer, site) for layer in (0, 1) for site in ("attention", "mlp")
    ]
    assert result.kurtosis == plain.kurtosis


def test_one_setting_can_be_changed_for_all_methods(checkpoints: dict[str, Checkpoint]) -> None:
    settings = QuantiserSettings(weight_symmetric=False, activation_symmetric=False, kv_symmetric=True)
    result = run(checkpoints["llama-biases"], "rtn", "w4a4kv4", settings=settings)
    for _, linear in result.decoder.linears():
        assert linear.quantised is not None
        assert linear.quantised.zero is not None
        assert linear.activation is not None
        assert not linear.activation.symmetric
    assert result.plan.kv is not None
    assert result.plan.kv.symmetric


# Bits by hand. A layer of llama-biases has q [96, 80], k and v [48, 80], o [80, 96], gate and up [144, 80]
# and down [80, 144]: 57600 weights, 640 output channels, 640 inputs of 7 linears; head_dim 24.


@pytest.mark.parametrize(
    ("bits", "weight", "activation", "kv"),
    [
        ("w4a4kv4", 4 + 640 * 16 / 57600, 4 + 7 * 16 / 640, 4 + 32 / 24),
        ("w4a16", 4 + 640 * (16 + 4) / 57600, 16.0, 16.0),
        ("w3a16g16", 3 + (16 + 3) / 16, 16.0, 16.0),
        ("w4a8kv8", 4 + 640 * 16 / 57600, 8 + 7 * 16 / 640, 8 + 32 / 24),
        ("w16a16kv4", 16.0, 16.0, 4 + 32 / 24),
    ],
)
def test_effective_bits(
    checkpoints: dict[str, Checkpoint], bits: str, weight: float, activation: float, kv: float
) -> None:
    result = run(checkpoints["llama-biases"], "rtn", bits, dtype=torch.float32)
    assert effective_bits(result.decoder, result.plan) == pytest.approx(
        {"weight": weight, "activation": activation, "kv": kv}
    )


@dataclass(frozen=True, kw_only=True)
class Keeping(Method):
    """Keeps the first eight input columns of every linear."""

    name: ClassVar[str] = "keeping"

    def plan(
        self, model: Decoder, bits: Bits, settings: QuantiserSettings, artifact: Artifact, base: Plan
    ) -> Plan:
        return Plan({name: replace(spec, keep=8) for name, spec in base.linears.items()}, base.kv)


@pytest.mark.parametrize("bits", ["w16a4", "w4a4"])
def test_kept_columns(checkpoints: dict[str, Checkpoint], bits: str) -> None:
    pipeline = Pipeline("keeping", (Keeping(),))
    checkpoint = checkpoints["llama-biases"]
    result = quantise(checkpoint, pipeline, Bits.parse(bits), Context(), dtype=torch.float64)
    plain = dict(checkpoint.load(torch.float64).linears())
    for name, linear in result.decoder.linears():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, linear.weight.shape[1], dtype=torch.float64, generator=generator)
        seen = linear.quantise_input(x)
        assert isinstance(seen, Tensor)
        assert torch.equal(seen[:, :8], x[:, :8])
        torch.testing.assert_close(seen[:, 8:], round_rows(x[:, 8:], 4, 0.9, symmetric=True))
        assert torch.equal(linear.weight[:, :8], plain[name].weight[:, :8])
    weight = 16.0
    if bits == "w4a4":
        kept = 8 * 640  # columns times output channels
        weight = (16 * kept + 4 * (57600 - kept) + 16 * 640) / 57600
    activation = (16 * 7 * 8 + 4 * (640 - 7 * 8) + 7 * 16) / 640
    got = effective_bits(result.decoder, result.plan)
    assert (got["weight"], got["activation"]) == pytest.approx((weight, activation))


def test_refusals(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["llama-biases"]
    for method, bits in (("float", "w4a4"), ("rtn", "w16a16"), ("quarot", "w16a16")):
        with pytest.raises(UserError, match="float goes with w16a16"):
            run(checkpoint, method, bits)
    with pytest.raises(UserError, match="gptq needs calibration tokens"):
        quantise(checkpoint, parse_method("gptq"), Bits.parse("w4a16"), Context())
    with pytest.raises(UserError, match="group size 56 does not divide the 7680 weights"):
        run(checkpoint, "rtn", "w4a16g56")
    assert FLOAT.is_float
