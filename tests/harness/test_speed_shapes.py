"""Decoders of published shapes with random weights: their sizes, what they run, what they hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.speed_shapes import ONLINE, SHAPES, form_bits, online_parts, random_decoder, tiny, vocabulary
from harness.speed_work import decoder_bytes, kv_bytes, work
from kernels.packing import unpack
from methods.decoder import Block, Decoder
from methods.errors import UserError
from methods.execution import merge_projections
from methods.graphs import Decoding
from tests.harness.small_shape import SMALL

CPU, META = torch.device("cpu"), torch.device("meta")
FORMS = ("bf16", "w4a16g64", "w4a8kv8", "w4a4kv4")


def made(form: str, online: str = "none", device: torch.device = CPU, **changes: int) -> Decoder:
    torch.manual_seed(0)
    config, part = replace(SMALL, **changes), online_parts(form_bits(form), online)  # type: ignore[arg-type]
    return random_decoder(
        config, form_bits(form), part, vocabulary(config, part, device, torch.bfloat16), device
    )


def whole(shape: str, form: str, online: str = "none") -> Decoder:
    """Without storage."""
    config, part = SHAPES[shape], ONLINE[online]
    return random_decoder(config, form_bits(form), part, vocabulary(config, part, META, torch.bfloat16), META)


# Parameters as the models' own cards and safetensors count them.
@pytest.mark.parametrize(
    "shape, parameters",
    [("llama-3-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400), ("qwen2.5-7b", 7_615_616_512)],
)
def test_shapes_are_the_published_ones(shape: str, parameters: int) -> None:
    decoder = whole(shape, "bf16")
    assert sum(parameter.numel() for parameter in decoder.parameters()) == parameters
    assert decoder_bytes(decoder) == 2 * parameters
    config = SHAPES[shape]
    assert config.heads * config.head_dim == config.hidden_size


def test_four_bits_hold_what_they_promise() -> None:
    """Of an 8B: codes of four bits, a float32 scale for each output, 16 bits for all else."""
    config = SHAPES["llama-3-8b"]
    hidden, mlp, kv = config.hidden_size, config.intermediate_size, config.kv_heads * config.head_dim
    weights = config.layers * hidden * (2 * hidden + 2 * kv + 3 * mlp)
    outputs = config.layers * (3 * hidden + 2 * kv + 2 * mlp)
    gains = (2 * config.layers + 1) * hidden
    rest = 2 * (2 * config.vocab_size * hidden + gains)
    assert decoder_bytes(whole("llama-3-8b", "w4a4kv4")) == weights // 2 + 4 * outputs + rest
    # w4a16: a scale and a zero-point, float32, for each of the groups of 128 weights.
    assert decoder_bytes(whole("llama-3-8b", "w4a16g128")) == weights // 2 + 8 * weights // 128 + rest
    # Merged gains are gone, and a tied head has a weight of its own.
    assert (
        decoder_bytes(whole("llama-3-8b", "w4a4kv4", "quarot"))
        == weights // 2 + 4 * outputs + rest - 2 * gains
    )
    tied, untied = (whole("llama-3.2-1b", "w4a4kv4", online) for online in ("none", "quarot"))
    assert tied.lm_head.weight is tied.embed_tokens and untied.lm_head.weight is not untied.embed_tokens


@pytest.mark.parametrize("online", list(ONLINE))
@pytest.mark.parametrize("form", FORMS)
def test_activations_stay_finite_and_the_bytes_are_those_counted(form: str, online: str) -> None:
    decoder = made(form, online, layers=8)
    least, size = work(decoder, 5, 3, 7.0, 2), decoder_bytes(decoder)
    blueprint = made(form, online, META, layers=8)
    assert (work(blueprint, 5, 3, 7.0, 2), decoder_bytes(blueprint)) == (least, size)
    assert merge_projections(decoder) == []
    assert (work(decoder, 5, 3, 7.0, 2), decoder_bytes(decoder)) == (least, size)

    decoding = Decoding(decoder, 2, 16)
    block = decoder.layers[0]
    assert isinstance(block, Block)
    assert decoding.cache.nbytes == 2 * 16 * kv_bytes(decoder.config, block.self_attn.kv, decoder.dtype)
    logits = decoding.prefill(torch.arange(24).view(2, 12))
    assert logits.isfinite().all() and logits.float().std() > 0.05
    again = decoding.step(logits.argmax(-1))
    assert again.isfinite().all() and not torch.equal(again, logits)


def test_online_parts_are_where_methods_put_them() -> None:
    def seams(form: str, online: str) -> tuple[object, ...]:
        decoder = made(form, online)
        block = decoder.layers[-1]
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        transforms = (attention.rotation, attention.output_transform, mlp.hidden_transform)
        sizes = tuple(None if one is None else (one.size, one.inner) for one in transforms)
        kept = (
            mlp.gate_proj.keep,
            mlp.down_proj.keep,
            decoder.config.hidden_size,
            decoder.config.norm_divisor,
        )
        return sizes, kept, decoder.residual_scaling, decoder.norm.weight is None

    plain, width = (None, None, None), SMALL.hidden_size
    assert seams("w4a4kv4", "none") == (plain, (0, 0, width, None), False, False)
    every = ((32, 1), (4, 32), (384, 1))
    assert seams("w4a4kv4", "quarot") == (every, (0, 0, width, None), False, True)
    assert seams("w4a4kv4", "quad") == (every, (64, 0, width + 64, width), False, True)
    assert seams("w4a4kv4", "fptquant") == ((None, None, (128, 1)), (0, 0, width, None), True, True)
    # R3 serves the cache, and a float decoder has none of them.
    assert seams("w4a16g64", "quarot")[0] == (None, (4, 32), (384, 1))
    assert seams("bf16", "quad") == (plain, (0, 0, width, None), False, False)


def test_static_ranges_are_one_for_linears_that_read_one_input() -> None:
    decoder = made("w4a8kv8", "fptquant")
    for _, linear in decoder.linears():
        spec, packed = linear.activation, linear.packed
        assert spec is not None and spec.static and not spec.symmetric and linear.input_scale is not None
        assert linear.input_zero is not None and 0 < float(linear.input_zero) < 2**spec.bits
        assert packed is not None and packed.colsum is not None
        codes = unpack(packed.packed, packed.bits, packed.inputs)
        assert torch.equal(packed.colsum, codes.int().sum(-1, keepdim=True, dtype=torch.int32))
    block = decoder.layers[0]
    assert isinstance(block, Block)
    assert block.mlp.gate_proj.shares_input_with(block.mlp.up_proj)
    assert block.self_attn.kv is not None and block.self_attn.kv.static


def test_what_is_compiled_first_is_a_layer_of_the_shape() -> None:
    config = SHAPES["qwen2.5-7b"]
    small = tiny(config)
    assert (small.layers, small.hidden_size, small.heads) == (1, config.hidden_size, config.heads)


def test_forms_are_bits_or_bf16() -> None:
    assert form_bits("bf16").is_float and str(form_bits("w4a8kv8")) == "w4a8kv8"
    with pytest.raises(UserError, match="fp8"):
        form_bits("fp8")
