"""Static ranges against the extremes that hooks on transformers see, and whole runs with them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.reference import quantise as to_codes
from methods.bits import Bits, QuantiserSettings
from methods.checkpoint import Checkpoint, open_checkpoint
from methods.decoder import Block, Decoder
from methods.errors import UserError
from methods.footprint import effective_bits
from methods.linear import Linear
from methods.method import Artifact, Context, Method, Plan
from methods.pipeline import Pipeline, Quantised, quantise
from methods.ranges import set_ranges
from methods.registry import parse_method
from tests import families
from tests.families import reference_logits, relative

IDS = families.tokens(3, 14, seed=41)
CALIBRATION = families.tokens(5, 20, seed=42)
STATIC = QuantiserSettings(activation_static=True, kv_static=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    found = {}
    for name in families.SMALL:
        folder = tmp_path_factory.mktemp(name)
        families.model(name, torch.float32).save_pretrained(folder)
        found[name] = open_checkpoint(str(folder))
    return found


def run(
    checkpoint: Checkpoint,
    method: str | Pipeline,
    bits: str,
    settings: QuantiserSettings = STATIC,
    calibration: Tensor | None = CALIBRATION,
) -> Quantised:
    pipeline = parse_method(method) if isinstance(method, str) else method
    return quantise(
        checkpoint,
        pipeline,
        Bits.parse(bits),
        Context(),
        settings=settings,
        calibration=calibration,
        dtype=torch.float64,
    )


def blocks(decoder: Decoder) -> list[Block]:
    return [block for block in decoder.layers if isinstance(block, Block)]


def seen_by_transformers(name: str) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Inputs of every linear, keys (after RoPE) and values of each layer on the calibration tokens."""
    model = families.build(families.config(name), torch.float32).double()
    inputs: dict[str, Tensor] = {}
    keys: list[Tensor] = []
    values: list[Tensor] = []
    module = sys.modules[type(model).__module__]
    rotary = module.apply_rotary_pos_emb

    def recording(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        query, key = rotary(*arguments, **options)
        keys.append(key)
        return query, key

    for full, linear in model.named_modules():
        if full.endswith("_proj"):
            short = full.removeprefix("model.")
            linear.register_forward_pre_hook(lambda _, x, short=short: inputs.update({short: x[0]}))
        if full.endswith("v_proj"):
            linear.register_forward_hook(lambda _, __, output: values.append(output))
    with mock.patch.object(module, "apply_rotary_pos_emb", recording):
        reference_logits(model, CALIBRATION)
    return inputs, keys, values


def range_of(x: Tensor, bits: int, symmetric: bool, clip: float) -> tuple[float, float | None]:
    """Scale and zero-point by the papers' equations, in numpy."""
    values = x.numpy()
    if symmetric:
        return clip * np.abs(values).max() / (2 ** (bits - 1) - 1), None
    low, high = clip * min(values.min(), 0.0), clip * max(values.max(), 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, float(np.rint(-low / scale))


def agree(scale: Tensor | None, zero: Tensor | None, want: tuple[float, float | None]) -> None:
    assert scale is not None
    assert scale.shape == ()
    assert float(scale) == pytest.approx(want[0], rel=1e-9)
    assert (None if zero is None else float(zero)) == want[1]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", ["w16a8kv8", "w16a4kv4"])
@pytest.mark.parametrize("name", families.SMALL)
def test_ranges_are_those_of_transformers(
    checkpoints: dict[str, Checkpoint], name: str, bits: str, symmetric: bool
) -> None:
    settings = replace(STATIC, activation_symmetric=symmetric, kv_symmetric=symmetric)
    decoder = run(checkpoints[name], "rtn", bits, settings).decoder
    inputs, keys, values = seen_by_transformers(name)
    width = Bits.parse(bits).activation
    clip, kv_clip = (0.9, 0.95) if width == 4 else (1.0, 1.0)
    for full, linear in decoder.linears():
        agree(linear.input_scale, linear.input_zero, range_of(inputs[full], width, symmetric, clip))
    assert len(keys) == len(values) == len(decoder.layers)
    for block, key, value in zip(blocks(decoder), keys, values, strict=True):
        attention = block.self_attn
        agree(attention.k_scale, attention.k_zero, range_of(key, width, symmetric, kv_clip))
        agree(attention.v_scale, attention.v_zero, range_of(value, width, symmetric, kv_clip))


def test_ranges_are_measured_behind_rounded_weights(checkpoints: dict[str, Checkpoint]) -> None:
    """What the second block reads has passed the rounded first one, and no quantised activation."""
    checkpoint = checkpoints["llama-biases"]
    result = run(checkpoint, "rtn", "w4a4", QuantiserSettings(activation_static=True))
    weights = run(checkpoint, "rtn", "w4a16", QuantiserSettings(weight_symmetric=True)).decoder
    last = dict(weights.linears())["layers.1.mlp.down_proj"]
    seen: list[Tensor] = []
    last.observer = lambda x: seen.append(x)
    weights(CALIBRATION)
    scale = dict(result.decoder.linears())["layers.1.mlp.down_proj"].input_scale
    agree(scale, None, range_of(seen[0], 4, True, 0.9))


# Whole runs


@pytest.mark.parametrize("method", ["rtn", "gptq", "quarot:rounding=rtn"])
def test_static_run(checkpoints: dict[str, Checkpoint], method: str) -> None:
    checkpoint = checkpoints["llama-biases"]
    result = run(checkpoint, method, "w4a8kv8")
    logits = result.decoder(IDS)
    assert "ranges" in result.seconds
    dynamic = run(checkpoint, method, "w4a8kv8", QuantiserSettings()).decoder(IDS)
    assert not torch.equal(logits, dynamic)
    # Eight bits are close to none, static or not: a wrong range would not be.
    plain = run(checkpoint, method, "w4a16", QuantiserSettings(weight_symmetric=True)).decoder(IDS)
    assert float((logits - plain).norm() / plain.norm()) < 0.1
    again = run(checkpoint, method, "w4a8kv8").decoder.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in result.decoder.state_dict().items())
    assert "layers.0.self_attn.k_zero" in again


def test_a_row_does_not_depend_on_its_batch(checkpoints: dict[str, Checkpoint]) -> None:
    decoder = run(checkpoints["qwen3-qk-norm"], "rtn", "w4a8kv8").decoder
    whole = decoder(IDS)
    for row in range(len(IDS)):
        assert relative(decoder(IDS[row : row + 1]), whole[row : row + 1]) <= 1e-9
    cache = decoder.new_cache()
    steps = [decoder(IDS[:, i : i + 1], cache=cache) for i in range(IDS.shape[1])]
    assert relative(torch.cat(steps, 1), whole) <= 1e-9


def test_only_what_is_asked_for_is_static(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["llama-biases"]
    for activations, cache in ((True, False), (False, True)):
        settings = QuantiserSettings(activation_static=activations, kv_static=cache)
        decoder = run(checkpoint, "rtn", "w4a8kv8", settings).decoder
        assert {linear.input_scale is not None for _, linear in decoder.linears()} == {activations}
        assert {block.self_attn.k_scale is not None for block in blocks(decoder)} == {cache}
        assert decoder(IDS).isfinite().all()


def test_no_scales_are_stored(checkpoints: dict[str, Checkpoint]) -> None:
    result = run(checkpoints["llama-biases"], "rtn", "w4a8kv4")
    bits = effective_bits(result.decoder, result.plan)
    assert (bits["activation"], bits["kv"]) == (8.0, 4.0)


def test_linears_of_one_input_share_its_range(checkpoints: dict[str, Checkpoint]) -> None:
    settings = replace(STATIC, activation_symmetric=False)
    decoder = run(checkpoints["llama-biases"], "rtn", "w4a8kv8", settings).decoder
    for block in blocks(decoder):
        attention, mlp = block.self_attn, block.mlp
        assert attention.q_proj.shares_input_with(attention.k_proj)
        assert attention.q_proj.shares_input_with(attention.v_proj)
        assert mlp.gate_proj.shares_input_with(mlp.up_proj)
        assert not attention.q_proj.shares_input_with(mlp.gate_proj)
    with mock.patch.object(
        Linear, "quantise_input", autospec=True, side_effect=lambda _, x, *__: x
    ) as counted:
        decoder(IDS)
    assert counted.call_count == 4 * 2 + 1  # four inputs a layer, and lm_head's


def test_values_out_of_range_saturate(checkpoints: dict[str, Checkpoint]) -> None:
    settings = replace(STATIC, kv_symmetric=False)
    block = blocks(run(checkpoints["llama-biases"], "rtn", "w4a8kv8", settings).decoder)[0]
    far = torch.tensor([1e3, -1e3, 1e30, -1e30, torch.inf, -torch.inf, 0.0, 0.0], dtype=torch.float64)
    linear = block.self_attn.q_proj
    x = far.repeat(10)[None]
    scale = linear.input_scale
    assert scale is not None
    codes = to_codes(x, 8, symmetric=True, scale=scale).codes[0, :8].tolist()
    assert codes == [127, -128, 127, -128, 127, -128, 0, 0]
    want = torch.tensor(codes, dtype=torch.float64) * scale
    seen = linear.quantise_input(x)
    assert isinstance(seen, Tensor)
    assert torch.equal(seen[0, :8], want)
    attention = block.self_attn
    low_scale, zero = attention.k_scale, attention.k_zero
    assert low_scale is not None and zero is not None
    got = attention.quantise_kv(far.repeat(3)[None, None, None], low_scale, zero)[0, 0, 0, :8]
    high, low = (255 - zero) * low_scale, -zero * low_scale
    assert torch.equal(got, torch.stack([high, low] * 3 + [0 * low] * 2))


# Methods


@dataclass(frozen=True, kw_only=True)
class Keeping(Method):
    """Keeps the first eight input columns of every linear and plans static ranges by itself."""

    name: ClassVar[str] = "keeping"

    def plan(
        self, model: Decoder, bits: Bits, settings: QuantiserSettings, artifact: Artifact, base: Plan
    ) -> Plan:
        linears = {}
        for name, spec in base.linears.items():
            assert spec.activation is not None
            linears[name] = replace(spec, keep=8, activation=replace(spec.activation, static=True))
        return Plan(linears, base.kv)


@dataclass(frozen=True, kw_only=True)
class Fixed(Method):
    """Finds its ranges without looking."""

    name: ClassVar[str] = "fixed"

    def ranges(self, model: Decoder, plan: Plan, calibration: Tensor, ctx: Context) -> Artifact:
        return Artifact({f"{name}.input_scale": torch.tensor(0.25) for name, _ in model.linears()})


def test_kept_columns_do_not_count(checkpoints: dict[str, Checkpoint]) -> None:
    pipeline = Pipeline("keeping", (Keeping(),))
    decoder = run(checkpoints["llama-biases"], pipeline, "w16a8", QuantiserSettings()).decoder
    inputs, _, _ = seen_by_transformers("llama-biases")
    for name, linear in decoder.linears():
        agree(linear.input_scale, None, range_of(inputs[name][..., 8:], 8, True, 1.0))


def test_a_method_may_find_its_own_ranges(checkpoints: dict[str, Checkpoint]) -> None:
    settings = QuantiserSettings(activation_static=True)
    for parts in ((Fixed(), parse_method("rtn").parts[0]), (parse_method("rtn").parts[0], Fixed())):
        decoder = run(checkpoints["llama-biases"], Pipeline("both", parts), "w4a8", settings).decoder
        scales = {linear.input_scale for _, linear in decoder.linears()}
        assert None not in scales
        assert {float(scale) for scale in scales if scale is not None} == {0.25}


def test_calibration_is_asked_for(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["llama-biases"]
    rtn, bits = parse_method("rtn"), Bits.parse("w4a8kv8")
    assert (rtn.calibrates(bits, STATIC), rtn.seeded(bits, STATIC)) == (True, True)
    assert not rtn.calibrates(Bits.parse("w4a16"), STATIC)
    assert not rtn.calibrates(bits, QuantiserSettings())
    assert parse_method("gptq").calibrates(bits, QuantiserSettings())
    with pytest.raises(UserError, match="rtn at w4a8kv8: static ranges need calibration tokens"):
        run(checkpoint, "rtn", "w4a8kv8", calibration=None)
    assert run(checkpoint, "rtn", "w4a16", calibration=None).decoder(IDS).isfinite().all()
    with pytest.raises(UserError, match="keeping plans static ranges and needs calibration tokens"):
        run(checkpoint, Pipeline("keeping", (Keeping(),)), "w4a8", QuantiserSettings(), calibration=None)
    with pytest.raises(UserError, match="needs calibration tokens"):
        run(checkpoint, "rtn", "w4a8kv8", calibration=CALIBRATION[:0])


def test_refusals_leave_no_observer(checkpoints: dict[str, Checkpoint]) -> None:
    decoder = checkpoints["llama-biases"].load()
    plan = Plan(
        {name: STATIC.linear(Bits.parse("w4a8")) for name, _ in decoder.linears()},
        STATIC.kv(Bits.parse("w4a8kv8")),
    )
    blocks(decoder)[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"no static range holds the input of layers\.1\.mlp\.down_proj"):
        parse_method("rtn").lead.ranges(decoder, plan, CALIBRATION, Context())
    assert all(linear.observer is None for _, linear in decoder.linears())
    assert all(block.self_attn.kv_observer is None for block in blocks(decoder))
    for name in ("layers.7.mlp.down_proj.input_scale", "layers.0.mlp.down_proj.output_scale"):
        with pytest.raises(UserError, match="unknown static range"):
            set_ranges(decoder, {name: torch.tensor(1.0)})
